"""SECURITY.md T16: behind the proxies that operators put in front. Exchanges
pass, refusals arrive whole, and no byte is read twice: what the service
answered, the client that sent it received."""
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from exchange import ENDPOINTS
from peers import Nginx, Process, accepts, which
from service import Closed, Wire, dial, free_port
from test_framing import ROWS

NGINX = """
upstream up {{ server 127.0.0.1:{service}; keepalive 8; }}
client_max_body_size 2m;
client_header_timeout 1s;
client_body_timeout 1s;
keepalive_timeout 2s;
server {{
    listen 127.0.0.1:{port};
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host $host;
    proxy_request_buffering {buffering};
    location /livekit/jwt/ {{ proxy_pass http://up/; }}
    location / {{ proxy_pass http://up; }}
}}
"""
HAPROXY = """
global
    maxconn 500
defaults
    mode http
    retries 0
    timeout connect 5s
    timeout client 2s
    timeout http-request 1s
    timeout server 30s
    option http-keep-alive
    http-reuse always
frontend front
    bind 127.0.0.1:{port}
    http-request set-path %[path,regsub(^/livekit/jwt/,/)]
    default_backend back
backend back
    server one 127.0.0.1:{service}
"""


class Behind:
    """A service and a proxy before it."""

    def __init__(self, kind, service, folder):
        self.service, self.port = service, free_port()
        where = dict(service=service.port, port=self.port, buffering="off" if kind == "nginx unbuffered" else "on")
        if kind == "haproxy":
            conf = folder / "haproxy.cfg"
            conf.write_text(HAPROXY.format(**where))
            self.proxy = Process([which("haproxy"), "-db", "-f", str(conf)], lambda: accepts("127.0.0.1", self.port))
        else:
            self.proxy = Nginx(NGINX.format(**where), "127.0.0.1", self.port)

    def wire(self, timeout=20.0):
        return Wire(dial(f"127.0.0.1:{self.port}", timeout))

    def ask(self, method, path, body=b"", headers=()):
        head = f"{method} {path} HTTP/1.1\r\nHost: call.example.org\r\n"
        head += "".join(f"{k}: {v}\r\n" for k, v in headers) + f"Content-Length: {len(body)}\r\n\r\n"
        with self.wire() as w:
            w.send(head.encode() + body)
            return w.reply(method)


@pytest.fixture(scope="module", params=["nginx", "nginx unbuffered", "haproxy"])
def behind(request, rig, tmp_path_factory):
    with rig.service(LIVEKIT_LOG_LEVEL="debug") as s:
        b = Behind(request.param, s, tmp_path_factory.mktemp("proxy"))
        with b.proxy:
            yield b
        assert s.stop() == 0


@pytest.mark.parametrize("prefix", ["", "/livekit/jwt"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_exchange(behind, rig, path, prefix):
    body = json.dumps(rig.body(path, rig.full)).encode()
    reply = behind.ask("POST", prefix + path, body, [("X-Request-Id", "through-a-proxy")])
    assert reply.status == 200 and set(reply.json) == {"url", "jwt"}
    assert reply.header("X-Request-Id") == "through-a-proxy"
    preflight = behind.ask("OPTIONS", prefix + path, b"", [("Origin", "https://a.example"),
                                                           ("Access-Control-Request-Method", "POST")])
    for r in (reply, preflight, behind.ask("POST", prefix + path, b""), behind.ask("PUT", prefix + path)):
        assert r.header("Access-Control-Allow-Origin") == "*" and r.header("Access-Control-Allow-Methods") == "POST"
        assert r.header("Content-Type") == "application/json"


def test_chunked_from_the_client(behind, rig):
    body = json.dumps(rig.body("/sfu/get", rig.other)).encode() + b" " * 20000
    with behind.wire() as w:
        w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
            b"%x\r\n" % len(body[i:i + 777]) + body[i:i + 777] + b"\r\n" for i in range(0, len(body), 777)) + b"0\r\n\r\n")
        assert w.reply("POST").status == 200


def test_kept_connections_never_fail(behind, rig):
    """Hundreds of requests over the proxy's pool: no 502 from a close that met a request."""
    bodies = [json.dumps(rig.body("/sfu/get", rig.other)).encode() for _ in range(40)]
    statuses = []

    def client(n):
        for k in range(40):
            body = bodies[(n + k) % 40] if k % 2 else b""
            statuses.append(behind.ask("POST", "/sfu/get", body).status)
            statuses.append(behind.ask("GET", ("/healthz", "/nothing")[k % 2]).status)
    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(statuses) == 480 and set(statuses) == {200, 400, 404}


@pytest.mark.parametrize("size", [65537, 70000])
def test_refusal_of_a_large_body_arrives(behind, size):
    """The service answers and lingers while the proxy still sends: 413, never a 502. (It discards 64 KB at most.)"""
    for path in ENDPOINTS * 5:
        reply = behind.ask("POST", path, b"x" * size)
        assert reply.status == 413 and reply.errcode == "M_TOO_LARGE", reply
        assert reply.header("Access-Control-Allow-Origin") == "*"


INNER = b"GET /inner-%d HTTP/1.1\r\nHost: h\r\nX-Request-Id: inner-%d\r\n\r\n"
# Two lengths that disagree; an inner request lies where one of the readings ends. %s: the inner one.
DISAGREE = [
    (b"Content-Length: 4", b"Transfer-Encoding: chunked", b"1\r\n{\r\n0\r\n\r\n%s"),
    (b"Content-Length: 5", b"Transfer-Encoding: chunked", b"0\r\n\r\n%s"),
    (b"Content-Length: 300", b"Transfer-Encoding: chunked", b"0\r\n\r\n%s"),
    (b"Content-Length: 2", b"Content-Length: 300", b"{}%s"),
    (b"Content-Length: 2, 300", b"X: y", b"{}%s"),
    (b"Content-Length: +2", b"X: y", b"{}%s"),
    (b"Content-Length: 2 ", b"Content-Length: 2", b"{}%s"),
    (b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"0\r\n\r\n%s"),
    (b"Transfer-Encoding: identity", b"Content-Length: 2", b"{}%s"),
    (b"Transfer-Encoding: xchunked", b"Content-Length: 2", b"{}%s"),
    (b"Transfer-Encoding : chunked", b"Content-Length: 5", b"0\r\n\r\n%s"),
    (b"Transfer-Encoding:\x0bchunked", b"Content-Length: 5", b"0\r\n\r\n%s"),
    (b"Transfer-Encoding: chunked\x00", b"Content-Length: 5", b"0\r\n\r\n%s"),
    (b"Transfer-Encoding:\r\n chunked", b"Content-Length: 5", b"0\r\n\r\n%s"),
    (b"X: y\nTransfer-Encoding: chunked", b"Content-Length: 5", b"0\r\n\r\n%s"),
    (b"X: y\rTransfer-Encoding: chunked", b"Content-Length: 5", b"0\r\n\r\n%s"),
    (b"Transfer-Encoding: chunked, gzip", b"X: y", b"0\r\n\r\n%s"),
    (b"Transfer-Encoding: gzip, chunked", b"X: y", b"0\r\n\r\n%s"),
    (b"Transfer-Encoding: chunked", b"X: y", b"2;a\n\r\n{}\r\n0\r\n\r\n%s"),
    (b"Transfer-Encoding: chunked", b"X: y", b"2\n{}\r\n0\r\n\r\n%s"),
    (b"Transfer-Encoding: chunked", b"X: y", b"0x2\r\n{}\r\n0\r\n\r\n%s"),
    (b"Transfer-Encoding: chunked", b"X: y", b"2 \r\n{}\r\n0\r\n\r\n%s"),
    (b"Transfer-Encoding: chunked", b"X: y", b"100000002\r\n{}\r\n0\r\n\r\n%s"),
    (b"Transfer-Encoding: chunked", b"X: y", b"2\r\n{}0\r\n\r\n%s"),
    (b"Transfer-Encoding: chunked", b"X: y", b"0\r\nContent-Length: 300\r\n\r\n%s"),
    (b"Transfer-Encoding: chunked", b"X: y", b"0\r\n%s"),
    (b"Expect: 100-continue", b"Content-Length: 5", b"hello%s"),
    (b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
     b"Content-Length: 2", b"{}%s"),
]


def test_s11_requests_in_are_requests_out(behind):
    """Every framing row and every pair of lengths that disagree, each followed by a request of its own name: if the
    service served that one, the answer went to the client that sent it."""
    cases = [data for data, _, _ in ROWS.values()]
    cases += [b"POST /get_token HTTP/1.1\r\nHost: h\r\n" + a + b"\r\n" + b + b"\r\n\r\n" + body
              for a, b, body in DISAGREE]
    answers = {}

    def send(n):
        data = cases[n]
        inner = INNER % (n, n)
        data = data.replace(b"%s", inner) if data.endswith(b"%s") else data + inner
        out = b""
        with behind.wire(30) as w:
            try:
                w.send(data + INNER.replace(b"inner", b"last") % (n, n))
                w.sock.settimeout(30)
                out = w.drain(30)
            except (OSError, Closed):
                pass
        answers[n] = out
    with ThreadPoolExecutor(50) as pool:
        list(pool.map(send, range(len(cases))))
    assert len(answers) == len(cases)
    assert behind.ask("GET", "/healthz").status == 200
    behind.ask("GET", "/the-end")
    behind.service.wait_event("NOT_FOUND", path="/the-end")
    served = [e["req"] for e in behind.service.events("NOT_FOUND") if e.get("req", "").startswith(("inner-", "last-"))]
    assert len(served) == len(set(served)), "a request was read twice"
    assert not [e for e in behind.service.log() if e["event"] == "NOT_FOUND" and "suppressed" in e]
    astray = [rid for rid in served if f"x-request-id: {rid}\r".encode() not in answers[int(rid.split("-")[1])].lower()]
    assert astray == [], "answered, but not to its sender"
    assert len(served) > 50             # the rows that keep the connection were followed
