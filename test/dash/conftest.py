"""The helpers of the black-box suite serve here too; what its binary wrote is
kept apart from theirs."""

import os
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
os.environ.setdefault("LKJWT_CANARY_DIR", str(TOP / "build" / "canary-dash"))
sys.path.insert(0, str(TOP / "test" / "blackbox"))
