"""What the outbound suites share: one exchange through lkjwt, judged from all sides.

The suites run in a network namespace of their own, so public addresses can stand on the loopback
device: the address policy is in force with nothing switched off.
"""
import base64
import functools
import itertools
import tempfile

import jwt as pyjwt

from peers import Pki, SCRATCH, add_addr, wait_for
from service import CANARY_KEY, CANARY_SECRET, CANARY_TOKEN, Service, base_env

PUB = "51.15.0.%d"              # public unicast, on lo
PUB6 = "2a01:4f8::%d"
FULL = "full.test"              # the one server with full access
DEVICE = "DEV"
_fresh = itertools.count(1)
_reference = {}                 # the one refusal all refusals must equal


def pub(*numbers):
    """Public IPv4 and IPv6 addresses of these numbers, on lo."""
    add_addr(*[PUB % n for n in numbers], *[PUB6 % n for n in numbers])
    return PUB % numbers[0]


@functools.cache
def pki():
    """The CA of the session (P-256)."""
    return Pki()


@functools.cache
def empty_file():
    return tempfile.NamedTemporaryFile(prefix="lkjwt-empty-", dir=SCRATCH, delete=False).name


def text_file(text, suffix=".txt"):
    with tempfile.NamedTemporaryFile("wb", prefix="lkjwt-", dir=SCRATCH, suffix=suffix, delete=False) as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    return f.name


def outbound_env(dns=None, sfu=None, ca=None, **over):
    """Environment of an lkjwt that uses our resolver, our CA and our SFU only. dns: something with
    .netloc, or the value of LKJWT_RESOLVER; None: a nameserver where nobody is."""
    env = {
        "LIVEKIT_URL": f"ws://{sfu.netloc}" if sfu else "ws://127.0.0.1:9",
        "LIVEKIT_FULL_ACCESS_HOMESERVERS": FULL,
        "LIVEKIT_LOG_LEVEL": "debug",
        "LKJWT_RESOLVER": getattr(dns, "netloc", dns) or "127.0.0.1:9",
        "LKJWT_HOSTS_FILE": empty_file(),
        "LKJWT_CA_FILE": ca or pki().ca_file,
        "LKJWT_CA_ONLY": "true",
    }
    env.update(over)
    return base_env(**env)


def lkjwt(dns=None, sfu=None, **over):
    return Service(outbound_env(dns, sfu, **over))


def fresh(domain="w.test"):
    """A server name not used before: what the service remembers of others does not matter."""
    return f"n{next(_fresh)}.{domain}"


def token_for(server, user="alice"):
    """An OpenID token that by_token() understands; it holds the canary and bytes that need encoding."""
    return f"{CANARY_TOKEN}.{user}.{server}"


def by_token(req):
    """Homeserver.sub: the user whom token_for() made the token for."""
    token = req.query["access_token"]
    assert token.startswith(CANARY_TOKEN + "."), token
    user, _, server = token[len(CANARY_TOKEN) + 1:].partition(".")
    return f"@{user}:{server}"


class Exchange:
    """One POST for a token and what came of it."""

    def __init__(self, svc, server, path="/sfu/get", token=None, timeout=60, body=None):
        self.svc, self.server, self.mark = svc, server, len(svc.log())
        openid = {"access_token": token or token_for(server), "matrix_server_name": server,
                  "token_type": "Bearer", "expires_in": 3600}
        if body is None:
            body = {"room": "!room:full.test", "device_id": DEVICE}
        self.reply = svc.post(path, {**body, "openid_token": openid}, timeout=timeout)

    def lines(self):
        return self.svc.log()[self.mark:]

    def line(self, **match):
        """The first log line of this exchange with these values (a value may be a set of values)."""
        def find():
            for e in self.lines():
                if all(e.get(k) in v if isinstance(v, (set, frozenset, tuple, list)) else e.get(k) == v
                       for k, v in match.items()):
                    return e
            return None
        try:
            return wait_for(f"a log line {match}", find)
        except TimeoutError:
            raise AssertionError(f"no log line {match} of {self.server}: {self.reply}\n"
                                 + "\n".join(map(str, self.lines()))) from None

    def granted(self):
        """Assert a token for alice of this server; its claims."""
        assert self.reply.status == 200, f"{self.server}: {self.reply}\n" + "\n".join(map(str, self.lines()))
        claims = pyjwt.decode(self.reply.json["jwt"], CANARY_SECRET, algorithms=["HS256"], issuer=CANARY_KEY)
        if claims["sub"].startswith("@"):
            assert claims["sub"] == f"@alice:{self.server}:{DEVICE}"
        assert claims["video"]["canPublish"] is (self.server == FULL)
        return claims

    def refused(self, step=None, **match):
        """Assert the one 401 (S24: all of them byte-equal), and the log line that names the step."""
        r = self.reply
        assert r.status == 401, f"{self.server}: {r}\n" + "\n".join(map(str, self.lines()))
        assert r.json == {"errcode": "M_UNAUTHORIZED", "error": "The request could not be authorised."}
        what = (r.status, r.reason, r.body, [(k, v) for k, v in r.raw_headers
                                             if k.lower() not in ("date", "x-request-id")])
        assert what == _reference.setdefault("refusal", what)
        if step is None and not match:
            return None
        if step is not None:
            match["step"] = step
        # by request id: a line of the exchange before may come through the pipe late
        line = self.line(server=self.server, req=r.header("X-Request-Id"), **match)
        assert line["msg"], line
        return line


def claims_of(token):
    """Header text and payload text of a JWT, undecoded JSON."""
    head, body, _ = token.split(".")
    return tuple(base64.urlsafe_b64decode(p + "=" * (-len(p) % 4)).decode() for p in (head, body))


