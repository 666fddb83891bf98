"""DESIGN.md 4.11: the command line beside serving."""
import re
import subprocess

import jwt as pyjwt
import pytest

from peers import Homeserver, Reply, Sfu
from service import BIN, CANARY_KEY, CANARY_SECRET, CANARY_TOKEN, ROOT, base_env, run_cli


def test_version():
    got = run_cli(["--version"])
    assert (got.code, got.err) == (0, "")
    assert re.match(r"lkjwt \d+\.\d+", got.out) and got.out.count("\n") == 1, got


def test_help_names_everything():
    got = run_cli(["--help"])
    assert (got.code, got.err) == (0, "")
    for word in ("--check", "--healthcheck", "--print-config", "--ca-list", "--license", "--version", "--help",
                 "LIVEKIT_URL", "LIVEKIT_KEY", "LIVEKIT_SECRET", "LIVEKIT_KEY_FILE", "LIVEKIT_KEY_FROM_FILE",
                 "LIVEKIT_SECRET_FROM_FILE", "LIVEKIT_FULL_ACCESS_HOMESERVERS", "LIVEKIT_JWT_BIND", "LIVEKIT_LOG_LEVEL",
                 "LIVEKIT_INSECURE_SKIP_VERIFY_TLS", "LIVEKIT_CAN_UPDATE_OWN_METADATA", "LKJWT_RESTRICTED_CAN_PUBLISH",
                 "LKJWT_FEDERATION_API_URL_OVERRIDES", "LKJWT_LIVEKIT_API_URL", "LKJWT_PATH_PREFIX", "SSL_CERT_FILE",
                 "SSL_CERT_DIR", "LKJWT_CA_FILE", "LKJWT_CA_ONLY", "LKJWT_ALLOWED_HOMESERVERS",
                 "LKJWT_BLOCKED_HOMESERVERS", "LKJWT_RESOLVER", "LKJWT_HOSTS_FILE", "LKJWT_METRICS_BIND",
                 "LKJWT_LOG_FORMAT", "LKJWT_ALLOW_NETWORKS", "LKJWT_PRIVATE_NETWORKS", "LKJWT_TOKEN_TTL_S",
                 "LKJWT_MAX_BODY", "LKJWT_MAX_CONNS", "LKJWT_KEEPALIVE_S", "LKJWT_LOOKUP_TIMEOUT_S",
                 "LKJWT_LOOKUPS_MAX", "LKJWT_LOOKUPS_PER_SERVER", "LKJWT_LAME_DUCK_S", "LKJWT_DRAIN_S", "LKJWT_STRICT",
                 "LKJWT_JOBS_MAX", "LKJWT_JOBS_PER_USER", "LIVEKIT_CS_API_URL_OVERRIDES", "LIVEKIT_SANITY_CHECK_INTERVAL_SECONDS"):
        assert word in got.out, word


def test_license():
    got = run_cli(["--license"])
    assert (got.code, got.err) == (0, "")
    squeeze = lambda t: " ".join(t.split())
    ours = squeeze((ROOT / "LICENSE").read_text())
    notice, grant = ours.index("Copyright"), ours.index("Permission is hereby granted")
    assert ours[notice:grant].strip() in squeeze(got.out) and ours[grant:] in squeeze(got.out)
    for word in ("BearSSL", "Thomas Pornin", "musl", "Rich Felker"):
        assert word in got.out, word


def test_ca_list():
    got = run_cli(["--ca-list"])
    assert got.code == 0 and "CONFIG_BAD" not in got.err
    assert len(got.out.splitlines()) >= 100
    assert "ISRG Root X1" in got.out and "ISRG Root X2" in got.out


@pytest.mark.parametrize("args", [["--nonsense"], ["serve"], ["-x"], ["--"], ["--version", "x"],
                                  ["--check", "a", "b"], ["--help=1"], ["--healthcheck", "x"]], ids=" ".join)
def test_unknown_argument(args):
    got = run_cli(args, base_env(), timeout=10)
    assert got.code == 1 and "--help" in got.text, got


@pytest.mark.parametrize("arg", ["--help", "--license", "--ca-list", "--print-config", "--version"])
def test_full_stdout_is_an_error(arg):
    """A report that could not be written is not reported as written."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run([BIN, arg], env=base_env(), stdout=full, stderr=subprocess.PIPE, timeout=10)
    assert done.returncode != 0


@pytest.mark.parametrize("arg", ["--help", "--license", "--ca-list"])
def test_closed_stdout_is_no_hang(arg):
    done = subprocess.run(["/bin/sh", "-c", f"exec {BIN} {arg} >&-"], env=base_env(), capture_output=True, timeout=10)
    assert done.returncode != 0


def test_information_needs_no_configuration():
    for arg in ("--help", "--license", "--ca-list", "--version"):
        assert run_cli([arg], {"LIVEKIT_URL": "ftp://x", "LKJWT_MAX_CONNS": "x"}).code == 0


# ---- --check

def get_participant(sfu):
    """As LiveKit: the token first, then the room that is not there."""
    def answer(req):
        try:
            claims = pyjwt.decode(req.header("authorization").removeprefix("Bearer "), sfu.secret, algorithms=["HS256"],
                                  issuer=sfu.key)
        except pyjwt.InvalidTokenError as e:
            return Reply(401, f"invalid token: {e}", ctype="text/plain")
        assert claims["video"]["roomAdmin"] is True
        return Reply(404, {"code": "not_found", "msg": "participant does not exist"})
    return sfu.on("/twirp/livekit.RoomService/GetParticipant", answer)


def check(rig, name=None, **env):
    get_participant(rig.sfu)
    return run_cli(["--check"] + ([name] if name else []), rig.env(**env), timeout=60)


def test_check_configuration(rig):
    got = check(rig)
    assert got.code == 0, got
    # The SFU is asked too, but nothing is made there.
    assert rig.sfu.netloc in got.out and rig.sfu.rooms == []
    got = run_cli(["--check"], base_env(LIVEKIT_URL="ftp://x", LKJWT_TOKEN_TTL_S="1"))
    assert got.code == 1 and "LIVEKIT_URL" in got.text and "LKJWT_TOKEN_TTL_S" in got.text


def test_check_homeserver(rig):
    # Not a name of ours: clients would be asked for at its port 443 (test_check.py).
    got = check(rig, rig.full.netloc, LIVEKIT_FULL_ACCESS_HOMESERVERS="other.test", LKJWT_ALLOW_NETWORKS="127.0.0.0/8")
    assert got.code == 0, got
    steps = [line.split()[:2] for line in got.out.splitlines() if line.startswith(("ok ", "no "))]
    assert [s for s in steps if s[0] != "ok"] == [], got
    assert {"config", "anchors", "sfu", "name", "connect", "tls", "userinfo"} <= {s[1] for s in steps}, got
    assert rig.full.netloc in got.out


def test_check_names_what_is_wrong(rig, pki):
    cert = pki.leaf(ips=["127.0.0.9"])
    with Homeserver(tls=cert) as wrong_name, Homeserver() as plain, Homeserver(tls=pki.leaf(ips=["127.0.0.1"])) as odd:
        odd.on("/_matrix/federation/v1/openid/userinfo", Reply(403, "no"))
        for name, word in ((wrong_name.netloc, "tls"), (plain.netloc, "tls"), ("127.0.0.1:1", "connect"),
                           ("a_b", "name"), (odd.netloc, "http")):
            got = check(rig, name)
            assert got.code == 1 and word in got.out.lower(), (name, got)


def test_check_names_a_broken_sfu(rig):
    with Sfu("otherkey", "other-secret-other-secret-other-00") as other:
        get_participant(other)
        got = check(rig, LKJWT_LIVEKIT_API_URL=other.url)
        assert got.code == 1 and "key" in got.out and other.netloc in got.out, got
    with Sfu(CANARY_KEY, CANARY_SECRET) as proxy:
        proxy.on("/twirp/livekit.RoomService/GetParticipant", Reply(404, "404 page", ctype="text/html"))
        got = check(rig, LKJWT_LIVEKIT_API_URL=proxy.url)
        assert got.code == 1 and proxy.netloc in got.out, got
    got = check(rig, LKJWT_LIVEKIT_API_URL="http://127.0.0.1:1")
    assert got.code == 1 and "127.0.0.1:1" in got.text, got


def test_s09_check_tells_no_secret(rig):
    for name in (None, rig.full.netloc, rig.other.netloc, "127.0.0.1:1"):
        got = check(rig, name)
        assert CANARY_SECRET not in got.text and CANARY_TOKEN not in got.text
        assert "eyJ" not in got.text and "access_token" not in got.text


def test_check_lists_each_problem_on_a_line_of_its_own(rig):
    got = check(rig, "127.0.0.1:1", LKJWT_LIVEKIT_API_URL="http://127.0.0.1:1")
    assert got.code == 1
    assert all(line.strip() for line in got.out.splitlines())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", got.out)
