"""Delegated delayed leave: a user schedules the end of their membership on a
real homeserver, an hour ahead, hands it to the service, joins by LiveKit's
SDK and goes. All cases run side by side, for most of their time is waiting."""
import itertools
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest

from caller import Elsewhere
from service import CANARY_PASSWORD, CANARY_SECRET, Service, free_port
from servers import LiveKit, User, call, die_with_us
from test_realworld import SLOT, Ask, formula, granted, logged, refused

STATE = "org.matrix.msc3401.call.member"
DEVICE = "PHONE"
HOUR = 3_600_000
LONG = 240     # seconds; only a hang is longer
DELEGATE = "/delegate_delayed_leave"
RESTRICTED = "Delegation of delayed events is only supported for full access users"


def eventually(what, ask):
    end = time.monotonic() + LONG
    while not (got := ask()):
        assert time.monotonic() < end, f"waited {LONG} s for {what}"
        time.sleep(0.5)
    return got


class Leave:
    """A membership in a room of the homeserver, and the event that will end it."""

    def __init__(self, user, room, device=DEVICE, delay=HOUR, timeout=HOUR):
        self.user, self.room, self.key = user, room, f"_{user.id}_{device}_m.call"
        user.set_state(room, STATE, self.key, {"application": "m.call", "device_id": device})
        self.id = user.set_state(room, STATE, self.key, {}, delay)
        # Clients name the homeserver's address as well; it is not to be believed.
        self.fields = {"delay_id": self.id, "delay_timeout": timeout, "delay_cs_api_url": "http://127.0.0.1:9"}

    def sent(self):
        return self.user.get_state(self.room, STATE, self.key) == {}

    def asked(self, action):
        """The homeserver's statuses for the service's calls."""
        return [status for what, status, _ in self.user.server.delayed(self.id) if what == action]

    def restarted(self):
        return 200 in self.asked("restart")

    def sent_by_service(self):
        """Once the event is in the room and the homeserver has logged by whose call."""
        eventually("the leave event in the room", self.sent)
        eventually("the call that sent it in the homeserver's log", lambda: 200 in self.asked("send"))
        assert self.asked("send").count(200) == 1

    def asked_by(self, listener):
        """The homeserver's door the service came to."""
        assert {door for _, _, door in self.user.server.delayed(self.id)} == {listener}


def new_leave(user, **more):
    return Leave(user, user.create_room(STATE), **more)


# ---- the service, with webhooks and without

@pytest.fixture(scope="module")
def sites(world, env, tmp_path_factory):
    """hooked: the SFU sends webhooks. polling: none, but look-ups. blind: neither, only what precedes a
    restart. Each with its SFU, users (who may have so many leaves delegated, and no more), and the homeserver's
    listener that the service must find."""
    number, port = itertools.count(), free_port()
    hooked = LiveKit(tmp_path_factory.mktemp("hooked"), port=7890, webhook=f"http://127.0.0.1:{port}/sfu_webhook")
    running = []

    def site(sfu, full="alpha.test", listener="https.8448", **more):
        service = Service(env(full, LIVEKIT_URL=sfu.url, **more), preexec_fn=die_with_us).start()
        running.append(service)
        return SimpleNamespace(service=service, sfu=sfu, listener=listener, world=world, env=env,
                               user=lambda: world.alpha.register(f"user{next(number)}"), folder=tmp_path_factory.mktemp)
    try:
        hooked.start().ready()
        all_sites = {
            "hooked": site(hooked, "alpha.test,beta.test:8449", LIVEKIT_JWT_BIND=f"127.0.0.1:{port}"),
            "polling": site(world.sfu, listener="http.8008", LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS="5",
                            LIVEKIT_CS_API_URL_OVERRIDES=f"alpha.test={world.alpha.url}/"),
            "blind": site(world.sfu)}
        yield all_sites
    finally:
        hooked.stop()
        codes = [s.stop() for s in running]
    assert codes == [0] * len(codes), "SIGTERM ends the service with 0"


# ---- ways into a call

WAYS = {
    # path of the join token, path of the delegation, delegated before the user joins
    "get_token": ("/get_token", "/get_token", True),
    "sfu_get": ("/sfu/get", "/sfu/get", True),
    "delegate": ("/get_token", DELEGATE, True),
    "get_token-again": ("/get_token", "/get_token", False),
    "sfu_get-again": ("/sfu/get", "/sfu/get", False),
    "delegate-and-sfu_get": ("/sfu/get", DELEGATE, True),
}


def delegate(site, path, ask, leave):
    """Hand the leave over by a request of its own; the token of it, if any, is not used."""
    if path == DELEGATE:
        reply = site.service.post(path, {**ask.body, **leave.fields})
        assert reply.status == 200 and reply.json == {}, reply
    else:
        again = Ask(path, leave.user, leave.room, device=DEVICE, member=ask.body.get("member", {}).get("id"))
        assert again.identity == ask.identity
        again.body.update(leave.fields)
        again.granted(site.service, full=True)


def enter(site, way, leave):
    """(token request, the user's process)"""
    joins, delegates, before = WAYS[way]
    ask = Ask(joins, leave.user, leave.room, device=DEVICE)
    if joins == delegates and before:
        ask.body.update(leave.fields)
        return ask, Elsewhere(ask.granted(site.service, full=True))
    grant = ask.granted(site.service, full=True)
    if before:
        # The user as the newer path knows them, even if they join by the older.
        delegate(site, delegates, ask if joins == "/get_token" else
                 Ask("/get_token", leave.user, leave.room, device=DEVICE), leave)
    there = Elsewhere(grant)
    if not before:
        delegate(site, delegates, ask, leave)
    return ask, there


# ---- and out of it

def removed(site, ask):
    status, reply = site.sfu.ask("RemoveParticipant", {"room": ask.alias, "identity": ask.identity},
                                 roomAdmin=True, room=ask.alias)
    assert status == 200, reply


def room_deleted(site, ask):
    status, reply = site.sfu.ask("DeleteRoom", {"room": ask.alias}, roomCreate=True)
    assert status == 200, reply


# ---- the cases

def depart(site, way, end):
    leave = new_leave(site.user())
    ask, there = enter(site, way, leave)
    try:
        eventually("the restart that follows the join", leave.restarted)
        assert ask.identity in site.sfu.participants(ask.alias)
        assert not leave.sent() and not leave.asked("send")
        if end == "killed":
            there.kill()
        elif end == "left":
            there.leave()
        else:
            end(site, ask)
        leave.sent_by_service()
        # Not a moment before the SFU knows.
        assert ask.identity not in site.sfu.participants(ask.alias)
        leave.asked_by(site.listener)
    finally:
        there.kill()


def stay(site):
    """Connected for three times the delay of the homeserver's own timer, here ten seconds."""
    user = site.user()
    ask = Ask("/get_token", user, user.create_room(STATE), device=DEVICE)
    grant = ask.granted(site.service, full=True)
    there = Elsewhere(grant)
    try:
        leave = Leave(user, ask.body["room_id"], delay=10_000, timeout=10_000)
        delegate(site, "/get_token", ask, leave)
        # A token to join with makes nobody the SFU.
        body = json.dumps({"event": "participant_left", "room": {"name": ask.alias}, "participant": {
            "identity": ask.identity, "disconnectReason": "CLIENT_INITIATED"}})
        reply = site.service.request("POST", "/sfu_webhook", body, [("Authorization", grant["jwt"])])
        assert reply.status == 200 and reply.body == b""
        # What nobody restarts tells the time.
        clock = Leave(user, ask.body["room_id"], "CLOCK", delay=30_000)
        eventually("an event nobody restarts", clock.sent)
        restarts = leave.asked("restart")
        assert len(restarts) >= 3 and set(restarts) == {200}, restarts
        assert not leave.sent() and not leave.asked("send")
        there.leave()
        leave.sent_by_service()
    finally:
        there.kill()


def lose_webhook(site):
    """Nobody tells that the user left: two look-ups before restarts do."""
    leave = new_leave(site.user(), timeout=20_000)
    _, there = enter(site, "get_token", leave)
    try:
        eventually("the restart that follows the join", leave.restarted)
        there.leave()
        leave.sent_by_service()
    finally:
        there.kill()


def never_join(site):
    leave = new_leave(site.user(), timeout=5_000)
    ask = Ask("/get_token", leave.user, leave.room, device=DEVICE)
    ask.body.update(leave.fields)
    ask.granted(site.service, full=True)
    assert not leave.sent()
    leave.sent_by_service()
    assert not leave.asked("restart")
    assert site.sfu.participants(ask.alias) == {}


def delegate_anew(site):
    """A newer leave event takes the place of the older one."""
    user = site.user()
    room = user.create_room(STATE)
    old, new = Leave(user, room, timeout=10_000), Leave(user, room, timeout=10_000)
    ask, there = enter(site, "get_token", old)
    try:
        eventually("the restart that follows the join", old.restarted)
        delegate(site, "/get_token", ask, new)
        before = old.asked("restart")
        eventually("three restarts", lambda: len(new.asked("restart")) >= 3)
        assert old.asked("restart") == before
        there.leave()
        eventually("the call for the newer event", lambda: new.asked("send"))
        assert not old.asked("send") and new.asked("send") == [200]
    finally:
        there.kill()


def join_again(site):
    """The same user joins again, and the SFU throws out the first connection: the user is still there."""
    leave = new_leave(site.user())
    ask, first = enter(site, "get_token", leave)
    second = None
    try:
        eventually("the restart that follows the join", leave.restarted)
        sid = site.sfu.participants(ask.alias)[ask.identity]["sid"]
        second = Elsewhere(Ask("/get_token", leave.user, leave.room, device=DEVICE,
                               member=ask.body["member"]["id"]).granted(site.service, full=True))
        assert site.sfu.participants(ask.alias)[ask.identity]["sid"] != sid
        eventually("the webhook of the first connection's end",
                   lambda: any(e["event"] == "participant_left" and e["participantID"] == sid
                               for _, e in site.sfu.webhooks()))
        assert not leave.sent() and not leave.asked("send")
        second.kill()
        leave.sent_by_service()
        assert ask.identity not in site.sfu.participants(ask.alias)
    finally:
        first.kill()
        if second:
            second.kill()


def thirty_at_once(site):
    """Thirty devices leave at once, and the homeserver takes one call a second."""
    users = site.world.users["beta.test:8449"]
    room = users[0].create_room(STATE)
    for user in users[1:]:
        user.join_room(room)
    asks, leaves = [], []
    for user in users:
        for n in range(10):
            leaves.append(Leave(user, room, f"DEVICE{n}"))
            asks.append(Ask("/get_token", user, room, device=f"DEVICE{n}"))
    there = Elsewhere(*[ask.granted(site.service, full=True) for ask in asks])
    try:
        # On a busy machine some connect at the second try only; the first, aborted one would end a delegation.
        eventually("all of them, connected", lambda: len(leaves) == [
            p.get("state") for p in site.sfu.participants(formula(room, SLOT)).values()].count("ACTIVE"))
        for ask, leave in zip(asks, leaves):
            delegate(site, DELEGATE, ask, leave)
        for leave in leaves:
            eventually("the restart of who is connected", leave.restarted)
        there.leave()
        for leave in leaves:
            leave.sent_by_service()
            leave.asked_by("https.443")
        assert any(429 in leave.asked(action) for leave in leaves for action in ("send", "restart"))
    finally:
        there.kill()


def send_oneself(site):
    """The client sends its event before it leaves: the service is told that it is gone, and content."""
    leave = new_leave(site.user())
    _, there = enter(site, "get_token", leave)
    try:
        eventually("the restart that follows the join", leave.restarted)
        status, reply = call(f"{leave.user.server.url}/_matrix/client/unstable/org.matrix.msc4140/delayed_events/"
                             f"{leave.id}/send", {}, leave.user.access_token)
        assert status == 200 and leave.sent(), reply
        there.leave()
        assert eventually("the service's call", lambda: leave.asked("send")) == [404]
    finally:
        there.kill()


def lose_sfu(site):
    """While the SFU is away nobody is taken for gone; when it is back without its rooms, they are."""
    sfu = LiveKit(site.folder("lost"), port=7900)
    leave = new_leave(site.user(), timeout=10_000)
    there = None
    try:
        sfu.start().ready()
        with Service(site.env("alpha.test", LIVEKIT_URL=sfu.url), preexec_fn=die_with_us) as service:
            ask, there = enter(SimpleNamespace(service=service), "get_token", leave)
            eventually("the restart that follows the join", leave.restarted)
            sfu.stop()
            before = len(leave.asked("restart"))
            # Longer than the 20 s that two look-ups are apart.
            eventually("five more restarts", lambda: len(leave.asked("restart")) >= before + 5)
            assert not leave.sent() and not leave.asked("send")
            sfu.start().ready()
            leave.sent_by_service()
            assert service.stop() == 0
    finally:
        if there:
            there.kill()
        sfu.stop()


def stop_service(site):
    """A service that stops sends nothing for those who are connected."""
    leave = new_leave(site.user())
    with Service(site.env("alpha.test"), preexec_fn=die_with_us) as service:
        ask, there = enter(SimpleNamespace(**{**vars(site), "service": service}), "get_token", leave)
        try:
            eventually("the restart that follows the join", leave.restarted)
            assert service.stop() == 0
            assert ask.identity in site.sfu.participants(ask.alias)
            assert not leave.sent() and not leave.asked("send")
        finally:
            there.kill()


CASES = {
    **{f"{way}-{end}": ("hooked", partial(depart, way=way, end=end)) for way in WAYS for end in ("killed", "left")},
    "get_token-removed": ("hooked", partial(depart, way="get_token", end=removed)),
    "sfu_get-room_deleted": ("hooked", partial(depart, way="sfu_get", end=room_deleted)),
    **{f"no_webhooks-{way}-{end}": ("polling", partial(depart, way=way, end=end))
       for way in ("get_token", "delegate-and-sfu_get") for end in ("killed", "left")},
    "lost_webhook": ("blind", lose_webhook),
    "stays": ("hooked", stay),
    "never_joins": ("hooked", never_join),
    "delegated_anew": ("hooked", delegate_anew),
    "joins_again": ("hooked", join_again),
    "thirty_at_once": ("hooked", thirty_at_once),
    "sends_oneself": ("hooked", send_oneself),
    "sfu_away": ("blind", lose_sfu),
    "service_stops": ("blind", stop_service),
}


@pytest.fixture(scope="module")
def side_by_side(request, sites):
    """{case: its future}, of the cases that were asked for."""
    names = {i.callspec.params["case"] for i in request.session.items if "side_by_side" in i.fixturenames}
    with ThreadPoolExecutor(len(names)) as pool:
        yield {name: pool.submit(CASES[name][1], sites[CASES[name][0]]) for name in CASES if name in names}


@pytest.mark.parametrize("case", CASES)
def test_leave(side_by_side, case):
    side_by_side[case].result()


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_homeserver_away_when_the_user_leaves(world, sites, how):
    site, server = sites["hooked"], world.alpha
    leave = new_leave(site.user())
    _, there = enter(site, "get_token", leave)
    try:
        eventually("the restart that follows the join", leave.restarted)
        if how == "stopped":
            server.stop()
        else:
            server.proc.send_signal(signal.SIGSTOP)
        try:
            seen = len(site.service.log())
            there.leave()
            logged(site.service, since=seen, addr=server.addr)
        finally:
            if how == "stopped":
                server.start().ready()
            else:
                server.proc.send_signal(signal.SIGCONT)
        leave.sent_by_service()
    finally:
        there.kill()


# ---- refusals

def test_guest_cannot_delegate(world, sites):
    site, guest = sites["polling"], world.users["beta.test:8449"][0]
    leave = new_leave(guest)
    for path, status, errcode in (("/get_token", 400, "M_BAD_JSON"), ("/sfu/get", 400, "M_BAD_JSON"),
                                  (DELEGATE, 403, "M_FORBIDDEN")):
        ask = Ask("/sfu/get" if path == "/sfu/get" else "/get_token", guest, leave.room, device=DEVICE)
        refused(site.service.post(path, {**ask.body, **leave.fields}), status,
                {"errcode": errcode, "error": RESTRICTED})
        ask.granted(site.service, full=False)
    assert site.sfu.room(ask.alias) is None
    assert not world.beta.delayed(leave.id) and not leave.sent()


def test_unknown_client_api_is_refused_before_the_room_is_made(world, sites, env):
    user = world.users["alpha.test"][0]
    leave = new_leave(user)
    with Service(env("alpha.test", LKJWT_FEDERATION_API_URL_OVERRIDES=f"alpha.test={world.alpha.url}",
                     LKJWT_HOSTS_FILE="/dev/null"), preexec_fn=die_with_us) as service:
        for path in ("/get_token", "/sfu/get", DELEGATE):
            ask = Ask("/sfu/get" if path == "/sfu/get" else "/get_token", user, leave.room, device=DEVICE)
            refused(service.post(path, {**ask.body, **leave.fields}), 400,
                    {"errcode": "M_BAD_JSON", "error": "Unable to resolve client-server API"})
        assert world.sfu.room(ask.alias) is None
        ask.granted(service, full=True)
        assert service.stop() == 0
    assert not world.alpha.delayed(leave.id) and not leave.sent()


def test_probe_without_a_body(sites):
    for site in sites.values():
        reply = site.service.request("POST", DELEGATE)
        assert reply.status == 400 and reply.errcode == "M_NOT_JSON"
        assert reply.header("access-control-allow-origin") == "*"


# ---- last: after all of the above

def test_zz_every_webhook_was_taken(sites):
    told = sites["hooked"].sfu.webhooks()
    assert {e["event"] for _, e in told} >= {"room_started", "participant_joined", "participant_left"}
    assert [e for delivered, e in told if not delivered] == []


def test_zz_no_token_nor_secret_in_any_log(sites):
    secrets = {CANARY_SECRET, CANARY_PASSWORD, *granted, *User.issued, *(g.split(".")[2] for g in granted)}
    assert granted and User.issued
    text = "".join(s.service.log_text() + s.service.stdout_text() for s in sites.values())
    assert "event=GRANTED" in text
    assert not [s for s in secrets if s in text]


def test_zz_nothing_above_was_an_error_of_the_service(sites):
    for site in sites.values():
        assert not [e for e in site.service.log() if e["level"] == "error"]
