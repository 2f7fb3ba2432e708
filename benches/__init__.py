"""Benches; run them by `python -m benches`. Their baselines are in tests/support."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
