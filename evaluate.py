"""Evaluate a trained agent: python evaluate.py RUN --episodes 100"""

import sys

from agents.run.starting import Starting

if __name__ == "__main__":
    with Starting():
        from agents.run import process

        process.prepare()
        from agents.run.cli import evaluate  # imports PyTorch

    sys.exit(evaluate(sys.argv[1:]))
