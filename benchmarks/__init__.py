"""Benchmarks: one script per claim in a folder per subject, the libraries that they share beside this file.

`python -m benchmarks.natural.returns`, called in the project's root, measures one claim; `--help` says what and how.
What was measured lies in results/, under the subject and the script's name.
"""

import sys

from agents.run import process

if "torch" not in sys.modules:
    process.prepare()  # as train.py does, so that rates are those of the commands
