"""Delegated leaves on several replicas that share one real Redis behind a real balancer: DESIGN.md 6.

Scenes that need the same kind of cluster play one after the other, those of different clusters at once, and the crowd
beside them; a test reports how its scene went. LKJWT_SEED repeats a crowd, LKJWT_CHAOS_S makes it last longer."""
import json
import os
import random
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from leave import event, webhook_token
from replicas import BUDGET, LONG, SHARDS, TAKEOVER, Cluster, connected, post_webhook, until
from service import CANARY_PASSWORD, Closed
from store import LEASE, STREAM, RedisServer

CHAOS_S = float(os.environ.get("LKJWT_CHAOS_S", 60))
SEED = int(os.environ.get("LKJWT_SEED") or random.SystemRandom().randrange(1 << 31))
STOP_S = 30 if CHAOS_S > 60 else 8
SHORT = 10_000      # T of clients of old: restarts every few seconds

# ---- the stage

# name: (database, replicas, environment); each plays its scenes on a cluster of its own.
GROUPS = {"shares": (6, 3, {}), "kills": (1, 3, {}), "stops": (2, 3, {}), "calm": (3, 3, {}), "lost": (4, 2, {}),
          "sanity": (5, 2, {"LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": "3"}), "store": (0, 3, {})}
SCENES = {}


def scene(group):
    def register(f):
        SCENES[f.__name__] = (group, f)
        return f
    return register


def play(store, group, scenes, over):
    """The scenes of a group in turn: {title: Future}; over: how the cluster ended."""
    db, count, env = GROUPS[group]
    try:
        with Cluster(store, db, count, **env) as c:
            for title, future in scenes:
                future.set_running_or_notify_cancel()
                try:
                    c.heal()
                    SCENES[title][1](c)
                    c.check_nobody_cut_off()
                    future.set_result(None)
                except BaseException as e:
                    future.set_exception(e)
        over.set_result(None)
    except BaseException as e:
        for future in (over, *(f for _, f in scenes)):
            if not future.done():
                future.set_exception(e)


@pytest.fixture(scope="module")
def played(request):
    """Every scene that a test of this run asks for, and the crowd."""
    mine = [i for i in request.session.items if i.nodeid.startswith(request.node.nodeid)]
    wanted = {i.callspec.params["title"]: Future() for i in mine if i.originalname == "test_scene"}
    ends = {g: Future() for g in GROUPS if g in {SCENES[t][0] for t in wanted}
            | {i.callspec.params["group"] for i in mine if i.originalname == "test_end"}}
    with (RedisServer(password=CANARY_PASSWORD) as store, RedisServer(append=True, password=CANARY_PASSWORD) as own,
          ThreadPoolExecutor(len(GROUPS) + 1) as pool):
        for group, over in ends.items():
            scenes = [(t, f) for t, f in wanted.items() if SCENES[t][0] == group]
            pool.submit(play, own if group == "store" else store, group, scenes, over)
        crowd = pool.submit(Crowd.run, store, 9) if any(i.originalname == "test_crowd" for i in mine) else None
        yield {**wanted, **ends, "crowd": crowd}


# ---- who owns what

@scene("shares")
def shards_are_shared_fairly(c):
    """21 or 22 each; 32 each after one has left; 21 or 22 again after it has come back."""
    a, b, d = c.replicas
    gauges = lambda n: [until(f"{r} knows {n} replicas and its shards", lambda: (r.metric("lkjwt_replicas"), r.metric(
        "lkjwt_shards")) == (n, c.leases().count(r.id)), LONG, tell=c.tell_shares) for r in c.replicas if r.svc]
    assert c.balanced() == [21, 21, 22]
    gauges(3)
    b.term()
    assert c.balanced() == [32, 32]
    gauges(2)
    b.start()
    assert c.balanced() == [21, 21, 22]
    gauges(3)


@scene("kills")
def owner_is_killed(c):
    """Its jobs go on elsewhere: connected ones are restarted at once, a left event of the gap is heeded, one that
    waited still waits, and jobs of others notice nothing."""
    victim, other = c.replicas[0], c.replicas[1]
    stay = [c.person_of(victim).connected() for _ in range(3)]
    go = [c.person_of(victim, way=way).connected() for way in ("delegate", "get_token", "sfu_get")]
    legacy = c.person_of(victim, legacy=True).connected()
    waits = c.person_of(victim).delegate()
    elsewhere = c.person_of(other).connected()
    victim.kill()
    for p in (*go, legacy):
        p.leave()
    waits.join()
    for p in stay:
        p.restarted(2, TAKEOVER)
    for p in (*go, legacy):
        p.sent()
    waits.settled()
    for p in (*stay, waits):
        assert c.owner(p) not in (victim, None), c.tell_shares()
    for p in (*stay, waits, elsewhere):
        p.not_sent()
        p.leave()
        p.sent()
    c.no_job_left([*stay, *go, legacy, waits, elsewhere])
    until("no job held", lambda: c.jobs_held() == 0)


@scene("kills")
def owner_ends_by_sigterm(c):
    """It gives its shards away before it goes."""
    victim = c.replicas[1]
    stay = [c.person_of(victim).connected() for _ in range(3)]
    go = [c.person_of(victim).connected() for _ in range(2)]
    waits = c.person_of(victim).delegate()
    go[0].leave()
    victim.term()
    assert victim.id not in c.leases() and victim.id not in c.redis_ids(), c.tell_shares()
    go[1].leave()
    waits.join()
    for p in stay:
        p.restarted(2, TAKEOVER)
    for p in go:
        p.sent()
    waits.settled()
    for p in (*stay, waits):
        p.not_sent()
        p.leave()
        p.sent()
    c.no_job_left([*stay, *go, waits])


@scene("kills")
def all_are_killed(c):
    """What they wrote is enough: records, and an event that one kept and none had applied."""
    stay, go, waits = connected(c, 6), connected(c, 4), c.people(2)
    for p in waits:
        p.delegate()
    for r in c.replicas:
        r.kill()
    for p in go[:2]:                    # one accepted it and died
        body = json.dumps(p.leave(hook=False))
        c.db.xadd(STREAM, {"token": webhook_token(body), "body": body})
    for p in go[2:]:                    # LiveKit is still trying
        p.leave()
    for p in waits:
        p.join(hook=False)
    for r in c.replicas:
        r.start()
    for p in go:
        p.sent()
    for p in stay:
        p.restarted(2, TAKEOVER)
    for p in waits:
        p.settled()
    for p in (*stay, *waits):
        p.not_sent()
        p.leave()
        p.sent()
    c.no_job_left([*stay, *go, *waits])


@scene("stops")
def owner_sleeps_and_wakes(c):
    """SIGSTOP: another takes over; awake again, it has no rights to what it had, and no memory counts."""
    victim = c.replicas[2]
    stay = [c.person_of(victim).connected() for _ in range(3)]
    go = [c.person_of(victim).connected() for _ in range(3)]
    back = [c.person_of(victim).connected() for _ in range(3)]
    everyone = [*stay, *go, *back]
    victim.pause()
    wakes = time.monotonic() + STOP_S
    for p in go:
        p.leave()
    for p in everyone:
        until("another owner", lambda: c.owner(p) not in (victim, None), TAKEOVER, tell=c.tell_shares)
    for p in go:
        p.sent()
    for p in stay:
        p.restarted(2, TAKEOVER)
    for p in back:                      # gone, and there again with a new delegation
        p.leave()
    for p in back:
        p.sent()
        p.join().delegate(again=True)
    for p in back:
        p.settled()
    time.sleep(max(0, wakes - time.monotonic()))
    victim.resume()
    until("each job is held once", lambda: c.jobs_held() == len(c.records()) == len(stay) + len(back))
    c.settle()
    time.sleep(5)
    until("each job is still held once", lambda: c.jobs_held() == len(c.records()) == len(stay) + len(back))
    for p in (*stay, *back):
        assert not p.calls("send"), p.story()
        p.leave()
    for p in (*stay, *back):
        p.sent()
    c.no_job_left(everyone)


@scene("stops")
def owner_sleeps_over_a_departure(c):
    """Asleep for less than a lease, and for a little more: what it missed, somebody does."""
    for nap in (1.0, 3.0, 4.5, 6.0):
        victim = c.replicas[0]
        stay, go = c.person_of(victim).connected(), c.person_of(victim).connected()
        victim.pause()
        go.leave()
        time.sleep(nap)
        victim.resume()
        go.sent()
        stay.not_sent()
        stay.leave()
        stay.sent()
        c.no_job_left([stay, go])
        c.settle()


@scene("stops")
def lease_is_taken_away(c):
    """An owner whose lease has another's name sends nothing; the next owner does."""
    p, q = c.person(), c.person()
    for x in (p, q):
        x.connected()
    began = time.monotonic()
    c.db.set(LEASE + str(p.shard), "somebody-else", px=8000)
    p.leave()
    sends = p.sent(LONG)
    assert sends[0].at >= began + 8, p.story()
    q.leave()
    q.sent(LONG)
    c.no_job_left([p, q], LONG)


# ---- which replica is told what

@scene("calm")
def replaced_at_another_replica(c):
    """The newer delegation counts, whoever took it: connected or still waiting."""
    people = c.people(6) + c.people(3, way="sfu_get")
    for n, p in enumerate(people):
        if n % 2:
            p.connected(at=c.replicas[n % 3])
        else:
            p.delegate(at=c.replicas[n % 3])
    for n, p in enumerate(people):
        p.delegate(at=c.replicas[(n + 1) % 3], again=True)
        if not n % 2:
            p.join()
    for p in people:
        p.settled()
    until("each job is held once", lambda: c.jobs_held() == len(people) == len(c.records()))
    for p in people:
        p.not_sent()
        p.leave()
    for p in people:
        p.sent()
        assert not p.calls("send", p.delay_ids[0]), p.story()
    c.no_job_left(people)


@scene("calm")
def webhook_before_its_job(c):
    """The join was told before any replica knew of the job; so was the end of an older session of theirs."""
    people = c.people(3) + c.people(2, legacy=True) + c.people(1, way="sfu_get")
    for n, p in enumerate(people):
        old = p.join().sid
        if n % 2:
            p.join()                    # DUPLICATE_IDENTITY, and later the loss of the first
            c.sfu.tell(event("participant_left", p.alias, p.joined_as, old, "CONNECTION_TIMEOUT"))
    c.sfu.quiet()
    for n, p in enumerate(people):
        p.delegate(at=c.replicas[n % 3])
    for p in people:
        p.settled()
        p.not_sent()
        p.leave()
    for p in people:
        p.sent()
    c.no_job_left(people)


@scene("calm")
def told_twice(c):
    """The same webhook at two replicas acts once; again after the participant is back, not at all."""
    people = c.people(3)
    for p in people:
        p.delegate()
        p.join(hook=False)
        joined = json.dumps(event("participant_joined", p.alias, p.joined_as, p.sid))
        for r in c.replicas:
            assert post_webhook(r.svc, joined).status == 200
        p.settled()
        left = json.dumps(p.leave(hook=False))
        for r in c.replicas[:2]:
            assert post_webhook(r.svc, left).status == 200
        p.sent()
        c.no_job_left([p])
        p.join().delegate(again=True).settled()
        for r in c.replicas:
            assert post_webhook(r.svc, left).status == 200
    other = connected(c, 3)             # what came before is done when these are sent
    for p in other:
        p.leave()
    for p in other:
        p.sent()
    for p in people:
        assert [len(p.calls("send", i)) for i in p.delay_ids] == [1, 0], p.story()
        assert [len(p.calls("restart", i)) for i in p.delay_ids] == [1, 1], p.story()
        p.leave()
    for p in people:
        p.sent()
    c.no_job_left([*people, *other])


@scene("calm")
def stream_of_strangers(c):
    """Others may write to a shared Redis: an entry counts if LiveKit signed it, and no entry stops the reader."""
    p = c.person().connected()
    q, waits = c.person_of(c.owner(p)).connected(), c.person_of(c.owner(p)).delegate()
    for x, name in ((p, "participant_left"), (waits, "participant_joined")):
        told = json.dumps(event(name, x.alias, x.joined_as, x.sid or "PA_0", "CLIENT_INITIATED"))
        for entry in ({"token": webhook_token(told, secret="not the secret, but long enough"), "body": told},
                      {"token": webhook_token(told + " "), "body": told}, {"token": "", "body": told}, {"body": told},
                      {"token": webhook_token(told)}, {"token": webhook_token("{"), "body": "{"},
                      {"token": webhook_token(told), "body": told + "\0"}, {"token": "x" * 300_000, "body": told},
                      {"token": webhook_token(told), "body": told * 1000},
                      {"job": "not a field", "record": "not a record"}, {"job": x.field}, {"record": told}, {"odd": "one"},
                      {"job": x.field, "record": '{"Params":null}'}, {"job": "\xff\xfe", "record": "[" * 5000},
                      {"token": "a", "body": "b", "job": "c", "record": "d"}, {str(n): str(n) for n in range(200)}):
            c.db.xadd(STREAM, entry)
    body = json.dumps(q.leave(hook=False))
    c.db.xadd(STREAM, {"token": webhook_token(body), "body": body})
    q.sent()
    p.not_sent()
    assert not waits.calls("restart"), waits.story()
    assert all(r.svc.proc.poll() is None for r in c.replicas)
    waits.join().settled()
    for x in (p, waits):
        x.leave()
        x.sent()
    c.no_job_left([p, q, waits])


@scene("calm")
def livekit_restarts(c):
    """SERVER_SHUTDOWN, and seconds later everybody is back with a new sid: nothing is sent."""
    rooms = [f"!shutdown{n}:replicas.test" for n in range(3)]
    people = [p for room in rooms for p in connected(c, 5, room=room)]
    for p in people:
        p.leave("SERVER_SHUTDOWN")
    gone = time.monotonic()
    time.sleep(3)
    for p in people:
        time.sleep(0.1)
        p.join()
    time.sleep(max(0, gone + 25 - time.monotonic()))      # 20 s is the longest anybody waits for them
    for p in people:
        p.not_sent()
    assert len(set(c.records()) & {p.field for p in people}) == len(people)
    for p in people:
        p.leave()
    for p in people:
        p.sent()
    c.no_job_left(people)


# ---- webhooks that never come

@scene("lost")
def lost_webhook_is_found_before_a_restart(c):
    """Short T: looked for before each restart. Long T: once LiveKit says that it dropped some."""
    short, long, stay = c.people(2, T=SHORT), c.people(2), c.people(2, T=SHORT)
    for p in (*short, *long, *stay):
        p.connected()
    for p in (*short, *long):
        p.leave(hook=False)
    told = c.person()
    c.sfu.tell({**event("participant_joined", told.alias, told.joined_as), "numDropped": 4})
    for p in (*short, *long):
        p.sent(LONG)
    for p in stay:
        p.not_sent()
        assert len(p.calls("restart")) > 3, p.story()
        p.leave()
    for p in stay:
        p.sent()
    c.no_job_left([*short, *long, *stay])


@scene("sanity")
def lost_webhook_is_found_by_interval(c):
    go, stay = connected(c, 4), connected(c, 2)
    for p in go:
        p.leave(hook=False)
    for p in go:
        p.sent()
    for p in stay:
        p.not_sent()
        p.leave()
    for p in stay:
        p.sent()
    c.no_job_left([*go, *stay])


# ---- Redis goes and comes

def have_records(c, people):
    until("all records", lambda: {p.field for p in people} <= set(c.records()), LONG,
          tell=lambda: "\n".join([p.story() for p in people if p.field not in c.records()][:3]))


def back_again(c, people):
    """Every job has its record, every shard its owner; nobody was cut off, and a leave still works."""
    have_records(c, people)
    c.settle()
    for p in people:
        assert p.record()["Params"]["DelayId"] == p.delay_id
        p.not_sent()
        p.leave()
    for p in people:
        p.sent(LONG)
    c.no_job_left(people, LONG)


@scene("store")
def redis_restarts(c):
    """Append-only on. Meanwhile delegations are taken, webhooks are not (LiveKit repeats them), /healthz is fine."""
    c.balanced()
    people, go = connected(c, 6), connected(c, 3)
    c.store.stop()
    new = c.people(6)
    for n, p in enumerate(new):
        p.delegate(at=c.replicas[n % 3]).join()
    for n, p in enumerate(go):
        told = p.leave()
        assert post_webhook(c.replicas[n % 3].svc, told).status == 503
    for r in c.replicas:
        assert r.svc.request("GET", "/healthz").status == 200
        until("lkjwt_redis_up 0", lambda: r.metric("lkjwt_redis_up") == 0)
    time.sleep(3)
    for p in (*people, *new):
        p.not_sent()
    c.store.start()
    for p in go:
        p.sent(LONG)
    for p in new:
        p.settled()
    back_again(c, [*people, *new])
    for r in c.replicas:
        until("nothing unsaved", lambda: (r.metric("lkjwt_redis_up"), r.metric("lkjwt_redis_unsaved")) == (1, 0))


@scene("store")
def redis_is_replaced_by_an_empty_one(c):
    """Jobs are written again from memory."""
    c.balanced()
    people, waits = connected(c, 8), c.people(3)
    for p in waits:
        p.delegate()
    c.store.stop()
    shutil.rmtree(os.path.join(c.store.dir, "appendonlydir"))
    c.store.start()
    have_records(c, [*people, *waits])
    for p in waits:
        p.join().settled()
    back_again(c, [*people, *waits])


@scene("store")
def redis_is_flushed(c):
    """The same Redis, and the leases are gone."""
    c.balanced()
    people = connected(c, 8)
    c.store.db.flushall()
    back_again(c, people)


@scene("store")
def one_replica_alone(c):
    """With nobody else who could own the job, an event is applied whether or not Redis takes it."""
    last = c.replicas[2]
    for r in c.replicas[:2]:
        r.term()
    until("alone", lambda: (last.metric("lkjwt_replicas"), last.metric("lkjwt_shards")) == (1, SHARDS), LONG)
    go, stay = connected(c, 3, last), connected(c, 3, last)
    c.store.stop()
    for p in go:
        assert post_webhook(last.svc, p.leave(hook=False)).status == 200
    for p in go:
        p.sent()
    until("lkjwt_redis_up 0", lambda: last.metric("lkjwt_redis_up") == 0)
    c.store.start()
    c.no_job_left(go, LONG)
    c.heal()
    back_again(c, stay)


# ---- the crowd

class Crowd:
    """Some two hundred come, stay and go in all the ways there are, while replicas are killed, stopped, put to sleep
    and started. Everybody stays until the record says that their job knows them to be connected: who leaves earlier is
    the Waiting column of PROTOCOL.md 9, which is not about replicas."""

    LEAVES = ("CLIENT_INITIATED",) * 4 + ("lost", "lost", "PARTICIPANT_REMOVED", "ROOM_DELETED")

    def __init__(self, cluster, seed, seconds):
        self.c, self.seed, self.rng = cluster, seed, random.Random(seed)
        self.until, self.wrong, self.longest, self.over = time.monotonic() + seconds, [], 0.0, threading.Event()
        self.done, self.seconds, self.deeds = [], seconds, {}

    @classmethod
    def run(cls, store, db):
        with Cluster(store, db, seed=SEED) as cluster:
            crowd = cls(cluster, SEED, CHAOS_S)
            try:
                return crowd.play()
            finally:
                crowd.over.set()

    def play(self):
        c, rng = self.c, self.rng
        c.sfu.fault = c.api.fault = 0.03
        c.api.slow = 0.2
        count = int(200 * self.seconds / 60)
        rooms = [f"!crowd{n}:replicas.test" for n in range(1 + count // 8)]
        arrivals = sorted(rng.uniform(0, self.seconds - 32) for _ in range(count))
        lives, begun, stay = [], time.monotonic(), set(rng.sample(range(count), 15))
        sabotage = threading.Thread(target=self.guarded, args=(self.sabotage, random.Random(rng.random())))
        sabotage.start()
        for n, at in enumerate(arrivals):
            time.sleep(max(0, begun + at - time.monotonic()))
            way = rng.choice(("delegate", "get_token", "sfu_get"))
            p = c.person(way=way, legacy=way == "delegate" and rng.random() < 0.3, room=rng.choice(rooms))
            t = threading.Thread(target=self.guarded, daemon=True,
                                 args=(self.live, random.Random(rng.random()), p, n in stay))
            t.start()
            lives.append((t, p))
        for t, p in lives:
            t.join(2 * LONG)
            if t.is_alive():
                self.blame(p, "did not come to an end")
        self.over.set()
        sabotage.join()
        c.sfu.quiet()
        staying = [p for _, p in lives if not p.departed]
        self.check([p for _, p in lives if p.departed], staying)
        for p in staying:
            p.leave()
        self.check(staying, [])
        assert not self.wrong, f"LKJWT_SEED={self.seed}: {len(self.wrong)} wrong; " + "\n".join(self.wrong[:3])
        c.check_nobody_cut_off()
        late = [p.calls("send")[0].at - p.departed for _, p in lives]
        return (f"{count} people, {self.deeds}; webhooks repeated {c.sfu.repeated}, slowest {c.sfu.slowest:.1f} s; "
                f"slowest answer {self.longest:.1f} s; sent after {sorted(late)[count // 2]:.2f} s, at most {max(late):.1f} s")

    def guarded(self, f, rng, *args):
        try:
            f(rng, *args)
        except BaseException as e:
            self.blame(args[0] if args else None, f"{type(e).__name__}: {e}")

    def blame(self, person, text):
        self.wrong.append(f"{text}\n{person.story() if person and len(self.wrong) < 3 else ''}")

    # -- one of them
    def ask(self, p, again=False):
        """As a client asks: again when no answer came, or that of a proxy or an instance that had trouble. When nobody
        can come with an older request any more (one that slept in an instance which is stopped, 8 s at most)."""
        if again:
            p.new_delay_id()
        end, settled = time.monotonic() + BUDGET, 0
        while True:
            began = time.monotonic()
            try:
                status = p.ask(timeout=BUDGET).status
            except (OSError, Closed) as e:
                status = repr(e)
            self.longest = max(self.longest, time.monotonic() - began)
            p.note(f"delegated {p.delay_id}: {status}")
            if status == 200:
                return settled
            assert status != 429 and not (isinstance(status, int) and status < 500), f"answered {status}"
            assert time.monotonic() < end, f"no delegation accepted in {BUDGET} s: {status}"
            settled = time.monotonic() + 10
            time.sleep(0.5)

    def live(self, rng, p, stays):
        first = rng.choice(("join", "both", "delegation"))
        if first != "delegation":
            p.join()
        if first == "join":
            time.sleep(rng.uniform(0.1, 1))
        settled = self.ask(p)
        if first == "delegation":
            time.sleep(rng.uniform(0, 1.5))
            p.join()
        accepted = time.monotonic()
        p.restarted(1, BUDGET)
        stay = rng.choice((rng.uniform(1, 5), rng.uniform(1, 20)))
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            time.sleep(rng.uniform(0, stay / 3))
            if rng.random() < 0.6 or settled > time.monotonic():
                p.join()                            # crashed, back before LiveKit noticed
            else:
                settled = self.ask(p, again=True)   # a new delayed event for the next hours
                accepted = time.monotonic()
        if stays:
            return
        time.sleep(max(0, max(settled, accepted + max(stay, 3)) - time.monotonic()))
        until("Connected in the record", p.kept_as_connected, BUDGET, pause=0.3, tell=p.story)
        how = rng.choice(self.LEAVES)
        if how == "lost":                           # LiveKit takes a while to notice
            time.sleep(rng.uniform(1, 4))
            how = "CONNECTION_TIMEOUT"
        p.leave(how)

    # -- what happens to the replicas
    def sabotage(self, rng):
        c = self.c
        end = self.until - 12
        tasks = ("kill", "kill", "term", "term", "sleep", "all")
        while time.monotonic() < end and not self.over.wait(rng.uniform(0.5, 3)):
            up = [r for r in c.replicas if r.alive]
            task = rng.choice(tasks)
            if task == "all" and self.deeds.get(task, 0) >= self.seconds / 60:
                continue
            self.deeds[task] = self.deeds.get(task, 0) + 1
            if task == "all":
                for r in up:
                    r.kill()
                time.sleep(rng.uniform(0, 2))
            elif task == "sleep":
                r = rng.choice(up)
                r.pause()
                time.sleep(rng.uniform(0.5, 8))
                r.resume()
            else:
                for r in rng.sample(up, rng.choice((1, 1, 2))):
                    getattr(r, task)()
                time.sleep(rng.uniform(0, 5))
            for r in c.replicas:
                if not r.svc:
                    r.start(identify=False)
                    time.sleep(rng.uniform(0, 1))

    # -- the end
    def check(self, gone, staying):
        """Sent in time, and Redis and the replicas have the jobs of those who stay and no others."""
        c = self.c
        end = max(p.departed for p in gone) + BUDGET
        while time.monotonic() < end and (set(c.records()) != {p.field for p in staying}
                                          or not all(p.calls("send") for p in gone)):
            time.sleep(0.3)
        for p in gone:
            sends = p.calls("send")
            if not sends:
                self.blame(p, f"left and was not sent in {BUDGET} s")
            elif sends[0].at - p.departed > BUDGET:
                self.blame(p, f"sent after {sends[0].at - p.departed:.1f} s")
            for old in p.delay_ids[:-1]:
                if p.calls("send", old):
                    self.blame(p, f"{old} was replaced, and sent")
        for p in staying:
            if p.calls("send"):
                self.blame(p, "stays, and was sent")
        assert not self.wrong, f"LKJWT_SEED={self.seed}: {len(self.wrong)} wrong; " + "\n".join(self.wrong[:3])
        kept = c.records()
        assert set(kept) == {p.field for p in staying}, f"LKJWT_SEED={self.seed}: orphans\n" + "\n".join(
            p.story() for p in c.api.people.values() if (p.field in kept) != (p in staying))
        for p in staying:
            assert kept[p.field]["Params"]["DelayId"] == p.delay_id, p.story()
        until("each job is held once", lambda: c.jobs_held() == len(staying), LONG,
              tell=lambda: f"LKJWT_SEED={self.seed} {[(r, r.metric('lkjwt_delayed_leaves')) for r in c.replicas]}")


# ---- the tests

@pytest.mark.parametrize("title", SCENES)
def test_scene(played, title):
    played[title].result()


@pytest.mark.timeout(CHAOS_S + 240)
def test_crowd(played, capsys):
    """Nothing is lost, nobody cut off, nothing left behind."""
    with capsys.disabled():
        print(f"\nLKJWT_SEED={SEED}", flush=True)
    summary = played["crowd"].result()
    with capsys.disabled():
        print(summary, flush=True)


@pytest.mark.parametrize("group", GROUPS)
def test_end(played, group):
    """Every cluster ended as it should: exit status 0, nothing malformed towards any peer."""
    played[group].result()
