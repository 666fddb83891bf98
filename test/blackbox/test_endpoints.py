"""PROTOCOL.md 2.1: routes, methods, headers, prefix, request targets."""

import pytest

from exchange import ALLOWED, CORS, ENDPOINTS, NOT_JSON, check_common, check_cors, check_error, check_granted, \
    check_id, check_plain

ANY_METHOD = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "PROPFIND", "FOO", "post", "options",
              "get")


def check_404(reply, method="GET"):
    check_plain(reply)
    check_id(reply)
    assert reply.status == 404
    assert reply.header("Content-Type") == "text/plain; charset=utf-8"
    assert reply.header("X-Content-Type-Options") == "nosniff"
    assert reply.header("Content-Length") == "19"
    assert reply.body == (b"" if method == "HEAD" else b"404 page not found\n")


@pytest.mark.parametrize("method", [m for m in ANY_METHOD if m not in ("POST", "OPTIONS")])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_token_endpoint_other_method(svc, path, method):
    reply = svc.request(method, path)
    check_cors(reply)
    assert (reply.status, reply.body, reply.header("Content-Length")) == (405, b"", "0")
    assert reply.header("Allow") == "OPTIONS, POST"


@pytest.mark.parametrize("headers", [
    [], [("Origin", "https://call.example.org"), ("Access-Control-Request-Method", "POST"),
         ("Access-Control-Request-Headers", "content-type")]], ids=["bare", "preflight"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_token_endpoint_options(svc, path, headers):
    reply = svc.request("OPTIONS", path, headers=headers)
    check_cors(reply)
    assert (reply.status, reply.body, reply.header("Content-Length")) == (200, b"", "0")
    assert "allow" not in reply.headers


@pytest.mark.parametrize("path", ENDPOINTS)
def test_origin_is_never_reflected(svc, rig, path):
    reply = svc.post(path, rig.body(path, rig.other), [("Origin", "https://evil.example"), ("Cookie", "a=b")])
    check_granted(reply)
    assert not any("evil" in v for _, v in reply.raw_headers)
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_healthz(svc, method):
    reply = svc.request(method, "/healthz", headers=[("Origin", "https://x")])
    check_plain(reply)
    assert (reply.status, reply.body, reply.header("Content-Length")) == (200, b"", "0")
    assert "content-type" not in reply.headers


@pytest.mark.parametrize("method", [m for m in ANY_METHOD if m not in ("GET", "HEAD")])
def test_healthz_other_method(svc, method):
    reply = svc.request(method, "/healthz")
    check_plain(reply)
    assert (reply.status, reply.body, reply.header("Content-Length")) == (405, b"", "0")
    assert reply.header("Allow") == "GET, HEAD"


NOT_FOUND = ["/", "/x", "/get_token/", "/sfu", "/sfu/", "/sfu/get/", "/healthz/", "/Get_Token", "/sfu/GET",
             "/get%5ftoken", "/get%5Ftoken", "/./get_token", "/x/../get_token", "/sfu/./get", "/get_token;a=b",
             "/get_token%3f", "/%2fget_token", "/get_tokens", "/get_toke", "/healthz.", "/metrics",
             "/delegate_delayed_leave/", "/sfu_webhook/", "http://example.org", "http://example.org/x",
             "http://get_token/", "/?/get_token", "/livekit/jwt/get_token", "/http://h/get_token"]


@pytest.mark.parametrize("target", NOT_FOUND)
def test_not_found(svc, target):
    check_404(svc.request("POST", target, "{}"))


@pytest.mark.parametrize("method", ANY_METHOD)
@pytest.mark.parametrize("path", ["/", "/nothing"])
def test_not_found_any_method(svc, path, method):
    check_404(svc.request(method, path), method)


FOUND = ["//get_token", "///get_token", "/get_token?", "/get_token?a=b", "/get_token?/healthz", "/get_token?a?b%00",
         "http://example.org/get_token", "https://example.org:8443/get_token", "http://other.host//get_token?x=1",
         "http://[::1]:80/get_token"]


@pytest.mark.parametrize("target", FOUND + [f.replace("get_token", "sfu/get") for f in FOUND] +
                         ["/sfu//get", "//sfu///get", "http://example.org//sfu//get?q", "/delegate_delayed_leave",
                          "//delegate_delayed_leave?x"])
def test_found(svc, target):
    check_error(svc.request("POST", target, ""), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("target", ["//healthz", "/healthz?x", "http://a.example/healthz"])
def test_found_healthz(svc, target):
    assert svc.request("GET", target).status == 200


def test_options_asterisk(svc):
    reply = svc.request("OPTIONS", "*")
    check_common(reply)
    assert (reply.status, reply.body, reply.header("Content-Length")) == (200, b"", "0")


@pytest.mark.parametrize("request_line", ["GET *", "POST *", "CONNECT example.org:443", "CONNECT /get_token",
                                          "CONNECT *", "OPTIONS **", "OPTIONS *?x", "GET healthz",
                                          "POST example.org:80"])
def test_bad_target(svc, request_line):
    with svc.wire() as w:
        w.send(f"{request_line} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        reply = w.reply(request_line.split()[0] if not request_line.startswith("CONNECT") else "GET")
        check_plain(reply)
        assert reply.status == 400 and reply.header("Connection") == "close"
        assert w.at_end()


@pytest.mark.parametrize("value", ["/livekit/jwt", "/livekit/jwt/"])
def test_prefix(rig, value):
    prefixed = ["/livekit/jwt/get_token", "/livekit/jwt/sfu/get", "/livekit//jwt///get_token", "//livekit/jwt/sfu/get?x",
                "http://h/livekit/jwt/get_token", "/livekit/jwt/delegate_delayed_leave"]
    with rig.service(LKJWT_PATH_PREFIX=value) as s:
        for target in prefixed + list(ENDPOINTS):
            check_error(s.request("POST", target, ""), 400, "M_NOT_JSON", NOT_JSON)
        for target in ("/healthz", "/livekit/jwt/healthz"):
            assert s.request("GET", target).status == 200
        for target in ("/livekit/jwt", "/livekit/jwt/", "/livekit/jwtget_token", "/livekit/jwt/livekit/jwt/get_token",
                       "/livekit/get_token", "/x/livekit/jwt/get_token", "/LIVEKIT/jwt/get_token"):
            check_404(s.request("POST", target, ""))
        path = "/livekit/jwt/get_token"
        check_granted(s.post(path, rig.body("/get_token", rig.full)))


def test_unstripped_prefix_is_hinted_at(rig):
    with rig.service() as s:
        for target in ("/x/other", "/nothing", "/livekit/jwt/get_token", "/a/sfu/get", "/b/healthz", "/get_token/"):
            s.request("POST", target)
        s.request("GET", "/healthz")
        assert s.stop() == 0
        hints = [line for line in s.log() if "prefix" in line["msg"].lower()]
        assert len(hints) == len(s.events("PREFIX_HINT", level="warning")) == 3, s.log_text()


@pytest.mark.parametrize("path", ENDPOINTS)
def test_too_large_has_cors(svc, path):
    reply = svc.request("POST", path, "x" * 65537)
    check_error(reply, 413, "M_TOO_LARGE")
    assert reply.header("Connection") == "close"


def test_reply_headers_are_the_same_set_every_time(svc, rig):
    path = "/get_token"
    replies = [svc.post(path, rig.body(path, rig.full)), svc.post(path, "{}"), svc.request("OPTIONS", path),
               svc.post(path, rig.body(path, rig.full, "@x:y", "unknown"))]
    names = [set(r.headers) - {"connection"} for r in replies]
    assert all(n == names[0] for n in names), names
    assert {c.lower() for c in CORS} < names[0] <= ALLOWED


def test_absolute_form_still_needs_host(svc):
    with svc.wire() as w:
        w.send(b"GET http://h/healthz HTTP/1.1\r\n\r\n")
        assert w.reply().status == 400
    # The authority of the target wins over Host, and neither is used.
    with svc.wire() as w:
        w.send(b"GET http://h/healthz HTTP/1.1\r\nHost: other\r\n\r\n")
        assert w.reply().status == 200


def test_healthz_is_not_logged(rig):
    with rig.service(LIVEKIT_LOG_LEVEL="info") as s:
        for _ in range(100):
            assert s.request("GET", "/healthz").status == 200
        assert s.stop() == 0
        assert len(s.log()) < 20, s.log_text()
