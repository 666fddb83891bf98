"""PROTOCOL.md 4-6 and 11: who gets which token, what the homeserver and the
SFU see of it, and what becomes of failures."""
import json
import threading

import pytest

from exchange import ENDPOINTS, NO_ROOM, UNAUTHORIZED, alias, check_error, check_granted, check_token, \
    hashed, identity, make_body
from peers import Homeserver, Reply, Sfu, wait_for
from service import CANARY_KEY, CANARY_SECRET, CANARY_TOKEN, CANARY_TOKEN_2, DEADLINE


def room_of(path, body):
    return alias(body["room"]) if path == "/sfu/get" else alias(body["room_id"], body["slot_id"])


@pytest.mark.parametrize("path", ENDPOINTS)
def test_full_access(svc, rig, path):
    rig.full.forget()
    rig.sfu.forget()
    sub, token = rig.user(rig.full)
    body = rig.body(path, rig.full, sub, token)
    reply = svc.post(path, body)
    claims = check_token(check_granted(reply), identity(path, sub), room_of(path, body))
    assert claims["video"]["canPublish"] is True
    assert [(r.method, r.query) for r in rig.full.asked()] == [("GET", {"access_token": token})]
    (room,) = rig.sfu.rooms
    assert (room["name"], room["empty_timeout"], room["departure_timeout"]) == (room_of(path, body), 300, 20)
    assert room["body"] == b"\x0a\x2b" + room["name"].encode() + b"\x10\xac\x02\x50\x14"
    request = room["request"]
    assert request.header("content-type") == request.header("accept") == "application/protobuf"
    assert room["claims"]["video"] == {"roomCreate": True}
    assert list(room["claims"]) == ["iss", "exp", "nbf", "iat", "video"]
    assert room["claims"]["exp"] - room["claims"]["nbf"] == 600


@pytest.mark.parametrize("path", ENDPOINTS)
def test_restricted(svc, rig, path):
    rig.other.forget()
    rig.sfu.forget()
    sub, token = rig.user(rig.other)
    body = rig.body(path, rig.other, sub, token)
    claims = check_token(check_granted(svc.post(path, body)), identity(path, sub), room_of(path, body), publish=False)
    assert claims["video"]["canPublish"] is False
    assert len(rig.other.asked()) == 1
    assert (rig.sfu.rooms, rig.sfu.requests) == ([], [])


NAMES = {  # room, slot, device, member, localpart: all that the formulas must keep apart
    "plain": ("!r:example.org", "m.call#ROOM", "DEV", "m", "alice"),
    "unicode": ("!rööm😀:example.org", 'sl"ot\\x\t', "gerät\u2028", "\U0001f600", "ali"),
    "html": ("!<a>&'b':example.org", "</script>", "<&>", "&amp;", "a/b"),
    "controls": ("!a\0b\x1f:x", "\b\f\n\r\t", "d\x01\x7f", "\u0085", "x"),
    "atob": ("!r:x", "s", "???>>>~~~\x7f\x7f\x7f?>~", "m", "~?>"),
    "atob 2": ("!r:x", "s", "a?b>c~d\x7fe??f>>g~~", "m", "b=_-."),
    "latin": ("!r:x", "s", "ÿþýüûúùø", "m", "y"),
    "quotes": ("!r\\:x", '"', '"\\"\\\\', '","', "q"),
    "brackets": ('!r"],["', "]", '"]', "[", "c"),
    "commas": ("!r,", ",s", "d,", ",m", "d"),
    "digits": ("1", "2", "3", "4", "5"),
    "solidus": ("!/r", "/s/", "d/", "/", "e/f"),
    "high plane": ("\U0010ffff", "\ud7ff", "\ue000", "\uffff", "g"),
    "decomposed": ("!e\u0301", "\u00e9", "e\u0301", "\u212b", "h"),
    "long": ("!" + "r" * 254, "s" * 512, "d" * 200, "m" * 512, "i"),
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("row", NAMES)
def test_formulas(svc, rig, path, row):
    room, slot, device, member, local = NAMES[row]
    rig.sfu.forget()
    sub, token = rig.user(rig.full, local)
    body = rig.body(path, rig.full, sub, token, room=room, slot=slot, device=device, member=member)
    jwt = check_granted(svc.post(path, body))
    check_token(jwt, identity(path, sub, device, member), room_of(path, body))
    assert [r["name"] for r in rig.sfu.rooms] == [room_of(path, body)]


def test_formulas_of_the_vectors():
    """The formulas of these tests against the project's vectors."""
    assert alias("!rööm😀:example.com", 'sl"ot\\x\t') == "TJRhIdYTUfIYr0JQZTjl0hn5GGpF7p7cEC9RZUKYXKM"
    assert alias("!tDLCaLXijNtYcJZEey:example.com") == "ZTyUV3ZQszO5Jp4u6Wc/s2q3djpWicH5oS8B5nxw5D4"
    assert hashed("@alice:example.com", "DEVICE123", "memberABC") == "J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU"


@pytest.mark.parametrize("length", range(12))
def test_payload_is_safe_for_atob_at_every_alignment(svc, rig, length):
    device = "x" * length + "?~>\x7f" * 12 + "ÿ" * 3
    sub, token = rig.user(rig.other)
    jwt = check_granted(svc.post("/sfu/get", rig.body("/sfu/get", rig.other, sub, token, device=device)))
    check_token(jwt, f"{sub}:{device}", alias("!room:example.org"), publish=False)


@pytest.mark.parametrize("device", [None, ""], ids=["absent", "empty"])
def test_legacy_identity_without_device(svc, rig, device):
    sub, token = rig.user(rig.other)
    body = rig.body("/sfu/get", rig.other, sub, token, device=device)
    if device is None:
        del body["device_id"]
    check_token(check_granted(svc.post("/sfu/get", body)), f"{sub}:", alias("!room:example.org"), publish=False)


@pytest.mark.parametrize("env, publish, metadata, ttl", [
    ({"LKJWT_RESTRICTED_CAN_PUBLISH": "true"}, True, True, 3600),
    ({"LKJWT_RESTRICTED_CAN_PUBLISH": "false"}, False, True, 3600),
    ({"LIVEKIT_CAN_UPDATE_OWN_METADATA": "false"}, False, False, 3600),
    ({"LIVEKIT_CAN_UPDATE_OWN_METADATA": "true"}, False, True, 3600),
    ({"LKJWT_TOKEN_TTL_S": "60"}, False, True, 60),
    ({"LKJWT_TOKEN_TTL_S": "86400"}, False, True, 86400),
    ({"LKJWT_RESTRICTED_CAN_PUBLISH": "true", "LIVEKIT_CAN_UPDATE_OWN_METADATA": "false", "LKJWT_TOKEN_TTL_S": "61"},
     True, False, 61)], ids=lambda v: " ".join(f"{a}={b}" for a, b in v.items()) if isinstance(v, dict) else None)
def test_switches(rig, env, publish, metadata, ttl):
    rig.sfu.forget()
    with rig.service(**env) as s:
        for path in ENDPOINTS:
            for hs, can in ((rig.full, True), (rig.other, publish)):
                sub, token = rig.user(hs)
                jwt = check_granted(s.post(path, rig.body(path, hs, sub, token)))
                check_token(jwt, identity(path, sub), alias("!room:example.org"), publish=can, metadata=metadata,
                            ttl=ttl)
    # A switch for publishing is none for making rooms.
    assert len(rig.sfu.rooms) == 2


def test_everyone_has_full_access_under_the_lone_star(rig):
    rig.sfu.forget()
    with rig.service(LIVEKIT_FULL_ACCESS_HOMESERVERS="*") as s:
        for hs in (rig.full, rig.other):
            sub, token = rig.user(hs)
            jwt = check_granted(s.post("/get_token", rig.body("/get_token", hs, sub, token)))
            check_token(jwt, identity("/get_token", sub), alias("!room:example.org"))
    assert len(rig.sfu.rooms) == 2


@pytest.mark.parametrize("listed", ["*, {full}", "{full} , *", "x.example *.org\t{full}\nlast.example", "{full}"])
def test_star_among_others_matches_nothing(rig, listed):
    rig.sfu.forget()
    with rig.service(LIVEKIT_FULL_ACCESS_HOMESERVERS=listed.format(full=rig.full.netloc)) as s:
        for hs, publish in ((rig.full, True), (rig.other, False)):
            sub, token = rig.user(hs)
            jwt = check_granted(s.post("/sfu/get", rig.body("/sfu/get", hs, sub, token)))
            check_token(jwt, f"{sub}:DEVICE", alias("!room:example.org"), publish=publish)
    assert len(rig.sfu.rooms) == 1


def test_full_access_needs_the_port(rig):
    """`127.0.0.1` in the list is not `127.0.0.1:PORT`."""
    rig.sfu.forget()
    with rig.service(LIVEKIT_FULL_ACCESS_HOMESERVERS="127.0.0.1 127.0.0.1:8448") as s:
        sub, token = rig.user(rig.full)
        jwt = check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full, sub, token)))
        check_token(jwt, f"{sub}:DEVICE", alias("!room:example.org"), publish=False)
    assert rig.sfu.requests == []


@pytest.mark.parametrize("url", ["wss://sfu.example.org", "wss://sfu.example.org//", "ws://10.0.0.1:7880/a/b/",
                                 "https://sfu.example.org/x?y=z#frag", "http://sfu", "sfu.example.org:7880"])
def test_url_is_handed_out_as_configured(rig, url):
    with rig.service(LIVEKIT_URL=url) as s:
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)), url)


@pytest.mark.parametrize("form", ["ws://{at}", "http://{at}", "http://{at}/", "{at}", "ws://{at}//", "ws://{at}?a=b#c"])
def test_sfu_is_called_at_livekit_url(rig, form):
    url = form.format(at=rig.sfu.netloc)
    rig.sfu.forget()
    with rig.service(LIVEKIT_URL=url, LKJWT_LIVEKIT_API_URL=None) as s:
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)), url)
    assert len(rig.sfu.rooms) == 1


def test_sfu_path_is_kept(rig):
    with Sfu(CANARY_KEY, CANARY_SECRET, prefix="/live/kit") as sfu, \
            rig.service(LKJWT_LIVEKIT_API_URL=sfu.url + "/live/kit/") as s:
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))
        assert len(sfu.rooms) == 1


def test_sfu_over_tls(rig):
    with Sfu(CANARY_KEY, CANARY_SECRET, tls=rig.pki.leaf(ips=["127.0.0.1"])) as sfu, \
            rig.service(LIVEKIT_URL=f"wss://{sfu.netloc}/", LKJWT_LIVEKIT_API_URL=None) as s:
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)), f"wss://{sfu.netloc}/")
        assert len(sfu.rooms) == 1


# ---- refusals

def test_claimed_user_is_compared(svc, rig):
    path = "/get_token"
    for hs in (rig.full, rig.other):
        sub, token = rig.user(hs)
        rig.sfu.forget()
        for claimed in (sub.upper(), sub + "x", sub[:-1], "@" + sub, sub[1:], sub.replace("@", ""), "@*", sub + "\0",
                        " " + sub, f"@x:{hs.netloc}"):
            check_error(svc.post(path, rig.body(path, hs, claimed, token)), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
        assert rig.sfu.requests == []
        check_granted(svc.post(path, rig.body(path, hs, sub, token)))


SUBS = {"other server": "@a:example.org", "no port": "@a:127.0.0.1", "no at": "a:{n}", "double at of other": "@a:b:{n}",
        "empty": "", "at": "@", "no colon": "@a", "suffix": "@a:{n}.example", "blank": "@a:{n} ", "case": "@a:X{n}",
        "control": "@a\n:{n}", "nul": "@a\0:{n}", "del": "@a\x7f:{n}", "room": "!a:{n}"}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("row", SUBS)
def test_s05_sub_must_be_of_the_server_asked(svc, rig, path, row):
    sub, token = SUBS[row].format(n=rig.full.netloc), f"{CANARY_TOKEN_2}.{row}"
    rig.full.tokens[token] = sub
    rig.sfu.forget()
    body = rig.body(path, rig.full, sub or "@x:y", token)
    check_error(svc.post(path, body), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
    assert rig.sfu.requests == []


ANSWERS = {
    "401": Reply(401, {"errcode": "M_UNKNOWN_TOKEN", "error": "x"}), "403": Reply(403, "no"), "404": Reply(404, {}),
    "500": Reply(500, "x"), "201": Reply(201, {"sub": "@a:{n}"}), "204": Reply(204, b"", length=False),
    "302": Reply(302, "", [("Location", "/_matrix/federation/v1/openid/userinfo?again=1")]),
    "not JSON": Reply(200, "sub"), "array": Reply(200, [], ctype="application/json"), "sub number": Reply(200, {"sub": 1}),
    "sub null": Reply(200, {"sub": None}), "no sub": Reply(200, {"user": "@a:{n}"}), "empty": Reply(200, ""),
    "two subs": Reply(200, '{"sub":"@a:{n}","sub":"@a:{n}"}'), "9 KB": Reply(200, {"sub": "@a:{n}", "x": "y" * 9000}),
    "cut": Reply(200, {"sub": "@a:{n}"}, cut=80), "closed": Reply(200, "", cut=0),
}


def test_s24_all_failures_look_the_same(svc, rig):
    """Byte-equal replies, Date and X-Request-Id aside, whatever went wrong."""
    def fill(reply):
        reply.body = reply.body.replace(b"{n}", rig.other.netloc.encode())
        return reply
    seen = {}
    cases = {name: ("hook", r) for name, r in ANSWERS.items()}
    cases |= {"nobody there": ("server", "127.0.0.1:1"), "bad name": ("server", "a_b"),
              "not TLS": ("server", rig.sfu.netloc), "forbidden": ("server", "10.0.0.1:8448"),
              "never": ("server", "0.0.0.0:8448"), "control in token": ("token", "a\nb"), "unknown": ("token", "z")}
    for name, (kind, what) in cases.items():
        body = rig.body("/sfu/get", rig.other)
        if kind == "hook":
            rig.other.on("/_matrix/federation/v1/openid/userinfo", fill(what))
        elif kind == "server":
            body["openid_token"]["matrix_server_name"] = what
        else:
            body["openid_token"]["access_token"] = what
        try:
            reply = svc.post("/sfu/get", body, timeout=40)
        finally:
            rig.other.off()
        check_error(reply, 401, "M_UNAUTHORIZED", UNAUTHORIZED)
        rest = [(k, v) for k, v in reply.raw_headers if k not in ("Date", "X-Request-Id")]
        seen[name] = (rest, reply.body)
    first = next(iter(seen.values()))
    assert not {name: got for name, got in seen.items() if got != first}


def test_revoked_token_is_refused_at_once(svc, rig):
    """No verdict is kept: the same token again is asked for again."""
    sub, token = rig.user(rig.full)
    rig.full.forget()
    for _ in range(3):
        check_granted(svc.post("/sfu/get", rig.body("/sfu/get", rig.full, sub, token)))
    rig.full.tokens[token] = None
    check_error(svc.post("/sfu/get", rig.body("/sfu/get", rig.full, sub, token)), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
    assert len(rig.full.asked()) == 4


SFU_FAILURES = {
    "401": Reply(401, "invalid token", ctype="text/plain"), "403": Reply(403, {"code": "permission_denied", "msg": "x"}),
    "404": Reply(404, "404 page", ctype="text/plain"), "500": Reply(500, {"code": "internal", "msg": "x"}),
    "503": Reply(503, "x"), "201": Reply(201, b""), "302": Reply(302, "", [("Location", "/elsewhere")]),
    "not HTTP": Reply(raw=b"hello\r\n\r\n", close=True), "closed": Reply(200, cut=0),
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("row", SFU_FAILURES)
def test_sfu_failure(svc, rig, path, row):
    rig.sfu.drop_connections()      # a kept one that dies is tried again, besides
    rig.sfu.forget()
    rig.sfu.fail = lambda req: SFU_FAILURES[row]
    try:
        reply = svc.post(path, rig.body(path, rig.full), timeout=30)
        check_error(reply, 500, "M_UNKNOWN", NO_ROOM)
        assert 1 <= len(rig.sfu.rooms) <= 2 and len(rig.sfu.rooms) == len(rig.sfu.requests)
        # Restricted users do not depend on it.
        check_granted(svc.post(path, rig.body(path, rig.other)))
    finally:
        rig.sfu.fail = None
    check_granted(svc.post(path, rig.body(path, rig.full)))


def test_sfu_5xx_once_is_tried_again(svc, rig):
    rig.sfu.forget()
    rig.sfu.fail = [Reply(500, {"code": "internal", "msg": "x"})]
    check_granted(svc.post("/sfu/get", rig.body("/sfu/get", rig.full)))
    assert len(rig.sfu.rooms) == 2


def test_sfu_not_there(rig):
    with rig.service(LKJWT_LIVEKIT_API_URL="http://127.0.0.1:1") as s:
        for path in ENDPOINTS:
            check_error(s.post(path, rig.body(path, rig.full), timeout=30), 500, "M_UNKNOWN", NO_ROOM)
            check_granted(s.post(path, rig.body(path, rig.other)))


def test_no_room_for_an_unverified_user(svc, rig):
    rig.sfu.forget()
    for path in ENDPOINTS:
        check_error(svc.post(path, rig.body(path, rig.full, "@x:y", "not a token")), 401, "M_UNAUTHORIZED",
                    UNAUTHORIZED)
    assert rig.sfu.requests == []


# ---- lists

LISTS = [  # allowed, blocked, is {full} served, is {other} served
    ("{full}", "", True, False), ("{other} , x.example", "", False, True), ("", "{other}", True, False),
    ("{full} {other}", "{full}", False, True), ("example.org", "", False, False), ("*.example.org", "", False, False),
    ("", "*.example.org example.org", True, True),
    # Without a port a pattern stands for every port of the host.
    ("127.0.0.1", "", True, True), ("", "127.0.0.1", False, False), ("127.0.0.1:8448", "", False, False),
]


@pytest.mark.parametrize("allowed, blocked, full, other", LISTS)
def test_allow_and_block_lists(rig, allowed, blocked, full, other):
    names = dict(full=rig.full.netloc, other=rig.other.netloc)
    with rig.service(LKJWT_ALLOWED_HOMESERVERS=allowed.format(**names),
                     LKJWT_BLOCKED_HOMESERVERS=blocked.format(**names)) as s:
        for hs, served in ((rig.full, full), (rig.other, other)):
            before = hs.connections
            for path in ENDPOINTS:
                reply = s.post(path, rig.body(path, hs))
                if served:
                    check_granted(reply)
                else:
                    check_error(reply, 401, "M_UNAUTHORIZED", UNAUTHORIZED)
            if not served:
                assert hs.connections == before
                s.wait_event("SERVER_DENIED", server=hs.netloc)


@pytest.mark.parametrize("name, denied", [("a.example.org", True), ("a.b.example.org", True), ("example.org", False),
                                          ("aexample.org", False), ("a.example.org.x", False)])
def test_suffix_in_the_block_list(rig, name, denied):
    """Told apart by the log: none of these names leads anywhere."""
    with rig.service(LKJWT_BLOCKED_HOMESERVERS="*.example.org", LKJWT_RESOLVER="127.0.0.1:1",
                     LKJWT_LOOKUP_TIMEOUT_S="2", LKJWT_HOSTS_FILE="/dev/null") as s:
        check_error(s.post("/sfu/get", make_body("/sfu/get", name), timeout=40), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
        assert s.stop() == 0
        assert bool(s.events("SERVER_DENIED")) == denied, s.log_text()


# ---- many at once

def test_hanging_homeserver_harms_nobody_else(rig):
    """50 exchanges hang at a server that never answers; health and others go on."""
    stuck = Homeserver("127.0.0.2", tls=rig.pki.leaf(ips=["127.0.0.2"]))
    stuck.on("/_matrix/federation/v1/openid/userinfo", Reply(raw=b"", hang=True))
    done = []
    with stuck, rig.service(LKJWT_LOOKUP_TIMEOUT_S="4") as s:
        def hang(n):
            path = ENDPOINTS[n % 2]
            done.append(s.post(path, make_body(path, stuck.netloc, token=f"{CANARY_TOKEN}.{n}"), timeout=60))
        threads = [threading.Thread(target=hang, args=(n,), daemon=True) for n in range(50)]
        for t in threads:
            t.start()
        # As many as one destination may have are in flight; the others wait in the service.
        wait_for("lookups", lambda: len(stuck.asked()) >= 16)
        for n in range(20):
            assert s.request("GET", "/healthz", timeout=3).status == 200
            path = ENDPOINTS[n % 2]
            check_granted(s.post(path, rig.body(path, rig.full if n % 3 else rig.other)))
        assert not done, "a hanging exchange was answered early"
        assert len(stuck.asked()) <= 16
        for t in threads:
            t.join(60)
        assert len(done) == 50
        # Those that had their turn: 401. Those whose wait ended: 429.
        assert {(r.status, r.errcode) for r in done} <= {(401, "M_UNAUTHORIZED"), (429, "M_LIMIT_EXCEEDED")}
        assert (401, "M_UNAUTHORIZED") in {(r.status, r.errcode) for r in done}
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))


def test_fifty_joins_at_once(svc, rig):
    rig.sfu.forget()
    out = []

    def join(n):
        sub, token = rig.user(rig.full)
        path = ENDPOINTS[n % 2]
        reply = svc.post(path, rig.body(path, rig.full, sub, token, room="!crowd:example.org"))
        out.append((path, sub, reply))
    threads = [threading.Thread(target=join, args=(n,)) for n in range(50)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(out) == 50
    for path, sub, reply in out:
        check_token(check_granted(reply), identity(path, sub), alias("!crowd:example.org"))


def test_waiter_that_leaves_harms_nothing(svc, rig):
    """The client closes while its exchange runs; the next one is served."""
    gate = threading.Event()
    sub, token = rig.user(rig.full)

    def slow(req):
        gate.wait(DEADLINE)
        return Reply(200, {"sub": sub})
    rig.full.on("/_matrix/federation/v1/openid/userinfo", slow)
    try:
        for _ in range(10):
            with svc.wire() as w:
                body = json.dumps(rig.body("/sfu/get", rig.full, sub, token)).encode()
                w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert svc.request("GET", "/healthz").status == 200
    finally:
        gate.set()
        rig.full.off()
    check_granted(svc.post("/sfu/get", rig.body("/sfu/get", rig.full)))
