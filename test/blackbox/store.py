"""The store from outside: a real redis-server of one's own that can be paused, killed, restarted and emptied; a
scripted one, alone or in front of a real one; records as PROTOCOL.md 12 has them; and a World that keeps jobs there."""

import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
import urllib.parse

import redis

from exchange import canonical
from leave import LONG, Log, World
from peers import HANG, SCRATCH, Process, RawServer, wait_for, which
from service import Closed, Service, base_env, free_port

JOBS, STREAM, REPLICAS, LEASE = "lk-jwt:jobs", "lk-jwt:webhooks", "lk-jwt:replicas", "lk-jwt:lease:"
SINGLE = ("PING", "HSET", "HDEL", "HGETALL")


# ---- records

def stamp(ns):
    """A moment as we write it: up to 9 digits, trailing zeros trimmed."""
    moment = datetime.datetime.fromtimestamp(ns // 10**9, datetime.timezone.utc).replace(tzinfo=None).isoformat()
    return moment + f".{ns % 10**9:09d}".rstrip("0").rstrip(".") + "Z"


def moment(text):
    """Nanoseconds of what stamp() makes, and of nothing else."""
    m = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", text)
    assert m and not (m[2] or "1").endswith("0"), text
    seconds = datetime.datetime.fromisoformat(m[1] + "+00:00").timestamp()
    return int(seconds) * 10**9 + int((m[2] or "").ljust(9, "0"))


def field(alias, identity):
    return canonical([alias, identity])


def value(job, restarted_at=None, **more):
    """A job's record; more are further members of Params. restarted_at: text, or ns; default now."""
    if not isinstance(restarted_at, str):
        restarted_at = stamp(time.time_ns() if restarted_at is None else restarted_at)
    params = {"DelayId": job.delay_id, "DelayTimeout": job.T * 10**6, "ServerName": job.server,
              "LiveKitRoom": job.alias, "LiveKitIdentity": job.identity, **more}
    return json.dumps({"Params": params, "RestartedAt": restarted_at}, separators=(",", ":"), ensure_ascii=False)


# ---- the real one

class RedisServer:
    """redis-server on 127.0.0.1, [::1] and a Unix socket, with tls (a Cert) on .tls_port as well. users: ACL lines
    ("name on >password ..."). append: what it acknowledged survives kill(). .db is a client that may do everything."""

    def __init__(self, *, append=False, password=None, users=(), tls=None, port=None, **conf):
        self.dir = tempfile.mkdtemp(prefix="redis-", dir=SCRATCH)
        self.port, self.sock, self.password = port or free_port(), os.path.join(self.dir, "s"), password
        lines = {"port": self.port, "bind": "127.0.0.1 ::1", "unixsocket": self.sock, "unixsocketperm": "700",
                 "dir": self.dir, "save": '""', "appendonly": "yes" if append else "no", "appendfsync": "always",
                 "enable-debug-command": "yes", "protected-mode": "no", "daemonize": "no", **conf}
        if password:
            lines["requirepass"] = f'"{password}"'
        if tls:
            chain, key = tls.files()
            self.tls_port = free_port()
            lines |= {"tls-port": self.tls_port, "tls-cert-file": chain, "tls-key-file": key, "tls-auth-clients": "no"}
        with open(os.path.join(self.dir, "redis.conf"), "w") as f:
            f.write("".join(f"{k.replace('_', '-')} {v}\n" for k, v in lines.items())
                    + "".join(f"user {u}\n" for u in users))
        self.db = self.client()
        self.process = None
        self.start()

    def client(self, db=0, **kw):
        return redis.Redis(unix_socket_path=self.sock, db=db, password=self.password, protocol=2,
                           socket_timeout=HANG, decode_responses=True, encoding_errors="surrogateescape", **kw)

    def url(self, scheme="redis", user="", password=None, host="127.0.0.1", db="", query=""):
        password = self.password if password is None else password
        quote = lambda s: urllib.parse.quote(s, safe="")
        who = f"{quote(user)}:{quote(password)}@" if password else f"{quote(user)}@" if user else ""
        if scheme == "unix":
            return f"unix://{who}{self.sock}{query}"
        port = self.tls_port if scheme == "rediss" else self.port
        return f"{scheme}://{who}{host}:{port}{db}{query}"

    def start(self):
        self.process = Process([which("redis-server"), os.path.join(self.dir, "redis.conf")], self._up)
        return self

    def _up(self):
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):     # loading is the first of these
            return self.db.ping()

    def signal(self, number):
        self.process.proc.send_signal(number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.proc.wait(HANG)
        self.process.stop()
        with contextlib.suppress(OSError):
            os.unlink(self.sock)

    def stop(self):
        """Ends it, whatever state it is in; its files stay."""
        if self.process.proc.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()

    def restart(self):
        self.stop()
        self.start()

    def replace(self):
        """An empty one in its place."""
        self.stop()
        for name in os.listdir(self.dir):
            path = os.path.join(self.dir, name)
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif name.endswith((".rdb", ".aof")):
                os.unlink(path)
        assert not [n for n in os.listdir(self.dir) if n.endswith((".rdb", ".aof", "dir"))]
        self.start()

    def pause(self):
        self.signal(signal.SIGSTOP)

    def resume(self):
        self.signal(signal.SIGCONT)

    def clear(self):
        self.db.flushall()
        self.db.config_resetstat()

    def jobs(self):
        return self.db.hgetall(JOBS)

    def peers(self):
        """Connections other than the test's own."""
        return [c for c in self.db.client_list() if c["addr"].split(":")[0] != self.sock]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()
        self.process.stop()


# ---- the scripted one

class Command:
    """.conn (its number) .name .args .at; .answered just before the reply goes out"""

    def __init__(self, conn, parts):
        self.conn, self.name, self.args, self.at, self.answered = conn, parts[0].decode().upper(), parts[1:], \
            time.monotonic(), None

    def __repr__(self):
        return f"<{self.conn}: {self.name} {b' '.join(self.args)[:200]!r}>"


class Leave(Exception):
    """A twist closes the connection."""


def read_command(f):
    """One command, as an array of bulk strings and in no other form; None at the end."""
    head = f.readline()
    if not head:
        return None
    parts = []
    assert re.fullmatch(rb"\*[1-9]\d*\r\n", head), head
    for _ in range(int(head[1:])):
        size = f.readline()
        assert re.fullmatch(rb"\$(0|[1-9]\d*)\r\n", size), size
        data = f.read(int(size[1:]) + 2)
        assert data.endswith(b"\r\n") and len(data) == int(size[1:]) + 2, data
        parts.append(data[:-2])
    return parts


def read_reply(f):
    """The bytes of one reply."""
    head = f.readline()
    if not head.endswith(b"\r\n"):
        raise ConnectionError("the server closed")
    size = int(head[1:]) if head[:1] in b"$*" else -1
    if head[:1] == b"$" and size >= 0:
        return head + f.read(size + 2)
    if head[:1] == b"*":
        return head + b"".join(read_reply(f) for _ in range(size))
    return head


def bulk(data):
    return b"$%d\r\n%s\r\n" % (len(data), data)


def array(parts):
    return b"*%d\r\n%s" % (len(parts), b"".join(parts))


class FakeRedis(RawServer):
    """Without behind: knows the commands of know, nothing else. behind: a RedisServer that it asks. twist:
    function(Command) -> None, other bytes to answer with, or function(socket) that answers (raise Leave to close).
    .seen has every Command."""

    def __init__(self, behind=None, know=SINGLE, user=None, password=None, port=0):
        self.behind, self.know, self.twist = behind, set(know), None
        self.user, self.password = user, password
        self.hash, self.seen, self.errors, self.lock = {}, [], [], threading.Lock()
        self.stopping = threading.Event()
        super().__init__(self._talk, port=port)

    def url(self, who="", tail=""):
        return f"redis://{who}127.0.0.1:{self.port}{tail}"

    def names(self):
        with self.lock:
            return [c.name for c in self.seen]

    def _talk(self, sock, number):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked, real, authed = sock.makefile("rb"), None, not self.password
        if self.behind:
            real = socket.create_connection(("127.0.0.1", self.behind.port), HANG)
            answers = real.makefile("rb")
        try:
            while True:
                try:
                    parts = read_command(asked)
                except AssertionError as e:
                    self.errors.append(e)
                    return
                if parts is None:
                    return
                command = Command(number, parts)
                with self.lock:
                    self.seen.append(command)
                twist = self.twist and self.twist(command)
                # What is answered otherwise is not done, unless the twist asks for it itself.
                if callable(twist):
                    twist(sock)
                    reply = b""
                elif twist is not None:
                    reply = twist
                elif real:
                    real.sendall(array([bulk(p) for p in parts]))
                    reply = read_reply(answers)
                else:
                    reply, authed = self._answer(command, authed)
                command.answered = time.monotonic()
                sock.sendall(reply)
        except (Leave, OSError):
            pass
        except Exception as e:          # a fault of the test itself
            self.errors.append(e)
            raise
        finally:
            if real:
                real.close()
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _answer(self, c, authed):
        if c.name not in self.know and not (c.name == "AUTH" and self.password):
            shown = " ".join(f"'{a.decode(errors='replace')[:20]}'" for a in c.args[:2])
            return b"-ERR unknown command '%s', with args beginning with: %s\r\n" % (c.name.encode(), shown.encode()), authed
        if c.name == "AUTH":
            right = [a.decode() for a in c.args] == [*([self.user] if self.user else []), self.password]
            if right:
                return b"+OK\r\n", True
            return b"-WRONGPASS invalid username-password pair or user is disabled.\r\n", authed
        if not authed:
            return b"-NOAUTH Authentication required.\r\n", authed
        with self.lock:
            if c.name == "HSET":
                pairs = dict(zip(c.args[1::2], c.args[2::2], strict=True))
                new = len(pairs.keys() - self.hash.keys())
                self.hash.update(pairs)
                return b":%d\r\n" % new, authed
            if c.name == "HDEL":
                return b":%d\r\n" % sum(self.hash.pop(f, None) is not None for f in c.args[1:]), authed
            if c.name == "HGETALL":
                return array([bulk(x) for pair in self.hash.items() for x in pair]), authed
        return (b"+PONG\r\n" if c.name == "PING" else b"+OK\r\n"), authed

    def jobs(self):
        with self.lock:
            return {k.decode(): v.decode() for k, v in self.hash.items()}

    def drop(self):
        """Every connection ends."""
        for sock in list(self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def stop(self):
        self.stopping.set()
        super().stop()
        assert not self.errors, self.errors

    # -- twists
    def stall(self, sock):
        """Nothing comes, and the connection stays."""
        self.stopping.wait(LONG)
        raise Leave

    @staticmethod
    def close(sock):
        raise Leave

    @staticmethod
    def reset(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        raise Leave

    @staticmethod
    def cut(data):
        """These bytes, then the end."""
        def send(sock):
            sock.sendall(data)
            raise Leave
        return send

    def slowly(self, data, pause=1.0):
        """One byte at a time."""
        def send(sock):
            for i in range(len(data)):
                sock.sendall(data[i:i + 1])
                if self.stopping.wait(pause):
                    raise Leave
        return send

    def endless(self, piece):
        """The piece again and again, until the other end has enough."""
        def send(sock):
            sock.settimeout(1)
            sent = 0
            while not self.stopping.is_set() and sent < 64 << 20:
                with contextlib.suppress(TimeoutError):
                    sent += sock.send(piece)
            raise Leave
        return send


# ---- the scene

class StoreWorld(World):
    """A World whose jobs are in store (RedisServer or FakeRedis). Its service can die and come back."""

    def __init__(self, store, count=1, names=(), **env):
        super().__init__(count, **{"LIVEKIT_REDIS_URL": store.url(), **env})
        self.store = store
        for name in names:
            self.env["LIVEKIT_FULL_ACCESS_HOMESERVERS"] += f",{name}"
            self.env["LKJWT_FEDERATION_API_URL_OVERRIDES"] += f",{name}={self.hs.url}"
            self.env["LIVEKIT_CS_API_URL_OVERRIDES"] += f",{name}={self.api.url}"
        self.svc = Service(base_env(**self.env))
        self.log = Log(self.svc)

    def serve(self, **env):
        """A further service, after the one before has ended."""
        self.svc = Service(base_env(**{**self.env, **env}))
        self.log = Log(self.svc)
        self.svc.start()
        return self

    def kill(self):
        self.svc.signal(signal.SIGKILL)
        self.svc.wait()
        self.svc.stop()

    def end(self):
        """SIGTERM, obeyed."""
        assert self.svc.stop() == 0, self.svc.log_text()

    def again(self, kill=False, **env):
        self.kill() if kill else self.end()
        return self.serve(**env)

    # -- what is stored
    def put(self, job, restarted_at=None, at=None, **more):
        """A record of the test's own making; more are members of Params."""
        text = value(job, restarted_at, **more)
        self.store.db.hset(JOBS, at or field(job.alias, job.identity), text)
        job.began = time.monotonic()
        return text

    def raw(self, job):
        return self.store.jobs().get(field(job.alias, job.identity))

    def record(self, job):
        """What is stored of the job: checked in every byte, but for when it was restarted, which is the result (ns);
        None without a record. Members that are there only at times: self.extra(job)."""
        text = self.raw(job)
        if text is None:
            return None
        at = json.loads(text)["RestartedAt"]
        ns = moment(at)
        assert text == value(job, at, **self.extra(job, text)), text
        return ns

    @staticmethod
    def extra(job, text):
        """The further members of this record, in their one order and with their one type."""
        params = json.loads(text)["Params"]
        out = {k: params[k] for k in ("LiveKitIdentity2", "Connected", "Sid", "DelegatedAt") if k in params}
        assert out.get("LiveKitIdentity2", job.legacy) == job.legacy and out.get("Connected", True) is True, text
        assert isinstance(out.get("Sid", "x"), str) and out.get("Sid", "x"), text
        if "DelegatedAt" in out:        # left out while it is the same
            assert moment(out["DelegatedAt"]) < moment(json.loads(text)["RestartedAt"]), text
        return out

    def stored(self, job, **members):
        """Wait until the record is there and says so (Connected=True, Sid=...; None: not there)."""
        def ask():
            text = self.raw(job)
            if text is not None:
                extra = self.extra(job, text)
                return all(extra.get(k) == v for k, v in members.items()) and text
        wait_for(f"the record of {job.alias} with {members}: {self.store.jobs()}", ask, LONG)
        return self.record(job)

    def erased(self, *jobs):
        fields = {field(j.alias, j.identity) for j in jobs}
        wait_for(f"no record of {fields}: {self.store.jobs()}", lambda: not fields & self.store.jobs().keys(), LONG)

    # -- what the service says
    def mode(self):
        return self.event("REDIS_UP")["mode"]

    def metric(self, name):
        return self.svc.metrics()[f"lkjwt_{name}"]

    def wait_metric(self, name, want):
        wait_for(f"{name} {want}", lambda: self.metric(name) == want, LONG)

    def event(self, name, count=1, **match):
        return self.svc.wait_event(name, count, LONG, **match)

    def count(self, name):
        self.settle()
        return len([e for e in self.log.all() if e["event"] == name])


class Healthy:
    """with Healthy(world): /healthz answers 200 all the time, each within the deadline of what hangs (5 s)."""

    def __init__(self, world, deadline=5.0):
        self.world, self.deadline, self.asked, self.failed = world, deadline, 0, []
        self.over = threading.Event()

    def _run(self):
        self._ask()
        while not self.over.wait(0.1):
            self._ask()

    def _ask(self):
        try:
            status = self.world.svc.request("GET", "/healthz", timeout=self.deadline).status
        except (OSError, Closed) as e:
            status = repr(e)
        self.asked += 1
        if status != 200:
            self.failed.append(status)

    def __enter__(self):
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, *_):
        self.over.set()
        self.thread.join(HANG)
        if kind is None:
            assert self.asked and not self.failed, (self.asked, self.failed)
