"""Where lkjwt connects for a server name (PROTOCOL.md 7.2, 7.3), with dnsmasq as the nameserver.

One stand-in listens at every address and port that a row may name. For an SNI it knows it shows a
certificate of exactly that name, so a granted exchange proves connect address, Host header, SNI and
certificate name at once.
"""
import email.utils
import time

import pytest

from outbound import Exchange, by_token, fresh, lkjwt, pki, pub, PUB, PUB6, token_for
from peers import BlackHole, Dns, Dnsmasq, Homeserver, RawServer, Reply, Sfu, SUB_PATH, WELL_KNOWN, chunked, together
from service import CANARY_KEY, CANARY_SECRET

V4 = {n: PUB % n for n in range(1, 40)}
V6 = {n: PUB6 % n for n in range(1, 40)}
WEB = V4[1]                     # port 443 of every name that has a well-known; 8448 too

# id: server name, m.server of its well-known (None: 404), address and port dialled, Host, SNI
ROWS = {
    "1-ipv4": (V4[11], None, (V4[11], 8448), V4[11], None),
    "1-ipv4-port": (f"{V4[11]}:9448", None, (V4[11], 9448), f"{V4[11]}:9448", None),
    "1-ipv6": (f"[{V6[11]}]", None, (V6[11], 8448), f"[{V6[11]}]", None),
    "1-ipv6-port": (f"[{V6[11]}]:9448", None, (V6[11], 9448), f"[{V6[11]}]:9448", None),
    "1-ipv6-spelling": ("[2A01:04f8:0::11]", None, (V6[11], 8448), "[2A01:04f8:0::11]", None),
    "2-port": ("port.test:9448", None, (V4[11], 9448), "port.test:9448", "port.test"),
    "2-port-8448": ("port.test:8448", None, (V4[11], 8448), "port.test:8448", "port.test"),
    "2-aaaa-only": ("six.test:9448", None, (V6[11], 9448), "six.test:9448", "six.test"),
    "2-cname": ("alias.test:9448", None, (V4[11], 9448), "alias.test:9448", "alias.test"),
    "2-has-srv-and-well-known": ("both.test:9448", "elsewhere.test", (V4[11], 9448), "both.test:9448", "both.test"),
    "3.1-ipv4": ("w31.test", V4[12], (V4[12], 8448), V4[12], None),
    "3.1-ipv4-port": ("w31p.test", f"{V4[12]}:9450", (V4[12], 9450), f"{V4[12]}:9450", None),
    "3.1-ipv6": ("w31s.test", f"[{V6[12]}]", (V6[12], 8448), f"[{V6[12]}]", None),
    "3.1-ipv6-port": ("w31sp.test", f"[{V6[12]}]:9450", (V6[12], 9450), f"[{V6[12]}]:9450", None),
    "3.2-port": ("w32.test", "d32.test:9450", (V4[12], 9450), "d32.test:9450", "d32.test"),
    "3.2-port-has-srv": ("w32s.test", "d33.test:9450", (V4[12], 9450), "d33.test:9450", "d33.test"),
    "3.3-srv-fed": ("w33.test", "d33.test", (V4[13], 9451), "d33.test", "d33.test"),
    "3.3-srv-fed-before-old": ("w33b.test", "d33b.test", (V4[13], 9451), "d33b.test", "d33b.test"),
    "3.4-srv-old": ("w34.test", "d34.test", (V4[14], 9452), "d34.test", "d34.test"),
    "3.5-8448": ("w35.test", "d35.test", (V4[12], 8448), "d35.test", "d35.test"),
    "3.5-no-second-well-known": ("w35w.test", "d35w.test", (WEB, 8448), "d35w.test", "d35w.test"),
    "3.5-of-itself": ("self.test", "self.test", (WEB, 8448), "self.test", "self.test"),
    "4-srv-fed": ("n4.test", None, (V4[13], 9451), "n4.test", "n4.test"),
    "4-srv-fed-before-old": ("n4b.test", None, (V4[13], 9451), "n4b.test", "n4b.test"),
    "5-srv-old": ("n5.test", None, (V4[14], 9452), "n5.test", "n5.test"),
    "6-8448": ("n6.test", None, (WEB, 8448), "n6.test", "n6.test"),
    "6-8448-ipv6": ("n6s.test", None, (V6[1], 8448), "n6s.test", "n6s.test"),
    "6-no-443": ("n6q.test", None, (V4[12], 8448), "n6q.test", "n6q.test"),
    "srv-fed-dot": ("dot.test", None, (V4[14], 9452), "dot.test", "dot.test"),
    "srv-both-dot": ("dots.test", None, (WEB, 8448), "dots.test", "dots.test"),
    "srv-priority": ("prio.test", None, (V4[13], 9451), "prio.test", "prio.test"),
    "srv-next-target": ("next.test", None, (V4[14], 9452), "next.test", "next.test"),
    "srv-target-without-address": ("gone.test", None, (V4[14], 9452), "gone.test", "gone.test"),
    "srv-target-cname": ("tcname.test", None, (V4[13], 9451), "tcname.test", "tcname.test"),
    "srv-target-ipv6": ("t6.test", None, (V6[13], 9451), "t6.test", "t6.test"),
    "srv-target-itself": ("tself.test", None, (WEB, 9453), "tself.test", "tself.test"),
}
WELL_KNOWNS = {row[0]: row[1] for row in ROWS.values() if row[1]}
WELL_KNOWNS["d35w.test"] = "never.test"
ON_WEB = [row[0] for i, row in ROWS.items() if row[0].endswith(".test") and not i.startswith(("2", "6-"))]
WEIGHTED = [f"weight{i}.test" for i in range(40)]

CONFIG = "\n".join([
    "local=/test/", "local-ttl=60", f"address=/w.test/{WEB}",
    *[f"host-record={n},{WEB}" for n in ON_WEB + ["n6.test", "d35w.test", *WEIGHTED]],
    f"host-record=n6s.test,{V6[1]}", f"host-record=n6q.test,{V4[12]}",
    f"host-record=port.test,{V4[11]}", f"host-record=six.test,{V6[11]}", "cname=alias.test,port.test",
    f"host-record=both.test,{V4[11]}", "srv-host=_matrix-fed._tcp.both.test,t14.test,9452,1,1",
    *[f"host-record={n},{V4[12]}" for n in ("d32.test", "d33.test", "d33b.test", "d34.test", "d35.test")],
    f"host-record=t13.test,{V4[13]}", f"host-record=t14.test,{V4[14]}", f"host-record=t6t.test,{V6[13]}",
    "cname=t13alias.test,t13.test", f"host-record=t15.test,{V4[15]}",
    *[f"srv-host=_matrix-fed._tcp.{n},t13.test,9451,1,1" for n in ("d33.test", "d33b.test", "n4.test", "n4b.test")],
    *[f"srv-host=_matrix._tcp.{n},t14.test,9452,1,1" for n in ("d33b.test", "d34.test", "n4b.test", "n5.test",
                                                              "dot.test")],
    "srv-host=_matrix-fed._tcp.dot.test", "srv-host=_matrix-fed._tcp.dots.test", "srv-host=_matrix._tcp.dots.test",
    # the lower priority number first, whatever the weights; t15 has nobody listening
    "srv-host=_matrix-fed._tcp.prio.test,t14.test,9452,20,65535",
    "srv-host=_matrix-fed._tcp.prio.test,t13.test,9451,10,0",
    "srv-host=_matrix-fed._tcp.next.test,t14.test,9452,20,0", "srv-host=_matrix-fed._tcp.next.test,t15.test,9451,10,9",
    "srv-host=_matrix-fed._tcp.gone.test,t14.test,9452,20,0",
    "srv-host=_matrix-fed._tcp.gone.test,nowhere.test,9451,10,9",
    "srv-host=_matrix-fed._tcp.tcname.test,t13alias.test,9451,1,1",
    "srv-host=_matrix-fed._tcp.t6.test,t6t.test,9451,1,1", "srv-host=_matrix-fed._tcp.tself.test,tself.test,9453,1,1",
    *[f"srv-host=_matrix-fed._tcp.{n},{t},{p},10,{w}" for n in WEIGHTED
      for t, p, w in (("t13.test", 9451, 30), ("t14.test", 9452, 10))],
])


@pytest.fixture(scope="module")
def dnsmasq():
    with Dnsmasq(CONFIG) as d:
        yield d


@pytest.fixture(scope="module")
def stand_in():
    pub(*range(1, 36))
    names = {row[4] for row in ROWS.values() if row[4]} | set(ON_WEB) | {"n6.test", "n6s.test", *WEIGHTED}
    certs = {n: pki().leaf([n]) for n in names}
    for wild in ("*.w.test", "*.good.w.test", "*.x.good.w.test"):
        certs[wild] = pki().leaf([wild])
    certs[None] = pki().leaf(ips=[*V4.values(), *V6.values()])
    addrs = {row[2] for row in ROWS.values()} | {(WEB, 443), (V6[1], 443), (V4[14], 9452), (V4[13], 9451)}
    hs = Homeserver(sorted(addrs), tls=certs, sub=by_token)
    yield hs
    hs.stop()


@pytest.fixture
def hs(stand_in):
    """The stand-in, with nothing remembered and the well-knowns of ROWS."""
    stand_in.off()
    stand_in.forget()
    stand_in.close_each = False
    stand_in.well_known = lambda req: WELL_KNOWNS.get(req.host)
    yield stand_in
    assert not stand_in.errors, stand_in.errors


@pytest.fixture
def svc(dnsmasq, hs):
    with lkjwt(dnsmasq) as s:
        yield s


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_table(row, svc, hs):
    server, m_server, addr, host, sni = row
    Exchange(svc, server).granted()
    asked, = hs.asked()
    assert (asked.addr, asked.host, asked.sni) == (addr, host, sni)
    # the request of PROTOCOL.md 7.1
    assert (asked.method, asked.path, asked.version) == ("GET", SUB_PATH, "1.1")
    assert asked.query == {"access_token": token_for(server)} and "%2B" in asked.target and "~" in asked.target
    assert asked.header("accept") == "application/json" and asked.header("user-agent")
    names = {k for k, _ in asked.headers}
    assert not names & {"authorization", "accept-encoding", "cookie", "content-length", "transfer-encoding"}
    well_known = hs.seen(WELL_KNOWN)
    with_port_or_literal = server[0] == "[" or ":" in server or server[0].isdigit()
    if with_port_or_literal or row is ROWS["6-no-443"]:
        assert not well_known
    else:
        once, = well_known
        assert (once.method, once.target, once.host, once.sni) == ("GET", WELL_KNOWN, server, server)
        assert once.addr[1] == 443 and not {k for k, _ in once.headers} & {"authorization", "accept-encoding"}


def test_table_get_token_path_and_full_access(dnsmasq, hs):
    """The other endpoint looks up the same way, and full access follows the server name asked, port included."""
    body = {"room_id": "!r:x", "slot_id": "m.call#ROOM",
            "member": {"id": "m", "claimed_user_id": "@alice:port.test:9448", "claimed_device_id": "D"}}
    with Sfu(CANARY_KEY, CANARY_SECRET) as sfu, \
            lkjwt(dnsmasq, sfu, LIVEKIT_FULL_ACCESS_HOMESERVERS="port.test:9448") as svc:
        e = Exchange(svc, "port.test:9448", path="/get_token", body=body)
        assert e.reply.status == 200, e.reply
        assert len(sfu.rooms) == 1
        Exchange(svc, "port.test:8448").granted()
        assert len(sfu.rooms) == 1


def test_srv_weights_share_one_priority(svc, hs):
    """40 names whose two targets weigh 3 to 1: both get some (by chance not in 1 of 100,000 runs)."""
    for name in WEIGHTED:
        Exchange(svc, name).granted()
    ports = [r.addr[1] for r in hs.asked()]
    assert set(ports) == {9451, 9452} and ports.count(9451) > ports.count(9452)


# ---- well-known: what counts, what is "failed" and leads to step 4 --------------------------------

D = V4[12]                      # a delegation that shows whether the well-known counted
OK_BODY = b'{"m.server":"%s"}' % D.encode()


def redirect(status, location):
    return Reply(status, b"moved", headers=[("Location", location)] if location is not None else [])


GOOD_WELL_KNOWN = {
    "51200-bytes": lambda r: Reply(200, OK_BODY + b" " * (51200 - len(OK_BODY))),
    "any-content-type": lambda r: Reply(200, OK_BODY, ctype="text/html; charset=utf-16"),
    "no-content-type": lambda r: Reply(200, OK_BODY),
    "other-members": lambda r: Reply(200, b'{"a":[1,{"m.server":"no.test"}],"m.server":"%s","b":null}' % D.encode()),
    "whitespace": lambda r: Reply(200, b"\r\n\t " + OK_BODY + b"\n"),
    "escaped": lambda r: Reply(200, b'{"m\\u002eserver":"%s"}' % D.replace(".", "\\u002e").encode()),
    "chunked": lambda r: Reply(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(OK_BODY)),
    "until-close": lambda r: Reply(200, OK_BODY, length=False, close=True),
    "http-1.0": lambda r: Reply(raw=b"HTTP/1.0 200 OK\r\n\r\n" + OK_BODY, close=True),
    "interim": lambda r: Reply(raw=b"HTTP/1.1 103 Early\r\nLink: </x>\r\n\r\n" + Reply(200, OK_BODY).wire()),
    "byte-by-byte": lambda r: Reply(200, OK_BODY, step=1),
    "closes-after": lambda r: Reply(200, OK_BODY, close=True),
    **{f"redirect-{s}": (lambda s: lambda r: redirect(s, f"https://{r.host}/moved"))(s)
       for s in (301, 302, 303, 307, 308)},
    "redirect-path": lambda r: redirect(302, "/moved"),
    "redirect-no-scheme": lambda r: redirect(302, f"//{r.host}/moved"),
    "redirect-other-host": lambda r: redirect(302, "https://other.w.test/moved"),
    "redirect-port": lambda r: redirect(302, f"https://{r.host}:8448/moved"),
    "redirect-query": lambda r: redirect(302, f"https://{r.host}/moved?a=b&c=d"),
    "redirect-fragment": lambda r: redirect(302, f"https://{r.host}/moved#part"),
    "redirect-ip": lambda r: redirect(302, f"https://{WEB}/moved"),
    "redirect-scheme-case": lambda r: redirect(302, f"HTTPS://{r.host}/moved"),
    "redirect-3": lambda r: redirect(302, "/2"),
}


@pytest.mark.parametrize("make", GOOD_WELL_KNOWN.values(), ids=GOOD_WELL_KNOWN)
def test_well_known_counts(make, svc, hs):
    hs.on(WELL_KNOWN, make)
    hs.on("/2", lambda r: redirect(307, "/1")).on("/1", lambda r: redirect(303, "/moved"))
    hs.on("/moved", lambda r: Reply(200, OK_BODY))
    Exchange(svc, fresh()).granted()
    asked, = hs.asked()
    assert (asked.addr, asked.host) == ((D, 8448), D)
    assert {r.method for r in hs.seen()} == {"GET"}
    assert {r.target for r in hs.seen("/moved")} <= {"/moved", "/moved?a=b&c=d"}
    if "a=b" in make(asked).wire().decode("latin-1"):
        assert hs.seen("/moved")[0].target == "/moved?a=b&c=d"


NOT_OK = {
    **{f"status-{s}": (lambda s: lambda r: Reply(s, OK_BODY))(s)
       for s in (201, 202, 203, 206, 300, 400, 401, 403, 404, 410, 418, 429, 500, 502, 503)},
    "status-204": lambda r: Reply(204, b"", length=False),
    "status-304": lambda r: Reply(304, b"", length=False),
    "51201-bytes": lambda r: Reply(200, OK_BODY + b" " * (51201 - len(OK_BODY))),
    "51201-bytes-chunked": lambda r: Reply(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(
        OK_BODY + b" " * (51201 - len(OK_BODY)), 4096)),
    "51201-bytes-until-close": lambda r: Reply(200, OK_BODY + b" " * (51201 - len(OK_BODY)), length=False, close=True),
    "endless": lambda r: Reply(raw=b"HTTP/1.1 200 OK\r\n\r\n" + OK_BODY + b" " * 4_000_000, close=True),
    "length-of-4-gb": lambda r: Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 4294967296\r\n\r\n" + OK_BODY, close=True),
    "head-17-kb": lambda r: Reply(200, OK_BODY, headers=[(f"X-{i}", "y" * 1000) for i in range(17)]),
    "101-fields": lambda r: Reply(200, OK_BODY, headers=[(f"X-{i}", "y") for i in range(101)]),
    "5-interim": lambda r: Reply(raw=b"HTTP/1.1 103 Early\r\n\r\n" * 5 + Reply(200, OK_BODY).wire()),
    **{f"json-{k}": (lambda b: lambda r: Reply(200, b))(b) for k, b in {
        "empty": b"", "null": b"null", "array": b'["%s"]' % D.encode(), "text": D.encode(), "string": b'"%s"' % D.encode(),
        "cut": OK_BODY[:-1], "trailing": OK_BODY + b"x", "two": OK_BODY * 2, "comma": OK_BODY[:-1] + b",}",
        "duplicate": b'{"m.server":"%s","m.server":"%s"}' % (D.encode(), D.encode()), "bom": b"\xef\xbb\xbf" + OK_BODY,
        "utf-8": b'{"m.server":"%s","x":"\xff"}' % D.encode(), "utf-16": OK_BODY.decode().encode("utf-16"),
        "single-quotes": OK_BODY.replace(b'"', b"'"), "comment": OK_BODY + b"// x", "deep": b'{"m.server":"%s","x":%s}' % (
            D.encode(), b"[" * 2000 + b"]" * 2000), "missing": b"{}", "case": OK_BODY.replace(b"m.s", b"M.S"),
        "nested": b'{"m":{"server":"%s"}}' % D.encode(), "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
        "control": b'{"m.server":"%s","x":"\x01"}' % D.encode(),
    }.items()},
    **{f"m.server-{k}": (lambda v: lambda r: Reply(200, {"m.server": v}))(v) for k, v in {
        "null": None, "number": 8448, "true": True, "list": [D], "object": {"host": D}, "empty": "", "blank": " ",
        "underscore": "a_b.test", "url": f"https://{D}", "path": f"{D}/x", "user": f"u@{D}", "port-0": f"{D}:0",
        "port-65536": f"{D}:65536", "port-empty": f"{D}:", "port-6-digits": f"{D}:008448", "port-text": f"{D}:https",
        "two-ports": f"{D}:1:2", "bare-ipv6": V6[12], "open-bracket": f"[{V6[12]}", "empty-brackets": "[]",
        "bad-ipv6": "[::g]", "unicode": "münchen.test", "newline": f"{D}\r\nX: y", "nul": f"{D}\0", "blank-end": f"{D} ",
        "256": "a" * 251 + ".test", "query": f"{D}?x", "zone": "[fe80::1%25eth0]",
    }.items()},
    "redirect-http": lambda r: redirect(302, f"http://{r.host}/moved"),
    "redirect-4": lambda r: redirect(302, "/3"),
    "redirect-loop": lambda r: redirect(302, WELL_KNOWN),
    "redirect-no-location": lambda r: redirect(302, None),
    "redirect-empty-location": lambda r: redirect(302, ""),
    "redirect-user": lambda r: redirect(302, f"https://u:p@{r.host}/moved"),
    "redirect-ftp": lambda r: redirect(302, "ftp://x.w.test/moved"),
    "redirect-javascript": lambda r: redirect(302, "javascript:1"),
    "redirect-bad-host": lambda r: redirect(302, "https://a_b/moved"),
    "redirect-bad-port": lambda r: redirect(302, "https://x.w.test:0/moved"),
    "redirect-long": lambda r: redirect(302, "/" + "x" * 15000),
    "redirect-unknown-host": lambda r: redirect(302, "https://nowhere.test/moved"),
    "redirect-refused": lambda r: redirect(302, f"https://{V4[20]}/moved"),
    "redirect-wrong-name": lambda r: redirect(302, "https://wrong.sub.w.test/moved"),
    "redirect-304": lambda r: redirect(304, "/moved"),
    "redirect-305": lambda r: redirect(305, "/moved"),
    "gzip-coded": lambda r: Reply(200, OK_BODY, headers=[("Content-Encoding", "gzip")]),
    "length-and-chunked": lambda r: Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"
                                              b"\r\n\r\n" + chunked(OK_BODY)),
    "bad-chunk": lambda r: Reply(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + OK_BODY),
    "short-body": lambda r: Reply(200, OK_BODY + b" ", cut=len(Reply(200, OK_BODY + b" ", close=True).wire()) - 1),
    "until-close-without-notify": lambda r: Reply(200, OK_BODY, length=False, close=True, dirty=True),
    "reset": lambda r: Reply(raw=b"HTTP/1.1 200 OK\r\n", reset=True),
    "closed-at-once": lambda r: Reply(raw=b"", close=True),
    "not-http": lambda r: Reply(raw=b"SSH-2.0-x\r\n\r\n", close=True),
    "http-2": lambda r: Reply(raw=b"HTTP/2 200 OK\r\nContent-Length: %d\r\n\r\n" % len(OK_BODY) + OK_BODY, close=True),
    "folded": lambda r: Reply(200, OK_BODY, headers=[("X-A", "a\r\n b")]),
}


@pytest.mark.parametrize("make", NOT_OK.values(), ids=NOT_OK)
def test_well_known_failed_leads_to_step_4(make, svc, hs):
    hs.on(WELL_KNOWN, make)
    hs.on("/3", lambda r: redirect(302, "/2")).on("/2", lambda r: redirect(307, "/1"))
    hs.on("/1", lambda r: redirect(303, "/moved")).on("/moved", lambda r: Reply(200, OK_BODY))
    server = fresh()
    Exchange(svc, server).granted()
    asked, = hs.asked()
    assert (asked.addr, asked.host, asked.sni) == ((WEB, 8448), server, server)
    # a redirect that is followed costs one request each, the fourth none
    assert len(hs.seen()) <= 1 + 1 + 3


def test_well_known_certificate_is_checked(dnsmasq, hs):
    """A well-known behind a certificate that does not verify is a failed one; step 4 still needs a good one."""
    bad = Homeserver([(V4[16], 443)], tls=pki().leaf(["other.test"]), well_known=D)
    good = Homeserver([(V4[16], 8448)], tls=pki().leaf(["x16.test"]), sub=by_token)
    with bad, good, Dns(f"x16.test. A {V4[16]}\n") as dns, lkjwt(dns) as svc:
        Exchange(svc, "x16.test").granted()
        assert not bad.requests and bad.handshakes == 0 and len(good.asked()) == 1


# ---- caches ----------------------------------------------------------------------------------------

def expires(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


CACHE = {
    "none": [], "max-age": [("Cache-Control", "max-age=600")], "max-age-0": [("Cache-Control", "max-age=0")],
    "max-age-huge": [("Cache-Control", "max-age=99999999999999999999")], "no-store": [("Cache-Control", "no-store")],
    "max-age-among": [("Cache-Control", "public, max-age=3600, must-revalidate")],
    "max-age-bad": [("Cache-Control", "max-age=soon")], "expires": [("Expires", expires(3600))],
    "expires-past": [("Expires", expires(-3600))], "expires-0": [("Expires", "0")],
    "both": [("Cache-Control", "max-age=600"), ("Expires", expires(-1))],
}


@pytest.mark.parametrize("headers", CACHE.values(), ids=CACHE)
def test_well_known_is_fetched_once(headers, svc, hs):
    """Whatever the headers say, a delegation is kept for 5 minutes at least."""
    hs.on(WELL_KNOWN, lambda r: Reply(200, {"m.server": D}, headers=headers))
    server = fresh()
    for _ in range(3):
        Exchange(svc, server).granted()
    assert len(hs.seen(WELL_KNOWN)) == 1
    assert [r.addr for r in hs.asked()] == [(D, 8448)] * 3


def at_once(svc, servers):
    """Exchanges in parallel, each with a token of its own; their replies."""
    return together([lambda i=i, server=server: Exchange(svc, server, token=token_for(server, f"u{i}"))
                     for i, server in enumerate(servers)])


def test_well_known_is_fetched_once_for_all_who_wait(svc, hs):
    hs.on(WELL_KNOWN, lambda r: Reply(200, {"m.server": D}, delay=0.5))
    assert [e.reply.status for e in at_once(svc, [fresh()] * 12)] == [200] * 12
    assert len(hs.seen(WELL_KNOWN)) == 1


def test_many_exchanges_at_once(svc, hs):
    """80 for one stranger, 40 for others: all are served, at most 16 at a time per server."""
    hs.on(WELL_KNOWN, Reply(404))
    one = "port.test:9448"
    assert [e.reply.status for e in at_once(svc, [one] * 80 + [fresh() for _ in range(40)])] == [200] * 120
    assert sum(a == (V4[11], 9448) for a in hs.accepted) <= 16


def test_failed_well_known_is_fetched_once(svc, hs):
    server = fresh()
    for _ in range(3):
        Exchange(svc, server).granted()
    assert len(hs.seen(WELL_KNOWN)) == 1 and len(hs.asked()) == 3


def test_a_delegation_is_cached_per_name(svc, hs):
    hs.on(WELL_KNOWN, lambda r: Reply(200, {"m.server": D}))
    for server in (a := fresh(), b := fresh(), a, b):
        Exchange(svc, server).granted()
    assert [r.host for r in hs.seen(WELL_KNOWN)] == [a, b]


def test_cached_delegation_that_no_longer_connects_is_resolved_anew(svc, hs):
    server, old, new = fresh(), V4[21], D
    target = [old]
    hs.on(WELL_KNOWN, lambda r: Reply(200, {"m.server": target[0]}))
    with Homeserver([(old, 8448)], tls=pki().leaf(ips=[old]), sub=by_token) as first:
        Exchange(svc, server).granted()
        assert len(first.asked()) == 1
    target[0] = new
    Exchange(svc, server).granted()             # the same exchange finds the new place
    assert len(hs.seen(WELL_KNOWN)) == 2 and [r.addr for r in hs.asked()] == [(new, 8448)]


def test_cached_delegation_that_stays_away_is_resolved_once_more_only(svc, hs):
    server, gone = fresh(), V4[22]
    hs.on(WELL_KNOWN, lambda r: Reply(200, {"m.server": gone}))
    with Homeserver([(gone, 8448)], tls=pki().leaf(ips=[gone]), sub=by_token):
        Exchange(svc, server).granted()
    e = Exchange(svc, server)
    e.refused("connect")
    assert gone in e.refused("connect")["addr"]
    assert len(hs.seen(WELL_KNOWN)) == 2


# ---- overrides -------------------------------------------------------------------------------------

OVERRIDES = {
    # id: value (with {port} the plain stand-in's, {tls} the TLS one's), path asked, TLS, Host
    "http": ("http://127.0.0.1:{port}", "", False, "127.0.0.1:{port}"),
    "http-path": ("http://127.0.0.1:{port}/hs/one", "/hs/one", False, "127.0.0.1:{port}"),
    "http-slashes": ("http://127.0.0.1:{port}/hs///", "/hs", False, "127.0.0.1:{port}"),
    "http-slash": ("http://127.0.0.1:{port}/", "", False, "127.0.0.1:{port}"),
    "http-ipv6": ("http://[::1]:{port6}", "", False, "[::1]:{port6}"),
    "http-name": ("http://inner.test:{port}", "", False, "inner.test:{port}"),
    "https": ("https://inner.test:{tls}", "", True, "inner.test:{tls}"),
    "https-path": ("https://inner.test:{tls}/a/b", "/a/b", True, "inner.test:{tls}"),
    "no-scheme": ("inner.test:{tls}", "", True, "inner.test:{tls}"),
    "no-scheme-path": ("inner.test:{tls}/p", "/p", True, "inner.test:{tls}"),
    "https-443": ("https://inner.test", "", True, "inner.test"),
    "https-ip": ("https://127.0.0.1:{tls}", "", True, "127.0.0.1:{tls}"),
}


@pytest.fixture(scope="module")
def inner():
    plain = Homeserver([("127.0.0.1", 0)], sub=by_token)
    plain6 = Homeserver([("::1", 0)], sub=by_token)
    tls = Homeserver([("127.0.0.1", 0), ("127.0.0.1", 443)], tls={
        "inner.test": pki().leaf(["inner.test"]), None: pki().leaf(ips=["127.0.0.1"])}, sub=by_token)
    with plain, plain6, tls, Dns("inner.test. A 127.0.0.1\n") as dns:
        yield plain, plain6, tls, dns


@pytest.mark.parametrize("row", OVERRIDES.values(), ids=OVERRIDES)
@pytest.mark.parametrize("server", ["over.test", "over.test:8448", "51.15.0.9", "localhost"])
def test_override_replaces_discovery(server, row, inner):
    plain, plain6, tls, dns = inner
    for x in (plain, plain6, tls, dns):
        x.forget()
    url, path, encrypted, host = [v.format(port=plain.port, port6=plain6.port, tls=tls.port)
                                  if isinstance(v, str) else v for v in row]
    with lkjwt(dns, LKJWT_FEDERATION_API_URL_OVERRIDES=f" x.test = http://127.0.0.1:9 ,, {server} = {url} ,") as svc:
        Exchange(svc, server).granted()
    asked, = plain.asked() + plain6.asked() + tls.asked()
    assert (asked.path, asked.host, bool(asked.tls)) == (path + SUB_PATH, host, encrypted)
    assert asked.sni == ("inner.test" if encrypted and "inner" in url else None)
    assert {q[0] for q in dns.queries} <= {"inner.test."} and not any(q[1] == "SRV" for q in dns.queries)


def test_override_is_keyed_by_the_whole_name_and_the_rule_of_sub_stays(inner):
    plain, _, _, dns = inner
    plain.forget()
    with lkjwt(dns, LKJWT_FEDERATION_API_URL_OVERRIDES=f"over.test:1234=http://{plain.netloc}") as svc:
        Exchange(svc, "over.test").refused()
        Exchange(svc, "over.test:12345").refused()
        Exchange(svc, "Over.test:1234").refused()
        assert not plain.requests
        Exchange(svc, "over.test:1234").granted()
        # the homeserver vouches for its own name and for the name dialled: neither is the name asked
        for sub in ("@alice:over.test", f"@alice:{plain.netloc}", "@alice:127.0.0.1"):
            plain.tokens["t"] = sub
            Exchange(svc, "over.test:1234", token="t").refused("sub")


# ---- every address in turn ---------------------------------------------------------------------------

REFUSES, HOLE, HOLE_2, HOLE_3, WORKS = V4[23], V4[24], V4[25], V4[26], V4[27]
LISTS = {
    # id: A records in order, AAAA records, works?
    "one": ([WORKS], [], True),
    "refuses-first": ([REFUSES, WORKS], [], True),
    "refuses-last": ([WORKS, REFUSES], [], True),
    "black-hole-first": ([HOLE, WORKS], [], True),
    "three-black-holes": ([HOLE, HOLE_2, HOLE_3, WORKS], [], True),
    "hole-and-refusal": ([HOLE, REFUSES, WORKS], [], True),
    "aaaa-refuses": ([WORKS], [V6[23]], True),
    "aaaa-black-hole": ([WORKS], [V6[24]], True),
    "a-refuses-aaaa-works": ([REFUSES], [V6[27]], True),
    "a-black-hole-aaaa-works": ([HOLE], [V6[27]], True),
    "aaaa-only": ([], [V6[27]], True),
    "tls-fails-first": ([V4[28], WORKS], [], True),
    "only-refusals": ([REFUSES], [V6[23]], False),
    "only-black-holes": ([HOLE, HOLE_2], [V6[24]], False),
}


@pytest.fixture(scope="module")
def many():
    holes = [BlackHole(a, 8448) for a in (HOLE, HOLE_2, HOLE_3, V6[24])]
    works = Homeserver([(WORKS, 8448), (V6[27], 8448)], tls={"*.many.test": pki().leaf(["*.many.test"])}, sub=by_token)
    wrong = Homeserver([(V4[28], 8448)], tls=pki().leaf(["wrong.test"]))
    with works, wrong, Dns() as dns:
        yield works, dns
    for h in holes:
        h.stop()


@pytest.mark.parametrize("row", LISTS.values(), ids=LISTS)
def test_addresses_are_tried_in_turn(row, stand_in, many):
    """The look-up may take 4 s in all: a black hole must not use up its 5 s of connect time alone."""
    a, aaaa, works = row
    hs, dns = many
    hs.forget()
    server = fresh("many.test") + ":8448"
    name = server.partition(":")[0]
    dns.add("\n".join([f"{name}. A {x}" for x in a] + [f"{name}. AAAA {x}" for x in aaaa]))
    with lkjwt(dns, LKJWT_LOOKUP_TIMEOUT_S="4") as svc:
        e = Exchange(svc, server)
        if works:
            e.granted()
            assert len(hs.asked()) == 1
        else:
            line = e.refused("connect")
            assert any(x in line["addr"] for x in a + aaaa)


def test_black_holes_on_the_way(stand_in, many):
    """Port 443 that swallows connections leads to step 4, an SRV target that does to the next target, a peer
    that accepts but never says a word of TLS to the next address."""
    hs, dns = many
    hs.forget()
    wall, dead, mute = fresh("many.test"), fresh("many.test"), fresh("many.test")
    dns.add(f"{wall}. A {V4[30]}\n_matrix-fed._tcp.{wall}. SRV 1 1 8448 works.many.test.\nworks.many.test. A {WORKS}\n"
            f"{dead}. A {V4[31]}\n_matrix-fed._tcp.{dead}. SRV 1 1 8448 hole.many.test.\nhole.many.test. A {HOLE}\n"
            f"_matrix-fed._tcp.{dead}. SRV 2 1 8448 works.many.test.\n"
            f"{mute}. A {V4[32]}\n{mute}. A {WORKS}\n")

    def swallow(conn, number):
        while conn.recv(65536):
            pass
    with BlackHole(V4[30], 443), RawServer(swallow, V4[32], 8448), lkjwt(dns) as svc:
        assert [e.reply.status for e in at_once(svc, [wall, dead, f"{mute}:8448"])] == [200, 200, 200]
        assert {r.host for r in hs.asked()} == {wall, dead, f"{mute}:8448"}


def test_srv_target_with_a_wrong_certificate_leads_to_the_next(stand_in, many):
    hs, dns = many
    hs.forget()
    name = fresh("many.test")
    dns.add(f"{name}. A {V4[31]}\n_matrix._tcp.{name}. SRV 1 1 8448 wrong.many.test.\nwrong.many.test. A {V4[28]}\n"
            f"_matrix._tcp.{name}. SRV 2 1 8448 works.many.test.\nworks.many.test. A {WORKS}\n")
    with lkjwt(dns) as svc:
        Exchange(svc, name).granted()
        assert hs.asked()[0].sni == name


# ---- the server name grammar -------------------------------------------------------------------------

BAD_NAMES = [
    "a_b.test", "münchen.test", "a b.test", " a.test", "a.test ", "a.test\t", "a.test\r\nHost: b", "a.test\0", "\0",
    "a.test:", "a.test:0", "a.test:00000", "a.test:65536", "a.test:99999", "a.test:123456", "a.test:-1", "a.test:+1",
    "a.test:1a", "a.test: 1", "a.test:1:2", "::1", "2a01:4f8::1", "[::1", "::1]", "[]", "[]:1", "[:]", "[::1]x", "[::1]:",
    "[::1]:0", "[::1]8448", "[::g]", "[::1%lo]", "[::1%25lo]", "[1.2.3.4]", "[" + "0:" * 22 + "00]", "https://a.test", "a.test/",
    "a.test/x", "a.test?x", "a.test#x", "u@a.test", "u:p@a.test", "a" * 256, "a." * 127 + "ab", ":8448", "*", "*.test",
    "a.test,b.test", "a\\b.test", "a'b.test", 'a"b.test', "a%2e.test", "a.test\u2028", "\u202ea.test", "a\u3002test",
    "a.test:８４４８",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=[ascii(n)[:40] for n in BAD_NAMES])
def test_bad_names_are_refused_without_any_network_call(name, one_stranger):
    svc, dns, listener = one_stranger
    Exchange(svc, name).refused()
    assert not dns.queries and listener.connections == 0


@pytest.fixture(scope="module")
def one_stranger(stand_in):
    """A service with everything allowed, watched: a nameserver, and a listener at loopback's 8448 and 443."""
    with Dns() as dns, Homeserver([("127.0.0.1", 8448), ("::1", 8448)]) as hs, \
            lkjwt(dns, LKJWT_ALLOW_NETWORKS="127.0.0.0/8,::1/128") as svc:
        yield svc, dns, hs
        # the fixture is alive: a good name does reach both
        dns.add("alive.test. A 127.0.0.1\n")
        Exchange(svc, "alive.test:8448").refused("tls")
        assert dns.queries and hs.connections


# ---- allow and block lists -----------------------------------------------------------------------------

ALLOWED = "a.w.test, *.good.w.test"
LIST_ROWS = {
    # id: (allowed, blocked, server, served?)
    "allowed-name": (ALLOWED, "", "a.w.test", True),
    "allowed-suffix": (ALLOWED, "", "x.good.w.test", True),
    "allowed-suffix-deep": (ALLOWED, "", "y.x.good.w.test", True),
    "not-listed": (ALLOWED, "", "b.w.test", False),
    "suffix-needs-its-dot": (ALLOWED, "", "xgood.w.test", False),
    "name-is-not-a-suffix": (ALLOWED, "", "x.a.w.test", False),
    "literal-not-listed": (ALLOWED, "", V4[11], False),
    "literal-listed": (V4[11], "", V4[11], True),
    "blocked-name": ("", "a.w.test", "a.w.test", False),
    "blocked-suffix": ("", "*.bad.w.test", "x.bad.w.test", False),
    "not-blocked": ("", "a.w.test,*.bad.w.test", "b.w.test", True),
    "blocked-wins": ("*.w.test", "a.w.test", "a.w.test", False),
    "blocked-wins-suffix": ("a.bad.w.test", "*.bad.w.test", "a.bad.w.test", False),
    "blanks-split": ("a.w.test b.w.test", "", "b.w.test", True),
}


@pytest.mark.parametrize("row", LIST_ROWS.values(), ids=LIST_ROWS)
def test_allow_and_block_lists(row, hs):
    allowed, blocked, server, served = row
    with Dns(f"{server}. A {WEB}\n" if not server[0].isdigit() else "") as dns, \
            lkjwt(dns, LKJWT_ALLOWED_HOMESERVERS=allowed or None, LKJWT_BLOCKED_HOMESERVERS=blocked or None) as svc:
        e = Exchange(svc, server)
        if served:
            e.granted()
        else:
            e.refused(event="SERVER_DENIED")
            assert not dns.queries and not hs.connections
