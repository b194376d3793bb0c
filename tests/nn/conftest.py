"""Puts `model_sizes` (small configurations and their twins) within reach of the tests here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
