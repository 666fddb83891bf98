"""What `lkjwt --check` says in each situation that the guide speaks of: real
runs against stand-ins, under the guide's names and addresses."""
import contextlib
import ssl
from types import SimpleNamespace

from outbound import PUB, outbound_env, pki, pub
from peers import Dns, Homeserver, Reply, SUB_PATH, Sfu, free_port
from service import CANARY_KEY, CANARY_SECRET, run_cli

HOME, DEAD = PUB % 80, PUB % 81
ZONE = f"""
example.org. A {HOME}
matrix.example.org. A {HOME}
down.example.org. A {DEAD}
home.example.net. A 192.168.1.20
guest.example.com. A {HOME}
matrix-rtc.example.org. A {HOME}
"""
CLIENT, RTC = "/.well-known/matrix/client", "https://matrix-rtc.example.org/livekit/jwt"
SFU_URL = "http://livekit:7880"


@contextlib.contextmanager
def world():
    pub(80, 81)
    good = pki().leaf(["example.org", "matrix.example.org", "guest.example.com", "closed.example.org",
                       "matrix-rtc.example.org"])
    home = Homeserver([(HOME, 443), (HOME, 8448)], tls=good)
    home.well_known = lambda r: "matrix.example.org:8448" if r.host == "example.org" else None
    wrong = Homeserver([(HOME, 8449)], tls=pki().leaf(["other.example.org"]))
    modern = Homeserver([(HOME, 8450)], tls=good, min_version=ssl.TLSVersion.TLSv1_3)
    closed = Homeserver([(HOME, 8451)], tls=good)
    closed.on(SUB_PATH, Reply(404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"}))
    sfu, other = Sfu(CANARY_KEY, CANARY_SECRET), Sfu(CANARY_KEY, "the-sfu-has-another-secret-than-lkjwt")
    with home, wrong, modern, closed, sfu, other, Dns(ZONE) as dns:
        yield SimpleNamespace(dns=dns, sfu=sfu, other=other, home=home)


def led(url=RTC, **entry):
    """What clients are told; the rest of it is as the guide has it."""
    return {"m.homeserver": {"base_url": "https://matrix.example.org"},
            "org.matrix.msc4143.rtc_foci": [{"type": "livekit", "livekit_service_url": url, **entry}]}


OURS = Reply(400, {"errcode": "M_NOT_JSON", "error": "Request is not valid JSON"})     # an empty body is

# name: server asked for, changes of the environment; clients: what they are told, what is there
CASES = {
    "all is well": ("example.org", {}),
    "restricted": ("guest.example.com", {}),
    "no address": ("nowhere.example.org", {}),
    "nobody listens": ("down.example.org", {}),
    "private address": ("home.example.net", {}),
    "wrong certificate": ("matrix.example.org:8449", {}),
    "own CA": ("matrix.example.org:8448", {"LKJWT_CA_FILE": None, "LKJWT_CA_ONLY": None}),
    "TLS 1.3 only": ("matrix.example.org:8450", {}),
    "no openid listener": ("matrix.example.org:8451", {}),
    "blocked": ("example.org", {"LKJWT_BLOCKED_HOMESERVERS": "example.org"}),
    "clients are not told": ("example.org", {"clients": (Reply(404, "none here"), OURS)}),
    "clients are told no calls": ("example.org", {"clients": ({"m.homeserver": led()["m.homeserver"]}, OURS)}),
    "clients are told no LiveKit": ("example.org", {"clients": (led(type="mesh"), OURS)}),
    "clients are told the SFU": ("example.org", {"clients": (led("wss://matrix-rtc.example.org/livekit/sfu"), OURS)}),
    "404 behind a proxy": ("example.org", {"clients": (led(), Reply(404, ""))}),
    "a proxy without lkjwt": ("example.org", {"clients": (led(), Reply(502, "<html>"))}),
    "a proxy that redirects": ("example.org", {"clients": (led(), Reply(308, "", [("Location", RTC)]))}),
    "SFU has another key": ("", {"sfu": "other"}),
    "SFU is down": ("", {"sfu": "down"}),
    "SFU path is wrong": ("", {"sfu": "path"}),
    "Redis is down": ("", {"redis": "down"}),
}


def check(world, server, changes):
    """The lines as an operator would see them: the guide's names for ports and addresses of the test."""
    changes = dict(changes)
    where = {"other": world.other.url, "down": f"http://127.0.0.1:{free_port()}",
             "path": world.sfu.url + "/elsewhere"}.get(changes.pop("sfu", None), world.sfu.url)
    redis = f"127.0.0.1:{free_port()}"
    told, there = changes.pop("clients", (led(), OURS))
    world.home.on(CLIENT, told if isinstance(told, Reply) else Reply(200, told))
    world.home.on("/livekit/jwt/get_token", there)
    if changes.pop("redis", None):
        changes["LIVEKIT_REDIS_URL"] = f"redis://{redis}"
    env = outbound_env(world.dns, world.sfu, LKJWT_LIVEKIT_API_URL=where, LIVEKIT_URL="wss://matrix-rtc.example.org",
                       LIVEKIT_FULL_ACCESS_HOMESERVERS="example.org,matrix.example.org", LIVEKIT_LOG_LEVEL="info",
                       **changes)
    done = run_cli(["--check", *filter(None, [server])], env, timeout=60)
    text = done.out
    for real, shown in ((where.removesuffix("/elsewhere"), SFU_URL), (where.split("/")[2], "10.0.0.5:7880"),
                        (redis, "10.0.0.6:6379"), (HOME, "203.0.113.10"), (DEAD, "203.0.113.11")):
        text = text.replace(real, shown)
    return done.code, [line.rstrip() for line in text.splitlines()]


if __name__ == "__main__":
    with world() as w:
        for name, (server, changes) in CASES.items():
            code, lines = check(w, server, changes)
            print(f"== {name}: --check {server}: {code}", *lines, sep="\n")
