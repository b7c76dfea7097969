"""The command geodesic-rl; train.py and evaluate.py are its subcommands."""

import sys

from agents.run.starting import Starting


def main() -> int:
    """Run the command with what was typed; returns the exit code."""
    with Starting():
        from agents.run import process

        process.prepare()
        from agents.run import cli  # imports PyTorch

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
