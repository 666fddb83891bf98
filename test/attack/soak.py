"""Mixed real load for SOAK_S seconds while peers are killed, stalled and cut
at random: every client gets an answer, nobody who is connected gets a leave,
memory and descriptors stay, and in the end every pool is empty.

LKJWT_SEED repeats the faults of a run. The last line counts the checks."""
import contextlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
os.environ.setdefault("LKJWT_CANARY_DIR", str(TOP / "build/canary-soak"))
sys.path[:0] = [str(TOP / "test" / "blackbox"), str(Path(__file__).parent)]

import dnslib  # noqa: E402
from dnslib import QTYPE, RR  # noqa: E402

import service  # noqa: E402
from leave import (DELEGATE, WEBHOOK, World, event,  # noqa: E402
                   webhook_token)
from outbound import (PUB, by_token, claims_of, pki, pub,  # noqa: E402
                      token_for)
from peers import (SUB_PATH, Dns, Homeserver, Reply, tls_context,  # noqa: E402
                   wait_for)
from service import Service, base_env, find_leaks  # noqa: E402
from store import RedisServer  # noqa: E402
from tap import Tap, at_rest, bugs, descriptors  # noqa: E402

SECONDS = int(os.environ.get("SOAK_S", 120))
SEED = int(os.environ.get("LKJWT_SEED") or random.randrange(10 ** 9))
DELAY = 300_000         # ms, of a delayed event: longer than any fault
MOODS = [               # of a homeserver that fails as servers do
    Reply(500, "x"), Reply(401, {"errcode": "M_UNKNOWN_TOKEN"}),
    Reply(429, {"errcode": "M_LIMIT_EXCEEDED"}), Reply(200, b"<html>"),
    Reply(200, {"sub": "@eve:elsewhere.test"}), Reply(raw=b"", hang=True),
    Reply(raw=b"", reset=True), Reply(raw=b"\0" * 99, close=True),
    Reply(200, {"sub": "@a:b"}, step=1, pause=0.3), Reply(302, "", [
        ("Location", "https://127.0.0.1/")])]


class ToFile(Service):
    """Its log goes to a file; only the tail stays in memory."""

    def _pump(self, pipe, name):
        service.CANARY_DIR.mkdir(parents=True, exist_ok=True)
        with open(service.CANARY_DIR / f"soak{name}", "ab") as f:
            while data := os.read(pipe.fileno(), 65536):
                f.write(data)
                f.flush()
                with self._lock:
                    setattr(self, name, (getattr(self, name) + data)[-65536:])
                    self._lock.notify_all()


class Scene(World):
    """Four homeservers, two of them with full access, each found in another
    way; delayed events, SFU and Redis by TLS; a tap before every peer."""

    def __init__(self):
        pub(*range(60, 64))
        self.cert = pki().leaf(["*.soak.test"], ["127.0.0.1", PUB % 62])
        self.ways = [Homeserver((PUB % 60, 8448), self.cert, by_token),
                     Homeserver((PUB % 61, 8448), self.cert, by_token),
                     Homeserver((PUB % 62, 8448), self.cert, by_token),
                     Homeserver((PUB % 63, 8448), self.cert, by_token,
                                well_known="d.soak.test:8449")]
        self.taps = {f"homeserver {n}": Tap(hs.addrs[0], PUB % (60 + n), port)
                     for n, (hs, port) in enumerate(zip(
                         self.ways, (8449, 8450, 8450, 8449)))}
        self.front = Homeserver((PUB % 63, 443), self.cert,
                                well_known="d.soak.test:8449")
        # b has no port and no well-known: step 4 finds it at 8448.
        self.servers = ["a.soak.test:8449", "b.soak.test", PUB % 62 + ":8450",
                        "d.soak.test"]
        self.full = self.servers[:2]
        self.dns, self.silent = Dns(), False
        self.dns.any_hook = self._answer
        self.redis = RedisServer(append=True, tls=pki().leaf(
            ips=["127.0.0.1"]))
        self.taps["Redis"] = Tap(("127.0.0.1", self.redis.tls_port))
        super().__init__(4, LIVEKIT_REDIS_URL=(
            f"rediss://127.0.0.1:{self.taps['Redis'].port}"),
            LKJWT_RESOLVER=self.dns.netloc, LIVEKIT_LOG_LEVEL="info",
            LKJWT_CA_FILE=pki().ca_file, LKJWT_CA_ONLY="true")
        local = pki().leaf(ips=["127.0.0.1"])
        for name, peer in (("SFU", self.sfu), ("delayed events", self.api)):
            peer.ctx = tls_context(local)
            self.taps[name] = Tap(("127.0.0.1", peer.port))
        self.env["LKJWT_LIVEKIT_API_URL"] = (
            f"https://127.0.0.1:{self.taps['SFU'].port}")
        self.env["LIVEKIT_CS_API_URL_OVERRIDES"] = ",".join(
            f"{n}=https://127.0.0.1:{self.taps['delayed events'].port}/h{i}"
            for i, n in enumerate(self.names))
        self.env["LIVEKIT_FULL_ACCESS_HOMESERVERS"] += "," + ",".join(
            self.full)
        # Rates and breakers as a release has them.
        self.env |= dict.fromkeys(("LKJWT_RATE_USER", "LKJWT_RATE_SERVER",
                                   "LKJWT_BREAKER_FAILURES"))
        self.svc = ToFile(base_env(**self.env))

    def _answer(self, data, rec, transport):
        if self.silent:
            return None if self.silent == "silent" else self.dns.reply(rec, 2)
        r = rec.reply()
        host = str(rec.q.qname).partition(".")[0]
        if rec.q.qtype == QTYPE.A and host in "abcd":
            r.add_answer(RR(rec.q.qname, QTYPE.A, ttl=5, rdata=dnslib.A(
                PUB % (60 + "abcd".index(host)))))
        return r

    def forget(self):
        """What the stand-ins remember would grow with the time."""
        wrong = []
        for peer in (*self.ways, self.front, self.hs, self.sfu, self.api):
            wrong += peer.errors
            peer.forget()
        self.dns.forget()
        with self.sfu.lock:
            self.sfu.looked.clear()
        with self.api.lock:
            self.api.calls.clear()
        assert not wrong, wrong

    def stop(self):
        for peer in (*self.taps.values(), *self.ways, self.front, self.dns,
                     self.redis):
            peer.stop()


# ---- load

class Load:
    """Threads that go on until .over; what they saw is in .seen, and what
    must not be in .wrong."""

    def __init__(self, scene):
        self.scene, self.svc = scene, scene.svc
        self.over, self.seen, self.wrong = threading.Event(), Counter(), []
        self.lock, self.calm = threading.Lock(), True
        self.left = {}          # jobs whose leave is awaited
        self.threads = []

    def count(self, what, n=1):
        with self.lock:
            self.seen[what] += n

    def blame(self, what):
        with self.lock:
            self.wrong.append(f"{time.monotonic() - self.began:.0f} s: {what}")

    def start(self):
        self.began = time.monotonic()
        tasks = [self.exchanges] * 4 + [self.people] * 6 + [
            self.one_connection, self.webhooks, self.health, self.metrics,
            self.garbage, self.garbage]
        for n, task in enumerate(tasks):
            t = threading.Thread(target=self._run, daemon=True, args=(
                task, random.Random(SEED * 100 + n)))
            t.start()
            self.threads.append(t)

    def _run(self, task, rng):
        while not self.over.is_set():
            try:
                task(rng)
            except Exception as e:
                self.blame(f"{task.__name__}: {e!r}")
                self.over.wait(1)

    def stop(self):
        self.over.set()
        for t in self.threads:
            t.join(120)
            if t.is_alive():
                self.blame("a client hangs")

    def body(self, rng, path, server, user):
        openid = {"access_token": token_for(server, user),
                  "matrix_server_name": server, "token_type": "Bearer",
                  "expires_in": 3600}
        room = f"!r{rng.randrange(50)}:soak.test"
        if path == "/sfu/get":
            body = {"room": room, "openid_token": openid, "device_id": "D"}
        else:
            body = {"room_id": room, "slot_id": "m.call#ROOM", "member": {
                "id": "m", "claimed_user_id": f"@{user}:{server}",
                "claimed_device_id": "D"}, "openid_token": openid}
        return json.dumps(body)

    def exchanges(self, rng):
        """Each gets an answer of the table in the README, and a token only
        for the user that the homeserver named."""
        path = rng.choice(("/get_token", "/sfu/get"))
        server = rng.choice(self.scene.servers)
        user = f"u{rng.randrange(10 ** 6)}"
        body = self.body(rng, path, server, user)
        if rng.random() < 0.1:
            body += " " * rng.choice((3000, 60000))
        reply = self.svc.post(path, body, timeout=60)
        self.count(f"exchange {reply.status}")
        if reply.status == 200 and path == "/sfu/get":
            sub = json.loads(claims_of(reply.json["jwt"])[1])["sub"]
            if sub != f"@{user}:{server}:D":
                self.blame(f"{sub} is not {user} of {server}")
        elif reply.status not in (200, 401, 429, 500):
            self.blame(f"{path}: {reply}")
        self.over.wait(rng.random() / 20)

    def one_connection(self, rng):
        """Many on one connection, some of them sent before the answer."""
        with self.svc.wire(60) as w:
            for _ in range(rng.randrange(1, 30)):
                data = b""
                for _ in range(rng.randrange(1, 4)):
                    body = self.body(rng, "/sfu/get", rng.choice(
                        self.scene.servers), f"k{rng.randrange(200)}").encode()
                    data += (b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-"
                             b"Length: %d\r\n\r\n" % len(body) + body)
                w.send(data)
                for _ in range(data.count(b"POST ")):
                    reply = w.reply("POST", 60)
                    self.count(f"kept {reply.status}")
                    if reply.status not in (200, 401, 429, 500):
                        self.blame(reply)
                self.over.wait(rng.random() / 4)

    def hook(self, body):
        """As the SFU does: again until it is taken."""
        data = json.dumps(body)
        for _ in range(60):
            reply = self.svc.request("POST", WEBHOOK, data, [
                ("Authorization", webhook_token(data))], timeout=60)
            self.count(f"webhook {reply.status}")
            if reply.status == 200:
                return
            if reply.status != 503:
                self.blame(f"webhook: {reply}")
            time.sleep(0.5)
        self.blame("a webhook was not taken in 30 s")

    def people(self, rng):
        """One participant: delegated, joined, perhaps away for a moment,
        gone. Nobody who is there has a leave sent."""
        job = self.scene.job(
            path=rng.choice((DELEGATE, "/get_token", "/sfu/get")), T=DELAY,
            server=rng.choice(self.scene.names))
        reply = job.ask(timeout=60)
        self.count(f"delegation {reply.status}")
        if reply.status != 200:
            if reply.status not in (401, 429, 500):
                self.blame(f"{job.path}: {reply}")
            return
        tell = lambda name, **more: self.hook(event(  # noqa: E731
            name, job.alias, job.identity, "PA_1", **more))
        job.present()
        tell("participant_joined")
        for _ in range(rng.randrange(3)):
            self.over.wait(rng.uniform(0, 4))
            tell("participant_left", reason="SIGNAL_CLOSE")
            tell("participant_joined")
        self.over.wait(rng.uniform(0, 8))
        if job.calls("send"):
            self.blame(f"{job.delay_id} is connected, and was sent")
        job.absent()
        with self.lock:
            self.left[job.delay_id] = job
        tell("participant_left", reason="CLIENT_INITIATED")

    def take_stock(self):
        """Jobs whose leave was sent are done."""
        with self.lock:
            jobs = list(self.left.values())
        for job in jobs:
            if job.calls("send"):
                with self.scene.api.lock:
                    del self.scene.api.by_id[job.delay_id]
                with self.scene.sfu.lock:
                    self.scene.sfu.presence.pop((job.alias, job.identity))
                with self.lock:
                    del self.left[job.delay_id]
                self.count("leave sent")

    def webhooks(self, rng):
        """Of rooms nobody delegated in, and of a wrong signature."""
        data = json.dumps(event(rng.choice((
            "room_started", "track_published", "participant_joined",
            "participant_left")), "nobody's", "nobody") | (
            {"x": "y" * 20000} if rng.random() < 0.1 else {}))
        token = webhook_token(data)
        if rng.random() < 0.3:
            token = token[:-4] + "AAAA"
        reply = self.svc.request("POST", WEBHOOK, data, [
            ("Authorization", token)], timeout=60)
        self.count(f"webhook {reply.status}")
        if reply.status not in (200, 503) or reply.body:
            self.blame(f"webhook: {reply}")
        self.over.wait(rng.random() / 5)

    def health(self, rng):
        began = time.monotonic()
        reply = self.svc.request("GET", "/healthz", timeout=10)
        self.count(f"healthz {reply.status}")
        if reply.status != 200:
            self.blame(f"/healthz: {reply}")
        self.slowest = max(getattr(self, "slowest", 0),
                           time.monotonic() - began)
        self.over.wait(0.1)

    def metrics(self, rng):
        m = self.svc.metrics()
        self.count("scrape")
        found = {k: v for k, v in m.items() if '"BUG' in k and v}
        if found:
            self.blame(found)
        self.over.wait(1)

    def garbage(self, rng):
        """Whatever is answered to it, nobody else notices."""
        path = rng.choice((b"/get_token", b"/sfu/get", DELEGATE.encode(),
                           WEBHOOK.encode(), b"/x"))
        head = b"POST " + path + b" HTTP/1.1\r\nHost: h\r\n"
        data = rng.choice((
            rng.randbytes(rng.randrange(3000)), head, head[:9], b"\r\n" * 9,
            head + b"Content-Length: 999999999\r\n\r\n" + b"x" * 9999,
            head + b"Content-Length: 20\r\n\r\n{", b"GET /" + b"x" * 9000,
            head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n[[[[",
            head + b"Content-Length: 4000\r\n\r\n" + b"[" * 4000,
            head + b"Content-Length: 60000\r\n\r\n" + b"x" * 30000,
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9,
            head + b"X: y\r\n" * 99 + b"\r\n"))
        with contextlib.suppress(OSError), self.svc.wire(60) as w:
            w.send(data)
            if rng.random() < 0.3:
                self.over.wait(rng.random())
            if rng.random() < 0.5:
                w.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                  b"\1\0\0\0\0\0\0\0")
            elif rng.random() < 0.3:
                w.sock.shutdown(socket.SHUT_WR)
                w.drain(60)
        self.count("garbage")
        self.over.wait(rng.random() / 20)

    def crowd(self):
        """More at once than at any other time: what pools there are to
        touch is touched before memory is measured."""
        wires, rng = [], random.Random(SEED)
        for n in range(400):
            body = self.body(rng, "/sfu/get", rng.choice(
                self.scene.servers), f"c{n}").encode()
            body += b" " * (60000 if n % 5 == 0 else 0)
            w = self.svc.wire(60)
            w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d"
                   b"\r\n\r\n" % len(body) + body)
            wires.append(w)
        for w in wires:
            status = w.reply("POST", 60).status
            self.count(f"crowd {status}")
            if status not in (200, 401, 429, 500):
                self.blame(f"crowd: {status}")
            w.close()


# ---- faults

class Faults:
    """One at a time, for some tenths of a second up to some seconds."""

    def __init__(self, scene, load):
        self.scene, self.load = scene, load
        self.rng, self.done = random.Random(SEED), Counter()

    def tap(self):
        """A peer's connections, old and new."""
        name = self.rng.choice(sorted(self.scene.taps))
        how = self.rng.choice(("end", "reset", "hold", "drip"))
        left = self.rng.choice((0, 1, 5, 99, self.rng.randrange(3000)))
        tap = self.scene.taps[name]
        tap.plan = lambda number: (left, how)
        if self.rng.random() < 0.7:
            tap.harm(left, how)
        self.wait(6)
        tap.plan = None
        tap.harm(0, "reset")
        return f"{name}: {how}"

    def mood(self):
        hs = self.rng.choice(self.scene.ways)
        hs.on(SUB_PATH, self.rng.choice(MOODS))
        self.wait(4)
        hs.off()
        return "homeserver: nonsense"

    def gone(self):
        """As a server that is restarted."""
        peer = self.rng.choice([*self.scene.ways, self.scene.sfu,
                                self.scene.api, self.scene.hs])
        peer.close_each = self.rng.random() < 0.5
        peer.drop_connections()
        self.wait(2)
        peer.close_each = False
        return "connections dropped"

    def sfu(self):
        self.scene.sfu.fail = self.rng.choice((
            Reply(503, "x"), Reply(raw=b"", hang=True), Reply(raw=b"\r\r"),
            Reply(401, "no"), Reply(200, b"\xff" * 9)))
        self.wait(5)
        self.scene.sfu.fail = None
        return "SFU: nonsense"

    def events(self):
        reply = self.rng.choice((Reply(503, "x"), Reply(raw=b"", hang=True),
                                 Reply(429, {"errcode": "M_LIMIT_EXCEEDED"})))
        self.scene.api.every = lambda call: reply
        self.wait(5)
        self.scene.api.every = None
        return "delayed events: refused"

    def names(self):
        self.scene.silent = self.rng.choice(("silent", "servfail"))
        self.wait(8)
        self.scene.silent = False
        return "DNS: " + "away"

    def redis_sleeps(self):
        self.scene.redis.pause()
        self.wait(6)
        self.scene.redis.resume()
        return "Redis: paused"

    def redis_dies(self):
        self.scene.redis.kill()
        self.wait(4)
        self.scene.redis.start()
        return "Redis: killed"

    def reload(self):
        self.scene.svc.signal(signal.SIGHUP)
        self.wait(1)
        return "SIGHUP"

    def peace(self):
        self.wait(4)
        return "none"

    def wait(self, most):
        time.sleep(self.rng.uniform(0.2, most))

    def run(self, until):
        every = [self.tap] * 6 + [self.mood, self.gone, self.sfu, self.events,
                                  self.names, self.redis_sleeps,
                                  self.redis_dies, self.reload, self.peace]
        while time.monotonic() < until:
            self.done[self.rng.choice(every)()] += 1
            self.load.take_stock()
            self.scene.forget()


# ---- figures

def memory_kb(svc):
    """Resident, and of it what is not of the binary's file."""
    page = os.sysconf("SC_PAGE_SIZE") // 1024
    with open(f"/proc/{svc.pid}/statm") as f:
        fields = [int(x) * page for x in f.read().split()]
    return fields[1], fields[1] - fields[2]


def cpu_s(svc):
    with open(f"/proc/{svc.pid}/schedstat") as f:
        return int(f.read().split()[0]) / 1e9


class Sampler(threading.Thread):
    """(seconds, resident KB, private KB, descriptors), every second."""

    def __init__(self, svc):
        super().__init__(daemon=True)
        self.svc, self.rows, self.over = svc, [], threading.Event()

    def run(self):
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while not self.over.wait(1):
                self.rows.append((time.monotonic() - began,
                                  *memory_kb(self.svc),
                                  descriptors(self.svc)))

    def most(self, column, first, last):
        """The largest of the part of the run from first to last (0 to 1)."""
        n = len(self.rows)
        return max(r[column] for r in self.rows[int(first * n):
                                                max(1, int(last * n))])


class Checks:
    def __init__(self):
        self.passed = self.failed = 0

    def __call__(self, what, good, tell=""):
        self.passed += bool(good)
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {what}"
              + ("" if good else f": {tell}"), flush=True)


def patiently(ask, seconds):
    """True if ask() became true."""
    try:
        return wait_for("it", ask, seconds)
    except TimeoutError:
        return False


def play(scene, check):
    svc, load = scene.svc, Load(scene)
    base, start_kb = descriptors(svc), memory_kb(svc)[0]
    load.start()
    load.crowd()
    sampler, faults = Sampler(svc), Faults(scene, load)
    sampler.start()
    faults.run(time.monotonic() + SECONDS)
    load.stop()
    sampler.over.set()
    sampler.join()

    def all_left():
        load.take_stock()
        return not load.left
    sent = patiently(all_left, 240)
    check("every client got an answer of the documents, in time; nobody "
          "connected was sent away", not load.wrong, load.wrong[:5])
    check("everybody who left has a leave", sent, sorted(load.left))
    served = lambda s: svc.post("/sfu/get", load.body(  # noqa: E731
        random, "/sfu/get", s, "last")).status == 200
    check("afterwards every homeserver is served", all(
        patiently(lambda s=s: served(s), 100) for s in scene.servers))
    check("nothing waits to be written, no job is left", patiently(
        lambda: (svc.metrics()["lkjwt_redis_unsaved"],
                 svc.metrics()["lkjwt_delayed_leaves"],
                 svc.metrics()["lkjwt_redis_up"]) == (0, 0, 1), 60)
        and not scene.redis.jobs(), scene.redis.jobs())
    check("every pool is empty, every descriptor closed", patiently(
        lambda: at_rest(svc, base), 60),
        f"{descriptors(svc)} of {base} open\n{svc.metrics_text()}")
    check("no event of class bug", not bugs(svc), bugs(svc))
    before = cpu_s(svc)
    time.sleep(2)
    check("no busy loop at rest", cpu_s(svc) - before < 0.5)
    early, late = sampler.most(1, 0, 0.5), sampler.most(1, 0.75, 1)
    check("memory is flat: the last quarter needs at most 512 KB more than "
          "the first half", late <= early + 512, [r[1] for r in sampler.rows])
    check("memory stays below 48 MB", sampler.most(1, 0, 1) < 48 << 10)
    fds = [sampler.most(3, 0, 0.5), sampler.most(3, 0.75, 1)]
    m = svc.metrics()
    total, cpu = sum(load.seen.values()), cpu_s(svc)
    check("load and faults there were", all(
        load.seen[x] for x in ("exchange 200", "exchange 401", "kept 200",
                               "delegation 200", "leave sent", "webhook 200",
                               "scrape", "garbage", "healthz 200"))
        and sum(faults.done.values()) > SECONDS / 15)
    check("SIGTERM ends it with 0", svc.stop() == 0)
    check("no secret in its log", not find_leaks(), find_leaks()[:3])

    print(f"\nresident: {start_kb} KB at the start, at most {early} KB in the "
          f"first half, {late} KB in the last quarter, "
          f"{sampler.rows[-1][1]} KB at the end\n"
          f"descriptors: {base} at the start, at most {fds[0]} and {fds[1]}\n"
          f"/healthz at the slowest: {load.slowest:.2f} s; CPU: {cpu:.1f} s "
          f"for {total} actions of clients")
    for title, rows in (("clients", load.seen), ("faults", faults.done), (
            "events", {k[26:-2]: int(v) for k, v in m.items()
                       if k.startswith("lkjwt_events_total") and v})):
        print(f"{title}: " + ", ".join(
            f"{k} {v}" for k, v in sorted(rows.items())))


def main():
    print(f"soak of {SECONDS} s, LKJWT_SEED={SEED}", flush=True)
    with contextlib.suppress(OSError):
        for old in service.CANARY_DIR.iterdir():
            old.unlink()
    check, scene = Checks(), Scene()
    try:
        with scene:
            play(scene, check)
    except Exception as e:
        check("the run itself", False, repr(e))
    finally:
        scene.stop()
    print(f"{check.passed} passed, {check.failed} failed")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
