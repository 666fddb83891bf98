"""Delegated leave without Redis: PROTOCOL.md 8 and 9, and its rows of 3 and 4.

What takes time plays at once: each scene is a delegation of its own, in a room of its own and (by override) with a
queue of its own at the client-server API; one service serves them all, and a test reports how its scene went."""
import itertools
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import dnslib
import pytest

from exchange import DELEGATION, NO_API, NOT_JSON, UNAUTHORIZED, check_cors, check_error, check_granted, make_body
from leave import (DELEGATE, GONE, HOUR, LONG, NOT_FOUND, UNRECOGNIZED, ClientApi, Log, World, event, participant)
from outbound import by_token, pki, pub, token_for
from peers import Dns, Homeserver, HttpServer, Reply, WELL_KNOWN, add_addr, chunked, protobuf_encode, wait_for
from service import Service, base_env
from test_validation import (ABSENT, BAD_IDS, BROKEN, GOOD_IDS, INT64, OBJECTS, STRINGS, WRONG_OBJECT, WRONG_STRING, put)

HANG = Reply(raw=b"", hang=True)
CLOSE = Reply(raw=b"", close=True)
RESET = Reply(raw=b"", reset=True)
OK = Reply(200, {})
BUSY = Reply(503, "busy")

# ---- the stage

SCENES = {}


def scene(*args, **kw):
    """Register the function below as a scene; with rows ({id: arguments}), as one scene for each."""
    def register(f, rows=None):
        for name, row in (rows or {"": ()}).items():
            title = f.__name__ + (f": {name}" if name else "")
            assert title not in SCENES
            SCENES[title] = lambda world, f=f, row=row: f(world, *row if isinstance(row, tuple) else (row,))
        return f
    if callable(args[0]):
        return register(args[0])
    return lambda f: register(f, args[0])


SLOW = ("patient", "lost_webhook", "absent", "for_ever", "restarts_", "never_connects", "everybody", "queues")


@pytest.fixture(scope="module")
def played(request):
    """Every scene that a test of this run asks for, the slow ones first; each with a server name of its own."""
    wanted = [i.callspec.params["title"] for i in request.session.items
              if i.nodeid.startswith(request.node.nodeid) and i.originalname == "test_scene"]
    wanted.sort(key=lambda title: not any(word in title for word in SLOW))
    worlds = [World(len(part) + 1) for part in (wanted[0::2], wanted[1::2])]

    def play(title, world, server):
        world.here.server = server
        SCENES[title](world)

    with worlds[0], worlds[1], ThreadPoolExecutor(128) as pool:
        yield {title: pool.submit(play, title, worlds[i % 2], worlds[i % 2].names[i // 2]) for i, title in enumerate(wanted)}
        pool.shutdown(cancel_futures=True)


# ---- Waiting

@scene
def waiting_joined_by_webhook(world):
    """The SFU does not say it yet: the webhook alone does."""
    job = world.job().delegate()
    job.wait_looked(1)
    job.joined(present=False)
    assert job.restarted()[0].stable is False
    assert len(job.lines("JOB_CONNECTED")) == 1


@scene
def waiting_found_by_look_up(world):
    """Delegated after the join: nobody tells, it is asked for at once."""
    job = world.job().present().delegate()
    job.restarted()
    job.left().sent()
    job.ended()


@scene({"absent": (NOT_FOUND,), "errors": (Reply(500, {"code": "internal", "msg": "x"}),), "disconnected": (None,),
        "closed": (CLOSE,)})
def waiting_found_later(world, first):
    """Absent and errors both mean: again, by the backoff."""
    job = world.job()
    first = first or participant(job.hashed, state=3)
    job.presence(first, first, participant(job.hashed)).delegate()
    job.restarted()
    times = [at for _, _, at in job.looked()]
    assert len(times) >= 3
    if first is not CLOSE:          # a kept connection that dies is replaced at once
        assert all(b - a > 0.9 for a, b in itertools.pairwise(times[:3])), times


@scene({str(state): state for state in (0, 1, 2)})
def present_in_state(world, state):
    """Joining, joined and active count as present."""
    world.job().present(state=state).delegate().restarted()


@scene
def present_with_a_large_reply(world):
    """Members we do not know, of every wire type, around those we read."""
    job = world.job()
    body = (protobuf_encode((13, "x" * 30000), (900, 1 << 40)) + b"\x79" + b"\xff" * 8 + b"\x7d" + b"\xff" * 4
            + participant(job.hashed).body + protobuf_encode((4, b"\x0a\x02ab"), (5, "{}" * 10000)))
    job.presence(Reply(200, body, ctype="application/protobuf")).delegate().restarted()


@scene
def waiting_client_initiated_is_ignored(world):
    """A tab closed before the other one joined."""
    job = world.job().delegate().left()
    assert not job.lines("JOB_ENDED") and not job.lines("JOB_LEAVING")
    job.joined().restarted()
    job.never_sent().left().sent()


ENDERS = {"PARTICIPANT_REMOVED": 4, "ROOM_DELETED": 5, "ROOM_CLOSED": 10}
CHECKED = {"UNKNOWN_REASON": 0, "JOIN_FAILURE": 7, "SIGNAL_CLOSE": 9, "USER_UNAVAILABLE": 11, "USER_REJECTED": 12,
           "SIP_TRUNK_FAILURE": 13, "CONNECTION_TIMEOUT": 14, "MEDIA_FAILURE": 15, "AGENT_ERROR": 16}
PATIENT = {"DUPLICATE_IDENTITY": 2, "SERVER_SHUTDOWN": 3, "STATE_MISMATCH": 6, "MIGRATION": 8}


def reasons(table, *more):
    rows = {name: (name,) for name in table}
    rows |= {f"{name} by number": (number,) for name, number in table.items()}
    return rows | {str(m): (m,) for m in more}


@scene(reasons(ENDERS | CHECKED, None, 99, "SOMETHING_NEW"))
def waiting_left_for_another_reason(world, reason):
    job = world.job().delegate().left(reason)
    job.ended()
    assert not job.calls()


@scene({str(r): (r,) for r in ("JOIN_FAILURE", "UNKNOWN_REASON", "CONNECTION_TIMEOUT", None)})
def waiting_aborted(world, reason):
    job = world.job().delegate().hook("participant_connection_aborted", reason=reason)
    job.ended()
    assert not job.calls()


@scene
def waiting_left_but_present(world):
    """It left and is back before we asked: there."""
    job = world.job().delegate().present()
    job.left("CONNECTION_TIMEOUT", absent=False)
    job.restarted()
    job.never_sent()


@scene({str(T): (T,) for T in (1, 999, 1000, 1500, 3000)})
def waiting_never_connects(world, T):
    """Below a second counts as one. Sent before the homeserver's own timer, or its reply tells it was late."""
    job = world.job(T=T).delegate()
    call = job.sent()[0]
    assert call.at - job.began > max(1, T / 1000) - 0.1
    job.ended()
    assert not job.calls("restart") and len(job.calls()) == 1


@scene
def waiting_never_connects_and_the_api_is_away(world):
    """The budget is 1 s for who was never connected: a first try, hardly a second."""
    job = world.job(T=1000).script("send", BUSY).delegate()
    job.ended()
    assert 1 <= len(job.calls("send")) <= 2 and not job.calls("restart")


# ---- Connected

@scene({r: (r,) for r in ("CLIENT_INITIATED",)} | {"1": (1,)} | reasons(ENDERS))
def connected_left(world, reason):
    """Sent at once: the SFU is not even asked, and would still say present."""
    job = world.job().connected()
    looked = len(job.looked())
    job.left(reason, absent=False).sent()
    assert len(job.looked()) == looked, (job.hooked, job.looked())
    job.ended()
    assert len(job.calls("send")) == 1 and len(job.lines("JOB_SENT")) == 1


@scene(reasons(CHECKED, None, 99, "SOMETHING_NEW"))
def connected_left_and_absent(world, reason):
    job = world.job().connected()
    looked = len(job.looked())
    job.left(reason).sent()
    assert len(job.looked()) > looked
    job.ended()


@scene(reasons(CHECKED, None, 99, "SOMETHING_NEW"))
def connected_left_but_present(world, reason):
    """One look-up says it is there: it stays, and its next leave counts."""
    job = world.job().connected()
    looked = len(job.looked())
    job.left(reason, absent=False)
    job.wait_looked(looked + 1)
    time.sleep(1)
    job.never_sent()
    assert not job.lines("JOB_ENDED")
    job.left().sent()


@scene({str(r): (r,) for r in ("JOIN_FAILURE", None)})
def connected_aborted(world, reason):
    job = world.job().connected().absent()
    job.hook("participant_connection_aborted", reason=reason).sent()
    job.ended()


@scene(reasons(PATIENT))
def connected_patient_reason_absent(world, reason):
    """20 s of asking, then it is gone."""
    job = world.job().connected()
    looked = len(job.looked())
    job.left(reason)
    call = job.sent()[0]
    assert call.at - job.hooked > 19
    assert len(job.looked()) - looked >= 3
    job.ended()


@scene(reasons(PATIENT))
def connected_patient_reason_present(world, reason):
    """Asked at once, found: nothing happened. The leave that follows counts."""
    job = world.job().connected()
    looked = len(job.looked())
    job.left(reason, absent=False)
    job.wait_looked(looked + 1)
    time.sleep(1)
    job.never_sent()
    job.left().sent()


@scene(reasons(PATIENT))
def connected_patient_reason_comes_back(world, reason):
    """Absent for a few look-ups, then there again, with a new sid."""
    job = world.job().connected()
    looked = len(job.looked())
    job.left(reason)
    job.wait_looked(looked + 2)
    job.joined(sid="PA_2")
    time.sleep(22 - (time.monotonic() - job.hooked))
    job.never_sent()
    assert not job.lines("JOB_ENDED")
    job.left(sid="PA_2").sent()


@scene({name: (name,) for name in PATIENT})
def waiting_patient_reason_absent(world, reason):
    """As any other reason in Waiting, but 20 s later."""
    job = world.job().delegate().left(reason)
    began = job.hooked
    job.ended()
    assert time.monotonic() - began > 19
    assert not job.calls()


@scene({name: (name,) for name in PATIENT})
def waiting_patient_reason_present(world, reason):
    job = world.job().delegate().present().left(reason, absent=False)
    job.restarted()
    job.left().sent()


@scene
def connected_joins_again(world):
    """No second restart at once, but the new sid is the one that counts."""
    job = world.job().connected().joined(sid="PA_2").joined(sid="PA_3")
    job.left(sid="PA_3").sent()
    assert len(job.calls("restart")) == 1 and len(job.lines("JOB_CONNECTED")) == 1


@scene
def old_sid_leaves_and_it_is_present(world):
    """The same identity came back before the old one's leave: even CLIENT_INITIATED is asked about."""
    job = world.job().connected().joined(sid="PA_2")
    looked = len(job.looked())
    job.left(sid="PA_1", absent=False)
    job.wait_looked(looked + 1)
    time.sleep(1)
    job.never_sent()
    assert not job.lines("JOB_LEAVING")
    job.left(sid="PA_2").sent()


@scene({"left": ("participant_left", "CLIENT_INITIATED"), "removed": ("participant_left", "PARTICIPANT_REMOVED"),
        "aborted": ("participant_connection_aborted", "JOIN_FAILURE")})
def old_sid_leaves_and_it_is_absent(world, name, reason):
    job = world.job().connected().joined(sid="PA_2").absent()
    job.hook(name, sid="PA_1", reason=reason)
    assert job.sent()[0].at - job.hooked > 19


@scene({"no sid now": ("PA_1", None), "empty sid now": ("PA_1", ""), "none at the join": ("", "PA_1")})
def sid_unknown_is_no_other_sid(world, first, then):
    job = world.job().delegate().joined(sid=first)
    job.restarted()
    job.left(sid=then).sent()
    assert time.monotonic() - job.hooked < 15


@scene
def sid_of_the_look_up_counts(world):
    """Found by look-up as PA_7; a leave of PA_6 is an old one."""
    job = world.job().present(sid="PA_7").delegate()
    job.restarted()
    looked = len(job.looked())
    job.left(sid="PA_6", absent=False)
    job.wait_looked(looked + 1)
    time.sleep(1)
    job.never_sent().left(sid="PA_7").sent()


UNKNOWN = {
    "500": Reply(500, {"code": "internal", "msg": "x"}),
    "503 HTML": Reply(503, "<html>"),
    "404 bad_route": Reply(404, {"code": "bad_route", "msg": "no handler"}),
    "404 HTML": Reply(404, "<html>not_found</html>", ctype="text/html"),
    "404 empty": Reply(404),
    "404 without code": Reply(404, {"msg": "not_found"}),
    "404 code in another case": Reply(404, {"code": "NOT_FOUND"}),
    "404 errcode": Reply(404, {"errcode": "not_found"}),
    "404 code number": Reply(404, {"code": 404}),
    "404 cut": Reply(404, '{"code":"not_found"'),
    "401 text": Reply(401, "invalid token", ctype="text/plain"),
    "302": Reply(302, "", [("Location", "/")]),
    "204": Reply(204, b"", length=False),
    "200 garbage": Reply(200, b"\xff" * 40, ctype="application/protobuf"),
    "200 short": Reply(200, b"\x0a\x20PA", ctype="application/protobuf"),
    "closed": CLOSE,
    "reset": RESET,
    "too large": Reply(200, b"\x0a\x04PA_1" + b"\x2a\xf0\xa2\x04" + b"x" * 70000, ctype="application/protobuf"),
}


@scene({k: (v,) for k, v in UNKNOWN.items()})
def unknown_presence_then_present(world, reply):
    """Whatever is not the SFU's own "not found" leaves presence unknown: asked again, nothing is sent."""
    job = world.job().connected()
    looked = len(job.looked())
    job.presence(reply, reply, participant(job.hashed)).left("SIGNAL_CLOSE", absent=False)
    job.wait_looked(looked + 3)
    time.sleep(1)
    job.never_sent()
    assert not job.lines("JOB_LEAVING") and not job.lines("JOB_ENDED")
    job.left().sent()


@scene({"500": (Reply(500, {"code": "internal", "msg": "x"}),), "404 HTML": (Reply(404, "<html>"),)})
def unknown_presence_then_absent(world, reply):
    job = world.job().connected()
    looked = len(job.looked())
    job.presence(reply, reply, NOT_FOUND).left("SIGNAL_CLOSE", absent=False).sent()
    assert len(job.looked()) - looked >= 3
    job.ended()


@scene({"SIGNAL_CLOSE": ("SIGNAL_CLOSE", 3000), "MIGRATION": ("MIGRATION", 22000)})
def unknown_presence_for_ever(world, reason, T):
    """For at most T, then as absent."""
    job = world.job(T=T).connected()
    job.presence(Reply(500, {"code": "internal", "msg": "x"})).left(reason, absent=False)
    assert job.sent()[0].at - job.hooked > T / 1000 - 0.5
    job.ended()


# ---- restarts

@scene({"1 s": (1000, 4), "2 s": (2000, 4), "5 s": (5000, 3)})
def restarts_go_on(world, T, count):
    """At once, then each a random 0.6 to 0.8 T after the last (never within 0.8 s), the SFU asked before each but
    the first."""
    job = world.job(T=T).connected()
    calls = job.restarted(count)
    gaps = [b.at - a.at for a, b in itertools.pairwise(calls)]
    assert all(g > max(0.8, 0.6 * T / 1000) - 0.05 for g in gaps), gaps
    joined = len([at for _, _, at in job.looked() if at < job.hooked])
    job.wait_looked(joined + count - 1)
    job.never_sent().left().sent()
    # One that was out when its user left may be seen by another thread of ours after it.
    send, *_ = job.calls("send")
    late = [c.at - send.at for c in job.calls("restart") if c.at > send.at]
    assert len(late) <= 1 and max(late, default=0) < 0.5, late


@scene
def restarts_are_spread(world):
    """Twelve with the same T, connected together: their second restarts are not together."""
    jobs = [world.job(T=4000).delegate() for _ in range(12)]
    for job in jobs:
        job.joined()
    gaps = []
    for job in jobs:
        first, second = job.restarted(2)[:2]
        gaps.append(second.at - first.at)
        job.left()
    assert min(gaps) > 2.35 and max(gaps) - min(gaps) > 0.1, gaps


@scene({"403": (Reply(403, {"errcode": "M_FORBIDDEN"}),), "404": (GONE,), "409": (Reply(409, {"errcode": "M_UNKNOWN"}),),
        "401": (Reply(401, {"errcode": "M_MISSING_TOKEN"}),)})
def restart_fails_for_good(world, reply):
    """Ended, nothing sent: the event is gone or not ours."""
    job = world.job().script("restart", reply).delegate().joined()
    job.ended()
    assert [c.action for c in job.calls()] == ["restart"]
    assert job.failures()


@scene
def second_restart_fails_for_good(world):
    job = world.job(T=1500).script("restart", OK, GONE).connected()
    job.restarted(2)
    job.ended()
    assert [c.action for c in job.calls()] == ["restart"] * 2


@scene({"503": (BUSY,), "closed": (CLOSE,), "hang": (HANG,), "429": (Reply(429, {"errcode": "M_LIMIT_EXCEEDED"}),)})
def deadline_passes(world, reply):
    """Restarts fail for T: the homeserver has sent it itself."""
    job = world.job(T=4000).script("restart", reply).delegate().joined()
    line = job.ended()
    assert line["event"] == "JOB_ENDED" and not job.calls("send")
    assert time.monotonic() - job.hooked > 2.9


@scene
def restart_hangs_and_it_leaves(world):
    """An unfinished restart is abandoned for the send."""
    job = world.job().script("restart", HANG).delegate().joined()
    call = job.restarted()[0]
    job.left().sent()
    job.ended()
    assert job.calls("restart") == [call]


@scene
def restart_backs_off_and_it_leaves(world):
    job = world.job().script("restart", BUSY).delegate().joined()
    job.restarted()
    job.left().sent()
    job.ended()
    assert job.calls()[-1].action == "send"


# ---- an SFU that is away (S27)

@scene({"hangs": (HANG,), "500": (Reply(500, {"code": "internal", "msg": "x"}),), "404 HTML": (Reply(404, "<html>"),),
        "closed": (CLOSE,)})
def restarts_go_on_without_the_sfu(world, reply):
    """Its silence is no absence, and no reason to be late: three times T later it is still restarted."""
    job = world.job(T=5000).connected()
    job.presence(reply)
    job.restarted(5)
    job.never_sent()
    assert not job.lines("JOB_ENDED")
    job.left().sent()


@scene({f"{reason} {name}": (reason, reply) for reason in ("SERVER_SHUTDOWN", "SIGNAL_CLOSE") for name, reply in {
    "hangs": HANG, "500": Reply(500, {"code": "internal", "msg": "x"})}.items()})
def restarts_go_on_in_doubt(world, reason, reply):
    """Said to have left by an SFU that is going down, and back 8 s later: T = 3 s must not pass meanwhile."""
    job = world.job(T=3000).connected()
    job.presence(reply).left(reason, absent=False)
    time.sleep(2)
    assert not job.lines("JOB_ENDED")
    job.never_sent()
    job.restarted(2)
    job.present(sid="PA_2").joined(sid="PA_2")
    count = len(job.calls("restart"))
    job.restarted(count + 2)
    job.never_sent().left(sid="PA_2").sent()


@scene({name: (name,) for name in PATIENT})
def restarts_go_on_while_absence_is_confirmed(world, reason):
    """20 s of asking at T = 3 s: back in time, the event must still be there."""
    job = world.job(T=3000).connected().left(reason)
    time.sleep(10)
    job.never_sent()
    assert not job.lines("JOB_ENDED") and len(job.calls("restart")) >= 3
    job.joined(sid="PA_2")
    job.restarted(len(job.calls("restart")) + 2)
    job.never_sent().left(sid="PA_2").sent()


# ---- absence that no webhook told

@scene({"restart": (4000, None), "room_started": (HOUR, lambda job: job.world.webhook(event("room_started", job.alias))),
        "numDropped": (HOUR, lambda job: job.world.webhook(event("track_published", job.alias, "somebody", numDropped=3))),
        "numDropped as string": (HOUR, lambda job: job.world.webhook(event("track_published", job.alias, "x", numDropped="1")))})
def lost_webhook(world, T, hint):
    """Two confirmed absences 20 s apart, on the occasion of restarts or of a hint."""
    job = world.job(T=T).connected()
    gone = time.monotonic()
    job.absent()
    if hint:
        time.sleep(1)
        hint(job)
    call = job.sent()[0]
    assert call.at - gone > 19
    job.ended()


@scene({"restart": (4000, None), "room_started": (HOUR, lambda job: job.world.webhook(event("room_started", job.alias)))})
def lost_webhook_but_back_in_time(world, T, hint):
    """One absence is none."""
    job = world.job(T=T).connected()
    looked = len(job.looked())
    job.presence(NOT_FOUND, participant(job.hashed))
    if hint:
        hint(job)
    job.wait_looked(looked + 1)
    time.sleep(23)
    job.never_sent()
    assert not job.lines("JOB_ENDED")
    job.left().sent()


# ---- Leaving

@scene
def leaving_is_final(world):
    """Joined, left and aborted while the send is not through change nothing; no restart any more."""
    job = world.job().script("send", BUSY, BUSY, OK).connected().left()
    job.sent(1)
    job.joined(sid="PA_2").left("DUPLICATE_IDENTITY", sid="PA_2", absent=False).hook("participant_connection_aborted")
    job.sent(3)
    job.ended()
    assert [c.action for c in job.calls()] == ["restart"] + ["send"] * 3
    assert len(job.lines("JOB_CONNECTED")) == len(job.lines("JOB_LEAVING")) == 1


@scene
def leaving_budget_is_spent(world):
    """Send fails until T after the last restart is over."""
    job = world.job(T=4000).script("send", BUSY).connected().left()
    job.ended()
    assert len(job.calls("send")) >= 2 and not job.lines("JOB_SENT")
    assert job.failures()


# ---- §8: what the homeserver answers

def retry_date(seconds):
    return lambda call: Reply(429, "", [("Retry-After", formatdate(time.time() + seconds, usegmt=True))])


TRANSIENT = {
    **{str(code): Reply(code, {"errcode": "M_UNKNOWN"}) for code in (408, 421, 423, 425, 500, 501, 502, 503, 504, 599)},
    "500 no body": Reply(500), "502 HTML": Reply(502, "<html>", ctype="text/html"),
    "cut": Reply(200, {"a": "b"}, cut=60), "no HTTP": Reply(raw=b"220 ESMTP\r\n", close=True),
    "404 HTML": Reply(404, "<html>404</html>", ctype="text/html"), "404 text": Reply(404, "404 page not found\n"),
    "404 cut JSON": Reply(404, '{"errcode":"M_NOT_FOUND"'),
    "301": Reply(301, "", [("Location", "/x")]), "302": Reply(302, "", [("Location", "/x")]),
    "303": Reply(303, "", [("Location", "/x")]), "304": Reply(304), "300": Reply(300),
    "307 elsewhere": Reply(307, "", [("Location", "http://127.0.0.2:9/x")]),
    "307 other port": Reply(307, "", [("Location", "http://127.0.0.1:9/x")]),
    "307 https": Reply(307, "", [("Location", "https://127.0.0.1/x")]),
    "307 nowhere": Reply(307), "307 empty": Reply(307, "", [("Location", "")]),
    "308 userinfo": Reply(308, "", [("Location", "http://u:p@127.0.0.1:9/x")]),
    "429": Reply(429, "slow down"), "429 empty JSON": Reply(429, {}),
    "429 retry_after_ms 0": Reply(429, {"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 0}),
    "429 retry_after_ms negative": Reply(429, {"retry_after_ms": -5}),
    "429 retry_after_ms text": Reply(429, {"retry_after_ms": "2000"}),
    "429 retry_after_ms float": Reply(429, {"retry_after_ms": 10.5}),
    "429 Retry-After words": Reply(429, "", [("Retry-After", "soon")]),
    "429 Retry-After negative": Reply(429, "", [("Retry-After", "-3")]),
    "429 Retry-After past": retry_date(-100),
    "429 Retry-After 0": Reply(429, "", [("Retry-After", "0")]),
}
HINTS = {
    "Retry-After 3": (Reply(429, "", [("Retry-After", "3")]), 3),
    "Retry-After date": (retry_date(4), 2.9),
    "retry_after_ms": (Reply(429, {"errcode": "M_LIMIT_EXCEEDED", "retry_after_ms": 2600}), 3),
    "header wins": (Reply(429, {"retry_after_ms": 90000}, [("Retry-After", "2")]), 2),
}
DONE = {"200": OK, "200 empty": Reply(200), "200 HTML": Reply(200, "<html>"), "201": Reply(201, {}), "202": Reply(202, "x"),
        "204": Reply(204, b"", length=False), "200 large": Reply(200, {"x": "y" * 50000})}
GONE_FORMS = {"404 {}": GONE, "404 empty": Reply(404), "404 M_NOT_FOUND": Reply(404, {"errcode": "M_NOT_FOUND", "error": "x"}),
              "404 other": Reply(404, {"errcode": "M_SOMETHING"}), "404 errcode null": Reply(404, {"errcode": None}),
              "404 {} as text": Reply(404, "{}", ctype="text/plain"), "404 errcode number": Reply(404, {"errcode": 5}),
              "404 array": Reply(404, "[]", ctype="application/json")}
PERMANENT = {str(code): Reply(code, {"errcode": "M_FORBIDDEN"}) for code in (400, 401, 403, 405, 409, 410, 413, 415, 418, 422, 451, 499)}
PERMANENT["403 HTML"] = Reply(403, "<html>", ctype="text/html")
PERMANENT["409 empty"] = Reply(409)


def reply_scenes(table):
    return {f"{action} {name}": (action, reply) for name, reply in table.items() for action in ("restart", "send")}


def drive(world, action, *replies, T=HOUR):
    """A job whose restart or send meets these replies."""
    job = world.job(T=T).script(action, *replies)
    if action == "send":
        return job.connected().left()
    return job.delegate().joined()


def check_done(job, action, count):
    """That many tries, the last of them good: then the job goes on as it should."""
    getattr(job, {"restart": "restarted", "send": "sent"}[action])(count)
    if action == "send":
        job.ended()
        assert len(job.lines("JOB_SENT")) == 1
    else:
        job.wait_line("JOB_RESTARTED")
        job.left().sent()
        job.ended()
    assert len(job.calls(action)) == count, job.calls()


@scene(reply_scenes(DONE))
def reply_done(world, action, reply):
    check_done(drive(world, action, reply), action, 1)


@scene(reply_scenes(TRANSIENT))
def reply_transient(world, action, reply):
    """Tried again, a second later at the soonest, the same event at the same place."""
    job = drive(world, action, reply, OK)
    check_done(job, action, 2)
    first, second = job.calls(action)
    assert second.at - first.at > 0.95 and second.base == first.base and not second.stable
    line, = job.failures()
    limited = reply_status(reply) == 429
    assert (line["outcome"], line["level"]) == (("limited", "debug") if limited else ("transient", "warning")), line
    assert line["action"] == action
    assert not reply_status(reply) or str(reply_status(reply)) in line.values(), line


def reply_status(reply):
    """Of a whole reply."""
    return 429 if callable(reply) else None if reply.raw is not None or reply.cut else reply.status


@scene({f"{action} {name}": (action, reply) for name, reply in {"closed": CLOSE, "reset": RESET}.items()
        for action in ("restart", "send")})
def connection_breaks(world, action, reply):
    """A kept connection that breaks is replaced at once, a new one is a failure: again in a second."""
    job = drive(world, action, reply, reply, reply, OK)
    check_done(job, action, 4)
    calls = job.calls(action)
    assert all(c.at - a.at > 0.95 for a, c in zip(calls, calls[2:])), calls


@scene({"restart": ("restart",), "send": ("send",)})
def reply_never_comes(world, action):
    """5 s for an attempt."""
    job = drive(world, action, HANG, OK)
    check_done(job, action, 2)
    first, second = job.calls(action)
    assert second.at - first.at > 5.9


@scene({f"{action} {name}": (action, *row) for name, row in HINTS.items() for action in ("restart", "send")})
def reply_429_hint(world, action, reply, least):
    job = drive(world, action, reply, OK)
    check_done(job, action, 2)
    first, second = job.calls(action)
    assert second.at - first.at > least - 0.05


@scene({f"{action} hint {hint}": (action, hint) for action in ("restart", "send") for hint in (30, 86400, 10 ** 30)})
def reply_429_hint_beyond_the_budget(world, action, hint):
    """Waiting would be too late: it ends, without another call."""
    job = drive(world, action, Reply(429, "", [("Retry-After", str(hint))]), T=4000)
    job.ended()
    assert len(job.calls(action)) == 1 and len(job.calls("send")) == (action == "send")


@scene(reply_scenes(PERMANENT))
def reply_permanent(world, action, reply):
    job = drive(world, action, reply)
    job.ended()
    assert len(job.calls(action)) == 1 and len(job.calls("send")) == (action == "send")
    line, = job.failures()
    assert {str(reply.status), "permanent", action} <= set(line.values()), line
    assert not job.lines("JOB_SENT")


@scene({k: (v,) for k, v in GONE_FORMS.items()})
def reply_gone_send(world, reply):
    """Somebody sent it: done."""
    check_done(drive(world, "send", reply), "send", 1)


@scene({k: (v,) for k, v in GONE_FORMS.items()})
def reply_gone_restart(world, reply):
    job = drive(world, "restart", reply)
    job.ended()
    assert len(job.calls()) == 1


@scene({"restart": ("restart",), "send": ("send",)})
def reply_unrecognized(world, action):
    """The stable path at once, and from then on for all of this homeserver."""
    job = drive(world, action, UNRECOGNIZED, OK)
    check_done(job, action, 2)
    assert [c.stable for c in job.calls(action)] == [False, True]
    other = world.job(server=job.server).connected()
    other.left().sent()
    other.ended()
    assert [(c.action, c.stable) for c in other.calls()] == [("restart", True), ("send", True)]
    elsewhere = world.job(server=world.names[-1]).connected()
    assert elsewhere.server != job.server and not elsewhere.calls()[0].stable


@scene({"restart": ("restart",), "send": ("send",)})
def reply_unrecognized_on_both(world, action):
    job = drive(world, action, UNRECOGNIZED)
    job.ended()
    assert [c.stable for c in job.calls(action)] == [False, True]
    assert not job.lines("JOB_SENT")


@scene({"restart": ("restart",), "send": ("send",)})
def stable_path_is_transient(world, action):
    """Unrecognised, then a hiccup: the stable path again, not the unstable one."""
    job = drive(world, action, UNRECOGNIZED, BUSY, OK)
    check_done(job, action, 3)
    assert [c.stable for c in job.calls(action)] == [False, True, True]


def moved(status, where="{}"):
    """A redirect to the same place with a mark in the path that ClientApi takes for the base."""
    return lambda call: Reply(status, "", [("Location", where.format(call.req.path.replace(call.base, "/moved", 1)))])


@scene({f"{action} {status} {form}": (action, status, where) for action in ("restart", "send") for status in (307, 308)
        for form, where in (("path", "{}"), ("URL", "http://127.0.0.1:PORT{}"))})
def redirect_is_replayed(world, action, status, where):
    """Once, with method and body, to the same scheme, host and port."""
    job = drive(world, action, moved(status, where.replace("PORT", str(world.api.port))), OK)
    check_done(job, action, 2)
    assert [c.base for c in job.calls(action)][1] == "/moved"
    assert job.calls(action)[1].at - job.calls(action)[0].at < 15


@scene({"restart": ("restart",), "send": ("send",)})
def redirect_to_a_redirect(world, action):
    """Replayed once only; then it is a hiccup, and the next try begins at the base."""
    job = drive(world, action, moved(307), moved(307), OK)
    check_done(job, action, 3)
    first, second, third = job.calls(action)
    assert (second.base, third.base) == ("/moved", first.base) and third.at - second.at > 0.9


@scene
def redirected_restart_and_it_leaves(world):
    """The redirect was the restart's: the send goes where a send goes."""
    job = world.job().script("restart", moved(307), HANG).delegate().joined()
    job.restarted(2)
    job.left().sent()
    job.ended()
    assert [(c.action, c.base == "/moved") for c in job.calls()] == [("restart", False), ("restart", True), ("send", False)]


@scene
def redirected_restart_and_it_is_replaced(world):
    """Nor is it the next delegation's."""
    job = world.job().script("restart", moved(307), HANG).delegate().joined()
    job.restarted(2)
    new = world.job(like=job).delegate()
    new.restarted()
    new.left().sent()
    assert len(job.calls()) == 2 and not any(c.base == "/moved" for c in new.calls())


@scene
def everything_is_redirected(world):
    """A homeserver that moved: twelve jobs at once, each call to its own new place."""
    jobs = [world.job().script("restart", moved(307), OK).script("send", moved(308), OK).delegate() for _ in range(12)]
    for job in jobs:
        job.joined()
    for job in jobs:
        job.restarted(2)
        job.left()
    for job in jobs:
        job.ended()
        assert [(c.action, c.base == "/moved") for c in job.calls()] == [
            ("restart", False), ("restart", True), ("send", False), ("send", True)], job.calls()


# ---- two identities

@scene({f"{path} {how}": (path, how) for path in (DELEGATE, "/get_token") for how in ("webhook", "look-up")})
def joined_under_the_legacy_identity(world, path, how):
    """Watched under both names; the one seen connected is followed from then on."""
    job = world.job(path=path)
    if how == "look-up":
        job.present("legacy").delegate()
        job.restarted()
    else:
        job.delegate()
        job.wait_looked(1, "hashed")
        job.wait_looked(1, "legacy")
        job.joined("legacy").restarted()
    job.left(who="hashed")
    time.sleep(1)
    job.never_sent()
    assert not job.lines("JOB_LEAVING")
    job.left(who="legacy").sent()
    job.ended()


@scene({"webhook": (True,), "look-up": (False,)})
def joined_under_the_hashed_identity(world, by_webhook):
    job = world.job()
    if by_webhook:
        job.delegate().joined().restarted()
    else:
        job.present().delegate()
        job.restarted()
    job.left(who="legacy")
    time.sleep(1)
    job.never_sent()
    job.left().sent()


@scene
def sfu_get_knows_the_legacy_identity_only(world):
    job = world.job(path="/sfu/get").present("hashed").delegate()
    job.wait_looked(2, "legacy")
    assert not job.looked("hashed")
    job.hook("participant_joined", "hashed")
    assert not job.lines("JOB_CONNECTED")
    job.joined().restarted()
    job.left(who="hashed")
    job.never_sent()
    job.left().sent()


@scene
def other_rooms_and_people_do_not_matter(world):
    job = world.job().connected()
    stranger = world.job()
    for room, who in ((stranger.alias, None), (job.alias, stranger.hashed), (job.alias, job.hashed.lower()),
                      (job.alias.upper(), None), (job.hashed, job.alias)):
        job.hook("participant_left", who, reason="CLIENT_INITIATED", room=room)
    job.never_sent()
    assert not job.lines("JOB_LEAVING")
    job.left().sent()


@scene
def two_members_of_one_user(world):
    """Two devices in one room are two jobs."""
    one, two = (world.job(user="twice", room="!twice:x", device=d) for d in ("A", "B"))
    one.connected()
    two.connected()
    one.left().sent()
    two.never_sent()
    two.left().sent()


# ---- replacement

@scene
def replaced_in_waiting(world):
    job = world.job().delegate()
    new = world.job(like=job).delegate().joined()
    new.restarted()
    new.left().sent()
    assert not job.calls() and job.lines("JOB_REPLACED")


@scene({"same id": (True,), "new id": (False,)})
def replaced_in_connected(world, same):
    """The newer one begins anew: it is looked up, found, restarted; the older one's event is left alone."""
    job = world.job(T=6000).connected()
    new = world.job(like=job, T=6000, delay_id=job.delay_id if same else None)
    before = len(job.calls())
    new.delegate()
    if same:
        new.restarted(before + 1)
    else:
        new.restarted(2)
        assert len(job.calls()) == before
    new.left().sent()
    new.ended()
    assert same or job.never_sent()
    assert len(job.lines("JOB_REPLACED")) == 1 and len(job.lines("JOB_SENT")) == 1


@scene
def replaced_while_a_restart_is_pending(world):
    job = world.job().script("restart", HANG).delegate().joined()
    job.restarted()
    new = world.job(like=job).delegate()
    new.restarted()
    new.left().sent()
    assert [c.action for c in job.calls()] == ["restart"]


@scene
def replaced_while_a_send_is_pending(world):
    """It left, the send is not through, it comes back with a new event: the old send is given up."""
    job = world.job().script("send", BUSY).connected().left()
    job.sent()
    new = world.job(like=job).delegate()
    count = len(job.calls("send"))
    time.sleep(3)
    assert len(job.calls("send")) == count
    new.joined(sid="PA_2").restarted()
    new.left(sid="PA_2").sent()


@scene
def replaced_after_the_end(world):
    job = world.job().connected().left()
    job.sent()
    job.ended()
    new = world.job(like=job).connected()
    new.left().sent()
    assert not new.lines("JOB_REPLACED")


@scene({f"{a} then {b}": (a, b) for a, b in ((DELEGATE, "/get_token"), ("/get_token", DELEGATE))})
def replaced_through_another_endpoint(world, first, second):
    """Element Call asks for a second token whose only purpose is the delegation."""
    job = world.job(path=first).connected()
    new = world.job(path=second, like=job).delegate()
    new.restarted()
    new.left().sent()
    job.never_sent()


@scene({path: (path,) for path in ("/get_token", "/sfu/get")})
def delegated_with_the_token(world, path):
    """A token, a room, and the job."""
    job = world.job(path=path)
    before = len(world.sfu.rooms)
    job.connected()
    assert job.alias in [r["name"] for r in world.sfu.rooms[before:]]
    job.left().sent()


@scene({f"{path} {len(device)}": (path, device) for path in (DELEGATE, "/get_token") for device in ("D" * 255, "D" * 512, "é" * 256)})
def names_as_long_as_allowed(world, path, device):
    """A legacy identity beyond what the SFU takes cannot be watched; the hashed one is."""
    job = world.job(path=path, device=device, member="m" * 512, room="!" + "r" * 254).delegate().joined()
    job.restarted()
    job.left().sent()


@scene({i[:12]: (i,) for i in GOOD_IDS})
def delay_id_in_the_path(world, delay_id):
    """As it is, nothing encoded."""
    job = world.job(delay_id=delay_id).connected()
    assert job.restarted()[0].req.target.endswith(f"/delayed_events/{delay_id}/restart")
    job.left().sent()


# ---- the endpoint

@pytest.fixture(scope="module")
def world():
    with World(4) as w:
        yield w


@pytest.fixture
def silent(world):
    """No peer is spoken to, and no job begins, until the test ends."""
    ask = lambda: ([p.connections for p in (world.hs, world.api, world.sfu)], len(world.hs.requests), world.counted("JOB_NEW"))
    before = ask()
    yield world
    assert ask() == before


DELAY_FIELDS = {"delay_id": "syd_x", "delay_timeout": HOUR}


def body_for(world, path=DELEGATE, server=None, **over):
    server = server or world.names[0]
    user = f"v{next(_users)}"
    return {**make_body("/sfu/get" if path == "/sfu/get" else "/get_token", server, f"@{user}:{server}",
                        token_for(server, user), room=f"!{user}:x"), **DELAY_FIELDS, **over}


_users = itertools.count(1)


def test_probe(silent):
    """Element Call's: no body, no Content-Type. Readable and not 404 means: served."""
    check_error(silent.svc.request("POST", DELEGATE), 400, "M_NOT_JSON", NOT_JSON)
    check_error(silent.svc.request("POST", DELEGATE, ""), 400, "M_NOT_JSON", NOT_JSON)
    check_error(silent.svc.request("POST", "//delegate_delayed_leave?x", "{"), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "HEAD", "PUT", "DELETE", "FOO", "post"])
def test_method(silent, method):
    reply = silent.svc.request(method, DELEGATE)
    check_cors(reply)
    assert (reply.status, reply.body) == (200 if method == "OPTIONS" else 405, b"")
    assert reply.headers.get("allow") == (None if method == "OPTIONS" else ["OPTIONS, POST"])


@pytest.mark.parametrize("target", ["/delegate_delayed_leave/", "/delegate_delayed_leav", "/x/delegate_delayed_leave"])
def test_no_such_path(silent, target):
    assert silent.svc.request("POST", target, "{}").status == 404


STRING_FIELDS = STRINGS["/get_token"] + ["delay_id"]


@pytest.mark.parametrize("field", STRING_FIELDS + OBJECTS["/get_token"] + ["delay_timeout"])
@pytest.mark.parametrize("form", ["missing", "null", "empty"])
def test_required(silent, field, form):
    empty = {} if field in OBJECTS["/get_token"] else 0 if field == "delay_timeout" else ""
    reply = silent.svc.post(DELEGATE, put(body_for(silent), field, {"missing": ABSENT, "null": None, "empty": empty}[form]))
    check_error(reply, 400, "M_BAD_JSON")
    assert field.rpartition(".")[2] in reply.json["error"]


@pytest.mark.parametrize("field, value", [(f, v) for f in STRING_FIELDS for v in WRONG_STRING.values()] +
                         [(f, v) for f in OBJECTS["/get_token"] for v in WRONG_OBJECT.values()] +
                         [("delay_timeout", v) for v in ("1000", 1000.0, True, [], {}, "")])
def test_wrong_type(silent, field, value):
    check_error(silent.svc.post(DELEGATE, put(body_for(silent), field, value)), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("field", ["room", "device_id", "remove_me_user_id", "url", "Delay_id", "delay", "claimed_user_id", "",
                                   "member.device_id", "openid_token.id_token"])
@pytest.mark.parametrize("value", ["x", None], ids=["string", "null"])
def test_unknown_field(silent, field, value):
    check_error(silent.svc.post(DELEGATE, put(body_for(silent), field, value)), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("name", BROKEN)
def test_not_json(silent, name):
    check_error(silent.svc.post(DELEGATE, BROKEN[name]), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("text", ["null", "{}", " { } "])
def test_empty_object(silent, text):
    reply = silent.svc.post(DELEGATE, text)
    check_error(reply, 400, "M_BAD_JSON")
    assert "room_id" in reply.json["error"]


def test_too_large(silent):
    check_error(silent.svc.post(DELEGATE, "x" * 65537), 413, "M_TOO_LARGE")


HOSTILE_IDS = BAD_IDS + ["a/../b", "%2e%2e", "..%2f", "a\\b", "a;b", "a&b", "a=b", "a+b", "a@b", "a\r\nX: y", "\x7f", "\u202e",
                         "😀", "a" * 60000, "syd_x/send?", "//", "{}", "\ud7ff"]


@pytest.mark.parametrize("path", [DELEGATE, "/get_token", "/sfu/get"])
@pytest.mark.parametrize("delay_id", HOSTILE_IDS, ids=[ascii(i)[:24] for i in HOSTILE_IDS])
def test_s08_hostile_delay_id(silent, path, delay_id):
    reply = silent.svc.post(path, body_for(silent, path, delay_id=delay_id))
    check_error(reply, 400, "M_BAD_JSON")
    assert "delay_id" in reply.json["error"]


@pytest.mark.parametrize("path", [DELEGATE, "/get_token", "/sfu/get"])
@pytest.mark.parametrize("literal", ["-1", str(-INT64), str(INT64), "99999999999999999999"])
def test_s18_timeout_out_of_range(silent, path, literal):
    text = json.dumps(body_for(silent, path, delay_timeout=-7)).replace("-7", literal)
    reply = silent.svc.post(path, text)
    check_error(reply, 400, "M_BAD_JSON")
    assert "delay_timeout" in reply.json["error"]


@pytest.mark.parametrize("literal", ["1", "999", "18000", "86400000", "86400001", str(INT64 - 1)])
def test_timeout_in_range(world, literal):
    """What is too small or too large is clamped, not refused."""
    job = world.job()
    job.T = int(literal)
    job.delegate().joined().restarted()
    job.left().sent()


@pytest.mark.parametrize("value", ["https://evil.test", None, {"a": 1}, [], 7])
def test_delay_cs_api_url_is_ignored(world, value):
    job = world.job()
    reply = job.ask(delay_cs_api_url=value)
    assert reply.status == 200, reply
    assert job.joined().restarted()[0].base == "/" + job.server.partition(".")[0]
    job.left().sent()


@pytest.mark.parametrize("path", [DELEGATE, "/get_token", "/sfu/get"])
def test_restricted(world, path):
    """Told as the clients need it; no room, no job, no look at their homeserver's API."""
    before = len(world.sfu.rooms), world.counted("JOB_NEW")
    reply = world.svc.post(path, body_for(world, path, "restricted.test"))
    check_error(reply, *((403, "M_FORBIDDEN") if path == DELEGATE else (400, "M_BAD_JSON")), DELEGATION)
    assert (len(world.sfu.rooms), world.counted("JOB_NEW")) == before


@pytest.mark.parametrize("server", ["h0.leave.test", "restricted.test"])
@pytest.mark.parametrize("path", [DELEGATE, "/get_token"])
def test_the_claim_comes_before_rights(world, path, server):
    body = body_for(world, path, server)
    body["member"]["claimed_user_id"] = f"@somebody:{server}"
    check_error(world.svc.post(path, body), 401, "M_UNAUTHORIZED", UNAUTHORIZED)


@pytest.mark.parametrize("path", [DELEGATE, "/get_token", "/sfu/get"])
def test_a_bad_token_comes_before_rights(world, path):
    world.hs.on("/_matrix/federation/v1/openid/userinfo", Reply(401, {"errcode": "M_UNKNOWN_TOKEN"}))
    try:
        for server in ("h0.leave.test", "restricted.test"):
            check_error(world.svc.post(path, body_for(world, path, server)), 401, "M_UNAUTHORIZED", UNAUTHORIZED)
    finally:
        world.hs.off()


def test_delegate_makes_no_room_and_no_token(world):
    before = len(world.sfu.rooms)
    job = world.job().delegate()
    assert len(world.sfu.rooms) == before
    job.joined().left().sent()


@pytest.mark.parametrize("path", ["/get_token", "/sfu/get"])
def test_no_room_no_job(world, path):
    """CreateRoom fails: 500, and nothing is kept."""
    world.sfu.fail = Reply(500, {"code": "internal", "msg": "x"})
    try:
        job = world.job(path=path)
        job.refused(500, "M_UNKNOWN", "Unable to create room on SFU")
    finally:
        world.sfu.fail = None
    assert not job.lines("JOB_NEW")


@pytest.mark.parametrize("device", ["D" * 256, "D" * 512, "é" * 256])
def test_sfu_get_whose_only_identity_is_too_long(world, device):
    """Nothing could be watched: refused so that the client repeats without; nothing else is disturbed."""
    before = len(world.sfu.rooms), world.counted("JOB_NEW")
    world.job(path="/sfu/get", device=device).refused(400, "M_BAD_JSON")
    assert (len(world.sfu.rooms), world.counted("JOB_NEW")) == before
    world.job().connected().left().sent()


def test_token_calls_without_delay_make_no_job(world):
    """Element Call: a plain call first; later a second one whose token it throws away, for the delegation."""
    job = world.job(path="/get_token")
    check_granted(job.ask(delay_id=None, delay_timeout=None))
    assert not job.lines("JOB_NEW")
    job.delegate().joined().restarted()
    check_granted(job.ask(delay_id="", delay_timeout=0))     # and a third one does not end it
    job.never_sent().left().sent()
    job.ended()
    assert len(job.lines("JOB_NEW")) == 1 and not job.lines("JOB_REPLACED")


def test_metrics(world):
    """Jobs are a gauge; calls are counted by what was asked and what came."""
    called = lambda: {k: v for k, v in world.svc.metrics().items() if k.startswith("lkjwt_upstream_requests_total")
                      and "delayed_event" in k}
    world.job().connected().left().ended()
    jobs, before = world.leaves(), sum(called().values())
    job = world.job().script("send", BUSY, OK).connected()
    assert world.leaves() == jobs + 1
    job.left()
    job.ended()
    wait_for("the gauge", lambda: world.leaves() == jobs)
    assert sum(called().values()) == before + 3, called()
    for name in ("JOB_NEW", "JOB_CONNECTED", "JOB_RESTARTED", "JOB_LEAVING", "JOB_SENT", "JOB_ENDED", "DELAYED_EVENT_FAILED"):
        assert world.counted(name) > 0, name


def test_what_is_told_of_a_job(world):
    """At info: its beginning and its end, with the homeserver; what lies between is debug."""
    job = world.job().connected()
    wait_for("the restart's line", lambda: any(e["event"] == "JOB_RESTARTED" for e in job.lines()))
    job.left()
    job.ended()
    lines = {e["event"]: e for e in job.lines()}
    assert {"JOB_NEW": "info", "JOB_CONNECTED": "debug", "JOB_RESTARTED": "debug", "JOB_LEAVING": "debug", "JOB_SENT": "info",
            "JOB_ENDED": "info"}.items() <= {k: e["level"] for k, e in lines.items()}.items()
    assert lines["JOB_ENDED"]["reason"] and lines["JOB_ENDED"]["server"] == job.server
    assert not any(job.delay_id in e.values() or job.user in str(e) for e in job.lines()), "who leaves is nobody's business"


# ---- caps

def fill(world, count, **kw):
    return [world.job(**kw).delegate() for _ in range(count)]


def test_s17_jobs_of_a_user(world):
    """Sixteen, or as configured; the user's own newer delegation of the same key is no more; an end makes room."""
    with World(LKJWT_JOBS_PER_USER="3") as w:
        user = dict(user="greedy", server=w.names[0])
        jobs = fill(w, 3, **user)
        more = w.job(**user)
        more.refused(403, "M_USER_LIMIT_EXCEEDED")
        for path in ("/get_token", "/sfu/get"):
            w.job(path=path, **user).refused(400, "M_BAD_JSON")
        assert w.counted("JOBS_USER") == 3 and not w.sfu.rooms and w.leaves() == 3
        check_granted(w.job(path="/get_token", **user).ask(delay_id=None, delay_timeout=None))
        w.job(like=jobs[0]).delegate()          # replaces
        assert w.leaves() == 3
        fill(w, 2)                              # others are not touched
        jobs[1].joined().left().sent()
        jobs[1].ended()
        more.delegate()
        w.job(**user).refused(403, "M_USER_LIMIT_EXCEEDED")
    with World() as w:
        fill(w, 16, user="greedy", server=w.names[0])
        w.job(user="greedy", server=w.names[0]).refused(403, "M_USER_LIMIT_EXCEEDED")


def test_jobs_overall():
    with World(LKJWT_JOBS_MAX="4") as w:
        jobs = fill(w, 4)
        more = w.job()
        reply = more.refused(429, "M_LIMIT_EXCEEDED")
        assert int(reply.header("Retry-After")) >= 1 and reply.json["retry_after_ms"] >= 1000
        for path in ("/get_token", "/sfu/get"):
            w.job(path=path).refused(400, "M_BAD_JSON")
        assert w.counted("JOBS_FULL") == 3 and not w.sfu.rooms
        assert w.log.all() and w.svc.wait_event("JOBS_FULL")["level"] == "warning"
        w.job(like=jobs[3]).delegate()
        jobs[0].joined().left().sent()
        jobs[0].ended()
        more.delegate()
        assert w.leaves() == 4


def test_no_jobs_at_all():
    """LKJWT_JOBS_MAX=0: the service as if it did not delegate."""
    with World(LKJWT_JOBS_MAX="0") as w:
        w.job().refused(429, "M_LIMIT_EXCEEDED")
        w.job(path="/get_token").refused(400, "M_BAD_JSON")


def test_jobs_of_a_server_that_anyone_can_set_up():
    """Under the lone `*`: 500 a server."""
    with World(LIVEKIT_FULL_ACCESS_HOMESERVERS="*", LIVEKIT_LOG_LEVEL="info", LKJWT_JOBS_PER_USER="600") as w:
        server = w.names[0]
        before = time.monotonic()
        fill(w, 500, server=server)
        w.job(server=server).refused(429, "M_LIMIT_EXCEEDED")
        assert w.leaves() == 500, time.monotonic() - before


# ---- where the client-server API is: .well-known/matrix/client

WELL_KNOWN_CLIENT = "/.well-known/matrix/client"


class Front(ClientApi):
    """Port 443 of every *.cs.test: well-knowns by host, and client-server APIs. known: host -> what m.homeserver's
    base_url is (text), a Reply, a function(Request), or a list of those taken in turn."""

    def __init__(self, *a, **kw):
        self.known = {}
        super().__init__(*a, **kw)

    def answer(self, req):
        if req.path.startswith(WELL_KNOWN_CLIENT):
            script = self.known.get(req.host)
            if isinstance(script, list):
                script = script.pop(0) if len(script) > 1 else script[0]
            if callable(script):
                script = script(req)
            if isinstance(script, str):
                script = well_known(script)
            return script or Reply(404, "none")
        if req.path == WELL_KNOWN:
            return Reply(404, "none")
        return super().answer(req)

    def asked(self, host):
        return [r for r in self.seen() if r.path.startswith(WELL_KNOWN_CLIENT) and r.host == host]


def well_known(base, **more):
    return Reply(200, {"m.homeserver": {"base_url": base}, "m.identity_server": {"base_url": "https://x"},
                       "org.matrix.msc4143.rtc_foci": [{"type": "livekit", "livekit_service_url": "https://y"}], **more})


_addresses = itertools.count(70)


class CsWorld(World):
    """A World whose servers' client-server APIs are found by name. The homeserver part answers under any name."""

    def __init__(self, open_to_all=False, **env):
        super().__init__(0)
        self.address = pub(next(_addresses))
        cert = pki().leaf(["*.cs.test", "*.plain.test"], [self.address])
        self.api.stop()
        self.api = Front([(self.address, 443), (self.address, 8443)], tls=cert)
        self.http = Front(self.address)
        self.dns = Dns(f"*.cs.test. A {self.address}")
        self.dns.any_hook = self._any
        names = [f"n{i}.cs.test" for i in range(150)]
        self._next = itertools.cycle(names)
        env = {"LKJWT_RESOLVER": self.dns.netloc, "LKJWT_CA_FILE": pki().ca_file, "LKJWT_CA_ONLY": "true",
               "LIVEKIT_FULL_ACCESS_HOMESERVERS": ",".join(names), "LIVEKIT_CS_API_URL_OVERRIDES": None,
               "LKJWT_LOOKUP_TIMEOUT_S": "3",
               "LKJWT_FEDERATION_API_URL_OVERRIDES": ",".join(f"{n}={self.hs.url}" for n in names), **env}
        if open_to_all:
            self.hs.stop()
            self.hs = Homeserver([(self.address, 8448)], sub=by_token, tls=cert)
            env |= {"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*", "LKJWT_FEDERATION_API_URL_OVERRIDES": None}
        self.env |= env
        self.svc = Service(base_env(**self.env))
        self.log = Log(self.svc)

    def _any(self, data, record, transport):
        """Every name below cs.test is the one address; nothing else exists."""
        reply = self.dns.reply(record)
        name = str(record.q.qname)
        if name.endswith(".cs.test.") and dnslib.QTYPE[record.q.qtype] == "A" and not name.startswith("_"):
            reply.add_answer(*dnslib.RR.fromZone(f"{name} 60 A {self.address}"))
        elif not name.endswith(".cs.test."):
            reply.header.rcode = dnslib.RCODE.NXDOMAIN
        return reply

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.dns.stop()
        self.http.stop()


@pytest.fixture(scope="module")
def cs():
    with CsWorld() as w:
        yield w


BASES = {
    "plain": ("https://{}", "443", ""),
    "slash": ("https://{}/", "443", ""),
    "slashes": ("https://{}///", "443", ""),
    "path": ("https://{}/deep", "443", "/deep"),
    "path and slash": ("https://{}/deep//", "443", "/deep"),
    "port": ("https://{}:8443", "8443", ""),
    "port 443": ("https://{}:443", "443", ""),
    "upper case scheme": ("HTTPS://{}", "443", ""),
    "another host": ("https://api.cs.test", "443", ""),
    "address": ("https://ADDRESS", "443", ""),
    "http, as listed": ("http://{}:HTTP", "HTTP", ""),
    "http, path": ("http://{}:HTTP/m/", "HTTP", "/m"),
}


@pytest.mark.parametrize("form", BASES)
def test_base_url(cs, form):
    base, port, prefix = BASES[form]
    job = cs.job()
    text = base.replace("ADDRESS", cs.address).replace("HTTP", str(cs.http.port)).format(job.server)
    if form == "upper case scheme":
        text = f"HTTPS://{job.server}"
    cs.api.known[job.server] = text
    job.delegate().joined()
    api = cs.http if "HTTP" in port else cs.api
    call = api.wait(job.delay_id, "restart")[0]
    assert (call.base, call.req.addr[1]) == (prefix, cs.http.port if "HTTP" in port else int(port))
    host = text.partition("://")[2].partition("/")[0]
    assert call.req.host in (host, host.removesuffix(":443"))
    assert call.req.sni == (None if form == "address" or "http," in form else host.partition(":")[0])
    job.left()
    api.wait(job.delay_id, "send")
    asked, = cs.api.asked(job.server)
    assert (asked.method, asked.header("accept"), asked.addr[1]) == ("GET", "application/json", 443)
    assert asked.header("authorization") is None and asked.body == b""


def redirect(to, status=302):
    return Reply(status, "", [("Location", to)])


MORE_KNOWN = {
    "other members": lambda h: well_known(f"https://{h}", **{"x": [1, {"y": None}], "m.homeserver.x": 1}),
    "members inside": lambda h: Reply(200, {"m.homeserver": {"x": {}, "base_url": f"https://{h}", "server_name": 7}}),
    "any type": lambda h: Reply(200, json.dumps({"m.homeserver": {"base_url": f"https://{h}"}}), ctype="text/html"),
    "as large as allowed": lambda h: Reply(200, json.dumps({"m.homeserver": {"base_url": f"https://{h}"}}).ljust(65536)),
    "chunked": lambda h: Reply(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(
        json.dumps({"m.homeserver": {"base_url": f"https://{h}"}}).encode())),
    "to the end": lambda h: Reply(200, {"m.homeserver": {"base_url": f"https://{h}"}}, length=False, close=True),
    **{f"redirect {s}": (lambda h, s=s: [redirect(f"https://{h}{WELL_KNOWN_CLIENT}2", s), f"https://{h}"])
       for s in (301, 302, 303, 307, 308)},
    "redirect by path": lambda h: [redirect(WELL_KNOWN_CLIENT + "/x"), f"https://{h}"],
    "three redirects": lambda h: [redirect(f"https://{h}{WELL_KNOWN_CLIENT}/{i}") for i in range(3)] + [f"https://{h}"],
}


@pytest.mark.parametrize("form", MORE_KNOWN)
def test_well_known_client(cs, form):
    job = cs.job()
    cs.api.known[job.server] = MORE_KNOWN[form](job.server)
    job.delegate().joined().restarted()
    job.left().sent()


BAD_KNOWN = {
    **{f"status {s}": Reply(s, {"m.homeserver": {"base_url": "https://x.cs.test"}}) for s in (201, 204, 400, 403, 404, 429, 500, 503)},
    "empty": Reply(200, ""), "HTML": Reply(200, "<html>"), "array": Reply(200, "[]"), "null": Reply(200, "null"),
    "trailing": Reply(200, '{"m.homeserver":{"base_url":"https://x.cs.test"}}{}'),
    "twice": Reply(200, '{"m.homeserver":{"base_url":"https://x.cs.test","base_url":"https://y.cs.test"}}'),
    "bad UTF-8": Reply(200, b'{"x":"\xff","m.homeserver":{"base_url":"https://x.cs.test"}}'),
    "nothing in it": Reply(200, {}), "no base_url": Reply(200, {"m.homeserver": {}}),
    "homeserver text": Reply(200, {"m.homeserver": "https://x.cs.test"}), "base_url null": well_known(None),
    "base_url number": well_known(7), "base_url array": well_known(["https://x.cs.test"]),
    **{f"base_url {b!r}": well_known(b) for b in (
        "", "x.cs.test", "//x.cs.test", "ftp://x.cs.test", "https://", "https:x.cs.test", "https:///x", "https://u@x.cs.test",
        "https://u:p@x.cs.test", "https://x.cs.test?q=1", "https://x.cs.test#f", "https://x.cs.test:0", "https://x.cs.test:65536",
        "https://x.cs.test:x", "https://x cs.test", "https://x.cs.test/a b", "https://x.cs.test/\r\nX: y", "https://[::1",
        "https://x.cs.test\0", "https://é.test", " https://x.cs.test", "javascript:alert(1)", "unix:/run/x", "https://x_y.cs.test", "https://x.cs.test/\\",
        "https://" + "x" * 5000)},
    "too large": Reply(200, json.dumps({"m.homeserver": {"base_url": "https://x.cs.test"}}).ljust(65537)),
    "cut": Reply(200, {"m.homeserver": {"base_url": "https://x.cs.test"}}, cut=90),
    "closed": CLOSE, "reset": RESET, "no HTTP": Reply(raw=b"220 x\r\n", close=True), "hangs": HANG,
    "redirect to http": redirect("http://x.cs.test" + WELL_KNOWN_CLIENT),
    "redirect nowhere": Reply(302), "redirect to userinfo": redirect("https://u:p@x.cs.test/"),
    "redirect 300": redirect(WELL_KNOWN_CLIENT, 300), "redirects for ever": redirect(WELL_KNOWN_CLIENT),
    "redirect to ftp": redirect("ftp://x.cs.test/"),
}


@pytest.mark.parametrize("form", BAD_KNOWN)
def test_bad_well_known_client(cs, form):
    """No API, no delegation: refused before a room is made; not asked again within the minute."""
    job = cs.job()
    cs.api.known[job.server] = BAD_KNOWN[form]
    rooms = len(cs.sfu.rooms)
    job.refused(400, "M_BAD_JSON", NO_API)
    asked = len(cs.api.asked(job.server))
    assert asked >= 1
    for path in ("/get_token", "/sfu/get"):
        cs.job(path=path, server=job.server).refused(400, "M_BAD_JSON", NO_API)
    assert len(cs.api.asked(job.server)) == asked and len(cs.sfu.rooms) == rooms
    check_granted(cs.job(path="/get_token", server=job.server).ask(delay_id=None, delay_timeout=None))


def test_where_no_api_is_told(cs):
    """Which step failed, for whom."""
    job = cs.job()
    job.refused(400, "M_BAD_JSON", NO_API)
    line = cs.svc.wait_event("API_UNKNOWN", server=job.server)
    assert line["level"] == "warning"


def test_three_redirects_and_no_more(cs):
    job = cs.job()
    cs.api.known[job.server] = [redirect(f"{WELL_KNOWN_CLIENT}/{i}") for i in range(4)] + [f"https://{job.server}"]
    job.refused(400, "M_BAD_JSON", NO_API)
    assert len(cs.api.asked(job.server)) == 4


def test_the_api_is_remembered(cs):
    job = cs.job()
    cs.api.known[job.server] = f"https://{job.server}"
    jobs = [job] + [cs.job(server=job.server) for _ in range(5)]
    for j in jobs:
        j.delegate().joined().restarted()
        j.left().sent()
    assert len(cs.api.asked(job.server)) == 1
    assert any('target="client_api"' in k and v for k, v in cs.svc.metrics().items() if "upstream_requests" in k)


def test_looked_for_once_by_many(cs):
    """Ten delegations at once share one look-up."""
    first = cs.job()
    cs.api.known[first.server] = lambda req: Reply(200, {"m.homeserver": {"base_url": f"https://{req.host}"}}, delay=1)
    jobs = [first] + [cs.job(server=first.server) for _ in range(9)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda j: j.delegate(), jobs))
    assert len(cs.api.asked(first.server)) == 1
    for j in jobs:
        j.joined().left().sent()


def test_port_and_override(cs):
    """The well-known is the host's, on 443, whatever the name's port; an override is for exactly one name."""
    env = {"LIVEKIT_FULL_ACCESS_HOMESERVERS": "a.cs.test:8448 b.cs.test b.cs.test:8448 c.cs.test",
           "LKJWT_FEDERATION_API_URL_OVERRIDES": ",".join(f"{n}=HS" for n in (
               "a.cs.test:8448", "b.cs.test", "b.cs.test:8448", "c.cs.test"))}
    with CsWorld() as w:
        w.svc.stop()
        env = {k: v.replace("HS", w.hs.url) for k, v in env.items()}
        bare = f"{w.address}:443/bare/"
        w.svc = Service(base_env(**w.env | env | {"LIVEKIT_CS_API_URL_OVERRIDES":
                                                  f" b.cs.test = https://b.cs.test/over/ ,, c.cs.test={bare}"}))
        w.log = Log(w.svc)
        w.svc.start()
        w.api.known |= {"a.cs.test": "https://a.cs.test/found", "b.cs.test": "https://b.cs.test/found"}
        for server, base, asked in (("a.cs.test:8448", "/found", 1), ("b.cs.test", "/over", 0), ("b.cs.test:8448", "/found", 1),
                                    ("c.cs.test", "/bare", 0)):
            before = len(w.api.asked(server.partition(":")[0]))
            job = w.job(server=server).delegate().joined()
            assert job.restarted()[0].base == base, server
            assert len(w.api.asked(server.partition(":")[0])) - before == asked, server
            job.left().sent()


PRIVATE = ("127.0.0.1", "10.9.8.7", "169.254.169.254", "[::1]", "[fd00::7]", "[::ffff:10.9.8.7]")


def test_s01_s04_strangers_lead_nowhere_private():
    """A stranger's base_url: https only, and no private address on any hop; a redirect of a call leads to no other host."""
    ask = [a.strip("[]") for a in PRIVATE]
    add_addr(*[a for a in ask if not a.startswith("::ffff")])
    traps = [HttpServer([(a.removeprefix("::ffff:"), 443)]) for a in ask if not a.startswith("::ffff")]
    with CsWorld(open_to_all=True, LKJWT_PRIVATE_NETWORKS="deny") as w:
        for n, address in enumerate(PRIVATE):
            for kind in ("base", "redirect", "call"):
                server = f"s{n}{kind}.cs.test"
                job = w.job(server=server)
                w.api.known[server] = {"base": f"https://{address}", "call": f"https://{server}",
                                       "redirect": redirect(f"https://{address}{WELL_KNOWN_CLIENT}")}[kind]
                if kind == "redirect":
                    job.refused(400, "M_BAD_JSON", NO_API)
                    continue
                job.script("restart", redirect(f"https://{address}/", 307), OK).delegate().joined()
                wait_for("a failure", lambda: job.failures())
                if kind == "base":
                    assert not job.calls()
        server = "plain.cs.test"
        w.api.known[server] = f"http://{server}:{w.http.port}"
        w.job(server=server).refused(400, "M_BAD_JSON", NO_API)
        assert not w.http.connections
    for trap in traps:
        assert trap.connections == 0, trap.addr
        trap.stop()


def test_api_that_goes_away_and_comes_back(cs):
    """No connection, no certificate for it: transient, and the job outlives it."""
    job, other = cs.job(), cs.job()
    cs.api.known[job.server] = f"https://{job.server}:1"
    cs.api.known[other.server] = f"https://{other.server}.wrong.cs.test"
    for j in (job, other):
        j.delegate().joined()
        wait_for("two failures", lambda: len(j.failures()) >= 2)
        assert {e["outcome"] for e in j.failures()} == {"transient"} and not j.lines("JOB_ENDED")
        assert {e["step"] for e in j.failures()} == {"connect" if j is job else "tls"}
        assert all(e["addr"].startswith(cs.address) for e in j.failures())


# ---- the queue of a homeserver that limits

@scene
def sends_go_first(_):
    """The API asks for a pause; when it is over, who left goes before who stays, whatever was queued first."""
    with World() as w:
        jobs = fill(w, 24)
        opened = threading.Event()
        w.api.every = lambda call: None if opened.is_set() else Reply(429, "", [("Retry-After", "4")])
        for job in jobs:
            job.joined()
        wait_for("the first refusal", lambda: w.api.calls)
        time.sleep(1)
        refused = len(w.api.calls)
        assert refused <= 8, "calls went on against a 429"
        leavers = jobs[-4:]
        for job in leavers:
            job.left()
        opened.set()
        for job in leavers:
            job.sent()
        for job in jobs[:-4]:
            job.restarted()
        later = w.api.calls[refused:]
        assert {c.action for c in later[:4]} == {"send"}, later[:12]
        assert {c.delay_id for c in later[:4]} == {j.delay_id for j in leavers}


class Limiter:
    """Synapse's rate limit: a bucket for the whole client address; hint says how a refusal is worded."""

    def __init__(self, per_s, burst, hint):
        self.per_s, self.burst, self.hint = per_s, burst, hint
        self.left, self.at, self.refused, self.lock = burst, time.monotonic(), 0, threading.Lock()

    def __call__(self, call):
        with self.lock:
            now = time.monotonic()
            self.left, self.at = min(self.burst, self.left + (now - self.at) * self.per_s), now
            if self.left >= 1:
                self.left -= 1
                return None
            self.refused += 1
            wait = int((1 - self.left) / self.per_s * 1000) + 1
        return self.hint(wait)


@scene({
    "retry_after_ms": (lambda ms: Reply(429, {"errcode": "M_LIMIT_EXCEEDED", "error": "x", "retry_after_ms": ms}),),
    "Retry-After": (lambda ms: Reply(429, {"errcode": "M_LIMIT_EXCEEDED"}, [("Retry-After", str(-(-ms // 1000)))]),),
    "no hint": (lambda ms: Reply(429, "slow down"),)})
def everybody_leaves_at_once(_, hint):
    """60 at an API that takes 5 a second: every event is sent, and the limit is not kept exhausted meanwhile."""
    with World(count=1) as w:
        jobs = fill(w, 60)
        for job in jobs:
            job.joined()
        for job in jobs:
            job.restarted()
        w.api.every = limit = Limiter(5, 5, hint)
        for job in jobs:
            job.left()
        for job in jobs:
            job.ended()
        assert all(job.lines("JOB_SENT") for job in jobs)
        assert limit.refused < 60, f"{limit.refused} refusals for 60 sends"


@scene
def queues_are_separate(_):
    """One homeserver that hangs does not keep another's events."""
    with World(2) as w:
        slow = fill(w, 12, server=w.names[0])
        quick = fill(w, 12, server=w.names[1])
        for job in slow:
            job.script("restart", HANG).script("send", HANG, OK)
        for job in slow + quick:
            job.joined()
        for job in quick:
            job.restarted()
            job.left().sent()
        for job in quick:
            job.ended()
        assert not any(job.lines("JOB_RESTARTED") for job in slow)
        for job in slow:
            job.left()
        for job in slow:
            job.ended()


# ---- the process

def cpu(world):
    """Seconds of CPU time that the service has used."""
    fields = open(f"/proc/{world.svc.pid}/stat").read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_doubt_costs_nothing():
    """All timers due while the SFU hangs and while absence is confirmed: the loop sleeps meanwhile."""
    with World(3, LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS="1") as w:
        jobs = fill(w, 8, T=2000)
        for job in jobs:
            job.joined()
        for job in jobs:
            job.restarted()
        for job in jobs[:4]:
            job.presence(HANG)
        for job in jobs[4:]:
            job.left("DUPLICATE_IDENTITY")
        before = cpu(w)
        time.sleep(6)
        assert cpu(w) - before < 2, "busy"
        for job in jobs:
            job.never_sent()


@scene({"every second": ("1",), "off": ("0",)})
def sanity_check(_, interval):
    """No webhook at all: found by look-up, lost by look-up; without the interval nobody asks, at T = 1 h."""
    with World(LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS=interval) as w:
        jobs = [w.job().present().delegate() for _ in range(2)]
        for job in jobs:
            job.restarted()
        jobs[0].wait_looked(3 if interval == "1" else 1)
        jobs[0].absent()
        if interval == "1":
            jobs[0].sent()
            jobs[0].ended()
            assert jobs[1].never_sent() and not jobs[1].lines("JOB_ENDED")
        else:
            time.sleep(3)
            assert [len(job.looked()) for job in jobs] == [1, 1]


@scene({"500": (Reply(500, {"code": "internal", "msg": "x"}),), "404 HTML": (Reply(404, "<html>"),), "closed": (CLOSE,)})
def sanity_check_meets_errors(_, reply):
    with World(LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS="1") as w:
        job = w.job().present().delegate()
        job.restarted()
        job.presence(reply)
        job.wait_looked(len(job.looked()) + 4)
        job.never_sent()
        assert not job.lines("JOB_LEAVING") and not job.lines("JOB_ENDED")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_s28_stopping_sends_nothing(number):
    """Waiting, Connected, Leaving, with calls and look-ups under way: stopped, and nothing more was sent."""
    with World(6) as w:
        waiting = w.job().delegate()
        hanging = w.job().presence(HANG).delegate()
        connected = [w.job(T=20000).connected() for _ in range(3)]
        slow = w.job().script("restart", HANG).delegate().joined()
        slow.restarted()
        leaving = w.job().script("send", BUSY).connected().left()
        leaving.sent()
        sends = len(w.api.of(leaving.delay_id, "send"))
        w.svc.signal(number)
        w.stopped()
        for job in (waiting, hanging, slow, *connected):
            job.never_sent()
        assert len(leaving.calls("send")) <= sends + 1


def test_a_delegation_that_meets_the_stop():
    """§4, step 12: the user is known only when the service is stopping. 503, and a client tries elsewhere."""
    with World(2) as w:
        release = threading.Event()
        w.hs.on("/_matrix/federation/v1/openid/userinfo", lambda req: release.wait(20) and None)
        jobs = [w.job(path=path) for path in (DELEGATE, "/get_token", "/sfu/get")]
        with ThreadPoolExecutor(3) as pool:
            replies = [pool.submit(job.ask) for job in jobs]
            wait_for("the questions", lambda: len(w.hs.requests) == 3)
            w.svc.signal(signal.SIGTERM)
            w.svc.wait_event("STOPPING")
            release.set()
            for f in replies:
                check_error(f.result(), 503, "M_UNKNOWN", "Service is shutting down")
        w.stopped()
        assert not w.api.calls


# ---- the scenes

@pytest.mark.parametrize("title", SCENES)
def test_scene(played, title):
    played[title].result(timeout=4 * LONG)
