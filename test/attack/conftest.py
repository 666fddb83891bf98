"""Attacks on the release binary as a whole. The peers and the ways to start
the service are those of test/blackbox."""
import os
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
# What this suite makes the service say is searched by this suite.
os.environ.setdefault("LKJWT_CANARY_DIR", str(TOP / "build/canary-attack"))
sys.path.insert(0, str(TOP / "test" / "blackbox"))

import service  # noqa: E402
from exchange import Rig  # noqa: E402
from peers import Pki  # noqa: E402


def pytest_sessionstart(session):
    """What an earlier run left is not this run's leak."""
    if service.CANARY_DIR.is_dir():
        for old in service.CANARY_DIR.iterdir():
            if old.is_file():
                old.unlink()


@pytest.fixture(scope="session")
def pki():
    return Pki()


@pytest.fixture(scope="module")
def rig(pki):
    rig = Rig(pki)
    yield rig
    rig.stop()
