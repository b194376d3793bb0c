"""Puts `model_sizes` (small configurations and their twins) within reach of the tests here and in tests/nn."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
