"""What lkjwt does, shown with one user: run by `make demo` after the build.

Starts stand-ins for a homeserver and an SFU, starts ./lkjwt between them,
asks for a join token as a client does, and shows each step. Python's
standard library and the openssl command; everything stays on 127.0.0.1.
The exit status is 0 only when all was as expected."""
import base64
import contextlib
import hashlib
import hmac
import http.client
import http.server
import json
import os
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BIN = os.path.abspath(os.environ.get("LKJWT_BIN", os.path.join(ROOT, "lkjwt")))
HANG = 20    # seconds

API_KEY, API_SECRET = "demokey", secrets.token_hex(20)
DOMAIN = "demo.example"
DEVICE, MEMBER, ROOM, SLOT = "ALICEPHONE", "6f1c3d52", "!standup:demo.example", "m.call#ROOM"
WELL_KNOWN = "/.well-known/matrix/server"
USERINFO = "/_matrix/federation/v1/openid/userinfo"
CREATE_ROOM = "/twirp/livekit.RoomService/CreateRoom"
OPENSSL = f"""
[req]
distinguished_name = dn
prompt = no
[dn]
CN = lkjwt demo
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:{DOMAIN}, DNS:matrix.{DOMAIN}
"""


class Surprise(Exception):
    pass


def expect(true, what):
    if not true:
        raise Surprise(what)


# ---- output

class Steps:
    number = 0

    def step(self, text):
        self.number += 1
        print(f"\n{self.number}. {text}", flush=True)

    def show(self, *lines):
        for line in lines:
            print(f"     {line}", flush=True)


out = Steps()


def short(text, keep=24):
    return text if len(text) <= keep else f"{text[:keep]}... ({len(text)} characters)"


# ---- the formulas of the protocol, a second time

def name_of(*parts):
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def unbase64url(text):
    expect(re.fullmatch(r"[A-Za-z0-9_-]+", text), "a token part is not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def open_jwt(token):
    """(header, claims) of an HS256 token that the API secret signed."""
    parts = token.split(".")
    expect(len(parts) == 3, "a token has three parts")
    header, claims = (json.loads(unbase64url(p)) for p in parts[:2])
    expect(header == {"alg": "HS256", "typ": "JWT"}, f"token header {header}")
    want = hmac.new(API_SECRET.encode(), f"{parts[0]}.{parts[1]}".encode(), hashlib.sha256).digest()
    expect(hmac.compare_digest(want, unbase64url(parts[2])), "the token's signature is not the API secret's")
    expect(claims["nbf"] - 60 <= time.time() < claims["exp"], "the token is not valid now")
    return header, claims


# ---- stand-ins

class StandIn(http.server.ThreadingHTTPServer):
    """answer(method, path, query, headers, body) gives (status, type, bytes)."""

    daemon_threads = True

    def __init__(self, port, answer, tls=None):
        self.answer, self.tls, self.seen, self.troubles = answer, tls, [], []
        super().__init__(("127.0.0.1", port), Handler)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def server_bind(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)    # without a DNS look-up of its name
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address

    def finish_request(self, request, client_address):
        request.settimeout(HANG)
        if self.tls:
            request = self.tls.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, request, client_address):
        self.troubles.append(repr(sys.exc_info()[1]))

    def stop(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        target = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            status, kind, text = self.server.answer(
                self.command, target.path, urllib.parse.parse_qs(target.query), self.headers, body)
        except (Surprise, ValueError, KeyError, IndexError) as e:
            self.server.troubles.append(f"{self.command} {target.path}: {e!r}")
            status, kind, text = 400, "text/plain", b""
        self.server.seen.append((self.command, target.path, self.headers["Host"], status, text))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = handle_any

    def log_message(self, *_):
        pass


class Homeserver:
    """Knows one user and the OpenID token it gave her."""

    def __init__(self):
        self.token = secrets.token_urlsafe(24)
        self.name = DOMAIN
        self.delegate = None    # what well-known names

    @property
    def user(self):
        return f"@alice:{self.name}"

    def answer(self, method, path, query, headers, body):
        def reply(status, obj):
            return status, "application/json", json.dumps(obj).encode()
        if method == "GET" and path == WELL_KNOWN and self.delegate:
            return reply(200, {"m.server": self.delegate})
        if method == "GET" and path == USERINFO:
            if query["access_token"] == [self.token]:
                return reply(200, {"sub": self.user})
            return reply(401, {"errcode": "M_UNKNOWN_TOKEN", "error": "Unknown token"})
        return reply(404, {"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"})


class Sfu:
    """Creates rooms for whoever brings a token signed with the API secret."""

    def __init__(self):
        self.rooms = []

    def answer(self, method, path, query, headers, body):
        expect((method, path) == ("POST", CREATE_ROOM), "the SFU was asked something else")
        kind, _, token = headers["Authorization"].partition(" ")
        expect(kind == "Bearer", "no bearer token")
        claims = open_jwt(token)[1]
        expect(claims["iss"] == API_KEY and claims["video"] == {"roomCreate": True}, f"claims {claims}")
        # Protobuf: field 1, a string of 43 bytes: the name; 2 and 10: seconds.
        expect(body[:2] == b"\x0a\x2b" and body[45:] == b"\x10\xac\x02\x50\x14", f"CreateRoom {body!r}")
        self.rooms.append(body[2:45].decode())
        return 200, "application/protobuf", body[:45]


def certificates(folder):
    """An own CA and a certificate for the homeserver's names."""
    with open(os.path.join(folder, "cnf"), "w") as f:
        f.write(OPENSSL)
    new = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -config cnf"
    for args in (f"req -x509 {new} -extensions ca -days 2 -keyout ca.key -out ca.pem",
                 f"req -new {new} -subj /CN={DOMAIN} -keyout leaf.key -out leaf.csr",
                 "x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
                 " -extfile cnf -extensions leaf -out leaf.pem"):
        done = subprocess.run(["openssl", *args.split()], cwd=folder, stdin=subprocess.DEVNULL,
                              timeout=HANG, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        expect(done.returncode == 0, f"openssl {args}: {done.stdout}")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(os.path.join(folder, "leaf.pem"), os.path.join(folder, "leaf.key"))
    return os.path.join(folder, "ca.pem"), tls


# ---- the service

class Service:
    def __init__(self, env):
        self.log, self.listen, self.ready = [], None, threading.Event()
        self.proc = subprocess.Popen([BIN], env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.proc.stderr:
            self.log.append(line.rstrip("\n"))
            found = re.search(r"event=START .*listen=(\S+)", line)
            if found:
                self.listen = found[1]
                self.ready.set()
        self.ready.set()

    def wait(self):
        """Until /healthz is 200."""
        self.ready.wait(HANG)
        expect(self.listen, "lkjwt did not start")
        until = time.monotonic() + HANG
        while time.monotonic() < until and self.proc.poll() is None:
            with contextlib.suppress(OSError):
                if self.request("GET", "/healthz")[0] == 200:
                    return
            time.sleep(0.02)
        raise Surprise("lkjwt does not answer /healthz")

    def request(self, method, path, body=None):
        conn = http.client.HTTPConnection(self.listen, timeout=HANG)
        try:
            conn.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
            reply = conn.getresponse()
            return reply.status, reply.read()
        finally:
            conn.close()

    def stop(self):
        if self.proc.poll() is None:
            self.proc.terminate()
            try:
                self.proc.wait(HANG)
            except subprocess.TimeoutExpired:
                self.proc.kill()
                self.proc.wait()
        return self.proc.returncode


# ---- the demonstration

def start_homeserver(stack, tls):
    """(homeserver, its listeners, how it is found)"""
    home = Homeserver()
    main = StandIn(0, home.answer, tls)
    stack.callback(main.stop)
    try:
        front = StandIn(443, home.answer, tls)
    except OSError as e:
        home.name = f"{DOMAIN}:{main.port}"
        return home, [main], f"found by the port in its name (443, for well-known: {e.strerror})"
    stack.callback(front.stop)
    home.delegate = f"matrix.{DOMAIN}:{main.port}"
    return home, [front, main], f"found by {WELL_KNOWN} on port 443"


def demo(stack):
    expect(os.access(BIN, os.X_OK), f"{BIN} is missing: run make")
    print("How a Matrix user gets into a LiveKit call, with stand-ins for both servers.\n"
          "A client may not create rooms on the SFU, nor invent its own name there:\n"
          "lkjwt asks the user's homeserver who it is, then signs a token that says so.", flush=True)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lkjwt-demo-"))
    ca_file, tls = certificates(folder)

    out.step("Two stand-ins start on 127.0.0.1")
    home, servers, how = start_homeserver(stack, tls)
    sfu = Sfu()
    sfu_server = StandIn(0, sfu.answer)
    stack.callback(sfu_server.stop)
    everyone = servers + [sfu_server]
    out.show(f"homeserver  {home.name} (HTTPS, own CA)", f"            {how}",
             f"SFU         http://127.0.0.1:{sfu_server.port}")

    out.step("lkjwt starts, told by its environment where the SFU is and who may open rooms")
    hosts = os.path.join(folder, "hosts")
    with open(hosts, "w") as f:
        f.write(f"127.0.0.1 {DOMAIN} matrix.{DOMAIN}\n")
    env = {
        "LIVEKIT_URL": f"ws://127.0.0.1:{sfu_server.port}",
        "LIVEKIT_KEY": API_KEY,
        "LIVEKIT_SECRET": API_SECRET,
        "LIVEKIT_FULL_ACCESS_HOMESERVERS": home.name,
        "LIVEKIT_JWT_BIND": "127.0.0.1:0",
        "LKJWT_HOSTS_FILE": hosts,
        "SSL_CERT_FILE": ca_file,
    }
    service = Service(env)
    stack.callback(service.stop)
    stack.callback(lambda: show_log(service))
    out.show(*(f"{k}={'(40 characters)' if k == 'LIVEKIT_SECRET' else v}" for k, v in env.items()))
    service.wait()
    out.show(f"listens on {service.listen}, pid {service.proc.pid}")

    out.step("Alice's client asks it for a token: POST /get_token")
    ask = {"room_id": ROOM, "slot_id": SLOT,
           "openid_token": {"access_token": home.token, "token_type": "Bearer", "expires_in": 3600,
                            "matrix_server_name": home.name},
           "member": {"id": MEMBER, "claimed_user_id": home.user, "claimed_device_id": DEVICE}}
    began = time.monotonic()
    status, text = service.request("POST", "/get_token", ask)
    spent = (time.monotonic() - began) * 1000
    out.show(f"room_id       {ROOM}", f"slot_id       {SLOT}",
             f"member        {MEMBER}, device {DEVICE}, claims to be {home.user}",
             f"openid_token  {short(home.token, 8)}, which her homeserver gave her")

    out.step("Before it answers, lkjwt calls")
    want = [("GET", WELL_KNOWN, 200)] * bool(home.delegate) + [("GET", USERINFO, 200), ("POST", CREATE_ROOM, 200)]
    got = []
    for server, scheme in [(s, "https") for s in servers] + [(sfu_server, "http")]:
        for method, path, host, code, reply in server.seen:
            got.append((method, path, code))
            out.show(f"{method} {scheme}://{host}{path}",
                     f"   {code} " + ("room created, the caller's token verified" if server is sfu_server
                                      else reply.decode()))
        expect(not server.troubles, server.troubles)
    expect(status == 200, f"answer {status} {text!r}")
    expect(got == want, f"the calls were {got}")

    out.step(f"and answers 200, after {spent:.0f} ms in all")
    answer = json.loads(text)
    expect(list(answer) == ["url", "jwt"] and answer["url"] == env["LIVEKIT_URL"], f"answer {text!r}")
    out.show(f"url  {answer['url']}", f"jwt  {short(answer['jwt'], 40)}")

    out.step("The token, decoded")
    header, claims = open_jwt(answer["jwt"])
    alias, identity = name_of(ROOM, SLOT), name_of(home.user, DEVICE, MEMBER)
    expect(claims == {"iss": API_KEY, "sub": identity, "identity": identity, "nbf": claims["iat"],
                      "iat": claims["iat"], "exp": claims["iat"] + 3600,
                      "video": {"roomJoin": True, "room": alias, "canPublish": True, "canSubscribe": True,
                                "canUpdateOwnMetadata": True}}, f"claims {claims}")
    expect(sfu.rooms == [alias], f"rooms on the SFU: {sfu.rooms}")
    notes = {"iss": "the API key", "sub": "hash of user, device, member", "exp": "after an hour", "iat": "now",
             "room": "hash of room_id, slot_id", "canPublish": "false for users of other homeservers"}
    out.show("header " + json.dumps(header), "claims")
    for key, value in claims.items():
        if key != "video":
            out.show(f"  {key:9} {json.dumps(value):46} {notes.get(key, '')}".rstrip())
    out.show("  video")
    for key, value in claims["video"].items():
        line = f"    {key:4} {json.dumps(value)}" if key == "room" else f"    {key:20} {json.dumps(value)}"
        out.show(f"{line:58} {notes.get(key, '')}".rstrip())
    out.show("signature: HMAC-SHA256 with the API secret, verified",
             "sub and room: computed here once more, the same; the SFU created that room")

    out.step("A false OpenID token gets nothing")
    ask["openid_token"]["access_token"] = "false-" + home.token
    status, text = service.request("POST", "/get_token", ask)
    out.show(f"{status} {text.decode().strip()}")
    expect(status == 401 and json.loads(text)["errcode"] == "M_UNAUTHORIZED", f"answer {status} {text!r}")
    expect(len(sfu_server.seen) == 1, "the SFU was called for it")
    expect(not any(s.troubles for s in everyone), [s.troubles for s in everyone])
    log = "\n".join(service.log)
    expect(home.token not in log and API_SECRET not in log and answer["jwt"] not in log, "a secret is in the log")

    out.step("lkjwt gets SIGTERM")
    code = service.stop()
    expect(code == 0, f"exit status {code}")
    out.show("exit status 0")


def show_log(service):
    if sys.exc_info()[0]:
        print("\nlog of lkjwt:", *service.log, sep="\n  ", file=sys.stderr)


def main():
    began = time.monotonic()
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(sig, lambda number, _: sys.exit(f"demo: {signal.Signals(number).name}"))
    signal.alarm(3 * HANG)    # nothing here may hang
    try:
        with contextlib.ExitStack() as stack:
            demo(stack)
    except Exception as e:
        sys.exit(f"\ndemo: UNEXPECTED: {e if isinstance(e, Surprise) else repr(e)}")
    print(f"\nAll as expected, in {time.monotonic() - began:.1f} s.")


main()
