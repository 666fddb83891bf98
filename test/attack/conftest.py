"""Attacks on the release binary as a whole. The peers and the ways to start
the service are those of test/blackbox."""
import os
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
# What this suite makes the service say is searched by this suite.
os.environ.setdefault("LKJWT_CANARY_DIR", str(TOP / "build/canary-attack"))
sys.path.insert(0, str(TOP / "test" / "blackbox"))

from fixtures import pki, pytest_sessionstart, rig  # noqa: E402, F401
