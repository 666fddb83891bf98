"""The proxy snippets of deploy/proxies, each loaded by its proxy: exchanges
under the stripped prefix, preflights, what must stay inside, the SFU's
WebSocket, .well-known."""
import base64
import hashlib
import json
import os
import re
import ssl
from types import SimpleNamespace

import pytest
import yaml

from exchange import alias, check_token, identity
from peers import Nginx, Process, RawServer, accepts, which
from service import Wire, dial, free_port
from tools import BIN, DEPLOY, snippet

HOST, NAME = "matrix-rtc.example.org", "example.org"
WELL_KNOWN = "/.well-known/matrix/client"
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def websocket(conn, _):
    """An SFU that says what it was asked, then echoes."""
    head = b""
    while b"\r\n\r\n" not in head:
        data = conn.recv(4096)
        if not data:
            return
        head += data
    key = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)[1]
    accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
    conn.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n" + head.split(b"\r\n")[0] + b"\n")
    while data := conn.recv(4096):
        conn.sendall(data)


# ---- each proxy, from its snippet: (where, folder) -> a running process

def nginx(at, folder):
    text = snippet("proxies/nginx.conf",
                   ("listen 443 ssl", f"listen 127.0.0.1:{at.port} ssl"),
                   (f"/etc/ssl/{HOST}.pem", at.chain), (f"/etc/ssl/{HOST}.key", at.key),
                   (f"/etc/ssl/{NAME}.pem", at.chain), (f"/etc/ssl/{NAME}.key", at.key),
                   ("127.0.0.1:8080", f"127.0.0.1:{at.lkjwt}"), ("127.0.0.1:7880", f"127.0.0.1:{at.sfu}"),
                   ("/srv/well-known/", f"{DEPLOY}/well-known/"))
    return Nginx(text, "127.0.0.1", at.port)


def haproxy(at, folder):
    (folder / "pem").write_bytes(open(at.chain, "rb").read() + open(at.key, "rb").read())
    (folder / "cfg").write_text(snippet(
        "proxies/haproxy.cfg", ("bind :443", f"bind 127.0.0.1:{at.port}"),
        (f"/etc/ssl/{HOST}.pem", folder / "pem"),
        ("127.0.0.1:8080", f"127.0.0.1:{at.lkjwt}"), ("127.0.0.1:7880", f"127.0.0.1:{at.sfu}")))
    return Process([which("haproxy"), "-db", "-f", str(folder / "cfg")], lambda: accepts("127.0.0.1", at.port))


def caddy(at, folder):
    site = f":{at.port} {{\n\tbind 127.0.0.1\n\ttls {at.chain} {at.key}\n"
    text = snippet("proxies/Caddyfile", (f"\n{HOST} {{\n", f"\n{HOST}{site}"), (f"\n{NAME} {{\n", f"\n{NAME}{site}"))
    (folder / "Caddyfile").write_text("{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + text)
    (folder / "www").mkdir()
    (folder / "www" / ".well-known").symlink_to(DEPLOY / "well-known")
    env = {"HOME": str(folder), "PATH": os.environ["PATH"], "LKJWT_UPSTREAM": f"127.0.0.1:{at.lkjwt}",
           "LIVEKIT_UPSTREAM": f"127.0.0.1:{at.sfu}", "WELL_KNOWN_ROOT": str(folder / "www")}
    return Process([str(BIN / "caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")],
                   lambda: accepts("127.0.0.1", at.port), env=env)


class Place:
    """Where things are, and requests to the proxy there."""

    def __init__(self, pki, lkjwt, sfu):
        self.port, self.lkjwt, self.sfu = free_port(), lkjwt.port, sfu.port
        self.chain, self.key = pki.leaf([HOST, NAME]).files()
        self.tls = ssl.create_default_context(cafile=pki.ca_file)
        self.tls.set_alpn_protocols(["http/1.1"])

    def wire(self, host=HOST):
        return Wire(self.tls.wrap_socket(dial(f"127.0.0.1:{self.port}"), server_hostname=host))

    def ask(self, method, path, body=b"", headers=(), host=HOST):
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n"
        head += "".join(f"{k}: {v}\r\n" for k, v in headers) + f"Content-Length: {len(body)}\r\n\r\n"
        with self.wire(host) as w:
            w.send(head.encode() + body)
            return w.reply(method)


PROXIES = {"nginx": nginx, "haproxy": haproxy, "caddy": caddy}
SERVES_FILES = {"nginx", "caddy"}


@pytest.fixture(scope="module", params=PROXIES)
def behind(request, rig, pki, tmp_path_factory):
    with rig.service(LIVEKIT_LOG_LEVEL="debug") as service, RawServer(websocket) as sfu:
        at = Place(pki, service, sfu)
        with PROXIES[request.param](at, tmp_path_factory.mktemp(request.param)):
            yield SimpleNamespace(ask=at.ask, wire=at.wire, service=service, name=request.param)
        assert service.stop() == 0


@pytest.mark.parametrize("slash", ["/", "//"])
@pytest.mark.parametrize("path", ["/get_token", "/sfu/get"])
def test_exchange(behind, rig, path, slash):
    """A preflight and the exchange that follows it; a base URL that ends in a slash makes two of them."""
    path_there = "/livekit/jwt" + slash.removesuffix("/") + path
    preflight = behind.ask("OPTIONS", path_there, headers=[
        ("Origin", "https://call.example"), ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "content-type")])
    assert preflight.status in (200, 204), preflight
    sub, token = rig.user(rig.full)
    reply = behind.ask("POST", path_there, json.dumps(rig.body(path, rig.full, sub, token)).encode(),
                       [("Origin", "https://call.example"), ("Content-Type", "application/json")])
    assert reply.status == 200, reply
    for r in (preflight, reply):
        assert r.header("Access-Control-Allow-Origin") == "*" and r.header("Access-Control-Allow-Methods") == "POST"
    assert reply.header("Content-Type") == "application/json" and reply.header("X-Request-Id")
    check_token(reply.json["jwt"], identity(path, sub), alias("!room:example.org"))


ROWS = {
    # what a client sends: method, path, body; what it gets: status, errcode; whether lkjwt sees it
    "healthz": ("GET", "/livekit/jwt/healthz", b"", 200, None, True),
    "probe for delegation": ("POST", "/livekit/jwt/delegate_delayed_leave", b"", 400, "M_NOT_JSON", True),
    "false token": ("POST", "/livekit/jwt/sfu/get", "401", 401, "M_UNAUTHORIZED", True),
    "large body": ("POST", "/livekit/jwt/get_token", b"x" * 70000, 413, "M_TOO_LARGE", True),
    "webhook": ("POST", "/livekit/jwt/sfu_webhook", b"{}", 404, None, False),
    "metrics": ("GET", "/livekit/jwt/metrics", b"", 404, None, True),
    "other path": ("GET", "/livekit/other", b"", None, None, False),
}


@pytest.mark.parametrize("method, path, body, status, errcode, sees", ROWS.values(), ids=ROWS)
def test_request(behind, rig, method, path, body, status, errcode, sees):
    if body == "401":
        body = json.dumps(rig.body("/sfu/get", rig.full, token="nobody-gave-this")).encode()
    before = len(behind.service.log())
    reply = behind.ask(method, path, body)
    if status is None:      # the proxy's own way to say that there is nothing
        assert reply.status in (200, 404, 503) and b"jwt" not in reply.body, reply
    else:
        assert reply.status == status, reply
    if errcode:
        assert reply.errcode == errcode and reply.header("Access-Control-Allow-Origin") == "*"
    marker = f"/marker-{before}"
    behind.service.request("GET", marker)
    behind.service.wait_event("REQUEST", path=marker)
    log = behind.service.log()[before:]
    paths = {e["path"] for e in log if e["event"] == "REQUEST"} - {marker}
    assert sees or not paths, log


def test_kept_connections(behind, rig):
    """The proxy's pool of connections to lkjwt, used for a while: never a 502."""
    statuses = [behind.ask("POST", "/livekit/jwt/sfu/get", json.dumps(rig.body("/sfu/get", rig.other)).encode()).status
                for _ in range(40)]
    assert statuses == [200] * 40


def test_websocket_of_the_sfu(behind):
    with behind.wire() as w:
        w.send(f"GET /livekit/sfu/rtc?access_token=x HTTP/1.1\r\nHost: {HOST}\r\nConnection: Upgrade\r\n"
               "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
               f"Sec-WebSocket-Key: {base64.b64encode(b'0' * 16).decode()}\r\n\r\n".encode())
        got = b""
        while not got.partition(b"\r\n\r\n")[2].endswith(b"\n"):
            got += w.sock.recv(4096)
        head, _, first = got.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), got
        assert first == b"GET /rtc?access_token=x HTTP/1.1\n"
        w.send(b"\x82\x05hello")
        echo = b""
        while len(echo) < 7:
            echo += w.sock.recv(4096)
        assert echo == b"\x82\x05hello"


def test_well_known(behind):
    """What the proxy serves is the file, for scripts of every origin."""
    reply = behind.ask("GET", WELL_KNOWN, host=NAME)
    if behind.name not in SERVES_FILES:
        assert reply.status in (404, 503)
        return
    assert reply.status == 200 and reply.json == json.loads((DEPLOY / "well-known/matrix/client").read_text())
    assert reply.header("Access-Control-Allow-Origin") == "*"
    assert reply.header("Content-Type").split(";")[0] == "application/json"


def test_traefik_names():
    """Traefik cannot be had here, and its snippet says so; at least every name in it leads somewhere, and both
    prefixes are stripped."""
    text = (DEPLOY / "proxies/traefik.yaml").read_text()
    assert text.startswith("# Untested")
    http = yaml.safe_load(text)["http"]
    assert set(http) == {"routers", "middlewares", "services"}
    for name, router in http["routers"].items():
        prefix = re.search(r"PathPrefix\(`(\S+)/`\)", router["rule"])[1]
        strip, = router["middlewares"]
        assert http["middlewares"][strip] == {"stripPrefix": {"prefixes": [prefix]}}
        assert f"Host(`{HOST}`)" in router["rule"] and router["service"] == name and "tls" in router
    assert set(http["services"]) == set(http["routers"])
    assert "!Path(`/livekit/jwt/sfu_webhook`)" in http["routers"]["lkjwt"]["rule"]
