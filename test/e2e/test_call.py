"""Two people see each other by Element Call. Then one page is killed, and the
other hangs up. The tests of a row are one story, told in this order."""
import re

import jwt as pyjwt

from conftest import CAMERAS
from exchange import alias
from servers import call as http
from service import CANARY_SECRET
from sites import eventually, members

HOUR = 3_600_000
OWN_PATH = {"compatibility": "/sfu/get", "matrix_2_0": "/get_token"}


def in_call(call):
    return members(call.ann.user, call.mode, call.room)


def granted(call):
    """[(request, the identity granted)]"""
    return [(n, pyjwt.decode(n.got["jwt"], CANARY_SECRET, algorithms=["HS256"], options={"verify_exp": False})["sub"])
            for n in call.world.recorder.noted("POST") if "jwt" in n.got]


def delegation(call, person):
    """The request that handed over this person's leave event, and the identity it was for."""
    found = [(n, sub) for n, sub in granted(call) if "delay_id" in n.asked
             and person.user.device in (n.asked.get("device_id"), n.asked.get("member", {}).get("claimed_device_id"))]
    return found[-1] if found else None


def waiting(person):
    """{delay id: delay} of the events the homeserver holds back for a user."""
    status, got = http(f"{person.user.server.url}/_matrix/client/unstable/org.matrix.msc4140/delayed_events",
                       token=person.user.access_token)
    assert status == 200, got
    return {e["delay_id"]: e["delay"] for e in got["delayed_events"]}


def senders(call, delay_id):
    """[(status, listener, user agent)] of the calls that asked for a delayed event to be sent."""
    return [(int(m[2]), m[1], m[3]) for m in re.finditer(
        rf' synapse\.access\.(\S+) .* Processed request: .* (\d+)!? "POST \S+/delayed_events/{re.escape(delay_id)}/send'
        r' HTTP/1\.\d" "([^"]*)"', call.world.home.log_file.read_text())]


def test_each_sees_the_other(call):
    """Moving pictures, in colours that only the other's camera has."""
    for me, other in (call.ann, call.bob), (call.bob, call.ann):
        _, bright = CAMERAS[other.name]

        def theirs():
            tiles = me.tiles()
            found = [t for t in tiles if other.shown in t["text"] and t["width"] and t["colours"] >= 8
                     and t["mean"].index(max(t["mean"])) == bright]
            return len(tiles) == 2 and all(t["width"] for t in tiles) and found and found[0]
        first = eventually(f"the picture of {other.name}", theirs)
        eventually("the next picture", lambda: (theirs() or first)["time"] > first["time"])
        me.screenshot(f"call-{call.name}")


def test_sfu_has_both_with_sound_and_picture(call):
    delegated = [eventually(f"the delegation of {p.name}", lambda: delegation(call, p)) for p in call.people.values()]
    want = {identity: ("ACTIVE", [("AUDIO", False), ("VIDEO", False)]) for _, identity in delegated}
    assert len(want) == 2

    def there():
        return {identity: (p["state"], sorted((t["type"], t["muted"]) for t in p["tracks"]))
                for identity, p in call.world.sfu.participants(alias(call.room)).items()}
    eventually(f"{want} on the SFU", lambda: there() == want)


def test_browsers_asked_and_were_answered(call):
    notes = call.world.recorder.noted()
    own = OWN_PATH[call.mode]
    for n in notes:
        # What Element Call asks without a body tells it that leaves are taken.
        want = 400 if n.path == "/delegate_delayed_leave" and n.method == "POST" else n.status
        assert n.status == want and n.status in (200, 204, 400), n
        assert n.allowed == ("*" if n.origin else None), n
    asked = {(n.method, n.path) for n in notes}
    assert asked >= {("OPTIONS", own), ("POST", own), ("POST", "/delegate_delayed_leave")}, asked
    assert {e["path"] for e in call.service.events("REQUEST")} >= {own, "/delegate_delayed_leave", "/sfu_webhook"}
    # The second of the older mode asks for the first one's transport in the newer way.
    assert {e["route"] for e in call.service.events("GRANTED")} == {own, "/get_token"}
    for person in call.people.values():
        note, identity = delegation(call, person)
        assert note.path == own
        assert identity.startswith("@") == (call.mode == "compatibility")
        # The homeserver would end the membership in an hour; the client relies on the service to be sooner.
        assert note.asked["delay_timeout"] == HOUR and waiting(person) == {note.asked["delay_id"]: HOUR}
    assert in_call(call) == {p.user.id for p in call.people.values()}


def test_killed_page_leaves(call):
    note, _ = delegation(call, call.bob)
    delay_id = note.asked["delay_id"]
    assert senders(call, delay_id) == []
    if call.fate:
        assert call.service.stop() == 0
    if call.fate == "restart":
        call.service.start()
    call.bob.browser.kill()
    if call.fate == "down":
        eventually("the SFU without the killed one", lambda: len(call.world.sfu.participants(alias(call.room))) == 1)
        assert senders(call, delay_id) == []
        call.service.start()
    eventually("the room without the killed one", lambda: in_call(call) == {call.ann.user.id})
    eventually("the call that ended it", lambda: senders(call, delay_id))
    (status, listener, agent), = senders(call, delay_id)
    assert (status, listener) == (200, "https.443") and "Mozilla" not in agent
    if call.fate:
        assert call.service.events("JOBS_RESTORED", count=2)
    eventually("a page with one picture", lambda: len(call.ann.tiles()) == 1)
    call.ann.screenshot(f"left-{call.name}")


def test_hang_up(call):
    call.ann.click("incall_leave")
    eventually("an empty call", lambda: in_call(call) == set())
    eventually("the widget to be done", lambda: "io.element.close" in call.ann.seen())
    eventually("an empty SFU", lambda: not call.world.sfu.participants(alias(call.room)))


def test_nothing_went_wrong(call):
    hooks = call.world.recorder.noted("POST", "/sfu_webhook")
    assert {n.asked["event"] for n in hooks} >= {"room_started", "participant_joined", "track_published",
                                                "participant_left"}
    assert not [n for n in call.world.recorder.noted() if n.status >= 500]
    assert call.service.stop() == 0
    # A slow homeserver is asked again; that it was asked in vain would have shown above.
    assert {e["event"] for e in call.service.log() if e["level"] in ("warning", "error")} <= {
        "CONFIG_WARN", "DELAYED_EVENT_FAILED"}
    text = call.service.log_text()
    secrets = [CANARY_SECRET, *(n.got["jwt"] for n, _ in granted(call)),
               *(n.asked["openid_token"]["access_token"] for n, _ in granted(call))]
    assert len(secrets) > 4 and not [s for s in secrets if s in text]
