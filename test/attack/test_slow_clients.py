"""Five hundred clients that hold on to their connections as slowly as they
can (slowhttptest in its four modes): each is closed by its deadline, and
others are served all the time. All attacks play at once, each on a service
of its own."""
import re
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from exchange import check_granted
from peers import wait_for, which
from service import Closed
from tap import bind, unharmed

COUNT = 500
LONGEST = 45        # seconds, far beyond each deadline (10, 15 and 10 s)
GET = b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n"


def slowhttptest(svc, *args):
    """Runs to its end; (why it ended, whether its probe was answered)."""
    p = subprocess.run(
        [which("slowhttptest"), "-c", str(COUNT), "-r", "250", "-l",
         str(LONGEST), "-p", "10", "-u", f"{svc.base}/get_token", *args],
        capture_output=True, text=True, timeout=LONGEST + 60)
    text = re.sub(r"\x1b\[[0-9;]*m", "", p.stdout)
    assert p.returncode == 0, text
    return (re.search(r"Exit status: *(.*)", text)[1].strip(),
            re.findall(r"service available: *(\w+)", text)[-1])


def tool(*args):
    """An attack by slowhttptest that ends because every connection did."""
    def attack(svc):
        assert slowhttptest(svc, *args) == ("No open connections left", "YES")
    return attack


def slow_reader(svc):
    """What the kernel took is not held by the service: such a connection is
    idle, and goes as idle ones do, long before its client has read all."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(slowhttptest, svc, "-X", "-w", "1", "-y", "2",
                          "-n", "1", "-z", "1", "-k", "10")
        wait_for("all replies and no connection", lambda: (
            replies(svc, 405) >= 10 * COUNT
            and svc.metrics()["lkjwt_connections"] < 20), LONGEST)
        assert not run.done(), run.result()
        assert run.result()[1] == "YES"


def no_reader(svc):
    """Each asks 400 times and reads nothing: the kernel takes some of the
    replies, the service must give up on the rest. A small segment size keeps
    the kernel's share small."""
    socks = []
    for _ in range(COUNT):
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        s.settimeout(20)
        s.connect(("127.0.0.1", svc.port))
        s.setblocking(False)
        s.send(GET * 400)
        socks.append(s)
    wait_for("the end of all", lambda: event(svc, "SLOW_READ") >= COUNT,
             LONGEST)
    for s in socks:
        s.close()


def event(svc, name):
    return svc.metrics().get(f'lkjwt_events_total{{event="{name}"}}', 0)


def replies(svc, code):
    return sum(v for k, v in svc.metrics().items() if k.startswith(
        "lkjwt_http_requests_total") and f'code="{code}"' in k)


ATTACKS = {  # attack, environment, what is counted afterwards: (what, least)
    "-H heads": (tool("-H", "-i", "1", "-x", "10"), {},
                 (event, "SLOW_HEAD", COUNT)),
    "-B bodies": (tool("-B", "-i", "1", "-x", "4", "-s", "1500"), {},
                  (event, "SLOW_BODY", COUNT)),
    "-B bodies over the small buffer": (
        tool("-B", "-i", "1", "-x", "4", "-s", "60000"), {},
        (event, "SLOW_BODY", COUNT)),
    "-R ranges over the head's limit": (tool("-R"), {},
                                        (replies, 431, COUNT)),
    "-R ranges": (tool("-R", "-b", "300"), {}, (replies, 405, COUNT)),
    "-X reads": (slow_reader, {"LKJWT_KEEPALIVE_S": "3"},
                 (replies, 405, 10 * COUNT)),
    "no reads": (no_reader, {}, (event, "SLOW_READ", COUNT)),
    "-H heads, too many": (tool("-H", "-i", "1", "-x", "10"),
                           {"LKJWT_MAX_CONNS": "200"},
                           (event, "SLOW_HEAD", 1)),
    "-B bodies, too many": (tool("-B", "-i", "1", "-x", "4", "-s", "1500"),
                            {"LKJWT_MAX_CONNS": "200"},
                            (event, "SLOW_BODY", 1)),
}


class Others:
    """with Others(...): real exchanges, each on a connection of its own. A
    pool that is too small may send a new one away; then it comes again."""

    def __init__(self, svc, rig, full):
        self.svc, self.rig, self.tries = svc, rig, 10 if full else 1
        self.done, self.wrong, self.over = 0, [], threading.Event()

    def _run(self):
        while not self.over.wait(0.2):
            path = ("/get_token", "/sfu/get")[self.done % 2]
            for left in reversed(range(self.tries)):
                try:
                    check_granted(self.svc.post(path, self.rig.body(
                        path, self.rig.full)))
                    break
                except (AssertionError, OSError, Closed) as e:
                    if not left:
                        self.wrong.append(e)
            self.done += 1

    def __enter__(self):
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def __exit__(self, kind, *_):
        self.over.set()
        self.thread.join(60)
        if kind is None:
            assert self.done > 3 and not self.wrong, self.wrong


def play(rig, attack, env, count):
    with rig.service(LKJWT_METRICS_BIND=bind(), **env) as svc:
        with unharmed(svc), Others(svc, rig, "LKJWT_MAX_CONNS" in env):
            attack(svc)
        read, what, least = count
        assert read(svc, what) >= least, (what, read(svc, what))
        check_granted(svc.post("/sfu/get", rig.body("/sfu/get", rig.other)))
        assert svc.stop() == 0


@pytest.fixture(scope="module")
def played(rig):
    with ThreadPoolExecutor(len(ATTACKS)) as pool:
        yield {name: pool.submit(play, rig, *row)
               for name, row in ATTACKS.items()}


@pytest.mark.parametrize("name", ATTACKS)
def test_s14_s15(played, name):
    played[name].result()
