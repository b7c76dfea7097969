"""Train an agent: python train.py npg --env Hopper-v5"""

import sys

from agents.run.starting import Starting

if __name__ == "__main__":
    with Starting():
        from agents.run import process

        process.prepare()
        from agents.run.cli import train  # imports PyTorch

    sys.exit(train(sys.argv[1:]))
