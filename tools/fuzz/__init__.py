"""Damaged checkpoints, thousands of them, through everything that reads one."""

import sys
from pathlib import Path

# For `builders`, which makes the sound checkpoints: the module that tests share, under the name they know it by.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "support"))
