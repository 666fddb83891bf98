"""Real servers for the suite: Synapse and livekit-server, each a child
process that is stopped by its pid, and dies with the suite if that is
killed."""
import base64
import ctypes
import hashlib
import hmac
import json
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import jwt as pyjwt
from peers import wait_for
from service import CANARY_KEY, CANARY_PASSWORD, CANARY_SECRET, DEADLINE, ROOT, popen

HANG = 60    # seconds; only a hang is longer
LIVEKIT = str(ROOT / ".deps/bin/livekit-server")
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_us():
    """In a child before exec: no server outlives a killed suite."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def call(url, body=None, token=None, timeout=DEADLINE, method=None):
    """GET, or POST of JSON, unless a method is named; (status, decoded reply)."""
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=timeout) as r:
            status, text = r.status, r.read()
    except urllib.error.HTTPError as e:
        status, text = e.code, e.read()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


class Server:
    """A child process with a log file. argv and alive() come from the kind."""

    all = []    # for the report of a failed test

    def __init__(self, folder, name):
        self.dir, self.name, self.proc = Path(folder), name, None
        self.log_file = self.dir / "log"
        self.dir.mkdir(parents=True, exist_ok=True)
        Server.all.append(self)

    def start(self):
        """Start without waiting, so that several start side by side."""
        assert self.proc is None, f"{self.name} runs already"
        with open(self.log_file, "ab") as log:
            self.proc = popen(
                self.argv, cwd=self.dir, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=die_with_us)
        return self

    def ready(self):
        def ask():
            assert self.proc.poll() is None, f"{self.name} ended:\n{self.tail()}"
            try:
                return self.alive()
            except OSError:
                return False
        try:
            wait_for(f"{self.name} to answer", ask, HANG)
        except TimeoutError as e:
            raise AssertionError(f"{e}\n{self.tail()}") from None
        return self

    def stop(self, how=signal.SIGTERM):
        proc, self.proc = self.proc, None
        if proc is None:
            return
        proc.send_signal(signal.SIGCONT)
        proc.send_signal(how)
        try:
            proc.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            proc.kill()
            proc.wait()

    def tail(self, size=6000):
        text = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        return text[-size:]


class Synapse(Server):
    """One homeserver. Federation by TLS on (ip, tls_port) with the given
    certificate; its users' clients come to the plain listener on port 8008.
    public: on port 443 it tells of its client API, and serves it, itself.
    more: settings of its configuration."""

    def __init__(self, folder, server_name, ip, tls_port, cert, resources, public=False, **more):
        super().__init__(folder, f"synapse {server_name}")
        self.server_name, self.ip, self.tls_port = server_name, ip, tls_port
        self.url = f"http://{ip}:8008"
        chain, key = cert.files()
        self.secret = secrets.token_hex(16)
        config = {
            "server_name": server_name,
            "report_stats": False,
            "pid_file": str(self.dir / "pid"),
            "signing_key_path": str(self.dir / "signing.key"),
            "media_store_path": str(self.dir / "media"),
            "log_config": str(self.dir / "log.json"),
            "database": {"name": "sqlite3", "args": {"database": str(self.dir / "db")}},
            "tls_certificate_path": chain,
            "tls_private_key_path": key,
            # In this order: once the plain one answers, both do.
            "listeners": [
                {"port": tls_port, "type": "http", "tls": True, "bind_addresses": [ip],
                 "resources": [{"names": resources}]},
                *([{"port": 443, "type": "http", "tls": True, "bind_addresses": [ip],
                    "resources": [{"names": ["client"]}]}] if public else []),
                {"port": 8008, "type": "http", "tls": False, "bind_addresses": [ip],
                 "resources": [{"names": ["client", "openid"]}]},
            ],
            "registration_shared_secret": self.secret,
            "macaroon_secret_key": secrets.token_hex(16),
            "form_secret": secrets.token_hex(16),
            "bcrypt_rounds": 4,
            "trusted_key_servers": [],
            "max_event_delay_duration": "24h",
            # So many rooms and events are a suite, not an attack.
            **{rc: {"per_second": 1000, "burst_count": 1000} for rc in ("rc_message", "rc_room_creation")},
            **more,
        }
        if public:
            config["public_baseurl"] = f"https://{server_name.split(':')[0]}/"
        log = {"version": 1, "formatters": {"f": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
               "handlers": {"h": {"class": "logging.StreamHandler", "formatter": "f"}},
               "root": {"level": "INFO", "handlers": ["h"]}, "disable_existing_loggers": False}
        seed = base64.b64encode(secrets.token_bytes(32)).decode().rstrip("=")
        (self.dir / "signing.key").write_text(f"ed25519 a_test {seed}\n")
        # JSON is YAML.
        (self.dir / "homeserver.yaml").write_text(json.dumps(config))
        (self.dir / "log.json").write_text(json.dumps(log))
        self.argv = [sys.executable, "-m", "synapse.app.homeserver", "-c", "homeserver.yaml"]

    @property
    def addr(self):
        return f"{self.ip}:{self.tls_port}"

    def alive(self):
        return call(f"{self.url}/health")[0] == 200

    def delayed(self, delay_id):
        """What was done to a delayed event without a user's token, in order: (action, status, listener)."""
        return [(m[3], int(m[2]), m[1]) for m in re.finditer(
            r' synapse\.access\.(\S+) .* \{None\} Processed request: .* (\d+)!? "POST \S+/org\.matrix\.msc4140'
            rf'/delayed_events/{re.escape(delay_id)}/(\w+) HTTP', self.log_file.read_text())]

    def register(self, localpart):
        register = f"{self.url}/_synapse/admin/v1/register"
        nonce = call(register)[1]["nonce"]
        text = "\0".join((nonce, localpart, CANARY_PASSWORD, "notadmin")).encode()
        mac = hmac.new(self.secret.encode(), text, hashlib.sha1).hexdigest()
        status, got = call(register, {"nonce": nonce, "username": localpart, "password": CANARY_PASSWORD,
                                      "admin": False, "mac": mac})
        assert status == 200, got
        return User(self, got["user_id"], got["device_id"], got["access_token"])


class User:
    issued = []    # every OpenID token, for the search of the logs

    def __init__(self, server, user_id, device_id, access_token):
        self.server, self.id, self.device, self.access_token = server, user_id, device_id, access_token
        assert user_id.endswith(":" + server.server_name)

    def openid(self):
        """A fresh OpenID token, as the homeserver words it."""
        status, got = call(f"{self.server.url}/_matrix/client/v3/user/{self.id}/openid/request_token",
                           {}, self.access_token)
        assert status == 200, got
        assert got["matrix_server_name"] == self.server.server_name
        User.issued.append(got["access_token"])
        return got

    def ask(self, path, body=None, method=None):
        """A call of the client API; (status, reply)."""
        return call(f"{self.server.url}/_matrix/client/v3{path}", body, self.access_token, method=method)

    def create_room(self, state_type):
        """A room where everyone may come in and set state of that type."""
        status, got = self.ask("/createRoom", {"preset": "public_chat", "power_level_content_override": {
            "events": {state_type: 0}}})
        assert status == 200, got
        return got["room_id"]

    def join_room(self, room):
        status, got = self.ask(f"/join/{urllib.parse.quote(room)}", {})
        assert status == 200, got

    def _state(self, room, *parts):
        return f"/rooms/{urllib.parse.quote(room)}/state/" + "/".join(urllib.parse.quote(p, safe="") for p in parts)

    def set_state(self, room, kind, key, content, delay=None):
        """The event id, or the delay id of an event that waits so many milliseconds."""
        query = "" if delay is None else f"?org.matrix.msc4140.delay={delay}"
        status, got = self.ask(self._state(room, kind, key) + query, content, "PUT")
        assert status == 200, got
        return got["event_id" if delay is None else "delay_id"]

    def get_state(self, room, kind, key):
        status, got = self.ask(self._state(room, kind, key))
        assert status == 200, got
        return got


class LiveKit(Server):
    def __init__(self, folder, ip="127.0.0.1", port=7880, webhook=None):
        super().__init__(folder, f"livekit-server {port}")
        self.url, self.http = f"ws://{ip}:{port}", f"http://{ip}:{port}"
        config = {
            "port": port,
            "bind_addresses": [ip],
            # The time-outs differ from what the service must ask for.
            "room": {"auto_create": False, "empty_timeout": 60, "departure_timeout": 7},
            "keys": {CANARY_KEY: CANARY_SECRET},
            "rtc": {"udp_port": port + 2, "tcp_port": 0, "node_ip": ip, "use_external_ip": False,
                    "enable_loopback_candidate": True, "ips": {"includes": [f"{ip}/32"]}},
            "logging": {"level": "info"},
        }
        if webhook:
            urls = [webhook] if isinstance(webhook, str) else webhook
            config["webhook"] = {"api_key": CANARY_KEY, "urls": urls}
        (self.dir / "livekit.yaml").write_text(json.dumps(config))
        self.argv = [LIVEKIT, "--config", "livekit.yaml"]

    def alive(self):
        return call(self.http)[0] == 200

    def stop(self):
        super().stop(signal.SIGKILL)    # at SIGTERM it would wait for its participants

    def webhooks(self):
        """[(delivered, event)] in the order of their last attempts."""
        found = re.findall(r"\t(sent|failed to send|dropped) webhook\t(\{.*\})", self.log_file.read_text())
        return [(outcome == "sent", json.loads(event)) for outcome, event in found]

    def ask(self, method, body, token=None, **grant):
        """A RoomService call; (status, reply). Signed by us unless a token is given."""
        if token is None:
            now = int(time.time())
            token = pyjwt.encode({"iss": CANARY_KEY, "nbf": now, "exp": now + 60, "video": grant},
                                 CANARY_SECRET, algorithm="HS256")
        return call(f"{self.http}/twirp/livekit.RoomService/{method}", body, token)

    def room(self, alias):
        """The room as the SFU describes it, None when there is none."""
        status, got = self.ask("ListRooms", {"names": [alias]}, roomList=True)
        assert status == 200, got
        rooms = got.get("rooms", [])
        assert len(rooms) <= 1, rooms
        return rooms[0] if rooms else None

    def participants(self, alias):
        """{identity: description}"""
        status, got = self.ask("ListParticipants", {"room": alias}, roomAdmin=True, room=alias)
        assert status == 200, got
        return {p["identity"]: p for p in got.get("participants", [])}
