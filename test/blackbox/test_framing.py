"""SECURITY.md 7 and PROTOCOL.md 2.2: every row, whole, byte by byte and split;
claim s11: bytes have one framing, ambiguity is refused and the connection closed."""
import gzip
import json
import socket
import threading
import time

import pytest

from exchange import ENDPOINTS, NOT_JSON, check_common, check_error, check_granted, check_plain
from service import DEADLINE

H = b"Host: test.example.org\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + H + b"\r\n"
POST = b"POST /get_token HTTP/1.1\r\n" + H
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

CLOSE, KEEP = "close", "keep"


def get(*lines):
    return b"GET /healthz HTTP/1.1\r\n" + b"".join(x + b"\r\n" for x in lines) + b"\r\n"


def post(*lines, body=b""):
    return POST + b"".join(x + b"\r\n" for x in lines) + b"\r\n" + body


# id: (bytes, status, what becomes of the connection)
ROWS = {
    # request line
    "one CRLF before": (b"\r\n" + GET, 200, KEEP),
    "two CRLF before": (b"\r\n\r\n" + GET, 400, CLOSE),
    "LF before": (b"\n" + GET, 400, CLOSE),
    "CR before": (b"\r" + GET, 400, CLOSE),
    "blank before": (b" " + GET, 400, CLOSE),
    "request line ends in LF": (b"GET /healthz HTTP/1.1\n" + H + b"\r\n", 400, CLOSE),
    "request line ends in CR": (b"GET /healthz HTTP/1.1\r" + H + b"\r\n", 400, CLOSE),
    "two blanks": (b"GET  /healthz HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "two blanks later": (b"GET /healthz  HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "TAB between": (b"GET\t/healthz HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "blank behind": (b"GET /healthz HTTP/1.1 \r\n" + H + b"\r\n", 400, CLOSE),
    "no version": (b"GET /healthz\r\n\r\n", 400, CLOSE),
    "only a word": (b"GET\r\n\r\n", 400, CLOSE),
    "no method": (b"/healthz HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "method not a token": (b"G@T /healthz HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "NUL in the method": (b"G\0T /healthz HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x55" * 32 + b"\r\n\r\n", 400, CLOSE),
    # version
    "HTTP/1.5": (GET.replace(b"1.1", b"1.5"), 200, KEEP),
    "HTTP/1.9": (GET.replace(b"1.1", b"1.9"), 200, KEEP),
    "HTTP/1.0": (GET.replace(b"1.1", b"1.0"), 200, CLOSE),
    "HTTP/1.0 keep-alive": (b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200, CLOSE),
    "HTTP/1.0 no Host": (b"GET /healthz HTTP/1.0\r\n\r\n", 200, CLOSE),
    "HTTP/2.0": (GET.replace(b"HTTP/1.1", b"HTTP/2.0"), 505, CLOSE),
    "HTTP/0.9": (GET.replace(b"HTTP/1.1", b"HTTP/0.9"), 505, CLOSE),
    "HTTP/3.1": (GET.replace(b"HTTP/1.1", b"HTTP/3.1"), 505, CLOSE),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, CLOSE),
    "HTTP/1": (GET.replace(b"HTTP/1.1", b"HTTP/1"), 400, CLOSE),
    "HTTP/1.": (GET.replace(b"HTTP/1.1", b"HTTP/1."), 400, CLOSE),
    "HTTP/1.10": (GET.replace(b"HTTP/1.1", b"HTTP/1.10"), 400, CLOSE),
    "HTTP/11": (GET.replace(b"HTTP/1.1", b"HTTP/11"), 400, CLOSE),
    "HTTP/1,1": (GET.replace(b"HTTP/1.1", b"HTTP/1,1"), 400, CLOSE),
    "http/1.1": (GET.replace(b"HTTP/1.1", b"http/1.1"), 400, CLOSE),
    "HTTP 1.1": (GET.replace(b"HTTP/1.1", b"HTTP 1.1"), 400, CLOSE),
    "FTP/1.1": (GET.replace(b"HTTP/1.1", b"FTPX/1.1"), 400, CLOSE),
    # target
    "fragment": (b"GET /healthz#a HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "fragment in absolute form": (b"GET http://h/healthz#a HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "DEL in target": (b"GET /healthz?\x7f HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "byte 80 in target": (b"GET /healthz?\x80 HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "UTF-8 in target": ("GET /healthz?ä HTTP/1.1\r\n".encode() + H + b"\r\n", 400, CLOSE),
    "NUL in target": (b"GET /healthz?\0 HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "authority form": (b"GET example.org:80 HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "CONNECT": (b"CONNECT example.org:443 HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "no slash": (b"GET healthz HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "asterisk": (b"GET * HTTP/1.1\r\n" + H + b"\r\n", 400, CLOSE),
    "OPTIONS asterisk": (b"OPTIONS * HTTP/1.1\r\n" + H + b"\r\n", 200, KEEP),
    "target of 3,900": (b"GET /healthz?" + b"x" * 3900 + b" HTTP/1.1\r\n" + H + b"\r\n", 200, KEEP),
    "target of 4,200": (b"GET /healthz?" + b"x" * 4200 + b" HTTP/1.1\r\n" + H + b"\r\n", 414, CLOSE),
    "request line without end": (b"GET /" + b"x" * 9000, 414, CLOSE),
    "method without end": (b"G" * 5000, 414, CLOSE),
    # header lines
    "LF ends a header": (b"GET /healthz HTTP/1.1\r\nHost: h\n\r\n", 400, CLOSE),
    "LF LF ends the head": (b"GET /healthz HTTP/1.1\r\nHost: h\n\n", 400, CLOSE),
    "CR inside a value": (get(b"Host: h", b"X: a\rb"), 400, CLOSE),
    "LF inside a value": (get(b"Host: h", b"X: a\nY: b"), 400, CLOSE),
    "CR at the end of a value": (get(b"Host: h", b"X: a\r"), 400, CLOSE),
    "NUL in a value": (get(b"Host: h", b"X: a\0b"), 400, CLOSE),
    "01 in a value": (get(b"Host: h", b"X: a\x01b"), 400, CLOSE),
    "DEL in a value": (get(b"Host: h", b"X: a\x7fb"), 400, CLOSE),
    "ESC in a value": (get(b"Host: h", b"X: \x1b[31m"), 400, CLOSE),
    "TAB in a value": (get(b"Host: h", b"X: a\tb"), 200, KEEP),
    "blanks around a value": (get(b"Host: h", b"X: \t a \t "), 200, KEEP),
    "empty value": (get(b"Host: h", b"X:"), 200, KEEP),
    "folded line": (get(b"Host: h", b"X: a", b" b"), 400, CLOSE),
    "folded by TAB": (get(b"Host: h", b"X: a", b"\tb"), 400, CLOSE),
    "first line folded": (get(b" Host: h"), 400, CLOSE),
    "blank before colon": (get(b"Host: h", b"X : a"), 400, CLOSE),
    "TAB before colon": (get(b"Host: h", b"X\t: a"), 400, CLOSE),
    "blank in a name": (get(b"Host: h", b"X Y: a"), 400, CLOSE),
    "empty name": (get(b"Host: h", b": a"), 400, CLOSE),
    "no colon": (get(b"Host: h", b"X"), 400, CLOSE),
    "NUL in a name": (get(b"Host: h", b"X\0: a"), 400, CLOSE),
    "brackets in a name": (get(b"Host: h", b"X[]: a"), 400, CLOSE),
    "UTF-8 in a name": (get(b"Host: h", "Ä: a".encode()), 400, CLOSE),
    "every token character": (get(b"Host: h", b"!#$%&'*+-.^_`|~09azAZ: a"), 200, KEEP),
    "64 fields": (get(b"Host: h", *[b"X%d: a" % i for i in range(63)]), 200, KEEP),
    "65 fields": (get(b"Host: h", *[b"X%d: a" % i for i in range(64)]), 431, CLOSE),
    "head of 7 KB": (get(b"Host: h", *[b"X: " + b"a" * 1000] * 7), 200, KEEP),
    "head of 9 KB": (get(b"Host: h", *[b"X: " + b"a" * 1000] * 9), 431, CLOSE),
    "one header of 9 KB": (get(b"Host: h", b"X: " + b"a" * 9000), 431, CLOSE),
    "header without end": (b"GET /healthz HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 20000, 431, CLOSE),
    "header name without end": (b"GET /healthz HTTP/1.1\r\nHost: h\r\n" + b"a" * 20000, 431, CLOSE),
    # Host
    "no Host": (get(b"X: a"), 400, CLOSE),
    "no header at all": (b"GET /healthz HTTP/1.1\r\n\r\n", 400, CLOSE),
    "Host twice": (get(b"Host: h", b"Host: h"), 400, CLOSE),
    "Host twice, other case": (get(b"Host: h", b"hOST: x"), 400, CLOSE),
    "Host twice in 1.0": (b"GET /healthz HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400, CLOSE),
    "Host empty": (get(b"Host:"), 400, CLOSE),
    "Host blank": (get(b"Host:   "), 400, CLOSE),
    "Host with blank": (get(b"Host: a b"), 400, CLOSE),
    "Host with path": (get(b"Host: a/b"), 400, CLOSE),
    "Host with user": (get(b"Host: a@b"), 400, CLOSE),
    "Host list": (get(b"Host: a, b"), 400, CLOSE),
    "Host with odd port": (get(b"Host: a:b"), 400, CLOSE),
    "Host name and port": (get(b"Host: example.org:8080"), 200, KEEP),
    "Host IPv4": (get(b"Host: 127.0.0.1:80"), 200, KEEP),
    "Host IPv6": (get(b"Host: [::1]:80"), 200, KEEP),
    "Host only": (get(b"Host: localhost"), 200, KEEP),
    "Host, other case": (get(b"HOST: localhost"), 200, KEEP),
    # Content-Length
    "length 0": (post(b"Content-Length: 0"), 400, KEEP),
    "no length at all": (post(), 400, KEEP),
    "length 2": (post(b"Content-Length: 2", body=b"{}"), 400, KEEP),
    "length with zeros": (post(b"Content-Length: 0000000000000000002", body=b"{}"), 400, KEEP),
    "length in blanks": (post(b"Content-Length: \t2 ", body=b"{}"), 400, KEEP),
    "length of 20 digits": (post(b"Content-Length: 00000000000000000002", body=b"{}"), 400, CLOSE),
    "length +2": (post(b"Content-Length: +2", body=b"{}"), 400, CLOSE),
    "length -2": (post(b"Content-Length: -2", body=b"{}"), 400, CLOSE),
    "length 0x2": (post(b"Content-Length: 0x2", body=b"{}"), 400, CLOSE),
    "length 2.0": (post(b"Content-Length: 2.0", body=b"{}"), 400, CLOSE),
    "length 2;": (post(b"Content-Length: 2;", body=b"{}"), 400, CLOSE),
    "length empty": (post(b"Content-Length:", body=b"{}"), 400, CLOSE),
    "length word": (post(b"Content-Length: two", body=b"{}"), 400, CLOSE),
    "length list": (post(b"Content-Length: 2, 2", body=b"{}"), 400, CLOSE),
    "length list 2": (post(b"Content-Length: 2,3", body=b"{}"), 400, CLOSE),
    "length 1 2": (post(b"Content-Length: 1 2", body=b"{}"), 400, CLOSE),
    "length twice": (post(b"Content-Length: 2", b"Content-Length: 3", body=b"{}"), 400, CLOSE),
    "length twice the same": (post(b"Content-Length: 2", b"content-length: 2", body=b"{}"), 400, CLOSE),
    "length beyond 64 bits": (post(b"Content-Length: 99999999999999999999"), 400, CLOSE),
    "length bad on GET": (get(b"Host: h", b"Content-Length: x"), 400, CLOSE),
    "length twice on GET": (get(b"Host: h", b"Content-Length: 0", b"Content-Length: 0"), 400, CLOSE),
    # Transfer-Encoding
    "length and chunked": (post(b"Content-Length: 2", b"Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n"), 400,
                           CLOSE),
    "chunked and length": (post(b"Transfer-Encoding: chunked", b"Content-Length: 12", body=b"2\r\n{}\r\n0\r\n\r\n"), 400,
                           CLOSE),
    "chunked in 1.0": (b"POST /get_token HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "two TE fields": (post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400, CLOSE),
    "two TE fields 2": (post(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400, CLOSE),
    "chunked twice": (post(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), 400, CLOSE),
    "chunked not last": (post(b"Transfer-Encoding: chunked, gzip", body=b"0\r\n\r\n"), 400, CLOSE),
    "unknown before chunked": (post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 501, CLOSE),
    "unknown x before chunked": (post(b"Transfer-Encoding: x-lkjwt,chunked", body=b"0\r\n\r\n"), 501, CLOSE),
    "gzip only": (post(b"Transfer-Encoding: gzip", body=b"0\r\n\r\n"), 400, CLOSE),
    "identity": (post(b"Transfer-Encoding: identity", body=b"0\r\n\r\n"), 400, CLOSE),
    "TE empty": (post(b"Transfer-Encoding:", body=b"0\r\n\r\n"), 400, CLOSE),
    "xchunked": (post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"), 400, CLOSE),
    "chunkedx": (post(b"Transfer-Encoding: chunkedx", body=b"0\r\n\r\n"), 400, CLOSE),
    "chunked with VT": (post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"), 400, CLOSE),
    "chunked in quotes": (post(b'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n"), 400, CLOSE),
    "TE on GET": (get(b"Host: h", b"Transfer-Encoding: chunked") + b"0\r\n\r\n", 200, KEEP),
    # chunks
    "chunked": (CHUNKED + b"2\r\n{}\r\n0\r\n\r\n", 400, KEEP),
    "chunked, other case": (post(b"transfer-encoding: \tchunked ", body=b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"), 400, KEEP),
    "chunk empty": (CHUNKED + b"0\r\n\r\n", 400, KEEP),
    "chunk size with zeros": (CHUNKED + b"00000002\r\n{}\r\n00000000\r\n\r\n", 400, KEEP),
    "chunk size of 9 digits": (CHUNKED + b"000000002\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk size empty": (CHUNKED + b"\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk size 0x": (CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk size +": (CHUNKED + b"+2\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk size -": (CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk size g": (CHUNKED + b"g\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk size blank before": (CHUNKED + b" 2\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk size blank behind": (CHUNKED + b"2 \r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk size blank before extension": (CHUNKED + b"2 ;a\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk size ends in LF": (CHUNKED + b"2\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk size ends in CR": (CHUNKED + b"2\r{}\r\n0\r\n\r\n", 400, CLOSE),
    "chunk data without CRLF": (CHUNKED + b"2\r\n{}0\r\n\r\n", 400, CLOSE),
    "chunk data with LF": (CHUNKED + b"2\r\n{}\n0\r\n\r\n", 400, CLOSE),
    "chunk data too long": (CHUNKED + b"2\r\n{} \r\n0\r\n\r\n", 400, CLOSE),
    "last chunk with LF": (CHUNKED + b"2\r\n{}\r\n0\n\n", 400, CLOSE),
    "end with LF": (CHUNKED + b"2\r\n{}\r\n0\r\n\n", 400, CLOSE),
    "extension": (CHUNKED + b'2;a=b;c="d"\r\n{}\r\n0;e\r\n\r\n', 400, KEEP),
    "extension of 200": (CHUNKED + b"2;" + b"a" * 200 + b"\r\n{}\r\n0\r\n\r\n", 400, KEEP),
    "extension of 300": (CHUNKED + b"2;" + b"a" * 300 + b"\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "extension without end": (CHUNKED + b"2;" + b"a" * 20000, 400, CLOSE),
    "extension with LF": (CHUNKED + b"2;a\nb\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "extension with NUL": (CHUNKED + b"2;a\0b\r\n{}\r\n0\r\n\r\n", 400, CLOSE),
    "overhead over 16 KB": (CHUNKED + (b"1;" + b"a" * 240 + b"\r\n \r\n") * 80 + b"0\r\n\r\n", 400, CLOSE),
    "overhead under 16 KB": (CHUNKED + (b"1;" + b"a" * 240 + b"\r\n \r\n") * 60 + b"0\r\n\r\n", 400, KEEP),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\nX: a\r\nY: b\r\n\r\n", 400, KEEP),
    "16 trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X: a\r\n" * 16 + b"\r\n", 400, KEEP),
    "17 trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X: a\r\n" * 17 + b"\r\n", 431, CLOSE),
    "trailers of 1.9 KB": (CHUNKED + b"2\r\n{}\r\n0\r\nX: " + b"a" * 1900 + b"\r\n\r\n", 400, KEEP),
    "trailers over 2 KB": (CHUNKED + b"2\r\n{}\r\n0\r\nX: " + b"a" * 2100 + b"\r\n\r\n", 431, CLOSE),
    "trailer without end": (CHUNKED + b"2\r\n{}\r\n0\r\nX: " + b"a" * 20000, 431, CLOSE),
    "trailer without colon": (CHUNKED + b"2\r\n{}\r\n0\r\nX\r\n\r\n", 400, CLOSE),
    "trailer folded": (CHUNKED + b"2\r\n{}\r\n0\r\nX: a\r\n b\r\n\r\n", 400, CLOSE),
    "trailer with NUL": (CHUNKED + b"2\r\n{}\r\n0\r\nX: \0\r\n\r\n", 400, CLOSE),
    "trailer with LF": (CHUNKED + b"2\r\n{}\r\n0\r\nX: a\n\r\n", 400, CLOSE),
    "trailers are never merged": (CHUNKED + b"2\r\n{}\r\n0\r\nHost: evil\r\nContent-Length: 5\r\n"
                                  b"Connection: close\r\nTransfer-Encoding: gzip\r\nExpect: x\r\n\r\n", 400, KEEP),
    # Expect
    "Expect other": (post(b"Content-Length: 2", b"Expect: 200-maybe", body=b"{}"), 417, CLOSE),
    "Expect empty": (post(b"Content-Length: 2", b"Expect:", body=b"{}"), 417, CLOSE),
    "Expect other on GET": (get(b"Host: h", b"Expect: x"), 417, CLOSE),
    # bodies where none is wanted are read, so the next request is found
    "body on GET": (get(b"Host: h", b"Content-Length: 5") + b"hello", 200, KEEP),
    "body on 404": (b"POST /nothing HTTP/1.1\r\n" + H + b"Content-Length: 5\r\n\r\nhello", 404, KEEP),
    "body on 405": (b"PUT /get_token HTTP/1.1\r\n" + H + b"Content-Length: 5\r\n\r\nhello", 405, KEEP),
    "body on OPTIONS": (b"OPTIONS /get_token HTTP/1.1\r\n" + H + b"Content-Length: 5\r\n\r\nhello", 200, KEEP),
    "chunked body on 405": (b"PUT /sfu/get HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
                            405, KEEP),
    "bad chunks on 404": (b"POST /nothing HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\nx\r\n", 400, CLOSE),
    # the client's wish
    "Connection: close": (get(b"Host: h", b"Connection: close"), 200, CLOSE),
    "Connection: Close in a list": (get(b"Host: h", b"Connection: x, Close"), 200, CLOSE),
    "Connection: keep-alive": (get(b"Host: h", b"Connection: keep-alive"), 200, KEEP),
    "Connection: closed": (get(b"Host: h", b"Connection: closed"), 200, KEEP),
    "Upgrade": (get(b"Host: h", b"Connection: Upgrade", b"Upgrade: h2c"), 200, KEEP),
    "gzip body": (post(b"Content-Encoding: gzip", b"Content-Length: %d" % len(gzip.compress(b"{}")),
                       body=gzip.compress(b"{}")), 400, KEEP),
}


def pushed(wire, parts, pause=0.0):
    """Send parts; a service that already answered may have closed."""
    wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        for part in parts:
            wire.send(part)
            if pause:
                time.sleep(pause)
    except (BrokenPipeError, ConnectionResetError):
        pass


def method_of(data):
    return data.lstrip(b"\r\n").split(b" ")[0].decode("latin-1")


def check_row(svc, row, parts, pause=0.0):
    data, status, then = ROWS[row]
    with svc.wire() as w:
        pushed(w, parts, pause)
        method = method_of(data)
        reply = w.reply(method if method in ("HEAD", "CONNECT") else "GET")
        assert reply.status == status, reply
        assert reply.interim == []
        check_common(reply)
        if then == KEEP:
            assert reply.header("Connection") in (None, "keep-alive"), reply
            w.send(GET)
            assert w.reply().status == 200
        else:
            assert reply.header("Connection") == "close", reply
            assert w.at_end(), "the connection stays open"
            if status != 200 and method != "PUT":
                check_plain(reply)
                assert reply.header("Content-Type").startswith("text/plain"), reply


@pytest.mark.parametrize("row", ROWS)
def test_s11_whole(svc, row):
    check_row(svc, row, [ROWS[row][0]])


@pytest.mark.parametrize("row", ROWS)
def test_s11_byte_by_byte(svc, row):
    data = ROWS[row][0]
    check_row(svc, row, [data[i:i + 1] for i in range(len(data))])


# Where a parser that looks too near or too far goes wrong: inside CRLF, before
# the last byte, at the end of the head, in the middle.
@pytest.mark.parametrize("row", ROWS)
def test_s11_split_in_two(svc, row):
    data = ROWS[row][0]
    head = data.find(b"\r\n\r\n")
    cuts = {1, len(data) // 2, len(data) - 1, data.find(b"\r\n") + 1, head + 1, head + 2, head + 3, head + 4}
    for cut in sorted(c for c in cuts if 0 < c < len(data)):
        check_row(svc, row, [data[:cut], data[cut:]], 0.002)


def test_cut_requests_get_no_answer(svc):
    """What ends before its end is not answered as if it were whole."""
    for data in (b"", b"GET", GET[:-1], GET[:-2], post(b"Content-Length: 5", body=b"{}"), CHUNKED + b"2\r\n{}\r\n0\r\n"):
        with svc.wire() as w:
            w.send(data)
            w.sock.shutdown(socket.SHUT_WR)
            out = w.drain()
            assert out == b"" or out.startswith(b"HTTP/1.1 400 "), (data, out)
    assert svc.request("GET", "/healthz").status == 200


def test_answer_reaches_a_client_that_only_half_closed(svc, rig):
    body = json.dumps(rig.body("/sfu/get", rig.other)).encode()
    with svc.wire() as w:
        w.send(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        w.sock.shutdown(socket.SHUT_WR)
        check_granted(w.reply("POST"))
        assert w.at_end()


# ---- bodies that count

@pytest.mark.parametrize("size", [1, 7, 100, 60000])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_chunked_exchange(svc, rig, path, size):
    body = json.dumps(rig.body(path, rig.other)).encode()
    wire = b"".join(b"%x;e\r\n" % len(body[i:i + size]) + body[i:i + size] + b"\r\n" for i in range(0, len(body), size))
    with svc.wire() as w:
        w.send(f"POST {path} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + wire
               + b"0\r\nX: y\r\n\r\n" + GET)
        check_granted(w.reply("POST"))
        assert w.reply().status == 200


@pytest.mark.parametrize("path", ENDPOINTS)
def test_exchange_by_http_1_0(svc, rig, path):
    body = json.dumps(rig.body(path, rig.other)).encode()
    with svc.wire() as w:
        w.send(f"POST {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        reply = w.reply("POST")
        check_granted(reply)
        assert reply.header("Connection") == "close" and w.at_end()


def big(path, rig, size):
    """A valid body of that many bytes: blanks count."""
    text = json.dumps(rig.body(path, rig.other))
    return text + " " * (size - len(text))


@pytest.mark.parametrize("form", ["length", "chunked"])
@pytest.mark.parametrize("limit", [None, 4096, 1024])
def test_body_limit(rig, limit, form):
    env = {} if limit is None else {"LKJWT_MAX_BODY": str(limit)}
    cap = limit or 65536
    with rig.service(**env) as s:
        for path in ENDPOINTS:
            for size in (cap, cap + 1):
                body = big(path, rig, size).encode()
                if form == "length":
                    data = b"Content-Length: %d\r\n\r\n" % size + body
                else:
                    data = b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(
                        b"%x\r\n" % len(body[i:i + 1000]) + body[i:i + 1000] + b"\r\n"
                        for i in range(0, size, 1000)) + b"0\r\n\r\n"
                with s.wire() as w:
                    pushed(w, [f"POST {path} HTTP/1.1\r\nHost: h\r\n".encode() + data])
                    reply = w.reply("POST")
                    if size == cap:
                        check_granted(reply)
                        w.send(GET)
                        assert w.reply().status == 200
                    else:
                        check_error(reply, 413, "M_TOO_LARGE")
                        assert reply.header("Connection") == "close" and w.at_end()
        s.wait_event("BODY_LIMIT")


@pytest.mark.parametrize("length", ["65537", "4294967296", "4294967298", "1000000000000000000", "9223372036854775807"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_413_by_length_comes_before_the_body(svc, path, length):
    with svc.wire() as w:
        w.send(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n".encode())
        reply = w.reply("POST")
        check_error(reply, 413, "M_TOO_LARGE")
        assert reply.header("Connection") == "close" and w.at_end()


@pytest.mark.parametrize("size", [b"10001", b"FFFFFFFF", b"7fffffff", b"80000000"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_413_before_the_end_of_a_chunk(svc, path, size):
    """One byte more than the cap decides, however large the chunk wants to be."""
    with svc.wire() as w:
        w.send(f"POST {path} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + size + b"\r\n"
               + b"x" * 65537)
        reply = w.reply("POST")
        check_error(reply, 413, "M_TOO_LARGE")
        assert reply.header("Connection") == "close" and w.at_end()


@pytest.mark.parametrize("head, status", [(b"POST /nothing", 404), (b"PUT /get_token", 405), (b"GET /healthz", 200)])
def test_unwanted_body_over_the_cap(svc, head, status):
    """Answered at once, then closed: nobody reads it to the end."""
    with svc.wire() as w:
        w.send(head + b" HTTP/1.1\r\nHost: h\r\nContent-Length: 70000\r\n\r\n")
        reply = w.reply("GET")
        assert reply.status == (413 if reply.status == 413 and status == 405 else status), reply
        assert reply.header("Connection") == "close" and w.at_end()


@pytest.mark.parametrize("form", ["length", "chunked"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_413_is_received_by_a_client_that_keeps_sending(svc, path, form):
    """The service lingers: a close with bytes unread would reset the reply away."""
    head = b"Content-Length: 10000000\r\n\r\n" if form == "length" else b"Transfer-Encoding: chunked\r\n\r\n"
    with svc.wire() as w:
        def feed():
            try:
                for _ in range(100):
                    w.send(b"x" * 1000 if form == "length" else b"3e8\r\n" + b"x" * 1000 + b"\r\n")
            except OSError:
                pass
        w.send(f"POST {path} HTTP/1.1\r\nHost: h\r\n".encode() + head)
        t = threading.Thread(target=feed)
        t.start()
        t.join(DEADLINE)            # all is sent before anything is read
        reply = w.reply("POST")
        check_error(reply, 413, "M_TOO_LARGE")


def test_endless_sender_is_cut_off(svc):
    """What follows a refusal is discarded, but not for ever."""
    with svc.wire() as w:
        w.send(POST + b"Content-Length: 70000\r\n\r\n")
        check_error(w.reply("POST"), 413, "M_TOO_LARGE")
        until = time.monotonic() + DEADLINE
        with pytest.raises(OSError):
            while time.monotonic() < until:
                w.send(b"x" * 10000)
                time.sleep(0.01)


# ---- Expect

@pytest.mark.parametrize("value", ["100-continue", "100-Continue"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_expect_continue(svc, rig, path, value):
    body = json.dumps(rig.body(path, rig.other)).encode()
    for framing, data in (("Content-Length: %d" % len(body), body),
                          ("Transfer-Encoding: chunked", b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")):
        with svc.wire() as w:
            w.send(f"POST {path} HTTP/1.1\r\nHost: h\r\n{framing}\r\nExpect: {value}\r\n\r\n".encode())
            # The 100 comes alone, before any byte of the body is sent.
            w.sock.settimeout(DEADLINE)
            got = b""
            while not got.endswith(b"\r\n\r\n"):
                data_in = w.sock.recv(1)
                assert data_in, got
                got += data_in
            assert got.split(b"\r\n")[0] == b"HTTP/1.1 100 Continue", got
            w.send(data)
            reply = w.reply("POST")
            assert reply.interim == []
            check_granted(reply)


def test_expect_when_refusing(svc):
    with svc.wire() as w:
        w.send(POST + b"Content-Length: 70000\r\nExpect: 100-continue\r\n\r\n")
        reply = w.reply("POST")
        assert reply.interim == []
        check_error(reply, 413, "M_TOO_LARGE")
        assert w.at_end()


def test_expect_without_body_or_in_1_0(svc):
    for data in (get(b"Host: h", b"Expect: 100-continue"), post(b"Content-Length: 0", b"Expect: 100-continue"),
                 b"POST /get_token HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n{}"):
        with svc.wire() as w:
            w.send(data)
            reply = w.reply("POST")
            assert reply.interim == [] and reply.status in (200, 400), reply


# ---- many requests on one connection

def test_pipelining_of_fifty(svc, rig):
    """Answered in order, whatever each takes."""
    wire, want = b"", []
    for n in range(50):
        kind = n % 5
        if kind == 0:
            wire += GET
            want.append((200, None))
        elif kind == 1:
            wire += b"GET /x%d HTTP/1.1\r\nHost: h\r\n\r\n" % n
            want.append((404, None))
        elif kind == 2:
            body = json.dumps(rig.body("/sfu/get", rig.other, room=f"!r{n}:x")).encode()
            wire += b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            want.append((200, "jwt"))
        elif kind == 3:
            wire += CHUNKED + b"1\r\n{\r\n0\r\n\r\n"
            want.append((400, "errcode"))
        else:
            wire += b"OPTIONS /get_token HTTP/1.1\r\nHost: h\r\nX-Request-Id: req-%d\r\n\r\n" % n
            want.append((200, f"req-{n}"))
    for size in (len(wire), 1000, 7):
        parts = [wire[i:i + size] for i in range(0, len(wire), size)]
        with svc.wire() as w:
            pushed(w, parts)
            for status, mark in want:
                reply = w.reply("GET")
                assert reply.status == status, reply
                if mark == "jwt":
                    check_granted(reply)
                elif mark == "errcode":
                    check_error(reply, 400, "M_NOT_JSON", NOT_JSON)
                elif mark:
                    assert reply.header("X-Request-Id") == mark
            w.send(get(b"Host: h", b"Connection: close"))
            assert w.reply().status == 200
            assert w.at_end()


def test_nothing_after_a_refusal_is_read(svc, rig):
    """A second request behind ambiguous bytes must never be answered."""
    rig.other.forget()
    body = json.dumps(rig.body("/sfu/get", rig.other)).encode()
    smuggled = b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for row, (data, status, then) in ROWS.items():
        if then == CLOSE:
            with svc.wire() as w:
                pushed(w, [data + smuggled])
                out = w.drain()
                assert out.count(b"HTTP/1.1 ") == 1, (row, out)
    assert rig.other.asked() == []


def test_pipelined_requests_of_a_client_that_half_closed(svc, rig):
    """All that was sent is answered, though no more can come."""
    body = json.dumps(rig.body("/sfu/get", rig.other)).encode()
    exchange = b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for wire, want in ((exchange + GET * 3, [200] * 4), (GET * 30 + exchange + GET, [200] * 32),
                       (GET + CHUNKED + b"0\r\n\r\n" + GET * 2, [200, 400, 200, 200])):
        with svc.wire() as w:
            w.send(wire)
            w.sock.shutdown(socket.SHUT_WR)
            assert [w.reply().status for _ in want] == want
            assert w.at_end()


def test_keep_alive_for_many_requests(svc):
    with svc.wire() as w:
        for _ in range(500):
            w.send(GET)
            assert w.reply().status == 200


def test_head_replies_have_no_body_and_keep_in_step(svc):
    with svc.wire() as w:
        w.send(b"".join(b"HEAD %s HTTP/1.1\r\nHost: h\r\n\r\n" % p for p in (b"/nothing", b"/get_token", b"/healthz")) + GET)
        assert [w.reply("HEAD").status for _ in range(3)] == [404, 405, 200]
        assert w.reply().status == 200
        w.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            w.sock.recv(1)


# ---- deadlines, all at once so that the suite waits only for the longest

def test_s14_deadlines(rig):
    """Head 10 s, body 15 s, write 10 s, idle as set; no byte extends one.
    What is asked is that each ends, how, and that a request inside its time is served."""
    with rig.service(LKJWT_KEEPALIVE_S="3") as s:
        results = {}

        def run(name, first, dribble=b"", until=60.0, finish=None):
            with s.wire(timeout=60) as w:
                if first:
                    w.send(first)
                start = time.monotonic()
                w.sock.settimeout(0.5)
                got = b""
                while time.monotonic() - start < until:
                    try:
                        data = w.sock.recv(4096)
                        if not data:
                            results[name] = (got, "closed", time.monotonic() - start)
                            return
                        got += data
                        continue
                    except TimeoutError:
                        pass
                    except ConnectionResetError:
                        results[name] = (got, "reset", time.monotonic() - start)
                        return
                    if dribble:
                        try:
                            w.send(dribble)
                        except OSError:
                            pass
                if finish is not None:
                    w.send(finish)
                    results[name] = w.reply("POST")
                else:
                    results[name] = (got, "open", until)

        cases = {
            "no byte": (b"",), "half a head": (GET[:20],), "head dribbled": (GET[:-2] + b"X: ", b"a"),
            "headers dribbled": (GET[:-2], b"X: a\r\n"), "body missing": (post(b"Content-Length: 5"),),
            "body dribbled": (post(b"Content-Length: 5000"), b"x"), "chunk dribbled": (CHUNKED + b"ff\r\n", b"x"),
            "chunks dribbled": (CHUNKED, b"1\r\nx\r\n"), "trailer dribbled": (CHUNKED + b"0\r\nX: ", b"x"),
            "404 body dribbled": (b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 5000\r\n\r\n", b"x"),
            "idle after a request": (GET,), "second head dribbled": (GET + GET[:20], b"x"),
            "slow head in time": (GET[:-2], b"", 5.0, b"\r\n"),
            "slow body in time": (post(b"Content-Length: 2"), b"", 11.0, b"{}"),
        }
        threads = [threading.Thread(target=run, args=(name, *case), daemon=True) for name, case in cases.items()]

        def slow_reader():
            """Asks without reading until the service has no room left to answer."""
            with s.wire(rcvbuf=4096) as w:
                w.sock.settimeout(2)
                try:
                    for _ in range(200000):
                        w.send(GET * 100)
                except TimeoutError:
                    pass
                except OSError as e:
                    results["slow reader"] = repr(e)
                    return
                s.wait_event("SLOW_READ", timeout=40)
                results["slow reader"] = "event"
        threads.append(threading.Thread(target=slow_reader, daemon=True))
        for t in threads:
            t.start()
        # Meanwhile the service is there for others.
        while any(t.is_alive() for t in threads):
            assert s.request("GET", "/healthz", timeout=5).status == 200
            time.sleep(0.5)
        assert set(results) == set(cases) | {"slow reader"}
        assert results.pop("slow reader") == "event"
        for name in ("slow head in time", "slow body in time"):
            assert results.pop(name).status == (200 if "head" in name else 400)
        for name, (got, how, took) in results.items():
            assert how == "closed" and took < 40, (name, got, how, took)
            if name in ("no byte",):
                assert got == b"", (name, got)
            elif name == "idle after a request":
                assert got.startswith(b"HTTP/1.1 200 ") and got.count(b"HTTP/1.1") == 1, (name, got)
            elif name == "second head dribbled":
                assert got.count(b"HTTP/1.1") == 2 and b"HTTP/1.1 408 " in got, (name, got)
            else:
                assert got.startswith(b"HTTP/1.1 408 ") and got.count(b"HTTP/1.1") == 1, (name, got)
                assert b"onnection: close\r\n" in got
        assert s.stop() == 0
        assert s.events("SLOW_HEAD") and s.events("SLOW_BODY") and s.events("SLOW_READ")


def test_random_bytes_never_harm(svc):
    import random
    rnd = random.Random(4195)
    seeds = [data for data, _, _ in ROWS.values() if len(data) < 400]
    for _ in range(1500):
        data = bytearray(rnd.choice(seeds))
        for _ in range(rnd.randint(1, 6)):
            i = rnd.randrange(len(data) + 1)
            op = rnd.randrange(3)
            if op == 0:
                data[i:i] = bytes([rnd.randrange(256)])
            elif op == 1:
                del data[i:i + rnd.randint(1, 8)]
            else:
                data[i:i + 1] = rnd.choice([b"\r\n", b"\n", b"\0", b" ", b":", b"0", b"\xff", b"chunked"])
        with svc.wire() as w:
            try:
                w.send(bytes(data))
                w.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            out = w.drain()
            while out:
                assert out.startswith(b"HTTP/1.1 "), (bytes(data), out)
                head, _, out = out.partition(b"\r\n\r\n")
                if head.startswith(b"HTTP/1.1 100 "):
                    continue
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                out = out[length:] if data.lstrip(b"\r\n")[:4] != b"HEAD" else out
    assert svc.request("GET", "/healthz").status == 200
