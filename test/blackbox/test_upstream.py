"""What lkjwt makes of the answers of homeservers and of the SFU (PROTOCOL.md 7.1, 11; SECURITY.md 4, 7).

The homeserver is reached by an http:// override, so every row is about HTTP and JSON alone; test_tls.py
has the same over TLS. Whatever goes wrong is the one 401, or for the SFU the one 500.
"""
import json
import random
import select
import time

import pytest

from outbound import Exchange, FULL, by_token, claims_of, lkjwt, pki, pub, PUB, token_for
from peers import (BlackHole, CREATE_ROOM, Dns, Homeserver, RawServer, Reply, SUB_PATH, Sfu, chunked, free_port,
                   protobuf_encode, wait_for)
from service import CANARY_KEY, CANARY_SECRET

NAME = "u.test"
SUB = f"@alice:{NAME}"
BODY = json.dumps({"sub": SUB}).encode()


@pytest.fixture(scope="module")
def peers():
    with Homeserver(sub=by_token) as hs, Sfu(CANARY_KEY, CANARY_SECRET) as sfu:
        yield hs, sfu


@pytest.fixture
def hs(peers):
    peers[0].off()
    peers[0].forget()
    peers[0].sub = by_token
    yield peers[0]
    assert not peers[0].errors, peers[0].errors


@pytest.fixture
def sfu(peers):
    peers[1].off()
    peers[1].forget()
    peers[1].fail = None
    yield peers[1]
    assert not peers[1].errors, peers[1].errors


@pytest.fixture
def svc(hs, sfu):
    with lkjwt(None, sfu, LKJWT_FEDERATION_API_URL_OVERRIDES=f"{NAME}={hs.url},{FULL}={hs.url}") as s:
        yield s


def raw(head, body=b"", **kw):
    """A reply from head lines and body bytes; it closes unless told otherwise."""
    kw.setdefault("close", True)
    return Reply(raw=head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body, **kw)


OK = "HTTP/1.1 200 OK"
LEN = f"{OK}\nContent-Length: {len(BODY)}"
TE = f"{OK}\nTransfer-Encoding: chunked"


def te(wire, **kw):
    return raw(TE, wire, **kw)


def sub_reply(value):
    return Reply(200, json.dumps({"sub": value}))


HALF = len(BODY) // 2
CH = b"%x\r\n%s\r\n" % (len(BODY), BODY)

GOOD = {
    "plain": Reply(200, BODY),
    "other-members": Reply(200, b'{"x":{"sub":"@eve:u.test"},"sub":"%s","y":[1,2.5e3,null]}' % SUB.encode()),
    "any-type": Reply(200, BODY, ctype="text/plain"),
    "escapes": Reply(200, b'{"\\u0073ub":"\\u0040alice:u\\u002etest"}'),
    "8192-bytes": Reply(200, BODY + b" " * (8192 - len(BODY))),
    "chunked": te(CH + b"0\r\n\r\n"),
    "chunked-small": te(chunked(BODY, 1)),
    "chunked-upper-case": te(b"%X\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)),
    "chunked-zeros": te(b"%08x\r\n%s\r\n0000\r\n\r\n" % (len(BODY), BODY)),
    "chunked-extension": te(b"%x;a=b;c=\"d\"\r\n%s\r\n0;last\r\n\r\n" % (len(BODY), BODY)),
    "chunked-trailer": te(CH + b"0\r\nX-A: b\r\nContent-Length: 3\r\n\r\n"),
    "chunked-name-case": raw(f"{OK}\ntransfer-ENCODING: Chunked", CH + b"0\r\n\r\n"),
    "chunked-kept": te(chunked(BODY, 9), close=False),
    "byte-by-byte": Reply(200, BODY, step=1),
    "chunked-byte-by-byte": te(chunked(BODY, 3), step=1),
    "until-close": raw(OK, BODY),
    "until-close-byte-by-byte": raw(OK, BODY, step=1),
    "http-1.0": raw("HTTP/1.0 200 OK", BODY),
    "http-1.9": raw(LEN.replace("1.1", "1.9"), BODY),
    "no-reason": raw(LEN.replace(" OK", " "), BODY),
    "long-reason": raw(LEN.replace("OK", "Okay, then: here it is"), BODY),
    "reason-latin-1": raw(LEN.replace("OK", "\xe9t\xe9"), BODY),
    "header-blanks": raw(f"{OK}\nContent-Length: \t {len(BODY)} \t\nX:\nY: ", BODY),
    "length-zeros": raw(f"{OK}\nContent-Length: 000{len(BODY)}", BODY),
    "100-fields": Reply(200, BODY, headers=[(f"X-{i}", "y") for i in range(99)]),
    "head-15-kb": Reply(200, BODY, headers=[(f"X-{i}", "y" * 1000) for i in range(15)]),
    "interim-1": Reply(raw=b"HTTP/1.1 100 Continue\r\n\r\n" + Reply(200, BODY).wire()),
    "interim-4": Reply(raw=b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n" * 4 + Reply(200, BODY).wire()),
    "interim-length": Reply(raw=b"HTTP/1.1 102 Processing\r\nContent-Length: 99\r\n\r\n" + Reply(200, BODY).wire()),
    "connection-close": Reply(200, BODY, close=True),
    "slow": Reply(200, BODY, delay=0.5),
}


@pytest.mark.parametrize("reply", GOOD.values(), ids=GOOD)
def test_good_userinfo(reply, svc, hs):
    hs.on(SUB_PATH, reply)
    Exchange(svc, NAME).granted()
    Exchange(svc, NAME).granted()       # and the connection, kept or not, did not confuse the next one
    assert len(hs.asked()) == 2


BAD = {
    **{f"status-{s}": Reply(s, BODY) for s in (201, 202, 206, 300, 400, 401, 403, 404, 405, 418, 429, 451, 500, 502,
                                               503, 599, 999)},
    "status-204": Reply(204, b"", length=False),
    "m-unknown-token": Reply(401, {"errcode": "M_UNKNOWN_TOKEN", "error": "x"}),
    "m-forbidden": Reply(403, {"errcode": "M_FORBIDDEN", "error": "x"}),
    # the body
    "empty": Reply(200, b""), "html": Reply(200, "<html>Hello</html>", ctype="text/html"),
    "null": Reply(200, b"null"), "array": Reply(200, b'["%s"]' % SUB.encode()), "string": Reply(200, b'"%s"' % SUB.encode()),
    "cut-json": Reply(200, BODY[:-1]), "trailing": Reply(200, BODY + b"}"), "two": Reply(200, BODY * 2),
    "duplicate-sub": Reply(200, b'{"sub":"@eve:u.test","sub":"%s"}' % SUB.encode()),
    "duplicate-other": Reply(200, b'{"a":1,"a":2,"sub":"%s"}' % SUB.encode()),
    "bom": Reply(200, b"\xef\xbb\xbf" + BODY), "bad-utf-8": Reply(200, BODY[:-1] + b',"x":"\xc0\xaf"}'),
    "nul-after": Reply(200, BODY + b"\0"), "lone-surrogate": Reply(200, BODY[:-1] + b',"x":"\\ud800"}'),
    "control": Reply(200, BODY[:-1] + b',"x":"\t"}'), "leading-zero": Reply(200, BODY[:-1] + b',"x":01}'),
    "deep": Reply(200, BODY[:-1] + b',"x":' + b"[" * 3000 + b"]" * 3000 + b"}"),
    "8193-bytes": Reply(200, BODY + b" " * (8193 - len(BODY))),
    "8193-bytes-chunked": te(chunked(BODY + b" " * (8193 - len(BODY)), 1000)),
    "8193-bytes-until-close": raw(OK, BODY + b" " * (8193 - len(BODY))),
    "1-mb": Reply(200, BODY + b" " * 1_000_000), "endless": raw(OK, BODY + b" " * 10_000_000),
    # the head
    "closed": Reply(raw=b"", close=True), "reset": Reply(raw=b"HTTP/1.1 2", reset=True),
    "not-http": raw("220 mail.example.org ESMTP"), "http-2": raw(LEN.replace("1.1", "2"), BODY),
    "http-2.0": raw(LEN.replace("1.1", "2.0"), BODY), "http-0.9": raw(BODY.decode()),
    "icy": raw(LEN.replace("HTTP/1.1", "ICY"), BODY), "lower-case": raw(LEN.replace("HTTP", "http"), BODY),
    "version-cut": raw(LEN.replace("1.1", "1."), BODY), "status-20": raw(LEN.replace("200", "20"), BODY),
    "status-2000": raw(LEN.replace("200", "2000"), BODY), "status-text": raw(LEN.replace("200", "2OO"), BODY),
    "status-minus": raw(LEN.replace("200", "-200"), BODY), "status-099": raw(LEN.replace("200", "099"), BODY),
    "reason-control": raw(LEN.replace("OK", "O\x01K"), BODY), "reason-nul": raw(LEN.replace("OK", "O\0K"), BODY),
    "two-blanks": raw(LEN.replace(" 200", "  200"), BODY), "blank-first": raw(" " + LEN, BODY),
    "folded": raw(f"{LEN}\nX: a\n b", BODY), "blank-before-colon": raw(f"{LEN}\nX : a", BODY),
    "no-colon": raw(f"{LEN}\nnonsense", BODY), "empty-name": raw(f"{LEN}\n: x", BODY), "bad-name": raw(f"{LEN}\nX(Y): x", BODY),
    "nul-in-value": raw(f"{LEN}\nX: a\0b", BODY), "control-in-value": raw(f"{LEN}\nX: a\x01b", BODY),
    "bare-lf": Reply(raw=(LEN + "\n\n").encode() + BODY, close=True),
    "bare-lf-once": Reply(raw=LEN.replace("\n", "\r\n", 1).encode() + b"\r\nX: a\nY: b\r\n\r\n" + BODY, close=True),
    "bare-cr": Reply(raw=LEN.replace("\n", "\r\n").encode() + b"\r\nX: a\rY: b\r\n\r\n" + BODY, close=True),
    "101-fields": raw(LEN + "\nX: y" * 100, BODY), "head-17-kb": raw(LEN + ("\nX: " + "y" * 1000) * 17, BODY),
    "line-17-kb": raw(LEN + "\nX: " + "y" * 17000, BODY), "head-without-end": raw(OK + "\nX: y" * 100000),
    "interim-5": Reply(raw=b"HTTP/1.1 100 Continue\r\n\r\n" * 5 + Reply(200, BODY).wire()),
    "interim-only": Reply(raw=b"HTTP/1.1 100 Continue\r\n\r\n", close=True),
    "switching-protocols": Reply(raw=b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n" + BODY, close=True),
    "switching-then-200": Reply(raw=b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n" + Reply(200, BODY).wire(), close=True),
    # lengths
    "short-body": raw(f"{OK}\nContent-Length: {len(BODY) + 1}", BODY),
    "two-lengths": raw(f"{LEN}\nContent-Length: {len(BODY) + 1}", BODY),
    "two-equal-lengths": raw(f"{LEN}\nContent-Length: {len(BODY)}", BODY),
    "length-list": raw(f"{OK}\nContent-Length: {len(BODY)}, {len(BODY)}", BODY),
    **{f"length-{n}": raw(f"{OK}\nContent-Length: {v}", BODY) for n, v in {
        "empty": "", "plus": f"+{len(BODY)}", "minus": "-1", "hex": hex(len(BODY)), "text": "all", "decimal": "23.0",
        "20-digits": "0" * 18 + str(len(BODY)), "2-64": str(2 ** 64 + len(BODY)), "blank-inside": "2 3"}.items()},
    "length-and-chunked": raw(f"{LEN}\nTransfer-Encoding: chunked", CH + b"0\r\n\r\n"),
    "chunked-and-length": raw(f"{TE}\nContent-Length: {len(BODY)}", BODY),
    "chunked-twice": raw(f"{TE}\nTransfer-Encoding: chunked", CH + b"0\r\n\r\n"),
    "chunked-chunked": raw(f"{OK}\nTransfer-Encoding: chunked, chunked", CH + b"0\r\n\r\n"),
    "gzip-chunked": raw(f"{OK}\nTransfer-Encoding: gzip, chunked", CH + b"0\r\n\r\n"),
    "te-gzip": raw(f"{OK}\nTransfer-Encoding: gzip", BODY), "te-identity": raw(f"{OK}\nTransfer-Encoding: identity", BODY),
    "te-empty": raw(f"{OK}\nTransfer-Encoding:", BODY), "te-in-1.0": raw(TE.replace("1.1", "1.0"), CH + b"0\r\n\r\n"),
    "te-quoted": raw(f'{OK}\nTransfer-Encoding: "chunked"', CH + b"0\r\n\r\n"),
    **{f"content-encoding-{c}": Reply(200, BODY, headers=[("Content-Encoding", c)]) for c in ("gzip", "br", "deflate")},
    # chunks
    **{f"chunk-{n}": te(w) for n, w in {
        "no-end": CH, "no-last-crlf": CH + b"0\r\n", "data-cut": CH[:-4], "size-cut": b"1",
        "size-empty": b"\r\n" + BODY + b"\r\n0\r\n\r\n", "size-0x": b"0x17\r\n" + BODY + b"\r\n0\r\n\r\n",
        "size-blank-before": b" " + CH + b"0\r\n\r\n", "size-blank-after": b"%x \r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
        "size-minus": b"-1\r\n" + BODY, "size-plus": b"+" + CH + b"0\r\n\r\n", "size-9-digits": b"0" * 7 + CH + b"0\r\n\r\n",
        "size-ffffffff": b"ffffffff\r\n" + BODY, "size-2-64": b"10000000000000017\r\n" + BODY,
        "size-too-small": b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY) - 1, BODY),
        "size-too-large": b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY) + 1, BODY),
        "no-crlf-after-data": b"%x\r\n%s0\r\n\r\n" % (len(BODY), BODY), "lf-only": CH.replace(b"\r\n", b"\n") + b"0\n\n",
        "cr-only": CH.replace(b"\r\n", b"\r") + b"0\r\r", "extension-300": b"%x;%s\r\n%s\r\n0\r\n\r\n" % (
            len(BODY), b"x" * 300, BODY), "overhead-over-16-kb": b"".join(b"1;%s\r\n \r\n" % (b"x" * 250) for _ in range(100))
        + CH + b"0\r\n\r\n", "trailer-3-kb": CH + b"0\r\nX: " + b"y" * 3000 + b"\r\n\r\n",
        "trailer-17-fields": CH + b"0\r\n" + b"X: y\r\n" * 17 + b"\r\n", "trailer-bad": CH + b"0\r\nnonsense\r\n\r\n",
        "trailer-cut": CH + b"0\r\nX: y\r\n"}.items()},
}

BAD_SUB = {
    "missing": Reply(200, b"{}"), "case-of-member": Reply(200, b'{"Sub":"%s"}' % SUB.encode()),
    "nested": Reply(200, b'{"user":{"sub":"%s"}}' % SUB.encode()),
    **{k: sub_reply(v) for k, v in {
        "null": None, "number": 5, "true": True, "list": [SUB], "object": {"sub": SUB}, "empty": "", "at": "@", "colon": ":",
        "no-at": f"alice:{NAME}", "no-server": "@alice", "empty-server": "@alice:", "other-server": "@alice:other.test",
        "server-case": "@alice:U.test", "server-dot": f"@alice:{NAME}.", "server-port": f"@alice:{NAME}:8448",
        "server-prefix": "@alice:x" + NAME, "server-suffix": f"@alice:{NAME}x", "server-blank": f"@alice:{NAME} ",
        "two-colons": f"@alice:x:{NAME}", "first-colon-counts": f"@alice:evil.test:{NAME}", "blank-first": f" @alice:{NAME}",
        "two-ats": f"x@alice:{NAME}", "room": f"!alice:{NAME}", "control": f"@al\x01ice:{NAME}", "newline": f"@al\nice:{NAME}",
        "nul": f"@al\0ice:{NAME}", "nul-in-server": f"@alice:{NAME}\0", "del": f"@al\x7fice:{NAME}",
        "256-bytes": "@" + "a" * (254 - len(NAME)) + f":{NAME}", "256-bytes-utf-8": "@" + "ä" * ((254 - len(NAME)) // 2) + f":{NAME}",
    }.items()},
}
assert all(len(json.loads(BAD_SUB[k].body)["sub"].encode()) == 256 for k in ("256-bytes", "256-bytes-utf-8"))


@pytest.mark.parametrize("reply", BAD.values(), ids=BAD)
def test_s24_bad_userinfo(reply, svc, hs):
    bad_userinfo("http", reply, svc, hs)


@pytest.mark.parametrize("reply", BAD_SUB.values(), ids=BAD_SUB)
def test_s05_bad_sub(reply, svc, hs):
    bad_userinfo(("sub", "http"), reply, svc, hs)


def bad_userinfo(step, reply, svc, hs):
    """The one 401, the step and address in the log; the next exchange is not harmed."""
    hs.on(SUB_PATH, [reply, lambda r: None])
    if reply.wire() == b"":
        hs.on(SUB_PATH, lambda r: reply)        # no reply byte may be tried once more
    line = Exchange(svc, NAME).refused(step)
    assert line["addr"] == hs.netloc
    assert 1 <= len(hs.asked()) <= (2 if reply.wire() == b"" else 1)
    hs.off()
    Exchange(svc, NAME).granted()


GOOD_SUB = {
    "255-bytes": "@" + "a" * (253 - len(NAME)) + f":{NAME}", "unicode": f"@zoë😀:{NAME}", "blank": f"@a b:{NAME}",
    "symbols": f"@!#$%&'*+-/=?^_`{{|}}~:{NAME}", "upper-case": f"@ALICE:{NAME}",
}


@pytest.mark.parametrize("sub", GOOD_SUB.values(), ids=GOOD_SUB)
def test_good_sub(sub, svc, hs):
    hs.on(SUB_PATH, sub_reply(sub))
    reply = Exchange(svc, NAME).reply
    assert reply.status == 200
    payload = claims_of(reply.json["jwt"])[1]
    assert json.loads(payload)["sub"] == f"{sub}:DEV" and payload.isascii()


def test_cut_at_every_byte(svc, hs):
    """Over plain HTTP, however the length is told: no beginning of a reply is a reply."""
    for wire in (Reply(200, BODY).wire(), te(chunked(BODY, 9)).wire(), raw(OK, BODY).wire()):
        for cut in range(len(wire)):
            hs.on(SUB_PATH, lambda r: Reply(raw=wire[:cut], close=True))
            e = Exchange(svc, NAME)
            assert e.reply.status == 401, f"granted after {wire[:cut]!r}"
            e.refused()
        hs.on(SUB_PATH, lambda r: Reply(raw=wire, close=True))
        Exchange(svc, NAME).granted()


def test_bytes_after_a_reply_are_not_the_next_reply(svc, hs):
    """What a homeserver sends unasked never answers another exchange."""
    evil = Reply(200, json.dumps({"sub": f"@eve:{NAME}"})).wire()
    hs.on(SUB_PATH, [Reply(raw=Reply(401, {"errcode": "M_UNKNOWN_TOKEN"}).wire() + evil), lambda r: None])
    Exchange(svc, NAME).refused("http")
    e = Exchange(svc, NAME)
    assert e.granted()["sub"].startswith("@alice:")


def test_s25_mutated_replies(svc, hs):
    """Replies with bytes changed at random: granted only for a user of the server, and the service goes on."""
    rng = random.Random(25)
    wires = [Reply(200, BODY, headers=[("Date", "x"), ("X-A", "b")]).wire(), te(chunked(BODY, 9)).wire(), raw(OK, BODY).wire()]
    odd = [b"\r", b"\n", b"\0", b" ", b":", b"\xff", b"\r\n", b"0", b"9", b'"', b"\\", b"}", b";", b"chunked"]
    granted = 0
    for _ in range(600):
        wire = bytearray(rng.choice(wires))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(wire))
            wire[at:at + rng.randint(0, 2)] = rng.choice(odd)
        hs.on(SUB_PATH, Reply(raw=bytes(wire), close=True))
        e = Exchange(svc, NAME)
        if e.reply.status == 200:
            granted += 1
            sub = json.loads(claims_of(e.reply.json["jwt"])[1])["sub"]
            assert sub[0] == "@" and sub.partition(":")[2] == f"{NAME}:DEV", wire
        else:
            e.refused()
    assert granted < 400
    hs.off()
    Exchange(svc, NAME).granted()


def drip(first, then, pause=0.05):
    """One request, then bytes without end."""
    def talk(conn, number):
        conn.recv(65536)
        conn.sendall(first)
        while True:
            conn.sendall(then)
            time.sleep(pause)
    return talk


STALLS = {
    "silent": lambda conn, n: time.sleep(20),
    "head-stops": lambda conn, n: (conn.recv(9999), conn.sendall(b"HTTP/1.1 200 OK\r\nX"), time.sleep(20)),
    "body-stops": lambda conn, n: (conn.recv(9999), conn.sendall(Reply(200, BODY).wire()[:-1]), time.sleep(20)),
    "until-close-never-closes": lambda conn, n: (conn.recv(9999), conn.sendall(raw(OK, BODY).wire()), time.sleep(20)),
    "head-drips": drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "body-drips": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 8000\r\n\r\n", b" "),
    "chunks-drip": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "interim-drips": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.6),
}


@pytest.mark.parametrize("talk", STALLS.values(), ids=STALLS)
def test_slow_homeserver_is_given_up(talk, hs):
    """No byte extends a deadline."""
    with RawServer(talk) as slow, lkjwt(LKJWT_LOOKUP_TIMEOUT_S="1", LKJWT_FEDERATION_API_URL_OVERRIDES=(
            f"slow.test=http://{slow.netloc},{NAME}={hs.url}")) as svc:
        Exchange(svc, "slow.test").refused("http", event="HS_TIMEOUT", addr=slow.netloc)
        Exchange(svc, NAME).granted()


def flood(svc, servers):
    """Send one exchange per name and wait for none; the sockets."""
    out = []
    for i, server in enumerate(servers):
        body = json.dumps({"room": "!r:x", "device_id": "D", "openid_token": {
            "access_token": token_for(server, f"u{i}"), "matrix_server_name": server}})
        w = svc.wire(60)
        w.send(f"POST /sfu/get HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        out.append(w)
    return out


def answered(wires):
    """Those of the sockets that have a reply by now."""
    ready = select.select([w.sock for w in wires], [], [], 0)[0]
    return [w for w in wires if w.sock in ready]


def test_s23_stalled_strangers_take_no_more_than_their_share(hs):
    """200 exchanges at one stranger that never answers: 16 are tried, 128 wait, the rest is told to come back
    later. 96 slots are all that strangers get: homeservers that the operator named are served as before."""
    pub(*range(80, 88))

    def swallow(conn, number):
        while conn.recv(65536):
            pass
    with RawServer(swallow, "0.0.0.0") as stalled, \
            Dns("".join(f"s{i}.stall.test. A {PUB % (80 + i)}\n" for i in range(8))) as dns, \
            lkjwt(dns, LKJWT_FEDERATION_API_URL_OVERRIDES=f"{NAME}={hs.url}", LKJWT_DRAIN_S="1") as svc:
        one = flood(svc, [f"s0.stall.test:{stalled.port}"] * 200)
        full = wait_for("the refusals", lambda: len(answered(one)) >= 56 and answered(one))
        assert len(stalled.open) <= 16
        for w in full[:56]:
            r = w.reply("POST")
            assert (r.status, r.errcode) == (429, "M_LIMIT_EXCEEDED") and int(r.header("Retry-After")) > 0
        svc.wait_event("QUEUE_FULL")
        more = flood(svc, [f"s{i}.stall.test:{stalled.port}" for i in range(1, 8) for _ in range(20)])
        for _ in range(20):
            Exchange(svc, NAME).granted()
            assert svc.request("GET", "/healthz").status == 200
            assert len(stalled.open) <= 96
        wait_for("the other strangers' calls", lambda: 16 < len(stalled.open))
        assert len(stalled.open) <= 96
        for w in one + more:
            w.close()


@pytest.mark.parametrize("url, step", [
    (lambda hs: f"http://127.0.0.1:{free_port()}", "connect"), (lambda hs: "http://51.99.99.99:80", "connect"),
    (lambda hs: "http://nowhere.test:80", "address"), (lambda hs: f"https://{hs.netloc}", "tls")],
    ids=["refused", "no-route", "no-such-name", "https-to-http"])
def test_unreachable_homeserver(url, step, hs):
    with Dns() as dns, lkjwt(dns, LKJWT_FEDERATION_API_URL_OVERRIDES=f"{NAME}={url(hs)}") as svc:
        Exchange(svc, NAME).refused(step)
    hs.errors.clear()                   # what TLS looks like to a plain server


def test_s08_s12_token_never_leaves_its_parameter(svc, hs):
    """Whatever bytes a token has, the request stays one request for one path (S8, S12)."""
    tokens = ["a b", "a&sub=x", "a#b", "a?b", "a%20b", "a/../b", "a=b", "a;b", "a+b", "ünï😀", "a'\"<>\\^`{|}", "-._~"]
    for token in tokens:
        hs.tokens[token] = SUB
        hs.forget()
        e = Exchange(svc, NAME, token=token)
        if e.reply.status == 200:
            asked, = hs.asked()
            assert asked.query == {"access_token": token} and asked.path == SUB_PATH
            assert set(asked.target.partition("=")[2]) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                                              "0123456789-._~%")
        else:
            e.refused()
            assert " " in token or not token.isascii()
    for token in ("a\r\nHost: x", "a\nb", "a\0b", "a\x7fb", "\x1b[1m"):
        hs.forget()
        Exchange(svc, NAME, token=token).refused()
        assert not hs.requests


def test_a_revoked_token_is_refused_at_once(svc, hs):
    Exchange(svc, NAME).granted()
    hs.sub = None
    Exchange(svc, NAME).refused("http")


# ---- the SFU -------------------------------------------------------------------------------------------

ROOM = {"room_id": "!roomid:example.com", "slot_id": "slot1234",
        "member": {"id": "memberABC", "claimed_user_id": f"@alice:{FULL}", "claimed_device_id": "DEVICE123"}}
ALIAS = "O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc"
CREATE_HEX = "0a2b4f3834333757332b6a6d7a4d566a6f495033744e77626d2b587848516b32694b704f41376171773371536310ac025014"
NO_ROOM = {"errcode": "M_UNKNOWN", "error": "Unable to create room on SFU"}


def join(svc):
    return Exchange(svc, FULL, path="/get_token", body=ROOM)


def no_room(e, calls=None, sfu=None):
    assert e.reply.status == 500 and e.reply.json == NO_ROOM, e.reply
    assert e.reply.header("Access-Control-Allow-Origin") == "*"
    line = e.line(target="sfu")
    assert line["step"]
    assert not calls or len(sfu.requests) == calls, f"{len(sfu.requests)} calls, not {calls}"
    return line


def test_create_room_bytes_and_token(svc, sfu):
    e = join(svc)
    assert e.granted()["video"]["room"] == ALIAS
    room, = sfu.rooms
    assert room["body"].hex() == CREATE_HEX
    r = room["request"]
    assert (r.method, r.target, r.host) == ("POST", CREATE_ROOM, sfu.netloc)
    assert r.header("content-type") == r.header("accept") == "application/protobuf"
    assert not {k for k, _ in r.headers} & {"accept-encoding", "transfer-encoding", "expect"}
    head, payload = claims_of(room["token"])
    c = json.loads(payload)
    assert head == '{"alg":"HS256","typ":"JWT"}'
    assert payload == ('{"iss":"%s","exp":%d,"nbf":%d,"iat":%d,"video":{"roomCreate":true}}'
                       % (CANARY_KEY, c["iat"] + 600, c["iat"], c["iat"]))
    assert abs(c["iat"] - time.time()) < 60


def test_restricted_users_cause_no_call(svc, sfu):
    Exchange(svc, NAME).granted()
    assert not sfu.requests


PB = protobuf_encode((1, "RM_x"), (2, ALIAS), (5, 1726760839))
SFU_GOOD = {
    "protobuf": Reply(200, PB), "empty": Reply(200, b""), "json": Reply(200, {"sid": "RM_x", "name": ALIAS}),
    "unknown-fields": Reply(200, PB + protobuf_encode((99, "x" * 500), (100, 7))), "chunked": te(chunked(PB, 5)),
    "until-close": raw(OK, PB), "garbage": Reply(200, b"\xff" * 100), "60-kb": Reply(200, b"\x9a\x06\xe0\xd4\x03" + b"x" * 60000),
    "interim": Reply(raw=b"HTTP/1.1 100 Continue\r\n\r\n" + Reply(200, PB).wire()),
}


@pytest.mark.parametrize("reply", SFU_GOOD.values(), ids=SFU_GOOD)
def test_create_room_success_is_exactly_200(reply, svc, sfu):
    sfu.fail = reply
    join(svc).granted()
    assert len(sfu.rooms) == 1


def twirp(status, code, **more):
    return Reply(status, {"code": code, "msg": "words of the SFU", **more})


SFU_BAD = {
    # id: reply, calls (transport errors and 5xx are tried once more)
    "201": (Reply(201, PB), 1), "202": (Reply(202, PB), 1), "204": (Reply(204, b"", length=False), 1),
    "401-text": (Reply(401, "invalid token: ... ", ctype="text/plain"), 1),
    "unauthenticated": (twirp(401, "unauthenticated"), 1), "permission": (twirp(403, "permission_denied"), 1),
    "bad-route": (twirp(404, "bad_route", meta={"twirp_invalid_route": "POST /x"}), 1),
    "not-found": (twirp(404, "not_found"), 1), "404-html": (Reply(404, "<html>", ctype="text/html"), 1),
    "malformed": (twirp(400, "malformed"), 1), "exhausted": (twirp(429, "resource_exhausted"), 1),
    "internal": (twirp(500, "internal"), 2), "unavailable": (twirp(503, "unavailable"), 2),
    "502-html": (Reply(502, "<html>Bad Gateway</html>"), 2), "500-empty": (Reply(500, b""), 2),
    "500-bad-json": (Reply(500, b'{"code":'), 2), "500-code-number": (Reply(500, b'{"code":5,"msg":[]}'), 2),
    "closed": (Reply(raw=b"", close=True), None), "reset": (Reply(raw=b"HTTP", reset=True), 2),
    "cut-head": (Reply(raw=b"HTTP/1.1 200 OK\r\nConte", close=True), 2),
    "cut-body": (raw(f"{OK}\nContent-Length: 99", PB), 2), "not-http": (raw("220 smtp"), None),
    "length-and-chunked": (raw(f"{TE}\nContent-Length: 3", b"0\r\n\r\n"), None), "bad-chunk": (te(b"zz\r\n"), None),
    "gzip": (Reply(200, PB, headers=[("Content-Encoding", "gzip")]), None),
    "65-kb": (Reply(200, b"x" * 70000), None), "head-17-kb": (raw(OK + ("\nX: " + "y" * 1000) * 17), None),
}


@pytest.mark.parametrize("reply, calls", SFU_BAD.values(), ids=SFU_BAD)
def test_create_room_failures(reply, calls, svc, sfu):
    sfu.fail = reply
    no_room(join(svc), calls, sfu)
    assert len(sfu.requests) <= 2
    # legacy endpoint: the same answer
    e = Exchange(svc, FULL)
    assert e.reply.status == 500 and e.reply.json == NO_ROOM
    sfu.fail = None
    join(svc).granted()


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 305, 307, 308])
def test_s04_no_redirect_is_followed(status, svc, hs, sfu):
    """Neither by the userinfo call nor by CreateRoom, to whatever place."""
    for where in ("/evil", f"{hs.url}/evil", f"http://localhost:{hs.port}/evil", "//evil.test/x"):
        redirect = Reply(status, BODY, headers=[("Location", where)])
        hs.on(SUB_PATH, redirect)
        Exchange(svc, NAME).refused("http")
        hs.off()
        sfu.fail = redirect
        no_room(join(svc), 1, sfu)
        sfu.forget()
    assert not hs.seen("/evil") and not sfu.seen("/evil")


@pytest.mark.parametrize("code", ["unavailable", "internal", "unauthenticated"])
def test_twirp_code_is_logged(code, svc, sfu):
    sfu.fail = twirp(500, code)
    assert no_room(join(svc))["code"] == code


@pytest.mark.parametrize("first", [twirp(503, "unavailable"), Reply(raw=b"", close=True), Reply(raw=b"H", reset=True)],
                         ids=["503", "closed", "reset"])
def test_create_room_is_tried_once_more(first, svc, sfu):
    sfu.fail = [first]
    join(svc).granted()
    assert len(sfu.rooms) == 2 and len({r["body"] for r in sfu.rooms}) == 1


def test_kept_sfu_connection_that_dies_costs_nothing(svc, sfu):
    for _ in range(30):
        join(svc).granted()
        sfu.drop_connections()
    assert len(sfu.rooms) == 30


def test_wrong_secret_is_refused_by_the_sfu(hs):
    with Sfu(CANARY_KEY, "another-secret-of-enough-length-for-all") as sfu, lkjwt(
            None, sfu, LKJWT_FEDERATION_API_URL_OVERRIDES=f"{FULL}={hs.url}") as svc:
        no_room(join(svc), 1, sfu)


def test_unreachable_sfu(hs):
    over = {"LKJWT_FEDERATION_API_URL_OVERRIDES": f"{FULL}={hs.url}"}
    for url in (f"ws://127.0.0.1:{free_port()}", "ws://nowhere.test:1", "ws://51.99.99.99:7880"):
        with Dns() as dns, lkjwt(dns, LIVEKIT_URL=url, **over) as svc:
            no_room(join(svc))
            hs.off()
    with lkjwt(LIVEKIT_URL=f"wss://{hs.netloc}", **over) as svc:      # TLS asked of a plain port
        no_room(join(svc))
    hs.errors.clear()


def test_silent_sfu_is_given_up(hs):
    """10 s in all, whatever is tried again."""
    with BlackHole() as hole, lkjwt(LIVEKIT_URL=f"ws://127.0.0.1:{hole.port}",
                                    LKJWT_FEDERATION_API_URL_OVERRIDES=f"{FULL}={hs.url}") as svc:
        no_room(join(svc))


SFU_URLS = {
    # LIVEKIT_URL, LKJWT_LIVEKIT_API_URL, path before /twirp
    "ws": ("ws://{sfu}", None, ""), "http": ("http://{sfu}", None, ""), "no-scheme": ("{sfu}", None, ""),
    "slash": ("ws://{sfu}/", None, ""), "slashes": ("ws://{sfu}///", None, ""), "path": ("ws://{sfu}/a/b", None, "/a/b"),
    "path-slash": ("ws://{sfu}/a/", None, "/a"), "query": ("ws://{sfu}/a?x=/y", None, "/a"),
    "fragment": ("ws://{sfu}/a#x/y", None, "/a"), "scheme-case": ("WS://{sfu}", None, ""),
    "api": ("wss://sfu.example.org/x", "http://{sfu}/in", "/in"), "api-ws": ("wss://sfu.example.org", "ws://{sfu}", ""),
    "api-no-scheme": ("wss://sfu.example.org", "{sfu}/", ""), "wss": ("wss://localhost:{tls}/q", None, "/q"),
    "api-https": ("wss://sfu.example.org", "https://localhost:{tls}", ""),
}


@pytest.fixture(scope="module")
def tls_sfu():
    with Sfu(CANARY_KEY, CANARY_SECRET, tls=pki().leaf(["localhost"])) as s:
        yield s


@pytest.mark.parametrize("url, api, prefix", SFU_URLS.values(), ids=SFU_URLS)
def test_sfu_urls(url, api, prefix, hs, sfu, tls_sfu):
    fill = lambda t: t and t.format(sfu=sfu.netloc, tls=tls_sfu.port)  # noqa: E731
    tls_sfu.forget()
    sfu.prefix = tls_sfu.prefix = prefix
    try:
        with Dns("localhost. A 127.0.0.1\n") as dns, lkjwt(
                dns, LIVEKIT_URL=fill(url), LKJWT_LIVEKIT_API_URL=fill(api),
                LKJWT_FEDERATION_API_URL_OVERRIDES=f"{FULL}={hs.url}") as svc:
            e = join(svc)
            e.granted()
            assert e.reply.json["url"] == fill(url)         # as configured, untrimmed
        room, = sfu.rooms + tls_sfu.rooms
        assert room["request"].path == prefix + CREATE_ROOM
        assert bool(room["request"].tls) == ("tls" in (api or url))
    finally:
        sfu.prefix = ""
