"""What an exchange must look like, computed here from the documents: bodies,
canonical JSON, aliases, identities, the join token; and the scene it plays in."""
import base64
import hashlib
import itertools
import json
import re
import time
from email.utils import parsedate_to_datetime

import jwt as pyjwt

from peers import Homeserver, Sfu
from service import CANARY_KEY, CANARY_SECRET, CANARY_TOKEN, Service, base_env

ENDPOINTS = ("/get_token", "/sfu/get")
CORS = {
    "Content-Type": "application/json",
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "POST",
    "Access-Control-Allow-Headers": "Accept, Content-Type, Content-Length, Accept-Encoding, X-CSRF-Token",
}
NOT_JSON = "Error reading request"
UNAUTHORIZED = "The request could not be authorised."
DELEGATION = "Delegation of delayed events is only supported for full access users"
NO_API = "Unable to resolve client-server API"
NO_ROOM = "Unable to create room on SFU"
SFU_URL = "wss://sfu.example.org/"


# ---- the formulas

_ESC = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def _quote(text, also=lambda c: False):
    out = []
    for c in text:
        if c in _ESC:
            out.append(_ESC[c])
        elif c < " " or also(c):
            units = c.encode("utf-16-be")
            out += [f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)]
        else:
            out.append(c)
    return '"' + "".join(out) + '"'


def canonical(strings):
    return "[" + ",".join(_quote(s) for s in strings) + "]"


def hashed(*strings):
    digest = hashlib.sha256(canonical(strings).encode()).digest()
    return base64.b64encode(digest).decode().rstrip("=")


def alias(room, slot="m.call#ROOM"):
    return hashed(room, slot)


def payload(identity, room, iat, ttl=3600, publish=True, metadata=True):
    """The exact bytes of a join token's payload."""
    q = lambda s: _quote(s, lambda c: c in ">?~\x7f" or c > "\x7f")
    video = f'"roomJoin":true,"room":{q(room)},"canPublish":{str(publish).lower()},"canSubscribe":true'
    if metadata:
        video += ',"canUpdateOwnMetadata":true'
    return (f'{{"iss":{q(CANARY_KEY)},"sub":{q(identity)},"exp":{iat + ttl},"nbf":{iat},"iat":{iat},'
            f'"identity":{q(identity)},"video":{{{video}}}}}').encode()


def check_token(token, identity, room, **form):
    """Assert every byte of a join token; its claims."""
    head, body, _ = token.split(".")
    raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    assert base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)) == b'{"alg":"HS256","typ":"JWT"}'
    iat = json.loads(raw)["iat"]
    assert raw == payload(identity, room, iat, **form)
    assert "-" not in body and "_" not in body and "=" not in token, "atob() of Element Call fails"
    assert abs(iat - time.time()) < 60
    return pyjwt.decode(token, CANARY_SECRET, algorithms=["HS256"], issuer=CANARY_KEY)


# ---- replies

ALLOWED = {"content-type", "access-control-allow-origin", "access-control-allow-methods",
           "access-control-allow-headers", "content-length", "date", "x-request-id", "connection",
           "allow", "retry-after", "x-content-type-options"}


def check_common(reply):
    """What every reply has, and that nothing unexpected is in it."""
    assert reply.version == b"1.1"
    assert set(reply.headers) <= ALLOWED, reply
    assert all(len(v) == 1 for v in reply.headers.values()), reply
    assert re.fullmatch(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT",
                        reply.header("Date")), reply
    assert abs(parsedate_to_datetime(reply.header("Date")).timestamp() - time.time()) < 60
    assert reply.header("Content-Length") is not None


def check_id(reply):
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", reply.header("X-Request-Id") or ""), reply


def check_cors(reply):
    check_common(reply)
    check_id(reply)
    for name, value in CORS.items():
        assert reply.header(name) == value, (name, reply)


def check_plain(reply):
    """A reply outside the JSON endpoints: no CORS."""
    check_common(reply)
    assert not [h for h in reply.headers if h.startswith("access-control")], reply


def check_error(reply, status, errcode, text=None):
    """A JSON refusal: status, errcode, exact text, key order, compactness, headers."""
    check_cors(reply)
    assert (reply.status, reply.errcode) == (status, errcode), reply
    obj = json.loads(reply.body, object_pairs_hook=list)
    assert [k for k, _ in obj][:2] == ["errcode", "error"], reply
    assert isinstance(reply.json["error"], str) and reply.json["error"]
    assert reply.body.rstrip(b"\n") == json.dumps(dict(obj), separators=(",", ":"), ensure_ascii=False).encode()
    if text is not None:
        assert reply.json["error"] == text


def check_granted(reply, url=SFU_URL):
    """200 with url and jwt in this order; the jwt."""
    check_cors(reply)
    assert reply.status == 200, reply
    assert re.fullmatch(rb'\{"url":"[^"\\]*","jwt":"[A-Za-z0-9_.-]+"\}\n?', reply.body), reply
    assert reply.json["url"] == url
    return reply.json["jwt"]


# ---- the scene: a homeserver with full access, one without, an SFU

_serial = itertools.count(1)


class Rig:
    def __init__(self, pki):
        self.pki = pki
        cert = pki.leaf(ips=["127.0.0.1"])
        self.full, self.other = Homeserver(tls=cert), Homeserver(tls=cert)
        self.sfu = Sfu(CANARY_KEY, CANARY_SECRET)

    def stop(self):
        for server in (self.full, self.other, self.sfu):
            server.stop()
            assert not getattr(server, "errors", None), server.errors

    def env(self, **overrides):
        env = dict(LIVEKIT_URL=SFU_URL, LIVEKIT_FULL_ACCESS_HOMESERVERS=self.full.netloc,
                   LKJWT_LIVEKIT_API_URL=self.sfu.url, LKJWT_ALLOW_NETWORKS="127.0.0.0/8",
                   LKJWT_CA_FILE=self.pki.ca_file, LKJWT_CA_ONLY="true")
        env.update(overrides)
        return base_env(**env)

    def service(self, **overrides):
        return Service(self.env(**overrides))

    def user(self, hs, local=None):
        """A user id and a fresh token for it. A new user each time, so no
        test lives on another's rate."""
        n = next(_serial)
        sub = f"@{local if local is not None else f'user{n}'}:{hs.netloc}"
        token = f"{CANARY_TOKEN}.{n}"
        hs.tokens[token] = sub
        return sub, token

    def body(self, path, hs, sub=None, token=None, **over):
        """A valid request body as a dict."""
        if token is None:
            sub, token = self.user(hs)
        return make_body(path, hs.netloc, sub, token, **over)


def make_body(path, server, sub="@alice:example.org", token=CANARY_TOKEN, *, room="!room:example.org",
              slot="m.call#ROOM", device="DEVICE", member="member-1", **more):
    openid = {"access_token": token, "token_type": "Bearer", "matrix_server_name": server, "expires_in": 3600}
    if path == "/sfu/get":
        return {"room": room, "openid_token": openid, "device_id": device, **more}
    return {"room_id": room, "slot_id": slot, "openid_token": openid,
            "member": {"id": member, "claimed_user_id": sub, "claimed_device_id": device}, **more}


def identity(path, sub, device="DEVICE", member="member-1"):
    return f"{sub}:{device}" if path == "/sfu/get" else hashed(sub, device, member)
