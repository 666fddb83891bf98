"""Behind the homeserver: requests that it passes on, what is asked of it in turn, and who is removed from the SFU.
The homeserver is scripted; the real ones are in test/realworld/test_appservice.py."""
import base64
import itertools
import json
import re
import threading
import time
from pathlib import Path

import jwt as pyjwt
import pytest

from exchange import CORS, alias, check_common, hashed, payload
from leave import LeaveSfu, event, participant, webhook_token
from peers import HttpServer, Reply, together, wait_for
from service import CANARY_PASSWORD, CANARY_SECRET, Service, base_env, free_port, run_cli
from store import RedisServer

HS = "as.test"
# Secrets of this mode; they are of the canary's kind, so that its test finds them in any output.
AS_TOKEN, HS_TOKEN = f"{CANARY_PASSWORD}-as_token-0123456789", f"{CANARY_PASSWORD}-hs_token-0123456789"
SFU_URL = "wss://sfu.example.org/"
PING = "/_matrix/app/v1/ping"
CLIENT = ("/_matrix/client/v1/rtc/livekit", "/_matrix/client/unstable/io.element.msc4195/rtc/livekit")
FEDERATION = ("/_matrix/federation/v1/rtc/livekit/get_token",
              "/_matrix/federation/unstable/io.element.msc4195/rtc/livekit/get_token")
GET, DELEGATE = CLIENT[1] + "/get_token", CLIENT[1] + "/delegate_delayed_leave"
MEMBER = re.compile(r"/_matrix/client/(v3|unstable/io\.element\.msc4502)/rooms/([^/]+)/is_joined")
RELAY = re.compile(r"/_matrix/client/(v1|unstable/io\.element\.msc4512)/appservice/fed_proxy")
DELAYED = re.compile(r"/_matrix/client/(v1|unstable/org\.matrix\.msc4140)/delayed_events/([^/]+)(/restart|/send)?")
UNRECOGNIZED = {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"}
REMOVE = "/twirp/livekit.RoomService/RemoveParticipant"
_serial = itertools.count(1)


class Home(HttpServer):
    """A homeserver as its application service sees it. joined: {(room, user or server)}; stable, mxid: which forms
    it knows; odd: Reply or function(Request) for is_joined in place of all that; relay: function(body) -> (status,
    content) or a Reply; delayed: {delay id: (owner, reply)}."""

    def __init__(self, *address, **more):
        self.joined, self.stable, self.mxid, self.odd = set(), False, True, None
        self.relay, self.delayed, self.relayed, self.wrong = None, {}, [], []
        super().__init__(*address, **more)

    def answer(self, req):
        path = req.target.partition("?")[0]
        if req.header("authorization") != f"Bearer {AS_TOKEN}":
            self.wrong.append(req)
            return Reply(401, {"errcode": "M_UNKNOWN_TOKEN"})
        if m := MEMBER.fullmatch(path):
            return self.is_joined(req, m[1] == "v3")
        if m := RELAY.fullmatch(path):
            body = json.loads(req.body)
            if (m[1] == "v1") != self.stable:
                return Reply(404, UNRECOGNIZED)
            if body == {}:
                return Reply(400, {"errcode": "M_MISSING_PARAM"})
            with self.lock:
                self.relayed.append(body)
            got = self.relay(body)
            return got if isinstance(got, Reply) else Reply(200, dict(zip(("status", "content"), got)))
        if m := DELAYED.fullmatch(path):
            if (m[1] == "v1") != self.stable:
                return Reply(404, UNRECOGNIZED)
            owner, reply = self.delayed.get(m[2], (None, None))
            if owner != req.query.get("user_id") or (req.method == "GET") != (m[3] is None):
                return Reply(404, {"errcode": "M_NOT_FOUND"})
            return (reply if m[3] is None else None) or Reply(200, {})
        return Reply(404, UNRECOGNIZED)

    def is_joined(self, req, is_stable):
        if self.odd:
            return self.odd(req) if callable(self.odd) else self.odd
        if is_stable != self.stable:
            return Reply(404, UNRECOGNIZED)
        user = req.query.get("mxid" if self.mxid else "user_id")
        if (user is None) == ("server_name" not in req.query):
            return Reply(400, {"errcode": "M_MISSING_PARAM"})
        room = req.path.split("/")[-2].replace("%21", "!").replace("%3A", ":")
        return Reply(200, {"joined": (room, user or req.query["server_name"]) in self.joined})

    def asked(self, room=None):
        """Questions about members so far, of one room."""
        with self.lock:
            return [r for r in self.requests if MEMBER.fullmatch(r.target.partition("?")[0])
                    and (room is None or room.replace("!", "%21").replace(":", "%3A") in r.target)]


class RoomSfu(LeaveSfu):
    """It can remove participants: .removed is (room, identity) of each. remove: Reply(s) in its place."""

    def __init__(self):
        self.removed, self.remove = [], None
        super().__init__()

    def answer(self, req):
        if req.path != REMOVE:
            return super().answer(req)
        claims = json.loads(base64.urlsafe_b64decode(req.header("authorization").split(".")[1] + "=="))
        room = req.body[2:45].decode()
        assert claims["video"] == {"roomAdmin": True, "room": room}
        identity = req.body[47:].decode()
        with self.lock:
            self.removed.append((room, identity))
        self.presence[(room, identity)] = Reply(404, {"code": "not_found", "msg": "gone"})
        return self.remove or Reply(200, b"", ctype="application/protobuf")


def as_env(home, sfu, **over):
    return base_env(**{"LIVEKIT_URL": SFU_URL, "LKJWT_LIVEKIT_API_URL": sfu.url, "LIVEKIT_HS_SERVER_NAME": HS,
                       "LIVEKIT_AS_TOKEN": AS_TOKEN, "LIVEKIT_HS_TOKEN": HS_TOKEN,
                       "LIVEKIT_CS_API_URL_OVERRIDES": f"{HS}={home.url}", **over})


class World:
    def __init__(self, **over):
        self.home, self.sfu = Home(), RoomSfu()
        self.svc = Service(as_env(self.home, self.sfu, **over))

    def __enter__(self):
        self.svc.start()
        return self

    def __exit__(self, *_):
        alive = self.svc.proc.poll() is None
        code = self.svc.stop()
        self.home.stop()
        self.sfu.stop()
        assert alive and code == 0, self.svc.log_text()
        assert not self.home.errors and not self.sfu.errors
        assert not self.home.wrong, self.home.wrong

    def user(self, room=None, server=HS):
        """A user and a room, joined to it."""
        n = next(_serial)
        user, room = f"@user{n}:{server}", room or f"!room{n}:as.test"
        self.home.joined |= {(room, user), (room, server), (room, HS)}
        return user, room

    def post(self, path, user, body, token=HS_TOKEN, origin=None, headers=()):
        head = [("Authorization", f"Bearer {token}")] if token else []
        head += [("X-Matrix-User-Identifier", user)] if user else []
        head += [("X-Matrix-Origin", origin)] if origin else []
        return self.svc.post(path, body, [*head, *headers])


def body_of(room, member_id="member-1", **over):
    out = {"room_id": room, "slot_id": "m.call#ROOM", "member_id": member_id, "url": SFU_URL, **over}
    return {k: v for k, v in out.items() if v is not None}


class Crowd:
    """How many are inside at once, and were at most."""

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.Lock()

    def __enter__(self):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *why):
        with self.lock:
            self.now -= 1


@pytest.fixture(scope="module")
def world():
    with World(LIVEKIT_LOG_LEVEL="debug") as w:
        w.svc.wait_event("AS_READY")
        yield w


def refused(reply, status, errcode, cors=True):
    check_common(reply)
    assert (reply.status, reply.errcode) == (status, errcode), reply
    assert reply.header("Content-Type") == "application/json"
    for name, value in CORS.items():
        assert reply.header(name) == (value if cors or name == "Content-Type" else None), reply


def granted(reply, user, room, publish=True, member="member-1", cors=True):
    check_common(reply)
    assert reply.status == 200 and list(reply.json) == ["jwt"], reply
    assert (reply.header("Access-Control-Allow-Origin") == "*") == cors
    claims = pyjwt.decode(reply.json["jwt"], CANARY_SECRET, algorithms=["HS256"])
    raw = reply.json["jwt"].split(".")[1]
    assert base64.urlsafe_b64decode(raw + "=" * (-len(raw) % 4)) == payload(
        hashed(user, member), alias(room), claims["iat"], ttl=600, publish=publish)


# ---- whose request it is

AUTH = [  # name, headers, status, errcode, event
    ("none", [], 401, "M_MISSING_TOKEN", "AS_TOKEN_BAD"),
    ("empty", [("Authorization", "")], 401, "M_MISSING_TOKEN", "AS_TOKEN_BAD"),
    ("scheme alone", [("Authorization", "Bearer")], 401, "M_MISSING_TOKEN", "AS_TOKEN_BAD"),
    ("another scheme", [("Authorization", f"Basic {HS_TOKEN}")], 401, "M_MISSING_TOKEN", "AS_TOKEN_BAD"),
    ("bare token", [("Authorization", HS_TOKEN)], 401, "M_MISSING_TOKEN", "AS_TOKEN_BAD"),
    ("wrong", [("Authorization", "Bearer x")], 401, "M_UNKNOWN_TOKEN", "AS_TOKEN_BAD"),
    ("our own token", [("Authorization", f"Bearer {AS_TOKEN}")], 401, "M_UNKNOWN_TOKEN", "AS_TOKEN_BAD"),
    ("truncated", [("Authorization", f"Bearer {HS_TOKEN[:-1]}")], 401, "M_UNKNOWN_TOKEN", "AS_TOKEN_BAD"),
    ("one byte more", [("Authorization", f"Bearer {HS_TOKEN}x")], 401, "M_UNKNOWN_TOKEN", "AS_TOKEN_BAD"),
    ("two blanks", [("Authorization", f"Bearer  {HS_TOKEN}")], 401, "M_UNKNOWN_TOKEN", "AS_TOKEN_BAD"),
    ("twice", [("Authorization", f"Bearer {HS_TOKEN}")] * 2, 401, "M_UNKNOWN_TOKEN", "AS_TOKEN_BAD"),
    ("good, then wrong", [("Authorization", f"Bearer {HS_TOKEN}"), ("Authorization", "Bearer x")],
     401, "M_UNKNOWN_TOKEN", "AS_TOKEN_BAD"),
    ("wrong, then good", [("Authorization", "Bearer x"), ("Authorization", f"Bearer {HS_TOKEN}")],
     401, "M_UNKNOWN_TOKEN", "AS_TOKEN_BAD"),
]
ROUTES = [(base + "/get_token", "X-Matrix-User-Identifier", True) for base in CLIENT] + [
    (base + "/delegate_delayed_leave", "X-Matrix-User-Identifier", True) for base in CLIENT] + [
    (path, "X-Matrix-Origin", False) for path in FEDERATION]


@pytest.mark.parametrize("path, header, cors", ROUTES, ids=[r[0] for r in ROUTES])
@pytest.mark.parametrize("name, auth, status, errcode, said", AUTH, ids=[a[0] for a in AUTH])
def test_without_the_homeservers_token_nothing_counts(world, path, header, cors, name, auth, status, errcode, said):
    user, room = world.user()
    before, rooms = len(world.home.asked()), len(world.sfu.rooms)
    who = [(header, user if "User" in header else "other.test")]
    # The identity header, and a whole body, as a stranger on the public listener would forge them.
    reply = world.svc.post(path, body_of(room, user_id="@x:other.test") if not cors else body_of(room), auth + who)
    refused(reply, status, errcode, cors)
    assert world.svc.wait_event(said, req=reply.header("X-Request-Id"), route=path)
    assert len(world.home.asked()) == before and len(world.sfu.rooms) == rooms


@pytest.mark.parametrize("path, header, cors", ROUTES, ids=[r[0] for r in ROUTES])
@pytest.mark.parametrize("values", [[], [""], ["@a:as.test", "@a:as.test"], ["@a:as.test", "@b:as.test"]],
                         ids=["none", "empty", "twice", "two"])
def test_identity_header_stands_there_once(world, path, header, cors, values):
    _, room = world.user()
    auth = [("Authorization", f"Bearer {HS_TOKEN}")]
    reply = world.svc.post(path, body_of(room), auth + [(header, v) for v in values])
    refused(reply, 401, "M_UNAUTHORIZED", cors)
    assert world.svc.wait_event("AS_IDENTITY_BAD", req=reply.header("X-Request-Id"))


def test_the_other_sides_header_does_not_count(world):
    user, room = world.user()
    refused(world.post(GET, None, body_of(room), origin=HS), 401, "M_UNAUTHORIZED")
    refused(world.post(FEDERATION[1], user, body_of(room, user_id=user)), 401, "M_UNAUTHORIZED", cors=False)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_ping(world, method):
    auth = [("Authorization", f"Bearer {HS_TOKEN}")]
    body = "{}" if method in ("POST", "PUT") else None
    reply = world.svc.request(method, PING, body, auth)
    assert (reply.status, reply.body) == (200, b"{}"), reply
    assert not [h for h in reply.headers if h.startswith("access-control")]
    refused(world.svc.request(method, PING, body), 401, "M_MISSING_TOKEN", cors=False)
    refused(world.svc.request(method, PING, body, [("Authorization", "Bearer no")]), 401, "M_UNKNOWN_TOKEN", cors=False)


@pytest.mark.parametrize("path, header, cors", ROUTES, ids=[r[0] for r in ROUTES])
def test_methods(world, path, header, cors):
    reply = world.svc.request("OPTIONS", path)
    assert (reply.status, reply.body) == (200, b"") and ("access-control-allow-origin" in reply.headers) == cors
    for method in ("GET", "PUT", "DELETE"):
        reply = world.svc.request(method, path)
        assert reply.status == 405 and reply.header("Allow") == "OPTIONS, POST"
    assert world.svc.request("POST", path + "/", "{}").status == 404


def test_a_large_body_is_not_read_without_the_token(world):
    with world.svc.wire() as w:
        w.send(f"POST {GET} HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n".encode())
        reply = w.reply("POST")
        assert reply.status == 401 and reply.header("Connection") == "close"


# ---- tokens for the homeserver's own users

@pytest.mark.parametrize("base", CLIENT)
def test_user_in_the_room_gets_a_token(world, base):
    user, room = world.user()
    granted(world.post(base + "/get_token", user, body_of(room)), user, room)
    made = [r for r in world.sfu.rooms if r["name"] == alias(room)]
    assert [(r["empty_timeout"], r["departure_timeout"]) for r in made] == [(300, 20)]
    # Named or not, this server is this server; the older body says the same.
    granted(world.post(base + "/get_token", user, body_of(room, server_name=HS)), user, room)
    for member in ({"id": "member-1"}, {"id": "member-1", "claimed_device_id": "D"},
                   {"id": "member-1", "claimed_user_id": user, "claimed_device_id": "D"}):
        granted(world.post(base + "/get_token", user, body_of(room, None, member=member)), user, room)
    granted(world.post(base + "/get_token", user, body_of(room, member={"id": "member-1"})), user, room)


BODIES = [  # name, change to the body, status, errcode
    ("no JSON", b"{", 400, "M_NOT_JSON"),
    ("no body", b"", 400, "M_NOT_JSON"),
    ("an array", b"[]", 400, "M_NOT_JSON"),
    ("empty object", b"{}", 400, "M_BAD_JSON"),
    ("unknown member", {"more": 1}, 400, "M_NOT_JSON"),
    ("openid_token", {"openid_token": {"access_token": "x", "matrix_server_name": HS}}, 400, "M_NOT_JSON"),
    ("room_id a number", {"room_id": 1}, 400, "M_NOT_JSON"),
    ("no room_id", {"room_id": None}, 400, "M_BAD_JSON"),
    ("no slot_id", {"slot_id": None}, 400, "M_BAD_JSON"),
    ("no member_id", {"member_id": None}, 400, "M_BAD_JSON"),
    ("empty member", {"member_id": None, "member": {}}, 400, "M_BAD_JSON"),
    ("no url", {"url": None}, 400, "M_BAD_JSON"),
    ("room_id too long", {"room_id": "!" + "x" * 255}, 400, "M_BAD_JSON"),
    ("room_id without !", {"room_id": "room:as.test"}, 400, "M_INVALID_PARAM"),
    ("two member ids", {"member": {"id": "other"}}, 400, "M_INVALID_PARAM"),
    ("another url", {"url": "wss://sfu.example.org"}, 400, "M_INVALID_PARAM"),
    ("another user claimed", {"member": {"id": "member-1", "claimed_user_id": "@x:as.test"}}, 401, "M_UNAUTHORIZED"),
    ("server_name no name", {"server_name": "a b"}, 400, "M_INVALID_PARAM"),
    ("server_name with a path", {"server_name": "a.test/x"}, 400, "M_INVALID_PARAM"),
    ("user_id in the body", {"user_id": "@x:as.test"}, 400, "M_NOT_JSON"),
]


@pytest.mark.parametrize("name, change, status, errcode", BODIES, ids=[b[0] for b in BODIES])
def test_client_bodies(world, name, change, status, errcode):
    user, room = world.user()
    before, rooms = len(world.home.asked()), len(world.sfu.rooms)
    body = change if isinstance(change, bytes) else {
        k: v for k, v in {**body_of(room), **change}.items() if v is not None}
    refused(world.post(GET, user, body), status, errcode)
    assert len(world.home.asked()) == before and len(world.sfu.rooms) == rooms, "nothing is asked, nothing is made"


USERS = [  # header value, status, errcode
    ("alice", 400, "M_INVALID_PARAM"), ("@alice", 400, "M_INVALID_PARAM"), ("@:as.test", 400, "M_INVALID_PARAM"),
    ("alice:as.test", 400, "M_INVALID_PARAM"), ("@" + "a" * 255 + ":as.test", 400, "M_INVALID_PARAM"),
    ("@a\xff:as.test", 400, "M_INVALID_PARAM"),
    ("@alice:other.test", 403, "M_FORBIDDEN"), ("@alice:AS.TEST", 403, "M_FORBIDDEN"),
    ("@alice:as.test:8448", 403, "M_FORBIDDEN"), ("@alice:as.test.", 403, "M_FORBIDDEN"),
]


@pytest.mark.parametrize("user, status, errcode", USERS, ids=[repr(u[0])[:40] for u in USERS])
def test_users_that_are_not_the_homeservers(world, user, status, errcode):
    _, room = world.user()
    world.home.joined.add((room, user))
    reply = world.post(GET, user, body_of(room))
    refused(reply, status, errcode)
    assert world.svc.wait_event("AS_IDENTITY_BAD" if status == 400 else "AS_FOREIGN", req=reply.header("X-Request-Id"))


def test_who_is_not_in_the_room_gets_nothing(world):
    user, _ = world.user()
    for room in (world.user()[1], "!nowhere:as.test", "!" + "\"\\/?#%" + ":as.test"):
        reply = world.post(GET, user, body_of(room))
        refused(reply, 403, "M_FORBIDDEN")
        assert world.svc.wait_event("NOT_JOINED", req=reply.header("X-Request-Id"))
        assert not [r for r in world.sfu.rooms if r["name"] == alias(room)]


@pytest.mark.parametrize("room", ["!a\u0000:as.test", "!a\n:as.test", "!a b:as.test", "!a\u007f:as.test", "a:as.test"])
def test_what_is_no_room_is_not_asked_about(world, room):
    """A homeserver's database may fail on it, and that would count as the homeserver's failure."""
    user, _ = world.user()
    refused(world.post(GET, user, body_of(room)), 400, "M_INVALID_PARAM")


LIES = [  # what the homeserver says to is_joined
    ("silence", Reply(hang=True, raw=b"")), ("closes", Reply(raw=b"", close=True)), ("reset", Reply(raw=b"", reset=True)),
    ("500", Reply(500, {"joined": True})), ("302", Reply(302, {"joined": True}, [("Location", "/x")])),
    ("401", Reply(401, {"errcode": "M_UNKNOWN_TOKEN", "joined": True})),
    ("403", Reply(403, {"errcode": "M_FORBIDDEN", "joined": True})),
    ("404", Reply(404, UNRECOGNIZED)), ("400", Reply(400, {"errcode": "M_INVALID_PARAM"})),
    ("429", Reply(429, {"errcode": "M_LIMIT_EXCEEDED"})), ("201", Reply(201, {"joined": True})),
    ("nothing said", Reply(200, {})), ("null", Reply(200, {"joined": None})), ("a string", Reply(200, {"joined": "true"})),
    ("a number", Reply(200, {"joined": 1})), ("an array", Reply(200, '[{"joined":true}]')),
    ("twice", Reply(200, '{"joined":false,"joined":true}')), ("no JSON", Reply(200, "true")),
    ("cut", Reply(200, {"joined": True}, cut=80)),
    ("megabytes", Reply(200, '{"joined":true,"x":"' + "a" * 4_000_000 + '"}')),
    ("megabytes, unannounced", Reply(200, '{"joined":true,"x":"' + "a" * 4_000_000 + '"}', length=False, close=True)),
    ("deep", Reply(200, '{"x":' * 1000 + "1" + "}" * 1000)),
    ("not HTTP", Reply(raw=b"\x16\x03\x01 hello\r\n\r\n")),
]


def test_a_homeserver_that_lies_or_stalls_grants_nothing():
    """All at once, since some take until the deadline; nobody gets in, and each is told in the log."""
    with World(LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS="0") as w:
        w.svc.wait_event("AS_READY")
        rooms = {name: w.user() for name, _ in LIES}
        say = {room: reply for (name, reply) in LIES for room in [rooms[name][1]]}
        w.home.odd = lambda req: next(r for room, r in say.items() if f"/{room.replace('!', '%21').replace(':', '%3A')}/"
                                      in req.target)
        replies = together([lambda n=n: w.post(GET, rooms[n][0], body_of(rooms[n][1])) for n, _ in LIES])
        for (name, _), reply in zip(LIES, replies):
            assert reply is not None, name
            refused(reply, 502, "M_UNKNOWN")
        assert not w.sfu.rooms and not w.svc.events("GRANTED")
        assert len(w.svc.wait_event("AS_CALL_FAILED", count=len(LIES))) >= len(LIES)
        for word in ("REPLY_JSON", "REPLY_STATUS", "REPLY_LIMIT", "REPLY_BAD", "HS_TIMEOUT", "REPLY_CLOSED"):
            assert w.svc.events("AS_CALL_FAILED", reason=word), word


@pytest.mark.parametrize("stable, mxid", [*itertools.product((False, True), repeat=2)])
def test_forms_of_the_question(stable, mxid):
    with World() as w:
        w.home.stable, w.home.mxid = stable, mxid
        w.svc.wait_event("AS_READY", server=HS)
        user, room = w.user()
        granted(w.post(GET, user, body_of(room)), user, room)
        before = len(w.home.asked())
        user, room = w.user()
        granted(w.post(GET, user, body_of(room)), user, room)
        assert len(w.home.asked()) == before + 1, "the form is remembered"
        asked = w.home.asked()[-1]
        assert asked.query == {"mxid" if mxid else "user_id": user} and asked.header("user-agent").startswith("lkjwt/")


def test_a_homeserver_that_takes_user_id_for_who_speaks():
    """Synapse until it knows the parameter: 403 for the user of another server."""
    with World() as w:
        w.home.odd = lambda req: Reply(403, {"errcode": "M_FORBIDDEN"}) if "user_id" in req.query else None
        real, w.home.odd = w.home.odd, None
        w.home.odd = lambda req: real(req) or Home.is_joined.__get__(_NoOdd(w.home))(req, "v3" in req.path)
        user, room = w.user(server="fed.test")
        granted(w.post(FEDERATION[1], None, body_of(room, user_id=user), origin="fed.test"), user, room, publish=False,
                cors=False)


class _NoOdd:
    def __init__(self, home):
        self._home, self.odd = home, None

    def __getattr__(self, name):
        return getattr(self._home, name)


def test_equal_questions_are_one_and_answers_are_remembered(world):
    user, room = world.user()
    gate = threading.Event()

    def slow(req):
        gate.wait(20)
        return Reply(200, {"joined": True})
    world.home.odd = slow
    try:
        done = []
        threads = [threading.Thread(target=lambda n=n: done.append(world.post(GET, user, body_of(room, f"m{n}"))))
                   for n in range(12)]
        for t in threads:
            t.start()
        wait_for("the question", lambda: world.home.asked(room))
        time.sleep(0.3)
        gate.set()
        for t in threads:
            t.join(30)
    finally:
        world.home.odd = None
    assert [r.status for r in done] == [200] * 12 and len(world.home.asked(room)) == 1
    granted(world.post(GET, user, body_of(room)), user, room)
    assert len(world.home.asked(room)) == 1


# ---- users of other homeservers

@pytest.mark.parametrize("path", FEDERATION)
def test_federated_user_gets_a_token_that_does_not_publish(world, path):
    user, room = world.user(server="fed.test:8448")
    reply = world.post(path, None, body_of(room, user_id=user), origin="fed.test:8448")
    granted(reply, user, room, publish=False, cors=False)
    assert [r["name"] for r in world.sfu.rooms].count(alias(room)) == 1
    # Both were asked about: this homeserver and the user.
    assert {r.query.get("server_name") or r.query.get("mxid") for r in world.home.asked(room)} == {HS, user}


FED = [  # name, origin, user, change, status, errcode
    ("user of another", "fed.test", "@a:else.test", {}, 403, "M_FORBIDDEN"),
    ("user of ours", "fed.test", f"@a:{HS}", {}, 403, "M_FORBIDDEN"),
    ("origin's port", "fed.test", "@a:fed.test:8448", {}, 403, "M_FORBIDDEN"),
    ("origin no name", "fed test", "@a:fed.test", {}, 400, "M_INVALID_PARAM"),
    ("user no id", "fed.test", "a", {}, 400, "M_INVALID_PARAM"),
    ("no user_id", "fed.test", None, {}, 400, "M_BAD_JSON"),
    ("another url", "fed.test", "@a:fed.test", {"url": "wss://else.example.org"}, 400, "M_INVALID_PARAM"),
    ("server_name", "fed.test", "@a:fed.test", {"server_name": "x.test"}, 400, "M_NOT_JSON"),
    ("blocked", "bad.test", "@a:bad.test", {}, 403, "M_FORBIDDEN"),
    ("nobody is joined", "fed.test", "@a:fed.test", {}, 403, "M_FORBIDDEN"),
]


def test_federated_requests_that_are_refused():
    with World(LKJWT_BLOCKED_HOMESERVERS="bad.test") as w:
        for name, origin, user, change, status, errcode in FED:
            room = f"!fed{next(_serial)}:fed.test"
            if name != "nobody is joined":
                w.home.joined |= {(room, user), (room, HS)}
            reply = w.post(FEDERATION[1], None, body_of(room, user_id=user, **change), origin=origin)
            assert (reply.status, reply.json["errcode"]) == (status, errcode), (name, reply)
            refused(reply, status, errcode, cors=False)
        # Each alone is not enough.
        for who in (HS, "@a:fed.test"):
            room = f"!fed{next(_serial)}:fed.test"
            w.home.joined.add((room, who))
            refused(w.post(FEDERATION[1], None, body_of(room, user_id="@a:fed.test"), origin="fed.test"), 403,
                    "M_FORBIDDEN", cors=False)
        assert not w.sfu.rooms


def test_other_homeservers_take_no_more_than_their_share():
    """Their questions, which stall, leave ours slots; one of them leaves some to the others."""
    with World(LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS="0") as w:
        w.svc.wait_event("AS_READY")
        gate, crowd = threading.Event(), Crowd()

        def stalls(req):
            if "fed.test" not in req.target and "%21fed" not in req.target:
                return Reply(200, {"joined": True})
            with crowd:
                gate.wait(8)
            return Reply(200, {"joined": True})
        w.home.odd = stalls
        done = []

        def fed(n):
            user = f"@u{n}:fed.test"
            done.append(w.post(FEDERATION[1], None, body_of(f"!fed{n}:fed.test", user_id=user), origin="fed.test").status)
        threads = [threading.Thread(target=fed, args=(n,)) for n in range(70)]
        for t in threads:
            t.start()
        wait_for("all that may wait", lambda: done.count(429) >= 6)
        wait_for("their share of the calls", lambda: crowd.now >= 12)
        for _ in range(5):
            user, room = w.user()
            granted(w.post(GET, user, body_of(room)), user, room)
        gate.set()
        for t in threads:
            t.join(40)
        assert sorted(set(done)) == [200, 429] and done.count(429) == 6 and crowd.most == 12, (done, crowd.most)
        w.svc.wait_event("QUEUE_FULL")


def test_rooms_of_other_homeservers_are_counted():
    """Who does not publish here chooses the slot all the same: new rooms are few, known ones free."""
    with World(LKJWT_RATE_ROOMS_USER="2:0.0001", LKJWT_RATE_ROOMS_SERVER="3:0.0001") as w:
        w.svc.wait_event("AS_READY")
        _, room = w.user()
        w.home.joined.add((room, "as.test"))

        def fed(n, slot):
            user = f"@fed{n}:fed.test"
            w.home.joined.add((room, user))
            return w.post(FEDERATION[1], None, body_of(room, user_id=user, slot_id=slot), origin="fed.test").status
        assert [fed(1, slot) for slot in "abcab"] == [200, 200, 429, 200, 200]
        assert [fed(2, slot) for slot in "cda"] == [200, 429, 200]
        w.svc.wait_event("RATE_ROOMS")
        user, _ = w.user(room)
        for slot in "efgh":
            assert w.post(GET, user, body_of(room, slot_id=slot)).status == 200


# ---- the SFU of another homeserver

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJ4IjoxfQ.c2ln"
RELAYS = [  # name, what comes back, status, errcode
    ("403", (403, {"errcode": "M_FORBIDDEN", "error": "x"}), 403, "M_FORBIDDEN"),
    ("400", (400, {"errcode": "M_INVALID_PARAM"}), 400, "M_INVALID_PARAM"),
    ("403 of another kind", (403, {"errcode": "M_UNKNOWN"}), 502, "M_UNKNOWN"),
    ("400 of another kind", (400, {"errcode": "M_NOT_JSON"}), 502, "M_UNKNOWN"),
    ("401", (401, {"errcode": "M_UNAUTHORIZED"}), 502, "M_UNKNOWN"),
    ("429", (429, {"errcode": "M_LIMIT_EXCEEDED"}), 502, "M_UNKNOWN"),
    ("500", (500, {"errcode": "M_UNKNOWN"}), 502, "M_UNKNOWN"),
    ("200 without a token", (200, {}), 502, "M_UNKNOWN"),
    ("token a number", (200, {"jwt": 1}), 502, "M_UNKNOWN"),
    ("token with a quote", (200, {"jwt": 'a"b'}), 502, "M_UNKNOWN"),
    ("token with a line break", (200, {"jwt": "a\r\nb"}), 502, "M_UNKNOWN"),
    ("token too long", (200, {"jwt": "a" * 8193}), 502, "M_UNKNOWN"),
    ("null", (200, None), 502, "M_UNKNOWN"),
    ("content an array", (200, [1]), 502, "M_UNKNOWN"),
    ("status a string", ("200", {"jwt": JWT}), 502, "M_UNKNOWN"),
    ("status absent", Reply(200, {"content": {"jwt": JWT}}), 502, "M_UNKNOWN"),
    ("denied by ours", Reply(403, {"errcode": "IO.ELEMENT.MSC4512.M_FEDPROXY_DESTINATION_DENIED"}), 502, "M_UNKNOWN"),
    ("ours says forbidden", Reply(403, {"errcode": "M_FORBIDDEN"}), 502, "M_UNKNOWN"),
    ("no connection", Reply(502, {"errcode": "IO.ELEMENT.MSC4512.M_FEDPROXY_CONNECTION_FAILED"}), 502, "M_UNKNOWN"),
    ("closes", Reply(raw=b"", close=True), 502, "M_UNKNOWN"),
    ("megabytes", Reply(200, '{"status":200,"content":{"jwt":"' + "a" * 3_000_000 + '"}}'), 502, "M_UNKNOWN"),
]


@pytest.mark.parametrize("name, says, status, errcode", RELAYS, ids=[r[0] for r in RELAYS])
def test_relay_answers(world, name, says, status, errcode):
    user, room = world.user()
    world.home.joined.add((room, "far.test"))
    world.home.relay = lambda body: says
    refused(world.post(GET, user, body_of(room, server_name="far.test")), status, errcode)


@pytest.mark.parametrize("knows", ["unstable", "stable"])
def test_relay(world, knows):
    user, room = world.user()
    world.home.joined.add((room, "far.test:8448"))
    world.home.relayed.clear()
    world.home.relay = lambda body: (200, {"jwt": JWT, "url": "wss://far"}) if (knows == "unstable") == (
        "unstable" in body["path"]) else (404, UNRECOGNIZED)
    rooms = len(world.sfu.rooms)
    url = "wss://far.example.org/\"\\\u00e4"
    reply = world.post(GET, user, body_of(room, server_name="far.test:8448", url=url))
    check_common(reply)
    assert (reply.status, reply.body) == (200, f'{{"jwt":"{JWT}"}}'.encode()), reply
    want = {"user_id": user, "url": url, "room_id": room, "slot_id": "m.call#ROOM", "member_id": "member-1"}
    assert [(b["destination"], b["method"], b["body"]) for b in world.home.relayed] == [
        ("far.test:8448", "POST", want)] * (1 if knows == "unstable" else 2)
    assert [b["path"] for b in world.home.relayed] == list(reversed(FEDERATION))[:len(world.home.relayed)]
    assert len(world.sfu.rooms) == rooms, "no room is made here for a call there"
    assert world.svc.wait_event("RELAYED", req=reply.header("X-Request-Id"), server="far.test:8448")


def test_relay_needs_both_in_the_room():
    with World(LKJWT_BLOCKED_HOMESERVERS="*.bad.test") as w:
        w.home.relay = lambda body: (200, {"jwt": JWT})
        user, room = w.user()
        refused(w.post(GET, user, body_of(room, server_name="far.test")), 403, "M_FORBIDDEN")
        other, _ = w.user()
        w.home.joined.add((room, "near.test"))
        refused(w.post(GET, other, body_of(room, server_name="near.test")), 403, "M_FORBIDDEN")
        w.home.joined.add((room, "x.bad.test"))
        refused(w.post(GET, user, body_of(room, server_name="x.bad.test")), 403, "M_FORBIDDEN")
        assert not w.home.relayed
        assert w.post(GET, user, body_of(room, server_name="near.test")).status == 200


def test_relays_that_fail_do_not_close_the_way_to_our_own_homeserver():
    """Any user can name a dead server."""
    with World(LKJWT_BREAKER_FAILURES="3") as w:
        w.home.relay = lambda body: Reply(502, {"errcode": "IO.ELEMENT.MSC4512.M_FEDPROXY_CONNECTION_FAILED"})
        user, room = w.user()
        w.home.joined.add((room, "dead.test"))
        for _ in range(8):
            refused(w.post(GET, user, body_of(room, server_name="dead.test")), 502, "M_UNKNOWN")
        other, room = w.user()
        granted(w.post(GET, other, body_of(room)), other, room)
        # One that fails by itself is left alone for a while, and then asked again.
        w.home.odd = Reply(503, {"errcode": "M_UNKNOWN"})
        for _ in range(4):
            user, room = w.user()
            refused(w.post(GET, user, body_of(room)), 502, "M_UNKNOWN")
        assert w.svc.wait_event("AS_CALL_FAILED", reason="BREAKER_OPEN")
        w.home.odd = None
        wait_for("another try", lambda: w.post(GET, user, body_of(room)).status == 200)


# ---- delayed events

def delayed(world, owner, room, after=3_600_000, **over):
    delay_id = f"syd_{next(_serial):020d}"
    reply = {"delay_id": delay_id, "room_id": room, "type": "m.rtc.member", "state_key": "x", "delay_ms": after,
             "delayed_since_ts": 1, "content": {"jwt": 5, "errcode": [1]}, **over}
    world.home.delayed[delay_id] = (owner, Reply(200, {k: v for k, v in reply.items() if v is not None}))
    return delay_id


def delayed_calls(world, delay_id, action):
    with world.home.lock:
        return [r for r in world.home.requests if r.path.endswith(f"/{delay_id}/{action}")]


@pytest.mark.parametrize("base", CLIENT)
@pytest.mark.parametrize("form", ["delay_ms", "delay"])
def test_delegation_acts_for_its_owner(world, base, form):
    user, room = world.user()
    delay_id = delayed(world, user, room, **({} if form == "delay_ms" else {"delay_ms": None, "delay": 3_600_000}))
    reply = world.post(base + "/delegate_delayed_leave", user, body_of(room, delay_id=delay_id))
    assert (reply.status, reply.body) == (200, b"{}"), reply
    first = wait_for("the restart while waiting", lambda: delayed_calls(world, delay_id, "restart"))[0]
    assert first.query == {"user_id": user} and first.header("authorization") == f"Bearer {AS_TOKEN}"
    who, name = hashed(user, "member-1"), alias(room)
    world.sfu.presence[(name, who)] = participant(who)
    for kind, more in ("participant_joined", {}), ("participant_left", {"reason": "CLIENT_INITIATED"}):
        if kind == "participant_left":
            world.svc.wait_event("JOB_CONNECTED", room=name)
            world.sfu.presence.pop((name, who))
        text = json.dumps(event(kind, name, who, **more))
        world.svc.request("POST", "/sfu_webhook", text, [("Authorization", webhook_token(text))])
    sent = wait_for("the send", lambda: delayed_calls(world, delay_id, "send"))
    assert sent[0].query == {"user_id": user} and len(sent) == 1
    world.svc.wait_event("JOB_ENDED", room=name, reason="sent")
    assert len(delayed_calls(world, delay_id, "restart")) == 1


def test_a_delay_is_postponed_while_nobody_has_joined(world):
    user, room = world.user()
    delay_id = delayed(world, user, room, 4000)
    assert world.post(DELEGATE, user, body_of(room, delay_id=delay_id)).status == 200
    got = wait_for("restarts", lambda: len(c := delayed_calls(world, delay_id, "restart")) >= 3 and c)
    gaps = [b.at - a.at for a, b in zip(got, got[1:])]
    assert min(gaps) >= 2 and not delayed_calls(world, delay_id, "send")
    world.home.delayed.pop(delay_id)      # it is gone: nothing is left to do
    world.svc.wait_event("JOB_ENDED", room=alias(room), reason="refused by the homeserver")


DELAYS = [  # name, what the homeserver says of the event, status, errcode
    ("unknown", None, 400, "M_INVALID_PARAM"),
    ("of another room", {"room_id": "!else:as.test"}, 400, "M_INVALID_PARAM"),
    ("another id", {"delay_id": "syd_other"}, 400, "M_INVALID_PARAM"),
    ("no delay", {"delay_ms": None}, 503, "M_UNKNOWN"),
    ("delay negative", {"delay_ms": -1}, 503, "M_UNKNOWN"),
    ("delay zero", {"delay_ms": 0}, 503, "M_UNKNOWN"),
    ("delay a string", {"delay_ms": "3600000"}, 503, "M_UNKNOWN"),
    ("500", Reply(500, {"errcode": "M_UNKNOWN"}), 503, "M_UNKNOWN"),
    ("401", Reply(401, {"errcode": "M_UNKNOWN_TOKEN"}), 503, "M_UNKNOWN"),
    ("403", Reply(403, {"errcode": "M_FORBIDDEN"}), 503, "M_UNKNOWN"),
    ("404 page", Reply(404, "<html>"), 503, "M_UNKNOWN"),
    ("unrecognized", Reply(404, UNRECOGNIZED), 503, "M_UNKNOWN"),
    ("no JSON", Reply(200, "x"), 503, "M_UNKNOWN"),
    ("closes", Reply(raw=b"", close=True), 503, "M_UNKNOWN"),
]


@pytest.mark.parametrize("name, says, status, errcode", DELAYS, ids=[d[0] for d in DELAYS])
def test_delegations_that_are_refused(world, name, says, status, errcode):
    user, room = world.user()
    delay_id = delayed(world, user, room, **(says if isinstance(says, dict) else {}))
    if says is None:
        world.home.delayed.pop(delay_id)
    elif isinstance(says, Reply):
        world.home.delayed[delay_id] = (user, says)
    refused(world.post(DELEGATE, user, body_of(room, delay_id=delay_id)), status, errcode)
    assert not delayed_calls(world, delay_id, "restart")


def test_a_delegation_of_anothers_event(world):
    owner, room = world.user()
    thief, _ = world.user(room)
    delay_id = delayed(world, owner, room)
    refused(world.post(DELEGATE, thief, body_of(room, delay_id=delay_id)), 400, "M_INVALID_PARAM")
    for bad, errcode in (None, "M_BAD_JSON"), ("", "M_BAD_JSON"), ("a/b", "M_BAD_JSON"), ("..", "M_BAD_JSON"), (
            "x" * 256, "M_BAD_JSON"):
        refused(world.post(DELEGATE, owner, body_of(room, delay_id=bad)), 400, errcode)
    # There is no delegation with a token here, and no time-out of the client's.
    refused(world.post(GET, owner, body_of(room, delay_id=delay_id)), 400, "M_NOT_JSON")
    refused(world.post(DELEGATE, owner, body_of(room, delay_id=delay_id, delay_timeout=1)), 400, "M_NOT_JSON")


def test_a_stored_delegation_keeps_its_owner():
    """Redis holds who it acts for; after a restart it goes on in that user's name, and where the mode is off, or what
    is stored cannot be so, it is left alone."""
    with RedisServer() as redis:
        w = World(LIVEKIT_REDIS_URL=redis.url(), LIVEKIT_LOG_LEVEL="debug")
        with w:
            user, room = w.user()
            delay_id = delayed(w, user, room)
            assert w.post(DELEGATE, user, body_of(room, delay_id=delay_id)).status == 200
            first = wait_for("the restart", lambda: delayed_calls(w, delay_id, "restart"))
            name = json.dumps([alias(room), hashed(user, "member-1")], separators=(",", ":"))
            (key, text), = redis.client().hgetall("lk-jwt:jobs").items()
            assert key == name and json.loads(text)["Params"]["Owner"] == user
            w.svc.stop()
            # Others may write there: whom would they have us speak for?
            record = json.loads(text)
            for n, (owner, server) in enumerate([("@a:else.test", HS), ("@a:else.test", "else.test"), ("a:as.test", HS),
                                                 ("@a:as.test", "else.test")]):
                params = {**record["Params"], "Owner": owner, "ServerName": server, "DelayId": f"syd_bad{n}",
                          "LiveKitIdentity": f"bad{n}"}
                redis.client().hset("lk-jwt:jobs", json.dumps([alias(room), f"bad{n}"], separators=(",", ":")),
                                    json.dumps({**record, "Params": params}))
            w.svc.start()
            again = wait_for("the restart after that", lambda: len(c := delayed_calls(w, delay_id, "restart")) > len(first)
                             and c)
            assert again[-1].query == {"user_id": user} and again[-1].header("authorization") == f"Bearer {AS_TOKEN}"
            assert len(w.svc.wait_event("REDIS_ENTRY_BAD", count=4)) == 4
            assert not [r for r in w.home.requests if "syd_bad" in r.target]
            w.svc.stop()
            w.svc.env.update(LIVEKIT_HS_SERVER_NAME="", LIVEKIT_AS_TOKEN="", LIVEKIT_HS_TOKEN="")
            before = len(delayed_calls(w, delay_id, "restart"))
            w.svc.start()
            assert len(w.svc.wait_event("REDIS_ENTRY_BAD", count=9)) == 9, "all five"
            assert len(delayed_calls(w, delay_id, "restart")) == before
            assert redis.client().hlen("lk-jwt:jobs") == 5


# ---- who is not in the room any more

def test_members_are_checked_and_who_left_is_removed():
    with World(LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS="1", LIVEKIT_LOG_LEVEL="debug") as w:
        stays, room = w.user()
        leaves, _ = w.user(room)
        fed, _ = w.user(room, server="fed.test")
        never, _ = w.user(room)
        name = alias(room)
        who = {u: hashed(u, "member-1") for u in (stays, leaves, fed, never)}
        for user in (stays, leaves, never):
            assert w.post(GET, user, body_of(room)).status == 200
        assert w.post(FEDERATION[1], None, body_of(room, user_id=fed), origin="fed.test").status == 200
        for user in (stays, leaves, fed):
            w.sfu.presence[(name, who[user])] = participant(who[user])
        wait_for("looks", lambda: len({i for _, i, _ in w.sfu.looked}) == 4)
        assert not w.sfu.removed
        # A homeserver that does not know removes nobody.
        w.home.odd = Reply(200, {})
        w.svc.wait_event("AS_CALL_FAILED", count=3)
        assert not w.sfu.removed
        w.home.odd = None
        w.home.joined -= {(room, leaves), (room, fed)}
        wait_for("both to be removed", lambda: len(w.sfu.removed) >= 2)
        for user in (leaves, fed):
            w.svc.wait_event("SEAT_REMOVED", user=user, room=name)
        assert set(w.sfu.removed) == {(name, who[leaves]), (name, who[fed])}
        # Who is absent is not asked about.
        assert not [r for r in w.home.asked(room)[-10:] if r.query.get("mxid") == never and r.at > time.monotonic() - 0.5]
        # The token still lets in: seen at once by the SFU's webhook.
        w.sfu.presence[(name, who[leaves])] = participant(who[leaves])
        text = json.dumps(event("participant_joined", name, who[leaves]))
        w.svc.request("POST", "/sfu_webhook", text, [("Authorization", webhook_token(text))])
        wait_for("the second removal", lambda: w.sfu.removed.count((name, who[leaves])) >= 2)
        assert (name, who[stays]) not in w.sfu.removed


def test_who_left_is_asked_about_twice():
    """A worker of the homeserver may lag behind a join: one "no" removes nobody; a "no" after a "no" does."""
    no, yes, unknown = Reply(200, {"joined": False}), Reply(200, {"joined": True}), Reply(502, {})
    with World(LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS="1") as w:
        user, room = w.user()
        who, name = hashed(user, "member-1"), alias(room)
        assert w.post(GET, user, body_of(room)).status == 200
        w.sfu.presence[(name, who)] = lambda req: participant(who)
        said = [no, yes, no, unknown, yes, no, yes, no, unknown, no]
        told = []

        def next_one(req):
            told.append(said[len(told)] if len(told) < len(said) else no)
            return told[-1]
        w.home.odd = next_one
        w.svc.wait_event("SEAT_REMOVED", user=user, timeout=60)
        assert len(told) >= len(said) and w.sfu.removed == [(name, who)], told


def test_a_removal_that_fails_is_tried_again_soon():
    with World(LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS="1") as w:
        user, room = w.user()
        who, name = hashed(user, "member-1"), alias(room)
        assert w.post(GET, user, body_of(room)).status == 200
        w.sfu.presence[(name, who)] = lambda req: participant(who)
        w.home.joined.remove((room, user))
        w.sfu.remove = Reply(500, {"code": "internal"})
        wait_for("an attempt", lambda: w.sfu.removed)
        assert not w.svc.events("SEAT_REMOVED") and w.svc.wait_event("SFU_REFUSED")
        w.sfu.remove = None
        w.sfu.presence[(name, who)] = participant(who)
        w.svc.wait_event("SEAT_REMOVED", user=user)


def test_many_are_looked_at_in_bounded_batches():
    with World(LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS="1", LIVEKIT_LOG_LEVEL="warning") as w:
        room = w.user()[1]
        users = [w.user(room)[0] for _ in range(60)]
        for part in range(0, 60, 20):
            assert [r.status for r in together([lambda u=u: w.post(GET, u, body_of(room)) for u in users[part:part + 20]])
                    ] == [200] * 20
        crowd = Crowd()

        def slow(req):
            with crowd:
                time.sleep(0.05)
            return None
        for user in users:
            who = hashed(user, "member-1")
            w.sfu.presence[(alias(room), who)] = lambda req, who=who: slow(req) or participant(who)
        wait_for("all to be looked at", lambda: len({i for _, i, _ in w.sfu.looked}) == 60)
        assert 2 <= crowd.most <= 8


def test_off_is_off():
    with World(LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS="0", LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}") as w:
        user, room = w.user()
        granted(w.post(GET, user, body_of(room)), user, room)
        assert w.svc.metrics()["lkjwt_participants_watched"] == 0
        text = json.dumps(event("participant_joined", alias(room), hashed(user, "member-1")))
        w.svc.request("POST", "/sfu_webhook", text, [("Authorization", webhook_token(text))])
        time.sleep(1.5)
        assert not w.sfu.looked and not w.sfu.removed


def test_tokens_of_one_user_are_bounded():
    with World(LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS="60", LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}") as w:
        user, room = w.user()
        for n in range(32):
            assert w.post(GET, user, body_of(room, f"m{n}")).status == 200
        refused(w.post(GET, user, body_of(room, "m32", slot_id="another")), 429, "M_LIMIT_EXCEEDED")
        assert not [r for r in w.sfu.rooms if r["name"] == alias(room, "another")], "refused, and a room is there"
        assert w.post(GET, user, body_of(room, "m5")).status == 200, "the same again is no more"
        other, _ = w.user(room)
        assert w.post(GET, other, body_of(room)).status == 200
        text = w.svc.metrics_text()
        assert "lkjwt_participants_watched 33\n" in text and len(text) < 60_000, len(text)
        w.svc.wait_event("SEATS_FULL")


def test_rates_hold_here_too():
    with World(LKJWT_RATE_USER="3:0.01", LKJWT_RATE_SERVER="5:0.01") as w:
        user, room = w.user()
        assert [w.post(GET, user, body_of(room)).status for _ in range(4)] == [200, 200, 200, 429]
        assert w.svc.wait_event("RATE_USER")
        other, _ = w.user(room)
        granted(w.post(GET, other, body_of(room)), other, room)
        # Other homeservers are counted, whoever their users are; the own one is not.
        got = []
        for _ in range(6):
            fed, _ = w.user(room, server="fed.test")
            got.append(w.post(FEDERATION[1], None, body_of(room, user_id=fed), origin="fed.test").status)
        assert got == [200] * 5 + [429] and w.svc.wait_event("RATE_SERVER", server="fed.test")


# ---- the two modes

def test_standalone_goes_on_beside_it(world):
    reply = world.svc.post("/get_token", {})
    assert reply.status == 400 and reply.json["errcode"] == "M_BAD_JSON"


def test_standalone_off():
    with World(LKJWT_STANDALONE="off", LIVEKIT_FULL_ACCESS_HOMESERVERS=None) as w:
        for path in ("/get_token", "/sfu/get", "/delegate_delayed_leave"):
            for method in ("POST", "OPTIONS", "GET"):
                assert w.svc.request(method, path, "{}" if method == "POST" else None).status == 404
        assert w.svc.request("GET", "/healthz").status == 200
        assert w.svc.request("POST", "/sfu_webhook", "{}").status == 200
        user, room = w.user()
        granted(w.post(GET, user, body_of(room)), user, room)


def test_routes_are_not_there_without_the_mode():
    with Service(base_env()) as s:
        for path in [r[0] for r in ROUTES] + [PING]:
            for method in ("POST", "OPTIONS", "GET"):
                reply = s.request(method, path, "{}" if method == "POST" else None,
                                  [("Authorization", f"Bearer {HS_TOKEN}"), ("X-Matrix-User-Identifier", "@a:as.test")])
                assert reply.status == 404, (path, method, reply)
        # An empty token is no token.
        assert s.request("POST", PING, "{}", [("Authorization", "Bearer ")]).status == 404


def test_path_prefix(tmp_path):
    with World(LKJWT_PATH_PREFIX="/lk") as w:
        user, room = w.user()
        granted(w.post("/lk" + GET, user, body_of(room)), user, room)


# ---- configuration

REGISTRATION = f"""# a registration
id: calls
url: null
as_token: "{AS_TOKEN}"
hs_token: '{HS_TOKEN}'   # theirs
sender_localpart: lkjwt
rate_limited: false
namespaces:
  users:
    - exclusive: false
      regex: '@.*:as\\.test'
  rooms: []
io.element.msc4512.proxy_prefix: rtc/livekit
io.element.msc4512.proxy_url: http://127.0.0.1:8080
io.element.msc4502.scopes:
  - urn:matrix:client:io.element.msc4502:rooms:is_joined
"""
# name, environment beside LIVEKIT_HS_SERVER_NAME (None takes a variable out), a word of the fault or None
CONFIGS = [
    ("both tokens", {}, None),
    ("no name", {"LIVEKIT_HS_SERVER_NAME": None}, "all or none"),
    ("no as_token", {"LIVEKIT_AS_TOKEN": None}, "all or none"),
    ("no hs_token", {"LIVEKIT_HS_TOKEN": None}, "all or none"),
    ("name alone", {"LIVEKIT_AS_TOKEN": None, "LIVEKIT_HS_TOKEN": None}, "all or none"),
    ("name no name", {"LIVEKIT_HS_SERVER_NAME": "https://as.test"}, "must be a server name"),
    ("the same token twice", {"LIVEKIT_AS_TOKEN": HS_TOKEN}, "the same as"),
    ("a token with a blank", {"LIVEKIT_AS_TOKEN": AS_TOKEN + " x"}, "printable ASCII"),
    ("a token of 600", {"LIVEKIT_HS_TOKEN": "x" * 600}, "printable ASCII"),
    ("short, strict", {"LIVEKIT_HS_TOKEN": "short", "LKJWT_STRICT": "yes"}, "guessable"),
    ("interval", {"LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS": "-1"}, "whole number"),
    ("word", {"LKJWT_STANDALONE": "false"}, "on or off"),
]
FILES = [  # name, text of a registration, a word of the fault or None
    ("good", REGISTRATION, None), ("with a marker", "---\n" + REGISTRATION, None),
    ("with CR", REGISTRATION.replace("\n", "\r\n"), None), ("plain scalars", REGISTRATION.replace('"', ""), None),
    ("no hs_token", REGISTRATION.replace("hs_token", "other"), "missing"), ("empty", "", "missing"),
    ("twice", REGISTRATION + "as_token: again\n", "line 17"), ("alias", REGISTRATION + "x: *y\n", "line 17"),
    ("anchor", REGISTRATION.replace("hs_token: ", "hs_token: &a "), "line 5"),
    ("block scalar", REGISTRATION.replace(f"hs_token: '{HS_TOKEN}'", f"hs_token: |\n  {HS_TOKEN}"), "line 5"),
    ("escape", REGISTRATION.replace(f'"{AS_TOKEN}"', f'"{AS_TOKEN}\\n"'), "line 4"),
    ("null token", REGISTRATION.replace(f"'{HS_TOKEN}'", "null"), "line 5"),
    ("list token", REGISTRATION.replace(f"'{HS_TOKEN}'", "[a]"), "line 5"),
    ("continued", REGISTRATION.replace(f"'{HS_TOKEN}'", "x\n  y"), "line 6"),
    ("JSON", json.dumps({"as_token": AS_TOKEN, "hs_token": HS_TOKEN}), "line 1"),
    ("tab", REGISTRATION.replace("  users", "\tusers"), "line 9"), ("no pair", REGISTRATION + "hello\n", "line 17"),
]


@pytest.fixture(scope="module")
def peers():
    home, sfu = Home(), RoomSfu()
    yield home, sfu
    home.stop()
    sfu.stop()


def starts(env, fault):
    if fault is None:
        with Service(env) as s:
            reply = s.request("POST", PING, "{}", [("Authorization", f"Bearer {HS_TOKEN}")])
            assert (reply.status, reply.body) == (200, b"{}")
            assert s.stop() == 0
        return
    got = run_cli([], {**env, "LIVEKIT_JWT_BIND": f"127.0.0.1:{free_port()}"})
    assert got.code == 1 and fault in got.err, got


@pytest.mark.parametrize("name, change, fault", CONFIGS, ids=[c[0] for c in CONFIGS])
def test_configuration(peers, name, change, fault):
    starts(as_env(*peers, **change), fault)


def test_standalone_off_needs_the_mode():
    got = run_cli([], base_env(LKJWT_STANDALONE="off", LIVEKIT_JWT_BIND=f"127.0.0.1:{free_port()}"))
    assert got.code == 1 and "nobody could ask" in got.err


@pytest.mark.parametrize("name, text, fault", FILES, ids=[f[0] for f in FILES])
def test_registration_file(peers, tmp_path, name, text, fault):
    file = tmp_path / "registration.yaml"
    file.write_bytes(text.encode())
    # It wins over what else is set.
    starts(as_env(*peers, LIVEKIT_AS_REGISTRATION_FILE=str(file), LIVEKIT_AS_TOKEN="x" * 40, LIVEKIT_HS_TOKEN="y" * 40),
           fault)


def test_tokens_from_files(peers, tmp_path):
    for name, value in ("as", AS_TOKEN), ("hs", HS_TOKEN):
        (tmp_path / name).write_text(value + "\n")
    starts(as_env(*peers, LIVEKIT_AS_TOKEN=None, LIVEKIT_HS_TOKEN="z" * 40, LKJWT_AS_TOKEN_FROM_FILE=tmp_path / "as",
                  LKJWT_HS_TOKEN_FROM_FILE=tmp_path / "hs"), None)
    (tmp_path / "hs").write_text("\n")
    starts(as_env(*peers, LKJWT_HS_TOKEN_FROM_FILE=tmp_path / "hs"), "file is empty")
    starts(as_env(*peers, LKJWT_AS_TOKEN_FROM_FILE=tmp_path / "nothing"), "LKJWT_AS_TOKEN_FROM_FILE")


def test_registration_is_printed_and_read_again(peers, tmp_path):
    env = {"LIVEKIT_HS_SERVER_NAME": "as.test"}
    one, two = (run_cli(["--registration", "http://lkjwt:8080"], env).out for _ in range(2))
    tokens = re.findall(r"^(?:as|hs)_token: ([0-9a-f]{64})$", one + two, re.M)
    assert len(set(tokens)) == 4
    assert "regex: '@.*:as\\.test'" in one and one.count("proxy_url: http://lkjwt:8080") == 2
    file = tmp_path / "r.yaml"
    file.write_text(one)
    with Service(as_env(*peers, LIVEKIT_AS_TOKEN=None, LIVEKIT_HS_TOKEN=None,
                        LIVEKIT_AS_REGISTRATION_FILE=str(file))) as s:
        assert s.request("POST", PING, "{}", [("Authorization", f"Bearer {tokens[1]}")]).status == 200
    assert run_cli(["--registration"], {}).code == 1
    for bad in ("ftp://x", "ws://x", "lkjwt:8080", "http://a b", ""):
        assert run_cli(["--registration", bad], env).code == 1, bad


def test_our_token_goes_to_the_api_and_encrypted(pki):
    """By discovery: an http:// base URL is not taken, an https:// one is; without any, the client is told so."""
    name = "127.0.0.77"
    front = HttpServer((name, 443), tls=pki.leaf(ips=[name]))
    plain, secure, sfu = Home(), Home((name, 0), tls=pki.leaf(ips=[name])), RoomSfu()
    try:
        for base, home, status in (f"http://127.0.0.1:{plain.port}/", plain, 400), (f"https://{name}:{secure.port}/", secure,
                                                                                   200), ("", plain, 400):
            front.on("/.well-known/matrix/client", Reply(200, {"m.homeserver": {"base_url": base}}))
            env = as_env(home, sfu, LIVEKIT_HS_SERVER_NAME=name, LIVEKIT_CS_API_URL_OVERRIDES=None, LKJWT_CA_ONLY="true",
                         LKJWT_CA_FILE=pki.ca_file, LKJWT_ALLOW_NETWORKS="127.0.0.0/8")
            user, room = f"@u:{name}", f"!room{next(_serial)}:{name}"
            home.joined.add((room, user))
            with Service(env) as s:
                reply = s.post(GET, body_of(room), [("Authorization", f"Bearer {HS_TOKEN}"),
                                                    ("X-Matrix-User-Identifier", user)])
                assert reply.status == status, (base, reply, s.log_text())
                if status == 400:
                    refused(reply, 400, "M_BAD_JSON")
        assert not plain.requests and not plain.accepted and secure.requests
    finally:
        for peer in (front, plain, secure, sfu):
            peer.stop()


# ---- the first contact, and --check

LACKS = [  # name, what is changed of the homeserver, words of the log
    ("no MSC4502", lambda h: setattr(h, "odd", Reply(404, UNRECOGNIZED)), "MSC4502"),
    ("no scope", lambda h: setattr(h, "odd", Reply(403, {"errcode": "M_FORBIDDEN"})), "scope"),
    ("token", lambda h: setattr(h, "odd", Reply(401, {"errcode": "M_UNKNOWN_TOKEN"})), "LIVEKIT_AS_TOKEN"),
    ("no MSC4512", lambda h: h.on("/_matrix/client/unstable/io.element.msc4512/appservice/fed_proxy",
                                  Reply(404, UNRECOGNIZED)), "MSC4512"),
]


@pytest.mark.parametrize("name, change, words", LACKS, ids=[x[0] for x in LACKS])
def test_what_the_homeserver_lacks_is_told_at_the_start(name, change, words):
    w = World()
    change(w.home)
    with w:
        assert words in w.svc.wait_event("AS_LACKS", server=HS)["detail"]
        assert not w.svc.events("AS_READY")
        assert w.svc.request("GET", "/healthz").status == 200


def test_check(peers):
    home, sfu = Home(), RoomSfu()
    try:
        home.on("/_matrix/client/v1/appservice/lkjwt/ping", Reply(400, {"errcode": "M_URL_NOT_SET"}))
        home.on(GET, Reply(400, {"errcode": "M_BAD_JSON"}))
        env = as_env(home, sfu)

        def check():
            got = run_cli(["--check"], env)
            assert AS_TOKEN not in got.text and HS_TOKEN not in got.text
            return got.code, {line.split()[1]: (line.split()[0], line) for line in got.out.splitlines()[:-1]}
        code, lines = check()
        assert code == 0 and all(lines[s][0] == "ok" for s in ("ping", "is_joined", "fed_proxy", "proxy")), lines
        for path, reply, step, words in [
                ("/_matrix/client/v1/appservice/lkjwt/ping", Reply(403, {"errcode": "M_FORBIDDEN"}), "ping", "M_FORBIDDEN"),
                (GET, Reply(401, {"errcode": "M_UNKNOWN_TOKEN"}), "proxy", "M_UNKNOWN_TOKEN"),
                (GET, Reply(404, UNRECOGNIZED), "proxy", "proxy_prefix"),
                (GET, Reply(502, {}), "proxy", "unexpected")]:
            before = home.hooks[path]
            home.on(path, reply)
            code, lines = check()
            assert code == 1 and lines[step][0] == "no" and words in lines[step][1], lines
            home.on(path, before)
    finally:
        home.stop()
        sfu.stop()


def test_no_secret_of_the_mode_is_shown(world):
    got = run_cli(["--print-config"], world.svc.env)
    assert AS_TOKEN not in got.text and HS_TOKEN not in got.text
    assert "LIVEKIT_AS_TOKEN=********" in got.out and "LIVEKIT_HS_TOKEN=********" in got.out
    environ = Path(f"/proc/{world.svc.pid}/environ")
    assert AS_TOKEN not in world.svc.log_text() and HS_TOKEN not in world.svc.log_text()
    assert environ.exists()
