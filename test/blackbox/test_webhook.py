"""PROTOCOL.md 10, SECURITY.md T7-T9, S6, S7: which webhooks act, and that nothing else does. The yardstick is a job
that waits for its participant: a webhook that acts makes it Connected, and its delayed event is restarted."""
import base64
import hashlib
import itertools
import json
import select
import tempfile
import time

import pytest

from exchange import check_plain
from leave import (GET_PARTICIPANT, WEBHOOK, World, b64url, body_hash, check_webhook, event, jws, sign,
                   webhook_claims, webhook_token)
from peers import wait_for
from service import CANARY_KEY, CANARY_SECRET

KEY_2, SECRET_2 = "second-key", "second-secret-0123456789-0123456789"
KEYS = {CANARY_KEY: CANARY_SECRET, KEY_2: SECRET_2}
CAP = 262144


@pytest.fixture(scope="module")
def world():
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as f:
        f.write("".join(f"{k}: {s}\n" for k, s in KEYS.items()))
        f.flush()
        with World(LIVEKIT_KEY=None, LIVEKIT_SECRET=None, LIVEKIT_KEY_FILE=f.name) as w:
            yield w


@pytest.fixture
def job(world):
    """Waiting; the SFU does not know the participant."""
    return world.job().delegate()


def join(job, **more):
    return event("participant_joined", job.alias, job.hashed, **more)


def post(world, body, *auth, status=200, name="Authorization"):
    """A webhook with these Authorization headers; its log lines."""
    if isinstance(body, dict):
        body = json.dumps(body)
    reply = world.svc.request("POST", WEBHOOK, body, [(name, a) for a in auth])
    check_webhook(reply, status)
    return reply


def bad(world):
    world.settle()
    return [e for e in world.log.all() if e["event"] == "WEBHOOK_BAD"]


class Refusal:
    """with Refusal(world): exactly one webhook is refused inside, for that reason."""

    def __init__(self, world, reason=None):
        self.world, self.reason = world, reason

    def __enter__(self):
        self.before, self.counted = len(bad(self.world)), self.world.counted("WEBHOOK_BAD")

    def __exit__(self, kind, *_):
        if kind:
            return
        lines = bad(self.world)[self.before:]
        assert len(lines) == 1 and self.world.counted("WEBHOOK_BAD") == self.counted + 1, lines
        assert lines[0]["level"] == "warning" and lines[0]["reason"], lines
        if self.reason:
            assert lines[0]["reason"] == self.reason, lines


def no_effect(world, job, connected=0):
    """Nothing happened to the job so far (of those before it under the same names `connected` were), and a good
    webhook still acts."""
    assert len(job.lines("JOB_CONNECTED")) == connected and not job.calls()
    job.joined(present=False).restarted()
    assert len(job.lines("JOB_CONNECTED")) == connected + 1 and len(job.calls()) == 1


# ---- routes

@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO", "post"])
def test_other_method(world, method):
    reply = world.svc.request(method, WEBHOOK, headers=[("Origin", "https://x")])
    check_plain(reply)
    assert (reply.status, reply.body, reply.header("Content-Length")) == (405, b"", "0")
    assert reply.header("Allow") == "POST" and "content-type" not in reply.headers


@pytest.mark.parametrize("target, prefix", [("//sfu_webhook", None), ("/sfu_webhook?x=1", None),
                                            ("http://h/sfu_webhook", None), ("/livekit/jwt/sfu_webhook", "/livekit/jwt")])
def test_where_it_is(world, target, prefix):
    if prefix:
        with World(LKJWT_PATH_PREFIX=prefix) as w:
            check_webhook(w.svc.request("POST", target, "x"))
            check_webhook(w.svc.request("POST", WEBHOOK, "x"))
    else:
        check_webhook(world.svc.request("POST", target, "x"))


# ---- the token

VECTOR = ('{"event":"participant_joined","room":{"name":"R"},"participant":{"identity":"I"},"id":"EV_x",'
          '"createdAt":"1726760839"}')
VECTOR_CLAIMS = {"iss": "devkey", "exp": 1726761139, "nbf": 1726760839, "iat": 1726760839,
                 "sha256": "NlMFxKgrnog1916Xa1W9PNFy6oxhE2C3FIG8Wp166xU="}
VECTOR_TOKEN = jws(VECTOR_CLAIMS, "devsecret")


def test_vectors():
    """The documents' vectors. Their time is over, so the good one fails for its time and no other cause."""
    assert VECTOR_CLAIMS["sha256"] == body_hash(VECTOR)
    assert VECTOR_TOKEN.rpartition(".")[2] == "m0zEdGPq6syDvk3E6XYVNu8WWQo2uniCEIIC0kMAwNo"
    no_hash = jws({k: v for k, v in VECTOR_CLAIMS.items() if k != "sha256"}, "devsecret")
    assert no_hash.rpartition(".")[2] == "ei3b85YGGfBMYkALEdohU7JbQd0cWpBnNvLe_hPHCtw"
    other = jws({**VECTOR_CLAIMS, "iss": "otherkey"}, "devsecret")
    assert other.rpartition(".")[2] == "p0ksRU5jlMofy7dhg6lyp7oQTdATexaXRnWuo18kP3s"
    none = b64url('{"alg":"none","typ":"JWT"}') + "." + VECTOR_TOKEN.split(".")[1] + "."
    with World(LIVEKIT_KEY="devkey", LIVEKIT_SECRET="devsecret") as w:
        for body, token, reason in ((VECTOR, VECTOR_TOKEN, "time"), (VECTOR, no_hash, None), (VECTOR, other, "issuer"),
                                    (VECTOR.replace('"I"', '"J"'), VECTOR_TOKEN, None), (VECTOR, none, None)):
            with Refusal(w, reason):
                post(w, body, token)


GOOD = {
    "as LiveKit signs": lambda b: webhook_token(b),
    "Bearer": lambda b: "Bearer " + webhook_token(b),
    "second key": lambda b: webhook_token(b, KEY_2, SECRET_2),
    "expired 50 s ago": lambda b: webhook_token(b, exp=int(time.time()) - 50),
    "not before in 50 s": lambda b: webhook_token(b, nbf=int(time.time()) + 50),
    "no exp": lambda b: webhook_token(b, exp=None),
    "no nbf": lambda b: webhook_token(b, nbf=None),
    "no iat": lambda b: webhook_token(b, iat=None),
    "iat of tomorrow": lambda b: webhook_token(b, iat=int(time.time()) + 86400),
    "fractions": lambda b: webhook_token(b, exp=time.time() + 100.25, nbf=time.time() - 1.75, iat=time.time() + .5),
    "other claims": lambda b: webhook_token(b, sub="x", aud=["a", {"b": None}], name="é", video={}),
    "video without join": lambda b: webhook_token(b, video={"roomAdmin": True, "roomJoin": False}),
    "blanks in the JSON": lambda b: jws(json.dumps(webhook_claims(b), indent=2), head=' {"typ" : "JWT" ,"alg":"HS256"} '),
    "no typ": lambda b: jws(webhook_claims(b), head='{"alg":"HS256"}'),
    "kid": lambda b: jws(webhook_claims(b), head='{"alg":"HS256","kid":"../../etc/passwd"}'),
    "escaped": lambda b: jws(json.dumps(webhook_claims(b)).replace('"sha256"', '"sha\\u0032\\u00356"')),
}


@pytest.mark.parametrize("form", GOOD)
def test_good_token(world, job, form):
    body = json.dumps(join(job))
    post(world, body, GOOD[form](body))
    job.restarted()


def test_header_name_in_any_case(world, job):
    body = json.dumps(join(job))
    post(world, body, webhook_token(body), name="aUTHORIZATION")
    job.restarted()


def altered(token, part, change):
    parts = token.split(".")
    parts[part] = change(parts[part])
    return ".".join(parts)


def stretch(text, by):
    """The last character's unused low bits, set: the same bytes in sloppy base64."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return text[:-1] + alphabet[alphabet.index(text[-1]) | by]


def resign(head, claims, secret=CANARY_SECRET):
    """Two parts, as they are, under a good signature."""
    return f"{head}.{claims}.{sign(f'{head}.{claims}', secret)}"


def pad(claims):
    """JSON of claims, one byte more than whole groups of three."""
    text = json.dumps(claims)
    return (text + " " * ((1 - len(text)) % 3)).encode()


HEAD = b64url('{"alg":"HS256","typ":"JWT"}')
now = lambda: int(time.time())
BAD = {
    "empty": (lambda b: "", None),
    "one word": (lambda b: "x", None),
    "Bearer alone": (lambda b: "Bearer ", None),
    "Basic": (lambda b: "Basic " + base64.b64encode(b"canarykey:x").decode(), None),
    "Bearer twice": (lambda b: "Bearer Bearer " + webhook_token(b), None),
    "two parts": (lambda b: webhook_token(b).rpartition(".")[0], None),
    "four parts": (lambda b: webhook_token(b) + ".x", None),
    "empty signature": (lambda b: webhook_token(b).rpartition(".")[0] + ".", None),
    "empty claims": (lambda b: resign(HEAD, ""), None),
    "empty head": (lambda b: resign("", b64url(json.dumps(webhook_claims(b)))), None),
    "dots": (lambda b: "..", None),
    "other secret": (lambda b: webhook_token(b, secret="another-secret-0123456789-0123456789"), "signature"),
    "empty secret": (lambda b: webhook_token(b, secret=""), "signature"),
    "key as secret": (lambda b: webhook_token(b, secret=CANARY_KEY), "signature"),
    "issuer nobody": (lambda b: webhook_token(b, "nobody"), "issuer"),
    "issuer in another case": (lambda b: webhook_token(b, CANARY_KEY.upper()), "issuer"),
    "issuer of the other key": (lambda b: webhook_token(b, KEY_2, CANARY_SECRET), "issuer"),
    "other key, our issuer": (lambda b: webhook_token(b, CANARY_KEY, SECRET_2), "issuer"),
    "no issuer": (lambda b: webhook_token(b, iss=None), "issuer"),
    "issuer empty": (lambda b: webhook_token(b, ""), "issuer"),
    "issuer array": (lambda b: webhook_token(b, iss=[CANARY_KEY]), None),
    "expired 61 s ago": (lambda b: webhook_token(b, exp=now() - 61), "time"),
    "expired long ago": (lambda b: webhook_token(b, exp=1), "time"),
    "expired by a fraction": (lambda b: webhook_token(b, exp=now() - 61.5), "time"),
    "not before in 70 s": (lambda b: webhook_token(b, nbf=now() + 70), "time"),
    "not before, ever": (lambda b: webhook_token(b, nbf=1 << 62), "time"),
    "exp negative": (lambda b: webhook_token(b, exp=-1), "time"),
    "exp string": (lambda b: webhook_token(b, exp=str(now() + 300)), None),
    "exp true": (lambda b: webhook_token(b, exp=True), None),
    "exp object": (lambda b: webhook_token(b, exp={}), None),
    "exp beyond 64 bits": (lambda b: jws(json.dumps(webhook_claims(b, exp=7)).replace(": 7", ": 99999999999999999999")), None),
    "nbf string": (lambda b: webhook_token(b, nbf="0"), None),
    "nbf beyond 64 bits": (lambda b: jws(json.dumps(webhook_claims(b, nbf=7)).replace(": 7", ": 99999999999999999999")), None),
    "no hash": (lambda b: webhook_token(b, sha256=None), "no body hash"),
    "hash empty": (lambda b: webhook_token(b, sha256=""), "no body hash"),
    "hash of another body": (lambda b: webhook_token(b, sha256=body_hash("x")), "body hash"),
    "hash of nothing": (lambda b: webhook_token(b, sha256=body_hash("")), "body hash"),
    "hash without padding": (lambda b: webhook_token(b, sha256=body_hash(b).rstrip("=")), "no body hash"),
    "hash in hex": (lambda b: webhook_token(b, sha256=hashlib.sha256(b.encode()).hexdigest()), "no body hash"),
    "hash too short": (lambda b: webhook_token(b, sha256=base64.b64encode(hashlib.sha256(b.encode()).digest()[:30]).decode()),
                       "no body hash"),
    "hash with blanks": (lambda b: webhook_token(b, sha256=" " + body_hash(b)), None),
    "hash array": (lambda b: webhook_token(b, sha256=[body_hash(b)]), None),
    "hash number": (lambda b: webhook_token(b, sha256=1), None),
    "join token with the hash": (lambda b: webhook_token(b, video={"roomJoin": True, "room": "x"}), "join token"),
    "alg none": (lambda b: jws(webhook_claims(b), head='{"alg":"none"}').rpartition(".")[0] + ".", None),
    "alg none, signed": (lambda b: jws(webhook_claims(b), head='{"alg":"none"}'), "token header"),
    "alg None": (lambda b: jws(webhook_claims(b), head='{"alg":"None"}'), "token header"),
    "alg hs256": (lambda b: jws(webhook_claims(b), head='{"alg":"hs256"}'), "token header"),
    "alg HS256 and more": (lambda b: jws(webhook_claims(b), head='{"alg":"HS256 "}'), "token header"),
    "alg with NUL": (lambda b: jws(webhook_claims(b), head='{"alg":"HS256\\u0000"}'), "token header"),
    "alg missing": (lambda b: jws(webhook_claims(b), head='{"typ":"JWT"}'), "token header"),
    "alg null": (lambda b: jws(webhook_claims(b), head='{"alg":null}'), "token header"),
    "alg array": (lambda b: jws(webhook_claims(b), head='{"alg":["HS256"]}'), "token header"),
    "alg twice": (lambda b: jws(webhook_claims(b), head='{"alg":"none","alg":"HS256"}'), "token header"),
    "alg HS512": (lambda b: (lambda s: f"{s}.{sign(s, algorithm='sha512')}")(
        jws(webhook_claims(b), head='{"alg":"HS512"}').rpartition(".")[0]), "token header"),
    "HS256 by SHA-512": (lambda b: (lambda s: f"{s}.{sign(s, algorithm='sha512')}")(
        webhook_token(b).rpartition(".")[0]), "signature"),
    "crit": (lambda b: jws(webhook_claims(b), head='{"alg":"HS256","crit":["exp"]}'), "token header"),
    "crit empty": (lambda b: jws(webhook_claims(b), head='{"alg":"HS256","crit":[]}'), "token header"),
    "head no JSON": (lambda b: jws(webhook_claims(b), head="HS256"), "token header"),
    "head array": (lambda b: jws(webhook_claims(b), head='["HS256"]'), "token header"),
    "claims no JSON": (lambda b: jws("x"), "claims"),
    "claims array": (lambda b: jws("[]"), "claims"),
    "claims null": (lambda b: jws("null"), None),
    "claims empty": (lambda b: jws("{}"), None),
    "claims trailing": (lambda b: jws(json.dumps(webhook_claims(b)) + "{}"), "claims"),
    "issuer twice": (lambda b: jws(json.dumps(webhook_claims(b))[:-1] + f', "iss": "{CANARY_KEY}"}}'), "claims"),
    "hash twice": (lambda b: jws(json.dumps(webhook_claims(b))[:-1] + f', "sha256": "{body_hash(b)}"}}'), "claims"),
    "claims bad UTF-8": (lambda b: jws(json.dumps(webhook_claims(b, sub="@"))
                                       .encode().replace(b"@", b"\xff")), "claims"),
    "padding": (lambda b: ".".join(p + "=" * (-len(p) % 4) for p in webhook_token(b).split(".")), None),
    "padded signature": (lambda b: webhook_token(b) + "=", None),
    "padded claims, signed so": (lambda b: resign(HEAD, b64url(pad(webhook_claims(b, x=""))) + "=="), None),
    "sloppy signature": (lambda b: altered(webhook_token(b), 2, lambda p: stretch(p, 1)), "signature"),
    "sloppy signature 2": (lambda b: altered(webhook_token(b), 2, lambda p: stretch(p, 2)), "signature"),
    "standard alphabet, signed so": (lambda b: resign(HEAD, base64.b64encode(
        pad(webhook_claims(b, x="?>~" * 9))).decode().rstrip("=")), None),
    "blank in a part": (lambda b: altered(webhook_token(b), 1, lambda p: p[:8] + " " + p[8:]), None),
    "blank behind": (lambda b: webhook_token(b) + " x", None),
    "signature cut": (lambda b: webhook_token(b)[:-1], None),
    "signature longer": (lambda b: webhook_token(b) + "A", None),
    "signature of zeros": (lambda b: webhook_token(b).rpartition(".")[0] + "." + b64url(bytes(32)), "signature"),
    "one bit off": (lambda b: altered(webhook_token(b), 2, lambda p: ("B" if p[0] == "A" else "A") + p[1:]), "signature"),
    "claims changed": (lambda b: altered(webhook_token(b, exp=None), 1, lambda p: b64url(json.dumps(webhook_claims(b)))),
                       "signature"),
    "5 KB": (lambda b: webhook_token(b, x="y" * 3600), None),
}


@pytest.mark.parametrize("form", BAD)
def test_s06_bad_token(world, job, form):
    make, reason = BAD[form]
    body = json.dumps(join(job))
    with Refusal(world, reason):
        post(world, body, make(body))
    no_effect(world, job)


def test_s06_no_token(world, job):
    with Refusal(world):
        post(world, join(job))
    no_effect(world, job)


def test_two_tokens_are_none(world, job):
    """Two Authorization fields: whichever counted, a proxy might have read the other."""
    body = json.dumps(join(job))
    with Refusal(world):
        post(world, body, webhook_token(body), "x")
    no_effect(world, job)


def test_token_elsewhere(world, job):
    body = json.dumps(join(job))
    with Refusal(world):
        post(world, body, webhook_token(body), name="X-Authorization")
    with Refusal(world):
        check_webhook(world.svc.request("POST", f"{WEBHOOK}?authorization={webhook_token(body)}", body))
    no_effect(world, job)


def test_s06_other_body(world, job):
    """The token of one body with another: one byte more, less, changed, and the same JSON spelt differently."""
    body = json.dumps(join(job))
    for other in (body + " ", body[:-1], body.replace("DEV", "dev").replace("EV_", "EW_"),
                  json.dumps(json.loads(body), separators=(",", ":")), "", " " + body):
        with Refusal(world, "body hash"):
            post(world, other, webhook_token(body))
    no_effect(world, job)


def test_s07_tokens_of_ours_do_not_pass(world):
    """Each token at each door: what a client is given, and what the SFU is given, is no webhook token."""
    waiting = world.job().delegate()
    full = world.job(path="/get_token")
    tokens = [full.ask().json["jwt"], world.job(path="/sfu/get").ask().json["jwt"],
              world.job(path="/sfu/get").ask(delay_id="", delay_timeout=0).json["jwt"],
              *(world.sfu.seen(p)[-1].header("authorization") for p in (
                  "/twirp/livekit.RoomService/CreateRoom", GET_PARTICIPANT))]
    for token in tokens:
        for text in (token, "Bearer " + token.removeprefix("Bearer ")):
            with Refusal(world):
                post(world, join(waiting), text)
    no_effect(world, waiting)
    # And back: a webhook token opens nothing.
    body = json.dumps(join(waiting))
    reply = world.svc.post("/get_token", {"room_id": "!a:b", "slot_id": "s", "member": {
        "id": "m", "claimed_user_id": "@a:h0.leave.test", "claimed_device_id": "D"}, "openid_token": {
        "access_token": "x", "matrix_server_name": "nowhere.invalid"}}, [("Authorization", webhook_token(body))])
    assert reply.status == 401


# ---- the body

def escaped(text):
    return "".join(f"\\u{ord(c):04x}" for c in text)


def good_bodies(job):
    """Texts that say the participant joined."""
    base = join(job)
    edit = lambda **kw: json.dumps({**base, **kw})
    who = lambda **kw: {**base["participant"], **kw}
    return {
        "least": json.dumps({"event": "participant_joined", "room": {"name": job.alias}, "participant": {"identity": job.hashed}}),
        "createdAt number": edit(createdAt=now()),
        "createdAt null": edit(createdAt=None),
        "numDropped string": edit(numDropped="0"),
        "numDropped number": edit(numDropped=0),
        "numDropped null": edit(numDropped=None),
        "num_dropped": edit(num_dropped=0),
        "id null": edit(id=None),
        "id empty": edit(id=""),
        "sid null": edit(participant=who(sid=None)),
        "sid long": edit(participant=who(sid="PA_" + "x" * 300)),
        "reason null": edit(participant=who(disconnectReason=None)),
        "reason unknown": edit(participant=who(disconnectReason="TO_BE_INVENTED")),
        "reason number": edit(participant=who(disconnectReason=7)),
        "reason beyond": edit(participant=who(disconnectReason=4000000000)),
        "reason snake": edit(participant=who(disconnect_reason="MIGRATION")),
        "unknown members": edit(later={"a": [1, 2.5e3, None, True, {"b": "é\u2028"}]}, participant=who(more=[]), track=None,
                                egressInfo={"event": "x", "room": {"name": 1}}),
        "null track": edit(track=None, ingressInfo=None),
        "blanks": " \r\n" + json.dumps(base, indent=3) + "\t ",
        "reversed": json.dumps(dict(reversed(base.items()))),
        "escaped": "{" + ",".join(f'"{escaped(k)}":{json.dumps(v)}' for k, v in base.items()) + "}",
        "long": edit(metadata="x" * 70000),
        "as long as allowed": edit(metadata="x" * (CAP - len(edit(metadata="")))),
        "many members": edit(attributes={f"k{i}": i for i in range(1500)}),
        "deep enough": edit(deep=json.loads("[" * 14 + "]" * 14)),
    }


@pytest.mark.parametrize("form", good_bodies(type("", (), {"alias": "R", "hashed": "I"})))
def test_good_body(world, job, form):
    body = good_bodies(job)[form]
    post(world, body, webhook_token(body))
    job.restarted()


def test_chunked_body(world, job):
    body = json.dumps(join(job, metadata="x" * 100000))
    with world.svc.wire() as w:
        w.send(f"POST {WEBHOOK} HTTP/1.1\r\nHost: h\r\nAuthorization: {webhook_token(body)}\r\n"
               "Transfer-Encoding: chunked\r\n\r\n".encode())
        for i in range(0, len(body), 9999):
            part = body[i:i + 9999].encode()
            w.send(b"%x\r\n%s\r\n" % (len(part), part))
        w.send(b"0\r\n\r\n")
        check_webhook(w.reply("POST"))
    job.restarted()


def bad_bodies(job):
    base = join(job)
    text = json.dumps(base)
    edit = lambda **kw: json.dumps({**base, **kw})
    who = lambda **kw: {**base["participant"], **kw}
    twice = lambda key, value: text[:-1] + f', "{key}": {json.dumps(value)}}}'
    return {
        "empty": "", "blank": "  ", "word": "participant_joined", "number": "7", "array": f"[{text}]", "string": '"x"',
        "open": text[:-1], "two": text + text, "trailing": text + ",", "trailing NUL": text + "\0", "BOM": "\ufeff" + text,
        "trailing comma": text[:-1] + ",}", "comment": text + "//", "single quotes": text.replace('"', "'"),
        "event twice": twice("event", "participant_joined"), "room twice": twice("room", base["room"]),
        "participant twice": twice("participant", base["participant"]), "id twice": twice("id", "x"),
        "twice by escape": text[:-1] + ', "\\u0065vent": "participant_joined"}',
        "unknown twice": text[:-1] + ', "q": 1, "q": 1}',
        "identity twice": text.replace('"identity"', '"identity": "x", "identity"'),
        "bad UTF-8": text.encode().replace(b"EV_", b"\xff_"), "overlong": text.encode().replace(b"EV_", b"\xc0\xaf"),
        "lone surrogate": text.replace("EV_", "\\ud800"), "raw control": text.replace("EV_", "\x01"),
        "event number": edit(event=1), "event array": edit(event=["participant_joined"]), "event object": edit(event={}),
        "room string": edit(room=job.alias), "room array": edit(room=[base["room"]]), "room name number": edit(room={"name": 1}),
        "room name object": edit(room={"name": {}}), "participant string": edit(participant=job.hashed),
        "participant array": edit(participant=[base["participant"]]), "identity number": edit(participant=who(identity=1)),
        "identity array": edit(participant=who(identity=[job.hashed])), "sid number": edit(participant=who(sid=1)),
        "sid object": edit(participant=who(sid={})), "reason array": edit(participant=who(disconnectReason=[])),
        "reason object": edit(participant=who(disconnectReason={})), "reason true": edit(participant=who(disconnectReason=True)),
        "id number": edit(id=7), "id array": edit(id=["x"]), "numDropped object": edit(numDropped={}),
        "numDropped true": edit(numDropped=True), "numDropped words": edit(numDropped="many"),
        "too deep": edit(deep=json.loads("[" * 100 + "]" * 100)),
        "far too deep": text[:-1] + ', "d": ' + "[" * 50000 + "}",
        "number too long": text[:-1] + ', "n": ' + "9" * 2000 + "}",
        "protobuf": b"\n\x12participant_joined",
    }


@pytest.mark.parametrize("form", bad_bodies(type("", (), {"alias": "R", "hashed": "I"})))
def test_bad_body(world, job, form):
    """Well signed, and wrong: SECURITY says whoever holds the secret is believed, not that its mistakes are."""
    body = bad_bodies(job)[form]
    with Refusal(world):
        post(world, body, webhook_token(body))
    no_effect(world, job)


def ignored_bodies(job):
    base = join(job)
    edit = lambda *gone, **kw: json.dumps({k: v for k, v in {**base, **kw}.items() if k not in gone})
    names = ["room_started", "room_finished", "track_published", "track_unpublished", "egress_started", "egress_updated",
             "egress_ended", "ingress_started", "ingress_ended", "participant_left_soon", "PARTICIPANT_JOINED", "", "é" * 99,
             "participant_joined\0"]
    return {
        **{f"event {n!r}": edit(event=n) for n in names},
        "no event": edit("event"), "event null": edit(event=None),
        "no room": edit("room"), "room null": edit(room=None), "room empty": edit(room={}), "room name null": edit(room={"name": None}),
        "room name empty": edit(room={"name": ""}),
        "no participant": edit("participant"), "participant null": edit(participant=None), "participant empty": edit(participant={}),
        "identity empty": edit(participant={"identity": ""}),
        "empty object": "{}", "egress": json.dumps({"event": "egress_ended", "egressInfo": {"egressId": "EG_1"}, "id": "EV_e"}),
        "other room": edit(room={"name": job.alias[:-1] + ("A" if job.alias[-1] != "A" else "B")}),
        "other identity": edit(participant={"identity": job.hashed[::-1]}),
        "identity with more": edit(participant={"identity": job.hashed + "="}),
        "identity cut": edit(participant={"identity": job.hashed[:-1]}),
        "identity huge": edit(participant={"identity": "x" * 60000}),
        "room and identity swapped": edit(room={"name": job.hashed}, participant={"identity": job.alias}),
        "name in another case": edit(room={"Name": job.alias}),
        "snake": edit("participant", participant_identity=job.hashed),
    }


@pytest.mark.parametrize("form", ignored_bodies(type("", (), {"alias": "R", "hashed": "I"})))
def test_ignored_body(world, job, form):
    """Nothing to complain of, and nothing to do."""
    before = len(bad(world)), world.counted("WEBHOOK_BAD")
    body = ignored_bodies(job)[form]
    post(world, body, webhook_token(body))
    assert (len(bad(world)), world.counted("WEBHOOK_BAD")) == before
    no_effect(world, job)


# ---- size

def oversized(world, job, length, send):
    body = json.dumps(join(job))
    body += " " * (length - len(body))
    before = world.counted("BODY_LIMIT")
    with world.svc.wire() as w:
        send(w, body)
        reply = w.reply("POST")
        check_webhook(reply)
        assert reply.header("Connection") == "close"
        assert w.at_end()
    assert world.counted("BODY_LIMIT") == before + 1
    no_effect(world, job)


def test_too_long_by_content_length(world, job):
    """Refused unread."""
    oversized(world, job, CAP + 1, lambda w, body: w.send(
        f"POST {WEBHOOK} HTTP/1.1\r\nHost: h\r\nAuthorization: {webhook_token(body)}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()))


def test_too_long_by_chunks(world, job):
    def send(w, body):
        w.send(f"POST {WEBHOOK} HTTP/1.1\r\nHost: h\r\nAuthorization: {webhook_token(body)}\r\n"
               "Transfer-Encoding: chunked\r\n\r\n".encode())
        for i in range(0, len(body), 0x4000):
            part = body[i:i + 0x4000].encode()
            w.send(b"%x\r\n%s\r\n" % (len(part), part))
    oversized(world, job, CAP + 2, send)


def test_four_large_bodies_and_then_503(world, job):
    """SECURITY 4: 4 x 256 KB. Of six at once two are refused, whichever came last; the SFU repeats after a 503."""
    large = json.dumps(join(job, metadata="x" * 200000))
    head = f"POST {WEBHOOK} HTTP/1.1\r\nHost: h\r\nAuthorization: {webhook_token(large)}\r\nContent-Length: {len(large)}\r\n\r\n"
    wires = [world.svc.wire() for _ in range(6)]
    by_sock = {w.sock: w for w in wires}
    try:
        before = world.counted("BODY_POOL")
        for w in wires:
            w.send(head.encode() + large[:100000].encode())
        refused = wait_for("two refusals", lambda: (r := select.select(by_sock, [], [], 1)[0]) and len(r) >= 2 and r)
        assert len(refused) == 2
        for sock in refused:
            reply = by_sock.pop(sock).reply("POST")
            check_webhook(reply, 503)
            assert reply.header("Connection") == "close"
        assert world.counted("BODY_POOL") == before + 2 and not job.calls()
        small = world.job().delegate()      # small ones need no such buffer
        small.joined(present=False).restarted()
        held = by_sock.popitem()[1]
        held.send(large[100000:].encode())
        check_webhook(held.reply("POST"))
        job.restarted()
        again = world.job().delegate()      # and its buffer is free for the next
        body = json.dumps(join(again, metadata="x" * 200000))
        post(world, body, webhook_token(body))
        again.restarted()
    finally:
        for w in wires:
            w.close()


def test_without_token_no_buffer_is_given(world):
    """Authorization before body: who has no token cannot hold the four buffers."""
    wires = [world.svc.wire() for _ in range(5)]
    try:
        for w in wires:
            w.send(f"POST {WEBHOOK} HTTP/1.1\r\nHost: h\r\nContent-Length: 200000\r\n\r\n".encode())
            try:
                w.send(b" " * 100000)
            except OSError:
                pass
        job = world.job().delegate()
        body = json.dumps(join(job, metadata="x" * 200000))
        post(world, body, webhook_token(body))
        job.restarted()
    finally:
        for w in wires:
            w.close()


# ---- again

def duplicates(world):
    return world.counted("WEBHOOK_DUPLICATE")


def test_replay_of_a_join(world):
    """One event three times, and once more when another delegation waits under the same names."""
    job = world.job().delegate()
    body = json.dumps(join(job))
    token = webhook_token(body)
    before = duplicates(world)
    post(world, body, token)
    job.restarted()
    post(world, body, token)
    post(world, body, webhook_token(body, exp=now() + 900))     # a token of its own, the same event
    assert duplicates(world) == before + 2
    assert len(job.lines("JOB_CONNECTED")) == 1
    again = world.job(like=job).delegate()
    post(world, body, token)
    assert duplicates(world) == before + 3
    no_effect(world, again, 1)


def test_replay_of_a_leave(world):
    job = world.job().connected()
    body = json.dumps(event("participant_left", job.alias, job.hashed, reason="CLIENT_INITIATED"))
    token = webhook_token(body)
    job.absent()
    post(world, body, token)
    job.sent()
    job.ended()
    again = world.job(like=job).connected()
    before = duplicates(world)
    for _ in range(3):
        post(world, body, token)
    assert duplicates(world) == before + 3
    assert not again.lines("JOB_LEAVING")[1:]
    again.never_sent()
    again.left().sent()


@pytest.mark.parametrize("change", ["id", "body", "no id"])
def test_not_a_replay(world, change):
    """Another id or another body is another event; without an id nothing can be told apart."""
    job = world.job().connected()
    first = event("participant_left", job.alias, job.hashed, reason="CLIENT_INITIATED")
    if change == "no id":
        del first["id"]
    job.absent()
    world.webhook(first)
    job.sent()
    job.ended()
    before = duplicates(world)
    again = world.job(like=job).connected()
    again.absent()
    change = {"id": {"id": "EV_other"}, "body": {"createdAt": "1"}, "no id": {}}[change]
    world.webhook({**first, **change})
    again.sent()
    assert duplicates(world) == before


def test_a_refused_webhook_is_not_remembered(world, job):
    """Or a forger could have the real one ignored."""
    body = json.dumps(join(job))
    with Refusal(world, "signature"):
        post(world, body, webhook_token(body, secret="another-secret-0123456789-0123456789"))
    before = duplicates(world)
    post(world, body, webhook_token(body))
    job.restarted()
    assert duplicates(world) == before


# ---- what is told of them

# Bodies stay within the 64 KB that a refusal reads: more may meet a closed socket.
HOSTILE = ["\x1b[31mred", "a\nevent=GRANTED", 'x" y="z', "\u202e", "é" * 3000, "a" * 12000, "\0", "\ufffd", "%s%n"]


@pytest.mark.parametrize("text", HOSTILE, ids=[ascii(t)[:20] for t in HOSTILE])
def test_s10_hostile_text_in_the_log(world, text):
    """In every used member: lines stay lines (world.log parses them strictly)."""
    lines = len(world.log.all())
    body = {"event": text, "room": {"name": text}, "participant": {"identity": text, "sid": text, "disconnectReason": text},
            "id": text}
    for name in (text, "participant_joined", "participant_left"):
        world.webhook({**body, "event": name})
        world.webhook({**body, "event": name}, key=text[:200])
        post(world, json.dumps(body), ".".join([b64url(text[:999])] * 3))
    assert world.svc.request("GET", "/healthz").status == 200
    wait_for("lines", lambda: len(world.log.all()) > lines)
    assert all(len(line) <= 2048 for line in world.svc.log_text().split("\n"))


def test_webhooks_are_counted(world):
    """By route and code, whatever was thought of them."""
    name = 'lkjwt_http_requests_total{route="/sfu_webhook",code="200"}'
    before = world.svc.metrics().get(name, 0)
    post(world, "{}", webhook_token("{}"))
    post(world, "{}", "x")
    wait_for(name, lambda: world.svc.metrics()[name] == before + 2)


def test_many_keep_alive(world):
    """As LiveKit sends them: one connection, one after another, good and bad."""
    jobs = [world.job().delegate() for _ in range(20)]
    with world.svc.wire() as w:
        for n, job in zip(itertools.count(), jobs):
            body = json.dumps(join(job))
            for token in (webhook_token(body), "x", webhook_token("y")):
                w.send(f"POST {WEBHOOK} HTTP/1.1\r\nHost: h\r\nAuthorization: {token}\r\nContent-Length: {len(body)}\r\n"
                       f"\r\n{body}".encode())
                check_webhook(w.reply("POST"))
    for job in jobs:
        job.restarted()
