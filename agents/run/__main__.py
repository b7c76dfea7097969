"""The command geodesic-rl; train.py and evaluate.py are its subcommands."""

from __future__ import annotations

import sys

from agents.run import process


def main() -> int:
    """Run the command with what was typed; returns the exit code."""
    process.prepare()
    with process.starting():
        from agents.run import cli  # imports PyTorch

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
