import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

import service  # noqa: E402
from fixtures import pki, pytest_sessionstart, rig  # noqa: E402, F401


@pytest.fixture(scope="module")
def svc(rig):
    """One service for all of a module. It must outlive each test, stop with
    0, and have written only well-formed log lines."""
    with rig.service(LKJWT_METRICS_BIND=f"127.0.0.1:{service.free_port()}") as s:
        yield s
        assert s.proc.poll() is None, s.log_text()
        s.log()
        assert s.stop() == 0
