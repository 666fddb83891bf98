"""PROTOCOL.md 3 and 4: every field missing, empty, null, of a wrong type,
twice, unknown, huge, on both endpoints; the order of the checks; and that
none of it reaches the network."""
import copy
import gzip
import json
import random
import re

import pytest

from exchange import DELEGATION, ENDPOINTS, NO_API, NOT_JSON, UNAUTHORIZED, check_error, check_granted, make_body
from service import CANARY_TOKEN

INT64 = 1 << 63


@pytest.fixture
def silent(svc, rig):
    """A valid body names rig.other; nobody may have spoken to it when the test ends."""
    servers = (rig.full, rig.other, rig.sfu)
    before = [s.connections for s in servers]
    yield rig.other.netloc
    assert [s.connections for s in servers] == before


def put(body, dotted, value):
    body = copy.deepcopy(body)
    *way, last = dotted.split(".")
    at = body
    for step in way:
        at = at[step]
    if value is ABSENT:
        del at[last]
    else:
        at[last] = value
    return body


class _Absent:
    pass


ABSENT = _Absent
STRINGS = {
    "/get_token": ["room_id", "slot_id", "member.id", "member.claimed_user_id", "member.claimed_device_id",
                   "openid_token.access_token", "openid_token.matrix_server_name"],
    "/sfu/get": ["room", "openid_token.access_token", "openid_token.matrix_server_name"],
}
OPTIONAL_STRINGS = {"/get_token": ["openid_token.token_type", "delay_id"],
                    "/sfu/get": ["openid_token.token_type", "delay_id", "device_id"]}
OBJECTS = {"/get_token": ["member", "openid_token"], "/sfu/get": ["openid_token"]}
WRONG_STRING = {"number": 1, "float": 1.5, "true": True, "false": False, "array": [], "array of string": ["x"],
                "object": {}}
WRONG_OBJECT = {"number": 1, "true": True, "array": [], "string": "x", "array of object": [{}]}


def rows(*tables):
    return [pytest.param(*row, id=" ".join(str(x) for x in row[:-1])) for t in tables for row in t]


@pytest.mark.parametrize("path, field, form, value", rows(
    [(p, f, form, v) for p in ENDPOINTS for f in STRINGS[p]
     for form, v in (("missing", ABSENT), ("empty", ""), ("null", None))],
    [(p, f, form, v) for p in ENDPOINTS for f in OBJECTS[p]
     for form, v in (("missing", ABSENT), ("empty", {}), ("null", None))]))
def test_required(svc, silent, path, field, form, value):
    reply = svc.post(path, put(make_body(path, silent), field, value))
    check_error(reply, 400, "M_BAD_JSON")
    assert field.rpartition(".")[2] in reply.json["error"]


@pytest.mark.parametrize("path, field, form, value", rows(
    [(p, f, form, v) for p in ENDPOINTS for f in STRINGS[p] + OPTIONAL_STRINGS[p] for form, v in WRONG_STRING.items()],
    [(p, f, form, v) for p in ENDPOINTS for f in OBJECTS[p] for form, v in WRONG_OBJECT.items()]))
def test_wrong_type(svc, silent, path, field, form, value):
    check_error(svc.post(path, put(make_body(path, silent), field, value)), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("path, where, name", [pytest.param(p, w, n, id=f"{p} {w}.{n}") for p in ENDPOINTS for w, n in (
    [("", "extra"), ("", ""), ("", "claimed_user_id"), ("", "Openid_token"), ("", "openid_token "),
     ("", "member_id"), ("", "url"), ("", "server_name"), ("openid_token", "id_token"),
     ("openid_token", "Access_Token"), ("openid_token", "delay_cs_api_url"), ("openid_token", "sub")]
    + ([("", "room"), ("", "device_id"), ("", "remove_me_user_id"), ("member", "device_id"), ("member", "ID"),
        ("member", "user_id")] if p == "/get_token" else
       [("", "room_id"), ("", "slot_id"), ("", "member"), ("", "ROOM")]))])
@pytest.mark.parametrize("value", ["x", None, {}], ids=["string", "null", "object"])
def test_unknown_field(svc, silent, path, where, name, value):
    body = make_body(path, silent)
    (body[where] if where else body)[name] = value
    check_error(svc.post(path, body), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("path, field", [(p, f) for p in ENDPOINTS for f in STRINGS[p] + OBJECTS[p] + ["delay_id"]])
def test_duplicate_key(svc, silent, path, field):
    """The same key again, in the same object, even with the same value."""
    body = make_body(path, silent, delay_id="x", delay_timeout=1000)
    *way, last = field.split(".")
    inner = body[way[0]] if way else body
    twice = json.dumps(inner)[:-1] + f", {json.dumps(last)}: {json.dumps(inner[last])}}}"
    text = twice if not way else json.dumps({**body, way[0]: "@"}).replace('"@"', twice)
    json.loads(text)
    check_error(svc.post(path, text), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("text", ['"delay_cs_api_url":{"a":1,"a":1}', '"delay_cs_api_url":1,"delay_cs_api_url":1',
                                  '"openid_token":{},"\\u006fpenid_token":{}'])
def test_duplicate_in_what_is_ignored_or_escaped(svc, silent, path, text):
    check_error(svc.post(path, "{" + text + "}"), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("path, name", [("/get_token", "delay_cs_api_url"), ("/sfu/get", "delay_cs_api_url"),
                                        ("/sfu/get", "remove_me_user_id")])
@pytest.mark.parametrize("value", ["https://x", "", None, 0, 1.5e3, True, [], [1, {"a": [None]}], {"deep": {"er": {}}}])
def test_ignored_field(svc, rig, path, name, value):
    check_granted(svc.post(path, rig.body(path, rig.other, **{name: value})))


BROKEN = {
    "nothing": b"", "blank": b" \r\n\t", "open": b"{", "array": b"[]", "array of object": b"[{}]", "string": b'"x"',
    "number": b"1", "true": b"true", "word": b"nil", "Null": b"Null", "two values": b"{}{}", "trailing": b"{} x",
    "trailing null byte": b"{}\0", "BOM": b"\xef\xbb\xbf{}", "trailing comma": b'{"room":"x",}', "comma": b"{,}",
    "single quotes": b"{'room':'x'}", "no quotes": b'{room:"x"}', "comment": b"{}//", "comment inside": b"{/**/}",
    "NaN": b'{"delay_timeout":NaN}', "Infinity": b'{"delay_timeout":Infinity}', "hex": b'{"delay_timeout":0x1}',
    "plus": b'{"delay_timeout":+1}', "leading zero": b'{"delay_timeout":01}', "minus alone": b'{"delay_timeout":-}',
    "dot": b'{"delay_timeout":1.}', "leading dot": b'{"delay_timeout":.5}', "exponent": b'{"delay_timeout":1e}',
    "raw LF in string": b'{"delay_id":"a\nb"}', "raw TAB in string": b'{"delay_id":"a\tb"}',
    "raw NUL in string": b'{"delay_id":"a\0b"}', "raw 1f in string": b'{"delay_id":"\x1f"}',
    "bad escape": b'{"delay_id":"\\x41"}', "short escape": b'{"delay_id":"\\u12"}', "escape at end": b'{"delay_id":"\\',
    "lone high surrogate": b'{"delay_id":"\\ud800"}', "lone low surrogate": b'{"delay_id":"\\udc00"}',
    "high then other": b'{"delay_id":"\\ud800\\u0041"}', "two high": b'{"delay_id":"\\ud800\\ud800"}',
    "surrogate in key": b'{"\\ud800":1}', "UTF-8 overlong": b'{"delay_id":"\xc0\xaf"}',
    "UTF-8 surrogate": b'{"delay_id":"\xed\xa0\x80"}', "UTF-8 beyond": b'{"delay_id":"\xf4\x90\x80\x80"}',
    "UTF-8 cut": b'{"delay_id":"\xe2\x82"}', "UTF-8 lone": b'{"delay_id":"\x80"}', "Latin-1": b'{"delay_id":"\xe9"}',
    "UTF-16": '{"a":1}'.encode("utf-16"), "form feed as blank": b"\x0c{}", "NBSP as blank": b"\xc2\xa0{}",
    "missing colon": b'{"room" "x"}', "missing value": b'{"room":}', "two colons": b'{"room"::"x"}',
    "number key": b'{1:2}', "unclosed string": b'{"room":"x', "unclosed array": b'{"delay_cs_api_url":[}',
    "gzip": gzip.compress(b"{}"), "form": b"room=x&slot=y",
    "too deep": b'{"delay_cs_api_url":' + b"[" * 16 + b"]" * 16 + b"}",
    "far too deep": b"[" * 30000, "far too deep objects": b'{"a":' * 10000,
    "too many values": b'{"delay_cs_api_url":[' + b"1," * 2099 + b"1]}",
    "number too long": b'{"delay_cs_api_url":123456789012345678901}',
    "1 KB of digits": b'{"delay_cs_api_url":' + b"9" * 1024 + b"}",
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("name", BROKEN)
def test_not_json(svc, silent, path, name):
    check_error(svc.post(path, BROKEN[name]), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("headers", [[], [("Content-Type", "text/plain")], [("Content-Encoding", "gzip")],
                                     [("Accept", "image/png")], [("Upgrade", "h2c"), ("Connection", "upgrade")]],
                         ids=["none", "text/plain", "gzip", "accept", "upgrade"])
def test_request_headers_change_nothing(svc, rig, path, headers):
    check_granted(svc.request("POST", path, json.dumps(rig.body(path, rig.other)), headers))


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("text", ["null", " \n null\t", "{}", " { } "])
def test_empty_object(svc, silent, path, text):
    reply = svc.post(path, text)
    check_error(reply, 400, "M_BAD_JSON")
    assert ("room_id" if path == "/get_token" else "room") in reply.json["error"]


@pytest.mark.parametrize("form", ["blanks", "reversed", "all escaped", "deep enough", "values enough", "long number"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_accepted_forms(svc, rig, path, form):
    """RFC 8259 leaves these to the writer, or they stay just under a limit."""
    body = rig.body(path, rig.other)
    if form == "blanks":
        text = "\r\n\t " + json.dumps(body, indent="\t", separators=(" ,\r\n", " : ")) + " \n"
    elif form == "reversed":
        text = json.dumps(dict(reversed(body.items())))
    elif form == "all escaped":
        def esc(v):
            if isinstance(v, dict):
                return "{" + ",".join(f"{esc(k)}:{esc(x)}" for k, x in v.items()) + "}"
            return str(v) if isinstance(v, int) else '"' + "".join(f"\\u{ord(c):04X}" for c in v) + '"'
        text = esc(body)
    else:
        more = {"deep enough": "[" * 15 + "]" * 15, "values enough": "[" + "1," * 1899 + "1]",
                "long number": "12345678901234567890"}[form]
        text = json.dumps(body)[:-1] + f',"delay_cs_api_url":{more}}}'
    check_granted(svc.post(path, text))


INTEGERS = {
    "0": "ok", "1": "ok", "-1": "ok", "-0": "ok", "null": "ok", str(INT64 - 1): "ok", str(-INT64): "ok",
    str(INT64): "M_NOT_JSON", str(-INT64 - 1): "M_NOT_JSON", "99999999999999999999": "M_NOT_JSON",
    "3600.0": "M_NOT_JSON", "36e2": "M_NOT_JSON", "1E0": "M_NOT_JSON", '"3600"': "M_NOT_JSON", '""': "M_NOT_JSON",
    "true": "M_NOT_JSON", "[]": "M_NOT_JSON", "{}": "M_NOT_JSON",
}


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("literal", INTEGERS)
def test_expires_in(svc, rig, path, literal):
    body = rig.body(path, rig.other)
    body["openid_token"]["expires_in"] = "@@"
    reply = svc.post(path, json.dumps(body).replace('"@@"', literal))
    if INTEGERS[literal] == "ok":
        check_granted(reply)
    else:
        check_error(reply, 400, INTEGERS[literal], NOT_JSON)


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("field", ["openid_token.token_type", "openid_token.expires_in", "device_id"])
@pytest.mark.parametrize("value", [ABSENT, None], ids=["missing", "null"])
def test_optional(svc, rig, path, field, value):
    if path == "/get_token" and field == "device_id":
        field = "openid_token.token_type"
    check_granted(svc.post(path, put(rig.body(path, rig.other), field, value)))


# ---- the delay pair: (delay_id, delay_timeout) as JSON text, None = missing

GOOD_IDS = ["syd_abcdefghijklmnopqrst", "a", "0", "a.b", "...", ".a", "~", "_-", "A" * 255]
BAD_IDS = [".", "..", "a/b", "../x", "a b", " ", "é", "a%2e", "a\0", "a\n", "a?b", "a#b", "a:b", "A" * 256, "A" * 600]
PAIRS = [(json.dumps(i), "1000", "valid") for i in GOOD_IDS]
PAIRS += [('"x"', t, "valid") for t in ("1", "999", "18000", "3600000", "86400001", str(INT64 - 1))]
PAIRS += [(json.dumps(i), "1000", "delay_id") for i in BAD_IDS]
PAIRS += [('"x"', t, "delay_timeout") for t in ("-1", str(-INT64), str(INT64), "99999999999999999999", "-0", "0",
                                                "null", None)]
PAIRS += [(i, "1000", "delay_id") for i in ('""', "null", None)]
PAIRS += [(i, t, "absent") for i in ('""', "null", None) for t in ("0", "null", "-0", None)]
PAIRS += [('"x"', t, "M_NOT_JSON") for t in ("1000.0", "1e3", '"1000"', '""', "true", "[]", "{}", "123456789012345678901")]
PAIRS += [(i, "1000", "M_NOT_JSON") for i in ("1", "true", "[]", "{}")]


@pytest.mark.parametrize("access", ["full", "restricted"])
@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("delay_id, timeout, want", [
    pytest.param(*p, id=f"{str(p[0])[:30]} {p[1]}") for p in PAIRS])
def test_delay_pair(svc, rig, path, delay_id, timeout, want, access):
    hs = rig.full if access == "full" else rig.other
    before = hs.connections, len(hs.asked()), len(rig.sfu.rooms)
    text = json.dumps(rig.body(path, hs))[:-1]
    if delay_id is not None:
        text += f', "delay_id": {delay_id}'
    if timeout is not None:
        text += f', "delay_timeout": {timeout}'
    reply = svc.post(path, text + "}")
    asked = len(hs.asked()) - before[1]
    if want == "absent":
        check_granted(reply)
        assert asked == 1
    elif want == "valid":
        # Whose token it is comes first (step 7), then the right to delegate; this homeserver has no client-server API
        # (what else a valid pair does: test_leave.py); no room is left behind.
        check_error(reply, 400, "M_BAD_JSON", NO_API if access == "full" else DELEGATION)
        assert (asked, len(rig.sfu.rooms)) == (1, before[2])
    else:
        if want == "M_NOT_JSON":
            check_error(reply, 400, "M_NOT_JSON", NOT_JSON)
        else:
            check_error(reply, 400, "M_BAD_JSON")
            assert want in reply.json["error"]
        assert (hs.connections, asked) == (before[0], 0)


def test_a_refused_delegation_is_told_in_the_log(svc, rig):
    path = "/sfu/get"
    for hs, name in ((rig.full, "API_UNKNOWN"), (rig.other, "DELEGATION_RESTRICTED")):
        reply = svc.post(path, rig.body(path, hs, delay_id="syd_x", delay_timeout=18000))
        svc.wait_event(name, req=reply.header("X-Request-Id"))


# ---- lengths, in bytes

LENGTHS = [("/get_token", "room_id", 255), ("/get_token", "slot_id", 512), ("/get_token", "member.id", 512),
           ("/get_token", "member.claimed_user_id", 255), ("/get_token", "member.claimed_device_id", 512),
           ("/get_token", "openid_token.access_token", 4096), ("/sfu/get", "room", 255), ("/sfu/get", "device_id", 512),
           ("/sfu/get", "openid_token.access_token", 4096)]


@pytest.mark.parametrize("path, field, limit", LENGTHS)
@pytest.mark.parametrize("char", ["a", "é", "😀"])
def test_field_too_long(svc, silent, path, field, limit, char):
    text = char * (limit // len(char.encode()) + 1)
    assert limit < len(text.encode()) <= limit + 4
    reply = svc.post(path, put(make_body(path, silent), field, text))
    check_error(reply, 400, "M_BAD_JSON")
    assert field.rpartition(".")[2] in reply.json["error"]


@pytest.mark.parametrize("path, field", [(p, f) for p in ENDPOINTS for f in STRINGS[p] + ["delay_id"]])
def test_huge_field(svc, silent, path, field):
    """A field that fills the body. A server name of that size is no name."""
    body = put(make_body(path, silent, delay_id="x", delay_timeout=1000), field, "a" * 60000)
    reply = svc.post(path, body)
    check_error(reply, 400, "M_BAD_JSON")
    assert field.rpartition(".")[2] in reply.json["error"]


@pytest.mark.parametrize("path, field, limit", [row for row in LENGTHS if "claimed_user" not in row[1]])
def test_field_as_long_as_allowed(svc, rig, path, field, limit):
    sub, token = rig.user(rig.other)
    value = "é" * (limit // 2 - 1)
    value += "a" * (limit - len(value.encode()))
    if field.endswith("access_token"):
        value = token + "." + "t" * (limit - 1 - len(token))
        rig.other.tokens[value] = sub
    check_granted(svc.post(path, put(rig.body(path, rig.other, sub, token), field, value)))


def test_user_id_as_long_as_allowed(svc, rig):
    local = "u" * (255 - len(f"@:{rig.other.netloc}"))
    sub, token = rig.user(rig.other, local)
    check_granted(svc.post("/get_token", rig.body("/get_token", rig.other, sub, token)))
    # One more byte cannot be asked for, and is not believed when the homeserver says it.
    sub, token = rig.user(rig.other, local + "u")
    check_error(svc.post("/sfu/get", rig.body("/sfu/get", rig.other, sub, token)), 401, "M_UNAUTHORIZED", UNAUTHORIZED)


# ---- order

ORDER = [
    # what is wrong, in the order of the checks; each row must name its first
    ("/get_token", ["room_id", "slot_id"], "room_id"),
    ("/get_token", ["slot_id", "member.id"], "slot_id"),
    ("/get_token", ["room_id", "openid_token"], "room_id"),
    ("/get_token", ["member", "openid_token"], "member"),
    ("/get_token", ["member.claimed_user_id", "openid_token.access_token"], "claimed_user_id"),
    ("/get_token", ["member.claimed_device_id", "openid_token.matrix_server_name"], "claimed_device_id"),
    ("/get_token", ["openid_token.access_token", "delay"], "access_token"),
    ("/get_token", ["openid_token.matrix_server_name", "delay"], "matrix_server_name"),
    ("/get_token", ["member.id", "delay"], "id"),
    ("/sfu/get", ["room", "openid_token"], "room"),
    ("/sfu/get", ["room", "delay"], "room"),
    ("/sfu/get", ["openid_token.access_token", "delay"], "access_token"),
]


@pytest.mark.parametrize("path, wrong, named", ORDER)
def test_order_of_field_checks(svc, silent, path, wrong, named):
    body = make_body(path, silent)
    for field in wrong:
        body = {**body, "delay_id": "not/valid"} if field == "delay" else put(body, field, ABSENT)
    reply = svc.post(path, body)
    check_error(reply, 400, "M_BAD_JSON")
    assert named in reply.json["error"] and "delay" not in reply.json["error"]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_json_comes_before_fields(svc, silent, path):
    check_error(svc.post(path, {"unknown": 1}), 400, "M_NOT_JSON", NOT_JSON)
    check_error(svc.post(path, {"openid_token": 1}), 400, "M_NOT_JSON", NOT_JSON)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_size_comes_before_json(svc, silent, path):
    check_error(svc.post(path, "x" * 70000), 413, "M_TOO_LARGE")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_delay_comes_before_the_homeserver(svc, silent, path):
    body = make_body(path, silent, delay_id="..", delay_timeout=1000)
    check_error(svc.post(path, body), 400, "M_BAD_JSON")


def test_whose_token_comes_before_delegation(svc, rig):
    """Steps 7 and 8 before 9: a stranger learns nothing about delegation."""
    pair = dict(delay_id="syd_x", delay_timeout=18000)
    for hs in (rig.full, rig.other):
        for path in ENDPOINTS:
            check_error(svc.post(path, rig.body(path, hs, "@x:y", "no such token", **pair)), 401, "M_UNAUTHORIZED",
                        UNAUTHORIZED)
        sub, token = rig.user(hs)
        check_error(svc.post("/get_token", rig.body("/get_token", hs, "@not:" + hs.netloc, token, **pair)), 401,
                    "M_UNAUTHORIZED", UNAUTHORIZED)


# ---- step 7 without a call

BAD_NAMES = ["a_b", "a b", "é.example", "example.org:", "example.org:0", "example.org:65536", "example.org:123456",
             "example.org:8 8", "example.org:-1", "example.org:+1", "[::1", "::1", "[::1]x", "[::g]", "[]", ":8448",
             "a/b", "a@b", "a?b", "a#b", "user:pw@host", "https://example.org", "example.org\0", "example.org\r\nX: y",
             "example.org.:8448:1", "[" + "0" * 46 + "]", "a" * 256, "[1.2.3.4", "example.org%00", "*"]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("name", BAD_NAMES, ids=[repr(n[:30]) for n in BAD_NAMES])
def test_server_name_outside_the_grammar(svc, silent, path, name):
    check_error(svc.post(path, make_body(path, name)), 401, "M_UNAUTHORIZED", UNAUTHORIZED)


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("char", ["\0", "\n", "\r", "\t", " ", "\x1f", "\x7f"], ids=repr)
@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_token_with_control_byte(svc, silent, path, char, where):
    token = {"start": char + CANARY_TOKEN, "middle": CANARY_TOKEN[:9] + char + CANARY_TOKEN[9:],
             "end": CANARY_TOKEN + char}[where]
    check_error(svc.post(path, make_body(path, silent, token=token)), 401, "M_UNAUTHORIZED", UNAUTHORIZED)


# ---- a second reader: Python's json, held to the same rules

SCHEMA = {"room": str, "openid_token": {"access_token": str, "matrix_server_name": str, "token_type": str,
                                        "expires_in": int},
          "device_id": str, "delay_id": str, "delay_timeout": int, "delay_cs_api_url": None, "remove_me_user_id": None}


def judged(text):
    """The errcode that PROTOCOL.md 3 and 4 give a /sfu/get body whose server name is never valid."""
    def pairs(items):
        if len(dict(items)) != len(items):
            raise ValueError("key twice")
        return dict(items)

    def number(kind):
        def read(literal):
            if sum(c.isdigit() for c in literal) > 20:
                raise ValueError("too many digits")
            return kind(literal)
        return read

    def constant(_):
        raise ValueError("NaN or Infinity")

    def depth(v):
        inner = v.values() if isinstance(v, dict) else v if isinstance(v, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    def fits(obj, schema):
        for key, value in obj.items():
            want = schema[key]          # KeyError: unknown
            if value is None or want is None:
                continue
            if isinstance(want, dict):
                if type(value) is not dict:
                    raise ValueError("type")
                fits(value, want)
            elif type(value) is not want:
                raise ValueError("type")
    try:
        text = text.decode("utf-8").strip(" \t\r\n")
        if text[:1] not in ("{", "n"):
            raise ValueError("not an object")
        obj = json.loads(text, object_pairs_hook=pairs, parse_int=number(int), parse_float=number(float),
                         parse_constant=constant)
        json.dumps(obj, ensure_ascii=False).encode()        # lone surrogates
        obj = obj or {}
        if depth(obj) > 16:
            raise ValueError("too deep")
        fits(obj, SCHEMA)
        openid = obj.get("openid_token") or {}
        if not -INT64 <= (openid.get("expires_in") or 0) < INT64:
            raise ValueError("expires_in")
    except (ValueError, KeyError, RecursionError):
        return "M_NOT_JSON"
    for value, cap in ((obj.get("room"), 255), (openid.get("access_token"), 4096),
                       (openid.get("matrix_server_name"), 512)):
        if not value or len(value.encode()) > cap:
            return "M_BAD_JSON"
    ident, timeout = obj.get("delay_id"), obj.get("delay_timeout")
    if len((obj.get("device_id") or "").encode()) > 512:
        return "M_BAD_JSON"
    if ident or timeout:
        if not ident or not re.fullmatch(r"[0-9A-Za-z._~-]{1,255}", ident) or ident in (".", ".."):
            return "M_BAD_JSON"
        if not timeout or not 0 < timeout < INT64:
            return "M_BAD_JSON"
    return "M_UNAUTHORIZED"


BITS = [b'"', b"\\", b"\\u", b"\\ud800", b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"0", b"-", b"e", b".",
        b" ", b"\n", b"\0", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"room", b'"room":""', b"1" * 19, b"9" * 21,
        b"\x1f", b"\x7f", b"[[" * 9, b'""', b"\xef\xbb\xbf", b"-0", b"1E5", b"/"]


@pytest.mark.parametrize("seed", range(4))
def test_mutated_bodies_are_read_as_a_second_reader_reads_them(svc, seed):
    rnd = random.Random(seed)
    body = make_body("/sfu/get", "a_b", token="té\u1234", device="D\U0001f600", delay_id="syd_x", delay_timeout=18000,
                     delay_cs_api_url=[1.5e3, {"a": None, "b": [True, False, '\\"\n']}], remove_me_user_id=-0.0)
    seeds = [json.dumps(body, ensure_ascii=e).encode() for e in (False, True)]
    texts = []
    for _ in range(1500):
        text = bytearray(rnd.choice(seeds))
        for _ in range(rnd.choice([0, 1, 1, 1, 2, 2, 3, 5])):
            at, op = rnd.randrange(len(text)), rnd.randrange(5)
            if op == 0:
                text[at:at] = rnd.choice(BITS)
            elif op == 1:
                del text[at:at + rnd.randint(1, 6)]
            elif op == 2:
                text[at] = rnd.randrange(256)
            elif op == 3:
                text[at:at + 1] = rnd.choice(BITS)
            else:
                other = rnd.randrange(len(text))
                text[at:at] = text[other:other + rnd.randint(1, 40)]
        texts.append(bytes(text))
    seen = set()
    with svc.wire() as w:
        for i in range(0, len(texts), 50):
            part = texts[i:i + 50]
            w.send(b"".join(b"POST /sfu/get HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(t) + t for t in part))
            for text in part:
                errcode = w.reply("POST").errcode
                assert errcode == judged(text), text
                seen.add(errcode)
    assert seen == {"M_NOT_JSON", "M_BAD_JSON", "M_UNAUTHORIZED"}
