"""The sandbox from outside: SECURITY.md 6 and S26. What each layer does as /proc and strace tell it, what the service
can still do in it, and what becomes of layers that a kernel or an outer filter forbids.

The suite is root's. Other suites stay root (LKJWT_UID=0, base_env); here the service leaves root unless a row says
otherwise, so the files that it reads again are in a folder anybody may read."""
import atexit
import ctypes
import errno
import functools
import itertools
import os
import platform
import re
import resource
import shutil
import signal
import struct
import subprocess
import tempfile

import pytest

from exchange import check_granted
from leave import Log
from outbound import PUB, Exchange, by_token, outbound_env, pub
from peers import SCRATCH, Dns, Homeserver, Pki, inner_pid, wait_for, which
from service import BIN, Service, free_port
from store import RedisServer, StoreWorld
from test_environment import fatal

LAYERS = ["core", "ids", "caps", "privs", "dump", "landlock", "seccomp"]
UID = 65532
PORT = 8448
_fresh = itertools.count(1)


@pytest.fixture
def folder():
    """Open to all; what is made in it, too."""
    path = tempfile.mkdtemp(prefix="lkjwt-jail-")
    os.chmod(path, 0o755)
    mask = os.umask(0o022)
    yield path
    os.umask(mask)
    shutil.rmtree(path)


def put(path, data):
    """A whole new file in the place of what is there."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())
    os.replace(path + ".new", path)
    return path


def link(path, target):
    """A symbolic link in the place of what is there."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.symlink(target, path + ".new")
    os.replace(path + ".new", path)
    return path


@functools.cache
def public_ca(pki):
    """The file of the root, in a folder that the service may read as anybody."""
    path = tempfile.mkdtemp(prefix="lkjwt-jail-ca-")
    atexit.register(shutil.rmtree, path)
    os.chmod(path, 0o755)
    os.chmod(put(f"{path}/ca.pem", pki.root.pem), 0o644)
    return f"{path}/ca.pem"


def metrics_bind():
    return f"127.0.0.1:{free_port()}"


@functools.cache
def public_bin():
    """The binary where every user can run it: the checkout may lie in a home that is closed to others."""
    path = tempfile.mkdtemp(prefix="lkjwt-jail-bin-")
    atexit.register(shutil.rmtree, path)
    os.chmod(path, 0o755)
    return shutil.copy(BIN, path)


def jailed(rig, preexec_fn=None, argv=None, cwd=None, **env):
    """A service as root starts it."""
    env = {"LKJWT_UID": None, "LKJWT_METRICS_BIND": metrics_bind(), "LKJWT_CA_FILE": public_ca(rig.pki), **env}
    return Service(rig.env(**env), preexec_fn=preexec_fn, argv=argv or [public_bin()], cwd=cwd)


def check_layers(svc, *missing):
    """The line and the metric both say that these are missing and no other."""
    line = svc.wait_event("JAIL")
    words = lambda key: [w for w in line.get(key, "").split(",") if w not in ("", "none")]
    assert (line["num"], line["level"]) == ("1013", "info")
    assert words("missing") == [x for x in LAYERS if x in missing], line
    assert words("layers") == [x for x in LAYERS if x not in missing], line
    metrics = svc.metrics()
    assert {x: metrics[f'lkjwt_jail{{layer="{x}"}}'] for x in LAYERS} == {x: x not in missing for x in LAYERS}
    svc.wait_event("START")
    events = [e["event"] for e in svc.log()]
    assert events.index("JAIL") < events.index("START") and "JAIL_BAD" not in events


def status(pid):
    with open(f"/proc/{pid}/status") as f:
        return dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)


CAPS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
NO_CAPS = dict.fromkeys(CAPS, "0" * 16)


def capabilities(text):
    """Of /proc/PID/status, as it is."""
    return {k: v for k, v in (line.split(":\t", 1) for line in text.splitlines() if line.startswith("Cap")) if k in CAPS}


def core_limit(pid):
    with open(f"/proc/{pid}/limits") as f:
        return next(line.split()[4:6] for line in f if line.startswith("Max core file size"))


def proc_owner(pid):
    """Root's for a process that may not be dumped."""
    st = os.stat(f"/proc/{pid}/mem")
    return st.st_uid, st.st_gid


def want_core():
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def become_user():
    want_core()
    os.setgroups([4244, 4245])
    os.setgid(4243)
    os.setuid(4242)


def use(svc, rig, has_proc=True):
    """An exchange over TLS, and what metrics read of /proc."""
    check_granted(svc.post("/get_token", rig.body("/get_token", rig.full)))
    rig.full.drop_connections()
    assert (svc.metrics()["process_resident_memory_bytes"] > 100_000) is has_proc


# ---- each layer

STARTS = {  # LKJWT_UID, how, who it is then: uid, gid, groups; what is missing
    "as root": (None, want_core, UID, UID, "", ()),
    "as root, a uid": ("12345", want_core, 12345, 12345, "", ()),
    "as root, groups": (None, lambda: (want_core(), os.setgroups([4, 24, 27])), UID, UID, "", ()),
    "as root, to stay": ("0", lambda: (want_core(), os.setgroups([])), 0, 0, "", ("ids",)),
    "as a user": (None, become_user, 4242, 4243, "4244 4245", ()),
    "as a user, a uid": ("12345", become_user, 4242, 4243, "4244 4245", ()),
}


@pytest.mark.parametrize("mode", ["auto", "require", None])
@pytest.mark.parametrize("start", STARTS)
def test_s26_each_layer_holds(rig, start, mode):
    uid_env, how, uid, gid, groups, missing = STARTS[start]
    with jailed(rig, how, LKJWT_UID=uid_env, LKJWT_JAIL=mode) as s:
        check_layers(s, *missing)
        now = status(s.pid)
        assert now["Seccomp"] == "2" and now.get("Seccomp_filters", "1") == "1" and now["NoNewPrivs"] == "1"
        assert now["Uid"].split() == [str(uid)] * 4 and now["Gid"].split() == [str(gid)] * 4
        assert now["Groups"].strip() == groups
        # A user without CAP_SETPCAP cannot empty the bounding set.
        assert {c: now[c] for c in CAPS} == NO_CAPS | ({"CapBnd": now["CapBnd"]} if how is become_user else {})
        assert core_limit(s.pid) == ["0", "0"]
        assert proc_owner(s.pid) == (0, 0)
        assert now["Threads"] == "1" and not open(f"/proc/{s.pid}/task/{s.pid}/children").read()
        use(s, rig)


def setpriv(*words):
    return [which("setpriv"), *words, "--"]


SOME = "+net_bind_service,+setpcap,+dac_override,+sys_admin"
USER = ("--reuid", "4242", "--regid", "4243", "--clear-groups")
HOLDERS = {  # LKJWT_UID, what starts it, sets that hold some at first, layers missing, sets that keep them
    "root": (None, [], "CapPrm CapEff CapBnd", (), ""),
    "root that stays": ("0", [], "CapPrm CapEff CapBnd", ("ids",), ""),
    "root, inherited": (None, setpriv("--inh-caps", SOME), "CapInh CapPrm CapEff CapBnd", (), ""),
    "root that stays, ambient": ("0", setpriv("--inh-caps", SOME, "--ambient-caps", SOME), " ".join(CAPS), ("ids",), ""),
    "root that setuid() leaves them": (None, setpriv("--securebits", "+no_setuid_fixup"), "CapPrm CapEff CapBnd", (), ""),
    "root without CAP_SETPCAP": ("0", setpriv("--bounding-set", "-setpcap"), "CapPrm CapEff CapBnd", ("ids",), "CapBnd"),
    "root with two": (None, setpriv("--bounding-set", "-all,+setuid,+setgid"), "CapPrm CapEff CapBnd", (), "CapBnd"),
    "a user, ambient": (None, setpriv(*USER, "--inh-caps", "+net_bind_service", "--ambient-caps", "+net_bind_service"),
                        " ".join(CAPS), (), "CapBnd"),
    "a user, ambient, CAP_SETPCAP": (None, setpriv(*USER, "--inh-caps", SOME, "--ambient-caps", SOME), " ".join(CAPS), (), ""),
    "a user, a uid, ambient": ("12345", setpriv(*USER, "--inh-caps", SOME, "--ambient-caps", SOME), " ".join(CAPS), (),
                               ""),
    "a user, inherited": (None, setpriv(*USER, "--inh-caps", "+sys_admin"), "CapInh CapBnd", (), "CapBnd"),
    "a user, empty bounding set": (None, setpriv("--bounding-set", "-all", *USER), "", (), ""),
    "root of a namespace": ("0", [which("unshare"), "-r", "--"], "CapPrm CapEff CapBnd", ("ids",), ""),
}


@pytest.mark.parametrize("mode", ["auto", "require"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_s26_no_capability_is_left(rig, holder, mode):
    """Whoever starts it: all five sets are empty, but a bounding set that the kernel lets nobody here empty."""
    uid_env, argv, held, missing, kept = HOLDERS[holder]
    before = capabilities(subprocess.run([*argv, which("cat"), "/proc/self/status"], text=True, capture_output=True,
                                         check=True).stdout)
    assert [c for c in CAPS if before[c] != NO_CAPS[c]] == held.split(), before
    with jailed(rig, argv=[*argv, public_bin()], LKJWT_UID=uid_env, LKJWT_JAIL=mode, PATH=os.environ["PATH"]) as s:
        check_layers(s, *missing)
        now = status(s.pid)
        assert {c: now[c] for c in CAPS} == NO_CAPS | {c: before[c] for c in kept.split()}
        assert (now["NoNewPrivs"], now["Seccomp"]) == ("1", "2")
        use(s, rig)
        assert s.stop() == 0


def test_off_keeps_capabilities(rig):
    """The layer is told of truly: nothing was given up."""
    argv = HOLDERS["a user, ambient"][1]
    with jailed(rig, argv=[*argv, public_bin()], LKJWT_JAIL="off", PATH=os.environ["PATH"]) as s:
        check_layers(s, *LAYERS)
        assert status(s.pid)["CapEff"] == status(s.pid)["CapAmb"] == f"{1 << 10:016x}"


def test_off_does_nothing(rig):
    with jailed(rig, become_user, LKJWT_JAIL="off") as s:
        check_layers(s, *LAYERS)
        now = status(s.pid)
        assert (now["Seccomp"], now["NoNewPrivs"]) == ("0", "0") and proc_owner(s.pid) == (4242, 4243)
        assert core_limit(s.pid) == ["unlimited", "unlimited"]
        use(s, rig)
    with jailed(rig, LKJWT_JAIL="off") as s:
        assert status(s.pid)["Uid"].split() == ["0"] * 4


@pytest.mark.parametrize("var, value", [*(("LKJWT_JAIL", v) for v in (
    "AUTO", "Off", "no", "yes", "true", "false", "0", "1", "required", "auto,require", "require off", "on", "none")),
    *(("LKJWT_UID", v) for v in ("x", "-1", "1.5", "0x10", "nobody", "4294967295", "4294967296", "99999999999999"))])
def test_other_words_are_fatal(rig, var, value):
    got = fatal(rig.env(**{var: value}))
    assert var in got.err and "CONFIG_BAD" in got.err, got


# ---- under strace

# SECURITY.md 6 as strace writes it on x86_64, aarch64 and armv7. How the arguments are judged: test/unit_jail.h.
CALLS = set("""read write writev close shutdown connect accept4 sendto recvfrom sendmsg recvmsg getsockopt setsockopt
    getsockname getpeername epoll_ctl epoll_pwait ppoll poll ppoll_time64 clock_gettime clock_gettime64 getrandom getdents64 fstat fstat64
    newfstatat fstatat64 statx pread64 rt_sigprocmask rt_sigreturn sigreturn restart_syscall exit exit_group socket
    fcntl fcntl64 openat recv send""".split())
REREAD = {"/etc/resolv.conf", "/etc/hosts"}


class Trace:
    """Calls that strace -f wrote: (name, arguments and result)."""

    LINE = re.compile(r"^\d+ +(\w+)\((.*)$")

    def __init__(self, path):
        with open(path, errors="replace") as f:
            self.text = f.read()
        lines = self.text.splitlines()
        entry = [i for i, line in enumerate(lines) if "prctl(PR_SET_SECCOMP" in line]
        assert len(entry) == 1 and lines[entry[0]].endswith(" = 0"), entry
        self.before, self.after = lines[:entry[0]], lines[entry[0] + 1:]
        self.calls = [m.groups() for m in map(self.LINE.match, self.after) if m]
        assert len(self.calls) > 100 and not [x for x in self.after if "unfinished" in x], "one process, one thread"

    def of(self, name):
        return [rest for n, rest in self.calls if n == name]

    def check(self, may_open, families, may_unlink=()):
        used = {n for n, _ in self.calls}
        assert used <= CALLS | ({"unlink", "unlinkat"} if may_unlink else set()), used - CALLS
        assert not [x for x in self.after if "ENOSYS" in x or "SIGSYS" in x]
        for rest in self.of("openat"):
            m = re.match(r'AT_FDCWD, "([^"]*)", ([A-Z_|]+)\) = ', rest)
            assert m and m[1] in may_open | REREAD, rest
            assert set(m[2].split("|")) <= {"O_RDONLY", "O_CLOEXEC", "O_LARGEFILE", "O_DIRECTORY"}, rest
        for rest in self.of("socket"):
            m = re.match(r"(AF_\w+), ([A-Z_|]+), ", rest)
            assert m and m[1] in families and re.match(r"SOCK_(STREAM|DGRAM)\b", m[2]), rest
        for rest in self.of("fcntl"):
            assert re.match(r"\d+, F_(GETFL|SETFL|SETFD|DUPFD_CLOEXEC)\b", rest), rest
        gone = {re.search(r'"([^"]*)"', rest)[1] for n, rest in self.calls if n.startswith("unlink")}
        assert gone == set(may_unlink)
        # One program was run, and no child made, in all of its life.
        born = [m[1] for m in map(self.LINE.match, self.before) if m]
        assert born[0] == "execve" and born.count("execve") == 1
        assert not {"clone", "clone3", "fork", "vfork"} & set(born)


@pytest.fixture
def open_scratch():
    """The folder of the peers' files can be passed through."""
    os.chmod(SCRATCH, 0o711)
    yield
    os.chmod(SCRATCH, 0o700)


@pytest.mark.parametrize("kind", ["TCP", "unix"])
def test_s26_a_whole_life_under_strace(folder, open_scratch, kind):
    """Calls used are a subset of those allowed, files opened are those named, through all that the service does."""
    old, new = Pki(), Pki()
    addr = pub(90)
    pub(91)
    trace, hosts, ca = f"{folder}/trace", put(f"{folder}/h/hosts", ""), put(f"{folder}/c/ca.pem", old.root.pem)
    run = f"{folder}/run"
    os.mkdir(run)
    os.chmod(run, 0o777)
    env = {"LKJWT_UID": None, "LKJWT_HOSTS_FILE": hosts, "LKJWT_CA_FILE": ca, "LKJWT_CA_ONLY": "true",
           "LKJWT_JAIL": "require"}
    if kind == "unix":
        env |= {"LIVEKIT_JWT_BIND": f"unix:{run}/public", "LKJWT_METRICS_BIND": f"unix:{run}/metrics"}
    names = lambda pki: {"*.jail.test": pki.leaf(["*.jail.test"])}
    with RedisServer(unixsocketperm="777") as store, Dns() as dns, \
            Homeserver([(addr, PORT)], tls=names(old), sub=by_token) as first, \
            Homeserver([(PUB % 91, PORT)], tls=names(new), sub=by_token) as second:
        os.chmod(store.dir, 0o755)
        env |= {"LIVEKIT_REDIS_URL": store.url("unix" if kind == "unix" else "redis"), "LKJWT_RESOLVER": dns.netloc}
        w = StoreWorld(store, **env)
        w.svc = Service(w.svc.env, argv=[which("strace"), "-D", "-f", "-q", "-s", "200", "-o", trace, BIN],
                        start_timeout=60)
        w.log = Log(w.svc)
        with w:
            check_layers(w.svc)
            events = [e["event"] for e in w.svc.log()]
            assert events.index("JAIL") < events.index("REDIS_UP") < events.index("START")
            fresh = lambda: f"n{next(_fresh)}.jail.test"
            host = fresh()                      # by UDP
            dns.add(f"{host}. A {addr}\n")
            Exchange(w.svc, f"{host}:{PORT}").granted()
            host = fresh()                      # an answer too long for UDP
            dns.add(f"{host}. A {addr}\n")

            def cut(data, rec, transport):
                if transport == "tcp":
                    return dns.resolve(rec)
                reply = rec.reply()
                reply.header.tc = 1
                return reply
            dns.hook(host, "*", cut)
            Exchange(w.svc, f"{host}:{PORT}").granted()
            assert "tcp" in {q[2] for q in dns.queries}
            host = fresh()
            put(hosts, f"{addr} {host}\n")
            wait_for("the new hosts file", lambda: Exchange(w.svc, f"{host}:{PORT}").reply.status == 200)
            put(ca, new.root.pem)               # other authorities
            w.svc.signal(signal.SIGHUP)
            w.svc.wait_event("ANCHORS", 2)
            host = fresh()
            dns.add(f"{host}. A {PUB % 91}\n")
            Exchange(w.svc, f"{host}:{PORT}").granted()
            assert first.requests and second.requests
            left = w.job(T=1500).connected().left()
            stays = w.job().connected()
            left.sent()
            store.restart()                     # a new connection to Redis
            w.svc.wait_event("REDIS_UP", 2, 90)
            assert w.svc.metrics()["lkjwt_redis_up"] == 1
            stays.never_sent()
            w.end()
        assert os.listdir(run) == []
    # The tracer outlives the traced by a moment.
    wait_for("the end of the trace", lambda: "+++ exited with 0 +++" in open(trace, errors="replace").read())
    unix = {f"{run}/public", f"{run}/metrics"} if kind == "unix" else set()
    seen = Trace(trace)
    seen.check({hosts, ca}, {"AF_INET", "AF_INET6"} | ({"AF_UNIX"} if unix else set()), unix)
    opened = " ".join(seen.of("openat"))
    assert hosts in opened and ca in opened


# ---- files that are read again

def drop(svc, anchors, count):
    svc.signal(signal.SIGHUP)
    return svc.wait_event(anchors, count)


class Store:
    """Where a certificate file is, and how another takes its place."""

    def __init__(self, top, pem):
        self.top, self.env = top, {"LKJWT_CA_FILE": f"{top}/etc/ca.pem"}
        self.first(pem)

    def path(self, name):
        return f"{self.top}/{name}"


class Renamed(Store):
    def first(self, pem):
        put(self.path("etc/ca.pem"), pem)
    then = first


class Kubernetes(Store):
    """A mounted secret: ca.pem -> ..data/ca.pem, ..data -> a folder of that version."""
    version = 0

    def first(self, pem):
        self.then(pem)
        link(self.path("etc/ca.pem"), "..data/ca.pem")

    def then(self, pem):
        before, self.version = f"..v{self.version}", self.version + 1
        put(self.path(f"etc/..v{self.version}/ca.pem"), pem)
        link(self.path("etc/..data"), f"..v{self.version}")
        shutil.rmtree(self.path(f"etc/{before}"), ignore_errors=True)


class Linked(Store):
    target = "{top}/store/ca.pem"

    def first(self, pem):
        self.then(pem)
        link(self.path("etc/ca.pem"), self.target.format(top=self.top))

    def then(self, pem):
        put(self.path("store/ca.pem"), pem)


class LinkedFrom(Linked):
    target = "../store/ca.pem"


class LinkedTwice(Linked):
    target = "../mid/ca.pem"

    def first(self, pem):
        super().first(pem)
        link(self.path("mid/ca.pem"), self.path("store/ca.pem"))


class LinkMoves(Store):
    """As certbot keeps them: live/chain.pem -> ../archive/chainN.pem."""
    version = 0

    def first(self, pem):
        self.env = {"LKJWT_CA_FILE": self.path("live/chain.pem")}
        self.then(pem)

    def then(self, pem):
        self.version += 1
        put(self.path(f"archive/chain{self.version}.pem"), pem)
        link(self.path("live/chain.pem"), f"../archive/chain{self.version}.pem")


class InFolderLink(Store):
    """The folder itself is reached by a link."""

    def first(self, pem):
        put(self.path("real/ca.pem"), pem)
        link(self.path("etc"), "real")

    def then(self, pem):
        put(self.path("real/ca.pem"), pem)


class RelativeHere(Renamed):
    def __init__(self, top, pem):
        super().__init__(top, pem)
        self.cwd, self.env = self.path("etc"), {"LKJWT_CA_FILE": "ca.pem"}


class RelativeBelow(Renamed):
    def __init__(self, top, pem):
        super().__init__(top, pem)
        self.cwd, self.env = top, {"LKJWT_CA_FILE": "etc/ca.pem"}


class CertFile(Renamed):
    def __init__(self, top, pem):
        super().__init__(top, pem)
        self.env = {"SSL_CERT_FILE": self.path("etc/ca.pem"), "LKJWT_CA_FILE": None}


class CertDir(Store):
    """A folder: one file goes, another comes."""

    def first(self, pem):
        self.env = {"SSL_CERT_DIR": self.path("certs"), "LKJWT_CA_FILE": None}
        put(self.path("certs/one.pem"), pem)

    def then(self, pem):
        put(self.path("certs/two.pem"), pem)
        if os.path.exists(self.path("certs/one.pem")):
            os.unlink(self.path("certs/one.pem"))


class CertDirOfLinks(Store):
    def first(self, pem):
        self.env = {"SSL_CERT_DIR": self.path("certs"), "LKJWT_CA_FILE": None}
        self.then(pem)
        link(self.path("certs/one.pem"), "../store/one.pem")

    def then(self, pem):
        put(self.path("store/one.pem"), pem)


STORES = {"renamed": Renamed, "Kubernetes": Kubernetes, "link": Linked, "relative link": LinkedFrom,
          "two links": LinkedTwice, "link that moves": LinkMoves, "folder by a link": InFolderLink,
          "relative name": RelativeHere, "relative path": RelativeBelow, "SSL_CERT_FILE": CertFile,
          "SSL_CERT_DIR": CertDir, "SSL_CERT_DIR of links": CertDirOfLinks}


@pytest.fixture(scope="module")
def two(rig):
    """Homeservers of two authorities."""
    other = Pki()
    with Homeserver(tls=other.leaf(ips=["127.0.0.1"])) as hs:
        yield rig.other, hs, rig.pki.root.pem, other.root.pem


def trusts(svc, rig, *servers):
    for hs in servers:
        hs.drop_connections()
    return [svc.post("/sfu/get", rig.body("/sfu/get", hs)).status == 200 for hs in servers]


@pytest.mark.parametrize("kind", STORES)
def test_s26_sighup_reads_replaced_files(rig, folder, two, kind):
    old, new, pem, new_pem = two
    ca = STORES[kind](folder, pem)
    with jailed(rig, cwd=getattr(ca, "cwd", None), LKJWT_JAIL="require", **ca.env) as s:
        check_layers(s)
        assert trusts(s, rig, old, new) == [True, False]
        ca.then(new_pem)
        drop(s, "ANCHORS", 2)
        assert trusts(s, rig, old, new) == [False, True]
        ca.then(pem + new_pem)
        assert drop(s, "ANCHORS", 3)[2]["count"] == "2"
        assert trusts(s, rig, old, new) == [True, True]
        assert not s.events("ANCHORS_BAD")


@pytest.mark.parametrize("mode", ["require", "off"])
@pytest.mark.parametrize("kind", ["a link that leads outside", "a folder that leads outside"])
def test_s26_a_file_elsewhere_cannot_be_opened(rig, folder, two, kind, mode):
    """Landlock: what lies outside the folders known at start stays closed, whatever its own rights say."""
    old, new, pem, new_pem = two
    put(f"{folder}/elsewhere/ca.pem", new_pem)
    ca = put(f"{folder}/etc/ca.pem", pem)
    with jailed(rig, LKJWT_CA_FILE=ca, LKJWT_JAIL=mode) as s:
        if kind == "a link that leads outside":
            link(ca, "../elsewhere/ca.pem")
        else:
            os.rename(f"{folder}/etc", f"{folder}/was")
            link(f"{folder}/etc", "elsewhere")
        if mode == "off":
            drop(s, "ANCHORS", 2)
            assert trusts(s, rig, old, new) == [False, True]
            return
        line = drop(s, "ANCHORS_BAD", 1)
        assert line["var"] == "LKJWT_CA_FILE" and line["detail"], line
        assert trusts(s, rig, old, new) == [True, False]
        if kind == "a link that leads outside":     # back again, and all is well
            put(ca, pem + new_pem)
            drop(s, "ANCHORS", 2)
            assert trusts(s, rig, old, new) == [True, True]


def test_s26_sighup_reads_the_systems_bundle(rig):
    """Where no file is named."""
    with jailed(rig, LKJWT_JAIL="require", LKJWT_CA_FILE=None, LKJWT_CA_ONLY=None) as s:
        check_layers(s)
        before = s.wait_event("ANCHORS")
        after = drop(s, "ANCHORS", 2)[1]
        assert int(before["count"]) > 50
        assert (after["count"], after["sources"]) == (before["count"], before["sources"])


@pytest.mark.parametrize("mode", ["require", "off"])
def test_s26_hosts_file(folder, mode):
    """Rewritten, renamed, linked within its folder: read. Linked elsewhere: not."""
    addr, pki = pub(92), Pki()
    names = [f"n{next(_fresh)}.jail.test" for _ in range(5)]
    text = [f"{addr} {n}\n" for n in names]
    hosts = f"{folder}/h/hosts"                 # not there at first
    os.mkdir(os.path.dirname(hosts))
    put(f"{folder}/elsewhere/hosts", text[4])
    with Homeserver([(addr, PORT)], tls=pki.leaf(["*.jail.test"]), sub=by_token) as hs, \
            Service(outbound_env(ca=pki.ca_file, LKJWT_HOSTS_FILE=hosts, LKJWT_UID=None, LKJWT_JAIL=mode,
                                 LKJWT_METRICS_BIND=metrics_bind())) as s:
        def found(i):
            return Exchange(s, f"{names[i]}:{PORT}").reply.status == 200

        def read(error=None):
            """Once more than before, and so."""
            count = len(s.events("FILES_READ", file=hosts)) + 1

            def ask():
                Exchange(s, f"n{next(_fresh)}.jail.test:{PORT}")
                return len(s.events("FILES_READ", file=hosts)) >= count
            wait_for("FILES_READ", ask)
            line = s.events("FILES_READ", file=hosts)[-1]
            assert line.get("error", "") == (error or ""), line
        Exchange(s, f"n{next(_fresh)}.jail.test:{PORT}").refused("address")
        put(hosts, text[0])
        read()
        assert found(0)
        with open(hosts, "w") as f:
            f.write(text[0] + text[1])
        read()
        assert found(1)
        put(hosts, "".join(text[:3]))
        read()
        assert found(2)
        put(f"{folder}/h/sub/hosts", "".join(text[:4]))
        link(hosts, "sub/hosts")
        read()
        assert found(3)
        link(hosts, "../elsewhere/hosts")
        read(os.strerror(errno.EACCES) if mode == "require" else None)
        assert found(4) is (mode == "off")
        put(hosts, "".join(text))
        read()
        assert found(4)
        assert not hs.errors


@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_s26_resolv_conf(folder, kind):
    """A nameserver of its own for a start in an /etc of its own; then another, as DHCP or systemd-resolved do it."""
    pki, addr = Pki(), pub(93)
    where = f"{folder}/etc/resolv.conf"
    if kind == "a link":
        link(where, f"{folder}/run/resolve/resolv.conf")
        where = f"{folder}/run/resolve/resolv.conf"
    put(where, "nameserver 127.0.0.91\n")
    put(f"{folder}/etc/hosts", "")
    argv = [which("unshare"), "-m", "--", "/bin/sh", "-c", f'mount --bind {folder}/etc /etc && exec {BIN}']
    env = outbound_env(ca=pki.ca_file, LKJWT_RESOLVER=None, LKJWT_UID=None, LKJWT_JAIL="require",
                       PATH=os.environ["PATH"])
    with Homeserver([(addr, PORT)], tls=pki.leaf(["*.jail.test"]), sub=by_token), \
            Dns(addr="127.0.0.91", port=53) as one, Dns(addr="127.0.0.92", port=53) as two:
        for dns in (one, two):
            dns.any_hook = lambda data, rec, transport, dns=dns: any_name(dns, rec, addr)
        with Service(env, argv=argv) as s:
            Exchange(s, f"n{next(_fresh)}.jail.test:{PORT}").granted()
            assert one.count() and not two.count()
            put(where, "nameserver 127.0.0.92\n")
            # looked at once a second
            def moved():
                Exchange(s, f"n{next(_fresh)}.jail.test:{PORT}").granted()
                return two.count()
            wait_for("the new nameserver", moved)
            assert s.stop() == 0


def any_name(dns, rec, addr):
    """The answer of a nameserver where each name has this address."""
    name = str(rec.q.qname)
    if name.lower() not in dns.rrs:
        dns.add(f"{name} A {addr}\n")
    return dns.resolve(rec)


# ---- under the filters of others

KILL, ALLOW, ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 4, 8, 22, 38, 47
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


def numbers():
    """Names and numbers of this machine's calls, by its compiler."""
    got = subprocess.run([which("gcc"), "-E", "-dM", "-x", "c", "-"], input="#include <asm/unistd.h>\n", text=True,
                         capture_output=True, check=True).stdout
    raw = dict(re.findall(r"#define (__NR\w+) (\w+)", got))
    out = {}
    for name, value in raw.items():
        while value in raw:
            value = raw[value]
        if value.isdigit():
            out[name.removeprefix("__NR_").removeprefix("__NR3264_")] = int(value)
    assert out["execve"] in (59, 221), "neither x86_64 nor aarch64"
    return out


class Outer:
    """A seccomp filter around the service: rules of (call, action[, argument, "=" or "&", value]), the first that fits
    decides; then calls by name; then default. A name the machine does not have is none of its calls."""

    def __init__(self, *rules, allow=(), default=ALLOW):
        nr = numbers()
        code = [(0x20, 0, 0, 4), (0x15, 1, 0, AUDIT[platform.machine()]), (0x06, 0, 0, KILL), (0x20, 0, 0, 0)]
        for name, action, *arg in rules:
            if arg:
                jump = 0x15 if arg[1] == "=" else 0x45
                code += [(0x15, 0, 4, nr[name]), (0x20, 0, 0, 16 + 8 * arg[0]), (jump, 0, 1, arg[2]),
                         (0x06, 0, 0, action), (0x20, 0, 0, 0)]
            else:
                code += [(0x15, 0, 1, nr[name]), (0x06, 0, 0, action)]
        for name in allow:
            if name in nr:
                code += [(0x15, 0, 1, nr[name]), (0x06, 0, 0, ALLOW)]
        code.append((0x06, 0, 0, default))
        self.code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
        self.prog = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(self.code)))

    def install(self):
        if libc.prctl(PR_SET_SECCOMP, 2, ctypes.addressof(self.prog), 0, 0):
            raise OSError(ctypes.get_errno(), "no filter")


LANDLOCK = ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")
# What systemd 252 on Debian makes of SystemCallFilter=@system-service ~@privileged ~@resources. Newer ones have
# landlock and seccomp in @system-service, older ones prlimit64 in @resources; what is not allowed kills.
SYSTEMD = """accept accept4 access add_key alarm arch_prctl bind brk capget chdir chmod clock_getres clock_gettime
clock_nanosleep clone clone3 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit
exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fcntl fdatasync fgetxattr flistxattr flock
fork fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex futex_waitv futimesat get_mempolicy get_robust_list
get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp
getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt gettid
gettimeofday getuid getxattr inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy
io_getevents io_pgetevents io_setup io_submit io_uring_enter io_uring_register io_uring_setup ioctl ioprio_get kcmp
keyctl kill lgetxattr link linkat listen listxattr llistxattr lremovexattr lseek lsetxattr lstat madvise membarrier
memfd_create mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect mq_getsetattr mq_notify mq_open
mq_timedreceive mq_timedsend mq_unlink mremap msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
name_to_handle_at nanosleep newfstatat open openat openat2 pause personality pidfd_open pidfd_send_signal pipe pipe2
poll ppoll prctl pread64 preadv preadv2 prlimit64 process_madvise process_vm_readv process_vm_writev pselect6 pwrite64
pwritev pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr rename
renameat renameat2 request_key restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_yield select semctl semget
semop semtimedop sendfile sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid setgid
setitimer setns setpgid setregid setresgid setsid setsockopt setxattr shmat shmctl shmdt shmget shutdown sigaltstack
signalfd signalfd4 socket socketpair splice stat statfs statx symlink symlinkat sync sync_file_range syncfs sysinfo tee
tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime
timerfd_settime times tkill truncate umask uname unlink unlinkat unshare userfaultfd utime utimensat utimes vfork
vmsplice wait4 waitid write writev""".split()
FAMILIES = [("socket", ALLOW, 0, "=", 2), ("socket", ALLOW, 0, "=", 10), ("socket", ERRNO | errno.EAFNOSUPPORT)]
NO_EXEC = [("mprotect", ERRNO | errno.EPERM, 2, "&", 4), ("pkey_mprotect", ERRNO | errno.EPERM, 2, "&", 4)]


def refuse(*names, how=errno.EPERM):
    return [(name, ERRNO | how) for name in names]


def no_prctl(option, how=errno.EPERM):
    return [("prctl", ERRNO | how, 0, "=", option)]


OUTER = {  # who starts it, rules, names allowed (else killed); what is missing then
    "systemd": ("user", [], SYSTEMD, ["landlock"]),
    "systemd, newer": ("user", [], [*SYSTEMD, *LANDLOCK, "seccomp"], []),
    "systemd, older": ("user", [("prlimit64", KILL)], SYSTEMD, ["core", "landlock"]),
    "systemd, families, no executable memory": ("user", FAMILIES + NO_EXEC, SYSTEMD, ["landlock"]),
    "systemd, root to stay": ("stay", [], SYSTEMD, ["ids", "caps", "landlock"]),
    "root to stay, no capset": ("stay", refuse("capset"), (), ["ids", "caps"]),
    "root to stay, a capset that does nothing": ("stay", refuse("capset", how=0), (), ["ids", "caps"]),
    "root to stay, no capget": ("stay", refuse("capget"), (), ["ids", "caps"]),
    "root, capset kills": ("root", [("capset", KILL)], (), []),
    "a user with capabilities, capset kills": ("holder", [("capset", KILL)], (), ["caps"]),
    "a filter that allows all": ("root", [], (), []),
    "families": ("root", FAMILIES, (), []),
    "kernel without landlock": ("root", refuse(*LANDLOCK, how=errno.ENOSYS), (), ["landlock"]),
    "landlock not enabled": ("root", refuse(*LANDLOCK, how=errno.EOPNOTSUPP), (), ["landlock"]),
    "older Docker": ("user", refuse(*LANDLOCK, "clone3", "seccomp", "unshare", "setns", "mount", "bpf"), (),
                     ["landlock"]),
    "landlock only asked": ("root", refuse("landlock_restrict_self"), (), ["landlock"]),
    "kernel without seccomp": ("root", no_prctl(PR_SET_SECCOMP, errno.EINVAL), (), ["seccomp"]),
    "no limits": ("root", refuse("prlimit64"), (), ["core"]),
    "no setuid": ("root", refuse("setuid"), (), ["ids"]),
    "no setgroups": ("root", refuse("setgroups"), (), ["ids"]),
    "dumpable": ("root", no_prctl(PR_SET_DUMPABLE), (), ["dump"]),
    # Both of the layers behind it ask for it.
    "new privileges": ("root", no_prctl(PR_SET_NO_NEW_PRIVS), (), ["privs", "landlock", "seccomp"]),
    "nothing": ("user", refuse(*LANDLOCK, "prlimit64") + no_prctl(PR_SET_NO_NEW_PRIVS) + no_prctl(PR_SET_SECCOMP)
                + no_prctl(PR_SET_DUMPABLE), (), ["core", "privs", "dump", "landlock", "seccomp"]),
}


def keep_ambient(cap):
    """After setuid() with PR_SET_KEEPCAPS: this one alone, over execve."""
    sets = struct.pack("6I", 1 << cap, 1 << cap, 1 << cap, 0, 0, 0)
    if libc.capset(struct.pack("Ii", 0x20080522, 0), sets) or libc.prctl(PR_CAP_AMBIENT, 2, cap, 0, 0):
        raise OSError(ctypes.get_errno(), "no capability")


def outer_start(kind):
    who, rules, allow, missing = OUTER[kind]
    outer = Outer(*rules, allow=allow, default=KILL if allow else ALLOW)

    def start():
        want_core()
        if who == "holder":
            libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
            os.setgroups([])
            os.setgid(4243)
            os.setuid(4242)
            keep_ambient(10)
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if who == "user":
            os.setgroups([])
            os.setgid(4243)
        if kind.startswith("systemd") and who == "user":
            os.setuid(4242)                     # first, as systemd does: the filter kills on it
            libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            outer.install()
        else:
            outer.install()
            if who == "user":
                os.setuid(4242)
    return start, {"LKJWT_UID": "0" if who == "stay" else None}, missing


@pytest.mark.parametrize("kind", OUTER)
def test_auto_goes_on_under_another_filter(rig, folder, kind):
    """Serves with the layers that there can be, names the others, and leaves no core file of a trial."""
    start, env, missing = outer_start(kind)
    os.chmod(folder, 0o777)
    with jailed(rig, start, cwd=folder, **env) as s:
        check_layers(s, *missing)
        filters = int(status(s.pid).get("Seccomp_filters", 1 + ("seccomp" not in missing)))
        assert filters == 1 + ("seccomp" not in missing)
        use(s, rig)
        s.signal(signal.SIGHUP)
        s.wait_event("ANCHORS", 2)
        assert s.request("GET", "/healthz").status == 200
        assert not open(f"/proc/{s.pid}/task/{s.pid}/children").read()
        assert s.stop() == 0
    assert os.listdir(folder) == []


@pytest.mark.parametrize("kind", OUTER)
def test_require_ends_under_another_filter(rig, kind):
    """Exit 1 with the missing layer named; serves where none is missing, or only what LKJWT_UID=0 gave up."""
    start, env, missing = outer_start(kind)
    s = jailed(rig, start, LKJWT_JAIL="require", **env)
    s._wait = not set(missing) - ({"ids"} if env["LKJWT_UID"] == "0" else set())
    with s:
        if s._wait:
            check_layers(s, *missing)
            return
        assert s.wait() == 1, s.log_text()
        line = s.wait_event("JAIL_BAD")
        assert (line["num"], line["level"], line["missing"]) == ("1014", "error", ",".join(missing))
        assert not s.events("START")


@pytest.mark.parametrize("how", ["kills", "refuses", "allows"])
def test_few_descriptors_are_heeded_under_another_filter(rig, how):
    """Fewer clients, said so, also where prlimit64 cannot be asked."""
    outer = Outer(*{"kills": [("prlimit64", KILL)], "refuses": refuse("prlimit64"), "allows": []}[how])

    def start():
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
        outer.install()
    with jailed(rig, start) as s:
        check_layers(s, *([] if how == "allows" else ["core"]))
        line = s.wait_event("CONFIG_WARN", var="LKJWT_MAX_CONNS")
        assert "400" in line["detail"], line
        use(s, rig)


def test_a_trial_needs_no_sigchld(rig):
    """A supervisor may have had its children reaped by the kernel."""
    outer = Outer()

    def start():
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        outer.install()
    with jailed(rig, start, LKJWT_JAIL="require") as s:
        check_layers(s)


def test_no_socket_of_another_family(rig):
    """A filter that would kill on AF_UNIX, AF_NETLINK and AF_PACKET is never met."""
    outer = Outer(*[("socket", KILL, 0, "=", f) for f in (1, 16, 17)])
    with jailed(rig, outer.install) as s:
        check_layers(s)
        use(s, rig)


# ---- in a container

def boxed(rig, uid, *more, **env):
    """bubblewrap: the binary and one folder in an empty read-only root, no capability, as PID 1."""
    argv = [which("bwrap"), "--unshare-user", "--uid", str(uid), "--gid", str(uid), "--cap-drop", "ALL",
            "--unshare-pid", "--as-pid-1", "--unshare-ipc", "--unshare-uts", "--ro-bind", BIN, "/lkjwt", *more, "--remount-ro", "/",
            "--die-with-parent", "/lkjwt"]
    return jailed(rig, argv=argv, PATH=os.environ["PATH"], **env)


@pytest.mark.parametrize("uid", [1, 1000, 65534, 1_234_567_890])
def test_s26_any_uid_read_only_root_pid_1(rig, folder, two, uid):
    old, new, pem, new_pem = two
    put(f"{folder}/ca.pem", pem)
    with boxed(rig, uid, "--ro-bind", folder, "/cas", LKJWT_CA_FILE="/cas/ca.pem", LKJWT_JAIL="require") as s:
        pid = inner_pid(s)
        check_layers(s)
        now = status(pid)
        assert (now["Seccomp"], now["NoNewPrivs"], now["NSpid"].split()[-1]) == ("2", "1", "1")
        assert {now[c] for c in ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd")} == {"0" * 16}
        assert open(f"/proc/{pid}/uid_map").read().split()[0] == str(uid)
        assert core_limit(pid) == ["0", "0"]
        assert trusts(s, rig, old, new) == [True, False]
        put(f"{folder}/ca.pem", new_pem)
        os.kill(pid, signal.SIGHUP)
        s.wait_event("ANCHORS", 2)
        assert trusts(s, rig, old, new) == [False, True]
        os.kill(pid, signal.SIGTERM)
        assert s.wait() == 0


@pytest.mark.parametrize("uid_env, missing", [(None, ["ids"]), ("0", ["ids"])], ids=["to leave root", "to stay"])
def test_root_of_a_user_namespace(rig, uid_env, missing):
    """A root that has no other ids to become, as in a container without its own range."""
    for mode in ("auto", "require"):
        s = boxed(rig, 0, "--ro-bind", os.path.dirname(public_ca(rig.pki)), "/cas", LKJWT_UID=uid_env, LKJWT_JAIL=mode,
                  LKJWT_CA_FILE="/cas/ca.pem")
        s._wait = mode == "auto" or uid_env == "0"
        with s:
            if s._wait:
                check_layers(s, *missing)
                use(s, rig, has_proc=False)
                os.kill(inner_pid(s), signal.SIGTERM)
                assert s.wait() == 0
            else:
                assert s.wait() == 1
                assert s.wait_event("JAIL_BAD")["missing"] == "ids"
