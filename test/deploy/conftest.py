import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "blackbox")]

from exchange import Rig    # noqa: E402
from peers import Pki       # noqa: E402


@pytest.fixture(scope="session")
def pki():
    return Pki()


@pytest.fixture(scope="module")
def rig(pki):
    rig = Rig(pki)
    yield rig
    rig.stop()
