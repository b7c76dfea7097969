"""Train an agent: python train.py npg --env Hopper-v5"""

import sys

from agents.run.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
