"""The campaign: runs that are killed, files that are damaged, environments and disks that fail.

python -m tests.campaign --kills 1000 --files 10000 --words 1000 --minutes 2 [--result FILE]
"""

import sys

from agents.run import process

process.prepare()

from tests.campaign.campaign import main  # noqa: E402, imports PyTorch

sys.exit(main())
