import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

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


@pytest.fixture(scope="module")
def svc(rig):
    """One service for all of a module. It must outlive each test, stop with
    0, and have written only well-formed log lines."""
    with rig.service(LKJWT_METRICS_BIND=f"127.0.0.1:{service.free_port()}") as s:
        yield s
        assert s.proc.poll() is None, s.log_text()
        s.log()
        assert s.stop() == 0
