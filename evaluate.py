"""Evaluate a trained agent: python evaluate.py RUN --episodes 100"""

import sys

from agents.run.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:]))
