"""What the suites share that are run by pytest: for their conftest.py."""
import os

import pytest

import service
from exchange import Rig
from peers import Pki


def pytest_sessionstart(session):
    """What an earlier run left is not this run's leak. With LKJWT_CANARY_KEEP
    this session is one of several that share the folder (test/modules.py)."""
    if "LKJWT_CANARY_KEEP" in os.environ:
        return
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
