"""The helpers of the black-box suite serve here too; what was measured is
printed at the end and left in build/load/."""

import os
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
os.environ.setdefault("LKJWT_CANARY_DIR", str(TOP / "build" / "canary-load"))
sys.path.insert(0, str(TOP / "test" / "blackbox"))

from fixtures import pytest_sessionstart  # noqa: E402, F401

REPORT = []


def pytest_terminal_summary(terminalreporter):
    if not REPORT:
        return
    folder = TOP / "build" / "load"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text("\n".join(REPORT) + "\n")
    for line in REPORT:
        terminalreporter.write_line(line)
