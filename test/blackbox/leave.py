"""Delegated leave from outside: a scripted SFU with participants and signed webhooks, a scripted
client-server API that records restarts and sends, and Job, which plays one delegation's client."""

import base64
import collections
import hashlib
import hmac
import itertools
import json
import re
import threading
import time

from exchange import alias, check_error, check_granted, check_plain, check_cors, hashed, make_body
from outbound import by_token, token_for
from peers import Homeserver, HttpServer, Reply, Sfu, protobuf_decode, protobuf_encode
from service import CANARY_KEY, CANARY_SECRET, Service, base_env, free_port, parse_line

DELEGATE, WEBHOOK = "/delegate_delayed_leave", "/sfu_webhook"
UNSTABLE = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"
STABLE = "/_matrix/client/v1/delayed_events/"
GET_PARTICIPANT = "/twirp/livekit.RoomService/GetParticipant"
HOUR = 3_600_000
POLL = 0.03
LONG = 90           # seconds after which something that takes up to 30 of them hangs
_serial = itertools.count(1)

GONE = Reply(404, {})
UNRECOGNIZED = Reply(404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"})
NOT_FOUND = Reply(404, {"code": "not_found", "msg": "participant does not exist"})


# ---- tokens of webhooks

def b64url(data):
    return base64.urlsafe_b64encode(data if isinstance(data, bytes) else data.encode()).decode().rstrip("=")


def sign(signed, secret=CANARY_SECRET, algorithm="sha256"):
    """The third part for the first two."""
    return b64url(hmac.new(secret.encode(), signed.encode(), algorithm).digest())


def jws(claims, secret=CANARY_SECRET, head='{"alg":"HS256","typ":"JWT"}'):
    """A signed token; claims and head as objects or as text."""
    text = [x if isinstance(x, (str, bytes)) else json.dumps(x, separators=(",", ":")) for x in (head, claims)]
    signed = ".".join(map(b64url, text))
    return f"{signed}.{sign(signed, secret)}"


def body_hash(body):
    return base64.b64encode(hashlib.sha256(body if isinstance(body, bytes) else body.encode()).digest()).decode()


def webhook_claims(body, key=CANARY_KEY, **over):
    """The claims LiveKit makes. A value of None takes the claim out."""
    now = int(time.time())
    claims = {"iss": key, "exp": now + 300, "nbf": now, "iat": now, "sha256": body_hash(body), **over}
    return {k: v for k, v in claims.items() if v is not None}


def webhook_token(body, key=CANARY_KEY, secret=CANARY_SECRET, **over):
    return jws(webhook_claims(body, key, **over), secret)


def event(name, room=None, identity=None, sid="PA_1", reason=None, **more):
    """A webhook body as LiveKit forms it."""
    n = next(_serial)
    out = {"event": name}
    if room is not None:
        out["room"] = {"sid": f"RM_{n}", "name": room, "emptyTimeout": 300, "creationTime": str(int(time.time())),
                       "numParticipants": 1, "activeRecording": False, "enabledCodecs": [{"mime": "audio/opus"}]}
    if identity is not None:
        out["participant"] = {"sid": sid, "identity": identity, "state": "ACTIVE", "joinedAt": str(int(time.time())),
                              "tracks": [], "permission": {"canSubscribe": True}, "attributes": {}}
        if reason is not None:
            out["participant"]["disconnectReason"] = reason
    return {**out, "id": f"EV_{n}", "createdAt": str(int(time.time())), **more}


def check_webhook(reply, status=200):
    """What every webhook gets: nothing at all."""
    check_plain(reply)
    assert (reply.status, reply.body, reply.header("Content-Length")) == (status, b"", "0"), reply
    assert "content-type" not in reply.headers, reply


# ---- peers

class LeaveSfu(Sfu):
    """An Sfu with participants. presence: (room, identity) -> Reply, function(Request) or a list of those, taken
    in turn, the last stays; nothing: not found. .looked: (room, identity, when) of every GetParticipant."""

    def __init__(self, key=CANARY_KEY, secret=CANARY_SECRET, **kw):
        self.presence, self.looked, self.wrong = {}, [], []
        super().__init__(key, secret, **kw)

    def answer(self, req):
        reply = super().answer(req)
        if req.path != GET_PARTICIPANT or b"not_found" not in reply.body:
            if req.path == GET_PARTICIPANT:
                self.wrong.append((req, reply.body))
            return reply
        fields = protobuf_decode(req.body)
        room, identity = (fields[n][0].decode() for n in (1, 2))
        claims = json.loads(_part(req.header("authorization").split(".")[1]))
        if (req.body != protobuf_encode((1, room), (2, identity)) or claims["video"] != {"roomAdmin": True, "room": room}
                or claims["exp"] - claims["nbf"] != 600 or set(claims) != {"iss", "exp", "nbf", "iat", "video"}
                or {req.header("content-type"), req.header("accept")} != {"application/protobuf"}):
            self.wrong.append((req, claims))
        with self.lock:
            self.looked.append((room, identity, req.at))
            script = self.presence.get((room, identity))
            if isinstance(script, list):
                script = script.pop(0) if len(script) > 1 else script[0]
        if callable(script):
            script = script(req)
        return script or reply

    def stop(self):
        super().stop()
        assert not self.wrong, self.wrong


def _part(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def participant(identity, sid="PA_1", state=2, *more):
    """GetParticipant's success."""
    return Reply(200, protobuf_encode((1, sid), (2, identity), *([(3, state)] if state else []), *more),
                 ctype="application/protobuf")


class Call:
    """One request for a delayed event: .base .stable .delay_id .action .at .req"""

    def __init__(self, base, stable, delay_id, action, req):
        self.base, self.stable, self.delay_id, self.action, self.at, self.req = base, stable, delay_id, action, req.at, req

    def __repr__(self):
        return f"<{'stable ' if self.stable else ''}{self.action} {self.delay_id} {self.at:.2f}>"


class ClientApi(HttpServer):
    """A homeserver's delayed events. script: (delay id, action) -> Reply, function(Request) or a list of those,
    taken in turn, the last stays; every: function(Call) asked before; otherwise 200 {}."""

    PATH = re.compile(r"(/[^/]+)?(/_matrix/client/(?:unstable/org\.matrix\.msc4140|(v1))/delayed_events/)([^/]*)/(restart|send)")

    def __init__(self, *a, **kw):
        self.script, self.every, self.calls, self.wrong = {}, None, [], []
        self.by_id = collections.defaultdict(list)
        super().__init__(*a, **kw)

    def answer(self, req):
        m = self.PATH.fullmatch(req.path)
        if (not m or req.method != "POST" or req.body != b"{}" or req.header("content-type") != "application/json"
                or req.header("authorization") is not None or "?" in req.target):
            self.wrong.append((req, req.headers, req.body))
            return Reply(404, {"errcode": "M_UNRECOGNIZED"})
        call = Call(m[1] or "", bool(m[3]), m[4], m[5], req)
        with self.lock:
            self.calls.append(call)
            self.by_id[call.delay_id].append(call)
            script = self.script.get((call.delay_id, call.action))
            if isinstance(script, list):
                script = script.pop(0) if len(script) > 1 else script[0]
        if self.every:
            script = self.every(call) or script
        if callable(script):
            script = script(call)
        return script or Reply(200, {})

    def of(self, delay_id, action=None):
        with self.lock:
            return [c for c in self.by_id[delay_id] if action in (None, c.action)]

    def wait(self, delay_id, action, count=1, timeout=LONG):
        """That many calls so far; all of them."""
        until = time.monotonic() + timeout
        while len(got := self.of(delay_id, action)) < count:
            assert time.monotonic() < until, f"{len(got)} of {count} {action}: {self.of(delay_id)}"
            time.sleep(POLL)
        return got

    def stop(self):
        super().stop()
        assert not self.wrong, self.wrong


class Log:
    """The service's lines, each parsed once, and found by the values they hold."""

    def __init__(self, svc):
        self.svc, self.done, self.lines, self.lock = svc, 0, [], threading.Lock()
        self.by_value = collections.defaultdict(list)

    def all(self):
        with self.lock:
            self._read()
            return list(self.lines)

    def _read(self):
        with self.svc._lock:
            text = self.svc._err[self.done:]
        end = text.rfind(b"\n") + 1
        self.done += end
        for line in text[:end].decode("utf-8", "surrogateescape").split("\n")[:-1]:
            entry = parse_line(line)
            self.lines.append(entry)
            for value in set(entry.values()):
                self.by_value[value].append(entry)

    def of(self, value, name=None):
        """Lines of that event which hold the value, whatever its key."""
        with self.lock:
            self._read()
            return [e for e in self.by_value.get(value, ()) if name in (None, e["event"])]

    def wait(self, value, name, count=1, timeout=LONG):
        until = time.monotonic() + timeout
        while len(found := self.of(value, name)) < count:
            assert time.monotonic() < until, f"{len(found)} of {count} {name} of {value}:\n" + "\n".join(
                map(str, self.of(value)))
            time.sleep(POLL)
        return found


# ---- the scene

class World:
    """Homeservers of any number of names (one listener), their client-server APIs (another, one path each), an SFU
    and a service among them. Each name has a queue of its own for delayed events."""

    def __init__(self, count=1, **env):
        self.hs, self.api, self.sfu = Homeserver(sub=by_token), ClientApi(), LeaveSfu()
        self.names = [f"h{i}.leave.test" for i in range(count)]
        self._next, self._lock, self.here = itertools.cycle(self.names), threading.Lock(), threading.local()
        each = lambda form: ",".join(f"{n}={form.format(n.partition('.')[0])}" for n in self.names)
        self.env = {
            "LIVEKIT_URL": "wss://sfu.example.org/", "LKJWT_LIVEKIT_API_URL": self.sfu.url,
            "LIVEKIT_FULL_ACCESS_HOMESERVERS": ",".join(self.names),
            "LKJWT_FEDERATION_API_URL_OVERRIDES": each(self.hs.url) + f",restricted.test={self.hs.url}",
            "LIVEKIT_CS_API_URL_OVERRIDES": each(self.api.url + "/{}"),
            "LKJWT_METRICS_BIND": f"127.0.0.1:{free_port()}", "LIVEKIT_LOG_LEVEL": "debug", **env}
        self.svc = Service(base_env(**self.env))
        self.log = Log(self.svc)

    def __enter__(self):
        self.svc.start()
        return self

    def __exit__(self, kind, *_):
        alive = self.svc.proc and self.svc.proc.poll() is None
        code = self.svc.stop()
        for peer in (self.hs, self.api, self.sfu):
            try:
                peer.stop()
            except AssertionError:
                if kind is None:
                    raise
        if kind is None:
            assert alive is None or (alive and code == 0), self.svc.log_text()
            assert not (self.hs.errors or self.api.errors or self.sfu.errors)

    def stopped(self):
        """The service ends by itself, and well."""
        assert self.svc.wait() == 0, self.svc.log_text()
        self.svc.stop()

    def settle(self):
        """All that the service logged before now is in self.log."""
        mark = f"settle-{next(_serial)}"
        self.svc.request("GET", "/settle", headers=[("X-Request-Id", mark)])
        self.log.wait(mark, "NOT_FOUND")

    def server(self):
        """The server of this thread's scene, else one after the other."""
        if getattr(self.here, "server", None):
            return self.here.server
        with self._lock:
            return next(self._next)

    def job(self, **kw):
        return Job(self, **kw)

    def webhook(self, body, token=None, headers=None, status=200, **claims):
        """POST a webhook, signed as LiveKit does unless a token is given; body as object, text or bytes."""
        if not isinstance(body, (str, bytes)):
            body = json.dumps(body)
        if headers is None:
            headers = [("Authorization", token or webhook_token(body, **claims))]
        reply = self.svc.request("POST", WEBHOOK, body, [("Content-Type", "application/webhook+json"), *headers])
        check_webhook(reply, status)
        return reply

    def leaves(self):
        """The gauge of jobs."""
        return self.svc.metrics()["lkjwt_delayed_leaves"]

    def counted(self, name):
        return self.svc.metrics().get(f'lkjwt_events_total{{event="{name}"}}', 0)


class Job:
    """One delegation and its participant. who: "hashed", "legacy" or an identity itself."""

    def __init__(self, world, path=DELEGATE, T=HOUR, server=None, user=None, room=None, device="DEV", member="m",
                 delay_id=None, like=None):
        n = next(_serial)
        self.world, self.path, self.T, self.device, self.member = world, path, T, device, member
        self.server = like.server if like else server or world.server()
        self.user = like.user if like else user or f"u{n}"
        self.room = like.room if like else room or f"!r{n}:leave.test"
        self.sub = f"@{self.user}:{self.server}"
        self.delay_id = delay_id or f"syd_{n:020d}"
        self.alias = alias(self.room)
        self.hashed, self.legacy = hashed(self.sub, device, member), f"{self.sub}:{device}"
        self.identity = self.legacy if path == "/sfu/get" else self.hashed

    def ask(self, timeout=60, **over):
        """POST the delegation; the reply as it is."""
        body = make_body("/sfu/get" if self.path == "/sfu/get" else "/get_token", self.server, self.sub,
                         token_for(self.server, self.user), room=self.room, device=self.device, member=self.member,
                         delay_id=self.delay_id, delay_timeout=self.T)
        return self.world.svc.post(self.path, {**body, **over}, timeout=timeout)

    def delegate(self):
        reply = self.ask()
        self.began = time.monotonic()
        if self.path == DELEGATE:
            check_cors(reply)
            assert (reply.status, reply.body.rstrip(b"\n")) == (200, b"{}"), reply
        else:
            check_granted(reply)
        return self

    def refused(self, status, errcode, text=None):
        reply = self.ask()
        check_error(reply, status, errcode, text)
        return reply

    def id(self, who):
        return {None: self.identity, "hashed": self.hashed, "legacy": self.legacy}.get(who, who)

    # -- what the SFU knows
    def presence(self, *script, who=None):
        with self.world.sfu.lock:
            self.world.sfu.presence[self.alias, self.id(who)] = list(script)
        return self

    def present(self, who=None, sid="PA_1", state=2):
        return self.presence(participant(self.id(who), sid, state), who=who)

    def absent(self, who=None):
        return self.presence(NOT_FOUND, who=who)

    def looked(self, who=None):
        with self.world.sfu.lock:
            return [x for x in self.world.sfu.looked if x[:2] == (self.alias, self.id(who))]

    def wait_looked(self, count, who=None):
        until = time.monotonic() + LONG
        while len(got := self.looked(who)) < count:
            assert time.monotonic() < until, f"{len(got)} of {count} look-ups; {self.lines()}"
            time.sleep(POLL)
        return got

    # -- webhooks
    def hook(self, name, who=None, sid="PA_1", reason=None, room=None, **more):
        self.hooked = time.monotonic()
        self.world.webhook(event(name, room or self.alias, self.id(who), sid, reason, **more))
        return self

    def joined(self, who=None, sid="PA_1", present=True):
        if present:
            self.present(who, sid)
        return self.hook("participant_joined", who, sid)

    def left(self, reason="CLIENT_INITIATED", who=None, sid="PA_1", absent=True):
        if absent:
            self.absent(who)
        return self.hook("participant_left", who, sid, reason)

    # -- what came of it
    def lines(self, name=None):
        self.world.settle()
        return self.world.log.of(self.alias, name)

    def wait_line(self, name, count=1):
        return self.world.log.wait(self.alias, name, count)

    def calls(self, action=None):
        return self.world.api.of(self.delay_id, action)

    def script(self, action, *replies):
        self.world.api.script[self.delay_id, action] = list(replies)
        return self

    def failures(self):
        """Lines that tell of failed calls; they name the server."""
        self.world.settle()
        log = self.world.log
        return (log.of(self.server, "DELAYED_EVENT_FAILED")
                + log.of(self.server, "DELAYED_EVENT_LIMITED"))

    def restarted(self, count=1):
        return self.world.api.wait(self.delay_id, "restart", count)

    def sent(self, count=1):
        return self.world.api.wait(self.delay_id, "send", count)

    def connected(self):
        """Delegated, asked for in vain, joined by webhook, restarted once."""
        self.delegate()
        for who in {self.identity, self.legacy}:
            if self.identity == self.hashed or who == self.legacy:
                self.wait_looked(1, who)
        self.joined().restarted()
        return self

    def ended(self):
        return self.wait_line("JOB_ENDED")[0]

    def never_sent(self):
        assert self.calls("send") == [], self.calls()
        return self
