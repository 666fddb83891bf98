"""Delegated leaves kept in Redis, by one replica: PROTOCOL.md 12, SECURITY.md T25, S19, S27. Several: test_replicas.

What takes time plays at once: each scene has a redis-server, a service and peers of its own."""
import contextlib
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from exchange import canonical, hashed
from leave import DELEGATE, GONE, HOUR, LONG, NOT_FOUND, event, participant, webhook_token
from outbound import text_file
from peers import HANG, BlackHole, Pki, RawServer, Reply, wait_for
from service import CANARY_PASSWORD, Closed, Service, base_env, free_port, run_cli
from store import (JOBS, LEASE, SINGLE, STREAM, FakeRedis, Healthy, RedisServer, StoreWorld, array, bulk, field, moment,
                   stamp, value)
from test_environment import fatal

BUSY = Reply(503, "busy")
PATHS = (DELEGATE, "/get_token", "/sfu/get")
S = 10**9
DAY = 86400 * S


# ---- the stage

SCENES = {}


def scene(*args):
    """Register the function below as a scene; with rows ({id: arguments}), as one scene for each."""
    def register(f, rows=None):
        for name, row in (rows or {"": ()}).items():
            title = f.__name__ + (f": {name}" if name else "")
            assert title not in SCENES
            SCENES[title] = lambda f=f, row=row: f(*row if isinstance(row, tuple) else (row,))
        return f
    if callable(args[0]):
        return register(args[0])
    return lambda f: register(f, args[0])


SLOW = ("outage", "lost", "survives", "left_while")


@pytest.fixture(scope="module")
def played(request):
    """Every scene that a test of this run asks for, the slow ones first."""
    wanted = [i.callspec.params["title"] for i in request.session.items
              if i.nodeid.startswith(request.node.nodeid) and i.originalname == "test_scene"]
    wanted.sort(key=lambda title: not any(word in title for word in SLOW))
    with ThreadPoolExecutor(24) as pool:
        yield {title: pool.submit(SCENES[title]) for title in wanted}
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def play(count=1, names=(), redis=None, url=None, **env):
    """A redis-server of one's own and a world that keeps its jobs there."""
    with RedisServer(**(redis or {})) as store:
        env = {**({"LIVEKIT_REDIS_URL": url(store)} if url else {}), **env}
        with StoreWorld(store, count, names, **env) as world:
            yield world


@pytest.fixture(scope="module")
def store():
    """One for all tests that clear it first."""
    with RedisServer() as store:
        yield store


class Shop(StoreWorld):
    """The peers, and one service after the other."""

    def __enter__(self):
        return self

    def svc_env(self):
        """Of a service that is to be started by other means."""
        return base_env(**{**self.env, "LIVEKIT_JWT_BIND": f"127.0.0.1:{free_port()}"})

    @contextlib.contextmanager
    def open(self, **env):
        self.serve(**env)
        try:
            yield self
        finally:
            alive = self.svc.proc.poll() is None
            code = self.svc.stop()
        assert alive and code == 0, self.svc.log_text()


@pytest.fixture(scope="module")
def shop(store):
    with Shop(store) as shop:
        yield shop


@pytest.fixture
def clean(shop):
    shop.store.clear()
    return shop


@pytest.fixture(scope="module")
def world():
    """One service for the tests that leave it and its store as they are."""
    with play(4, ["example.com"]) as world:
        yield world


PLAIN = f"plain on >{CANARY_PASSWORD} ~lk-jwt:* +@all -@scripting -@stream"    # single mode


def plain_url(store):
    return store.url(user="plain", password=CANARY_PASSWORD)


# ---- the record

VECTOR_FIELD = '["O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc","J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU"]'
VECTOR = ('{"Params":{"DelayId":"syd_x","DelayTimeout":7200000000000,"ServerName":"example.com",'
          '"LiveKitRoom":"O8437W3+jmzMVjoIP3tNwbm+XxHQk2iKpOA7aqw3qSc",'
          '"LiveKitIdentity":"J+T45tGruxc+HrUOqJJlyQSV33m728Cme4+vt8/SWrU"},"RestartedAt":"%s"}')
VECTOR_AT, VECTOR_NS = "2026-07-23T07:28:51.12345Z", 1784791731123450000


def vector_job(world):
    """The job of the vector: its alias and identity are hashes of these."""
    job = world.job(server="example.com", user="alice", room="!roomid:example.com", device="DEVICE123",
                    member="memberABC", delay_id="syd_x", T=7200000)
    job.alias = hashed("!roomid:example.com", "slot1234")
    return job


def test_the_record_byte_for_byte(world):
    """The vector, by the yardstick of all other tests and by lkjwt."""
    job = vector_job(world)
    assert (stamp(VECTOR_NS), moment(VECTOR_AT)) == (VECTOR_AT, VECTOR_NS)
    assert field(job.alias, job.identity) == VECTOR_FIELD
    assert value(job, VECTOR_NS) == VECTOR % VECTOR_AT
    before = time.time_ns()
    reply = job.ask(slot_id="slot1234")
    text = world.store.db.hget(JOBS, VECTOR_FIELD)
    after = time.time_ns()
    assert reply.status == 200
    at = json.loads(text)["RestartedAt"]
    assert before // S * S <= moment(at) <= after
    assert text == (VECTOR % at).replace('SWrU"}', 'SWrU","LiveKitIdentity2":"@alice:example.com:DEVICE123"}')


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("T, stored", [(HOUR, HOUR), (1, 1000), (10**9, 86_400_000)])
def test_stored_before_the_reply(world, path, T, stored):
    """There when the 200 comes, with T as clamped; the second identity only where there is one."""
    job = world.job(path=path, T=T)
    before = time.time_ns()
    job.delegate()
    text = world.raw(job)
    job.T = stored
    assert before // S * S <= world.record(job) <= time.time_ns()
    assert world.extra(job, text) == ({} if path == "/sfu/get" else {"LiveKitIdentity2": job.legacy})
    if T == 1:
        job.sent()
    else:
        job.joined().restarted()
        job.left().sent()
    world.erased(job)


@pytest.mark.parametrize("device", ['"', "\\", "é😀", "\x01\x1f\x7f", "</script>&", "\u2028\u2029", "a\nb\tc", "\0",
        "x" * 200],
                         ids=lambda d: ascii(d)[:20])
def test_identities_that_need_escapes(world, device):
    """The field is canonical JSON; both read back as the identity itself."""
    job = world.job(path="/sfu/get", device=device).delegate()
    (text,) = [v for k, v in world.store.jobs().items() if k == canonical([job.alias, job.legacy])]
    params = json.loads(text)["Params"]
    assert list(params) == ["DelayId", "DelayTimeout", "ServerName", "LiveKitRoom", "LiveKitIdentity"]
    assert params["LiveKitIdentity"] == job.legacy
    job.joined().restarted()
    job.left().sent()
    wait_for("no record", lambda: canonical([job.alias, job.legacy]) not in world.store.jobs())


def test_connected_is_stored(world):
    """So is the sid, and a newer one by the next restart."""
    job = world.job(T=2000).connected()
    world.stored(job, LiveKitIdentity2=job.legacy, Connected=True, Sid="PA_1")
    job.joined(sid="PA_2")
    world.stored(job, LiveKitIdentity2=job.legacy, Connected=True, Sid="PA_2")
    job.left(sid="PA_2").sent()
    world.erased(job)


def test_found_by_look_up_is_stored(world):
    job = world.job().present(sid="PA_7").delegate()
    job.restarted()
    world.stored(job, Connected=True, Sid="PA_7")
    job.left(sid="PA_7").sent()
    world.erased(job)


def test_restarts_renew_it(world):
    job = world.job(T=1500).delegate()
    created = world.record(job)
    job.joined()
    stored = [created]
    for n in range(1, 4):
        call = job.restarted(n)[n - 1]
        ago = time.monotonic() - call.at
        wait_for("a newer RestartedAt", lambda: world.record(job) > stored[-1])
        stored.append(world.record(job))
        # Not before the call, and not in the future.
        assert time.time_ns() - (ago + 1) * S < stored[-1] <= time.time_ns()
        assert world.extra(job, world.raw(job))["DelegatedAt"] == stamp(created)
    job.left().sent()
    world.erased(job)


ENDS = {
    "removed while waiting": lambda job: job.delegate().left("PARTICIPANT_REMOVED"),
    "aborted while waiting": lambda job: job.delegate().hook("participant_connection_aborted"),
    "event gone": lambda job: job.script("restart", GONE).delegate().joined(),
    "restart refused": lambda job: job.script("restart", Reply(403, {"errcode": "M_FORBIDDEN"})).delegate().joined(),
    "send refused": lambda job: job.script("send", Reply(403, {"errcode": "M_FORBIDDEN"})).connected().left(),
    "sent": lambda job: job.connected().left(),
}


@pytest.mark.parametrize("how", ENDS)
def test_erased_at_the_end(world, how):
    job = world.job()
    ENDS[how](job)
    job.ended()
    world.erased(job)


def test_a_newer_delegation_keeps_the_field(world):
    """The old job's end must not take the new one's record; nor a late restart of the old one bring it back."""
    old = world.job().script("restart", Reply(200, {}, delay=1)).delegate().joined()
    new = world.job(like=old, delay_id=old.delay_id + "_new")
    assert (new.alias, new.identity) == (old.alias, old.identity)
    new.delegate()
    began = time.time_ns()
    assert world.record(new) is not None
    new.joined().restarted()
    old.restarted()
    time.sleep(1.5)
    assert json.loads(world.raw(new))["Params"]["DelayId"] == new.delay_id
    assert world.record(new) > began - S
    new.left().sent()
    world.erased(new)
    old.never_sent()


def acknowledged(fake, names, store):
    """The reply of the store is late; the client's comes after it."""
    with StoreWorld(fake) as w:
        is_write = lambda c: c.name in names and JOBS.encode() in c.args
        fake.twist = lambda c: time.sleep(0.7) if is_write(c) else None
        for path in PATHS:
            job = w.job(path=path)
            mark = len(fake.seen)
            reply = job.ask()
            done = time.monotonic()
            assert reply.status == 200
            with fake.lock:
                writes = [c for c in fake.seen[mark:] if is_write(c) and field(job.alias, job.identity).encode() in c.args]
            assert writes and writes[0].answered and writes[0].answered < done, (path, writes)
            assert field(job.alias, job.identity) in store.jobs()
        fake.twist = None


def test_s27_acknowledged_before_the_reply_single():
    with FakeRedis() as fake:
        acknowledged(fake, {"HSET"}, fake)


def test_s27_acknowledged_before_the_reply_replicas(store):
    store.clear()
    with FakeRedis(store) as fake:
        acknowledged(fake, {"EVAL"}, store)


# ---- what is read at the start

def restored(shop, rows, **env):
    """{field: value} read by a new service: (count, expired, bad) of its start; what is in the store then."""
    if rows:
        shop.store.db.hset(JOBS, mapping=rows)
    with shop.open(**env):
        line = shop.svc.wait_event("JOBS_RESTORED")
        left = shop.store.db.hgetall(JOBS)
    return tuple(int(line[k]) for k in ("count", "expired", "bad")), left


MOMENTS = {  # how a moment is written: offset in minutes, digits of the fraction
    "Z": (0, 0), "Z, 1 digit": (0, 1), "Z, 5 digits": (0, 5), "Z, 9 digits": (0, 9), "Z, 12 digits": (0, 12),
    "Z, 40 digits": (0, 40), "+02:00": (120, 0), "+02:00, 5 digits": (120, 5), "-11:30": (-690, 3), "+14:00": (840, 9),
    "+00:00": (0, 6), "-00:00": (-0.0, 2), "+05:45": (345, 15), "+23:59": (1439, 0), "-23:59": (-1439, 0),
}


def written(ns, minutes, digits):
    t = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // S + minutes * 60))
    t += "." + f"{ns % S:09d}7301".ljust(40, "5")[:digits] if digits else ""
    if (minutes, digits) in ((0, 0), (0, 1), (0, 5), (0, 9), (0, 12), (0, 40)):
        return t + "Z"
    sign = "-" if minutes < 0 or str(minutes) == "-0.0" else "+"
    return t + f"{sign}{int(abs(minutes)) // 60:02d}:{int(abs(minutes)) % 60:02d}"


def test_moments_of_every_form(clean):
    """A minute to go: alive. A minute late: expired."""
    alive, late, T = {}, {}, 7200 * S
    for rows, ns in ((alive, time.time_ns() - T + 60 * S), (late, time.time_ns() - T - 60 * S)):
        for form in MOMENTS.values():
            job = clean.job(T=T // 10**6)
            rows[field(job.alias, job.identity)] = value(job, written(ns, *form))
    counts, left = restored(clean, alive | late)
    assert left.keys() == alive.keys(), {k: v for k, v in (alive | late).items() if (k in left) != (k in alive)}
    assert counts == (len(alive), len(late), 0)


VECTORS = {  # value's difference from the vector: left in the store?
    "offset, 5 fractional digits": (VECTOR % "2026-07-23T09:28:51.12345+02:00", False),
    "no fraction, unknown name": ((VECTOR % "2026-07-23T07:28:51Z").replace('SWrU"}', 'SWrU","Other":1}'), False),
    "DelayTimeout with exponent": ((VECTOR % VECTOR_AT).replace("7200000000000", "7.2e12"), True),
    "DelayTimeout as string": ((VECTOR % VECTOR_AT).replace("7200000000000", '"7200000000000"'), True),
    "lower-case t": (VECTOR % "2026-07-23t07:28:51Z", True),
}


@pytest.mark.parametrize("name", VECTORS)
def test_read_vectors(store, name):
    """Those that can be read expired in July 2026; the others are left alone."""
    text, stays = VECTORS[name]
    store.clear()
    with Shop(store, names=["example.com"]) as shop:
        counts, left = restored(shop, {VECTOR_FIELD: text})
    assert counts == (0, 0 if stays else 1, 1 if stays else 0)
    assert left == ({VECTOR_FIELD: text} if stays else {})


def test_expired_ones_go_without_a_call(clean):
    """Gone when /healthz answers; T of zero and less is expired whenever it was restarted."""
    now = time.time_ns()
    rows, jobs = {}, []
    for T, at in ((HOUR, now - HOUR * 10**6), (HOUR, now - DAY), (1000, now - 2 * S), (HOUR, 0),
            (86_400_000, now - DAY - S),
                  (10**9, now - DAY - S), (0, now), (-1, now), (-HOUR, now + DAY), (-(2**63 // 10**6), now)):
        job = clean.job(T=T)
        jobs.append(job)
        rows[field(job.alias, job.identity)] = value(job, at)
    one = clean.job()
    rows[field(one.alias, one.identity)] = value(one, now - HOUR * 10**6 + 60 * S)
    clean.store.db.hset(JOBS, mapping=rows)
    with clean.open():
        assert clean.store.jobs().keys() == {field(one.alias, one.identity)}
        line = clean.svc.wait_event("JOBS_RESTORED")
        assert (line["count"], line["expired"], line["bad"]) == ("1", str(len(jobs)), "0")
        one.wait_looked(1)
        for job in jobs:
            assert not clean.api.of(job.delay_id) and not job.looked()


# Changes of a good record (a function of its text), each of which makes it a bad one.
def swap(old, new):
    def change(text):
        assert old in text
        return text.replace(old, new, 1)
    return change


def member(name, new):
    """The member's value replaced; None: taken out."""
    def change(text):
        obj = json.loads(text)
        at = obj if name in obj else obj["Params"]
        if new is None:
            del at[name]
        else:
            at[name] = new
        return json.dumps(obj, separators=(",", ":"))
    return change


def raw_member(name, new):
    return lambda text: re.sub(rf'("{name}":)("[^"]*"|\d+)', lambda m: m[1] + new, text)


NAMES = ("DelayId", "DelayTimeout", "ServerName", "LiveKitRoom", "LiveKitIdentity", "RestartedAt")
STRINGS = [n for n in NAMES if n != "DelayTimeout"]
POISON = {
    "empty": lambda v: "", "blank": lambda v: " ", "text": lambda v: "x", "array": lambda v: "[]",
    "null": lambda v: "null",
    "string": json.dumps, "number": lambda v: "1", "empty object": lambda v: "{}", "in an array": lambda v: f"[{v}]",
    "trailing": lambda v: v + "x", "twice": lambda v: v + v, "cut": lambda v: v[:-1], "BOM": lambda v: "\ufeff" + v,
    "trailing comma": lambda v: v[:-1] + ",}", "NUL after": lambda v: v + "\0",
    "invalid UTF-8": lambda v: v.encode().replace(b"syd_", b"syd\xff"),
    "invalid UTF-8 in an unknown name": lambda v: v.encode()[:-1] + b',"x":"\xc0\x80"}',
    "lone surrogate": lambda v: v[:-1] + ',"x":"\\ud800"}', "control byte": swap("syd_", "syd\x01"),
    "nested 1,000 deep": lambda v: v[:-1] + ',"x":' + "[" * 1000 + "]" * 1000 + "}",
    "Params null": lambda v: json.dumps({**json.loads(v), "Params": None}),
    "Params an array": lambda v: json.dumps({**json.loads(v), "Params": []}),
    "Params text": lambda v: json.dumps({**json.loads(v), "Params": "x"}),
    "Params flat": lambda v: json.dumps({**json.loads(v)["Params"], "RestartedAt": json.loads(v)["RestartedAt"]}),
    "DelayId twice": swap('"DelayId":', '"DelayId":"syd_other","DelayId":'),
    "RestartedAt twice": swap('"RestartedAt":', '"RestartedAt":"2026-01-01T00:00:00Z","RestartedAt":'),
    "Params twice": lambda v: '{"Params":{},' + v[1:],
    **{f"no {n}": member(n, None) for n in NAMES},
    **{f"{n} null": raw_member(n, "null") for n in NAMES},
    **{f"{n} in lower case": swap(f'"{n}"', f'"{n.lower()}"') for n in NAMES},
    **{f"{n} empty": member(n, "") for n in STRINGS},
    **{f"{n} a number": member(n, 1) for n in STRINGS},
    **{f"{n} an object": member(n, {}) for n in NAMES},
    **{f"DelayTimeout {t}": raw_member("DelayTimeout", t) for t in
       ("7.2e12", '"7200000000000"', "7200000000000.0", "7200000000000.5", "72e11", "true", "0x10", "01", "-", "+1",
       "1e400",
        "9223372036854775808", "-9223372036854775809", "9" * 40, "9" * 400)},
    **{f"delay id {i[:20]!r}": member("DelayId", i) for i in
       (".", "..", "a/b", "a b", "a%2fb", "é", "a?b", "a#b", "x" * 256, "a\nb", "../send", "syd_x\0")},
    **{f"server {s[:20]!r}": member("ServerName", s) for s in
       ("restricted.test", "other.example.org", "h0.leave.test:8448", "h0.leave.test:", "a b", "[::1",
       "h0.leave.test/x", "é",
        "x" * 300, "h0.leave.test\0", "*")},
    **{f"RestartedAt {t}": member("RestartedAt", t) for t in
       ("x", "0", "2026-07-23t07:28:51Z", "2126-07-23 07:28:51Z", "2126-07-23T07:28:51", "2126-07-23T07:28Z",
       "2126-07-23",
        "2126-07-23T07:28:51+0200", "2126-07-23T07:28:51+02", "2126-07-23T07:28:51+24:00", "2126-07-23T07:28:51+02:60",
        "2126-13-23T07:28:51Z", "2126-00-23T07:28:51Z", "2126-07-32T07:28:51Z", "2126-07-00T07:28:51Z",
        "2126-02-29T07:28:51Z",
        "2126-07-23T24:28:51Z", "2126-07-23T07:60:51Z", "2126-07-23T07:28:61Z", "2126-07-23T07:28:51.Z",
        "2126-07-23T07:28:51,5Z", "12126-07-23T07:28:51Z", "-126-07-23T07:28:51Z", "2126-7-23T07:28:51Z",
        " 2126-07-23T07:28:51Z", "2126-07-23T07:28:51Z ", "2126-07-23T07:28:51ZZ", "2126-07-23T07:28:51.5",
        "²126-07-23T07:28:51Z",
        "2126-07-23T07:28:51.5.5Z", "2126-07-23T07:28:51\0Z", "9" * 300)},
    "4,097 bytes": lambda v: v[:-1] + ',"x":"' + "y" * (4097 - len(v) - 7) + '"}',
    "5 KB": lambda v: v[:-1] + ',"x":"' + "y" * 5000 + '"}',
    "2 MB": lambda v: v[:-1] + ',"x":"' + "y" * (2 << 20) + '"}',
    "LiveKitIdentity2 a number": swap('"DelayId"', '"LiveKitIdentity2":1,"DelayId"'),
    "Sid an object": swap('"DelayId"', '"Sid":{},"DelayId"'),
    "DelegatedAt a number": swap('"DelayId"', '"DelegatedAt":1,"DelayId"'),
    "DelegatedAt a date": swap('"DelayId"', '"DelegatedAt":"2026-07-23","DelayId"'),
    "Connected text": swap('"DelayId"', '"Connected":"true","DelayId"'),
    "another room": member("LiveKitRoom", hashed("!other:x", "m.call#ROOM")),
    "another identity": member("LiveKitIdentity", "@other:h0.leave.test:DEV"),
}
BAD_FIELDS = {  # of alias and identity
    "empty": lambda a, i: "", "text": lambda a, i: f"{a},{i}", "one": lambda a, i: canonical([a]), "three": lambda a, i:
    canonical([a, i, ""]), "swapped": lambda a, i: canonical([i, a]), "object": lambda a, i: json.dumps({a: i}),
    "numbers": lambda a, i: "[1,2]", "null": lambda a, i: json.dumps([a, None]),
    "trailing": lambda a, i: canonical([a, i]) + "]",
    "cut": lambda a, i: canonical([a, i])[:-1], "invalid UTF-8": lambda a, i: canonical([a, i]).encode() + b"\xff",
    "5 KB": lambda a, i: canonical([a, i + "x" * 5000]), "nested": lambda a, i: json.dumps([[a, i]]), "null itself":
    lambda a, i: "null", "other case": lambda a, i: canonical([a.swapcase(), i]),
}


def poisoned(shop, job, where, what):
    """Beside a good one: skipped, logged, counted, left alone; nobody is called for it."""
    good = shop.job()
    shop.store.db.hset(JOBS, field(good.alias, good.identity), value(good))
    shop.store.db.hset(JOBS, where, what)
    kept = shop.store.client().hgetall(JOBS)
    with shop.open():
        line = shop.svc.wait_event("JOBS_RESTORED")
        assert (line["count"], line["expired"], line["bad"]) == ("1", "0", "1"), shop.svc.log_text()
        bad = shop.svc.wait_event("REDIS_ENTRY_BAD")
        assert bad["reason"] and bad["level"] == "warning"
        assert shop.count("REDIS_ENTRY_BAD") == 1
        assert shop.counted("REDIS_ENTRY_BAD") == 1
        good.wait_looked(1)
        assert shop.leaves() == 1
        # The next look-up of the good one is a second later; by then all that was to happen at once has.
        assert shop.store.db.hgetall(JOBS) == kept
    assert not shop.api.of(job.delay_id) and not job.looked() and not job.looked("legacy")
    assert shop.store.db.hgetall(JOBS) == kept


@pytest.mark.parametrize("name", POISON)
def test_s19_poisoned_values(clean, name):
    job = clean.job(delay_id="syd_p")
    clean.api.by_id.pop("syd_p", None)
    text = value(job)
    changed = POISON[name](text)
    assert changed != text
    poisoned(clean, job, field(job.alias, job.identity), changed)


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_s19_poisoned_fields(clean, name):
    job = clean.job()
    poisoned(clean, job, BAD_FIELDS[name](job.alias, job.identity), value(job))


UNUSUAL = {
    "unknown names": lambda v: v.replace("{", '{"a":{"Params":[1,{"x":null}]},"b":-1.5e3,').replace(
        '"}', '","Other":[true]}'),
    "names we write, in another case": lambda v: v.replace('"DelayId"', '"delayid":7,"CONNECTED":"x","DelayId"'),
    "blanks": lambda v: json.dumps(json.loads(v), indent=2) + "\n",
    "another order": lambda v: json.dumps({"RestartedAt": json.loads(v)["RestartedAt"],
                                           "Params": dict(reversed(json.loads(v)["Params"].items()))}),
    "escapes": lambda v: v.replace("syd", "\\u0073yd").replace('"ServerName":"h', '"Server\\u004eame":"\\u0068'),
    "4,096 bytes": lambda v: v[:-1] + ',"x":"' + "y" * (4096 - len(v) - 7) + '"}',
    "more than 24 h": lambda v: re.sub(r'"DelayTimeout":\d+', '"DelayTimeout":9223372036854775807', v),
    "in ten years": lambda v: re.sub(r'"RestartedAt":"[^"]*"', '"RestartedAt":"2036-07-23T07:28:51Z"', v),
    "in the year 9999": lambda v: re.sub(r'"RestartedAt":"[^"]*"', '"RestartedAt":"9999-12-31T23:59:59.999999999Z"', v),
    "not connected": lambda v: v.replace('"DelayId"', '"Connected":false,"DelayId"'),
    "no second": lambda v: v.replace('"DelayId"', '"LiveKitIdentity2":null,"Sid":null,"Connected":null,'
                                     '"DelegatedAt":null,"DelayId"'),
    "delegated before": lambda v: v.replace('"DelayId"', '"DelegatedAt":"2026-07-23T07:28:51+02:00","DelayId"'),
    "delegated in ten years": lambda v: v.replace('"DelayId"', '"DelegatedAt":"2036-07-23T07:28:51Z","DelayId"'),
}


def test_unusual_records_are_taken(clean):
    """Each is a job that plays its part to the end."""
    jobs = {}
    for name, change in UNUSUAL.items():
        job = jobs[name] = clean.job()
        text = change(value(job))
        assert text != value(job) and len(text.encode()) <= 4096
        clean.store.db.hset(JOBS, field(job.alias, job.identity), text)
    # A field in another form is that of the same job: it moves to the canonical one.
    fields = {"blanks": lambda a, i: f' [ "{a}" ,\n"{i}" ] ', "escapes": lambda a, i: json.dumps([a, i]).replace("@",
            "\\u0040")
              .replace("A", "\\u0041"), "slash": lambda a, i: canonical([a, i]).replace("/", "\\/").replace("a",
                      "\\u0061")}
    for name, form in fields.items():
        job = jobs[f"field: {name}"] = clean.job(path="/sfu/get")
        clean.store.db.hset(JOBS, form(job.alias, job.identity), value(job))
    with clean.open():
        line = clean.svc.wait_event("JOBS_RESTORED")
        assert int(line["count"]) >= len(UNUSUAL) and line["bad"] == "0", clean.svc.log_text()
        for job in jobs.values():
            job.wait_looked(1)
        assert clean.leaves() == len(jobs)
        assert clean.store.jobs().keys() == {field(j.alias, j.identity) for j in jobs.values()}
        for job in jobs.values():
            job.joined()
        for job in jobs.values():
            job.restarted()
        for job in jobs.values():
            job.left()
        for job in jobs.values():
            assert len(job.sent()) == 1
        wait_for("an empty hash", lambda: not clean.store.jobs())


@scene
def future_restart_counts_as_now():
    """The deadline of one that was connected is T from now, whatever the record says: its restarts fail that long."""
    with RedisServer() as store, Shop(store) as w:
        job = w.job(T=3000).script("restart", BUSY).present()
        w.put(job, time.time_ns() + 3650 * DAY, Connected=True)
        w.serve()
        job.restarted()
        job.ended()
        w.erased(job)
        job.never_sent()
        w.end()


# ---- death and return

@scene({f"{how}, {where}": (kill, single) for how, kill in (("killed", True), ("stopped", False))
        for where, single in (("replicas", False), ("single", True))})
def survives(kill, single):
    """Connected ones are restarted at once, waiting ones look up again; all of them end as ever."""
    with play(8, redis={"users": [PLAIN]}, url=plain_url if single else None) as w:
        connected = [w.job(path=path).connected() for path in PATHS]
        second = w.job().delegate().joined("legacy", sid="PA_9")
        second.restarted()
        odd = w.job(path="/sfu/get", device='D"\\é\u2028<&>').connected()
        waiting = [w.job(path=path).delegate() for path in PATHS]
        failing = w.job().script("restart", *[BUSY] * 2, Reply(200, {})).delegate().joined()
        failing.restarted(1)
        ended = w.job().connected().left()
        ended.sent()
        w.erased(ended)
        for job in connected:
            w.stored(job, Connected=True, Sid="PA_1")
        wait_for("the second", lambda: json.loads(w.raw(second))["Params"].get("Sid") == "PA_9", LONG)
        before = {job: len(job.calls("restart")) for job in (*connected, second, odd)}
        looked = {job: len(job.looked()) for job in waiting}
        w.again(kill)
        for job, n in before.items():
            job.restarted(n + 1)
        for job, n in looked.items():
            job.wait_looked(n + 1)
        failing.restarted(3)
        for job in (*connected, second, odd, *waiting):
            job.never_sent()
        for job in waiting:
            job.joined().restarted()
        for job in (*connected, odd, *waiting, failing):
            job.left().sent()
        second.left(who="legacy", sid="PA_9").sent()
        every = (*connected, second, odd, *waiting, failing)
        wait_for("an empty hash", lambda: not w.store.jobs(), LONG)
        for job in every:
            job.ended()
            assert len(job.calls("send")) == 1
        assert len(ended.calls("send")) == 1


@scene
def left_while_we_were_dead():
    """Its webhook came to nobody: two confirmed absences 20 s apart. The one that is still there stays."""
    with play(3) as w:
        gone, stays, back = [w.job().connected() for _ in range(3)]
        for job in (gone, stays, back):
            w.stored(job, Connected=True)
        w.kill()
        gone.absent()
        back.presence(NOT_FOUND, participant(back.hashed, "PA_2"))
        w.serve()
        began = time.monotonic()
        for job in (gone, stays, back):
            job.restarted(2)
        call = gone.sent()[0]
        assert call.at - began > 15
        time.sleep(5)
        stays.never_sent()
        back.never_sent()
        stays.left().sent()
        back.left(sid="PA_2").sent()
        wait_for("an empty hash", lambda: not w.store.jobs())


@scene
def left_webhook_after_the_return():
    """A restored connected job is ended by a left event as any other."""
    with play(2) as w:
        job, other = w.job().connected(), w.job().connected()
        for j in (job, other):
            w.stored(j, Connected=True)
        w.again()
        job.restarted(2)
        assert job.left().sent()[0].at - job.hooked < 15
        other.restarted(2)
        other.left("CONNECTION_TIMEOUT").sent()
        w.erased(job, other)


@scene
def expired_while_we_were_dead():
    """Deleted without a call; the homeserver has sent it."""
    with play(2) as w:
        waiting, connected = w.job(T=1500).delegate(), w.job(T=1500).connected()
        w.stored(connected, Connected=True)
        w.kill()
        before = len(connected.calls())
        time.sleep(2)
        w.serve()
        w.erased(waiting, connected)
        time.sleep(1)
        assert len(connected.calls()) == before and not waiting.calls()


@scene
def taken_over_from_the_older_service():
    """Records of five members: their own identity only is watched."""
    with RedisServer() as store, Shop(store, 4) as w:
        by_hook, by_look_up, legacy, never = w.job(), w.job(), w.job(path="/sfu/get"), w.job(T=1000)
        # As that service wrote them, in the zone of its machine.
        zone = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + 7200)) + ".123456789+02:00"
        for job in (by_hook, by_look_up, legacy):
            w.put(job, zone)
        by_look_up.present()
        w.put(never, time.time_ns() + S)
        w.serve()
        by_look_up.restarted()
        for job in (by_hook, legacy):
            job.wait_looked(2)
        assert not by_hook.looked("legacy")
        by_hook.joined("legacy")
        assert not by_hook.calls()
        by_hook.joined().restarted()
        w.stored(by_hook, Connected=True, Sid="PA_1")
        assert "LiveKitIdentity2" not in w.raw(by_hook)
        legacy.joined().restarted()
        for job in (by_hook, by_look_up, legacy):
            job.left().sent()
        never.sent()
        wait_for("an empty hash", lambda: not store.jobs())
        w.end()


@scene
def as_the_older_service_reads_them():
    """What stands there at any time of a job's life has its five members first, of its types."""
    with play() as w:
        seen, over = set(), threading.Event()

        def watch():
            while not over.is_set():
                seen.update(w.store.client().hgetall(JOBS).items())
                time.sleep(0.01)
        watcher = threading.Thread(target=watch)
        watcher.start()
        jobs = [w.job(path=path, T=3000).connected() for path in PATHS]
        for job in jobs:
            job.joined(sid="PA_2")
            job.restarted(3)
            job.left(sid="PA_2").sent()
        wait_for("an empty hash", lambda: not w.store.jobs())
        over.set()
        watcher.join()
        assert len(seen) >= 6
        for key, text in seen:
            obj = json.loads(text)
            assert list(obj) == ["Params", "RestartedAt"]
            assert list(obj["Params"])[:5] == list(NAMES[:5])
            assert json.loads(key) == [obj["Params"]["LiveKitRoom"], obj["Params"]["LiveKitIdentity"]]
            assert type(obj["Params"]["DelayTimeout"]) is int and moment(obj["RestartedAt"])


# ---- the address

PERCENT = "p@:/?#[]%& =é" + CANARY_PASSWORD
HANDSHAKE = {  # the tail and head of a URL: AUTH, database, name
    "redis://127.0.0.1:{p}": (None, None, None),
    "redis://127.0.0.1:{p}/": (None, None, None),
    "redis://127.0.0.1:{p}/0": (None, None, None),
    "redis://127.0.0.1:{p}/3": (None, "3", None),
    "redis://127.0.0.1:{p}?db=2": (None, "2", None),
    "redis://127.0.0.1:{p}/?db=2": (None, "2", None),
    "redis://127.0.0.1:{p}/3?db=2": (None, "2", None),
    "redis://127.0.0.1:{p}/3?db=0": (None, None, None),
    "redis://127.0.0.1:{p}?db=1&db=15": (None, "15", None),
    "redis://localhost:{p}/1": (None, "1", None),
    "redis://:{c}@127.0.0.1:{p}": (["{c}"], None, None),
    "redis://user:{c}@127.0.0.1:{p}/7": (["user", "{c}"], "7", None),
    "redis://user@127.0.0.1:{p}": (None, None, None),
    "redis://@127.0.0.1:{p}": (None, None, None),
    "redis://u%40%3A%25:{q}@127.0.0.1:{p}": (["u@:%", PERCENT], None, None),
    "redis://:{q}@127.0.0.1:{p}": ([PERCENT], None, None),
    "redis://u:p@ss:w@127.0.0.1:{p}": (["u", "p@ss:w"], None, None),
    "redis://127.0.0.1:{p}?client_name=one": (None, None, "one"),
    "redis://:{c}@127.0.0.1:{p}/4?client_name=a&client_name=two-2": (["{c}"], "4", "two-2"),
    "redis://127.0.0.1:{p}?dial_timeout=500ms&read_timeout=1m30s&write_timeout=5": (None, None, None),
    "redis://127.0.0.1:{p}?dial_timeout=5&read_timeout=3s&write_timeout=1m2s3ms": (None, None, None),
    "redis://127.0.0.1:{p}?protocol=2&max_retries=3&min_retry_backoff=8ms&max_retry_backoff=512ms&pool_fifo=true&pool_size=10"
    "&pool_timeout=4s&min_idle_conns=1&max_idle_conns=2&max_active_conns=3": (None, None, None),
    "redis://127.0.0.1:{p}?max_concurrent_dials=1&conn_max_idle_time=30m&idle_timeout=5m&conn_max_lifetime=1h&max_conn_age=1h"
    "&conn_max_lifetime_jitter=1s&db=9": (None, "9", None),
}


def fill(text, fake):
    from urllib.parse import quote
    return text.replace("{p}", str(fake.port)).replace("{c}", CANARY_PASSWORD).replace("{q}", quote(PERCENT, safe=""))


def handshake(shop, fake, auth, db, name, **env):
    """What the service says first on each of its connections; then it works."""
    fake.know |= {"AUTH", "SELECT", "CLIENT"}
    with shop.open(**env):
        job = shop.job().delegate()
        assert fake.jobs().keys() == {field(job.alias, job.identity)}
    want = [("AUTH", auth)] * bool(auth) + [("SELECT", [db])] * bool(db) + [("CLIENT", ["SETNAME", name])] * bool(name)
    assert fake.seen[0].conn == 1
    for conn in {c.conn for c in fake.seen}:
        said = [(c.name, [a.decode() for a in c.args]) for c in fake.seen if c.conn == conn]
        assert [s for s in said if s[0] in ("AUTH", "SELECT", "CLIENT", "HELLO")] == want, said
        assert said[:len([w for w in want if w[0] == "AUTH"])] == [w for w in want if w[0] == "AUTH"]
        first = [s[0] for s in said if s[0] not in ("AUTH", "SELECT", "CLIENT")]
        if conn == 1:
            assert first[0] == "PING", said


@pytest.mark.parametrize("url", HANDSHAKE)
def test_url(shop, url):
    auth, db, name = HANDSHAKE[url]
    auth = auth and [CANARY_PASSWORD if a == "{c}" else a for a in auth]
    with FakeRedis(user=auth[0] if auth and len(auth) == 2 else None, password=auth[-1] if auth else None) as fake:
        handshake(shop, fake, auth, db, name, LIVEKIT_REDIS_URL=fill(url, fake))


@pytest.mark.parametrize("host", ["redis.test", "REDIS.test."])
def test_url_of_a_name(shop, host):
    with FakeRedis() as fake:
        handshake(shop, fake, None, None, None, LIVEKIT_REDIS_URL=f"redis://{host}:{fake.port}",
                  LKJWT_HOSTS_FILE=text_file("127.0.0.1 redis.test\n"))


@pytest.mark.parametrize("url", ["redis://", "redis://localhost", "redis://127.0.0.1", "redis://:6379", "redis:///0"])
def test_url_without_host_or_port(shop, url):
    with FakeRedis(port=6379) as fake:
        handshake(shop, fake, None, None, None, LIVEKIT_REDIS_URL=url)


def test_url_name_that_is_refused(shop):
    """CLIENT SETNAME is a courtesy."""
    with FakeRedis() as fake:
        with shop.open(LIVEKIT_REDIS_URL=fake.url(tail="?client_name=x")):
            shop.job().delegate()
        assert "CLIENT" in fake.names() and len(fake.jobs()) == 1


@pytest.mark.parametrize("kind", ["[::1]", "[::1], database 5", "unix", "unix, database 5", "user", "password",
        "database 3"])
def test_url_of_a_real_server(clean, kind):
    """The record stands in that database of it, and in no other."""
    number = int((re.search(r"\d+$", kind) or "0")[0])
    with RedisServer(password=CANARY_PASSWORD + "!" if kind == "password" else None,
                     users=[f"lk on >{CANARY_PASSWORD} ~lk-jwt:* +@all"]) as store:
        url = {"[": store.url(host="[::1]", db=f"/{number}"),
                "u": store.url("unix", query=f"?db={number}" if number else ""),
               "p": store.url(), "d": store.url(db=f"/{number}")}[kind[0]]
        if kind == "user":
            url = store.url(user="lk", password=CANARY_PASSWORD)
        with clean.open(LIVEKIT_REDIS_URL=url):
            job = clean.job().delegate()
            for db in range(16):
                held = store.client(db=db).hgetall(JOBS)
                assert held.keys() == ({field(job.alias, job.identity)} if db == number else set()), (db, held)
            up = clean.svc.wait_event("REDIS_UP")
            assert up["addr"] and clean.mode() == "replicas", up


TLS = {  # host, does it go without skip_verify, names and addresses of the certificate, its other options
    "address": ("127.0.0.1", True, {"ips": ["127.0.0.1"]}),
    "name": ("redis.test", True, {"names": ["redis.test"]}),
    "wildcard": ("redis.lk.test", True, {"names": ["*.lk.test"]}),
    "wrong name": ("redis.test", False, {"names": ["other.test"]}),
    "name for an address": ("127.0.0.1", False, {"names": ["127.0.0.1.test"]}),
    "common name only": ("redis.test", False, {"cn": "redis.test"}),
    "self-signed": ("redis.test", False, {"names": ["redis.test"], "self_signed": True}),
    "for clients": ("redis.test", False, {"names": ["redis.test"], "eku": ("clientAuth",)}),
    "another authority": ("redis.test", False, {"names": ["redis.test"]}),
}


@pytest.mark.parametrize("kind", TLS)
def test_rediss(clean, pki, kind):
    """The trust rules of all other calls; skip_verify is the one way round them."""
    host, goes, cert = TLS[kind]
    issuer = Pki() if kind == "another authority" else pki
    env = {"LKJWT_CA_FILE": pki.ca_file, "LKJWT_CA_ONLY": "true",
            "LKJWT_HOSTS_FILE": text_file("127.0.0.1 redis.test redis.lk.test\n")}
    with RedisServer(tls=issuer.leaf(**cert), password=CANARY_PASSWORD) as store:
        url = store.url("rediss", host=host)
        for query in ("", "?skip_verify=false", "?skip_verify=true"):
            if goes or query.endswith("true"):
                store.clear()
                with clean.open(LIVEKIT_REDIS_URL=url + query, **env):
                    job = clean.job().delegate()
                    assert store.jobs().keys() == {field(job.alias, job.identity)}
            else:
                got = fatal({**clean.svc_env(), **env, "LIVEKIT_REDIS_URL": url + query,
                             "LIVEKIT_INSECURE_SKIP_VERIFY_TLS": "YES_I_KNOW_WHAT_I_AM_DOING"})
                assert "LIVEKIT_REDIS_URL" in got.err and CANARY_PASSWORD not in got.text, got


BAD_URLS = [
    "127.0.0.1:6379", "localhost", "//127.0.0.1", "redis:127.0.0.1", "http://127.0.0.1", "tcp://127.0.0.1",
    "redis+sentinel://a",
    "valkey://127.0.0.1", "://127.0.0.1", "redis", "unix:", "unix://", "x",
    "redis://127.0.0.1/x", "redis://127.0.0.1/1/2", "redis://127.0.0.1/-1", "redis://127.0.0.1/1.5",
    "redis://127.0.0.1/1x",
    "redis://127.0.0.1/99999999999999999999", "redis://127.0.0.1?db=x", "redis://127.0.0.1?db=-1",
    "redis://127.0.0.1?db=1.5",
    "redis://127.0.0.1:0", "redis://127.0.0.1:65536", "redis://127.0.0.1:x", "redis://127.0.0.1:-1",
    "redis://127.0.0.1:6379:1",
    "redis://[::1", "redis://::1", "redis://[::1]x", "redis://[:::1]", "redis://a b", "redis://127.0.0.1 ",
    "redis://a\nb",
    "redis://u:%zz@127.0.0.1", "redis://u:%4@127.0.0.1", "redis://%@127.0.0.1",
    "redis://127.0.0.1?x=1", "redis://127.0.0.1?DB=1", "redis://127.0.0.1?addr=x", "redis://127.0.0.1?password={c}",
    "redis://127.0.0.1?db=1&bogus=", "redis://127.0.0.1?skip_verify=true", "rediss://127.0.0.1?skip_verify=maybe",
    "redis://127.0.0.1?dial_timeout=x", "redis://127.0.0.1?read_timeout=1w", "redis://127.0.0.1?write_timeout=5ss",
    "redis://127.0.0.1?read_timeout=1m30", "redis://127.0.0.1?dial_timeout=99999999999999999999",
    "redis://127.0.0.1?dial_timeout=99999999999999999h",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_s09_url_is_fatal(shop, url):
    """The variable is named, the password is not."""
    url = url.replace("{c}", CANARY_PASSWORD)
    if "@" not in url and "://" in url:
        url = url.replace("://", f"://user:{CANARY_PASSWORD}@", 1) if not url.startswith("unix") else url
    env = {**shop.svc_env(), "LIVEKIT_REDIS_URL": url}
    got = fatal(env)
    assert "LIVEKIT_REDIS_URL" in got.err and CANARY_PASSWORD not in got.text, got
    got = run_cli(["--print-config"], env)
    assert got.code == 1 and CANARY_PASSWORD not in got.text, got


PASSWORDS = {  # URL's user and password, of the variable, of the file: AUTH
    "variable": ("", "{c}", None, ["{c}"]),
    "variable, user": ("user:@", "{c}", None, ["user", "{c}"]),
    "variable, user alone": ("user@", "{c}", None, ["user", "{c}"]),
    "variable for another": ("user:wrong@", "{c}", None, ["user", "{c}"]),
    "variable is not percent-encoded": ("", "%41{c}", None, ["%41{c}"]),
    "file": ("", None, "{c}", ["{c}"]),
    "file with an end of line": ("user:wrong@", None, "{c}\n", ["user", "{c}"]),
    "file with CR LF": ("", None, "{c}\r\n", ["{c}"]),
    "empty variable": ("user:{c}@", "", None, ["user", "{c}"]),
}


@pytest.mark.parametrize("kind", PASSWORDS)
def test_password(shop, kind):
    who, variable, text, auth = PASSWORDS[kind]
    put = lambda s: s and s.replace("{c}", CANARY_PASSWORD)
    auth = [put(a) for a in auth]
    env = {} if variable is None else {"LIVEKIT_REDIS_PASSWORD": put(variable)}
    if text is not None:
        env["LKJWT_REDIS_PASSWORD_FROM_FILE"] = text_file(put(text))
    with FakeRedis(user=auth[0] if len(auth) == 2 else None, password=auth[-1]) as fake:
        handshake(shop, fake, auth, None, None, LIVEKIT_REDIS_URL=fake.url(put(who)), **env)


@pytest.mark.parametrize("env, names", [
    ({"LIVEKIT_REDIS_PASSWORD": CANARY_PASSWORD, "LKJWT_REDIS_PASSWORD_FROM_FILE": "{file}"},
     ["LIVEKIT_REDIS_PASSWORD", "LKJWT_REDIS_PASSWORD_FROM_FILE"]),
    ({"LKJWT_REDIS_PASSWORD_FROM_FILE": "/nonexistent/password"}, ["LKJWT_REDIS_PASSWORD_FROM_FILE"]),
    ({"LKJWT_REDIS_PASSWORD_FROM_FILE": "/"}, ["LKJWT_REDIS_PASSWORD_FROM_FILE"]),
], ids=["both", "no such file", "a folder"])
def test_password_is_fatal(shop, env, names):
    env = {k: v.replace("{file}", text_file(CANARY_PASSWORD)) for k, v in env.items()}
    with FakeRedis() as fake:
        got = fatal({**shop.svc_env(), "LIVEKIT_REDIS_URL": fake.url(), **env})
        assert not [n for n in names if n not in got.err] and CANARY_PASSWORD not in got.text, got
        assert not fake.seen


def test_s09_print_config_masks(shop):
    for url in (f"redis://user:{CANARY_PASSWORD}@redis.example.org:6379/2",
            f"rediss://:{CANARY_PASSWORD}@redis.example.org"):
        got = run_cli(["--print-config"], {**shop.svc_env(), "LIVEKIT_REDIS_URL": url})
        assert got.code == 0 and CANARY_PASSWORD not in got.text and "\nLIVEKIT_REDIS_URL=" in got.out, got
    got = run_cli(["--print-config"], {**shop.svc_env(), "LIVEKIT_REDIS_PASSWORD": CANARY_PASSWORD})
    assert got.code == 0 and CANARY_PASSWORD not in got.text and "LIVEKIT_REDIS_PASSWORD" in got.out, got


# ---- not there at the start

def says(data):
    def talk(sock, number):
        sock.recv(65536)
        sock.sendall(data)
        sock.recv(65536)
    return lambda: RawServer(talk)


def dribble(sock, number):
    for byte in b"+PONG" * 6:
        sock.sendall(bytes([byte]))
        time.sleep(1)


ABSENT = {  # what listens
    "nobody": None,
    "no answer to SYN": BlackHole,
    "closes": lambda: RawServer(lambda sock, n: None),
    "a web server": says(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
    "a mail server": says(b"220 mail.example.org ESMTP\r\n"),
    "text": says(b"!oops\r\n"),
    "loading": says(b"-LOADING Redis is loading the dataset in memory\r\n"),
    "AUTH without a password there": says(b"-ERR Client sent AUTH, but no password is set\r\n"),
    "wrong password": says(b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"),
    "a secret in its error": says(f"-ERR you said {CANARY_PASSWORD}\r\n".encode()),
    "never answers": lambda: RawServer(lambda sock, n: sock.recv(65536) and sock.recv(65536)),
    "half an answer": says(b"+PON"),
    "one byte a second": lambda: RawServer(dribble),
}


@pytest.mark.parametrize("kind", ABSENT)
def test_s09_not_there_at_the_start(shop, kind):
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(ABSENT[kind]()).port if ABSENT[kind] else free_port()
        url = f"redis://user:{CANARY_PASSWORD}@127.0.0.1:{port}?dial_timeout=700ms&read_timeout=700ms"
        got = fatal({**shop.svc_env(), "LIVEKIT_REDIS_URL": url})
        assert "LIVEKIT_REDIS_URL" in got.err and CANARY_PASSWORD not in got.text, got


REFUSES = {  # URL of a real server that wants a password
    "no password": lambda s: s.url(password=""), "wrong password": lambda s: s.url(password=CANARY_PASSWORD + "x"),
    "unknown user": lambda s: s.url(user="nobody", password=CANARY_PASSWORD),
    "user that is off": lambda s: s.url(user="off", password=CANARY_PASSWORD),
    "user that may not PING": lambda s: s.url(user="mute", password=CANARY_PASSWORD),
    "no such database": lambda s: s.url(db="/99"),
    "TLS on the plain port": lambda s: s.url(query="?dial_timeout=700ms").replace("redis:", "rediss:"),
    "plain on the TLS port": lambda s: s.url("rediss").replace("rediss:", "redis:"),
    "no such name": lambda s: s.url(host="nowhere.test"), "no such socket": lambda s: s.url("unix") + "x",
    "a file": lambda s: "unix://" + text_file("x"),
}


@pytest.fixture(scope="module")
def locked(pki):
    with RedisServer(password=CANARY_PASSWORD, tls=pki.leaf(ips=["127.0.0.1"]), users=[
            f"off off >{CANARY_PASSWORD} ~* +@all", f"mute on >{CANARY_PASSWORD} ~* +@all -ping"]) as store:
        yield store


@pytest.mark.parametrize("kind", REFUSES)
def test_s09_refused_at_the_start(shop, locked, pki, kind):
    got = fatal({**shop.svc_env(), "LIVEKIT_REDIS_URL": REFUSES[kind](locked), "LKJWT_CA_FILE": pki.ca_file,
                 "LKJWT_HOSTS_FILE": text_file("")})
    assert "LIVEKIT_REDIS_" in got.err and CANARY_PASSWORD not in got.text, got
    assert not locked.jobs() and not locked.db.keys("lk-jwt:*")


@pytest.mark.parametrize("kind", ["up", "unset", "nobody", *REFUSES])
def test_s09_check_has_a_line(shop, locked, pki, kind):
    """The step that failed is named, the password is not; nothing is left in the store."""
    url = {"up": lambda s: s.url(), "unset": lambda s: "",
           "nobody": lambda s: f"redis://:{CANARY_PASSWORD}@127.0.0.1:{free_port()}", **REFUSES}[kind](locked)
    got = run_cli(["--check"], {**shop.svc_env(), "LIVEKIT_REDIS_URL": url, "LKJWT_CA_FILE": pki.ca_file,
                                "LKJWT_HOSTS_FILE": text_file("")}, timeout=60)
    lines = [x.split()[0] for x in got.out.splitlines() if x.split()[1] == "redis"]
    fine = kind in ("up", "unset")
    assert lines == ([] if kind == "unset" else ["ok" if fine else "no"]), got
    assert (got.code == 0) == fine and CANARY_PASSWORD not in got.text, got
    assert not locked.db.keys("lk-jwt:*")


def test_nothing_listens_before_redis_answers(shop):
    """A client sent there too early would be told its delegation is kept."""
    with FakeRedis() as fake:
        asked, go = threading.Event(), threading.Event()

        def wait(command):
            if command.name == "HGETALL":
                asked.set()
                go.wait(HANG)
        fake.twist = wait
        svc = Service({**shop.svc_env(), "LIVEKIT_REDIS_URL": fake.url(tail="?read_timeout=30s")}, wait=False)
        with svc:
            assert asked.wait(HANG)
            with pytest.raises((OSError, Closed)):
                svc.request("GET", "/healthz", timeout=2)
            go.set()
            wait_for("/healthz", lambda: _status(svc) == 200)


def _status(svc):
    with contextlib.suppress(OSError, Closed):
        return svc.request("GET", "/healthz", timeout=5).status


# ---- away later

class Away:
    """How Redis goes, and how it is back (it returns when it is); held: not before we say so."""

    def __init__(self, go, back, held=True, emptied=False):
        self.go, self.back, self.held, self.emptied = go, back, held, emptied


def debug_sleep(store):
    def sleep():
        store.client().execute_command("DEBUG", "SLEEP", "9")
    threading.Thread(target=sleep, daemon=True).start()
    time.sleep(0.1)


AWAY = {
    "SIGSTOP": Away(RedisServer.pause, RedisServer.resume),
    "CLIENT PAUSE": Away(lambda s: s.db.client_pause(9000), lambda s: s.db.ping(), held=False),
    "DEBUG SLEEP": Away(debug_sleep, lambda s: s.db.ping(), held=False),
    "killed": Away(RedisServer.kill, RedisServer.start),
    "replaced": Away(RedisServer.kill, RedisServer.replace, emptied=True),
}


def together(*calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [f.result() for f in [pool.submit(c) for c in calls]]


def drained(w, *jobs):
    """Everybody leaves: sent once, and nothing is left in the store."""
    for job in jobs:
        job.left()
    for job in jobs:
        job.sent()
        job.ended()
    wait_for(f"an empty hash: {w.store.jobs()}", lambda: not w.store.jobs(), LONG)
    for job in jobs:
        assert len(job.calls("send")) == 1, job.calls()


@scene({f"{name}, {mode}": (away, mode) for name, away in AWAY.items() for mode in ("replicas", "single")
        if mode == "replicas" or name in ("SIGSTOP", "killed", "replaced")})
def outage(away, mode):
    """Jobs go on in memory; what was to be written or deleted is, when it is back; nobody notices but the operator."""
    with play(8, redis={"append": True, "users": [PLAIN]}, url=plain_url if mode == "single" else None) as w:
        assert w.mode() == mode
        assert (w.metric("redis_up"), w.metric("redis_unsaved")) == (1, 0)
        stays, goes, idle = w.job().connected(), w.job().connected(), w.job().delegate()
        quick = w.job(T=3000).connected()
        w.stored(stays, Connected=True)
        with Healthy(w):
            away.go(w.store)
            new, brief, gone = [w.job(path=path) for path in PATHS]
            together(goes.left, new.delegate, brief.delegate, gone.delegate)
            w.event("REDIS_DOWN")
            together(new.joined, brief.joined, lambda: gone.left("PARTICIPANT_REMOVED"))
            if away.held:
                w.wait_metric("redis_up", 0)
                goes.sent()
                new.restarted()
                brief.restarted()
                brief.left().sent()
                gone.ended()
                # T passes and it is still connected: restarts went on.
                quick.restarted(len(quick.calls("restart")) + 2)
                assert w.metric("redis_unsaved") >= 3
            away.back(w.store)
            w.event("REDIS_UP", 2)
            w.wait_metric("redis_up", 1)
            w.wait_metric("redis_unsaved", 0)
            if not away.held:
                goes.sent()
                new.restarted()
                brief.restarted()
                brief.left().sent()
            w.erased(goes, brief, gone)
            for job in (stays, new, quick):
                w.stored(job, Connected=True, Sid="PA_1")
            w.stored(idle)
            assert w.store.jobs().keys() == {field(j.alias, j.identity) for j in (stays, new, quick, idle)}
            # The homeserver would have sent it by now.
            quick.restarted(len(quick.calls("restart")) + 2)
            for job in (stays, new, quick, idle):
                job.never_sent()
            assert w.leaves() == 4
            if mode == "replicas" and away.emptied:
                w.event("REDIS_CHANGED")
            idle.joined().restarted()
            drained(w, stays, new, quick, idle)
            for job in (goes, brief):
                assert len(job.calls("send")) == 1
            assert not gone.calls()


@scene({name: (name,) for name in ("killed", "SIGSTOP", "CLIENT KILL")})
def outage_in_the_middle_of_calls(name):
    """Delegations and webhooks all the while: each one answered is kept, and comes to its end."""
    with play(8, redis={"append": True}) as w, Healthy(w):
        over, jobs, lock = threading.Event(), [], threading.Lock()

        def clients(n):
            while not over.is_set():
                job = w.job(path=PATHS[n % 3], server=w.names[n]).delegate()
                job.joined()
                with lock:
                    jobs.append(job)
                time.sleep(0.05)
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(clients, n) for n in range(6)]
            try:
                for _ in range(3):
                    time.sleep(0.7)
                    if name == "killed":
                        w.store.restart()
                    elif name == "CLIENT KILL":
                        w.store.db.client_kill_filter(_type="normal", skipme=True)
                    else:
                        w.store.pause()
                        time.sleep(0.7)
                        w.store.resume()
                time.sleep(0.7)
            finally:
                over.set()
            for f in running:
                f.result()
        assert len(jobs) > 20
        w.wait_metric("redis_up", 1)
        w.wait_metric("redis_unsaved", 0)
        for job in jobs:
            w.stored(job, Connected=True)
        drained(w, *jobs)


@scene
def outage_and_the_end_of_the_service():
    """SIGTERM while Redis is away: obeyed in time, and what was kept before is there for the next."""
    with play(2, redis={"append": True}) as w:
        job = w.job().connected()
        w.stored(job, Connected=True)
        w.store.pause()
        late = w.job().delegate()
        w.event("REDIS_DOWN")
        w.end()
        w.store.resume()
        w.serve()
        job.restarted(2)
        if w.raw(late):         # it lay in the socket
            late.joined().restarted()
            drained(w, job, late)
        else:
            drained(w, job)


@scene
def outage_of_dozens():
    """Many ended and many new ones: all of them written and deleted on return."""
    with play(8, redis={"append": True}) as w, Healthy(w):
        old = together(*[w.job(server=w.names[n % 8]).connected for n in range(40)])
        for job in old:
            w.stored(job, Connected=True)
        w.store.kill()
        new = [w.job(server=w.names[n % 8]) for n in range(40)]
        together(*[j.left for j in old], *[j.delegate for j in new])
        for job in old:
            job.sent()
        wait_for("all of them to be unsaved", lambda: w.metric("redis_unsaved") >= 80)
        w.store.start()
        w.wait_metric("redis_unsaved", 0)
        assert w.store.jobs().keys() == {field(j.alias, j.identity) for j in new}


@scene
def outage_again_and_again():
    """Ten in a row, of every length up to a second."""
    with play(3, redis={"append": True}) as w, Healthy(w):
        stays = w.job(T=4000).connected()
        for n in range(10):
            w.store.kill()
            time.sleep(n / 10)
            w.store.start()
            if n % 3 == 0:
                w.wait_metric("redis_up", 1)
        w.wait_metric("redis_up", 1)
        w.wait_metric("redis_unsaved", 0)
        w.stored(stays, Connected=True)
        stays.restarted(len(stays.calls("restart")) + 2)
        stays.never_sent()
        drained(w, stays)


# ---- there, and refuses

REFUSALS = {  # on, off, first word of the error
    "out of memory": (lambda s: s.db.config_set("maxmemory", 1), lambda s: s.db.config_set("maxmemory", 0), "OOM"),
    "read-only": (lambda s: s.db.replicaof("127.0.0.1", "1"), lambda s: s.db.replicaof("NO", "ONE"), "READONLY"),
    "too few replicas": (lambda s: s.db.config_set("min-replicas-to-write", 1), lambda s: s.db.config_set(
        "min-replicas-to-write", 0), "NOREPLICAS"),
}


@scene({f"{name}, {mode}": (name, mode) for name in REFUSALS for mode in ("replicas", "single")})
def refuses_to_write(name, mode):
    """As good as away: told by name, kept in memory, written when it is over."""
    on, off, code = REFUSALS[name]
    with play(3, redis={"users": [PLAIN]}, url=plain_url if mode == "single" else None) as w, Healthy(w):
        old = w.job().connected()
        w.stored(old, Connected=True)
        on(w.store)
        new = w.job().delegate()
        line = w.event("REDIS_REFUSED")
        assert line["command"] and line["code"] in (code, "UNBLOCKED"), line     # the latter: a waiting XREAD
        new.joined().restarted()
        off(w.store)
        w.stored(new, Connected=True)
        w.wait_metric("redis_unsaved", 0)
        drained(w, old, new)


@scene
def refuses_the_password_later():
    """Changed under us: down until it is changed back."""
    with play(3, redis={"password": CANARY_PASSWORD}) as w, Healthy(w):
        old = w.job().connected()
        w.stored(old, Connected=True)
        w.store.db.config_set("requirepass", "another")
        w.store.db.client_kill_filter(_type="normal", skipme=True)
        admin = w.store.client()
        admin.connection_pool.connection_kwargs["password"] = "another"
        new = w.job().delegate()
        w.event("REDIS_DOWN")
        w.wait_metric("redis_up", 0)
        new.joined().restarted()
        admin.config_set("requirepass", CANARY_PASSWORD)
        w.wait_metric("redis_up", 1)
        w.stored(new, Connected=True)
        drained(w, old, new)


@scene({"jobs": (JOBS,), "stream": (STREAM,), "a lease": (LEASE + "0",), "all of it": (None,)})
def wrong_type_of_a_key(key):
    """Another program's value under our name: told, lived with, and over when it is gone."""
    with play(3) as w, Healthy(w):
        old = w.job().connected()
        w.stored(old, Connected=True)
        names = [key] if key else w.store.db.keys("lk-jwt:*")
        for name in names:
            w.store.db.delete(name)
            w.store.db.lpush(name, "x") if name.startswith(LEASE) else w.store.db.set(name, "x")
        new = w.job().delegate()
        new.joined().restarted()
        old.restarted(1)
        if key in (JOBS, STREAM):
            told = wait_for("a line", lambda: w.svc.events("REDIS_REFUSED") + w.svc.events("REDIS_SINGLE"))
            assert told[0]["code"] in ("WRONGTYPE", "EXECABORT")
        w.store.db.delete(*names)
        w.wait_metric("redis_unsaved", 0)
        w.stored(new, Connected=True)
        drained(w, old, new)


@scene({"FLUSHALL": (lambda s: s.db.flushall(),), "SCRIPT FLUSH": (lambda s: s.db.script_flush(),),
        "stream deleted": (lambda s: s.db.delete(STREAM),), "stream trimmed": (lambda s: s.db.xtrim(STREAM, maxlen=0),),
        "leases deleted": (lambda s: s.db.delete(*s.db.keys(LEASE + "*")),),
        "records deleted": (lambda s: s.db.delete(JOBS),),
        "replicas deleted": (lambda s: s.db.delete("lk-jwt:replicas"),)})
def emptied_under_us(change):
    """Whoever does it: jobs that live are not sent, and end as ever; new ones are kept."""
    with play(4) as w, Healthy(w):
        old, idle = w.job(T=5000).connected(), w.job().delegate()
        w.stored(old, Connected=True)
        change(w.store)
        new = w.job().delegate()
        new.joined().restarted()
        w.stored(new, Connected=True)
        w.stored(old, Connected=True)      # its restart renews it at the latest
        idle.joined().restarted()
        old.never_sent()
        drained(w, old, idle, new)


# ---- single mode

def single_mode(w):
    assert w.mode() == "single"
    one, two = w.job().connected(), w.job(path="/sfu/get", T=2000).connected()
    never = w.job(T=1000).delegate()
    w.stored(one, Connected=True, Sid="PA_1", LiveKitIdentity2=one.legacy)
    two.restarted(3)
    never.sent()
    w.erased(never)
    drained(w, one, two)
    assert w.count("REDIS_SINGLE") == 1 and w.counted("REDIS_SINGLE") == 1


@scene
def single_with_the_least_redis():
    """PING, HSET, HDEL, HGETALL, and what is refused once at the start."""
    with FakeRedis() as fake, StoreWorld(fake, 3) as w:
        single_mode(w)
        seen = fake.seen[:]
        known = [c for c in seen if c.name in SINGLE]
        probes = [c for c in seen if c.name not in SINGLE]
        assert {c.name for c in known} == set(SINGLE)
        assert not {"SELECT", "AUTH", "HELLO", "CLIENT", "QUIT"} & {c.name for c in seen}, seen
        assert len(probes) <= 4, probes
        # None of them after the first job.
        first = min(c.at for c in seen if c.name == "HSET")
        assert all(c.at < first for c in probes), probes
        assert {tuple(c.args[:1]) for c in seen if c.name in ("HSET", "HDEL", "HGETALL")} == {(JOBS.encode(),)}
        assert all(len(c.args) == n for c in seen for name, n in (("HSET", 3), ("HDEL", 2),
                ("HGETALL", 1)) if c.name == name)


@scene({"no scripting, no streams": "~lk-jwt:* +@all -@scripting -@stream",
        "no scripting": "~lk-jwt:* +@all -@scripting",
        "no streams": "~lk-jwt:* +@all -@stream", "four commands": "~lk-jwt:* +ping +hset +hdel +hgetall",
        "the hash alone": "~lk-jwt:jobs +@all",
        "four commands on the hash": "~lk-jwt:jobs +ping +hset +hdel +hgetall"})
def single_by_acl(rules):
    with play(3, redis={"users": [f"small on >{CANARY_PASSWORD} {rules}"]},
              url=lambda s: s.url(user="small", password=CANARY_PASSWORD)) as w:
        single_mode(w)
        assert not w.store.db.exists(JOBS, STREAM)


# ---- nonsense

def nested(depth):
    return b"*1\r\n" * depth + b":1\r\n"


NONSENSE = {  # bytes, or a twist of the FakeRedis it is given
    "oops": b"!oops\r\n", "empty line": b"\r\n", "NULs": b"\0" * 64, "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "high": b"\xff" * 64,
    "huge bulk": b"$99999999999\r\n", "bulk of 2 GB": b"$2147483647\r\nx", "bulk of 2^63": b"$9223372036854775807\r\n",
    "bulk of 2^64": b"$18446744073709551616\r\n", "bulk of many digits": b"$" + b"9" * 4000 + b"\r\n",
    "negative bulk": b"$-2\r\n", "minus": b"$-\r\n", "bulk without a number": b"$\r\n", "bulk, plus": b"$+3\r\nabc\r\n",
    "negative array": b"*-5\r\n", "array without a number": b"*\r\n", "array of 2^31": b"*2147483648\r\n", "huge array":
    b"*99999999999\r\n", "array of 40,001": b"*40001\r\n" + b":1\r\n" * 40001, "nested 1,000 deep": nested(1000),
    "nested 100,000 deep": nested(100000), "nested and wide": b"*1000\r\n" * 1000, "integer of text": b":abc\r\n",
    "empty integer": b":\r\n", "huge integer": b":" + b"9" * 40 + b"\r\n", "integer with a fraction": b":1.5\r\n",
    "bare LF": b":1\n:1\n", "bulk with a wrong end": b"$3\r\nabcXX", "CR in a line": b"+a\rb\r\n",
    "RESP3 map": b"%1\r\n+a\r\n:1\r\n",
    "RESP3 null": b"_\r\n", "RESP3 bool": b"#t\r\n", "RESP3 push": b">2\r\n+message\r\n+x\r\n",
    "RESP3 double": b",1.5\r\n",
    "more than asked for": b":1\r\n:1\r\n:1\r\n:1\r\n", "a long line": b"+" + b"x" * 100000 + b"\r\n",
    "a long error": b"-ERR " + b"x" * 100000 + b"\r\n", "an error without a word": b"-\r\n",
    "an error of bytes": b"-\xff\0\x1b[31m a\r\n",
    "endless line": lambda f: f.endless(b"x" * 65536), "endless array": lambda f: f.endless(b"*1000000\r\n"),
    "endless integers": lambda f: f.endless(b":1\r\n" * 10000), "bulk that ends early": lambda f: f.cut(b"$100\r\nabc"),
    "array that ends early": lambda f: f.cut(b"*4\r\n$1\r\na\r\n"), "nothing": lambda f: f.stall,
    "close": lambda f: f.close,
    "reset": lambda f: f.reset, "one byte a second": lambda f: f.slowly(b":00000001\r\n"),
    "an error a byte a second": lambda f:
    f.slowly(b"-ERR no\r\n"),
    **{f"cut after {n}": (lambda n: lambda f: f.cut(b":1\r\n"[:n]))(n) for n in range(4)},
    "status": b"+OK\r\n", "null": b"$-1\r\n", "null array": b"*-1\r\n", "empty array": b"*0\r\n",
    "empty bulk": b"$0\r\n\r\n",
    "bulk": b"$3\r\nfoo\r\n", "array": b"*2\r\n:1\r\n$1\r\na\r\n", "error": b"-ERR no\r\n",
    "array of nulls": b"*3\r\n$-1\r\n*-1\r\n$-1\r\n", "array of errors": b"*2\r\n-ERR a\r\n-ERR b\r\n",
}
HARMLESS = ("status", "null", "null array", "empty array", "empty bulk", "bulk", "array", "more than asked for",
        "CR in a line", "endless integers",
            "array of nulls", "array of errors", "array of 40,001")     # may be taken for an answer, or not


IMPATIENT = "?read_timeout=1s"      # what stalls shall not take long


def twisted(fake, names, what):
    """Each of these commands is answered so once; the names that are not yet."""
    left = set(names)

    def twist(command):
        if command.name in left:
            left.discard(command.name)
            return what if isinstance(what, bytes) else what(fake)
    fake.twist = twist
    return left


@scene({name: (name,) for name in NONSENSE})
def nonsense_single(name):
    """In answer to HSET, then to HDEL: never a crash, never a hang; the client has its 200, the store its record."""
    with FakeRedis() as fake, StoreWorld(fake, 3, LIVEKIT_REDIS_URL=fake.url(tail=IMPATIENT)) as w, Healthy(w):
        stays = w.job().connected()
        w.stored(stays, Connected=True)
        for n in range(2):
            left = twisted(fake, ["HSET"], NONSENSE[name])
            job = w.job().delegate()
            wait_for("an HSET", lambda: not left)
            job.joined().restarted()
            if name not in HARMLESS:
                wait_for("a line of it", lambda: [
                    e for n in ("REDIS_PROTO", "REDIS_DOWN", "REDIS_REFUSED") for e in w.svc.events(n)])
                w.stored(job, Connected=True)
            w.wait_metric("redis_unsaved", 0)
            left = twisted(fake, ["HDEL"], NONSENSE[name])
            job.left().sent()
            job.ended()
            wait_for("an HDEL", lambda: not left)
            w.wait_metric("redis_unsaved", 0)
            if name not in HARMLESS:
                w.erased(job)
        fake.twist = None
        stays.never_sent()
        stays.left().sent()
        w.erased(stays)
        w.wait_metric("redis_up", 1)


@scene({name: (name,) for name in NONSENSE})
def nonsense_replicas(name):
    """A real Redis behind, but each kind of command it is sent is answered so once, and so is what comes of that."""
    with RedisServer() as store, FakeRedis(store) as fake, StoreWorld(
            fake, 3, LIVEKIT_REDIS_URL=fake.url(tail="?read_timeout=2s")) as w, Healthy(w):
        w.store = store
        assert w.mode() == "replicas"
        stays, ends = w.job().connected(), w.job().connected()
        w.stored(stays, Connected=True)
        names = {c.name for c in fake.seen}
        left = twisted(fake, names, NONSENSE[name])
        job = w.job().delegate()
        job.joined().restarted()
        ends.left().sent()
        until = time.monotonic() + 8        # some are only sent at the start
        while left and time.monotonic() < until:
            time.sleep(0.1)
        assert len(left) < len(names), (left, names)
        fake.twist = None
        w.wait_metric("redis_up", 1)
        w.wait_metric("redis_unsaved", 0)
        stays.never_sent()
        job.never_sent()
        again = w.job().connected()
        w.stored(again, Connected=True)
        for j in (stays, job, again):
            j.left().sent()
            j.ended()
        w.erased(again)
        if name not in HARMLESS:
            w.erased(stays, job, ends)


@scene({f"{name}, {command}": (name, command) for command in ("PING", "HGETALL") for name in NONSENSE})
def nonsense_at_the_start(name, command):
    """It serves, or says that Redis is not one and ends: one of the two, and soon."""
    with FakeRedis() as fake, Shop(fake) as w:
        twisted(fake, [command], NONSENSE[name])
        svc = Service({**w.svc_env(), "LIVEKIT_REDIS_URL": fake.url(tail=IMPATIENT)}, wait=False)
        with svc:
            wait_for("an end or a beginning", lambda: svc.proc.poll() is not None or _status(svc) == 200)
            ended = svc.proc.poll() is not None
            assert svc.stop() == (1 if ended else 0), svc.log_text()
            assert ("LIVEKIT_REDIS_URL" in svc.log_text()) == ended, svc.log_text()
            assert ended or name in HARMLESS or command == "HGETALL", svc.log_text()


def kept_in(fake, w, count):
    """That many records of waiting jobs, written by the test."""
    jobs = [w.job(path="/sfu/get") for _ in range(count)]
    for job in jobs:
        fake.hash[field(job.alias, job.identity).encode()] = value(job).encode()
    return jobs


@scene
def records_byte_by_byte():
    """Each byte of the answer to HGETALL in a segment of its own."""
    with FakeRedis() as fake, Shop(fake) as w:
        jobs = kept_in(fake, w, 3)
        whole = array([bulk(x) for pair in fake.hash.items() for x in pair])
        fake.twist = lambda c: fake.slowly(whole, 0.0005) if c.name == "HGETALL" else None
        with w.open():
            assert w.svc.wait_event("JOBS_RESTORED")["count"] == "3"
            for job in jobs:
                job.joined().restarted()


@scene({str(n): (n,) for n in range(0, 16)})
def records_cut_short(n):
    """The connection ends within the answer: told and ended, or read again; never a part of the jobs."""
    with FakeRedis() as fake, Shop(fake) as w:
        kept_in(fake, w, 3)
        before = fake.jobs()
        whole = array([bulk(x) for pair in fake.hash.items() for x in pair])
        for at in range(n * len(whole) // 16, (n + 1) * len(whole) // 16, 17):
            twisted(fake, ["HGETALL"], lambda f, part=whole[:at]: f.cut(part))
            with Service(w.svc_env(), wait=False) as svc:
                wait_for("an end or a beginning", lambda: svc.proc.poll() is not None or _status(svc) == 200)
                ended = svc.proc.poll() is not None
                assert svc.stop() == (1 if ended else 0), svc.log_text()
            assert ended or svc.events("JOBS_RESTORED", count=3), svc.log_text()
            assert not ended or "LIVEKIT_REDIS_URL" in svc.log_text()
            assert fake.jobs() == before


@scene
def records_by_the_thousand():
    """Each third of 3,000 is good, expired, poisoned."""
    with RedisServer() as store, Shop(store) as w:
        rows, good, now = {}, [], time.time_ns()
        for n in range(3000):
            job = w.job(T=HOUR)
            rows[field(job.alias, job.identity)] = (
                value(job, now) if n % 3 == 0 else value(job, now - DAY) if n % 3 == 1 else value(job)[:-1])
            if n % 3 == 0:
                good.append(job)
        counts, left = restored(w, rows)
        assert counts == (1000, 1000, 1000)
        assert left.keys() >= {field(j.alias, j.identity) for j in good} and len(left) == 2000
        store.clear()


# ---- garbage in the stream

JOIN_TOKEN_CLAIMS = {"sha256": None, "sub": "@x:y:DEV", "video": {"roomJoin": True, "room": "x"}}


def hook(job, name="participant_left", reason="CLIENT_INITIATED", **more):
    return json.dumps(event(name, job.alias, job.identity, "PA_1", reason, **more))


def signed(body, **claims):
    return {"token": webhook_token(body, **claims), "body": body}


GARBAGE = {  # of the body that would end the job: the entry
    "unsigned": lambda b: {"token": webhook_token(b).rpartition(".")[0] + ".", "body": b},
    "alg none": lambda b: {"token": "eyJhbGciOiJub25lIn0." + webhook_token(b).split(".")[1] + ".", "body": b},
    "no token": lambda b: {"body": b}, "empty token": lambda b: {"token": "", "body": b},
    "token of text": lambda b: {"token": "x", "body": b},
    "wrong secret": lambda b: signed(b, secret="another-secret-0123456789-0123456789"),
    "wrong key": lambda b: signed(b, key="other"),
    "expired": lambda b: signed(b, exp=int(time.time()) - 120),
    "not yet": lambda b: signed(b, nbf=int(time.time()) + 600),
    "join token": lambda b: signed(b, **JOIN_TOKEN_CLAIMS), "another body": lambda b: {"token": webhook_token("{}"),
    "body": b},
    "no body": lambda b: {"token": webhook_token(b)}, "empty body": lambda b: {"token": webhook_token(b), "body": ""},
    "swapped": lambda b: {"token": b, "body": webhook_token(b)}, "not JSON": lambda b: signed(b + "x"),
    "300 KB": lambda b: signed(b[:-1] + ',"x":"' + "y" * 300_000 + '"}'),
    "3 MB": lambda b: signed(b[:-1] + ',"x":"' + "y" * 3_000_000 + '"}'),
    "token of 300 KB": lambda b: {"token": "x" * 300_000, "body": b},
    "other names": lambda b: {"Token": webhook_token(b), "Body": b},
    "one name": lambda b: {"x": "y"}, "empty names": lambda b: {"": ""}, "bytes": lambda b: {b"\xff\0": b"\r\n$5\r\n"},
    "500 names": lambda b: {str(n): "x" for n in range(500)},
    "invalid UTF-8": lambda b: {"token": webhook_token(b.encode() + b"\xff"), "body": b.encode() + b"\xff"},
}


@scene
def garbage_in_the_stream():
    """Others may write there as well: no effect, and one line for each. What is signed counts, whoever put it there."""
    with play(3) as w, Healthy(w):
        job, other = w.job().connected(), w.job().connected()
        looked = len(job.looked())
        for make in GARBAGE.values():
            w.store.db.xadd(STREAM, make(hook(job)))
        # One that a replica of ours would have written: all before it was read.
        other.absent()
        w.store.db.xadd(STREAM, signed(hook(other)))
        other.sent()
        job.never_sent()
        assert len(job.looked()) == looked and not job.lines("JOB_LEAVING")
        bad = w.counted("WEBHOOK_BAD") + w.counted("REDIS_ENTRY_BAD")
        assert bad == len(GARBAGE), (bad, len(GARBAGE), w.svc.log_text())
        drained(w, job)


@scene
def replayed_from_the_stream():
    """A leave from before the join, again: its event id was seen."""
    with play(2) as w:
        job = w.job().delegate()
        job.wait_looked(1)
        body = hook(job)
        w.webhook(body)
        job.joined().restarted()
        for _ in range(5):
            w.store.db.xadd(STREAM, signed(body))
        w.webhook(body)
        w.log.wait("WEBHOOK_DUPLICATE", "WEBHOOK_DUPLICATE", 6)
        job.never_sent()
        drained(w, job)


@scene
def notices_of_others():
    """A record and its notice, as another replica leaves them; poisoned ones beside."""
    with play(4) as w, Healthy(w):
        good, good2 = w.job().present(), w.job(path="/sfu/get")
        poison = w.job(delay_id="syd_p2")
        key, text = field(poison.alias, poison.identity), value(poison)
        bad = [{"job": key, "record": POISON[n](text)} for n in
               ("empty", "text", "DelayTimeout 7.2e12", "no DelayId", "another room", "delay id '../send'",
               "server 'restricted.test'",
                "invalid UTF-8", "5 KB", "2 MB", "RestartedAt x", "twice")]
        bad += [{"job": key}, {"record": text}, {"job": "", "record": text}, {"job": "x" * 100_000, "record": text},
                {"job": key.encode() + b"\xff", "record": text}]
        for entry in bad:
            w.store.db.xadd(STREAM, entry)
        for job in (good, good2):
            w.store.db.xadd(STREAM, {"job": field(job.alias, job.identity), "record": w.put(job)})
        good.restarted()
        good2.wait_looked(1)
        good2.joined().restarted()
        assert w.counted("REDIS_ENTRY_BAD") + w.counted("WEBHOOK_BAD") == len(bad), w.svc.log_text()
        assert not poison.calls() and not poison.looked() and w.leaves() == 2
        drained(w, good, good2)


# ---- the scenes

@pytest.mark.parametrize("title", SCENES)
def test_scene(played, title):
    played[title].result(timeout=4 * LONG)
