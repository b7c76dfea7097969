"""Evaluate a trained agent: python evaluate.py RUN --episodes 100"""

import sys

from agents.run import process

if __name__ == "__main__":
    process.prepare()
    with process.starting():
        from agents.run.cli import evaluate  # imports PyTorch

    sys.exit(evaluate(sys.argv[1:]))
