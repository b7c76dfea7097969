"""The documents' own modules, which are no package, stand beside the pages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
