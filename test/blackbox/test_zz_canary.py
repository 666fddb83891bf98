"""Claim s09, last of all: the secrets used throughout stand nowhere in what
the binary wrote: logs, reports, metrics, refusals of every suite before."""
import base64

import service
from exchange import make_body
from peers import Reply
from service import CANARY_DIR, CANARY_PASSWORD, CANARY_SECRET, CANARY_TOKENS, base_env, find_leaks, free_port, \
    leak_forms, run_cli


def test_forms_find_a_leak():
    """The search itself: each way a secret could show is found."""
    from urllib.parse import quote
    for secret in (CANARY_SECRET, CANARY_PASSWORD, *CANARY_TOKENS):
        forms = leak_forms(secret)
        for text in (secret, quote(secret, safe=""), quote(secret), secret.encode().hex(), f"x{secret}y",
                     *(base64.b64encode(b"a" * n + secret.encode() + b"zz").decode() for n in range(3)),
                     *(base64.urlsafe_b64encode(b"a" * n + secret.encode() + b"zz").decode() for n in range(3))):
            assert any(f in text.encode() for f in forms), text


def everything_that_could_tell(rig):
    """Each secret through each road that reports something, at the chattiest level."""
    url = f"https://user:{CANARY_PASSWORD}@127.0.0.1:1/"
    for form in ("logfmt", "json"):
        with rig.service(LIVEKIT_LOG_LEVEL="debug", LKJWT_LOG_FORMAT=form, HTTPS_PROXY=url, LIVEKIT_AS_TOKEN=CANARY_PASSWORD,
                         LIVEKIT_HS_TOKEN=CANARY_SECRET, LIVEKIT_HS_SERVER_NAME="as.example.org",
                         LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}") as s:
            for path in ("/get_token", "/sfu/get"):
                for hs in (rig.full, rig.other):
                    s.post(path, rig.body(path, hs))
                    s.post(path, rig.body(path, hs, "@x:y", CANARY_TOKENS[1]))
                    for reply in (Reply(403, {"errcode": "M_FORBIDDEN", "error": CANARY_TOKENS[0]}),
                                  Reply(200, {"sub": CANARY_TOKENS[0]}), Reply(302, "", [("Location", url)]),
                                  Reply(raw=b"HTTP/1.1 200 " + CANARY_TOKENS[0].encode() + b"\r\n\r\n", close=True)):
                        hs.on("/_matrix/federation/v1/openid/userinfo", reply)
                        s.post(path, rig.body(path, hs))
                        hs.off()
                rig.sfu.fail = lambda req: Reply(500, {"code": "internal", "msg": req.header("authorization")})
                s.post(path, rig.body(path, rig.full))
                rig.sfu.fail = None
                s.post(path, make_body(path, "127.0.0.1:1"))
                s.request("POST", f"{path}?access_token={CANARY_TOKENS[0]}", CANARY_TOKENS[0])
                s.request("POST", f"/x{path}?{CANARY_TOKENS[0]}", "", [("Authorization", f"Bearer {CANARY_TOKENS[0]}")])
    for args in (["--print-config"], ["--check"], ["--check", rig.full.netloc], ["--check", "127.0.0.1:1"]):
        run_cli(args, rig.env(LIVEKIT_REDIS_PASSWORD=CANARY_PASSWORD), timeout=60)
    for name in ("LIVEKIT_URL", "LKJWT_LIVEKIT_API_URL", "LIVEKIT_JWT_BIND", "LKJWT_RESOLVER"):
        run_cli(["--print-config"], base_env(**{name: url}))
        run_cli([], base_env(**{name: url}))
    for name in ("LKJWT_FEDERATION_API_URL_OVERRIDES", "LIVEKIT_CS_API_URL_OVERRIDES"):
        run_cli(["--print-config"], base_env(**{name: f"a.example.org={url}"}))


def test_s09_no_secret_anywhere(rig):
    everything_that_could_tell(rig)
    together = b"\n".join(f.read_bytes() for f in CANARY_DIR.iterdir())
    # What is searched must hold what it should.
    for word in (b"GRANTED", b"lkjwt_events_total", b"M_UNAUTHORIZED", b"LIVEKIT_SECRET", rig.full.netloc.encode()):
        assert word in together, word
    assert find_leaks() == []


def test_s09_the_search_itself_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "CANARY_DIR", tmp_path)
    for text in (CANARY_SECRET, f"x={CANARY_TOKENS[0]}", "eyJhbGciOiJIUzI1NiJ9.e30.x", "GET /?access_token=a"):
        (tmp_path / "f").write_text(text)
        assert find_leaks(), text
    (tmp_path / "f").write_text("nothing of the kind")
    assert find_leaks() == []
    assert find_leaks("of the kind") != []
