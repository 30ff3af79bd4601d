"""The suites import their siblings as `python benchmarks/report.py` does: by this folder alone on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
