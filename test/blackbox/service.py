"""The binary under test, from outside: start, ask, read its log, stop.

Every Service and every run_cli() leaves what the binary wrote (stderr,
stdout, metrics, refusals) in the canary folder; the canary test, which runs
last, searches all of it for the secrets below.
"""
import base64
import errno
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import h11

ROOT = Path(__file__).resolve().parents[2]
BIN = str(Path(os.environ.get("LKJWT_BIN", ROOT / "lkjwt")).resolve())
CANARY_DIR = Path(os.environ.get("LKJWT_CANARY_DIR", ROOT / "build" / "canary")).resolve()

# Characters that percent-encoding and base64 change, so that each form of a
# leak has a text of its own to search for.
CANARY_KEY = "canarykey"
CANARY_SECRET = "canary-secret-Zq7+Wv9/Kd3~Xt5.Pm8_Hn2"
CANARY_TOKEN = "canary_token+R4/uY6~sB1=Lg0"
CANARY_TOKEN_2 = "canary_token_2+N8/eC5~tD3=Jf7"
CANARY_TOKENS = (CANARY_TOKEN, CANARY_TOKEN_2)
CANARY_PASSWORD = "canary-password-Vb6~Gk4.Sx9"

DEADLINE = 20.0   # for anything that answers at once on an idle machine
_ports = itertools.count(20000 + os.getpid() % 7919)


def free_port():
    """A port below the ephemeral range, so no outgoing call can take it."""
    while True:
        port = 20000 + (next(_ports) - 20000) % 12000
        try:
            for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
                with socket.socket(family) as s:
                    # A child that is between fork and exec keeps a copy bound.
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    s.bind((host, port))
            return port
        except OSError:
            continue


def base_env(**overrides):
    """The least that serves. A value of None takes the variable out."""
    env = {
        "LIVEKIT_URL": "wss://sfu.example.org",
        "LIVEKIT_KEY": CANARY_KEY,
        "LIVEKIT_SECRET": CANARY_SECRET,
        "LIVEKIT_FULL_ACCESS_HOMESERVERS": "full.example.org",
        "LKJWT_UID": "0",       # suites run as root, and their files are root's own
        # One user and one server ask for all; test_overload.py has the limits on.
        "LKJWT_RATE_USER": "off", "LKJWT_RATE_SERVER": "off", "LKJWT_BREAKER_FAILURES": "0",
    }
    env.update(overrides)
    return {k: str(v) for k, v in env.items() if v is not None}


def popen(args, **more):
    """subprocess.Popen, again where execve fails with EFAULT: seen once, of a file that was there, on a virtual
    machine whose memory is paged in as it is touched."""
    for tries in range(3):
        try:
            return subprocess.Popen(args, **more)
        except OSError as e:
            if e.errno != errno.EFAULT or tries == 2:
                raise
            time.sleep(0.2)


# ---- log lines

_WORD = re.compile(r'([A-Za-z_][A-Za-z0-9_.]*)=("(?:[^"\\\x00-\x1f\x7f]|\\.)*"|[^\s"=\\]+)(?: |$)')
_ESCAPE = re.compile(r'\\(?:x([0-9a-f]{2})|(["\\nrt]))', re.I)
_PLAIN = {'"': '"', "\\": "\\", "n": "\n", "r": "\r", "t": "\t"}


def _unescape(quoted):
    body, out, at = quoted[1:-1], [], 0
    for m in _ESCAPE.finditer(body):
        if "\\" in body[at:m.start()]:
            raise ValueError(f"unknown escape in {quoted}")
        out.append(body[at:m.start()])
        out.append(chr(int(m[1], 16)) if m[1] else _PLAIN[m[2]])
        at = m.end()
    if "\\" in body[at:]:
        raise ValueError(f"unknown escape in {quoted}")
    return "".join(out) + body[at:]


def parse_line(line):
    """One log line as a dict; anything that is not strict logfmt or JSON raises."""
    if line.startswith("{"):
        pairs = json.loads(line, object_pairs_hook=list)
        if len(dict(pairs)) != len(pairs):
            raise ValueError(f"key twice: {line}")
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in pairs}
    out, at = {}, 0
    while at < len(line):
        m = _WORD.match(line, at)
        if not m:
            raise ValueError(f"not logfmt at {at}: {line!r}")
        if m[1] in out:
            raise ValueError(f"key {m[1]} twice: {line!r}")
        out[m[1]] = _unescape(m[2]) if m[2].startswith('"') else m[2]
        at = m.end()
    return out


def keep(kind, data):
    """Put data before the canary test."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")
    if data:
        CANARY_DIR.mkdir(parents=True, exist_ok=True)
        with open(CANARY_DIR / f"{kind}-{os.getpid()}", "ab") as f:
            f.write(data + b"\n")


def leak_forms(secret):
    """Every text in which secret could leak: plain, percent-encoded, base64
    at each alignment (both alphabets), hex, backslash-escaped."""
    from urllib.parse import quote
    raw = secret.encode()
    forms = {raw, quote(secret, safe="").encode(), quote(secret, safe="/").encode(),
             quote(secret, safe="-._~+/=").encode(), raw.hex().encode(), raw.hex().upper().encode(),
             secret.replace("/", "\\/").encode()}
    forms |= {re.sub(rb"%[0-9A-F]{2}", lambda m: m[0].lower(), f) for f in set(forms)}
    for shift in range(3):
        # Whole groups only: the edges depend on the neighbours.
        text = base64.b64encode(b"\0" * shift + raw)
        text = text[4 if shift else 0: -4]
        forms |= {text, text.replace(b"+", b"-").replace(b"/", b"_")}
    return forms


def find_leaks(*more):
    """Search all that was kept: [(file, form found)]. more: further secrets,
    such as tokens that a real homeserver issued."""
    texts = {f.name: f.read_bytes() for f in sorted(CANARY_DIR.iterdir()) if f.is_file()}
    assert texts, f"nothing was kept in {CANARY_DIR}"
    found = []
    for secret in (CANARY_SECRET, CANARY_PASSWORD, *CANARY_TOKENS, *more):
        for form in leak_forms(secret):
            found += [(name, form) for name, text in texts.items() if form in text]
    # Any JWT, and any URL or header with a token in it.
    for pattern in (rb"eyJ[A-Za-z0-9_-]{6,}\.", rb"access_token=", rb"Bearer [A-Za-z0-9]"):
        found += [(name, m[0]) for name, text in texts.items() for m in re.finditer(pattern, text)]
    return found


# ---- HTTP, strictly read

class Reply:
    def __init__(self, status, headers, body, reason=b"", version=b"1.1", interim=()):
        self.status, self.body, self.reason, self.version = status, body, reason, version
        self.raw_headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in headers]
        self.headers = {}
        for k, v in self.raw_headers:
            self.headers.setdefault(k.lower(), []).append(v)
        self.interim = list(interim)

    def header(self, name):
        """The value of a header that stands there once; None without it."""
        values = self.headers.get(name.lower())
        if values is None:
            return None
        assert len(values) == 1, f"{name} {len(values)} times"
        return values[0]

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def errcode(self):
        return self.json.get("errcode")

    def __repr__(self):
        return f"<{self.status} {self.raw_headers} {self.body[:200]!r}>"


class Closed(Exception):
    """The peer closed before a whole reply; .data is what came."""

    def __init__(self, data, reset=False):
        super().__init__(f"closed after {data!r}, reset={reset}")
        self.data, self.reset = data, reset


class Wire:
    """One client connection: raw bytes out, strictly parsed replies in."""

    def __init__(self, sock):
        self.sock, self.rest, self.seen = sock, b"", b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    close = __exit__

    def send(self, data):
        self.sock.sendall(data)

    def dribble(self, data):
        """Byte by byte, each in a segment of its own."""
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(data)):
            self.sock.sendall(data[i:i + 1])

    def reply(self, method="GET", timeout=DEADLINE):
        """Read one reply to a request of that method, as h11 reads it."""
        h = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        h.send(h11.Request(method=method if method.isalpha() else "GET",
                           target="/", headers=[("Host", "x")]))
        h.send(h11.EndOfMessage())
        # Only bytes that are there: h11 reads "nothing" as the end.
        if self.rest:
            h.receive_data(self.rest)
        head, body, interim = None, b"", []
        until = time.monotonic() + timeout
        while True:
            event = h.next_event()
            if event is h11.NEED_DATA:
                self.sock.settimeout(max(0.01, until - time.monotonic()))
                try:
                    data = self.sock.recv(65536)
                except ConnectionResetError:
                    raise Closed(self.rest + body, reset=True) from None
                self.seen += data
                if not data and head is None:
                    raise Closed(self.rest)
                if head is None:
                    self.rest += data
                h.receive_data(data)
            elif isinstance(event, h11.InformationalResponse):
                interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.rest = h.trailing_data[0]
                return Reply(head.status_code, head.headers.raw_items(), body,
                             head.reason, head.http_version, interim)
            else:
                raise Closed(self.rest)

    def at_end(self, timeout=DEADLINE):
        """True if the peer closes without another byte."""
        self.sock.settimeout(timeout)
        try:
            return not self.rest and self.sock.recv(1) == b""
        except ConnectionResetError:
            return not self.rest

    def drain(self, timeout=DEADLINE):
        """Everything until the peer closes."""
        self.sock.settimeout(timeout)
        out, self.rest = self.rest, b""
        try:
            while data := self.sock.recv(65536):
                out += data
        except ConnectionResetError:
            pass
        return out


def dial(bind, timeout=DEADLINE):
    """Connect to what a LIVEKIT_JWT_BIND value listens on."""
    if bind.startswith("unix:") or bind.startswith("/"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        sock.connect(bind.removeprefix("unix:"))
        return sock
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    if host in ("", "0.0.0.0"):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    return socket.create_connection((host, int(port)), timeout)


# ---- the process

class StartFailed(Exception):
    pass


class Service:
    """`with Service(env) as s:` serves when the body starts.

    env      all of the environment; nothing is inherited
    args     arguments after the program's name
    argv     whole command line instead (bubblewrap, unshare ...)
    wait     False: do not wait for /healthz
    read     False: nobody reads the stderr pipe
    """

    def __init__(self, env, args=(), *, argv=None, wait=True, read=True,
                 start_timeout=15.0, cwd=None, preexec_fn=None, pass_fds=()):
        self.env = dict(env)
        if "LIVEKIT_JWT_BIND" not in self.env and "LIVEKIT_JWT_PORT" not in self.env:
            self.env["LIVEKIT_JWT_BIND"] = f"127.0.0.1:{free_port()}"
        # Empty is unset.
        self.bind = (self.env.get("LIVEKIT_JWT_BIND") or
                     (":" + self.env["LIVEKIT_JWT_PORT"] if self.env.get("LIVEKIT_JWT_PORT") else ":8080"))
        self.argv = list(argv) if argv else [BIN, *args]
        self._wait, self._read, self._start_timeout = wait, read, start_timeout
        self._popen = dict(cwd=cwd, preexec_fn=preexec_fn, pass_fds=pass_fds)
        self._err, self._out, self._metrics = b"", b"", ""
        self._lock = threading.Condition()
        self.proc = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def start(self):
        self.proc = popen(self.argv, env=self.env, stdin=subprocess.DEVNULL,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, **self._popen)
        self.pid = self.proc.pid
        self._threads = [threading.Thread(target=self._pump, args=(self.proc.stdout, "_out"), daemon=True)]
        if self._read:
            self._threads.append(threading.Thread(target=self._pump, args=(self.proc.stderr, "_err"), daemon=True))
        for t in self._threads:
            t.start()
        if self._wait:
            try:
                self._wait_healthy()
            except BaseException:
                self.stop()
                raise
        return self

    def _pump(self, pipe, name):
        while data := os.read(pipe.fileno(), 65536):
            with self._lock:
                setattr(self, name, getattr(self, name) + data)
                self._lock.notify_all()

    def _wait_healthy(self):
        until = time.monotonic() + self._start_timeout
        while time.monotonic() < until:
            if self.proc.poll() is not None:
                raise StartFailed(f"exit {self.proc.returncode}: {self.log_text()}")
            if self.bind.endswith(":0") and not self._real_port():
                time.sleep(0.005)
                continue
            try:
                if self.request("GET", "/healthz", timeout=2).status == 200:
                    return
            except (OSError, Closed):
                pass
            time.sleep(0.005)
        raise StartFailed(f"no /healthz 200 in {self._start_timeout} s: {self.log_text()}")

    def _real_port(self):
        for line in self.log():
            if line.get("event") == "START":
                self.bind = line["listen"]
                return True
        return False

    @property
    def port(self):
        return int(self.bind.rpartition(":")[2])

    @property
    def base(self):
        return f"http://127.0.0.1:{self.port}"

    # -- requests

    def wire(self, timeout=DEADLINE, rcvbuf=None):
        if rcvbuf:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
            sock.settimeout(timeout)
            sock.connect(("127.0.0.1", self.port))
            return Wire(sock)
        return Wire(dial(self.bind, timeout))

    def request(self, method, target, body=None, headers=(), timeout=DEADLINE):
        """One request on a connection of its own."""
        head = f"{method} {target} HTTP/1.1\r\nHost: test.example.org\r\n"
        head += "".join(f"{k}: {v}\r\n" for k, v in headers)
        if body is not None:
            if isinstance(body, str):
                body = body.encode()
            head += f"Content-Length: {len(body)}\r\n"
        with self.wire(timeout) as w:
            w.send(head.encode("latin-1") + b"\r\n" + (body or b""))
            reply = w.reply(method, timeout)
        if reply.status >= 400:
            keep("reply", repr(reply.raw_headers).encode() + reply.body)
        return reply

    def post(self, path, obj, headers=(), timeout=DEADLINE):
        """POST obj: a str or bytes goes out as it is, all else as JSON."""
        if not isinstance(obj, (str, bytes)):
            obj = json.dumps(obj, ensure_ascii=False)
        return self.request("POST", path, obj, [("Content-Type", "application/json"), *headers], timeout)

    # -- log and metrics

    def log_text(self):
        with self._lock:
            return self._err.decode("utf-8", "surrogateescape")

    def stdout_text(self):
        with self._lock:
            return self._out.decode("utf-8", "surrogateescape")

    def log(self):
        """Whole stderr lines so far."""
        text = self.log_text()
        return [parse_line(line) for line in text[:text.rfind("\n") + 1].split("\n")[:-1]]

    def events(self, name, **match):
        return [e for e in self.log() if e.get("event") == name
                and all(e.get(k) == str(v) for k, v in match.items())]

    def wait_event(self, name, count=1, timeout=DEADLINE, **match):
        """The first log lines of that event; AssertionError if they do not come."""
        until = time.monotonic() + timeout
        while True:
            found = self.events(name, **match)
            if len(found) >= count:
                return found[0] if count == 1 else found
            left = until - time.monotonic()
            assert left > 0, f"no {name} {match} in the log:\n{self.log_text()}"
            with self._lock:
                self._lock.wait(min(left, 0.2))

    def metrics_text(self):
        bind = self.env["LKJWT_METRICS_BIND"]
        with Wire(dial(bind)) as w:
            w.send(b"GET /metrics HTTP/1.1\r\nHost: m\r\n\r\n")
            reply = w.reply()
        assert reply.status == 200, reply
        self._metrics = reply.body.decode()
        return self._metrics

    def metrics(self):
        """{'name{label="v"}': value} of the metrics listener."""
        out = {}
        for line in self.metrics_text().splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                out[name] = float(value)
        return out

    # -- the end

    def signal(self, sig):
        self.proc.send_signal(sig)

    def wait(self, timeout=DEADLINE):
        return self.proc.wait(timeout)

    def stop(self, timeout=DEADLINE):
        """SIGTERM; the exit code. A process that does not go is an error."""
        proc = self.proc
        if proc is None:
            return None
        if proc.poll() is None and "LKJWT_METRICS_BIND" in self.env:
            try:
                self.metrics_text()
            except (OSError, Closed, AssertionError):
                pass
        hung = False
        if proc.poll() is None:
            proc.send_signal(signal.SIGTERM)
            try:
                proc.wait(timeout)
            except subprocess.TimeoutExpired:
                hung = True
                proc.kill()
                proc.wait()
        if not self._read:
            self._pump(proc.stderr, "_err")
        for t in self._threads:
            t.join(5)
        self.proc, self._proc = None, proc
        proc.stdout.close()
        proc.stderr.close()
        keep("service", self._err + b"\n" + self._out + b"\n" + self._metrics.encode())
        assert not hung, f"SIGTERM was not obeyed in {timeout} s:\n{self.log_text()}"
        return proc.returncode


class CliResult:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        self.text = out + err

    def __repr__(self):
        return f"<exit {self.code}\nstdout: {self.out}\nstderr: {self.err}>"


def run_cli(args=(), env=None, *, argv0=None, timeout=30.0, stdin=b"", cwd=None, executable=None):
    """Run to the end. A start that wrongly serves is a TimeoutExpired."""
    done = subprocess.run([argv0 or executable or BIN, *args], executable=executable or BIN, env=env or {},
                          input=stdin, capture_output=True, timeout=timeout, cwd=cwd)
    keep("cli", done.stdout + b"\n" + done.stderr)
    return CliResult(done.returncode, done.stdout.decode("utf-8", "surrogateescape"),
                     done.stderr.decode("utf-8", "surrogateescape"))
