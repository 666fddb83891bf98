"""SECURITY.md 4: full pools, the lane of /healthz, few descriptors, flat memory."""
import json
import resource
import socket
import threading
import time

import pytest

from exchange import UNAUTHORIZED, check_error, check_granted, make_body
from peers import Homeserver, Reply, wait_for
from service import CANARY_TOKEN, DEADLINE, Closed, Service

GET = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.fixture(scope="module")
def stuck(pki):
    """A homeserver that takes the question and never answers. On an address
    of its own, so that a cap per address leaves the others alone."""
    with Homeserver("127.0.0.2", tls=pki.leaf(ips=["127.0.0.2"])) as hs:
        hs.on("/_matrix/federation/v1/openid/userinfo", Reply(raw=b"", hang=True))
        yield hs


def pending(s, hs, n):
    """A connection whose complete request waits at hs."""
    w = s.wire()
    body = json.dumps(make_body("/sfu/get", hs.netloc, token=f"{CANARY_TOKEN}.{n}")).encode()
    w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return w


def is_open(w):
    """Still served: a request on it is answered."""
    try:
        w.send(GET)
        return w.reply().status == 200
    except (OSError, Closed):
        return False


def idle(s):
    time.sleep(0.005)               # each of an age of its own
    w = s.wire()
    w.send(GET)
    assert w.reply().status == 200
    return w


def test_s15_full_pool(rig, stuck):
    """Every slot waits: /healthz has its lane, the rest is refused, and it passes."""
    stuck.forget()
    with rig.service(LKJWT_MAX_CONNS="8", LKJWT_LOOKUP_TIMEOUT_S="4") as s:
        held = [pending(s, stuck, n) for n in range(8)]
        wait_for("lookups", lambda: len(stuck.asked()) == 8)
        for _ in range(30):
            assert s.request("GET", "/healthz", timeout=1).status == 200
            assert s.request("HEAD", "/healthz", timeout=1).status == 200
        for path in ("/sfu/get", "/get_token", "/nothing"):
            with s.wire() as w:
                w.send(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{{}}".encode())
                reply = w.reply("POST")
                assert (reply.status, reply.header("Connection")) == (503, "close")
                assert w.at_end()
        s.wait_event("CONN_FULL")
        for w in held:
            check_error(w.reply("POST"), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))


def test_lane_is_not_for_sitting_in(rig, stuck):
    """Connections that sit in the lane cannot keep a probe out."""
    stuck.forget()
    with rig.service(LKJWT_MAX_CONNS="8", LKJWT_DRAIN_S="0") as s:
        held = [pending(s, stuck, n) for n in range(8)]
        wait_for("lookups", lambda: len(stuck.asked()) == 8)
        sitting = [s.wire() for _ in range(40)]
        for w in sitting[::2]:
            try:
                w.send(GET[:9])
            except OSError:
                pass
        assert s.request("GET", "/healthz", timeout=2).status == 200
        for w in held + sitting:
            w.close()


def test_oldest_idle_goes_first(rig):
    with rig.service(LKJWT_MAX_CONNS="8") as s:
        first = [idle(s) for _ in range(8)]
        more = [idle(s) for _ in range(3)]
        assert [w.at_end() for w in first[:3]] == [True] * 3
        assert all(is_open(w) for w in first[3:] + more)
        for w in first + more:
            w.close()


def test_a_request_in_work_is_never_thrown_out(rig, stuck):
    """Idle and unfinished ones go, the oldest first; those with a complete request stay."""
    stuck.forget()
    with rig.service(LKJWT_MAX_CONNS="8", LKJWT_LOOKUP_TIMEOUT_S="4") as s:
        working = [pending(s, stuck, n) for n in range(4)]
        wait_for("lookups", lambda: len(stuck.asked()) == 4)
        half = [s.wire() for _ in range(4)]
        for w in half:
            w.send(GET[:20])
        time.sleep(0.02)            # ages are told apart by milliseconds
        extra = [idle(s) for _ in range(4)]
        assert [w.drain() for w in half] == [b""] * 4
        assert all(is_open(w) for w in extra)
        for w in working:
            check_error(w.reply("POST"), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
        for w in working + half + extra:
            w.close()


def test_many_connections_come_and_go(rig):
    with rig.service(LKJWT_MAX_CONNS="16") as s:
        for n in range(400):
            w = s.wire()
            if n % 3 == 0:
                w.send(GET[:n % len(GET)])
            elif n % 3 == 1:
                w.send(GET)
                w.reply()
            w.close()
        fds = wait_for("closed connections", lambda: len(descriptors(s)) < 30 and descriptors(s))
        assert fds
        check_granted(s.post("/get_token", rig.body("/get_token", rig.full)))


def descriptors(s):
    import os
    return os.listdir(f"/proc/{s.pid}/fd")


def test_thousand_connections(rig):
    """The default pool: 1,000 open connections are served."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with rig.service() as s:
        wires = [s.wire() for _ in range(1000)]
        for w in wires:
            w.send(GET)
        assert all(w.reply().status == 200 for w in wires)
        assert all(is_open(w) for w in wires[::50])
        for w in wires:
            w.close()
        assert rss(s) < 48 << 20


def test_few_descriptors(rig):
    """NOFILE 64: fewer connections, said so, and still there."""
    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with Service(rig.env(), preexec_fn=few) as s:
        assert wait_for("a word about it", lambda: any(
            w in json.dumps(line) for line in s.log() for w in ("MAX_CONNS", "NOFILE", "max_conns", "descriptors")))
        wires = []
        for _ in range(120):
            w = s.wire()
            w.send(GET)
            wires.append(w)
        assert s.request("GET", "/healthz", timeout=5).status == 200
        for w in wires:
            w.close()
        wait_for("room again", lambda: s.post("/sfu/get", rig.body("/sfu/get", rig.full)).status == 200)
        assert s.stop() == 0


def rss(s):
    with open(f"/proc/{s.pid}/status") as f:
        for line in f:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024


def test_s13_memory_stays(rig):
    """The same load again touches no new memory."""
    with rig.service() as s:
        def load():
            for n in range(300):
                s.post("/sfu/get", rig.body("/sfu/get", rig.other if n % 2 else rig.full))
                s.post("/get_token", "[" * 2000)
                s.request("POST", f"/x{n}", "y" * 60000)
                s.request("POST", "/sfu/get", "z" * 66000)
        load()
        before = rss(s)
        load()
        load()
        assert rss(s) <= before + (64 << 10)
        assert rss(s) < 48 << 20


def test_huge_body_costs_nothing(rig):
    """4 GB announced and 2 MB sent: refused by the length, nothing kept."""
    with rig.service() as s:
        before = rss(s)
        for head in (b"Content-Length: 4294967296\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n"):
            with s.wire() as w:
                w.send(b"POST /get_token HTTP/1.1\r\nHost: h\r\n" + head)
                try:
                    for _ in range(20):
                        w.send(b"x" * 100000)
                except OSError:
                    pass
                check_error(w.reply("POST"), 413, "M_TOO_LARGE")
        assert rss(s) <= before + (256 << 10)


def test_s15_health_amid_garbage(rig, stuck):
    """Probes are answered while clients stall, flood and break off."""
    stop = threading.Event()

    def noise(s, n):
        while not stop.is_set():
            try:
                with s.wire() as w:
                    w.send([b"\0" * 5000, GET[:10], b"POST /get_token HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n",
                            b"GET /" + b"x" * 3000][n % 4])
                    w.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            time.sleep(0.005)
    with rig.service(LKJWT_DRAIN_S="0") as s:
        threads = [threading.Thread(target=noise, args=(s, n), daemon=True) for n in range(4)]
        for t in threads:
            t.start()
        held = [pending(s, stuck, n) for n in range(30)]
        for _ in range(60):
            assert s.request("GET", "/healthz", timeout=1).status == 200
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))
        stop.set()
        for t in threads:
            t.join(DEADLINE)
        for w in held:
            w.close()


def test_too_many_body_buffers(rig):
    """More large bodies at once than there are buffers: 429 with Retry-After, then all is well."""
    body = json.dumps(rig.body("/sfu/get", rig.other)).encode()
    body += b" " * (60000 - len(body))
    with rig.service() as s:
        wires = []
        for _ in range(80):
            w = s.wire()
            w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: 60000\r\n\r\n" + body[:30000])
            wires.append(w)
        s.wait_event("BODY_POOL")
        statuses = []
        for w in wires:
            try:
                w.send(body[30000:])
            except OSError:
                pass
            reply = w.reply("POST")
            statuses.append(reply.status)
            if reply.status == 429:
                check_error(reply, 429, "M_LIMIT_EXCEEDED")
                assert int(reply.header("Retry-After")) >= 1
                assert reply.json["retry_after_ms"] >= 1
            else:
                check_granted(reply)
            w.close()
        assert statuses.count(200) >= 60 and statuses.count(429) >= 10, statuses
        check_granted(s.post("/sfu/get", body))
