"""Several replicas of the service around one real Redis, behind a real haproxy: Cluster; the people who come and go:
Person; a LiveKit that knows who is there and tells it by webhooks as LiveKit does: Livekit; and a homeserver that
objects when a delayed leave is sent for somebody who is there."""
import collections
import hashlib
import itertools
import json
import os
import random
import signal
import tempfile
import threading
import time

from exchange import alias, canonical, hashed, make_body
from leave import DELEGATE, GET_PARTICIPANT, HOUR, WEBHOOK, ClientApi, LeaveSfu, event, participant, webhook_token
from outbound import by_token, token_for
from peers import SCRATCH, Homeserver, Process, Reply, accepts, which
from service import Closed, Service, base_env, free_port
from store import JOBS, LEASE, REPLICAS

BUDGET = 30         # seconds from a departure to the event sent (issue), and LiveKit's patience with a webhook
TAKEOVER = 15       # a shard has a new owner: 5 s on an idle machine
LONG = 90           # what takes up to 30 s hangs
POLL = 0.05
SHARDS = 64
_serial = itertools.count(1)


def until(what, ask, timeout=LONG, pause=POLL, tell=None):
    """Poll ask() until it is true; its value. what, or tell(), is the complaint."""
    end = time.monotonic() + timeout
    while not (value := ask()):
        assert time.monotonic() < end, f"not in {timeout} s: {what}\n{tell() if tell else ''}"
        time.sleep(pause)
    return value


# ---- LiveKit

class Livekit(LeaveSfu):
    """Who is in which room, and webhooks about it: in order for each participant, repeated after a connection error,
    429 or 5xx until they are 30 s old, dropped then, and the next one that arrives tells how many were."""

    def __init__(self, front, rng):
        self.front, self.rng, self.fault = front, rng, 0.0
        self.here = {}                          # (room, identity) -> sid
        self.lines = collections.defaultdict(collections.deque)
        self.busy, self.dropped, self.repeated, self.slowest = set(), 0, 0, 0.0
        super().__init__()

    def answer(self, req):
        if req.path == GET_PARTICIPANT and self.fault and self.rng.random() < self.fault:
            return Reply(503, "overloaded")
        return super().answer(req)

    def present(self, room, identity):
        with self.lock:
            return (room, identity) in self.here

    def enter(self, room, identity, hook=True):
        """Joins; the sid. Whoever is there under that identity goes in the same moment."""
        sid = f"PA_{next(_serial)}"
        with self.lock:
            old = self.here.get((room, identity))
            self.here[room, identity] = sid
            self.presence[room, identity] = [participant(identity, sid)]
        if old and hook:
            self.tell(event("participant_left", room, identity, old, "DUPLICATE_IDENTITY"))
        if hook:
            self.tell(event("participant_joined", room, identity, sid))
        return sid

    def leave(self, room, identity, reason="CLIENT_INITIATED", hook=True):
        with self.lock:
            sid = self.here.pop((room, identity))
            del self.presence[room, identity]
        told = event("participant_left", room, identity, sid, reason)
        if hook:
            self.tell(told)
        return told

    def tell(self, what):
        """Queue a webhook; one line for each participant."""
        key = what["room"]["name"], what["participant"]["identity"]
        with self.lock:
            self.lines[key].append((time.monotonic(), what))
            if key in self.busy:
                return
            self.busy.add(key)
        threading.Thread(target=self._line, args=(key,), daemon=True).start()

    def _line(self, key):
        while True:
            with self.lock:
                if not self.lines[key]:
                    self.busy.discard(key)
                    return
                since, what = self.lines[key].popleft()
            self._deliver(since, what)

    def _deliver(self, since, what):
        wait = 0.1
        with self.lock:
            if self.dropped:
                what, self.dropped = {**what, "numDropped": self.dropped}, 0
        body = json.dumps(what)
        while not self.stopping:
            try:
                status = post_webhook(self.front, body, timeout=10).status
                if status != 429 and status < 500:
                    assert status == 200, (status, body)
                    with self.lock:
                        self.slowest = max(self.slowest, time.monotonic() - since)
                    return
            except (OSError, Closed):
                pass
            with self.lock:
                self.repeated += 1
                if time.monotonic() - since > BUDGET:
                    self.dropped += what.get("numDropped", 0) + 1
                    return
            time.sleep(wait * self.rng.uniform(0.8, 1.2))
            wait = min(2 * wait, 2)

    def quiet(self):
        """All webhooks are delivered."""
        until("webhooks delivered", lambda: not self.busy)


def post_webhook(svc, body, token=None, **kw):
    if not isinstance(body, str):
        body = json.dumps(body)
    return svc.request("POST", WEBHOOK, body, [("Content-Type", "application/webhook+json"),
                                               ("Authorization", token or webhook_token(body))], **kw)


# ---- the homeserver

class DelayedEvents(ClientApi):
    """Delayed events that end as Synapse's do: after `send` the id is unknown. A send while its participant is there
    is in .wrongly; fault: how often a call fails, slow: up to so many seconds for an answer."""

    def __init__(self, livekit, rng):
        self.livekit, self.rng, self.fault, self.slow = livekit, rng, 0.0, 0.0
        self.people, self.over, self.wrongly = {}, set(), []
        super().__init__()
        self.every = self._every

    def _every(self, call):
        p = self.people.get(call.delay_id)
        if p and call.action == "send" and self.livekit.present(p.alias, p.joined_as):
            self.wrongly.append((p, call))
            p.note(f"SENT WHILE THERE: {call}")
        elif p:
            p.note(f"{call.action} {call.delay_id}")
        if self.slow:
            time.sleep(self.rng.uniform(0, self.slow))
        if self.fault and self.rng.random() < self.fault:
            return Reply(503, "overloaded")
        with self.lock:
            if call.delay_id in self.over:
                return Reply(404, {"errcode": "M_NOT_FOUND", "error": "Delayed event not found"})
            if call.action == "send":
                self.over.add(call.delay_id)
        return None


# ---- replicas

class Replica:
    """One place in the cluster; kill and start as often as wanted. .id: its name in Redis since the last start."""

    def __init__(self, cluster, number, env):
        self.cluster, self.number, self.env, self.id, self.svc, self.paused = cluster, number, env, None, None, False
        self.before = []                        # the services that ended here

    def __repr__(self):
        return f"r{self.number}"

    @property
    def alive(self):
        return self.svc is not None and not self.paused

    def start(self, identify=True):
        known = set(self.cluster.redis_ids()) if identify else set()
        self.svc = Service(self.env).start()
        self.cluster.note(f"{self} started, pid {self.svc.pid}")
        if identify:
            self.id, = until(f"{self} in {REPLICAS}", lambda: set(self.cluster.redis_ids()) - known,
                             tell=self.svc.log_text)
        return self

    def _ended(self, wanted):
        svc, self.svc, self.paused = self.svc, None, False
        self.before.append(svc)
        code = svc.stop()
        self.cluster.note(f"{self} ended with {code}")
        assert code == wanted, f"{self}: exit {code}\n{svc.log_text()[-5000:]}"

    def kill(self):
        self.cluster.note(f"kill -9 {self}")
        self.svc.proc.kill()
        self.svc.wait()
        self._ended(-signal.SIGKILL)

    def term(self):
        self.cluster.note(f"SIGTERM {self}")
        self._ended(0)

    def pause(self):
        self.cluster.note(f"SIGSTOP {self}")
        self.paused = True
        self.svc.signal(signal.SIGSTOP)

    def resume(self):
        self.cluster.note(f"SIGCONT {self}")
        self.svc.signal(signal.SIGCONT)
        self.paused = False

    def stop(self):
        if self.paused:
            self.resume()
        if self.svc:
            self.term()

    def metric(self, name):
        return self.svc.metrics()[name]

    def lines(self, text):
        """Log lines with that text, of this and all earlier runs."""
        return [f"{self} {line}" for svc in [*self.before, *([self.svc] if self.svc else [])]
                for line in svc.log_text().split("\n") if text in line]


HAPROXY = """
global
    maxconn 2000
defaults
    mode http
    retries 3
    option redispatch 1
    timeout connect 2s
    timeout client 60s
    timeout server 30s
    timeout check 1s
    option http-keep-alive
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    balance roundrobin
    option httpchk GET /healthz
    default-server check inter 300ms fall 2 rise 1 on-marked-down shutdown-sessions
{servers}
"""


class Cluster:
    """count replicas with one database of a Redis, haproxy, Livekit, homeserver."""

    def __init__(self, store, db=0, count=3, servers=8, seed=None, **env):
        self.store, self.rng = store, random.Random(seed)
        self.db, self.timeline, self.began = store.client(db), [], time.monotonic()
        self.names = [f"h{i}.replicas.test" for i in range(servers)]
        self._next = itertools.cycle(self.names)
        self.front = Service({"LIVEKIT_JWT_BIND": f"127.0.0.1:{free_port()}"})    # never started: haproxy is there
        self.hs = Homeserver(sub=by_token)
        self.sfu = Livekit(self.front, self.rng)
        self.api = DelayedEvents(self.sfu, self.rng)
        each = lambda form: ",".join(f"{n}={form.format(n.partition('.')[0])}" for n in self.names)
        self.env = {
            "LIVEKIT_URL": "wss://sfu.example.org/", "LKJWT_LIVEKIT_API_URL": self.sfu.url,
            "LIVEKIT_FULL_ACCESS_HOMESERVERS": ",".join(self.names),
            "LKJWT_FEDERATION_API_URL_OVERRIDES": each(self.hs.url),
            "LIVEKIT_CS_API_URL_OVERRIDES": each(self.api.url + "/{}"),
            "LIVEKIT_LOG_LEVEL": "debug", **env}
        self.replicas = [Replica(self, n, base_env(
            **self.env, LIVEKIT_REDIS_URL=store.url(db=f"/{db}", query=f"?client_name=r{n}"),
            LIVEKIT_JWT_BIND=f"127.0.0.1:{free_port()}", LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}"))
            for n in range(count)]
        conf = os.path.join(tempfile.mkdtemp(prefix="lkjwt-haproxy-", dir=SCRATCH), "haproxy.cfg")
        with open(conf, "w") as f:
            f.write(HAPROXY.format(port=self.front.port, servers="\n".join(
                f"    server r{r.number} {r.env['LIVEKIT_JWT_BIND']}" for r in self.replicas)))
        self.haproxy = Process([which("haproxy"), "-db", "-f", conf], lambda: accepts("127.0.0.1", self.front.port))

    def __enter__(self):
        try:
            for r in self.replicas:
                r.start()
            self.reachable()
            self.settle()
        except BaseException:
            self.stop(check=False)
            raise
        return self

    def __exit__(self, kind, *_):
        self.stop(check=kind is None)

    def stop(self, check=True):
        failed = []
        for what in (*self.replicas, self.haproxy, self.hs, self.api, self.sfu):
            try:
                what.stop()
            except Exception as e:
                failed.append(e)
        self.db.close()
        # A replica killed in the middle of a request leaves half of one.
        failed += [e for peer in (self.hs, self.api, self.sfu) for e in peer.errors if "closed" not in e[0]]
        assert not (check and failed), failed

    def note(self, text):
        self.timeline.append((time.monotonic() - self.began, text))

    # -- what Redis has
    def redis_ids(self):
        return self.db.zrange(REPLICAS, 0, -1)

    def records(self):
        """{field: record} of all jobs kept."""
        return {f: json.loads(v) for f, v in self.db.hgetall(JOBS).items()}

    def leases(self):
        """[id or None] of the shards."""
        return self.db.mget([LEASE + str(n) for n in range(SHARDS)])

    def shares(self):
        """[number of shards] of the running replicas."""
        held = collections.Counter(self.leases())
        return [held[r.id] for r in self.replicas if r.svc]

    def owner(self, person):
        """The replica whose id the lease of the person's shard holds, or None."""
        held = self.db.get(LEASE + str(person.shard))
        return next((r for r in self.replicas if r.svc and held and r.id == held), None)

    # -- moments
    def heal(self):
        """Redis and all replicas run, and each shard has an owner among them."""
        if self.store.process.proc.poll() is not None:
            self.store.start()
        for r in self.replicas:
            if r.paused:
                r.resume()
            if not r.svc:
                r.start()
        self.reachable()
        self.settle()

    def reachable(self):
        """haproxy knows that somebody is up."""
        until("an answer through haproxy", lambda: self.front.request("GET", "/healthz").status == 200)

    def settle(self):
        ids = lambda: {r.id for r in self.replicas if r.svc}
        until("every shard has an owner", lambda: set(self.leases()) <= ids(), tell=self.tell_shares)
        for r in self.replicas:
            until(f"{r} has shards", lambda: not r.svc or r.id in self.leases(), tell=self.tell_shares)

    def balanced(self):
        """Every replica has its fair share, so no shard, and no job, is on its way to another owner."""
        n = sum(r.svc is not None for r in self.replicas)
        fair = sorted(SHARDS // n + (i < SHARDS % n) for i in range(n))
        until(f"{fair} shards", lambda: sorted(self.shares()) == fair, LONG, tell=self.tell_shares)
        return fair

    def tell_shares(self):
        return f"{self.shares()} {collections.Counter(self.leases())} {[(r, r.id) for r in self.replicas]}"

    def person(self, **kw):
        return Person(self, **kw)

    def people(self, count, **kw):
        return [Person(self, **kw) for _ in range(count)]

    def person_of(self, replica, **kw):
        """A person whose job that replica will own."""
        for _ in range(100000):
            p = Person(self, **kw)
            if self.owner(p) is replica:
                return p
        raise AssertionError(f"no shard belongs to {replica}: {self.tell_shares()}")

    def no_job_left(self, people, timeout=BUDGET):
        """Their records are gone, and each replica has forgotten them."""
        fields = {p.field for p in people}
        until("records deleted", lambda: not fields & set(self.records()), timeout,
              tell=lambda: "\n".join(p.story() for p in people if p.field in self.records()))

    def jobs_held(self):
        return sum(r.metric("lkjwt_delayed_leaves") for r in self.replicas if r.svc)

    def check_nobody_cut_off(self):
        """No send for anybody who was there, ever."""
        assert not self.api.wrongly, "\n".join(f"{call}\n{p.story()}" for p, call in self.api.wrongly[:5])


# ---- people

class Person:
    """One participant and the delegation of their delayed leave. way: "delegate", "get_token" or "sfu_get" hands it
    over; legacy: they join under the legacy identity."""

    PATHS = {"delegate": DELEGATE, "get_token": "/get_token", "sfu_get": "/sfu/get"}

    def __init__(self, cluster, way="delegate", legacy=None, room=None, T=HOUR):
        n = next(_serial)
        self.cluster, self.way, self.T, self.name = cluster, way, T, f"p{n}"
        self.server = next(cluster._next)
        self.sub, self.room = f"@{self.name}:{self.server}", room or f"!r{n}:replicas.test"
        self.alias = alias(self.room)
        self.hashed, self.legacy = hashed(self.sub, "DEV", "m"), f"{self.sub}:DEV"
        self.identity = self.legacy if way == "sfu_get" else self.hashed        # in the job's key
        self.joined_as = self.legacy if legacy or way == "sfu_get" else self.hashed
        self.field = canonical([self.alias, self.identity])
        self.shard = hashlib.sha256(self.field.encode()).digest()[0] % SHARDS
        self.sid = self.departed = None
        self.events, self.delay_ids = [], []
        self.new_delay_id()

    def note(self, text):
        self.events.append((time.monotonic() - self.cluster.began, text))

    def story(self):
        """All that happened, for a complaint."""
        lines = [f"{self.name} {self.way} {self.field} shard {self.shard} {self.delay_ids}"]
        first = self.events[0][0] if self.events else 0
        lines += [f"  {at:8.3f} {text}" for at, text in sorted(
            self.events + [e for e in self.cluster.timeline if e[0] >= first - 10])]
        for r in self.cluster.replicas:
            lines += ["    " + line for line in r.lines(self.alias) if f"server={self.server}" in line]
        return "\n".join(lines)

    def new_delay_id(self):
        self.delay_id = f"syd_{next(_serial):020d}"
        self.delay_ids.append(self.delay_id)
        self.cluster.api.people[self.delay_id] = self

    # -- towards the service
    def ask(self, at=None, timeout=60, delegating=True):
        """The request for a token or a delegation; the reply as it is. at: a Replica, else the balancer."""
        delay = {"delay_id": self.delay_id, "delay_timeout": self.T} if delegating else {}
        body = make_body("/sfu/get" if self.way == "sfu_get" else "/get_token", self.server, self.sub,
                         token_for(self.server, self.name), room=self.room, device="DEV", member="m", **delay)
        return (at.svc if at else self.cluster.front).post(self.PATHS[self.way], body, timeout=timeout)

    def delegate(self, at=None, again=False):
        """again: with a new delayed event in place of the old one."""
        if again:
            self.new_delay_id()
        reply = self.ask(at)
        self.note(f"delegated {self.delay_id} at {at or 'front'}: {reply.status}")
        assert reply.status == 200, reply
        return self

    # -- towards LiveKit
    def join(self, hook=True):
        self.sid = self.cluster.sfu.enter(self.alias, self.joined_as, hook)
        self.note(f"joined as {self.sid}")
        return self

    def leave(self, reason="CLIENT_INITIATED", hook=True):
        """Gone; the event as LiveKit forms it."""
        told = self.cluster.sfu.leave(self.alias, self.joined_as, reason, hook)
        self.departed = time.monotonic()
        self.note(f"left: {reason}")
        return told

    # -- what came of it
    def record(self):
        value = self.cluster.db.hget(JOBS, self.field)
        return value and json.loads(value)

    def calls(self, action, delay_id=None):
        return self.cluster.api.of(delay_id or self.delay_id, action)

    def restarted(self, count=1, timeout=LONG):
        until(f"restart {count}", lambda: len(self.calls("restart")) >= count, timeout, tell=self.story)
        return self

    def kept_as_connected(self):
        record = self.record()
        return record and record["Params"]["DelayId"] == self.delay_id and record["Params"].get("Connected")

    def connected(self, at=None):
        """There, delegated, restarted, and Redis knows."""
        self.join().delegate(at)
        return self.settled()

    def settled(self):
        self.restarted()
        until("Connected in the record", self.kept_as_connected, tell=self.story)
        return self

    def sent(self, timeout=BUDGET):
        """Within the budget of the departure. The sends."""
        return until("sent", lambda: self.calls("send"), timeout, tell=self.story)

    def not_sent(self):
        for i in self.delay_ids:
            assert not self.calls("send", i), self.story()
        return self


def connected(cluster, count, at=None, **kw):
    """So many people, all connected, spread over the replicas."""
    people = cluster.people(count, **kw)
    for p in people:
        p.join().delegate(at)
    for p in people:
        p.settled()
    return people
