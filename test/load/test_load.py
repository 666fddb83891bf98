"""Two replicas with a pod's limits behind haproxy with Redis, under load as
operators make it: all requests are answered, limits hold, one noisy
homeserver or user harms nobody else, and a rolling restart fails nothing."""

import base64
import itertools
import json
import time

import pytest

from conftest import REPORT
from exchange import make_body
from leave import WEBHOOK, event, webhook_token
from outbound import by_token, token_for
from peers import RawServer
from pods import MEMORY, Attack, Fleet, peak, used
from replicas import connected, until
from service import find_leaks
from store import RedisServer

RATE = 60               # requests a second: what a core shared with all else
                        # on this machine serves without an effort
JSON = [("Content-Type", "application/json")]
_serial = itertools.count(1)


# ---- requests; each from a user of its own

def exchange(server, path="/sfu/get", user=None):
    user = user or f"l{next(_serial)}"
    body = make_body(path, server, f"@{user}:{server}",
                     token_for(server, user),
                     room=f"!r{next(_serial) % 50}:load.test")
    return "POST", path, json.dumps(body), JSON


def webhook():
    n = next(_serial)
    body = json.dumps(event("participant_joined", f"room{n % 50}", f"id{n}"))
    return "POST", WEBHOOK, body, [
        ("Content-Type", "application/webhook+json"),
        ("Authorization", webhook_token(body))]


def mixed(fleet, count, health=True):
    """Of ten requests eight exchange a token, one is a webhook, one asks
    for health."""
    last = ("GET", "/healthz", "", ()) if health else None
    return [webhook() if n % 10 == 8 else last if last and n % 10 == 9
            else exchange(fleet.names[n % len(fleet.names)],
                          "/get_token" if n % 10 > 4 else "/sfu/get")
            for n in range(count)]


@pytest.fixture(scope="module")
def fleet():
    with RedisServer() as store, Fleet(
            store, LKJWT_ALLOW_NETWORKS="127.0.0.0/8") as f:
        REPORT.append(f"two replicas, each {MEMORY >> 20} MiB of addresses "
                      f"by ulimit, 100m of CPU by {f.quota.name}")
        yield f
        f.limits_hold()
        REPORT.append("peak resident memory at the end, MiB: " + ", ".join(
            f"{peak(pid) / 2**20:.1f}" for pid in f.pids()))
    assert find_leaks() == [], "a secret or token in the logs"


def tell(fleet, name, result, spent=None):
    line = f"{name}: {result}"
    if spent is not None:
        line += f"; CPU {1e6 * spent / len(result):.0f} us a request"
        waits = [fleet.quota.throttled(pid) for pid in fleet.pids()]
        if None not in waits:
            line += f", throttled in {100 * max(waits):.0f} % of periods"
    REPORT.append(line)


# ---- load

def test_steady(fleet):
    """Twenty seconds of joins, webhooks and probes."""
    before = {pid: used(pid) for pid in fleet.pids()}
    began = time.monotonic()
    result = Attack(fleet.front.port, mixed(fleet, 20 * RATE), RATE).result()
    took = time.monotonic() - began
    result.all_well()
    assert len(result) == 20 * RATE
    spent = [used(pid) - before[pid] for pid in fleet.pids()]
    tell(fleet, f"steady, {RATE}/s", result, sum(spent))
    # Both had their share, and neither went over what a pod is allowed.
    assert all(0 < s < 0.11 * took + 0.1 for s in spent), (spent, took)
    fleet.limits_hold()


def test_burst(fleet):
    """An event begins: 500 people want in within a second."""
    targets = [exchange(fleet.names[n % 4]) for n in range(500)]
    result = Attack(fleet.front.port, targets, 500).result().all_well()
    assert len(result) == 500
    tell(fleet, "burst, 500 in a second", result)
    fleet.limits_hold()


def test_noisy_homeserver(fleet):
    """One homeserver takes requests and never answers. What waits for it is
    bounded and the rest told to come back; all others are served."""
    over = []
    with RawServer(lambda sock, n: until(
            "the end", lambda: over, 120)) as mute:
        flood = Attack(fleet.front.port, [exchange(mute.netloc)
                                          for _ in range(600)], 200, 90)
        others = Attack(fleet.front.port, mixed(fleet, 15 * RATE), RATE)
        served = others.result().all_well()
        noisy = flood.result()
        over.append(True)
    tell(fleet, "beside a mute homeserver", served)
    assert not noisy.errors, noisy.errors[:3]
    limited = noisy.of(429)
    # Two replicas, each 16 at once and 128 waiting; some of these are told
    # later that their turn did not come.
    assert len(limited) >= 600 - 2 * (16 + 128), noisy.codes
    assert len(limited) + len(noisy.of(401)) == 600, noisy.codes
    come_back_later(limited)
    tell(fleet, f"of the mute one {len(limited)} limited", noisy)


def come_back_later(refused):
    for r in refused:
        body = json.loads(base64.b64decode(r["body"]))
        assert body["errcode"] == "M_LIMIT_EXCEEDED"
        assert 1 <= int(r["headers"]["Retry-After"][0]) <= 60


def test_noisy_user(fleet):
    """A user who asks without end gets what LKJWT_RATE_USER (30:0.5) gives,
    of each replica that haproxy happens to choose; neither the others of that
    homeserver nor anybody else is held up."""
    began = time.monotonic()
    flood = Attack(fleet.front.port, [exchange(
        fleet.names[0], user="noisy") for _ in range(300)], RATE)
    served = Attack(fleet.front.port, mixed(fleet, 5 * RATE),
                    RATE).result().all_well()
    noisy = flood.result()
    took = time.monotonic() - began
    granted, limited = len(noisy.of(200)), noisy.of(429)
    assert granted + len(limited) == 300, noisy.codes
    assert 30 <= granted <= 2 * (30 + 0.5 * took) + 2, (granted, took)
    come_back_later(limited)
    tell(fleet, f"beside a noisy user, of whose {len(noisy)} requests "
         f"{len(limited)} are limited", served)


def test_rolling_restart(fleet):
    """One replica after the other is told to stop, ends, comes back; nobody
    notices: no request fails, not those in flight at a homeserver that takes
    two seconds, and no participant is thrown out."""
    def takes_its_time(req):
        if ".slow." in req.query["access_token"]:
            time.sleep(2)
        return by_token(req)
    fleet.hs.sub = takes_its_time
    people = connected(fleet, 12)
    targets = mixed(fleet, 120 * RATE, health=False)
    targets[::20] = [exchange(name, user="slow") for name, _ in zip(
        itertools.cycle(fleet.names), targets[::20])]
    attack = Attack(fleet.front.port, targets, RATE)
    before = fleet.pids()
    for r in fleet.replicas:
        time.sleep(1)
        began = time.monotonic()
        r.term()                        # with exit status 0
        assert time.monotonic() - began >= 5, "no lame duck"
        events = [e["event"] for e in r.before[-1].log()]
        assert "GRANTED" in events[events.index("STOPPING"):]
        r.start()
        fleet.settle()
        until(f"haproxy sends to {r}", lambda: r.metric(
            'lkjwt_http_requests_total{route="/sfu/get",code="200"}'))
    assert attack.running(), "the load ended before the restarts did"
    result = attack.stop().all_well()
    assert not set(before) & set(fleet.pids())
    tell(fleet, "rolling restart", result)
    fleet.check_nobody_cut_off()
    for p in people:
        p.not_sent()
        p.leave()
    for p in people:
        p.sent()
    fleet.limits_hold()


def test_at_rest(fleet):
    """Afterwards nothing is held, and nothing was logged that should not."""
    for r in fleet.replicas:
        until(f"{r} is at rest", lambda: r.metric("lkjwt_exchanges") == 0)
        assert r.metric("lkjwt_redis_up") == 1
        for svc in (*r.before, r.svc):
            bad = [e for e in svc.log() if e["level"] == "error"]
            assert not bad, bad
