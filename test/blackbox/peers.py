"""Peers that the black-box suites put around lkjwt: an own PKI, scripted HTTP servers (homeserver,
SFU, raw bytes), a scripted DNS server, and wrappers of real servers (dnsmasq, nginx, openssl,
GnuTLS). Everything listens on addresses of the loopback device and is stopped by pid or handle."""

import atexit
import contextlib
import datetime
import errno
import ipaddress
import json
import os
import select
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
import urllib.parse

import dnslib
import h11
import jwt as pyjwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from service import popen

SCRATCH = tempfile.mkdtemp(prefix="lkjwt-test-")     # all files of the stand-ins, gone with the process
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
HANG = 30           # seconds after which a wait is a hang; never a statement about speed
SUB_PATH = "/_matrix/federation/v1/openid/userinfo"
WELL_KNOWN = "/.well-known/matrix/server"
CREATE_ROOM = "/twirp/livekit.RoomService/CreateRoom"


def together(jobs):
    """Run functions at once; what they return, in order."""
    out = [None] * len(jobs)

    def run(n):
        out[n] = jobs[n]()
    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    return out


def wait_for(what, ask, timeout=HANG):
    """Poll ask() until it is true; its value."""
    end = time.monotonic() + timeout
    while True:
        value = ask()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.01)


def inner_pid(s):
    """The process that a service's wrapper (bubblewrap, unshare) started."""
    def child():
        with open(f"/proc/{s.pid}/task/{s.pid}/children") as f:
            kids = f.read().split()
        return int(kids[0]) if kids else None
    return wait_for("the boxed process", child)


def add_addr(*addrs):
    """Put addresses on lo (the suites run in a network namespace of their own); again is no error."""
    for addr in addrs:
        ip = ipaddress.ip_address(addr)
        if ip.is_loopback:
            continue                        # 127/8 and ::1 are there
        args = ["ip", "addr", "replace", f"{ip}/{ip.max_prefixlen}", "dev", "lo"]
        if ip.version == 6:
            args.append("nodad")
        subprocess.run(args, check=True, capture_output=True)
        # The kernel's local IPv6 route comes a moment after the address.
        route = ["ip", "-o", "route", "get", str(ip)]
        until = time.monotonic() + 10
        while not subprocess.run(route, capture_output=True, text=True).stdout.startswith("local "):
            assert time.monotonic() < until, f"no local route to {ip}"
            time.sleep(0.005)


def del_addr(*addrs):
    for addr in addrs:
        ip = ipaddress.ip_address(addr)
        if not ip.is_loopback:
            subprocess.run(["ip", "addr", "del", f"{ip}/{ip.max_prefixlen}", "dev", "lo"], capture_output=True)


def free_port(addr="127.0.0.1"):
    with socket.socket(family(addr)) as s:
        s.bind((addr, 0))
        return s.getsockname()[1]


def family(addr):
    return socket.AF_INET6 if ":" in addr else socket.AF_INET


def listen(addr, port=0, backlog=128):
    """A listening socket; "*" is every address of both families."""
    every, addr = addr == "*", "::" if addr == "*" else addr
    s = socket.socket(family(addr), socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ":" in addr:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not every)
    s.bind((addr, port))
    s.listen(backlog)
    return s


# ---- PKI ------------------------------------------------------------------------------------------

_keys = {}


def new_key(kind, role="leaf"):
    """A private key; RSA ones are slow to make, so one for each kind and role (root, issuer, leaf) serves all."""
    if (kind, role) in _keys:
        return _keys[kind, role]
    if kind.startswith("rsa"):
        size, _, e = kind[3:].partition("e")
        key = rsa.generate_private_key(public_exponent=int(e or 65537), key_size=int(size))
        _keys[kind, role] = key
    elif kind == "ed25519":
        key = ed25519.Ed25519PrivateKey.generate()
    else:
        key = ec.generate_private_key({"p256": ec.SECP256R1(), "p384": ec.SECP384R1(),
                                       "p521": ec.SECP521R1()}[kind])
    return key


def now_utc():
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)


def general_names(names=(), ips=()):
    out = []
    for n in names:
        out.append(x509.DNSName._init_without_validation(n) if not n.isascii() or "\0" in n else x509.DNSName(n))
    for i in ips:
        out.append(x509.IPAddress(ipaddress.ip_network(i) if "/" in str(i) else ipaddress.ip_address(i)))
    return out


class Cert:
    """A certificate with its key and the chain that leads to (not into) the root."""

    def __init__(self, pki, cert, key, issuer):
        self.pki, self.cert, self.key, self.issuer = pki, cert, key, issuer
        self._files = None

    @property
    def pem(self):
        return self.cert.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self):
        return self.cert.public_bytes(serialization.Encoding.DER)

    @property
    def key_pem(self):
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                      serialization.NoEncryption())

    def path(self):
        """[self, issuer, ...] without the self-signed root (the leaf itself stays, even self-signed)."""
        out, c = [self], self.issuer
        while c is not None and c.issuer is not None:
            out.append(c)
            c = c.issuer
        return out

    def files(self, certs=None):
        """(certificate chain file, key file); certs = list of Cert or PEM bytes to send instead of path()."""
        if certs is None:
            if self._files is None:
                self._files = self._write(self.path())
            return self._files
        return self._write(certs)

    def _write(self, certs):
        chain, key = self.pki.file("chain.pem"), self.pki.file("key.pem")
        with open(chain, "wb") as f:
            f.write(b"".join(c if isinstance(c, bytes) else c.pem for c in certs))
        with open(key, "wb") as f:
            f.write(self.key_pem)
        return chain, key


class Pki:
    """An own CA: .root, .inter (a default intermediate), .leaf(...), .ca(...); .ca_file is the root's PEM."""

    def __init__(self, folder=None, key="p256", inter_key=None, name="lkjwt test"):
        self.dir = folder or tempfile.mkdtemp(prefix="lkjwt-pki-", dir=SCRATCH)
        os.makedirs(self.dir, exist_ok=True)
        self.kind, self.name, self._n = key, name, 0
        self.root = self.ca(f"{name} root", key=key, issuer=None)
        self.inter = self.ca(f"{name} intermediate", key=inter_key or key, issuer=self.root, path_len=0)
        self.ca_file = self.file("root.pem")
        with open(self.ca_file, "wb") as f:
            f.write(self.root.pem)

    def file(self, name):
        self._n += 1
        return os.path.join(self.dir, f"{self._n:04d}-{name}")

    def build(self, subject, key, issuer, *, not_before=None, not_after=None, extensions=(), sign_hash=None,
              signer=None, serial=None, subject_name=None):
        now = now_utc()
        subject_name = subject_name or x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
        b = (x509.CertificateBuilder().subject_name(subject_name)
             .issuer_name(issuer.cert.subject if issuer else subject_name)
             .public_key(key.public_key()).serial_number(serial or x509.random_serial_number())
             .not_valid_before(not_before or now - datetime.timedelta(days=1))
             .not_valid_after(not_after or now + datetime.timedelta(days=30)))
        for ext, critical in extensions:
            b = b.add_extension(ext, critical)
        signer = signer or (issuer.key if issuer else key)
        if sign_hash is None and not isinstance(signer, ed25519.Ed25519PrivateKey):
            sign_hash = hashes.SHA256()
        return Cert(self, b.sign(signer, sign_hash), key, issuer)

    def ca(self, subject, key=None, issuer="root", path_len=None, permitted=None, excluded=None, eku=None,
           is_ca=True, key_usage=True, constraints_critical=True, extra=(), basic=True, **build):
        """An issuing certificate. permitted, excluded: lists of x509 general names for nameConstraints."""
        if issuer == "root":
            issuer = self.root
        exts = []
        if basic:
            exts.append((x509.BasicConstraints(ca=is_ca, path_length=path_len if is_ca else None), True))
        if key_usage:
            certs = key_usage is True       # "sign": a CA that may not sign certificates
            exts.append((x509.KeyUsage(not certs, False, False, False, False, certs, certs, False, False), True))
        if permitted or excluded:
            exts.append((x509.NameConstraints(permitted or None, excluded or None), constraints_critical))
        if eku:
            exts.append((x509.ExtendedKeyUsage([EKU[e] for e in eku]), False))
        private = new_key(key or self.kind, "issuer" if issuer else "root")
        return self.build(subject, private, issuer, extensions=exts + list(extra), **build)

    def leaf(self, names=(), ips=(), key=None, issuer=None, cn=None, eku=("serverAuth",), eku_critical=False,
             ca=False, digital_signature=True, self_signed=False, extra=(), **build):
        """A server certificate. Without names and ips it has no SAN at all; cn is the common name."""
        exts = [(x509.BasicConstraints(ca=ca, path_length=None), True)]
        if names or ips:
            exts.append((x509.SubjectAlternativeName(general_names(names, ips)), False))
        if digital_signature is not None:
            exts.append((x509.KeyUsage(digital_signature, False, not digital_signature, False, False,
                                       False, False, False, False), True))
        if eku:
            exts.append((x509.ExtendedKeyUsage([EKU[e] for e in eku]), eku_critical))
        issuer = None if self_signed else issuer or self.inter
        subject = cn or f"leaf {self._n}"
        return self.build(subject, new_key(key or self.kind), issuer, extensions=exts + list(extra), **build)


EKU = {"serverAuth": ExtendedKeyUsageOID.SERVER_AUTH, "clientAuth": ExtendedKeyUsageOID.CLIENT_AUTH,
       "any": ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, "emailProtection": ExtendedKeyUsageOID.EMAIL_PROTECTION}


def tls_context(cert, certs=None, min_version=None, max_version=None, ciphers=None, alpn=("http/1.1",)):
    """A server context of one Cert, or of {sni, "*.domain" or None (default): Cert}."""
    if isinstance(cert, ssl.SSLContext):
        return cert
    table = cert if isinstance(cert, dict) else {None: cert}
    ctxs = {}
    for sni, c in table.items():
        ctx = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if ciphers:
            ctx.set_ciphers(ciphers)
        ctx.load_cert_chain(*c.files(certs))
        if alpn:
            ctx.set_alpn_protocols(list(alpn))
        if min_version:
            ctx.minimum_version = min_version
        if max_version:
            ctx.maximum_version = max_version
        ctxs[sni] = ctx
    default = ctxs.get(None) or next(iter(ctxs.values()))

    def on_sni(sock, name, _ctx):
        sock.lkjwt_sni = name
        wild = "*." + name.partition(".")[2] if name else None
        found = ctxs.get(name) or ctxs.get(wild)
        if found:
            sock.context = found
    default.sni_callback = on_sni
    return default


# ---- HTTP servers -----------------------------------------------------------------------------------

class Request:
    """One request as it came: .method .target .path .query .headers (lower-case names) .body .raw
    .sni .addr (address and port it came in on) .conn (connection number) .tls (version) .resumed"""

    def __init__(self, **kw):
        self.__dict__.update(kw)
        split = urllib.parse.urlsplit(self.target)
        self.path, self.query = split.path, dict(urllib.parse.parse_qsl(split.query, keep_blank_values=True))

    def header(self, name):
        got = [v for k, v in self.headers if k == name.lower()]
        assert len(got) <= 1, f"{name} twice: {got}"
        return got[0] if got else None

    @property
    def host(self):
        return self.header("host")

    def __repr__(self):
        return f"<{self.method} {self.target} host={self.host} sni={self.sni} at={self.addr}>"


class Reply:
    """What a server answers. raw replaces the whole wire form; cut sends only so many of its bytes and
    closes; step > 0 sends that many bytes at a time, pause seconds apart; delay waits first; close ends
    the connection after it, dirty without close_notify, reset by RST; body may be str, bytes or JSON."""

    def __init__(self, status=200, body=b"", headers=(), *, raw=None, ctype=None, length=True, delay=0, cut=None,
                 step=0, pause=0.0, close=False, dirty=False, reset=False, hang=False):
        if isinstance(body, (dict, list)):
            body, ctype = json.dumps(body), ctype or "application/json"
        if isinstance(body, str):
            body = body.encode()
        self.status, self.body, self.headers, self.ctype, self.length = status, body, list(headers), ctype, length
        self.raw, self.delay, self.cut, self.step, self.pause = raw, delay, cut, step, pause
        self.close, self.dirty, self.reset, self.hang = close, dirty, reset, hang

    def wire(self):
        if self.raw is not None:
            return self.raw
        head = [f"HTTP/1.1 {self.status} X"]
        if self.ctype:
            head.append(f"Content-Type: {self.ctype}")
        head += [f"{k}: {v}" for k, v in self.headers]
        if self.length:
            head.append(f"Content-Length: {len(self.body)}")
        if self.close or self.cut is not None:
            head.append("Connection: close")
        return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + self.body


def chunked(body, size=7, trailer=b""):
    out = b""
    for i in range(0, len(body), size):
        part = body[i:i + size]
        out += b"%x\r\n%s\r\n" % (len(part), part)
    return out + b"0\r\n" + trailer + b"\r\n"


class HttpServer:
    """Threaded HTTP/1.1 server on one or more (address, port); tls = Cert, {sni: Cert} or SSLContext.
    Requests are parsed by h11, so an unclean request of lkjwt is an entry in .errors, never ignored.
    Hooks: on(path, Reply | function(Request) -> Reply | list of those, taken in turn, the last stays)."""

    def __init__(self, addrs=(("127.0.0.1", 0),), tls=None, sub_delay=0, **tls_options):
        if isinstance(addrs, str):
            addrs = [(addrs, 0)]
        elif isinstance(addrs, tuple) and addrs and isinstance(addrs[0], str):
            addrs = [addrs]
        self.requests, self.errors, self.handshake_errors = [], [], []
        self.accepted = []          # local (address, port) of each connection
        self.connections = self.handshakes = self.resumed = 0   # accepted; completed TLS; resumed of those
        self.peak = 0               # most connections open at once
        self.hooks, self._hook_at = {}, {}
        self.lock = threading.Lock()
        self.ctx = tls_context(tls, **tls_options) if tls is not None else None
        self.open, self.stopping = set(), False
        self.close_each = False     # every reply ends its connection
        self.socks = [listen(a, p) for a, p in addrs]
        self.addrs = [s.getsockname()[:2] for s in self.socks]
        self.addr, self.port = self.addrs[0]
        self.threads = [threading.Thread(target=self._accept, args=(s,), daemon=True) for s in self.socks]
        for t in self.threads:
            t.start()

    # -- use
    @property
    def netloc(self):
        return f"[{self.addr}]:{self.port}" if ":" in self.addr else f"{self.addr}:{self.port}"

    @property
    def url(self):
        return f"{'https' if self.ctx else 'http'}://{self.netloc}"

    def on(self, path, what):
        with self.lock:
            self.hooks[path] = what
            self._hook_at[path] = 0
        return self

    def off(self, path=None):
        with self.lock:
            if path is None:
                self.hooks.clear()
            else:
                self.hooks.pop(path, None)

    def seen(self, path=None):
        with self.lock:
            return [r for r in self.requests if path is None or r.path == path]

    def forget(self):
        with self.lock:
            self.requests.clear()
            self.errors.clear()
            self.handshake_errors.clear()
            self.accepted.clear()
            self.connections = self.handshakes = self.resumed = 0
            self.peak = len(self.open)

    def drop_connections(self):
        """Close every open connection, as a restarted server would."""
        with self.lock:
            socks = list(self.open)
        for s in socks:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def stop(self):
        self.stopping = True
        for s in self.socks:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        for t in self.threads:
            t.join(HANG)
        for s in self.socks:
            s.close()
        self.drop_connections()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

    # -- to override
    def answer(self, req):
        return Reply(404, {"errcode": "M_UNRECOGNIZED", "error": "no such path"})

    # -- inside
    def _accept(self, sock):
        while not self.stopping:
            try:
                conn, peer = sock.accept()
            except OSError:
                return
            addr, port = conn.getsockname()[:2]
            addr = addr.removeprefix("::ffff:") if "." in addr else addr
            with self.lock:
                self.connections += 1
                number = self.connections
                self.accepted.append((addr, port))
                self.open.add(conn)
                self.peak = max(self.peak, len(self.open))
            threading.Thread(target=self._serve, args=(conn, number, (addr, port)), daemon=True).start()

    def _serve(self, conn, number, addr):
        raw = conn
        try:
            conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conn.settimeout(120)
            if self.ctx:
                # Wrapped in two steps: the SNI callback finds its attribute before the handshake ends.
                conn = self.ctx.wrap_socket(conn, server_side=True, do_handshake_on_connect=False,
                                            suppress_ragged_eofs=True)
                conn.lkjwt_sni = None
                with self.lock:
                    self.open.discard(raw)
                    self.open.add(conn)
                raw = conn
                try:
                    conn.do_handshake()
                except (ssl.SSLError, OSError) as e:
                    with self.lock:
                        self.handshake_errors.append((getattr(conn, "lkjwt_sni", None), str(e)))
                    return
                with self.lock:
                    self.handshakes += 1
                    self.resumed += bool(conn.session_reused)
            self._requests(conn, number, addr)
        except (OSError, ValueError):
            pass
        finally:
            with self.lock:
                self.open.discard(raw)
            with contextlib.suppress(OSError):
                conn.close()

    def _requests(self, conn, number, addr):
        pending = b""
        while not self.stopping:
            parser = h11.Connection(h11.SERVER)
            got, body, head = b"", b"", None
            if pending:
                parser.receive_data(pending)
                got = pending
            while True:
                try:
                    ev = parser.next_event()
                except h11.RemoteProtocolError as e:
                    with self.lock:
                        self.errors.append((str(e), got))
                    return
                if ev is h11.NEED_DATA:
                    data = conn.recv(65536)
                    if not data and not got:
                        return
                    got += data
                    parser.receive_data(data)
                elif isinstance(ev, h11.Request):
                    head = ev
                elif isinstance(ev, h11.Data):
                    body += ev.data
                elif isinstance(ev, h11.EndOfMessage):
                    break
                else:               # ConnectionClosed, PAUSED
                    return
            pending = parser.trailing_data[0]
            req = Request(method=head.method.decode(), target=head.target.decode("latin-1"),
                          headers=[(k.decode(), v.decode("latin-1")) for k, v in head.headers], body=body,
                          raw=got[:len(got) - len(pending)] if pending else got, conn=number, addr=addr,
                          sni=getattr(conn, "lkjwt_sni", None), version=head.http_version.decode(),
                          tls=conn.version() if self.ctx else None, at=time.monotonic(),
                          alpn=conn.selected_alpn_protocol() if self.ctx else None,
                          resumed=conn.session_reused if self.ctx else False)
            with self.lock:
                self.requests.append(req)
                hook = self.hooks.get(req.path)
                if isinstance(hook, list):
                    i = self._hook_at[req.path]
                    self._hook_at[req.path] = i + 1
                    hook = hook[min(i, len(hook) - 1)]
            reply = hook(req) if callable(hook) else hook
            if reply is None:
                reply = self.answer(req)
            if self.close_each:
                reply.close = True
            if not self._send(conn, reply):
                return

    def _send(self, conn, r):
        """Send a reply; False when the connection is over."""
        if r.delay:
            time.sleep(r.delay)
        wire = r.wire()
        if r.cut is not None:
            wire = wire[:r.cut]
        if r.step:
            for i in range(0, len(wire), r.step):
                conn.sendall(wire[i:i + r.step])
                if r.pause:
                    time.sleep(r.pause)
        elif wire:
            conn.sendall(wire)
        if r.hang:                  # keep silent until the peer goes
            with contextlib.suppress(OSError):
                while conn.recv(4096):
                    pass
            return False
        if r.reset:
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if r.close or r.cut is not None:
            if self.ctx and not r.dirty:
                conn.settimeout(0.2)
                with contextlib.suppress(OSError, ValueError):
                    conn.unwrap()   # sends close_notify; the peer's own is not required
            return False
        return True


class Homeserver(HttpServer):
    """userinfo and well-known. sub: the user any token names unless .tokens knows it (None: 401);
    well_known: the m.server text, a Reply, or None (404). Both may be functions of the Request."""

    def __init__(self, addrs=(("127.0.0.1", 0),), tls=None, sub=None, well_known=None, tokens=None, **tls_options):
        self.sub, self.well_known, self.tokens = sub, well_known, dict(tokens or {})
        super().__init__(addrs, tls, **tls_options)

    def answer(self, req):
        if req.path == WELL_KNOWN:
            wk = self.well_known(req) if callable(self.well_known) else self.well_known
            if isinstance(wk, Reply):
                return wk
            return Reply(404, "none here") if wk is None else Reply(200, {"m.server": wk})
        if req.path.endswith(SUB_PATH) and req.method == "GET":
            token = req.query.get("access_token")
            sub = self.tokens.get(token, self.sub)
            sub = sub(req) if callable(sub) else sub
            if sub is None:
                return Reply(401, {"errcode": "M_UNKNOWN_TOKEN", "error": "unknown"})
            return Reply(200, {"sub": sub})
        return super().answer(req)

    def asked(self):
        """The userinfo requests so far."""
        with self.lock:
            return [r for r in self.requests if r.path.endswith(SUB_PATH)]


def varint(data, at):
    value = shift = 0
    while True:
        b = data[at]
        value |= (b & 127) << shift
        at, shift = at + 1, shift + 7
        if b < 128:
            return value, at


def protobuf_decode(data):
    """{field number: [int or bytes, ...]}; ValueError when it is not a message."""
    out, at = {}, 0
    try:
        while at < len(data):
            tag, at = varint(data, at)
            if tag & 7 == 0:
                value, at = varint(data, at)
            elif tag & 7 == 2:
                n, at = varint(data, at)
                value, at = data[at:at + n], at + n
                if len(value) != n:
                    raise ValueError("short field")
            else:
                raise ValueError(f"wire type {tag & 7}")
            out.setdefault(tag >> 3, []).append(value)
    except IndexError:
        raise ValueError("short varint") from None
    return out


def protobuf_encode(*fields):
    def num(n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += num(number << 3) + num(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += num(number << 3 | 2) + num(len(value)) + value
    return out


class Sfu(HttpServer):
    """Twirp RoomService as LiveKit answers it; GetParticipant finds nobody. A valid CreateRoom lands in .rooms as a dict: name,
    empty_timeout, departure_timeout, fields, body, claims, token. fail: Reply(s) in place of the success."""

    def __init__(self, key, secret, addrs=(("127.0.0.1", 0),), tls=None, prefix="", **tls_options):
        self.key, self.secret, self.prefix, self.rooms, self.fail = key, secret, prefix, [], None
        super().__init__(addrs, tls, **tls_options)

    def forget(self):
        super().forget()
        with self.lock:
            self.rooms.clear()

    def answer(self, req):
        method = req.path.removeprefix(self.prefix + CREATE_ROOM.removesuffix("CreateRoom"))
        if method not in ("CreateRoom", "GetParticipant") or req.method != "POST":
            return Reply(404, {"code": "bad_route", "msg": "no handler", "meta": {}})
        auth = req.header("authorization") or ""
        if not auth.startswith("Bearer "):
            return Reply(401, "missing authorization", ctype="text/plain")
        try:
            claims = pyjwt.decode(auth[7:], self.secret, algorithms=["HS256"], issuer=self.key,
                                  options={"require": ["exp", "iss", "nbf"]})
        except pyjwt.InvalidTokenError as e:
            return Reply(401, f"invalid token: {e}", ctype="text/plain")
        video = claims.get("video", {})
        if not (video.get("roomCreate") if method == "CreateRoom" else video.get("roomAdmin")):
            return Reply(401, {"code": "unauthenticated", "msg": "permissions denied"})
        if method == "GetParticipant":
            return Reply(404, {"code": "not_found", "msg": "participant does not exist"})
        try:
            f = protobuf_decode(req.body)
            name = f[1][0].decode()
        except (ValueError, KeyError):
            return Reply(400, {"code": "malformed", "msg": "the protobuf could not be decoded"})
        with self.lock:
            self.rooms.append({"name": name, "empty_timeout": f.get(2, [0])[0], "departure_timeout": f.get(10, [0])[0],
                               "max_participants": f.get(3, [0])[0], "fields": f, "body": req.body, "claims": claims,
                               "token": auth[7:], "request": req})
            fail = self.fail
            if isinstance(fail, list):
                fail = fail.pop(0) if fail else None
        if fail is not None:
            return fail(req) if callable(fail) else fail
        body = protobuf_encode((1, "RM_abcdefghijkl"), (2, name), (3, 300), (5, int(time.time())))
        return Reply(200, body, ctype="application/protobuf")


class RawServer:
    """Hands every accepted connection to talk(socket, number) in a thread; .connections counts them."""

    def __init__(self, talk, addr="127.0.0.1", port=0):
        self.talk, self.connections, self.open = talk, 0, set()
        self.sock = listen(addr, port)
        self.addr, self.port = self.sock.getsockname()[:2]
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    @property
    def netloc(self):
        return f"[{self.addr}]:{self.port}" if ":" in self.addr else f"{self.addr}:{self.port}"

    def _accept(self):
        while True:
            try:
                conn, _ = self.sock.accept()
            except OSError:
                return
            self.connections += 1
            self.open.add(conn)
            threading.Thread(target=self._one, args=(conn, self.connections), daemon=True).start()

    def _one(self, conn, number):
        try:
            conn.settimeout(120)
            self.talk(conn, number)
        except OSError:
            pass
        finally:
            self.open.discard(conn)
            conn.close()

    def stop(self):
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(HANG)
        self.sock.close()
        for c in list(self.open):
            with contextlib.suppress(OSError):
                c.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()


class BlackHole:
    """An address and port where a SYN gets no answer: the accept queue of a listener, filled by ourselves."""

    def __init__(self, addr="127.0.0.1", port=0):
        self.sock = listen(addr, port, backlog=0)
        self.addr, self.port = self.sock.getsockname()[:2]
        self.fill = []
        for _ in range(8):
            s = socket.socket(family(addr))
            s.setblocking(False)
            s.connect_ex((self.addr, self.port))
            self.fill.append(s)
            if not select.select([], [s], [], 0.2)[1]:
                return              # this one already hangs
        raise AssertionError("the accept queue does not fill")

    def stop(self):
        for s in self.fill + [self.sock]:
            s.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()


# ---- DNS ----------------------------------------------------------------------------------------------

class Dns:
    """Scripted nameserver, UDP and TCP on one address. zone: text of a zone file, absolute names.
    hook(name, type) -> function(query bytes, DNSRecord, transport) giving one packet, a list of packets
    or None (silence). .queries: list of (name, type, transport). Names compare without case."""

    def __init__(self, zone="", addr="127.0.0.1", port=0, ttl=300):
        self.queries, self.packets, self.hooks, self.errors, self.ttl = [], [], {}, [], ttl
        self.rrs, self.lock = {}, threading.Lock()
        self.any_hook = None
        self.tcp_step = 0           # send TCP answers so many bytes at a time
        for _ in range(50):         # one port number for both protocols
            self.tcp = listen(addr, port)
            self.addr, self.port = self.tcp.getsockname()[:2]
            self.udp = socket.socket(family(addr), socket.SOCK_DGRAM)
            try:
                self.udp.bind((addr, self.port))
                break
            except OSError as e:
                self.udp.close()
                self.tcp.close()
                if port or e.errno != errno.EADDRINUSE:
                    raise
        self.add(zone)
        self.running = True
        self.threads = [threading.Thread(target=t, daemon=True) for t in (self._udp, self._tcp)]
        for t in self.threads:
            t.start()

    @property
    def netloc(self):
        return f"[{self.addr}]:{self.port}" if ":" in self.addr else f"{self.addr}:{self.port}"

    def add(self, zone):
        for rr in dnslib.RR.fromZone(zone, ttl=self.ttl):
            with self.lock:
                self.rrs.setdefault(str(rr.rname).lower(), []).append(rr)
        return self

    def set(self, zone):
        with self.lock:
            self.rrs = {}
        return self.add(zone)

    def hook(self, name, rtype, what):
        """rtype: "A", "AAAA", "SRV" or "*"."""
        with self.lock:
            self.hooks[name.lower().rstrip(".") + ".", rtype] = what
        return self

    def count(self, name=None, rtype=None):
        with self.lock:
            return sum((name is None or q[0] == name.lower().rstrip(".") + ".") and (rtype is None or q[1] == rtype)
                       for q in self.queries)

    def forget(self):
        with self.lock:
            self.queries.clear()
            self.packets.clear()

    def reply(self, rec, rcode=0, **header):
        """An answer skeleton for a DNSRecord."""
        r = rec.reply(ra=1, aa=0)
        r.header.rcode = rcode
        for k, v in header.items():
            setattr(r.header, k, v)
        return r

    def resolve(self, rec):
        """The honest answer from the zone, CNAMEs followed."""
        r = self.reply(rec)
        name, rtype = str(rec.q.qname).lower(), dnslib.QTYPE[rec.q.qtype]
        for _ in range(16):
            with self.lock:
                here = list(self.rrs.get(name, ()))
            found = [x for x in here if dnslib.QTYPE[x.rtype] == rtype]
            cname = [x for x in here if dnslib.QTYPE[x.rtype] == "CNAME"]
            if found or not cname:
                for x in found:
                    r.add_answer(x)
                if not here and not r.rr:
                    r.header.rcode = dnslib.RCODE.NXDOMAIN
                if not found:
                    r.add_auth(dnslib.RR("test.", dnslib.QTYPE.SOA, ttl=self.ttl, rdata=dnslib.SOA(
                        "ns.test.", "admin.test.", (1, 3600, 600, 86400, self.ttl))))
                return r
            r.add_answer(cname[0])
            name = str(cname[0].rdata.label).lower()
        return r

    def _answers(self, data, transport, peer):
        try:
            rec = dnslib.DNSRecord.parse(data)
        except dnslib.DNSError:
            return []
        rec.peer = peer
        name, rtype = str(rec.q.qname).lower(), dnslib.QTYPE[rec.q.qtype]
        with self.lock:
            self.queries.append((name, rtype, transport))
            self.packets.append({"name": name, "type": rtype, "transport": transport, "id": rec.header.id,
                                 "peer": peer, "data": data, "at": time.monotonic()})
            hook = self.hooks.get((name, rtype)) or self.hooks.get((name, "*")) or self.any_hook
        try:
            out = hook(data, rec, transport) if hook else self.resolve(rec)
            out = [] if out is None else out if isinstance(out, list) else [out]
            return [bytes(o if isinstance(o, (bytes, bytearray)) else o.pack()) for o in out]
        except Exception as e:      # a mistake in the hook: stop() raises it
            self.errors.append(e)
            return []

    def _udp(self):
        while self.running:
            try:
                data, peer = self.udp.recvfrom(65535)
            except OSError:
                return
            if not self.running:
                return
            threading.Thread(target=self._udp_one, args=(data, peer), daemon=True).start()

    def _udp_one(self, data, peer):
        with contextlib.suppress(OSError):
            for p in self._answers(data, "udp", peer):
                self.udp.sendto(p, peer)

    def _tcp(self):
        while self.running:
            try:
                conn, peer = self.tcp.accept()
            except OSError:
                return
            threading.Thread(target=self._tcp_one, args=(conn, peer), daemon=True).start()

    def _tcp_one(self, conn, peer):
        with contextlib.suppress(OSError), conn:
            conn.settimeout(HANG)
            conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            f = conn.makefile("rb")
            while True:
                head = f.read(2)
                if len(head) < 2:
                    return
                data = f.read(struct.unpack("!H", head)[0])
                for p in self._answers(data, "tcp", peer):
                    wire = struct.pack("!H", len(p)) + p
                    for i in range(0, len(wire), self.tcp_step or len(wire)):
                        conn.sendall(wire[i:i + (self.tcp_step or len(wire))])

    def stop(self):
        self.running = False
        with contextlib.suppress(OSError):
            socket.socket(self.udp.family, socket.SOCK_DGRAM).sendto(b"", (self.addr, self.port))
        for s in (self.tcp,):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        for t in self.threads:
            t.join(HANG)
        self.udp.close()
        self.tcp.close()
        if self.errors:
            raise self.errors[0]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()


# ---- real servers -----------------------------------------------------------------------------------

class Process:
    """A real server in the foreground: its output goes to .log_file; ready is asked until true."""

    def __init__(self, args, ready, cwd=None, stdin=None, env=None):
        fd, self.log_file = tempfile.mkstemp(prefix=os.path.basename(args[0]) + "-", suffix=".log", dir=SCRATCH)
        self.proc = popen(args, stdout=fd, stderr=subprocess.STDOUT, cwd=cwd,
                                     stdin=stdin or subprocess.DEVNULL, env=env)
        os.close(fd)
        try:
            wait_for(f"{args[0]}: {self.log_text()}", lambda: self._alive() and ready())
        except BaseException:
            self.stop()
            raise

    def _alive(self):
        if self.proc.poll() is not None:
            raise RuntimeError(f"{self.proc.args} ended with {self.proc.returncode}: {self.log_text()}")
        return True

    def log_text(self):
        with open(self.log_file, errors="replace") as f:
            return f.read()

    def stop(self):
        if self.proc.poll() is None:
            self.proc.terminate()
            try:
                self.proc.wait(5)
            except subprocess.TimeoutExpired:
                self.proc.kill()
                self.proc.wait(5)
        with contextlib.suppress(OSError):
            os.unlink(self.log_file)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()


def accepts(addr, port):
    with socket.socket(family(addr)) as s:
        s.settimeout(1)
        return s.connect_ex((addr, port)) == 0


class Dnsmasq(Process):
    """dnsmasq as the authority of what config says (lines of its configuration file)."""

    def __init__(self, config, addr="127.0.0.1", port=None):
        self.addr, self.port = addr, port or free_port(addr)
        self.dir = tempfile.mkdtemp(prefix="lkjwt-dnsmasq-", dir=SCRATCH)
        path = os.path.join(self.dir, "dnsmasq.conf")
        with open(path, "w") as f:
            f.write(f"port={self.port}\nlisten-address={addr}\nbind-interfaces\nno-resolv\nno-hosts\nno-daemon\n"
                    f"user=root\ngroup=root\nlog-queries\nlog-facility=-\npid-file=\n{config}\n")
        super().__init__([which("dnsmasq"), "-C", path], self._up)

    @property
    def netloc(self):
        return f"{self.addr}:{self.port}"

    def _up(self):
        q = dnslib.DNSRecord.question("ready.test")
        try:
            q.send(self.addr, self.port, timeout=1)
            return True
        except OSError:
            return False

    def stop(self):
        super().stop()
        shutil.rmtree(self.dir, ignore_errors=True)


class Nginx(Process):
    """nginx in the foreground; http: text inside its http block."""

    def __init__(self, http, addr, port):
        self.dir = tempfile.mkdtemp(prefix="lkjwt-nginx-", dir=SCRATCH)
        self.addr, self.port = addr, port
        path = os.path.join(self.dir, "nginx.conf")
        with open(path, "w") as f:
            f.write(f"daemon off;\nuser root;\nmaster_process off;\nerror_log stderr;\npid {self.dir}/pid;\n"
                    f"events {{}}\nhttp {{\naccess_log {self.dir}/access.log;\n"
                    + "".join(f"{k}_temp_path {self.dir}/{k};\n" for k in
                              ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
                    + http + "\n}\n")
        super().__init__([which("nginx"), "-p", self.dir, "-c", path, "-e", "stderr"], lambda: accepts(addr, port))

    def access_log(self):
        with open(os.path.join(self.dir, "access.log")) as f:
            return f.read()

    def stop(self):
        super().stop()
        shutil.rmtree(self.dir, ignore_errors=True)


def which(name):
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")
    assert path, f"{name} is not installed"
    return path
