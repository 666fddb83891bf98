"""PROTOCOL.md 14: bind forms, sockets in the file system, the health check of each."""
import ctypes
import errno
import os
import socket
import stat
import struct
import subprocess
import sys
import time

import pytest

from exchange import check_granted
from peers import RawServer
from service import BIN, Service, base_env, dial, free_port, run_cli

HEALTHCHECK = "lk-jwt-service-healthcheck"


@pytest.fixture
def link(tmp_path):
    """The binary under the name of the image's probe."""
    path = tmp_path / HEALTHCHECK
    path.symlink_to(BIN)
    return str(path)


def probes(env, link):
    """The health check by each of its names; all must agree."""
    got = [run_cli(["--healthcheck"], env), run_cli([], env, executable=link, argv0=link),
           run_cli([], env, argv0=HEALTHCHECK), run_cli([], env, argv0=f"/x/y/{HEALTHCHECK}")]
    assert len({g.code for g in got}) == 1, got
    for g in got:
        if g.code:
            assert g.code == 1 and g.out.endswith("\n") and g.out.count("\n") == 1 and g.out.strip(), g
        else:
            assert g.err == "", g
    return got[0].code


def reachable(host, port):
    try:
        socket.create_connection((host, port), 2).close()
        return True
    except OSError:
        return False


FORMS = {  # value: addresses that must answer, addresses that must not
    "127.0.0.1:{p}": (["127.0.0.1"], ["::1", "127.0.0.2"]),
    "127.0.0.2:{p}": (["127.0.0.2"], ["127.0.0.1", "::1"]),
    ":{p}": (["127.0.0.1", "::1", "127.0.0.2"], []),
    "{p}": (["127.0.0.1", "::1"], []),
    "0.0.0.0:{p}": (["127.0.0.1", "127.0.0.2"], ["::1"]),
    "[::]:{p}": (["127.0.0.1", "::1"], []),
    "[::1]:{p}": (["::1"], ["127.0.0.1"]),
    "[0:0:0:0:0:0:0:1]:{p}": (["::1"], ["127.0.0.1"]),
    "localhost:{p}": (["127.0.0.1"], ["127.0.0.2"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_tcp_form(form, link):
    port, (yes, no) = free_port(), FORMS[form]
    env = base_env(LIVEKIT_JWT_BIND=form.format(p=port))
    s = Service(env)
    s.bind = f"{yes[0]}:{port}" if ":" not in yes[0] else f"[{yes[0]}]:{port}"
    with s:
        assert [h for h in yes if not reachable(h, port)] == []
        assert [h for h in no if reachable(h, port)] == []
        assert str(port) in s.wait_event("START")["listen"]
        assert probes(env, link) == 0
        assert s.stop() == 0
    assert probes(env, link) == 1


def test_port_variable(link):
    port = free_port()
    env = base_env(LIVEKIT_JWT_PORT=port)
    with Service(env) as s:
        assert reachable("::1", port) and reachable("127.0.0.1", port)
        assert probes(env, link) == 0
        assert s.stop() == 0
    assert probes(env, link) == 1


def test_default_is_8080(link):
    env = base_env(LIVEKIT_JWT_BIND="")
    with Service(env) as s:
        assert reachable("127.0.0.1", 8080) and reachable("::1", 8080)
        assert probes(env, link) == 0
        # A health check needs no more of the environment than the bind.
        assert run_cli([], {}, argv0=HEALTHCHECK).code == 0
        assert s.stop() == 0
    assert probes(env, link) == 1


def test_port_0_tells_the_real_one():
    with Service(base_env(LIVEKIT_JWT_BIND="127.0.0.1:0")) as s:
        assert s.port > 0 and s.request("GET", "/healthz").status == 200


def only_families(*families):
    """socket() of any other family fails, as with systemd's RestrictAddressFamilies= or a kernel without it."""
    libc = ctypes.CDLL(None, use_errno=True)
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]
    nr = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
    n = len(families)
    allow, deny = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | errno.EAFNOSUPPORT)
    code = [(0x20, 0, 0, 4), (0x15, 0, n + 4, arch), (0x20, 0, 0, 0), (0x15, 0, n + 2, nr), (0x20, 0, 0, 16),
            *[(0x15, n - i, 0, f) for i, f in enumerate(families)], deny, allow]
    text = b"".join(struct.pack("HBBI", *c) for c in code)
    buf = ctypes.create_string_buffer(text)
    prog = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buf))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, prog, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def test_without_ipv6(link):
    port = free_port()
    env = base_env(LIVEKIT_JWT_BIND=f":{port}")
    def no_v6():
        only_families(socket.AF_INET)
    with Service(env, preexec_fn=no_v6) as s:
        assert reachable("127.0.0.1", port) and not reachable("::1", port)
        done = subprocess.run([link], env=env, preexec_fn=no_v6, timeout=10)
        assert done.returncode == 0
        assert s.stop() == 0


def test_needs_no_unix_and_no_netlink_socket(rig):
    """RestrictAddressFamilies=AF_INET AF_INET6: an exchange and a health check."""
    def inet():
        only_families(socket.AF_INET, socket.AF_INET6)
    with pytest.raises(subprocess.CalledProcessError):      # the filter itself bites
        subprocess.run([sys.executable, "-c", "import socket; socket.socket(socket.AF_UNIX)"], preexec_fn=inet, check=True,
                       stderr=subprocess.DEVNULL)
    env = rig.env(LIVEKIT_JWT_BIND=f":{free_port()}", LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}")
    with Service(env, preexec_fn=inet) as s:
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))
        assert s.metrics()
        assert subprocess.run([BIN, "--healthcheck"], env=env, preexec_fn=inet, timeout=10).returncode == 0
        assert s.stop() == 0


@pytest.mark.parametrize("form", ["unix:{}", "{}"])
def test_unix_socket(form, tmp_path, link):
    path = tmp_path / "s o.sock"
    env = base_env(LIVEKIT_JWT_BIND=form.format(path))
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0, 0o666)):
        with Service(env, preexec_fn=lambda: os.umask(umask)) as s:
            assert stat.S_ISSOCK(path.stat().st_mode) and stat.S_IMODE(path.stat().st_mode) == mode
            assert s.request("GET", "/healthz").status == 200
            assert s.request("POST", "/get_token", "").status == 400
            assert probes(env, link) == 0
            assert s.stop() == 0
        assert not path.exists()
    assert probes(env, link) == 1


def test_stale_unix_socket_is_replaced(tmp_path, link):
    path = tmp_path / "s.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.listen()
    stale.close()
    env = base_env(LIVEKIT_JWT_BIND=f"unix:{path}")
    assert probes(env, link) == 1
    with Service(env) as s:
        assert probes(env, link) == 0
        # And what is alive is not taken away.
        got = run_cli([], env, timeout=15)
        assert got.code == 1 and got.err
        assert probes(env, link) == 0
        assert s.stop() == 0


@pytest.mark.parametrize("what", ["file", "folder", "no folder", "too long"])
def test_unix_path_that_cannot_be(tmp_path, what):
    path = tmp_path / "x"
    if what == "file":
        path.write_text("precious")
    elif what == "folder":
        path.mkdir()
    elif what == "no folder":
        path = tmp_path / "none" / "x"
    else:
        path = tmp_path / ("x" * 120)
    got = run_cli([], base_env(LIVEKIT_JWT_BIND=f"unix:{path}"), timeout=15)
    assert got.code == 1 and got.err
    assert what != "file" or path.read_text() == "precious"
    assert what != "folder" or path.is_dir()


@pytest.mark.parametrize("form", ["127.0.0.1:{p}", ":{p}", "[::1]:{p}", "{p}"])
def test_port_in_use(form):
    port = free_port()
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        taken.bind(("::", port))
        taken.listen()
        got = run_cli([], base_env(LIVEKIT_JWT_BIND=form.format(p=port)), timeout=15)
        assert got.code == 1 and str(port) in got.err, got


def test_restart_on_the_same_port_at_once():
    """Connections of the old process in TIME_WAIT do not block the new one."""
    port = free_port()
    for _ in range(3):
        with Service(base_env(LIVEKIT_JWT_BIND=f"127.0.0.1:{port}")) as s:
            with s.wire() as w:
                w.send(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
                assert w.reply().status == 200
                assert s.stop() == 0


ANSWERS = {
    "500": b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", "503": b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n",
    "204": b"HTTP/1.1 204 X\r\n\r\n", "301": b"HTTP/1.1 301 X\r\nLocation: /healthz\r\nContent-Length: 0\r\n\r\n",
    "2000": b"HTTP/1.1 2000 X\r\n\r\n", "no HTTP": b"hello\r\n\r\n", "nothing": b"", "cut": b"HTTP/1.1 20",
    "other version": b"HTTP/2.0 200 X\r\n\r\n", "endless": b"x" * 200000,
}


@pytest.mark.parametrize("row", ANSWERS)
def test_health_check_of_something_else(row, link):
    def talk(sock, _):
        sock.recv(4096)
        sock.sendall(ANSWERS[row])
    with RawServer(talk) as server:
        assert probes(base_env(LIVEKIT_JWT_BIND=f"127.0.0.1:{server.port}"), link) == 1


def test_health_check_accepts_only_200_and_asks_rightly(link):
    seen = []

    def talk(sock, _):
        seen.append(sock.recv(4096))
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    with RawServer(talk) as server:
        assert probes(base_env(LIVEKIT_JWT_BIND=f"127.0.0.1:{server.port}"), link) == 0
    assert all(r.startswith(b"GET /healthz HTTP/1.") and b"\r\nHost: " in r for r in seen), seen


@pytest.mark.parametrize("behaviour", ["silent", "dribble"])
def test_health_check_ends_by_itself(behaviour, link):
    """A server that hangs: under 3 s, so an orchestrator sees the reason."""
    def talk(sock, _):
        sock.recv(4096)
        while True:
            if behaviour == "dribble":
                sock.sendall(b"H")
            time.sleep(0.3)
    with RawServer(talk) as server:
        got = run_cli([], base_env(LIVEKIT_JWT_BIND=f"127.0.0.1:{server.port}"), argv0=HEALTHCHECK, timeout=5)
        assert got.code == 1 and got.out.count("\n") == 1


def test_health_check_falls_through_to_the_other_family(link):
    """`:P` asks 127.0.0.1 first; a service that only has [::1] is found too."""
    port = free_port()
    s = Service(base_env(LIVEKIT_JWT_BIND=f"[::1]:{port}"))
    with s:
        assert run_cli([], base_env(LIVEKIT_JWT_BIND=f":{port}"), argv0=HEALTHCHECK).code == 0
        assert run_cli([], base_env(LIVEKIT_JWT_BIND=f"[::]:{port}"), argv0=HEALTHCHECK).code == 0
        assert run_cli([], base_env(LIVEKIT_JWT_BIND=f"0.0.0.0:{port}"), argv0=HEALTHCHECK).code == 1
        assert run_cli([], base_env(LIVEKIT_JWT_BIND=f"127.0.0.1:{port}"), argv0=HEALTHCHECK).code == 1


def test_health_check_refuses_a_bad_bind(link):
    for bind in ("nonsense", "127.0.0.1:x", "unix:"):
        assert probes(base_env(LIVEKIT_JWT_BIND=bind), link) == 1


@pytest.mark.parametrize("name", ["lkjwt", "lk-jwt-service", "/lk-jwt-service", "whatever"])
def test_served_under_any_other_name(name, tmp_path):
    path = tmp_path / os.path.basename(name)
    path.symlink_to(BIN)
    env = base_env(LIVEKIT_JWT_BIND=f"127.0.0.1:{free_port()}")
    with Service(env, argv=[str(path)]) as s:
        dial(s.bind).close()
        assert s.stop() == 0
