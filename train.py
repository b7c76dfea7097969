"""Train an agent: python train.py npg --env Hopper-v5"""

import sys

from agents.run import process

if __name__ == "__main__":
    process.prepare()
    with process.starting():
        from agents.run.cli import train  # imports PyTorch

    sys.exit(train(sys.argv[1:]))
