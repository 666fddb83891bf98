"""Behind the homeserver: two real Synapses that federate, each with a service
of ours as its application service, one SFU between them, and users who get
their tokens from their homeservers alone."""
import asyncio
import json
import urllib.parse
import uuid
from types import SimpleNamespace

import jwt as pyjwt
import pytest

from caller import Call, Elsewhere
from peers import Pki
from service import CANARY_KEY, CANARY_SECRET, Service, free_port, run_cli
from servers import LiveKit, Synapse, call, die_with_us
from test_leave import DEVICE, HOUR, Leave, eventually
from test_realworld import SLOT, formula, granted, logged

STATE = "org.matrix.msc3401.call.member"
GAMMA, DELTA, BARE = "127.0.0.6", "127.0.0.7", "127.0.0.8"
PORT = 8449
INTERVAL = 3        # seconds; kicked users may stay on the SFU for so long
UNSTABLE = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit"
STABLE = "/_matrix/client/v1/rtc/livekit"
KNOWS = {"msc4512_enabled": True, "msc4502_enabled": True}


class Site:
    """A homeserver, and the service that is its application service."""

    def __init__(self, folder, ip, pki, sfu_url, knows=KNOWS):
        self.port = free_port()
        self.name = f"{ip}:{PORT}"
        made = run_cli(["--registration", f"http://127.0.0.1:{self.port}"], {"LIVEKIT_HS_SERVER_NAME": self.name})
        assert made.code == 0, made
        self.folder = folder / ip
        self.folder.mkdir()
        self.registration = self.folder / "registration.yaml"
        self.registration.write_text(made.out)
        self.tokens = [line.split()[1] for line in made.out.splitlines() if line[2:9] == "_token:"]
        assert len(self.tokens) == 2 and all(len(t) == 64 for t in self.tokens)
        self.hs = Synapse(self.folder / "synapse", self.name, ip, PORT, pki.leaf([], [ip]), ["client", "federation"],
                          app_service_config_files=[str(self.registration)], experimental_features=knows,
                          ip_range_blacklist=[], federation_custom_ca_list=[pki.ca_file],
                          rc_delayed_event_mgmt={"per_second": 1000, "burst_count": 1000})
        self.env = {
            "LIVEKIT_URL": sfu_url, "LIVEKIT_KEY": CANARY_KEY, "LIVEKIT_SECRET": CANARY_SECRET,
            "LKJWT_STANDALONE": "off", "LIVEKIT_AS_REGISTRATION_FILE": str(self.registration),
            "LIVEKIT_HS_SERVER_NAME": self.name, "LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS": str(INTERVAL),
            "LIVEKIT_CS_API_URL_OVERRIDES": f"{self.name}={self.hs.url}", "LKJWT_UID": "0",
            "SSL_CERT_FILE": pki.ca_file, "LIVEKIT_JWT_BIND": f"127.0.0.1:{self.port}"}
        self.service = None

    def serve(self):
        self.service = Service(self.env, preexec_fn=die_with_us).start()

    def stop(self):
        self.hs.stop()
        if self.service:
            assert self.service.stop() == 0


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """gamma and delta; neither serves clients' own requests."""
    folder = tmp_path_factory.mktemp("appservice")
    pki = Pki(str(folder / "pki"))
    ports, sfu_port = [], 7900
    url = f"ws://127.0.0.1:{sfu_port}"
    gamma, delta = (Site(folder, ip, pki, url) for ip in (GAMMA, DELTA))
    ports = [gamma.port, delta.port]
    sfu = LiveKit(folder / "sfu", port=sfu_port, webhook=[f"http://127.0.0.1:{p}/sfu_webhook" for p in ports])
    try:
        for s in (gamma.hs, delta.hs, sfu):
            s.start()
        for s in (gamma.hs, delta.hs, sfu):
            s.ready()
        for s in (gamma, delta):
            s.serve()
        yield SimpleNamespace(gamma=gamma, delta=delta, sfu=sfu, pki=pki, folder=folder, gs=gamma.service,
                              ds=delta.service, ann=gamma.hs.register("ann"), bob=gamma.hs.register("bob"),
                              dan=delta.hs.register("dan"), eve=delta.hs.register("eve"))
    finally:
        sfu.stop()
        for s in (gamma, delta):
            s.stop()


class Ask:
    """A user's request at their own homeserver."""

    def __init__(self, user, room, member=None, **more):
        self.user, self.alias = user, formula(room, SLOT)
        self.member = member or str(uuid.uuid4())
        self.identity = formula(user.id, self.member)
        self.body = {"room_id": room, "slot_id": SLOT, "member_id": self.member, **more}

    def send(self, base=UNSTABLE, path="/get_token", **more):
        return call(self.user.server.url + base + path, {**self.body, **more}, self.user.access_token)

    def granted(self, publish, **more):
        status, got = self.send(**more)
        assert status == 200, got
        assert list(got) == ["jwt"], got
        claims = pyjwt.decode(got["jwt"], CANARY_SECRET, algorithms=["HS256"])
        assert claims["exp"] - claims["nbf"] == 600 and claims["iat"] == claims["nbf"]
        assert claims["sub"] == claims["identity"] == self.identity
        assert claims["video"] == {"roomJoin": True, "room": self.alias, "canPublish": publish, "canSubscribe": True,
                                   "canUpdateOwnMetadata": True}
        granted.append(got["jwt"])
        return {"url": self.body["url"], "jwt": got["jwt"]}


def room_of(sites, *guests):
    """A room of ann's, with users of both homeservers in it."""
    room = sites.ann.create_room(STATE)
    for user in guests:
        query = f"?server_name={urllib.parse.quote(sites.gamma.name)}" if user.server is not sites.gamma.hs else ""
        status, got = user.ask(f"/join/{urllib.parse.quote(room)}{query}", {})
        assert status == 200, got
    return room


def kick(by, user, room):
    status, got = by.ask(f"/rooms/{urllib.parse.quote(room)}/kick", {"user_id": user.id})
    assert status == 200, got


def test_the_homeservers_are_found_ready(sites):
    for s in (sites.gamma, sites.delta):
        s.service.wait_event("AS_READY", server=s.name)
        assert not s.service.events("AS_LACKS")


def test_check_says_that_all_is_well(sites):
    got = run_cli(["--check"], sites.gamma.env)
    lines = {line.split()[1]: line.split()[0] for line in got.out.splitlines() if line[:2] in ("ok", "no")}
    assert {k: lines.get(k) for k in ("ping", "is_joined", "fed_proxy", "proxy")} == dict.fromkeys(
        ("ping", "is_joined", "fed_proxy", "proxy"), "ok"), got
    assert got.code == 0, got


@pytest.mark.parametrize("base", [UNSTABLE, STABLE], ids=["unstable", "stable"])
def test_users_of_both_homeservers_are_in_one_call(sites, base):
    room = room_of(sites, sites.bob, sites.dan)
    url = sites.sfu.url
    ann, bob = Ask(sites.ann, room, url=url), Ask(sites.bob, room, url=url)
    dan = Ask(sites.dan, room, url=url, server_name=sites.gamma.name)
    grants = [ann.granted(True, base=base), bob.granted(True, base=base), dan.granted(False, base=base)]

    async def talk():
        async with Call() as call:
            a, b, d = [await call.join(g) for g in grants]
            await a.sing(440)
            await b.sing(1000)
            await asyncio.gather(a.hears(bob.identity, 1000), b.hears(ann.identity, 440),
                                 d.hears(ann.identity, 440), d.hears(bob.identity, 1000))
            there = sites.sfu.participants(ann.alias)
            assert {i: p["permission"].get("can_publish", False) for i, p in there.items()} == {
                ann.identity: True, bob.identity: True, dan.identity: False}
    asyncio.run(talk())
    sites.ds.wait_event("RELAYED", server=sites.gamma.name)


def test_who_is_not_in_the_room_gets_nothing(sites):
    room = room_of(sites)
    url = sites.sfu.url
    assert Ask(sites.bob, room, url=url).send()[0] == 403
    # His homeserver is not in the room, so it does not even ask.
    status, got = Ask(sites.dan, room, url=url, server_name=sites.gamma.name).send()
    assert (status, got["errcode"]) == (403, "M_FORBIDDEN")
    assert sites.sfu.room(formula(room, SLOT)) is None
    # Nobody's room.
    status, got = Ask(sites.ann, f"!nowhere:{sites.gamma.name}", url=url).send()
    assert (status, got["errcode"]) == (403, "M_FORBIDDEN")
    # The SFU is not what was asked for, here and there.
    room = room_of(sites, sites.dan)
    for user, more in (sites.ann, {}), (sites.dan, {"server_name": sites.gamma.name}):
        status, got = Ask(user, room, url="wss://elsewhere.example.org", **more).send()
        assert (status, got["errcode"]) == (400, "M_INVALID_PARAM"), got
    # No homeserver is there.
    status, got = Ask(sites.ann, room, url=url, server_name="127.0.0.9:1").send()
    assert (status, got["errcode"]) == (403, "M_FORBIDDEN"), got


@pytest.mark.parametrize("whose", ["local", "federated"])
def test_who_is_kicked_is_off_the_sfu_and_stays_off(sites, whose):
    user = sites.bob if whose == "local" else sites.dan
    room = room_of(sites, user)
    more = {} if whose == "local" else {"server_name": sites.gamma.name}
    ann = Ask(sites.ann, room, url=sites.sfu.url)
    ask = Ask(user, room, url=sites.sfu.url, **more)
    grants = [ann.granted(True), ask.granted(whose == "local")]
    there = Elsewhere(*grants)
    try:
        assert {ann.identity, ask.identity} <= set(sites.sfu.participants(ann.alias))
        kick(sites.ann, user, room)
        eventually("the kicked user to be off the SFU", lambda: ask.identity not in sites.sfu.participants(ann.alias))
        logged(sites.gs, event="SEAT_REMOVED", user=user.id, room=ann.alias)
        # The token still lets in; not for long.
        again = Elsewhere(grants[1])
        try:
            eventually("the kicked user to be off again", lambda: ask.identity not in sites.sfu.participants(ann.alias))
            logged(sites.gs, count=2, event="SEAT_REMOVED", user=user.id, room=ann.alias)
        finally:
            again.kill()
        assert ann.identity in sites.sfu.participants(ann.alias)
        eventually("no new token", lambda: ask.send()[0] == 403)
    finally:
        there.kill()


def test_delegated_leave_by_authenticated_calls(sites):
    room = room_of(sites, sites.bob)
    url = sites.sfu.url
    leave = Leave(sites.ann, room)
    ask = Ask(sites.ann, room, url=url)
    grant = ask.granted(True)
    # What is another's, or nobody's, or of another room.
    theirs = Ask(sites.bob, room, url=url)
    for one, more in (theirs, {"delay_id": leave.id}), (ask, {"delay_id": "syd_nothing"}), (
            Ask(sites.ann, room_of(sites), url=url), {"delay_id": leave.id}):
        status, got = one.send(path="/delegate_delayed_leave", **more)
        assert (status, got["errcode"]) == (400, "M_INVALID_PARAM"), got
    assert ask.send(path="/delegate_delayed_leave", delay_id=leave.id) == (200, {})

    def calls(action):
        log = sites.gamma.hs.log_file.read_text()
        return [line for line in log.splitlines() if "Processed request" in line
                and f"/delayed_events/{leave.id}/{action}" in line]
    eventually("the restart while waiting", lambda: calls("restart"))
    there = Elsewhere(grant)
    try:
        assert ask.identity in sites.sfu.participants(ask.alias) and not leave.sent()
        there.leave()
        eventually("the leave event in the room", leave.sent)
        sent = eventually("the homeserver's line", lambda: calls("send"))
        for line in sent + calls("restart"):
            assert f"user_id={urllib.parse.quote(sites.ann.id, safe='')}" in line, line
    finally:
        there.kill()


def test_a_short_delay_is_postponed_while_nobody_has_joined(sites):
    room = room_of(sites)
    leave = Leave(sites.ann, room, delay=8000)
    ask = Ask(sites.ann, room, url=sites.sfu.url)
    assert ask.send(path="/delegate_delayed_leave", delay_id=leave.id) == (200, {})
    clock = Leave(sites.ann, room, "CLOCK", delay=24_000)
    eventually("an event nobody restarts", clock.sent)
    assert not leave.sent()
    there = Elsewhere(ask.granted(True))
    there.leave()
    eventually("the leave event in the room", leave.sent)


def test_a_homeserver_without_the_mscs_is_named_in_words(sites):
    bare = Site(sites.folder, BARE, sites.pki, sites.sfu.url, knows={})
    try:
        bare.hs.start().ready()
        bare.serve()
        said = bare.service.wait_event("AS_LACKS", server=bare.name)
        assert "MSC4502" in said["detail"] and "msc4502_enabled" in said["detail"]
        got = run_cli(["--check"], bare.env)
        assert got.code == 1
        for step, words in ("is_joined", "MSC4502"), ("fed_proxy", "MSC4512"), ("proxy", "MSC4512"):
            assert any(line.startswith("no ") and line.split()[1] == step and words in line
                       for line in got.out.splitlines()), got
    finally:
        bare.stop()


def test_nothing_of_the_application_service_is_in_a_log(sites):
    secrets = [*sites.gamma.tokens, *sites.delta.tokens]
    assert len(secrets) == 4
    for s in (sites.gs, sites.ds):
        text = s.log_text() + json.dumps(s.stdout_text())
        assert not [t for t in secrets if t in text]
