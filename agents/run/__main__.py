"""The command geodesic-rl, which is train.py's, and evaluate.py's after the word evaluate."""

from __future__ import annotations

import sys

from agents.run import process


def main() -> int:
    """Run the command with what was typed; returns the exit code."""
    process.prepare()
    from agents.run.cli import evaluate, train  # imports PyTorch

    arguments = sys.argv[1:]
    return evaluate(arguments[1:]) if arguments[:1] == ["evaluate"] else train(arguments)


if __name__ == "__main__":
    sys.exit(main())
