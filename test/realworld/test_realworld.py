"""The service between real homeservers, a real SFU and real clients."""
import asyncio
import base64
import hashlib
import json
import signal
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jwt as pyjwt
import pytest
from livekit import rtc

from caller import Call
from peers import Pki, Reply, wait_for
from service import CANARY_KEY, CANARY_PASSWORD, CANARY_SECRET, DEADLINE, Service, run_cli
from servers import User, die_with_us

PATHS = ("/get_token", "/sfu/get")
SLOT = "m.call#ROOM"
REFUSED = {"errcode": "M_UNAUTHORIZED", "error": "The request could not be authorised."}
NO_ROOM = {"errcode": "M_UNKNOWN", "error": "Unable to create room on SFU"}

paths = pytest.mark.parametrize("path", PATHS, ids=["get_token", "sfu_get"])


def formula(*parts):
    """Names on the SFU, by a second implementation of the canonical JSON."""
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def new_room(server):
    return f"!{uuid.uuid4().hex}:{server.server_name}"


class Ask:
    """A token request of a user for a Matrix room, and what must come of it."""

    def __init__(self, path, user, room, openid=None, device=None, member=None, claimed=None):
        openid, device = openid or user.openid(), device or user.device
        self.path, self.alias = path, formula(room, SLOT)
        if path == "/get_token":
            member = member or str(uuid.uuid4())
            self.identity = formula(user.id, device, member)
            self.body = {"room_id": room, "slot_id": SLOT, "openid_token": openid,
                         "member": {"id": member, "claimed_user_id": claimed or user.id,
                                    "claimed_device_id": device}}
        else:
            self.identity = f"{user.id}:{device}"
            self.body = {"room": room, "openid_token": openid, "device_id": device}

    def send(self, service):
        return service.post(self.path, self.body)

    def granted(self, service, full):
        """The reply, after a look at every claim."""
        reply = self.send(service)
        assert reply.status == 200, (reply, service.log_text()[-3000:])
        grant = reply.json
        assert list(grant) == ["url", "jwt"] and grant["url"] == service.env["LIVEKIT_URL"]
        assert pyjwt.get_unverified_header(grant["jwt"]) == {"alg": "HS256", "typ": "JWT"}
        claims = pyjwt.decode(grant["jwt"], CANARY_SECRET, algorithms=["HS256"])
        assert claims["exp"] - claims["nbf"] == 3600 and claims["iat"] == claims["nbf"]
        assert {k: v for k, v in claims.items() if k not in ("exp", "nbf", "iat")} == {
            "iss": CANARY_KEY, "sub": self.identity, "identity": self.identity,
            "video": {"roomJoin": True, "room": self.alias, "canPublish": full, "canSubscribe": True,
                      "canUpdateOwnMetadata": True}}
        granted.append(grant["jwt"])
        return grant


granted = []    # every join token, for the search of the logs


def refused(reply, status=401, body=REFUSED):
    assert reply.status == status and reply.json == body, reply
    assert reply.header("access-control-allow-origin") == "*"


def logged(service, count=1, since=0, **match):
    """The log lines that match, once there are so many: a reply may overtake its line."""
    def ask():
        found = [e for e in service.log()[since:] if all(e.get(k) == v for k, v in match.items())]
        return found if len(found) >= count else None
    try:
        return wait_for(f"{match} in the log", ask, DEADLINE)
    except TimeoutError as e:
        raise AssertionError(f"{e}:\n{service.log_text()[-3000:]}") from None


# ---- calls

@paths
def test_two_users_hear_and_read_each_other(roles, world, path):
    room = new_room(roles.home)
    ann, bob = (Ask(path, user, room) for user in roles.users[:2])
    assert world.sfu.room(ann.alias) is None
    grants = [a.granted(roles.service, full=True) for a in (ann, bob)]

    on_sfu = world.sfu.room(ann.alias)
    assert (on_sfu["empty_timeout"], on_sfu["departure_timeout"]) == (300, 20)

    async def talk():
        async with Call() as call:
            a, b = [await call.join(g) for g in grants]
            for c, ask in (a, ann), (b, bob):
                assert c.room.name == ask.alias and c.room.local_participant.identity == ask.identity
            await a.sing(440)
            await b.sing(1000)
            await asyncio.gather(a.hears(bob.identity, 1000), b.hears(ann.identity, 440))
            for size in (1, 14000):
                text = bytes(range(256)) * 60
                await a.say(text[:size])
                assert await b.reads() == (ann.identity, text[:size])
                await b.say(text[-size:])
                assert await a.reads() == (bob.identity, text[-size:])
            there = world.sfu.participants(ann.alias)
            assert set(there) == {ann.identity, bob.identity}
            for p in there.values():
                assert p["state"] == "ACTIVE" and p["permission"]["can_publish"] is True
                assert [(t["type"], t["source"], t["muted"]) for t in p["tracks"]] == [
                    ("AUDIO", "MICROPHONE", False)]
    asyncio.run(talk())


def test_guest_cannot_open_a_room_nor_publish_but_receives(roles, world):
    async def visit(path):
        room = new_room(roles.home)
        guest, ann, bob = (Ask(path, user, room) for user in (roles.guests[0], *roles.users[:2]))
        grant = guest.granted(roles.service, full=False)
        async with Call() as call:
            with pytest.raises(rtc.ConnectError, match="room does not exist"):
                await call.join(grant)
            assert world.sfu.room(guest.alias) is None

            a = await call.join(ann.granted(roles.service, full=True))
            b = await call.join(bob.granted(roles.service, full=True))
            g = await call.join(grant)
            assert g.room.local_participant.identity == guest.identity

            await a.sing(440)
            await g.hears(ann.identity, 440)
            await a.say(b"to all")
            assert await g.reads() == await b.reads() == (ann.identity, b"to all")

            with pytest.raises(rtc.participant.PublishTrackError):
                await g.publish()
            await g.say(b"not allowed")
            # What the guest sent would have come before this.
            await b.say(b"bob")
            assert await a.reads() == (bob.identity, b"bob")
            assert await g.reads() == (bob.identity, b"bob")
            assert a.read.empty() and b.read.empty()
            on_sfu = world.sfu.participants(guest.alias)
            assert set(on_sfu) == {guest.identity, ann.identity, bob.identity}
            me = on_sfu[guest.identity]
            assert me["state"] == "ACTIVE" and not me.get("tracks")
            assert me["permission"]["can_subscribe"] is True and not me["permission"].get("can_publish")
            assert not me["permission"].get("can_publish_data")

    async def visits():
        # At once: the SDK takes ten seconds to see that publishing is denied.
        await asyncio.gather(*map(visit, PATHS))
    asyncio.run(visits())


@paths
def test_join_token_is_no_key_to_the_room_service(roles, world, path):
    room = new_room(roles.home)
    for ask, full in (Ask(path, roles.users[0], room), True), (Ask(path, roles.guests[0], room), False):
        token = ask.granted(roles.service, full)["jwt"]
        for method, body in (("CreateRoom", {"name": formula(room, "another")}), ("DeleteRoom", {"room": ask.alias}),
                             ("ListRooms", {}), ("ListParticipants", {"room": ask.alias})):
            status, reply = world.sfu.ask(method, body, token=token)
            assert status == 401 and reply["code"] == "unauthenticated", (method, reply)
    assert world.sfu.room(ask.alias) is not None
    assert world.sfu.room(formula(room, "another")) is None


@paths
def test_room_and_user_on_the_sfu_are_the_same_for_all_who_ask_alike(roles, world, path):
    """A token twice, and from the guest's point of view: one room, one identity."""
    room, user = new_room(roles.home), roles.users[2]
    openid = user.openid()
    first, second = (Ask(path, user, room, openid=openid, member="m") for _ in range(2))
    one, two = first.granted(roles.service, full=True), second.granted(roles.service, full=True)

    async def replace():
        async with Call() as call:
            old = await call.join(one)
            await call.join(two)
            assert set(world.sfu.participants(first.alias)) == {first.identity}
            assert old.room.name == first.alias
    asyncio.run(replace())


def test_many_at_once_are_not_mixed_up(roles, world):
    """Users of both servers, both paths, four devices each, in two rooms: everyone gets what is theirs."""
    rooms = [new_room(roles.home) for _ in range(2)]
    asks = [(Ask(path, user, room, device=f"DEVICE{n}"), user in roles.users)
            for path in PATHS for room in rooms for user in roles.users + roles.guests for n in range(4)]
    with ThreadPoolExecutor(len(asks)) as pool:
        done = [pool.submit(ask.granted, roles.service, full) for ask, full in asks]
        tokens = {one.result()["jwt"] for one in done}
    assert len(tokens) == len(asks)
    assert all(world.sfu.room(formula(room, SLOT)) for room in rooms)


# ---- lies

def token_of(user):
    return user.openid()["access_token"]


# what is false: token, server name and user of the request, and what the log says of it
LIES = {
    "no such token": lambda w: (token_of(w.ann) + "x", w.home, w.ann, "TOKEN_UNKNOWN"),
    "client token": lambda w: (w.ann.access_token, w.home, w.ann, "TOKEN_UNKNOWN"),
    "guest's token under the home server's name": lambda w: (token_of(w.guest), w.home, w.ann, "TOKEN_UNKNOWN"),
    "home token under the guest server's name": lambda w: (token_of(w.ann), w.guest_home, w.guest, "TOKEN_UNKNOWN"),
    "server's address for its name": lambda w: (token_of(w.ann), w.home_addr, w.ann, "SUB_BAD"),
    "name without an address": lambda w: (token_of(w.ann), "gamma.test", w.ann, None),
    "port where nothing listens": lambda w: (token_of(w.ann), w.home.split(":")[0] + ":8447", w.ann,
                                             "CONNECT_FAILED"),
    "other user's name": lambda w: (token_of(w.ann), w.home, w.bob, "CLAIM_MISMATCH"),
    "own name in upper case": lambda w: (token_of(w.ann), w.home, w.shouting, "CLAIM_MISMATCH"),
}
CLAIMS = ("other user's name", "own name in upper case")    # the old path claims no user


@pytest.mark.parametrize("path, lie", [pytest.param(path, lie, id=f"{path[1:].replace('/', '_')}-{lie}")
                                       for path in PATHS for lie in LIES
                                       if not (path == "/sfu/get" and lie in CLAIMS)])
def test_lie_is_refused(roles, world, path, lie):
    ann, bob = roles.users[:2]
    token, server, user, event = LIES[lie](SimpleNamespace(
        ann=ann, bob=bob, guest=roles.guests[0], home=roles.home.server_name, guest_home=roles.guest.server_name,
        home_addr="matrix.alpha.test:8448" if roles.home is world.alpha else roles.home.addr,
        shouting=SimpleNamespace(id=ann.id.upper(), device=ann.device)))
    ask = Ask(path, user, new_room(roles.home), openid={
        "access_token": token, "token_type": "Bearer", "expires_in": 3600, "matrix_server_name": server})
    seen = len(roles.service.log())
    refused(ask.send(roles.service))
    if event:
        logged(roles.service, since=seen, event=event, server=server)
    assert world.sfu.room(ask.alias) is None


# ---- failures

@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_homeserver_gone_is_named_and_comes_back(roles, world, how):
    """Refused at once where nothing listens, by the deadline where nothing answers; the other
    homeserver's users notice nothing, and the same token works when the server is back."""
    service, server, room = roles.service, roles.home, new_room(roles.home)
    asks = [Ask(path, roles.users[0], room) for path in PATHS]
    others = [Ask(path, roles.guests[0], room) for path in PATHS]
    asks[0].granted(service, full=True)

    seen = len(service.log())
    if how == "stopped":
        server.stop()
    else:
        server.proc.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor() as pool:
            waiting = [pool.submit(ask.send, service) for ask in asks]
            for ask in others:
                ask.granted(service, full=False)
            for reply in waiting:
                refused(reply.result())
        named = logged(service, len(asks), seen, addr=server.addr, server=server.server_name)
        assert {e.get("step") for e in named} <= ({"connect"} if how == "stopped" else {"tls", "http"}), named
    finally:
        if how == "stopped":
            server.start().ready()
        else:
            server.proc.send_signal(signal.SIGCONT)
    for ask in asks:
        ask.granted(service, full=True)


def test_sfu_gone_is_500_and_comes_back(roles, world):
    service, room = roles.service, new_room(roles.home)
    world.sfu.stop()
    try:
        for path in PATHS:
            seen = len(service.log())
            refused(Ask(path, roles.users[0], room).send(service), 500, NO_ROOM)
            logged(service, since=seen, addr="127.0.0.1:7880")
            # No room is made for a guest, so none is missed.
            Ask(path, roles.guests[0], room).granted(service, full=False)
    finally:
        world.sfu.start().ready()
    for path in PATHS:
        ask = Ask(path, roles.users[0], room)
        ask.granted(service, full=True)
        assert world.sfu.room(ask.alias) is not None


BROKEN = {
    # variables that spoil it: (status, body, log keys that name the failure)
    "other CA": ({"SSL_CERT_FILE": "{other_ca}"}, 401, REFUSED, {"step": "tls", "event": "TLS_UNTRUSTED"}),
    "wrong secret": ({"LIVEKIT_SECRET": "not-the-secret-of-the-sfu-0123456789"}, 500, NO_ROOM,
                     {"addr": "127.0.0.1:7880"}),
    "nothing listens": ({"LKJWT_HOSTS_FILE": "{other_hosts}"}, 401, REFUSED, {"step": "connect"}),
    "blocked": ({"LKJWT_BLOCKED_HOMESERVERS": "alpha.test,beta.test:8449"}, 401, REFUSED, {"event": "SERVER_DENIED"}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_set_up_is_named(roles, world, env, tmp_path, what):
    more, status, body, named = BROKEN[what]
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.9 alpha.test beta.test\n")
    names = {"{other_ca}": Pki(str(tmp_path / "pki")).ca_file, "{other_hosts}": str(hosts)}
    more = {k: names.get(v, v) for k, v in more.items()}
    with Service(env(roles.home.server_name, **more), preexec_fn=die_with_us) as service:
        ask = Ask("/get_token", roles.users[0], new_room(roles.home))
        refused(ask.send(service), status, body)
        if what == "other CA" and roles.home is world.alpha:
            # Then 8448 is tried in vain; the log must tell of the cause, too.
            named = {"step": "well-known", "addr": "127.0.0.2:443"}
        logged(service, **named)
        assert service.stop() == 0
    assert world.sfu.room(ask.alias) is None


WAYS = {
    "userinfo by an override, plain HTTP, no name known":
        {"LKJWT_FEDERATION_API_URL_OVERRIDES": "{name}={url}/", "LKJWT_HOSTS_FILE": "/dev/null", "SSL_CERT_FILE": ""},
    "SFU by another URL than the clients'":
        {"LIVEKIT_URL": "wss://sfu.example.org/livekit", "LKJWT_LIVEKIT_API_URL": "{sfu}/"},
    "own CA alone": {"SSL_CERT_FILE": "", "LKJWT_CA_FILE": "{ca}", "LKJWT_CA_ONLY": "true"},
    "everyone": {"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*", "LKJWT_ALLOW_NETWORKS": ""},
}


@pytest.mark.parametrize("way", WAYS)
def test_other_set_up_works(roles, world, env, pki, way):
    values = {"name": roles.home.server_name, "url": roles.home.url, "sfu": world.sfu.http, "ca": pki.ca_file}
    more = {k: v.format(**values) for k, v in WAYS[way].items()}
    with Service(env(roles.home.server_name, **more), preexec_fn=die_with_us) as service:
        for path in PATHS:
            ask = Ask(path, roles.users[0], new_room(roles.home))
            ask.granted(service, full=True)
            assert world.sfu.room(ask.alias) is not None
        assert service.stop() == 0


def test_private_address_of_a_stranger_is_not_dialled(roles, env):
    """A real homeserver on a private address serves only who names it; what the log advises lets it."""
    home, room = roles.home.server_name, new_room(roles.home)
    with Service(env(home, LKJWT_ALLOW_NETWORKS=""), preexec_fn=die_with_us) as service:
        Ask("/get_token", roles.users[0], room).granted(service, full=True)
        refused(Ask("/get_token", roles.guests[0], room).send(service))
        advice = [e["allow"] for e in logged(service, event="SSRF_DENIED") if "allow" in e]
        assert service.stop() == 0
    networks = ",".join(a.removeprefix("LKJWT_ALLOW_NETWORKS=") for a in advice)
    if roles.guest.server_name == "alpha.test":
        networks += f",{roles.guest.ip}/32"    # the second hop, not yet heard of
    with Service(env(home, LKJWT_ALLOW_NETWORKS=networks), preexec_fn=die_with_us) as service:
        Ask("/get_token", roles.guests[0], room).granted(service, full=False)
        assert service.stop() == 0


def test_check_walks_the_way_to_the_homeserver(roles, env, world):
    """And the one that its clients go, through a proxy to the service."""
    def pass_on(req):
        reply = roles.service.request(req.method, "/get_token", req.body)
        return Reply(reply.status, reply.body)
    world.front.on("/livekit/jwt/get_token", pass_on)
    done = run_cli(["--check", roles.home.server_name], env(roles.home.server_name))
    assert done.code == 0 and roles.home.addr in done.text, done
    assert "focus       https://alpha.test/livekit/jwt: answers\n" in done.out, done
    done = run_cli(["--check", "gamma.test"], env(roles.home.server_name))
    assert done.code != 0, done


# ---- last: after all of the above

def test_zz_no_token_nor_secret_in_any_log(services):
    secrets = {CANARY_SECRET, CANARY_PASSWORD, *granted, *User.issued, *(g.split(".")[2] for g in granted)}
    assert granted and User.issued
    for service in services.values():
        text = service.log_text() + service.stdout_text()
        assert "event=GRANTED" in text
        assert not [s for s in secrets if s in text]
