"""PROTOCOL.md 13 and the limits of SECURITY.md 4: each variable's fatal,
warning and default row, all errors at once, no value in a message."""
import json

import jwt as pyjwt
import pytest

from exchange import check_granted, make_body
from service import CANARY_KEY, CANARY_PASSWORD, CANARY_SECRET, Service, base_env, free_port, run_cli


def fatal(env):
    """Start, which must fail: exit 1."""
    env.setdefault("LIVEKIT_JWT_BIND", f"127.0.0.1:{free_port()}")
    got = run_cli([], env, timeout=15)
    assert got.code == 1, got
    return got


SWITCH = ["yes", "1", "on", "truee", "true,false"]
NUMBER = ["x", "-1", "1.5", "1s", "0x10", "99999999999999999999"]
FATAL = {
    "LIVEKIT_URL": [None, "", "ftp://sfu", "redis://sfu", "wss://", "https://:7880", "file:///x"],
    "LIVEKIT_KEY": [None, "", " \r\n"],
    "LIVEKIT_SECRET": [None, "", "\n"],
    "LIVEKIT_KEY_FROM_FILE": ["/nonexistent/key"],
    "LIVEKIT_SECRET_FROM_FILE": ["/nonexistent/secret", "/"],
    "LIVEKIT_KEY_FILE": ["/nonexistent/keys", "/dev/null"],
    "LIVEKIT_FULL_ACCESS_HOMESERVERS": [None, "", " , ", ",\t,"],
    "LIVEKIT_JWT_BIND": ["host", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:x", "127.0.0.1:-1",
                         "[::1]", "[::1]:", "[::1:8080", "::1:8080x", ":65536", ":x", ":-1", "65536", "-1", "unix:",
                         "1.2.3.4:5:6", "127.0.0.1:80 80", "nosuchname.invalid:8080"],
    "LIVEKIT_JWT_PORT": ["x", "65536", "-1", "80 80"],
    "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": ["x", "-1", "1.5", "10s"],
    "LIVEKIT_CS_API_URL_OVERRIDES": ["example.org", "=https://x", "example.org=", "a=https://b,c", "a=ftp://x"],
    "LKJWT_FEDERATION_API_URL_OVERRIDES": ["example.org", "=https://x", "example.org=", "a=https://b,c", "a=ftp://x"],
    "LIVEKIT_CAN_UPDATE_OWN_METADATA": SWITCH,
    "LKJWT_RESTRICTED_CAN_PUBLISH": SWITCH,
    "LKJWT_CA_ONLY": SWITCH,
    "LKJWT_LIVEKIT_API_URL": ["ftp://x", "https://"],
    "LKJWT_PATH_PREFIX": ["livekit", "livekit/jwt"],
    "LKJWT_TOKEN_TTL_S": ["59", "86401", *NUMBER],
    "LKJWT_MAX_BODY": NUMBER, "LKJWT_MAX_CONNS": NUMBER, "LKJWT_KEEPALIVE_S": NUMBER,
    "LKJWT_LOOKUP_TIMEOUT_S": NUMBER, "LKJWT_LOOKUPS_MAX": NUMBER, "LKJWT_LOOKUPS_PER_SERVER": NUMBER,
    "LKJWT_LAME_DUCK_S": NUMBER, "LKJWT_DRAIN_S": NUMBER, "LKJWT_JOBS_MAX": NUMBER, "LKJWT_JOBS_PER_USER": NUMBER,
    "LKJWT_LOG_FORMAT": ["xml", "logfmt,json"],
    "LKJWT_PRIVATE_NETWORKS": ["maybe", "true"],
    "LKJWT_ALLOW_NETWORKS": ["10.0.0.0/33", "example.org", "10.0.0.0/", "10.0.0/8", "::/129", "10.0.0.0/8,x"],
    "LKJWT_RESOLVER": ["ns.example.org", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1,x"],
    "LKJWT_METRICS_BIND": ["x", "127.0.0.1:", "127.0.0.1:65536"],
    "LKJWT_CA_FILE": ["/nonexistent/ca.pem"],
}


@pytest.mark.parametrize("name, value", [pytest.param(n, v, id=f"{n}={v!r}") for n, vs in FATAL.items() for v in vs])
def test_fatal(name, value):
    env = base_env(LIVEKIT_JWT_BIND=f"127.0.0.1:{free_port()}")
    if name == "LIVEKIT_JWT_PORT":
        del env["LIVEKIT_JWT_BIND"]
    env.pop(name, None)
    if value is not None:
        env[name] = value
    got = fatal(env)
    assert name in got.err, got


ACCEPTED = {
    "LIVEKIT_URL": ["ws://sfu", "WSS://SFU.example.org", "http://10.0.0.1:7880/a/b", "https://[::1]:7880/",
                    "sfu.example.org"],
    "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS": ["0", "30"],
    "LIVEKIT_CS_API_URL_OVERRIDES": ["a=http://b", " a.example:8448 = https://c/d/ ,, b=c ,"],
    "LKJWT_FEDERATION_API_URL_OVERRIDES": ["a=http://b", "[::1]:8448=c.example:8448,127.0.0.1=https://d/x=y"],
    "LIVEKIT_CAN_UPDATE_OWN_METADATA": ["true", "false"], "LKJWT_RESTRICTED_CAN_PUBLISH": ["true", "false"],
    "LKJWT_CA_ONLY": ["true", "false"], "LKJWT_PATH_PREFIX": ["/", "/a", "/a/b/"],
    "LKJWT_LIVEKIT_API_URL": ["http://10.0.0.1:7880", "wss://x/", "livekit:7880"],
    "LKJWT_TOKEN_TTL_S": ["60", "86400"], "LKJWT_MAX_BODY": ["65536"], "LKJWT_MAX_CONNS": ["1", "1024"],
    "LKJWT_KEEPALIVE_S": ["1"], "LKJWT_LAME_DUCK_S": ["0", "5"], "LKJWT_DRAIN_S": ["0"],
    "LKJWT_JOBS_MAX": ["0", "10000"], "LKJWT_JOBS_PER_USER": ["1", "10000"],
    "LKJWT_LOG_FORMAT": ["json", "logfmt"], "LKJWT_PRIVATE_NETWORKS": ["auto", "deny"],
    "LKJWT_ALLOW_NETWORKS": ["10.0.0.0/8", "10.0.0.0/8,fc00::/7, 127.0.0.1 ::1/128"],
    "LKJWT_RESOLVER": ["10.0.0.53", "10.0.0.53:5353,[::1]:53, ::1"], "LKJWT_METRICS_BIND": [":9090", "[::1]:9090"],
    "LKJWT_ALLOWED_HOMESERVERS": ["a.example *.b.example", "a.example:8448,"], "LKJWT_STRICT": ["yes", "true", "false"],
    "LIVEKIT_JWT_BIND": ["8080", ":8080", "0.0.0.0:8080", "[::]:8080", "unix:/a", "/a/b c", "localhost:80"],
}


@pytest.mark.parametrize("name, value", [pytest.param(n, v, id=f"{n}={v!r}") for n, vs in ACCEPTED.items() for v in vs])
def test_accepted(name, value):
    got = run_cli(["--print-config"], base_env(**{name: value}))
    assert got.code == 0 and value in got.out, got


def test_bind_and_port_together():
    got = fatal(base_env(LIVEKIT_JWT_BIND="127.0.0.1:8080", LIVEKIT_JWT_PORT="8080"))
    assert "LIVEKIT_JWT_PORT" in got.err and "LIVEKIT_JWT_BIND" in got.err


def test_all_errors_at_once():
    wrong = {"LIVEKIT_URL": "ftp://x", "LIVEKIT_SECRET": "", "LIVEKIT_FULL_ACCESS_HOMESERVERS": "",
             "LKJWT_PATH_PREFIX": "x", "LKJWT_TOKEN_TTL_S": "1", "LKJWT_LOG_FORMAT": "xml", "LKJWT_MAX_CONNS": "x",
             "LIVEKIT_CAN_UPDATE_OWN_METADATA": "x", "LKJWT_ALLOW_NETWORKS": "x", "LKJWT_CA_FILE": "/nonexistent"}
    got = fatal(base_env(**wrong))
    assert [n for n in wrong if n not in got.err] == []
    assert run_cli(["--print-config"], base_env(**wrong)).code == 1


def test_nothing_set():
    got = fatal({})
    for name in ("LIVEKIT_URL", "LIVEKIT_KEY", "LIVEKIT_SECRET", "LIVEKIT_FULL_ACCESS_HOMESERVERS"):
        assert name in got.err


def test_s09_errors_name_the_variable_not_the_value():
    wrong = {n: f"@{CANARY_PASSWORD}@" for n in FATAL if n not in ("LIVEKIT_KEY", "LIVEKIT_SECRET",
                                                                   "LIVEKIT_FULL_ACCESS_HOMESERVERS")}
    wrong["LIVEKIT_REDIS_URL"] = f"redis://user:{CANARY_PASSWORD}@host/x/y"
    wrong["LIVEKIT_URL"] = f"ftp://user:{CANARY_PASSWORD}@host/"
    got = fatal(base_env(**wrong))
    assert CANARY_PASSWORD not in got.text
    assert len([n for n in wrong if n in got.err]) > 20


# ---- warnings

OLD = {"LK_JWT_PORT": "{port}", "LIVEKIT_LOCAL_HOMESERVERS": "full.example.org", "LIVEKIT_API_KEY": CANARY_KEY,
       "LIVEKIT_API_SECRET": CANARY_SECRET}
WARN = [  # what is set, a word of the warning
    ({"LIVEKIT_URL": "sfu.example.org"}, "LIVEKIT_URL"),
    ({"LIVEKIT_URL": "wss://sfu.example.org/?a=b"}, "LIVEKIT_URL"),
    ({"LIVEKIT_URL": "wss://sfu.example.org/#a"}, "LIVEKIT_URL"),
    ({"LIVEKIT_SECRET": CANARY_SECRET[:31]}, "LIVEKIT_SECRET"),
    ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*"}, "LIVEKIT_FULL_ACCESS_HOMESERVERS"),
    ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*,a.example.org"}, "LIVEKIT_FULL_ACCESS_HOMESERVERS"),
    ({"LIVEKIT_LOG_LEVEL": "verbose"}, "LIVEKIT_LOG_LEVEL"),
    ({"LIVEKIT_INSECURE_SKIP_VERIFY_TLS": "YES_I_KNOW_WHAT_I_AM_DOING"}, "CERTIFICATES ARE NOT CHECKED"),
    ({"LIVEKIT_AS_TOKEN": CANARY_PASSWORD, "LIVEKIT_HS_TOKEN": CANARY_PASSWORD[1:],
      "LIVEKIT_HS_SERVER_NAME": "example.org"}, "LIVEKIT_HS_TOKEN"),
    ({"HTTP_PROXY": f"http://u:{CANARY_PASSWORD}@p:3128"}, "HTTP_PROXY"),
    ({"https_proxy": f"http://u:{CANARY_PASSWORD}@p:3128"}, "https_proxy"),
    ({"ALL_PROXY": "socks5://p:1080"}, "ALL_PROXY"),
    ({"LK_JWT_BIND": "127.0.0.1:9"}, "LK_JWT_BIND"),
    ({"HS_SERVER_NAME": "example.org"}, "HS_SERVER_NAME"),
    ({"LIVEKIT_JWT_BINDD": "x"}, "LIVEKIT_JWT_BINDD"),
    ({"LIVEKIT_FULL_ACCESS_HOMESERVER": "x"}, "LIVEKIT_FULL_ACCESS_HOMESERVER"),
    ({"LKJWT_TOKEN_TTL": "60"}, "LKJWT_TOKEN_TTL"),
    ({"LKJWT_METRIC_BIND": "x"}, "LKJWT_METRIC_BIND"),
    ({"LIVEKIT_SECRET_FROM_FLIE": "x"}, "LIVEKIT_SECRET_FROM_FLIE"),
]


def warnings(s):
    return [json.dumps(line) for line in s.log() if line["level"] in ("warning", "error")]


@pytest.mark.parametrize("env, word", WARN, ids=[" ".join(f"{k}={v}"[:60] for k, v in e.items()) for e, _ in WARN])
def test_warning(env, word):
    with Service(base_env(**env)) as s:
        assert s.stop() == 0
    assert any(word in w for w in warnings(s)), s.log_text()
    for value in (CANARY_PASSWORD, CANARY_SECRET[:31]):
        assert value not in s.log_text()


def test_no_warning_without_cause():
    """What is set right, or has nothing to do with us, is not warned about."""
    quiet = base_env(LIVEKIT_LOG_LEVEL="info", LIVEKIT_SECRET=(CANARY_SECRET * 2)[:32], PATH="/bin", HOME="/",
                     HOSTNAME="x", KUBERNETES_SERVICE_HOST="10.0.0.1", LIVEKIT_SOMETHING_ELSE_ENTIRELY="x",
                     LIVEKIT_INSECURE_SKIP_VERIFY_TLS="", HTTP_PROXY="", LIVEKIT_API_KEY="", LKJWT_PATH_PREFIX="",
                     LIVEKIT_CAN_UPDATE_OWN_METADATA="true", no_proxy="*")
    with Service(quiet) as s:
        assert s.stop() == 0
    assert [w for w in warnings(s) if "REDIS" not in w] == [], s.log_text()


def test_one_warning_for_a_family():
    family = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"]
    with Service(base_env(**{n: "x" for n in family})) as s:
        assert s.stop() == 0
    assert len([w for w in warnings(s) if any(n in w for n in family)]) == 1, s.log_text()


def test_old_names_are_used_with_a_warning(rig):
    port = free_port()
    env = rig.env(LIVEKIT_KEY=None, LIVEKIT_SECRET=None, LIVEKIT_FULL_ACCESS_HOMESERVERS=None,
                  LIVEKIT_JWT_PORT="", LK_JWT_PORT=port, LIVEKIT_LOCAL_HOMESERVERS=rig.full.netloc,
                  LIVEKIT_API_KEY=CANARY_KEY, LIVEKIT_API_SECRET=CANARY_SECRET)
    s = Service(env)
    s.bind = f"127.0.0.1:{port}"
    with s:
        rig.sfu.forget()
        jwt = check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))
        assert pyjwt.decode(jwt, CANARY_SECRET, algorithms=["HS256"])["iss"] == CANARY_KEY
        assert len(rig.sfu.rooms) == 1
        assert s.stop() == 0
        for name in OLD:
            assert any(name in w for w in warnings(s)), (name, s.log_text())


def test_old_names_lose_to_the_current_ones(rig):
    env = rig.env(LIVEKIT_LOCAL_HOMESERVERS="x", LIVEKIT_API_KEY="x", LIVEKIT_API_SECRET="x")
    with Service(env) as s:
        jwt = check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))
        assert pyjwt.decode(jwt, CANARY_SECRET, algorithms=["HS256"])["video"]["canPublish"] is True


def test_jwt_port_serves_with_a_warning():
    with Service(base_env(LIVEKIT_JWT_PORT=free_port())) as s:
        assert s.stop() == 0
    assert any("LIVEKIT_JWT_PORT" in w for w in warnings(s))


# ---- secrets from files

def token_of(rig, s):
    return check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.other)))


def signed_by(jwt, key, secret):
    return pyjwt.decode(jwt, secret, algorithms=["HS256"], issuer=key)


SECRET_2 = "canary-second-secret-" + "Yx5" * 8


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", " \n\n\t"], ids=repr)
def test_from_file(rig, tmp_path, ending):
    (tmp_path / "key").write_text("filekey" + ending, newline="")
    (tmp_path / "secret").write_text(" " + SECRET_2 + ending, newline="")
    key, secret = str(tmp_path / "key"), str(tmp_path / "secret")
    for env, want in (
            (dict(LIVEKIT_KEY_FROM_FILE=key, LIVEKIT_SECRET_FROM_FILE=secret), ("filekey", SECRET_2)),
            (dict(LIVEKIT_KEY=None, LIVEKIT_SECRET=None, LIVEKIT_KEY_FROM_FILE=key, LIVEKIT_SECRET_FROM_FILE=secret),
             ("filekey", SECRET_2)),
            (dict(LIVEKIT_KEY=None, LIVEKIT_KEY_FROM_FILE=key), ("filekey", CANARY_SECRET)),
            (dict(LIVEKIT_SECRET=None, LIVEKIT_SECRET_FROM_FILE=secret), (CANARY_KEY, SECRET_2)),
            (dict(LIVEKIT_KEY=f"  {CANARY_KEY}\n", LIVEKIT_SECRET=f"{CANARY_SECRET}\r\n"), (CANARY_KEY, CANARY_SECRET))):
        with rig.service(**env) as s:
            signed_by(token_of(rig, s), *want)


@pytest.mark.parametrize("text, want", [
    ("k1: {s}", "k1"), ("k1: {s}\n", "k1"), ("k1:{s}\r\n", "k1"), (" k1 :\t{s} \n", "k1"),
    ("k1: {s}\nk2: another-secret-another-secret-0000\n", "k1"), ("k2: {s}\nk1: another-secret-another-secret-0000", "k2"),
], ids=repr)
def test_key_file(rig, tmp_path, text, want):
    (tmp_path / "keys").write_text(text.format(s=SECRET_2), newline="")
    with rig.service(LIVEKIT_KEY_FILE=str(tmp_path / "keys"), LIVEKIT_KEY="loses",
                     LIVEKIT_KEY_FROM_FILE="/nonexistent", LIVEKIT_SECRET_FROM_FILE="/nonexistent") as s:
        signed_by(token_of(rig, s), want, SECRET_2)
    with rig.service(LIVEKIT_KEY_FILE=str(tmp_path / "keys"), LIVEKIT_KEY=None, LIVEKIT_SECRET=None) as s:
        signed_by(token_of(rig, s), want, SECRET_2)


@pytest.mark.parametrize("text", ["", "\n", "nocolon\n", "a: b: c\n", "a: b\nnocolon\n", ": b\n", "a:\n", "a: b: \n"],
                         ids=repr)
def test_bad_key_file(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    got = fatal(base_env(LIVEKIT_KEY_FILE=str(tmp_path / "keys")))
    assert "LIVEKIT_KEY_FILE" in got.err


def test_empty_secret_file(tmp_path):
    (tmp_path / "empty").write_text("\n")
    fatal(base_env(LIVEKIT_SECRET=None, LIVEKIT_SECRET_FROM_FILE=str(tmp_path / "empty")))


# ---- the lab switch

@pytest.mark.parametrize("value, served", [("YES_I_KNOW_WHAT_I_AM_DOING", True), ("true", False), ("", False),
                                           ("yes_i_know_what_i_am_doing", False), ("1", False),
                                           (" YES_I_KNOW_WHAT_I_AM_DOING", False)])
def test_skip_verify(rig, value, served):
    """Only the exact words; without them a foreign certificate gets no request."""
    rig.other.forget()
    with rig.service(LIVEKIT_INSECURE_SKIP_VERIFY_TLS=value, LKJWT_CA_FILE=None, LKJWT_CA_ONLY=None) as s:
        reply = s.post("/sfu/get", rig.body("/sfu/get", rig.other))
        assert reply.status == (200 if served else 401)
        assert len(rig.other.requests) == (1 if served else 0)


# ---- strict

@pytest.mark.parametrize("env", [{"LIVEKIT_SECRET": "short"}, {"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*"},
                                 {"LIVEKIT_INSECURE_SKIP_VERIFY_TLS": "YES_I_KNOW_WHAT_I_AM_DOING"},
                                 {"LIVEKIT_URL": "ws://sfu.example.org"}], ids=lambda e: next(iter(e)))
def test_strict_makes_warnings_fatal(env):
    got = fatal(base_env(LKJWT_STRICT="true", **env))
    assert next(iter(env)) in got.err
    with Service(base_env(**env)) as s:
        assert s.stop() == 0


def test_strict_accepts_what_is_sound():
    with Service(base_env(LKJWT_STRICT="true")) as s:
        assert s.stop() == 0


# ---- levels

@pytest.mark.parametrize("value, shown", [
    ("debug", "debug info warning"), ("DEBUG", "debug info warning"), ("info", "info warning"), ("Info", "info warning"),
    ("", "info warning"), (None, "info warning"), ("nonsense", "info warning"), ("warn", "warning"), ("warning", "warning"),
    ("WARNING", "warning"), ("error", ""), ("ERROR", "")])
def test_log_level(rig, value, shown):
    with rig.service(LIVEKIT_LOG_LEVEL=value, LIVEKIT_FULL_ACCESS_HOMESERVERS="*") as s:
        check_granted(s.post("/sfu/get", rig.body("/sfu/get", rig.full)))
        s.stop()
        levels = {line["level"] for line in s.log()}
    assert levels <= {"debug", "info", "warning", "error"}
    for level in ("info", "warning"):
        assert (level in levels) == (level in shown.split()), (value, levels)
    if "debug" not in shown:
        assert "debug" not in levels


# ---- print-config

def test_s09_print_config_masks(tmp_path):
    (tmp_path / "pw").write_text(CANARY_PASSWORD)
    env = base_env(LIVEKIT_URL="wss://sfu.example.org/x", LKJWT_PATH_PREFIX="/livekit/jwt",
                   LKJWT_FEDERATION_API_URL_OVERRIDES="a.example.org=https://b.example.org",
                   LKJWT_TOKEN_TTL_S="1234", LIVEKIT_AS_TOKEN=CANARY_PASSWORD, LIVEKIT_HS_TOKEN=CANARY_SECRET,
                   LIVEKIT_HS_SERVER_NAME="as.example.org",
                   LIVEKIT_REDIS_PASSWORD=CANARY_PASSWORD, HTTPS_PROXY=f"http://u:{CANARY_PASSWORD}@p")
    got = run_cli(["--print-config"], env)
    assert got.code == 0, got
    for value in ("wss://sfu.example.org/x", "/livekit/jwt", "1234", "b.example.org", "full.example.org"):
        assert value in got.out, got
    for name in ("LIVEKIT_URL", "LIVEKIT_KEY", "LIVEKIT_SECRET", "LIVEKIT_FULL_ACCESS_HOMESERVERS", "LKJWT_TOKEN_TTL_S",
                 "LKJWT_MAX_CONNS", "LIVEKIT_JWT_BIND"):
        assert name in got.out
    assert CANARY_SECRET not in got.text and CANARY_PASSWORD not in got.text


def test_s09_print_config_masks_files(tmp_path):
    (tmp_path / "keys").write_text(f"k1: {CANARY_SECRET}\nk2: {SECRET_2}\n")
    got = run_cli(["--print-config"], base_env(LIVEKIT_KEY_FILE=str(tmp_path / "keys")))
    assert got.code == 0 and CANARY_SECRET not in got.text and SECRET_2 not in got.text


def test_limits_are_printed():
    got = run_cli(["--print-config"], base_env(LKJWT_MAX_CONNS="77", LKJWT_MAX_BODY="4321", LKJWT_KEEPALIVE_S="66"))
    for value in ("77", "4321", "66"):
        assert value in got.out


def test_defaults_of_the_documents():
    """The values that SECURITY.md 4 names, as the binary states them."""
    out = run_cli(["--print-config"], base_env()).out
    for name, value in (("LKJWT_MAX_CONNS", "1024"), ("LKJWT_MAX_BODY", "65536"), ("LKJWT_KEEPALIVE_S", "650"),
                        ("LKJWT_LOOKUP_TIMEOUT_S", "20"), ("LKJWT_LOOKUPS_MAX", "192"),
                        ("LKJWT_LOOKUPS_PER_SERVER", "16"), ("LKJWT_TOKEN_TTL_S", "3600"),
                        ("LKJWT_JOBS_MAX", "10000"), ("LKJWT_JOBS_PER_USER", "16"),
                        ("LKJWT_LAME_DUCK_S", "0"), ("LKJWT_DRAIN_S", "7"), ("LIVEKIT_JWT_BIND", ":8080")):
        line = [x for x in out.splitlines() if name in x]
        assert line and value in line[0], (name, line)


def test_unreadable_environment_is_no_crash():
    """Values nobody means to set: long, not UTF-8, with control bytes."""
    for value in ("x" * 100000, "\x01\x1b[31m", "a\nb", "\udcff\udcfe"):
        for name in ("LIVEKIT_URL", "LKJWT_PATH_PREFIX", "LIVEKIT_FULL_ACCESS_HOMESERVERS", "LIVEKIT_LOG_LEVEL",
                     "LIVEKIT_JWT_BIND", "LKJWT_RESOLVER", "LIVEKIT_XYZ"):
            got = run_cli(["--print-config"], {**base_env(), name: value})
            assert got.code in (0, 1), (name, value[:9], got)
            assert "\x1b" not in got.text and "\x01" not in got.text


def test_files_of_odd_kinds(tmp_path):
    """A folder, an endless device, a huge file where a secret should be."""
    (tmp_path / "big").write_bytes(b"x" * (2 << 20))
    for path in ("/", "/dev/zero", str(tmp_path / "big")):
        got = fatal(base_env(LIVEKIT_SECRET_FROM_FILE=path))
        assert "LIVEKIT_SECRET_FROM_FILE" in got.err


def test_validation_does_not_need_the_network(rig):
    """A start with every name unresolvable is a start."""
    env = base_env(LIVEKIT_URL="wss://nowhere.invalid", LKJWT_LIVEKIT_API_URL="https://nowhere.invalid",
                   LIVEKIT_FULL_ACCESS_HOMESERVERS="nowhere.invalid", LKJWT_RESOLVER="127.0.0.1:1")
    with Service(env) as s:
        assert s.post("/sfu/get", make_body("/sfu/get", "a_b")).status == 401


def test_limits_are_logged_at_start():
    env = base_env(LKJWT_MAX_CONNS="77", LKJWT_MAX_BODY="4321", LKJWT_KEEPALIVE_S="66", LKJWT_LOOKUPS_MAX="55",
                   LKJWT_LOOKUPS_PER_SERVER="13", LKJWT_LOOKUP_TIMEOUT_S="19")
    with Service(env) as s:
        assert s.stop() == 0
    (line,) = s.events("LIMITS")
    values = {v.removesuffix("000") for v in line.values()}         # seconds or milliseconds
    assert {"77", "4321", "66", "55", "13", "19"} <= values, line
