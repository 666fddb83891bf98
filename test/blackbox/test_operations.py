"""DESIGN.md 4.8-4.10: logs, request ids, metrics, signals, the empty image."""
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from exchange import UNAUTHORIZED, check_error, check_granted, make_body
from peers import Homeserver, Pki, Reply, inner_pid, wait_for
from service import BIN, CANARY_TOKEN, DEADLINE, Service, Wire, base_env, dial, free_port, parse_line

GET = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
USERINFO = "/_matrix/federation/v1/openid/userinfo"
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")    # surrogates: bytes that were no UTF-8


# ---- log lines

def some_traffic(s, rig):
    for path in ("/get_token", "/sfu/get"):
        check_granted(s.post(path, rig.body(path, rig.full)))
        check_granted(s.post(path, rig.body(path, rig.other)))
        s.post(path, "")
        s.post(path, rig.body(path, rig.full, "@x:y", "bad token"))
    s.request("GET", "/nothing")
    with s.wire() as w:
        w.send(b"\x01\x1b[31m\r\n\r\n")
        w.reply()


@pytest.mark.parametrize("form", ["logfmt", "json"])
def test_every_line_has_the_common_keys(rig, form):
    env = {"LKJWT_LOG_FORMAT": "json"} if form == "json" else {}
    with rig.service(LIVEKIT_LOG_LEVEL="debug", LIVEKIT_FULL_ACCESS_HOMESERVERS=f"{rig.full.netloc} *", **env) as s:
        some_traffic(s, rig)
        assert s.stop() == 0
        lines = s.log_text().split("\n")
        assert lines.pop() == "" and len(lines) > 10
        for line in lines:
            assert line.startswith("{") == (form == "json"), line
            assert not CONTROL.search(line) and len(line) <= 2048, line
            entry = parse_line(line)
            assert list(entry)[:3] == ["ts", "level", "event"], line
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["ts"]), line
            assert entry["level"] in ("debug", "info", "warning", "error")
            assert re.fullmatch(r"[A-Z][A-Z0-9_]*", entry["event"])
            assert re.fullmatch(r"[1-9]\d{3}", entry["num"]) and entry["msg"]
        # One number, one name.
        pairs = {(parse_line(x)["event"], parse_line(x)["num"]) for x in lines}
        assert len({p[0] for p in pairs}) == len({p[1] for p in pairs}) == len(pairs)


def test_what_an_exchange_logs(rig):
    with rig.service() as s:
        for path in ("/get_token", "/sfu/get"):
            for hs, full in ((rig.full, "true"), (rig.other, "false")):
                rid = f"id-{path[1:4]}-{full}"
                check_granted(s.post(path, rig.body(path, hs), [("X-Request-Id", rid)]))
                line = s.wait_event("GRANTED", req=rid)
                assert (line["level"], line["server"], line["full"]) == ("info", hs.netloc, full)
                assert path in line["route"]


FAILED = {  # server name, hook, step, is an address named
    "grammar": ("a_b", None, "name", False), "refused": ("127.0.0.1:1", None, "connect", True),
    "TLS": ("{sfu}", None, "tls", True), "401": ("{other}", Reply(401, {"errcode": "M_UNKNOWN_TOKEN"}), "http", True),
    "500": ("{other}", Reply(500, "x"), "http", True), "sub": ("{other}", Reply(200, {"sub": "@a:b"}), "sub", True),
}


@pytest.mark.parametrize("row", FAILED)
def test_what_a_failed_lookup_logs(svc, rig, row):
    name, hook, step, addressed = FAILED[row]
    name = name.format(sfu=rig.sfu.netloc, other=rig.other.netloc)
    if hook:
        rig.other.on(USERINFO, hook)
    try:
        rid = f"failed-{row}"
        check_error(svc.post("/sfu/get", make_body("/sfu/get", name), [("X-Request-Id", rid)]), 401, "M_UNAUTHORIZED",
                    UNAUTHORIZED)
        lines = wait_for("its line", lambda: [e for e in svc.log() if e.get("req") == rid and "step" in e])
        assert len(lines) == 1, lines
        assert (lines[0]["step"], lines[0]["server"]) == (step, name)
        assert lines[0]["level"] in ("info", "warning")
        assert (lines[0].get("addr") == name) == addressed, lines
    finally:
        rig.other.off()


HOSTILE = ['a"b', "a\\b", "a\nb", "a\r\nlevel=error event=GRANTED", "\x1b[31mred\x1b[0m", "a\0b", "\x7f", "a=b c=d", " ",
           "é\u2028\u2029\u202e", "\x9b31m", "😀" * 40, "x" * 60000, "{}", '","level":"error', "%s%n%d", "$(id)`id`"]


@pytest.mark.parametrize("form", ["logfmt", "json"])
def test_s10_one_event_one_line(rig, form):
    """Hostile text in everything a client or a homeserver can name."""
    with rig.service(LIVEKIT_LOG_LEVEL="debug", LKJWT_LOG_FORMAT=form) as s:
        for text in HOSTILE:
            body = rig.body("/get_token", rig.other, room=text[:60] + "r", slot=text[:60] + "s", device=text[:60] + "d",
                            member=text[:60] + "m")
            s.post("/get_token", body)
            s.post("/sfu/get", make_body("/sfu/get", text))
            s.post("/sfu/get", make_body("/sfu/get", rig.other.netloc, token=text[:90] + "!"))
            s.post("/get_token", rig.body("/get_token", rig.other, text[:200] + "u", rig.user(rig.other)[1]))
            s.post("/get_token", {text: 1})
            s.post("/sfu/get", rig.body("/sfu/get", rig.full, delay_id=text + "!", delay_timeout=1000))
            rig.other.on(USERINFO, Reply(200, {"sub": text}))
            s.post("/sfu/get", rig.body("/sfu/get", rig.other))
            rig.other.on(USERINFO, Reply(403, {"errcode": text, "error": text}))
            s.post("/sfu/get", rig.body("/sfu/get", rig.other))
            rig.other.off()
        assert s.stop() == 0
        lines = s.log_text().split("\n")
        assert lines.pop() == ""
        for line in lines:
            assert not CONTROL.search(line) and len(line) <= 2048, line
            entry = parse_line(line)
            assert all(len(v) <= 260 for v in entry.values()), line
            assert entry["event"] != "GRANTED" or entry["level"] == "info"
        names = [parse_line(x)["server"] for x in lines if "server" in parse_line(x)]
        assert any('a"b' == n for n in names), "the name asked for is not told"


@pytest.mark.parametrize("rid", ["a", "Z9._-", "x" * 64, "0", "-", ".", "req-1"])
def test_request_id_is_kept(svc, rig, rid):
    rig.sfu.forget()
    rig.full.forget()
    reply = svc.post("/sfu/get", rig.body("/sfu/get", rig.full), [("X-Request-Id", rid)])
    check_granted(reply)
    assert reply.header("X-Request-Id") == rid
    svc.wait_event("GRANTED", req=rid)
    # Our own SFU is told; a homeserver is not.
    assert rig.sfu.requests[0].header("x-request-id") == rid
    assert rig.full.requests[0].header("x-request-id") is None


@pytest.mark.parametrize("headers", [
    [], [("X-Request-Id", "")], [("X-Request-Id", "x" * 65)], [("X-Request-Id", "a b")], [("X-Request-Id", "a,b")],
    [("X-Request-Id", "a;b")], [("X-Request-Id", "a/b")], [("X-Request-Id", 'a"b')], [("X-Request-Id", "\xe4")],
    [("X-Request-Id", "x" * 4000)]], ids=lambda h: repr(h[0][1][:9]) if h else "none")
def test_s12_request_id_is_made(svc, headers):
    ids = set()
    for _ in range(3):
        reply = svc.request("GET", "/nothing", headers=headers)
        rid = reply.header("X-Request-Id")
        assert re.fullmatch(r"[A-Za-z0-9._-]{8,64}", rid) and set(rid) != {"x"}, rid
        ids.add(rid)
    assert len(ids) == 3


# ---- metrics

NAMES = {"lkjwt_http_requests": "counter", "lkjwt_http_request_duration_seconds": "histogram",
         "lkjwt_upstream_requests": "counter", "lkjwt_upstream_duration_seconds": "histogram",
         "lkjwt_events": "counter", "lkjwt_build_info": "gauge", "process_resident_memory_bytes": "gauge",
         "process_cpu_seconds": "counter", "process_start_time_seconds": "gauge"}


def families(s):
    return {f.name: f for f in text_string_to_metric_families(s.metrics_text())}


def value(s, name, **labels):
    """Sum over the samples that carry these labels."""
    return sum(x.value for f in families(s).values() for x in f.samples
               if x.name == name and all(v in x.labels.get(k, "") for k, v in labels.items()))


def test_metrics_are_well_formed(svc, rig):
    some_traffic(svc, rig)
    text = svc.metrics_text()
    got = families(svc)
    for name, kind in NAMES.items():
        assert name in got, name
        assert got[name].type == kind and got[name].documentation, name
        assert got[name].samples, name
    for name, family in got.items():
        assert re.fullmatch(r"(lkjwt|process)_[a-z0-9_]+", name), name
        assert family.documentation and family.type != "unknown", name
        seen = [(x.name, tuple(sorted(x.labels.items()))) for x in family.samples]
        assert len(seen) == len(set(seen)), f"{name}: a sample twice"
        if family.type == "counter":
            assert all(x.name.endswith("_total") and x.value >= 0 for x in family.samples)
        else:
            assert not name.endswith("_total")
        if family.type == "histogram":
            check_histogram(family)
    # HELP and TYPE once each, before the samples, and a newline at the end.
    for word in ("HELP", "TYPE"):
        heads = re.findall(rf"^# {word} (\S+)", text, re.M)
        assert len(heads) == len(set(heads)) == len(got)
    assert text.endswith("\n")
    assert 0 < value(svc, "process_resident_memory_bytes") < 48 << 20
    assert abs(value(svc, "process_start_time_seconds") - time.time()) < 3600
    assert got["lkjwt_build_info"].samples[0].value == 1 and "version" in got["lkjwt_build_info"].samples[0].labels


def check_histogram(family):
    series = {}
    for x in family.samples:
        key = tuple(sorted((k, v) for k, v in x.labels.items() if k != "le"))
        series.setdefault(key, []).append(x)
    for samples in series.values():
        buckets = [(float(x.labels["le"]), x.value) for x in samples if x.name.endswith("_bucket")]
        assert buckets == sorted(buckets) and [v for _, v in buckets] == sorted(v for _, v in buckets)
        assert buckets[-1][0] == float("inf")
        count = [x.value for x in samples if x.name.endswith("_count")]
        assert count == [buckets[-1][1]] and [x for x in samples if x.name.endswith("_sum")]


def test_metrics_count(svc, rig):
    wanted = [("lkjwt_http_requests_total", dict(route="/get_token", code="200"), 2),
              ("lkjwt_http_requests_total", dict(route="/get_token", code="400"), 3),
              ("lkjwt_http_requests_total", dict(route="/sfu/get", code="401"), 1),
              ("lkjwt_events_total", dict(event="GRANTED"), 2),
              ("lkjwt_http_request_duration_seconds_count", dict(route="/get_token"), 5)]
    before = [value(svc, n, **labels) for n, labels, _ in wanted]
    upstream = value(svc, "lkjwt_upstream_requests_total")
    for hs in (rig.full, rig.other):
        check_granted(svc.post("/get_token", rig.body("/get_token", hs)))
    for _ in range(3):
        svc.post("/get_token", "")
    svc.post("/sfu/get", rig.body("/sfu/get", rig.full, "@x:y", "bad"))
    after = [value(svc, n, **labels) for n, labels, _ in wanted]
    assert [(w[0], w[1], a - b) for w, a, b in zip(wanted, after, before)] == wanted
    assert value(svc, "lkjwt_upstream_requests_total") - upstream == 4     # three userinfo calls, one room


def test_labels_never_hold_what_a_client_chose(svc, rig):
    def marked(s):
        s.request("GET", "/evilmark/path?evilmark")
        s.request("EVILMARK", "/get_token")
        s.post("/sfu/get", make_body("/sfu/get", "evilmark.invalid_"),
               [("X-Request-Id", "evilmark"), ("User-Agent", "evilmark")])
        s.post("/get_token", rig.body("/get_token", rig.full, room="evilmark", device="evilmark"))
    marked(svc)
    series = set(svc.metrics())
    for _ in range(3):
        marked(svc)
    assert set(svc.metrics()) == series
    assert "evilmark" not in svc.metrics_text().lower()
    assert rig.full.netloc not in svc.metrics_text()


def metrics_request(s, data):
    with Wire(dial(s.env["LKJWT_METRICS_BIND"])) as w:
        w.send(data)
        return w.reply("HEAD" if data.startswith(b"HEAD") else "GET")


def test_metrics_listener(svc):
    reply = metrics_request(svc, b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n")
    assert reply.status == 200 and reply.header("Content-Type").startswith("text/plain; version=0.0.4")
    assert metrics_request(svc, b"GET /metrics?x=y HTTP/1.1\r\nHost: h\r\n\r\n").status == 200
    for target in (b"/", b"/get_token", b"/sfu/get", b"/metrics/", b"/debug"):
        assert metrics_request(svc, b"GET " + target + b" HTTP/1.1\r\nHost: h\r\n\r\n").status == 404
    assert metrics_request(svc, b"POST /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n").status == 405
    assert metrics_request(svc, b"GET /metrics HTTP/1.1\r\n\r\n").status == 400
    # Not on the port of the clients.
    assert svc.request("GET", "/metrics").status == 404


def test_metrics_are_off_when_unset(rig):
    with rig.service() as s:
        listening = subprocess.run(["cat", f"/proc/{s.pid}/net/tcp"], capture_output=True, text=True).stdout
        inodes = {os.readlink(f"/proc/{s.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{s.pid}/fd")}
        rows = [x.split() for x in listening.splitlines()[1:]]
        mine = [r for r in rows if f"socket:[{r[9]}]" in inodes and r[3] == "0A"]
        assert len(mine) == 1


def test_metrics_port_in_use(rig):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        s = Service(rig.env(LKJWT_METRICS_BIND=f"127.0.0.1:{taken.getsockname()[1]}"), wait=False)
        s.start()
        assert s.wait() == 1
        s.stop()
        assert str(taken.getsockname()[1]) in s.log_text()


# ---- signals

class Gate:
    """A homeserver whose userinfo answers wait until open() is called."""

    def __init__(self, rig):
        self.rig, self.event = rig, threading.Event()
        self.sub, self.token = rig.user(rig.full)

    def __enter__(self):
        self.rig.full.forget()
        self.rig.full.on(USERINFO, self._answer)
        return self

    def __exit__(self, *_):
        self.event.set()
        self.rig.full.off()

    def _answer(self, req):
        self.event.wait(60)
        return Reply(200, {"sub": self.sub})

    def begin(self, s):
        body = json.dumps(self.rig.body("/sfu/get", self.rig.full, self.sub, self.token)).encode()
        w = s.wire()
        w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_for("the homeserver is asked", self.rig.full.asked)
        return w


def gone(s):
    try:
        s.wire(2).close()
        return False
    except OSError:
        return True


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_s28_stop_finishes_what_is_in_flight(rig, sig):
    """And ends with it: the drain time here would hang the test."""
    with Gate(rig) as gate, rig.service(LKJWT_DRAIN_S="600") as s:
        idle = s.wire()
        idle.send(GET)
        assert idle.reply().status == 200
        w = gate.begin(s)
        s.signal(sig)
        wait_for("the listener is gone", lambda: gone(s))
        assert idle.at_end()
        assert s.proc.poll() is None
        gate.event.set()
        reply = w.reply("POST")
        check_granted(reply)
        assert reply.header("Connection") == "close" and w.at_end()
        assert s.wait() == 0


def test_stop_without_work_is_immediate(rig):
    """Idle clients, of any history, hold nothing up: the drain time here would hang the test."""
    with rig.service(LKJWT_DRAIN_S="600") as s:
        fresh, used = s.wire(), s.wire()
        used.send(GET)
        assert used.reply().status == 200
        assert s.post("/sfu/get", rig.body("/sfu/get", rig.full)).status == 200    # kept connections upstream
        s.signal(signal.SIGTERM)
        assert s.wait() == 0
        assert fresh.at_end() and used.at_end()


def test_half_a_request_may_be_finished_while_draining(rig):
    with rig.service(LKJWT_DRAIN_S="600") as s:
        w = s.wire()
        w.send(GET[:20])
        assert s.request("GET", "/healthz").status == 200
        s.signal(signal.SIGTERM)
        wait_for("the listener is gone", lambda: gone(s))
        w.send(GET[20:])
        reply = w.reply()
        assert (reply.status, reply.header("Connection")) == (503, "close")
        assert s.wait() == 0


def test_s28_drain_time_bounds_the_stop(rig):
    with Gate(rig) as gate, rig.service(LKJWT_DRAIN_S="1") as s:
        w = gate.begin(s)
        s.signal(signal.SIGTERM)
        assert s.wait(10) == 0
        w.close()


def test_second_signal_exits_at_once(rig):
    with Gate(rig) as gate, rig.service(LKJWT_DRAIN_S="60") as s:
        w = gate.begin(s)
        s.signal(signal.SIGTERM)
        wait_for("the listener is gone", lambda: gone(s))
        assert s.proc.poll() is None
        s.signal(signal.SIGTERM)
        s.wait(5)
        w.close()


def test_lame_duck(rig):
    """Goes on serving while /healthz says 503, so the balancer looks away first."""
    with rig.service(LKJWT_LAME_DUCK_S="3") as s:
        kept = s.wire()
        kept.send(GET)
        assert kept.reply().status == 200
        s.signal(signal.SIGTERM)
        wait_for("503", lambda: s.request("GET", "/healthz").status == 503)
        reply = s.post("/sfu/get", rig.body("/sfu/get", rig.full))
        check_granted(reply)
        assert reply.header("Connection") == "close"
        kept.send(b"POST /get_token HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
        reply = kept.reply("POST")
        assert (reply.status, reply.header("Connection")) == (400, "close")
        assert kept.at_end()
        assert s.wait(15) == 0
        assert gone(s)


def test_sigpipe_is_ignored(rig):
    with rig.service() as s:
        s.signal(signal.SIGPIPE)
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))


# ---- SIGHUP

def test_hup_reads_ca_files_again(tmp_path, rig):
    other = Pki(str(tmp_path / "pki"))
    ca = tmp_path / "ca.pem"
    ca.write_bytes(open(rig.pki.ca_file, "rb").read())
    with Homeserver(tls=other.leaf(ips=["127.0.0.1"])) as new, rig.service(LKJWT_CA_FILE=str(ca)) as s:
        def ask(hs):
            return s.post("/sfu/get", rig.body("/sfu/get", hs)).status
        first = s.wait_event("ANCHORS")
        assert first["count"] == "1" and str(ca) in first["sources"]
        assert (ask(rig.other), ask(new)) == (200, 401)
        ca.write_bytes(open(other.ca_file, "rb").read())
        assert ask(new) == 401          # nothing is read without the signal
        s.signal(signal.SIGHUP)
        s.wait_event("ANCHORS", count=2)
        # What the old set vouched for is forgotten too.
        assert (ask(rig.other), ask(new)) == (401, 200)
        ca.write_bytes(open(other.ca_file, "rb").read() + open(rig.pki.ca_file, "rb").read())
        s.signal(signal.SIGHUP)
        assert s.wait_event("ANCHORS", count=3)[2]["count"] == "2"
        assert (ask(rig.other), ask(new)) == (200, 200)


@pytest.mark.parametrize("bad", ["gone", "garbage", "cut", "empty", "a folder"])
def test_hup_with_a_bad_file_keeps_the_old_set(tmp_path, rig, bad):
    ca = tmp_path / "ca.pem"
    good = open(rig.pki.ca_file, "rb").read()
    ca.write_bytes(good)
    with rig.service(LKJWT_CA_FILE=str(ca)) as s:
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))
        ca.unlink()
        if bad == "a folder":
            ca.mkdir()
        elif bad != "gone":
            ca.write_bytes({"garbage": b"\0\xff" * 500, "cut": good[:len(good) // 2], "empty": b""}[bad])
        s.signal(signal.SIGHUP)
        line = s.wait_event("ANCHORS_BAD")
        assert line["level"] == "error" and line["var"] == "LKJWT_CA_FILE" and line["detail"]
        rig.full.drop_connections()
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))
        if bad == "a folder":
            ca.rmdir()
        ca.write_bytes(good)
        s.signal(signal.SIGHUP)
        s.wait_event("ANCHORS", count=2)


def test_hup_amid_an_exchange(rig):
    with Gate(rig) as gate, rig.service() as s:
        w = gate.begin(s)
        for n in range(3):
            s.signal(signal.SIGHUP)
            s.wait_event("ANCHORS", count=n + 2)
        gate.event.set()
        check_granted(w.reply("POST"))


# ---- stderr

def test_stderr_nobody_reads(rig):
    """The pipe is full: lines are dropped, nobody waits."""
    with rig.service(LIVEKIT_LOG_LEVEL="debug") as probe:
        for _ in range(20):
            probe.post("/sfu/get", "")
        assert probe.stop() == 0
        assert probe.log_text().count("\n") >= 20, "requests are not logged, so nothing fills the pipe"
    s = Service(rig.env(LIVEKIT_LOG_LEVEL="debug"), read=False)
    with s:
        for n in range(1500):
            assert s.post("/sfu/get", "", [("X-Request-Id", "x" * 64)], timeout=5).status == 400
        check_granted(s.post("/get_token", rig.body("/get_token", rig.full), timeout=5))
        assert s.request("GET", "/healthz", timeout=5).status == 200
        assert s.stop() == 0
    for line in s.log_text().split("\n")[:50]:
        parse_line(line)


def test_stderr_closed(rig):
    """Started with stderr closed, or its reader gone: still serves."""
    s = Service(rig.env(), argv=["/bin/sh", "-c", f"exec {BIN} 2>&-"])
    with s:
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))
        assert s.stop() == 0
    r, w = os.pipe()
    env = rig.env(LIVEKIT_JWT_BIND=f"127.0.0.1:{free_port()}")
    proc = subprocess.Popen([BIN], env=env, stderr=w, stdout=subprocess.DEVNULL)
    try:
        os.close(w)
        os.close(r)
        s = Service(env)
        wait_for("health", lambda: not gone(s))
        for _ in range(20):
            assert s.post("/sfu/get", "").status == 400
        assert proc.poll() is None
    finally:
        proc.terminate()
        assert proc.wait(DEADLINE) == 0


# ---- the image: an empty root, uid 1000, no capability, read-only, PID 1

def box(name):
    """bubblewrap: nothing in the root but the binary, in a pid namespace of its own."""
    return ["bwrap", "--unshare-user", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL", "--unshare-pid",
            "--as-pid-1", "--unshare-ipc", "--unshare-uts", "--ro-bind", BIN, name, "--remount-ro", "/",
            "--die-with-parent", name]


def boxed(env):
    return Service({**env, "PATH": "/usr/bin:/bin"}, argv=box("/lk-jwt-service"))


def boxed_probe(env):
    """The image's health check, in a root as empty; the network is the container's."""
    return subprocess.run(box("/lk-jwt-service-healthcheck"), env={**env, "PATH": "/usr/bin:/bin"}, timeout=10).returncode


def test_empty_read_only_root_without_rights(rig):
    with Homeserver() as plain:
        plain.sub = "@a:boxed.example.org"
        env = base_env(LIVEKIT_FULL_ACCESS_HOMESERVERS="boxed.example.org", LKJWT_LIVEKIT_API_URL=rig.sfu.url,
                       LKJWT_FEDERATION_API_URL_OVERRIDES=f"boxed.example.org={plain.url}",
                       LIVEKIT_URL="wss://sfu.example.org/",
                       LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}", LIVEKIT_JWT_BIND=f":{free_port()}")
        with boxed(env) as s:
            pid = inner_pid(s)
            status = dict(line.split(":\t", 1) for line in open(f"/proc/{pid}/status").read().splitlines() if ":\t" in line)
            assert status["NSpid"].split()[-1] == "1"
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0
            assert open(f"/proc/{pid}/uid_map").read().split()[0] == "1000"
            assert sorted(os.listdir(f"/proc/{pid}/root")) == ["lk-jwt-service"]
            assert os.statvfs(f"/proc/{pid}/root").f_flag & os.ST_RDONLY
            check_granted(s.post("/get_token", make_body("/get_token", "boxed.example.org", "@a:boxed.example.org")))
            # The set built in is what a scratch image has.
            assert int(s.wait_event("ANCHORS")["count"]) >= 100
            assert s.metrics()
            assert boxed_probe(env) == 0
            # PID 1 has no default actions: only a handler makes it go.
            os.kill(pid, signal.SIGTERM)
            assert s.wait() == 0
        assert boxed_probe(env) == 1


def test_pid_1_stops_on_sigint_and_survives_hup(rig):
    with boxed(rig.env(LKJWT_CA_FILE=None, LKJWT_CA_ONLY=None)) as s:
        pid = inner_pid(s)
        os.kill(pid, signal.SIGHUP)
        s.wait_event("ANCHORS", count=2)
        assert s.request("GET", "/healthz").status == 200
        os.kill(pid, signal.SIGINT)
        assert s.wait() == 0


def test_s26_nothing_is_opened_for_writing(rig):
    """All descriptors after traffic: sockets, pipes, and files read-only."""
    with rig.service(LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}") as s:
        some_traffic(s, rig)
        s.metrics()
        for fd in os.listdir(f"/proc/{s.pid}/fd"):
            try:
                target = os.readlink(f"/proc/{s.pid}/fd/{fd}")
            except FileNotFoundError:
                continue
            if target.startswith(("socket:", "pipe:", "anon_inode:")) or target == "/dev/null":
                continue
            flags = int(re.search(r"flags:\t(\d+)", open(f"/proc/{s.pid}/fdinfo/{fd}").read())[1], 8)
            assert flags & os.O_ACCMODE == os.O_RDONLY, target


def test_s25_reply_to_a_client_that_is_gone(rig):
    """Writes to closed sockets end the connection, not the process."""
    with rig.service() as s:
        for _ in range(50):
            with s.wire() as w:
                w.send(GET * 200)
                w.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        for _ in range(5):
            with s.wire() as w:
                body = json.dumps(rig.body("/sfu/get", rig.full)).encode()
                w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))
        assert s.stop() == 0


def test_tokens_differ_between_users_but_secrets_never_show(rig):
    with rig.service(LIVEKIT_LOG_LEVEL="debug") as s:
        tokens = {check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full))) for _ in range(3)}
        assert len(tokens) == 3 and s.stop() == 0
        for token in tokens:
            assert token not in s.log_text() and token.split(".")[2] not in s.log_text()
        assert CANARY_TOKEN not in s.log_text()
