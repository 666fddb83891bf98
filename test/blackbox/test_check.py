"""lkjwt --check [SERVER_NAME]: one line a step, the failing step named, the exit code (DESIGN.md 4.3, 4.11)."""
import re
import ssl

import pytest

from outbound import outbound_env, pki, pub, PUB
from peers import Dns, Homeserver, HttpServer, RawServer, Reply, SUB_PATH, Sfu, free_port
from service import CANARY_KEY, CANARY_SECRET, Service, base_env, run_cli

WEB, PORT_SERVER, NOBODY = PUB % 70, PUB % 71, PUB % 72
ZONE = f"""
good.test. A {WEB}
plain.test. A {PORT_SERVER}
deleg.test. A {WEB}
srv.test. A {WEB}
_matrix-fed._tcp.srv.test. SRV 1 1 8450 target.test.
target.test. A {PORT_SERVER}
wrong.test. A {PORT_SERVER}
html.test. A {PORT_SERVER}
nobody.test. A {NOBODY}
private.test. A 10.0.0.1
oops.test. A {PORT_SERVER}
calls.test. A {WEB}
rtc.test. A {PORT_SERVER}
"""


@pytest.fixture(scope="module")
def world():
    pub(70, 71, 72)
    certs = {n: pki().leaf([n]) for n in ("good.test", "plain.test", "deleg.test", "srv.test", "html.test", "oops.test",
                                           "calls.test")}
    certs[None] = pki().leaf(["other.test"], ips=[WEB, PORT_SERVER])
    hs = Homeserver([(WEB, 443), (WEB, 8448), (PORT_SERVER, 8448), (PORT_SERVER, 8450)], tls=certs)
    hs.well_known = lambda r: "plain.test:8448" if r.host == "deleg.test" else None

    def userinfo(req):
        if (req.host or "").startswith("html.test"):
            return Reply(200, "<html>hello</html>", ctype="text/html")
        if (req.host or "").startswith("oops.test"):
            return Reply(404, {"errcode": "M_UNRECOGNIZED", "error": "federation is off"})
        return None                     # 401 M_UNKNOWN_TOKEN: what a homeserver says of a token it never made
    hs.on(SUB_PATH, userinfo)
    with hs, Sfu(CANARY_KEY, CANARY_SECRET) as sfu, Dns(ZONE) as dns:
        yield hs, sfu, dns


def check(world, *args, **over):
    hs, sfu, dns = world
    hs.forget()
    r = run_cli(["--check", *args], outbound_env(dns, sfu, **over), timeout=60)
    assert CANARY_SECRET not in r.text
    return r


def steps(r):
    """[(ok or no, step, text)], one for each line but the verdict at the end."""
    lines = [line for line in r.out.splitlines() if line.strip()]
    parsed = [re.fullmatch(r"(ok|no)\s+([a-z-]+)\s+(\S.*)", line) for line in lines[:-1]]
    assert lines and all(parsed), r
    assert lines[-1] == ("all is well" if r.code == 0 else "there are faults"), r
    return [p.groups() for p in parsed]


BEFORE = ["config", "anchors", "sfu", "name"]
GOOD = {
    # server name, the steps behind BEFORE, what their lines must hold
    "well-known-404": ("good.test", ["well-known", "srv", "srv", "connect", "tls", "userinfo"],
                       {"connect": f"{WEB}:8448", "tls": "good.test", "well-known": f"{WEB}:443"}),
    "port": ("plain.test:8448", ["connect", "tls", "userinfo"], {"connect": f"{PORT_SERVER}:8448", "tls": "plain.test"}),
    "delegated": ("deleg.test", ["well-known", "connect", "tls", "userinfo"],
                  {"well-known": "plain.test:8448", "connect": f"{PORT_SERVER}:8448", "tls": "plain.test"}),
    "srv": ("srv.test", ["well-known", "srv", "connect", "tls", "userinfo"],
            {"srv": "_matrix-fed._tcp.srv.test", "connect": f"{PORT_SERVER}:8450", "tls": "srv.test"}),
    "ip": (PORT_SERVER, ["connect", "tls", "userinfo"], {"connect": f"{PORT_SERVER}:8448"}),
}


@pytest.mark.parametrize("server, names, texts", GOOD.values(), ids=GOOD)
def test_good_server(server, names, texts, world):
    """A homeserver that answers 401 M_UNKNOWN_TOKEN to a made-up token is reached, verified and speaking Matrix."""
    r = check(world, server)
    assert r.code == 0, r
    got = steps(r)
    assert [name for _, name, _ in got] == BEFORE + names, r
    for step, text in texts.items():
        assert text in next(t for _, name, t in got if name == step), r
    # the one thing that may be missing is a well-known
    assert [name for verdict, name, _ in got if verdict == "no"] == ["well-known"] * ("srv" in names), r
    asked, = world[0].asked()
    assert asked.host == {"deleg.test": "plain.test:8448"}.get(server, server)


BAD = {
    # server name, environment, the step, words the text must have
    "bad-name": ("bad_name.test", {}, "name", []),
    "blocked": ("good.test", {"LKJWT_BLOCKED_HOMESERVERS": "good.test"}, "name", []),
    "no-such-name": ("nowhere.test", {}, "address", []),
    "dns-down": ("good.test", {"LKJWT_RESOLVER": "127.0.0.1:9"}, "address", []),
    "nobody-listens": ("nobody.test", {}, "connect", [f"{NOBODY}:8448"]),
    "private": ("private.test", {}, "connect", ["10.0.0.1", "LKJWT_ALLOW_NETWORKS"]),
    "wrong-certificate": ("wrong.test:8448", {}, "tls", [f"{PORT_SERVER}:8448"]),
    "unknown-ca": ("plain.test:8448", {"LKJWT_CA_FILE": None, "LKJWT_CA_ONLY": None}, "tls", [f"{PORT_SERVER}:8448"]),
    "not-matrix": ("html.test:8448", {}, "http", [f"{PORT_SERVER}:8448"]),
    "federation-off": ("oops.test:8448", {}, "http", ["federation", "listener"]),
}


@pytest.mark.parametrize("server, env, step, words", BAD.values(), ids=BAD)
def test_broken_server(server, env, step, words, world):
    r = check(world, server, **env)
    assert r.code == 1, r
    failed = [(name, text) for verdict, name, text in steps(r) if verdict == "no" and name not in ("well-known", "srv")]
    assert [name for name, _ in failed] == [step], r
    for w in words:
        assert w in failed[0][1], (w, r)


def test_tls_1_3_only_is_named(world):
    with Homeserver([(PORT_SERVER, 0)], tls=pki().leaf(["plain.test"]), min_version=ssl.TLSVersion.TLSv1_3) as hs:
        r = check(world, f"plain.test:{hs.port}")
    assert r.code == 1 and "tls" in r.out and "1.2" in r.text and "LKJWT_FEDERATION_API_URL_OVERRIDES" in r.text


def test_override_is_used_and_named(world):
    with Homeserver() as plain:
        r = check(world, "over.test", LKJWT_FEDERATION_API_URL_OVERRIDES=f"over.test={plain.url}")
        assert r.code == 0 and plain.url in r.out and len(plain.asked()) == 1


def test_silent_server_ends(world):
    with RawServer(lambda conn, n: conn.recv(1) and conn.recv(9999), PORT_SERVER) as raw:
        r = check(world, f"plain.test:{raw.port}", LKJWT_LOOKUP_TIMEOUT_S="1")
        assert r.code == 1 and re.search(r"\btls\b", r.out)


# ---- without a server name: configuration and SFU ---------------------------------------------------------

def test_configuration_and_sfu(world):
    r = check(world)
    assert r.code == 0, r
    assert any("sfu" in line.lower() for line in r.out.splitlines())
    assert not world[0].requests


@pytest.mark.parametrize("url", [lambda: f"ws://127.0.0.1:{free_port()}", lambda: "ws://nowhere.test:7880"],
                         ids=["refused", "no-such-name"])
def test_sfu_unreachable(url, world):
    r = check(world, LIVEKIT_URL=url())
    assert r.code == 1 and any("sfu" in line.lower() for line in r.out.splitlines()), r


def test_sfu_with_another_secret(world):
    with Sfu(CANARY_KEY, "some-other-secret-of-sufficient-length") as sfu:
        r = check(world, LIVEKIT_URL=f"ws://{sfu.netloc}")
        assert r.code == 1 and re.search(r"sfu", r.out, re.I), r


def test_configuration_errors(world):
    r = check(world, LIVEKIT_KEY=None, LKJWT_TOKEN_TTL_S="1")
    assert r.code == 1 and "LIVEKIT_KEY" in r.text and "LKJWT_TOKEN_TTL_S" in r.text


def test_a_good_server_with_a_dead_sfu_fails_but_shows_both(world):
    r = check(world, "good.test", LIVEKIT_URL=f"ws://127.0.0.1:{free_port()}")
    assert r.code == 1 and f"{WEB}:8448" in r.out, r


def test_nothing_is_left_on_the_sfu(world):
    """The check creates no room that stays: at most calls that change nothing."""
    _, sfu, _ = world
    sfu.forget()
    check(world)
    assert not sfu.rooms


# ---- where clients look for calls (MSC4143): the line `focus` of a server that was named ------------------

CLIENT, FOCI, RTC = "/.well-known/matrix/client", "org.matrix.msc4143.rtc_foci", "https://rtc.test/livekit/jwt"


def foci(url=RTC, **more):
    return {"m.homeserver": {"base_url": "https://calls.test"}, FOCI: [{"type": "livekit", "livekit_service_url": url}], **more}


def led(**changes):
    """A list whose only entry differs."""
    entry = {"type": "livekit", "livekit_service_url": RTC, **changes}
    return {FOCI: [{k: v for k, v in entry.items() if v is not None}]}


class Front(HttpServer):
    """A proxy before a running lkjwt. strips: a prefix; or a Reply that it gives itself."""

    def __init__(self, svc):
        self.svc, self.strips = svc, "/livekit/jwt"
        super().__init__([(PORT_SERVER, 443), (PORT_SERVER, 8443)], pki().leaf(["rtc.test"]))

    def answer(self, req):
        if isinstance(self.strips, Reply):
            return self.strips
        r = self.svc.request(req.method, req.target.removeprefix(self.strips), req.body)
        return Reply(r.status, r.body, ctype=r.header("content-type"))


@pytest.fixture(scope="module")
def front(world):
    with Service(base_env()) as svc, Front(svc) as front:
        yield front


def focus(world, front, well_known, strips="/livekit/jwt", **over):
    """The result, and the verdict and text of its line."""
    front.forget()
    front.strips = strips
    world[0].on(CLIENT, well_known if isinstance(well_known, Reply) else Reply(200, well_known))
    try:
        r = check(world, "calls.test", LIVEKIT_FULL_ACCESS_HOMESERVERS="other.test,calls.test", **over)
        got = steps(r)
        assert [name for _, name, _ in got[-2:]] == ["userinfo", "focus"] and [x for x in got if x[0] == "no"
            and x[1] not in ("well-known", "srv")] == ([] if r.code == 0 else got[-1:]), r
        first = world[0].seen(CLIENT)[0]
        assert (first.method, first.host, first.body) == ("GET", "calls.test", b"")
        for req in front.requests:
            assert (req.method, req.body) == ("POST", b"") and not {"authorization", "cookie"} & dict(req.headers).keys()
        return r, got[-1][0], got[-1][2]
    finally:
        world[0].off(CLIENT)


FOUND = {  # the well-known, the path asked for, the URL shown
    "as the guide has it": (foci(), "/livekit/jwt/get_token", RTC),
    "any content type": (Reply(200, str(foci()).replace("'", '"'), ctype="application/octet-stream"),
                         "/livekit/jwt/get_token", RTC),
    "escaped": (Reply(200, '{"\\u006frg.matrix.msc4143.rtc_foci" : [ {"type":"\\u006civekit",'
                           '"livekit_service_url":"https:\\/\\/rtc.test\\/livekit\\/jwt"} ] }'), "/livekit/jwt/get_token", RTC),
    "others first": ({FOCI: [{"type": "full_mesh"}, {"livekit_service_url": "https://a.test"}, None,
                             {"type": "livekit", "livekit_service_url": RTC, "x": [{}]},
                             {"type": "livekit", "livekit_service_url": "https://b.test"}], "a": [1, {"b": None}]},
                     "/livekit/jwt/get_token", RTC),
    "a slash at the end": (foci(RTC + "/"), "/livekit/jwt//get_token", RTC + "/"),
    "a port": (foci("https://rtc.test:8443/livekit/jwt"), "/livekit/jwt/get_token", "https://rtc.test:8443/livekit/jwt"),
    "a name alone": (foci("https://rtc.test"), "/get_token", "https://rtc.test"),
    "capitals": (foci("HTTPS://RTC.test/livekit/jwt"), "/livekit/jwt/get_token", "https://RTC.test/livekit/jwt"),
}


@pytest.mark.parametrize("well_known, path, shown", FOUND.values(), ids=FOUND)
def test_focus_is_found(well_known, path, shown, world, front):
    """One request there, as the first step of a client: without a user, a room or a token."""
    r, verdict, text = focus(world, front, well_known)
    assert (r.code, verdict, text) == (0, "ok", f"{shown}: answers"), r
    assert [req.path for req in front.requests] == [path]
    assert front.requests[0].host == shown.split("/")[2]
    assert not front.svc.events("GRANTED") and not front.svc.events("LOOKUP_STEP")


LOST = {  # the well-known, what the proxy does, words that the line must have
    "missing": (Reply(404, "nothing"), [CLIENT, "answers 404"]),
    "error": (Reply(500, ""), [CLIENT, "answers 500"]),
    "a page": (Reply(200, "<html>hello</html>"), [CLIENT, "not JSON"]),
    "a list": (Reply(200, [foci()]), ["not JSON"]),
    "cut": (Reply(200, '{"org.matrix.msc4143.rtc_foci": [{"type": "livekit"'), ["not JSON"]),
    "and more": (Reply(200, "{} {}"), ["not JSON"]),
    "twice": (Reply(200, '{"a": 1, "a": 2}'), ["not JSON"]),
    "no foci": ({"m.homeserver": {"base_url": "https://calls.test"}}, [CLIENT, f"has no {FOCI}"]),
    "foci is no list": ({FOCI: {"type": "livekit", "livekit_service_url": RTC}}, ["not JSON as clients expect"]),
    "an empty list": ({FOCI: []}, [f"{FOCI} has no entry of type livekit"]),
    "another type": (led(type="full_mesh"), ["no entry of type livekit"]),
    "no type": (led(type=None), ["no entry of type livekit"]),
    "no URL": (led(livekit_service_url=None), ["livekit_service_url"]),
    "a number": (led(livekit_service_url=1), ["not JSON as clients expect"]),
    **{f"URL {url!r}"[:40]: (foci(url), ["livekit_service_url is not a plain https:// URL"]) for url in (
        "http://rtc.test/livekit/jwt", "wss://rtc.test/livekit/sfu", "rtc.test/livekit/jwt", "/livekit/jwt",
        "https://user@rtc.test/", "https://rtc.test/?a=b", "https://rtc.test/#a", "https://", "https://rtc.test:0x1/",
        "https://rtc.test/\x1b[31m", "https://rtc.test/ a", "https://rtc.t\u00e4st/", "https://rtc.test/" + "a" * 1100)},
    "no address": (foci("https://nowhere.test"), ["https://nowhere.test: address: name has no address"]),
    "nobody": (foci("https://nobody.test/x"), ["https://nobody.test/x: connect: cannot connect"]),
    "certificate": (foci("https://wrong.test:8448"), ["https://wrong.test:8448: tls: certificate is not for this name"]),
    "a homeserver": (foci("https://good.test"), ["https://good.test: answers 404 to /get_token: the proxy leads it elsewhere"]),
    "never": (foci("https://0.0.0.0/"), ["connect: address not allowed"]),
    "redirect to http": (Reply(302, "", [("Location", "http://calls.test/x")]), [CLIENT, "redirect refused"]),
    "redirects": (Reply(307, "", [("Location", CLIENT)]), [CLIENT, "redirect refused"]),
}


@pytest.mark.parametrize("well_known, words", LOST.values(), ids=LOST)
def test_focus_is_not_found(well_known, words, world, front):
    r, verdict, text = focus(world, front, well_known)
    assert (r.code, verdict) == (1, "no"), r
    assert all(w in text for w in words), (words, text)
    assert not front.requests and "\x1b" not in r.text


def html(status, **more):
    return Reply(status, "<html>x</html>", ctype="text/html", **more)


BLOCKED = {  # the URL, what the proxy does, words
    "the prefix stays": (RTC, "/else", ["answers 404 to /get_token", "LKJWT_PATH_PREFIX=/livekit/jwt"]),
    "elsewhere": (RTC, html(404), ["answers 404 to /get_token", "the proxy leads it elsewhere, or leaves"]),
    "no prefix": ("https://rtc.test", html(404), ["answers 404 to /get_token: the proxy leads it elsewhere"]),
    "a homeserver": (RTC, Reply(404, {"errcode": "M_UNRECOGNIZED"}), ["answers 404 to /get_token: the proxy leads it elsewhere"]),
    "a redirect": (RTC, html(308, headers=[("Location", "https://rtc.test/x")]), ["answers 308", "browsers do not follow"]),
    "no service": (RTC, html(502), ["answers 502", "does not reach lkjwt"]),
    "a page": (RTC, html(200), ["answers 200", "not as lkjwt does"]),
    "a token": (RTC, Reply(200, {"url": "x", "jwt": "y"}), ["answers 200", "not as lkjwt does"]),
    "files only": (RTC, html(405), ["answers 405", "not as lkjwt does"]),
    "no end": (RTC, Reply(200, "x", hang=True, length=False), ["http: "]),
    "a long way": ("https://rtc.test/" + "a" * 900, "/else", ["answers 404", "LKJWT_PATH_PREFIX=/" + "a" * 99]),
}


@pytest.mark.parametrize("url, strips, words", BLOCKED.values(), ids=BLOCKED)
def test_focus_behind_a_broken_proxy(url, strips, words, world, front):
    r, verdict, text = focus(world, front, foci(url), strips)
    assert (r.code, verdict) == (1, "no"), r
    assert text.startswith(url[:100]) and all(w in text for w in words), (words, text)
    assert len(front.requests) == 1


def test_focus_redirects_are_followed(world, front):
    """Three of them, to https and other names."""
    world[0].on("/1", Reply(301, "", [("Location", "https://good.test/2")]))
    world[0].on("/2", Reply(303, "", [("Location", "//calls.test/3")]))
    world[0].on("/3", Reply(200, foci()))
    try:
        r, verdict, text = focus(world, front, Reply(308, "", [("Location", "/1")]))
        assert (r.code, verdict, text) == (0, "ok", f"{RTC}: answers"), r
        assert [(q.host, q.path) for q in world[0].requests if q.path in ("/1", "/2", "/3")] == [
            ("calls.test", "/1"), ("good.test", "/2"), ("calls.test", "/3")]
    finally:
        world[0].off("/1"), world[0].off("/2"), world[0].off("/3")


def test_focus_on_a_private_address(world, front):
    """The class of the server that names it: allowed for one that was named, unless the operator denies all."""
    r, verdict, text = focus(world, front, foci("https://10.0.0.1/"), LKJWT_PRIVATE_NETWORKS="deny")
    assert (r.code, verdict) == (1, "no"), r
    assert text == ("https://10.0.0.1/: connect: address not allowed for this server, range 10.0.0.0/8; "
                    "LKJWT_ALLOW_NETWORKS allows it")


@pytest.mark.parametrize("full", ["other.test", "*", "calls.test:8448"])
def test_no_focus_of_a_stranger(full, world, front):
    """Only of servers named word for word: where the clients of others go is not this operator's."""
    r = check(world, "calls.test", LIVEKIT_FULL_ACCESS_HOMESERVERS=full)
    assert r.code == 0 and "focus" not in [name for _, name, _ in steps(r)], r
    assert not world[0].seen(CLIENT)


def test_focus_of_a_server_that_is_down(world, front):
    r = check(world, "nobody.test", LIVEKIT_FULL_ACCESS_HOMESERVERS="nobody.test")
    failed = [(name, text) for verdict, name, text in steps(r) if verdict == "no" and name not in ("well-known", "srv")]
    assert r.code == 1 and [name for name, _ in failed] == ["connect", "focus"], r
    assert failed[1][1] == f"https://nobody.test{CLIENT}: connect: cannot connect"
