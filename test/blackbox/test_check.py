"""lkjwt --check [SERVER_NAME]: one line a step, the failing step named, the exit code (DESIGN.md 4.3, 4.11)."""
import re
import ssl

import pytest

from outbound import outbound_env, pki, pub, PUB
from peers import Dns, Homeserver, RawServer, Reply, SUB_PATH, Sfu, free_port
from service import CANARY_KEY, CANARY_SECRET, run_cli

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
"""


@pytest.fixture(scope="module")
def world():
    pub(70, 71, 72)
    certs = {n: pki().leaf([n]) for n in ("good.test", "plain.test", "deleg.test", "srv.test", "html.test", "oops.test")}
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
