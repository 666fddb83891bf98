"""`make demo` tells the truth, with port 443 and without, and beside a copy of itself."""
import contextlib
import os
import subprocess
import sys

import pytest
from peers import HANG, listen
from service import BIN, ROOT, keep

WAYS = {"port 443 free": "found by /.well-known/matrix/server", "port 443 taken": "found by the port in its name"}


def start():
    return subprocess.Popen([sys.executable, "-I", str(ROOT / "test/demo/demo.py")],
                            env={**os.environ, "LKJWT_BIN": BIN}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, cwd="/")


def finish(demo):
    try:
        text = demo.communicate(timeout=HANG)[0]
    finally:
        demo.terminate()    # it then ends what it started
    keep("demo", text)
    assert demo.returncode == 0, text
    assert text.splitlines()[-1].startswith("All as expected")
    return text


@pytest.mark.parametrize("way", WAYS)
def test_demo(way):
    with listen("127.0.0.1", 443) if "taken" in way else contextlib.nullcontext():
        text = finish(start())
    assert WAYS[way] in text
    for n in range(1, 9):
        assert f"\n{n}. " in text
    for word in ("signature: HMAC-SHA256", "roomJoin", "M_UNAUTHORIZED"):
        assert word in text


def test_demo_beside_another():
    demos = [start(), start()]
    try:
        for text in [finish(d) for d in demos]:
            assert any(way in text for way in WAYS.values())
    finally:
        for d in demos:
            d.terminate()
            d.wait(HANG)
