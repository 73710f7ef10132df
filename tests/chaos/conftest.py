"""The suite's modules find each other, and the work that they disturb, by their names."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent, HERE.parent / "workflows", HERE.parent / "end_to_end"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
