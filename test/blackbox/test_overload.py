"""SECURITY.md 4 and 8: rates, breakers, shared answers, client addresses, the budget of handshakes."""
import json
import os
import resource
import socket
import threading
import time

import pytest

from exchange import UNAUTHORIZED, check_error, check_granted, check_token, hashed, identity, make_body
from peers import Homeserver, Reply, together, wait_for
from service import CANARY_TOKEN, DEADLINE, Closed, free_port, run_cli

USERINFO = "/_matrix/federation/v1/openid/userinfo"
GONE = Reply(raw=b"", reset=True)
ON = {"LKJWT_RATE_USER": None, "LKJWT_RATE_SERVER": None, "LKJWT_BREAKER_FAILURES": None}


def are_told(s, event, count, **match):
    """That many lines of the event come, and no more."""
    s.wait_event(event, count, **match)
    return len(s.events(event, **match)) == count


def ask(s, rig, hs, path="/sfu/get", **more):
    return s.post(path, rig.body(path, hs, **more))


# ---- circuit breakers

def trip(s, rig, hs, count=5):
    """The homeserver fails that often; its breaker opens."""
    before = len(s.events("BREAKER_TRIPPED"))
    for n in range(count):
        check_error(ask(s, rig, hs), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
    s.wait_event("BREAKER_TRIPPED", before + 1)


def until_granted(s, rig, hs, timeout=DEADLINE):
    """Ask until it works again; how often it did not."""
    end = time.monotonic() + timeout
    for n in range(1000):
        reply = ask(s, rig, hs)
        if reply.status == 200:
            return n
        check_error(reply, 401, "M_UNAUTHORIZED", UNAUTHORIZED)
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("server, pauses", [
    ("other", [(1600, 2400), (3200, 4800)]),     # a stranger: 2 s, doubling
    ("full", [(1600, 2400), (2400, 3600)]),      # the operator's: 3 s at most
])
def test_breaker_of_a_homeserver(rig, server, pauses):
    """Five failures open it: nobody is asked, the reply is the usual one. After the pause one request tries."""
    hs = getattr(rig, server)
    with rig.service(LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}", **ON) as s:
        check_granted(ask(s, rig, hs))
        hs.on(USERINFO, GONE)
        try:
            hs.forget()
            trip(s, rig, hs)
            begin, asked = time.monotonic(), len(hs.asked())
            for _ in range(20):
                check_error(ask(s, rig, hs), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
            if time.monotonic() < begin + 1:        # the pause is not over
                s.wait_event("BREAKER_OPEN", 20, step="breaker")
                assert len(hs.asked()) == asked
                assert s.metrics()["lkjwt_breakers_open"] == 1
            else:
                s.wait_event("BREAKER_OPEN", step="breaker")
            check_granted(ask(s, rig, rig.full if hs is rig.other else rig.other))
            wait_for("the pause", lambda: time.sleep(0.1) or ask(s, rig, hs).status and len(hs.asked()) > asked)
            s.wait_event("BREAKER_TRIPPED", 2)
            told = [int(e["pause_ms"]) for e in s.events("BREAKER_TRIPPED", server=hs.netloc)]
            assert all(lo <= ms <= hi for ms, (lo, hi) in zip(told, pauses)), told
        finally:
            hs.off()
        assert until_granted(s, rig, hs) > 0
        assert s.metrics()["lkjwt_breakers_open"] == 0
        assert [ask(s, rig, hs).status for _ in range(3)] == [200] * 3


def test_breaker_lets_one_request_try(rig):
    """Half-open: while one request is out, the others are refused at once; its success serves all."""
    hs = rig.other
    with rig.service(LKJWT_BREAKER_FAILURES="2") as s:
        check_granted(ask(s, rig, hs))
        hs.on(USERINFO, GONE)
        try:
            trip(s, rig, hs, 2)
            hs.on(USERINFO, Reply(raw=b"", hang=True))
            hs.forget()

            def left_behind():
                try:
                    ask(s, rig, hs)
                except Closed:              # the service stops first
                    pass

            tries = []

            def tried():
                tries.append(threading.Thread(target=left_behind))
                tries[-1].start()
                time.sleep(0.2)
                return hs.asked()
            wait_for("a request that tries", tried)
            refused = len(tries) - 1
            for _ in range(10):
                check_error(ask(s, rig, hs), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
            assert are_told(s, "BREAKER_OPEN", refused + 10) and len(hs.asked()) == 1
        finally:
            hs.off()


@pytest.mark.parametrize("reply", [
    Reply(401, {"errcode": "M_UNKNOWN_TOKEN"}), Reply(400, "no"), Reply(500, "no"), Reply(200, "{"),
    Reply(200, {"sub": "@eve:elsewhere.example"}), Reply(200, "x" * 10000), Reply(302, headers=[("Location", "/")]),
], ids=["401", "400", "500", "no JSON", "another's user", "too large", "redirect"])
def test_poisoned_tokens_open_no_breaker(rig, reply):
    """A complete reply is a success, whatever it says: a crafted token closes the way for nobody (T31)."""
    with rig.service(**ON) as s:
        rig.other.on(USERINFO, reply)
        try:
            for _ in range(7):
                check_error(ask(s, rig, rig.other), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
            for token in ("a b", "a\x7f", "\u0001"):
                body = make_body("/sfu/get", rig.other.netloc, token=token)
                check_error(s.post("/sfu/get", body), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
        finally:
            rig.other.off()
        check_granted(ask(s, rig, rig.other))
        assert not s.events("BREAKER_TRIPPED")


@pytest.mark.parametrize("fail", [Reply(503, "busy"), GONE], ids=["5xx", "reset"])
def test_breaker_of_the_sfu(rig, fail):
    """Rooms that cannot be created open it: 500 at once, restricted users go on, and the SFU's return is seen."""
    with rig.service(LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}", **ON) as s:
        rig.sfu.fail = fail
        try:
            for _ in range(3):              # two calls each
                check_error(ask(s, rig, rig.full), 500, "M_UNKNOWN")
            s.wait_event("BREAKER_TRIPPED")
            rig.sfu.forget()
            begin = time.monotonic()
            for _ in range(5):
                check_error(ask(s, rig, rig.full), 500, "M_UNKNOWN")
            s.wait_event("BREAKER_OPEN", target="sfu")
            if time.monotonic() < begin + 1:        # the pause is not over
                # the third one's repeat was refused, too
                assert not rig.sfu.rooms and are_told(s, "BREAKER_OPEN", 6, target="sfu")
                assert s.metrics()["lkjwt_breakers_open"] == 1
            check_granted(ask(s, rig, rig.other))
        finally:
            rig.sfu.fail = None
        wait_for("the SFU's return", lambda: time.sleep(0.1) or ask(s, rig, rig.full).status == 200)
        assert s.metrics()["lkjwt_breakers_open"] == 0


# ---- rates

def test_rate_of_a_user(rig):
    """Thirty at once, then one each two seconds; other users are served; the rest is told when to come again."""
    with rig.service(**ON) as s:
        sub, token = rig.user(rig.full)
        got = [ask(s, rig, rig.full, sub=sub, token=token) for _ in range(33)]
        limited = [r for r in got if r.status != 200]
        assert 1 <= len(limited) <= 3, [r.status for r in got]
        for r in limited:
            check_error(r, 429, "M_LIMIT_EXCEEDED")
            assert int(r.header("Retry-After")) >= 1 and r.json["retry_after_ms"] >= 1000
        assert are_told(s, "RATE_USER", len(limited))
        check_granted(ask(s, rig, rig.full))
        wait_for("one more", lambda: time.sleep(0.3) or ask(s, rig, rig.full, sub=sub, token=token).status == 200)


def test_rate_of_a_server(rig):
    """Strangers' servers have a budget, spent only by users that were verified; listed ones have none."""
    with rig.service(LKJWT_RATE_SERVER="4:0.01") as s:
        for _ in range(10):                 # unproven: not charged
            body = make_body("/sfu/get", rig.other.netloc, token=f"{CANARY_TOKEN}.unknown")
            check_error(s.post("/sfu/get", body), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
        got = [ask(s, rig, rig.other, path=("/sfu/get", "/get_token")[n % 2]).status for n in range(6)]
        assert got == [200] * 4 + [429] * 2 and are_told(s, "RATE_SERVER", 2)
        assert [ask(s, rig, rig.full).status for _ in range(10)] == [200] * 10


@pytest.mark.parametrize("env, event", [
    ({"LKJWT_RATE_ROOMS_USER": "2:0.001"}, "one user"),
    ({"LKJWT_RATE_ROOMS_SERVER": "2:0.001"}, "many users")])
def test_rate_of_new_rooms(rig, env, event):
    """Only under the lone `*`, only for rooms not created of late; a room that was is there for all."""
    who = {} if event == "many users" else dict(zip(("sub", "token"), rig.user(rig.other)))
    with rig.service(LIVEKIT_FULL_ACCESS_HOMESERVERS="*", **env) as s:
        got = [ask(s, rig, rig.other, room=f"!new{n}:x", **who).status for n in (1, 2, 1, 3, 2)]
        assert got == [200, 200, 200, 429, 200] and are_told(s, "RATE_ROOMS", 1)
    with rig.service(**env) as s:
        assert [ask(s, rig, rig.full, room=f"!new{n}:x").status for n in range(5)] == [200] * 5


@pytest.mark.parametrize("name, value, ok", [
    ("LKJWT_RATE_USER", "30:0.5", True), ("LKJWT_RATE_USER", "off", True), ("LKJWT_RATE_USER", "1:0.0001", True),
    ("LKJWT_RATE_USER", "1000000:10000", True), ("LKJWT_RATE_USER", "0:1", False),
    ("LKJWT_RATE_USER", "30", False), ("LKJWT_RATE_USER", "30:", False), ("LKJWT_RATE_USER", "30:0", False),
    ("LKJWT_RATE_USER", ":1", False), ("LKJWT_RATE_USER", "30:1.", False), ("LKJWT_RATE_USER", "30:.5", False),
    ("LKJWT_RATE_USER", "30:0.00001", False), ("LKJWT_RATE_USER", "-1:1", False),
    ("LKJWT_RATE_USER", "30:10001", False), ("LKJWT_RATE_USER", "30:1e3", False),
    ("LKJWT_RATE_ADDR", "5:1", False), ("LKJWT_CONNS_PER_ADDR", "5", False),
    ("LKJWT_TRUSTED_PROXIES", "10.0.0.0/8, ::1", True), ("LKJWT_TRUSTED_PROXIES", "10.0.0.0/33", False),
    ("LKJWT_TRUSTED_PROXIES", "proxy", False), ("LKJWT_BREAKER_FAILURES", "101", False),
    ("LKJWT_TLS_COLD_PER_S", "0", True), ("LKJWT_TLS_COLD_PER_S", "1001", False),
])
def test_environment(rig, name, value, ok):
    got = run_cli(["--print-config"], rig.env(**{name: value}))
    assert (got.code == 0) == ok, got
    assert ok or f"var={name}" in got.err or "var=LKJWT_TRUSTED_PROXIES" in got.err


def test_limits_are_told_at_the_start(rig):
    with rig.service(LIVEKIT_FULL_ACCESS_HOMESERVERS="*", LKJWT_RATE_USER="7:2.5", LKJWT_RATE_SERVER=None) as s:
        told = s.wait_event("LIMITS")
        assert {k: told[k] for k in told if k.startswith("LKJWT_RATE")} == {
            "LKJWT_RATE_USER": "7:2.5", "LKJWT_RATE_SERVER": "2000:100", "LKJWT_RATE_ROOMS_USER": "20:0.0167",
            "LKJWT_RATE_ROOMS_SERVER": "500:5", "LKJWT_RATE_ADDR": "off"}
        assert told["LKJWT_BREAKER_FAILURES"] == "0" and told["LKJWT_TLS_COLD_PER_S"] == "25"


# ---- shared answers

def test_equal_tokens_share_one_lookup(rig):
    """Twenty requests with one token, from two devices and both endpoints: one userinfo call, each its own grant."""
    hs = rig.full
    sub, token = rig.user(hs)
    hs.on(USERINFO, Reply(200, {"sub": sub}, delay=0.5))
    hs.forget()
    try:
        with rig.service() as s:
            jobs = [lambda n=n: s.post(("/sfu/get", "/get_token")[n % 2], rig.body(
                ("/sfu/get", "/get_token")[n % 2], hs, sub, token, device=f"D{n}")) for n in range(20)]
            for n, reply in enumerate(together(jobs)):
                path = ("/sfu/get", "/get_token")[n % 2]
                check_token(check_granted(reply), identity(path, sub, device=f"D{n}"), hashed(
                    "!room:example.org", "m.call#ROOM"))
            assert 1 <= len(hs.asked()) <= 3
    finally:
        hs.off()


def test_a_token_shared_is_judged_for_each(rig):
    """The answer is shared, the rest is not: who claims another user is refused beside who does not."""
    hs = rig.other
    sub, token = rig.user(hs)
    hs.on(USERINFO, Reply(200, {"sub": sub}, delay=0.5))
    hs.forget()
    try:
        with rig.service() as s:
            jobs = [lambda n=n: s.post("/get_token", rig.body(
                "/get_token", hs, sub if n % 2 else f"@eve:{hs.netloc}", token)) for n in range(10)]
            for n, reply in enumerate(together(jobs)):
                if n % 2:
                    check_granted(reply)
                else:
                    check_error(reply, 401, "M_UNAUTHORIZED", UNAUTHORIZED)
            assert len(hs.asked()) <= 2
    finally:
        hs.off()


def test_followers_are_counted_as_waiting(rig, pki):
    """One slow server and one token do not take the clients' pool: 128 wait for the answer, the rest is told."""
    with Homeserver("127.0.4.1", tls=pki.leaf(ips=["127.0.4.1"])) as hs:
        hs.on(USERINFO, Reply(raw=b"", hang=True))
        with rig.service(LKJWT_DRAIN_S="0") as s:
            body = json.dumps(make_body("/sfu/get", hs.netloc, token=f"{CANARY_TOKEN}.crowd")).encode()
            wires = []
            for _ in range(160):
                wires.append(s.wire())
                wires[-1].send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            wait_for("the call", hs.asked)
            assert are_told(s, "QUEUE_FULL", 31) and len(hs.asked()) == 1
            check_granted(ask(s, rig, rig.full))
            for w in wires:
                w.close()


@pytest.mark.parametrize("answer", [Reply(401, {"errcode": "M_UNKNOWN_TOKEN"}, delay=0.5),
                                    Reply(raw=b"HTTP", delay=0.5)], ids=["unknown", "cut"])
def test_a_shared_failure_is_everybodys(rig, answer):
    rig.other.on(USERINFO, answer)
    rig.other.forget()
    try:
        with rig.service() as s:
            body = make_body("/sfu/get", rig.other.netloc, token=f"{CANARY_TOKEN}.shared")
            for reply in together([lambda: s.post("/sfu/get", body)] * 10):
                check_error(reply, 401, "M_UNAUTHORIZED", UNAUTHORIZED)
            assert len(rig.other.asked()) <= 2
    finally:
        rig.other.off()


def test_the_first_one_leaves(rig):
    """Whose request started the call goes away, and one of those who wait: the others are served all the same."""
    hs = rig.full
    sub, token = rig.user(hs)
    hs.on(USERINFO, Reply(200, {"sub": sub}, delay=1.5))
    hs.forget()
    body = json.dumps(rig.body("/sfu/get", hs, sub, token)).encode()
    try:
        with rig.service(LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}") as s:
            wires = []
            for n in range(6):
                w = s.wire()
                w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                wires.append(w)
                wait_for("the call", hs.asked)
            for w in (wires[0], wires[3]):
                w.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                w.close()
            for n in (1, 2, 4, 5):
                check_granted(wires[n].reply("POST"))
                wires[n].close()
            wait_for("pools", lambda: s.metrics()["lkjwt_exchanges"] == 0)
            assert len(hs.asked()) == 1
    finally:
        hs.off()


def test_one_room_is_created_once_at_a_time(rig):
    """Fifty join one room at once: one call at the SFU, and each has a token of its own."""
    rig.sfu.forget()
    rig.sfu.fail = lambda req: Reply(200, b"", ctype="application/protobuf", delay=1.5)
    try:
        with rig.service(LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}") as s:
            who = [rig.user(rig.full) for _ in range(50)]
            jobs = [lambda n=n: ask(s, rig, rig.full, sub=who[n][0], token=who[n][1], room="!one:x")
                    for n in range(50)]
            for n, reply in enumerate(together(jobs)):
                check_token(check_granted(reply), identity("/sfu/get", who[n][0]), hashed("!one:x", "m.call#ROOM"))
            assert 1 <= len(rig.sfu.rooms) <= 2
            assert s.metrics()["lkjwt_exchanges"] == 0
    finally:
        rig.sfu.fail = None


def test_a_room_that_fails_fails_for_all(rig):
    """Nobody gets a token by waiting for another's room that was not created."""
    rig.sfu.forget()
    rig.sfu.fail = lambda req: Reply(503, "no", delay=0.7)
    try:
        with rig.service() as s:
            got = together([lambda: ask(s, rig, rig.full, room="!one:x")] * 20)
            for reply in got:
                check_error(reply, 500, "M_UNKNOWN")
            assert 2 <= len(rig.sfu.rooms) <= 4
    finally:
        rig.sfu.fail = None


# ---- client addresses

FORWARDED = [
    # fields sent, and whether they are one client: 203.0.113.9
    (["203.0.113.9"], True),
    (["203.0.113.9, 127.0.0.7"], True),              # a second proxy of ours
    (["198.51.100.1, 203.0.113.9"], True),           # the client wrote the left
    (["unknown, 203.0.113.9"], True),
    ([",,203.0.113.9"], True),
    (["::ffff:203.0.113.9"], True),
    (["198.51.100.1", "203.0.113.9"], True),         # two fields: the last
    (["203.0.113.9, 198.51.100.77"], False),
    (["203.0.113.10"], False),
    (["203.0.113.9, nonsense"], False),              # not known: not counted
    (["127.0.0.9"], False), (["127.0.0.9"], False), ([], False), ([], False),
]


def test_rate_of_an_address(rig):
    """Behind a proxy that is trusted the client is the rightmost address that no proxy has; what it wrote itself
    counts for nothing."""
    with rig.service(LKJWT_TRUSTED_PROXIES="127.0.0.0/8", LKJWT_RATE_ADDR="1:0.0001",
                     LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}") as s:
        def status(fields):
            return s.post("/sfu/get", rig.body("/sfu/get", rig.other),
                          [("X-Forwarded-For", v) for v in fields]).status
        assert status(["203.0.113.9"]) == 200
        seen = [(fields, status(fields)) for fields, _ in FORWARDED]
        for (fields, same), (_, got) in zip(FORWARDED, seen):
            assert got == (429 if same else 200), (fields, got)
        reply = s.post("/sfu/get", rig.body("/sfu/get", rig.other), [("X-Forwarded-For", "203.0.113.9")])
        check_error(reply, 429, "M_LIMIT_EXCEEDED")
        assert are_told(s, "ADDR_LIMIT", sum(got == 429 for _, got in seen) + 1)
        # one IPv6 household, and another
        assert [status([v]) for v in ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", "2001:db8:1:3::1")] == [200, 429, 200]
        assert s.request("GET", "/healthz", headers=[("X-Forwarded-For", "203.0.113.9")]).status == 200


def test_a_socket_of_the_file_system_has_no_addresses(rig, tmp_path):
    """Who comes by it is told by X-Forwarded-For alone; without it nothing is counted."""
    with rig.service(LIVEKIT_JWT_BIND=f"unix:{tmp_path}/s", LKJWT_TRUSTED_PROXIES="192.0.2.0/24",
                     LKJWT_CONNS_PER_ADDR="1", LKJWT_RATE_ADDR="1:0.0001") as s:
        with s.wire() as first:
            first.send(b"GET /hea")
            assert [s.request("GET", "/healthz").status for _ in range(3)] == [200] * 3
            assert [ask(s, rig, rig.full).status for _ in range(3)] == [200] * 3
        head = [("X-Forwarded-For", "203.0.113.9")]
        assert [s.post("/sfu/get", rig.body("/sfu/get", rig.full), head).status for _ in range(2)] == [200, 429]


def test_no_header_of_strangers_counts(rig):
    """A client that is no proxy is itself, whatever it claims."""
    with rig.service(LKJWT_TRUSTED_PROXIES="192.0.2.0/24", LKJWT_RATE_ADDR="2:0.0001") as s:
        got = [s.post("/sfu/get", rig.body("/sfu/get", rig.other), [("X-Forwarded-For", f"203.0.113.{n}")]).status
               for n in range(4)]
        assert got == [200, 200, 429, 429]


def test_connections_of_an_address(rig):
    """Direct ones are turned away when they come; a proxy's are its clients', counted while they are served."""
    with rig.service(LKJWT_TRUSTED_PROXIES="192.0.2.0/24", LKJWT_CONNS_PER_ADDR="3",
                     LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}") as s:
        wires = [s.wire() for _ in range(2)]         # start-up's /healthz may be the third
        reply = None
        for _ in range(3):
            wires.append(s.wire())
            wires[-1].send(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            reply = wires[-1].reply()
            if reply.status == 503:
                break
            wires.append(s.wire())
        assert reply.status == 503 and s.wait_event("ADDR_LIMIT")
        for w in wires:
            w.close()
        wait_for("room", lambda: s.metrics()["lkjwt_connections"] <= 1)
        assert s.request("GET", "/healthz").status == 200
    rig.other.forget()
    rig.other.on(USERINFO, Reply(raw=b"", hang=True))
    try:
        with rig.service(LKJWT_TRUSTED_PROXIES="127.0.0.0/8", LKJWT_CONNS_PER_ADDR="2", LKJWT_DRAIN_S="0") as s:
            held = []
            for n in range(2):
                w = s.wire()
                body = json.dumps(rig.body("/sfu/get", rig.other)).encode()
                w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 203.0.113.9\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)
                held.append(w)
                wait_for("the call", lambda: len(rig.other.asked()) > n)
            head = [("X-Forwarded-For", "203.0.113.9")]
            check_error(s.post("/sfu/get", rig.body("/sfu/get", rig.full), head), 503, "M_UNKNOWN")
            check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full), [("X-Forwarded-For", "203.0.113.10")]))
            for w in held:
                w.close()
    finally:
        rig.other.off()


def test_s11_a_refused_body_is_no_request(rig):
    """The body of a request that an address's limit refuses is not read as the next one: one answer, then the end."""
    with rig.service(LKJWT_TRUSTED_PROXIES="127.0.0.0/8", LKJWT_CONNS_PER_ADDR="1", LKJWT_DRAIN_S="0") as s:
        head = b"POST /get_token HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: 203.0.113.9\r\nContent-Length: %d\r\n\r\n"
        inner = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
        with s.wire() as held, s.wire() as w:
            held.send(head % 100 + b"{")
            time.sleep(0.3)
            w.send(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
            assert w.reply().status == 200
            w.send(head % len(inner) + inner)
            reply = w.reply("POST")
            check_error(reply, 503, "M_UNKNOWN")
            assert reply.header("Connection") == "close"
            assert w.at_end()


def test_waiting_clients_take_turns(rig):
    """Of those that wait for a lookup slot a client's second request comes after the first of each other client."""
    hs, gate = rig.other, threading.Semaphore(0)
    clients = {"a": "203.0.113.1", "b": "203.0.113.2", "c": "2001:db8::1"}
    sent, threads = {}, []

    def post(s, client, body):
        check_granted(s.post("/sfu/get", body, [("X-Forwarded-For", client)]))

    hs.forget()
    hs.on(USERINFO, lambda request: gate.acquire(timeout=DEADLINE) and None)
    try:
        with rig.service(LKJWT_TRUSTED_PROXIES="127.0.0.0/8", LKJWT_LOOKUPS_MAX="1",
                         LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}") as s:
            for n, name in enumerate(["a1", "a2", "a3", "a4", "b1", "c1", "b2"]):
                body = rig.body("/sfu/get", hs)
                sent[body["openid_token"]["access_token"]] = name
                threads.append(threading.Thread(target=post, args=(s, clients[name[0]], body)))
                threads[-1].start()
                wait_for("the request", lambda n=n: len(hs.asked()) == 1 and
                         s.metrics()["lkjwt_exchanges_waiting"] == n)
            for n in range(7):
                wait_for("the next", lambda n=n: len(hs.asked()) == n + 1)
                gate.release()
            for t in threads:
                t.join()
            order = [sent[r.query["access_token"]] for r in hs.asked()]
            assert order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
    finally:
        hs.off()
        hs.forget()


# ---- handshakes with strangers

def test_cold_handshakes_are_rationed(rig, pki):
    """At one a second four may be done at once, two of them by strangers nobody knows; who is known, and who is
    listed, is not held up; who waits too long is told to come again."""
    hosts = [Homeserver(f"127.0.3.{n + 1}", tls=pki.leaf(ips=[f"127.0.3.{n + 1}"])) for n in range(6)]
    try:
        with rig.service(LKJWT_TLS_COLD_PER_S="1", LKJWT_LOOKUP_TIMEOUT_S="3") as s:
            got = together([lambda hs=hs: ask(s, rig, hs) for hs in hosts] + [lambda: ask(s, rig, rig.full)])
            check_granted(got.pop())
            late = [r for r in got if r.status != 200]
            assert 1 <= len(late) <= 2 and len(got) - len(late) >= 4, [r.status for r in got]
            for r in late:
                check_error(r, 429, "M_LIMIT_EXCEEDED")
            assert are_told(s, "TLS_BUDGET", len(late), step="tls")
            assert not s.events("BREAKER_TRIPPED")
            assert until_granted_all(s, rig, hosts)
    finally:
        for hs in hosts:
            hs.stop()


def until_granted_all(s, rig, hosts):
    for hs in hosts:
        wait_for("its turn", lambda: ask(s, rig, hs).status == 200)
    return True


# ---- descriptors

def test_the_spare_descriptor_answers(rig):
    """With no descriptor left and no idle client to give one up a newcomer is told, not left in the queue."""
    rig.other.forget()
    rig.other.on(USERINFO, Reply(raw=b"", hang=True))
    try:
        with rig.service(LKJWT_DRAIN_S="0", LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}") as s:
            held = []

            def busy():
                w = s.wire()
                body = json.dumps(rig.body("/sfu/get", rig.other)).encode()
                w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                held.append(w)
                return len(rig.other.asked()) >= 3 or time.sleep(0.1)
            wait_for("clients that wait", busy)
            used = max(int(n) for n in os.listdir(f"/proc/{s.pid}/fd")) + 1
            limits = resource.prlimit(s.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(s.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
            told = []

            def turned_away():
                w = s.wire()
                body = json.dumps(rig.body("/sfu/get", rig.other)).encode()
                w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                w.sock.settimeout(0.5)
                try:
                    told.append(w.sock.recv(4096))
                except TimeoutError:
                    held.append(w)
                return [t for t in told if t.startswith(b"HTTP/1.1 503 ")]
            wait_for("a refusal", turned_away)
            s.wait_event("FD_FULL")
            resource.prlimit(s.pid, resource.RLIMIT_NOFILE, limits)
            for w in held:
                w.close()
            # One more may be turned away by what was found before the limit went.
            first = ask(s, rig, rig.full)
            check_granted(ask(s, rig, rig.full) if first.status == 503 else first)
    finally:
        rig.other.off()
