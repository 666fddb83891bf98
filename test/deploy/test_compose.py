"""deploy/compose.yaml brought up without a container engine: each service a
real program in a root of its own (bubblewrap), with the command, environment,
secrets and volumes that the file gives it, after the commands of its header.
Only what needs the internet is changed: Caddy's authority, LiveKit's address.
The ports are the file's own, in the suite's own network."""
import base64
import json
import os
import re
import shutil
import ssl
from types import SimpleNamespace

import jwt as pyjwt
import pytest
import yaml

from exchange import alias, hashed, make_body
from peers import Homeserver, Process, Reply, accepts, wait_for, which
from service import BIN as LKJWT, CANARY_TOKEN, Wire, dial
from tools import BIN, DEPLOY, run, tool

DOMAIN = "home.test"
RTC = f"matrix-rtc.{DOMAIN}"
HOME = "127.0.0.2"      # the homeserver; all else is on 127.0.0.1
USER = f"@alice:{DOMAIN}"
ENGINE = {              # what stands for an image: program, and how it starts where the file does not say
    "lkjwt": (LKJWT, ["/lk-jwt-service"]),
    "livekit": (BIN / "livekit-server", ["/livekit-server"]),
    "redis": (None, None),
    "caddy": (BIN / "caddy", ["/caddy", "run", "--adapter", "caddyfile", "--config", "/etc/caddy/Caddyfile"]),
}


class Stack:
    def __init__(self, folder, pki):
        self.dir, self.running = folder, {}
        self.own = shutil.copytree(DEPLOY, folder / "deploy", ignore=shutil.ignore_patterns("helm", "kubernetes*"))
        self.prepare()
        self.change("proxies/Caddyfile", "\nmatrix-rtc.",
                    "{\n\tadmin off\n\tdefault_bind 127.0.0.1\n\tlocal_certs\n\tskip_install_trust\n}\n\nmatrix-rtc.")
        self.change("compose/livekit.yaml", "use_external_ip: true",
                    "node_ip: 127.0.0.1\n  ips: {includes: [127.0.0.1/32]}\n  enable_loopback_candidate: true")
        self.services = yaml.safe_load(tool("compose", "compose.yaml", cwd=self.own)[0])["services"]
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost " + " ".join(self.services) + f" {RTC}\n{HOME} {DOMAIN}\n")
        self.ca = pki.ca_file

    def prepare(self):
        """The commands in the file's header, but those for a container engine and for another owner."""
        head = (self.own / "compose.yaml").read_text().split("\n#\n")[0]
        lines = re.sub(r" \\\n#\s+", " ", head).replace("your.domain", DOMAIN).splitlines()[1:]
        lines = [line.removeprefix("#   ").replace("chown 1000", "true") for line in lines if "docker" not in line]
        assert len(lines) == 3
        for line in lines:
            run("sh", "-ec", line, cwd=self.own)
        assert "example.org" not in (self.own / "compose.yaml").read_text()

    def change(self, path, old, new):
        text = (self.own / path).read_text()
        assert text.count(old) == 1, path
        (self.own / path).write_text(text.replace(old, new))

    def argv(self, name, command=None):
        """bubblewrap's command line for that service."""
        service, (program, start) = self.services[name], ENGINE[name]
        command = command or (start or []) + [str(w) for w in service.get("command") or []]
        argv = [which("bwrap"), "--die-with-parent", "--unshare-pid", "--dev", "/dev", "--proc", "/proc"]
        if name == "lkjwt":     # nothing but the binary, as in the image
            uid, gid = service["user"].split(":")
            argv += ["--unshare-user", "--uid", uid, "--gid", gid, "--cap-drop", service["cap_drop"][0],
                     "--ro-bind", self.ca, "/etc/ssl/certs/ca-certificates.crt"]
        else:
            argv += ["--ro-bind", "/usr", "/usr"]
            for top in ("bin", "lib", "lib64"):
                argv += ["--symlink", f"usr/{top}", f"/{top}"]
            argv += ["--tmpfs", "/tmp"]
        if program:
            argv += ["--ro-bind", program, command[0]]
        argv += ["--ro-bind", self.hosts, "/etc/hosts"]
        for secret in service.get("secrets", []):
            argv += ["--ro-bind", self.own / "compose" / secret["source"], secret["target"]]
        for volume in service.get("volumes", []):
            here = volume["source"]
            if volume["type"] == "volume":
                here = self.dir / "volumes" / volume["source"]
                here.mkdir(parents=True, exist_ok=True)
                argv += ["--chdir", volume["target"]]
            argv += ["--ro-bind" if volume.get("read_only") else "--bind", here, volume["target"]]
        if service.get("read_only"):
            argv += ["--remount-ro", "/"]
        argv += ["--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "XDG_DATA_HOME", "/data",
                 "--setenv", "HOME", "/tmp"]
        for key, value in (service.get("environment") or {}).items():
            argv += ["--setenv", key, value]
        return [str(a) for a in (*argv, "--", *command)]

    def up(self, name, port):
        self.running[name] = Process(self.argv(name), lambda: accepts("127.0.0.1", port))

    def down(self):
        for process in reversed(self.running.values()):
            process.stop()

    # -- from outside, by Caddy only

    @property
    def root(self):
        """Of Caddy's authority."""
        return self.dir / "volumes/caddy/caddy/pki/authorities/local/root.crt"

    def dial(self, host=RTC):
        tls = ssl.create_default_context(cafile=self.root)
        return tls.wrap_socket(dial("127.0.0.1:443"), server_hostname=host)

    def ask(self, method, path, body=b"", headers=(), host=RTC):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers)
        with Wire(self.dial(host)) as w:
            w.send(head.encode() + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return w.reply(method)

    def metrics(self):
        with Wire(dial("127.0.0.1:8081")) as w:
            w.send(b"GET /metrics HTTP/1.1\r\nHost: m\r\n\r\n")
            text = w.reply().body.decode()
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in text.splitlines() if line[:1] not in "#")}

    def rooms(self):
        key, _, secret = (self.own / "compose/keys").read_text().strip().partition(": ")
        token = pyjwt.encode({"iss": key, "exp": 4102444800, "video": {"roomList": True}}, secret, algorithm="HS256")
        reply = self.ask("POST", "/livekit/sfu/twirp/livekit.RoomService/ListRooms", {},
                         [("Authorization", f"Bearer {token}")])
        assert reply.status == 200, reply
        return {room["name"] for room in reply.json.get("rooms", [])}


@pytest.fixture(scope="module")
def stack(pki, tmp_path_factory):
    stack = Stack(tmp_path_factory.mktemp("compose"), pki)
    with Homeserver([(HOME, 443), (HOME, 8448)], tls=pki.leaf([DOMAIN]), sub=USER) as home:
        try:
            for name, port in (("redis", 6379), ("lkjwt", 8080), ("livekit", 7880), ("caddy", 443)):
                stack.up(name, port)
            wait_for("Caddy's certificates", lambda: answers(stack))
            stack.home = home
            yield stack
        finally:
            stack.down()


def answers(stack):
    try:
        return stack.ask("GET", "/livekit/jwt/healthz").status == 200
    except (OSError, ssl.SSLError):
        return False


@pytest.fixture(scope="module")
def granted(stack):
    """An exchange by the public address; its reply."""
    reply = stack.ask("POST", "/livekit/jwt/get_token", make_body("/get_token", DOMAIN, USER))
    assert reply.status == 200, (reply, stack.running["lkjwt"].log_text())
    return SimpleNamespace(**reply.json)


def test_exchange_makes_the_room(stack, granted):
    assert granted.url == f"wss://{RTC}/livekit/sfu"
    assert alias("!room:example.org") in stack.rooms()


def test_webhook_comes_back(stack, granted):
    """LiveKit tells lkjwt of the room, signed with the key that both read from one file."""
    def webhooks():
        return stack.metrics().get('lkjwt_http_requests_total{route="/sfu_webhook",code="200"}', 0)
    wait_for("a webhook", webhooks)
    assert stack.metrics().get('lkjwt_events_total{event="WEBHOOK_BAD"}', 0) == 0


def test_token_joins(stack, granted):
    """The address and the token that the client got open LiveKit's socket, by Caddy."""
    path = granted.url.removeprefix(f"wss://{RTC}") + f"/rtc?access_token={granted.jwt}&protocol=15"
    with stack.dial() as sock:
        sock.sendall((f"GET {path} HTTP/1.1\r\nHost: {RTC}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                      f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}"
                      "\r\n\r\n").encode())
        got = b""
        while hashed(USER, "DEVICE", "member-1").encode() not in got:   # the join response names us
            data = sock.recv(65536)
            assert data, got
            got += data
    assert got.startswith(b"HTTP/1.1 101 "), got


def test_state_is_in_redis(stack):
    metrics = stack.metrics()
    assert metrics["lkjwt_redis_up"] == 1 and metrics["lkjwt_shards"] == 64


def test_well_known(stack):
    reply = stack.ask("GET", "/.well-known/matrix/client", host=DOMAIN)
    assert reply.status == 200 and reply.header("Access-Control-Allow-Origin") == "*"
    focus, = reply.json["org.matrix.msc4143.rtc_foci"]
    assert focus["livekit_service_url"] == f"https://{RTC}/livekit/jwt"


def test_check(stack):
    """The last command of the header. The homeserver's own name is not Caddy's here, but what Caddy says there is."""
    stack.home.sub = None       # it asks with a token that nobody made
    stack.home.on("/.well-known/matrix/client",
                  Reply(200, stack.ask("GET", "/.well-known/matrix/client", host=DOMAIN).body))
    both = stack.dir / "both.pem"
    both.write_text("".join(open(f).read() for f in (stack.ca, stack.root)))
    stack.ca = both
    out, _ = run(*stack.argv("lkjwt", ["/lk-jwt-service", "--check", DOMAIN]))
    assert out.splitlines()[-2:] == [f"ok    focus       https://{RTC}/livekit/jwt: answers", "all is well"], out


def test_nothing_secret_in_the_logs(stack, granted):
    secret = (stack.own / "compose/keys").read_text().split(": ")[1].strip()
    log = stack.running["lkjwt"].log_text()
    assert "event=START" in log and not [s for s in (secret, granted.jwt, CANARY_TOKEN) if s in log]
