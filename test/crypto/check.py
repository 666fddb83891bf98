"""lkjwt's HMAC, JWS and signature checks against what others made.

Wycheproof's vectors as Debian's BoringSSL carries them (.deps/wycheproof),
JWS vectors made here by PyJWT and cryptography, RFC 7515 A.1 and RFC 4231;
all are driven through lkjwt's own functions by vectors.c. Then the other
way round: tokens that lkjwt signs are verified by PyJWT.

    check.py PROGRAM      as the Makefile built it
"""

import base64
import hashlib
import json
import pathlib
import random
import re
import subprocess
import sys

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
WYCHEPROOF = TOP / ".deps" / "wycheproof"
OUT = TOP / "build" / "crypto"
NOW = 1790000000
ISS = "devkey"
SECRET = b"0123456789abcdef0123456789abcdef"
SUM = base64.b64encode(hashlib.sha256(b"body").digest()).decode()
GOOD = {"iss": ISS, "nbf": NOW - 10, "exp": NOW + 300, "sha256": SUM}


def part(data):
    if not isinstance(data, bytes):
        data = json.dumps(data).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def without(claims, *names, **more):
    return {**{k: v for k, v in claims.items() if k not in names}, **more}


def signed(head, claims, secret=SECRET):
    """A token of parts that PyJWT would not make."""
    text = f"{part(head)}.{part(claims)}"
    mac = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    return f"{text}.{part(mac.sign(text.encode(), secret))}"


def pyjwt(claims, alg="HS256", key=SECRET, **head):
    return jwt.encode(claims, key, algorithm=alg, headers=head or None)


def made_by_others():
    """(what, verdict, token) of tokens that PyJWT made or would take."""
    for exp in (NOW + 1, NOW - 59, 1 << 40):
        yield f"exp {exp - NOW:+}", "taken", pyjwt(dict(GOOD, exp=exp))
    for exp in (NOW - 60, NOW - 61, 0, -1):
        yield f"exp {exp - NOW:+}", "time", pyjwt(dict(GOOD, exp=exp))
    for nbf in (NOW, NOW + 60, 0):
        yield f"nbf {nbf - NOW:+}", "taken", pyjwt(dict(GOOD, nbf=nbf))
    for nbf in (NOW + 61, NOW + 86400, 1 << 62, 1 << 63):
        yield f"nbf {nbf - NOW:+}", "time", pyjwt(dict(GOOD, nbf=nbf))
    yield "no times", "taken", pyjwt(without(GOOD, "exp", "nbf"))
    yield "more claims", "taken", pyjwt(dict(
        GOOD, sub="x", aud=["a", "b"], name="\u00e9", video={"room": "r"}))
    yield "kid and typ", "taken", pyjwt(GOOD, kid="k", typ="other")
    yield "Bearer", "taken", "Bearer " + pyjwt(GOOD)
    yield "join", "join token", pyjwt(dict(GOOD, video={"roomJoin": True}))
    yield "join is false", "taken", pyjwt(
        dict(GOOD, video={"roomJoin": False}))
    yield "no sha256", "no body hash", pyjwt(without(GOOD, "sha256"))
    for text in (SUM[:-1], SUM + "=", SUM.replace("=", "A"), "", "x" * 44):
        yield f"sha256 {text}", "no body hash", pyjwt(dict(GOOD, sha256=text))
    for iss in ("another", "", "devkey ", "DEVKEY"):
        yield f"iss {iss}", "issuer", pyjwt(dict(GOOD, iss=iss))
    yield "no iss", "issuer", pyjwt(without(GOOD, "iss"))
    yield "another's secret", "issuer", pyjwt(GOOD, key=b"other")
    yield "another secret", "signature", pyjwt(GOOD, key=SECRET + b"x")
    yield "empty secret", "signature", signed({"alg": "HS256"}, GOOD, b"")
    for alg in ("HS384", "HS512"):
        yield alg, "token header", pyjwt(GOOD, alg, SECRET * 2)
    yield "none", "token header", jwt.encode(GOOD, None, "none")
    private = rsa.generate_private_key(65537, 2048)
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM,
        serialization.PublicFormat.SubjectPublicKeyInfo)
    yield "RS256", "token header", pyjwt(GOOD, "RS256", private)
    yield "PS256", "token header", pyjwt(GOOD, "PS256", private)
    yield "HS256 by the public key", "signature", signed(
        {"alg": "HS256"}, GOOD, public)
    yield "ES256", "token header", pyjwt(
        GOOD, "ES256", ec.generate_private_key(ec.SECP256R1()))


def hostile():
    """(what, verdict, token) of what no library makes."""
    for name in ("none", "None", "hs256", "HS256 ", "", "HS2567", "RS256"):
        yield f"alg {name!r}", "token header", signed({"alg": name}, GOOD)
    for alg in (None, 256, ["HS256"], {"HS256": 1}, True):
        yield f"alg {alg!r}", "token header", signed({"alg": alg}, GOOD)
    yield "no alg", "token header", signed({"typ": "JWT"}, GOOD)
    for crit in ([], ["exp"], ["b64"], "x", 1, 0, 1.5, {}, {"exp": 1}, True,
                 False):
        yield f"crit {crit!r}", "token header", signed(
            {"alg": "HS256", "crit": crit}, GOOD)
    for head in (b'{"alg":"none","alg":"HS256"}', b'{"alg":"HS256"',
                 b'{"alg":"HS256"}}', b'["HS256"]', b'"HS256"', b"",
                 b'\xef\xbb\xbf{"alg":"HS256"}', b'{"alg":"HS256"}\0',
                 b'{"alg":"HS256","x":"\xff"}'):
        yield f"header {head!r}", "token header", signed(head, GOOD)
    yield "escaped alg", "taken", signed(b'{"\\u0061lg":"HS\\u003256"}',
                                         GOOD)
    for body in (b"", b"[]", b"{}}", b"null", b'"x"', b"\xff",
                 b'{"iss":"devkey","iss":"devkey"}', b'{"iss":1}',
                 b'{"exp":"1"}', b'{"sha256":[]}', b'{"video":[]}'):
        yield f"payload {body!r}", "claims", signed({"alg": "HS256"}, body)
    head, body, mac = pyjwt(GOOD).split(".")
    for token in ("", ".", "..", "...", f"{head}.{body}", f"{head}{body}.",
                  f"{head}.{body}.{mac}.", f"{head}.{body}.{mac}.x.y",
                  json.dumps({"protected": head, "payload": body,
                              "signature": mac})):
        verdict = "token header" if token == ".." else "no token"
        yield f"parts {token[:20]!r}", verdict, token
    yield "no MAC", "signature", f"{head}.{body}."
    yield "MAC twice", "signature", f"{head}.{body}.{mac}{mac}"
    yield "padded", "signature", f"{head}.{body}.{mac}="
    yield "header padded", "token header", f"{head}=.{body}.{mac}"
    yield "longer than 4 KB", "no token", signed(
        {"alg": "HS256"}, dict(GOOD, x="x" * 4096))
    yield "MAC hashed again", "signature", "{}.{}.{}".format(
        head, body, part(hashlib.sha256(mac.encode()).digest()))
    # base64 has spellings: 43 digits hold 258 bits for 256
    alphabet = ("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                "0123456789-_")
    last = alphabet.index(mac[-1])
    for other in range(64):
        if other != last:
            yield f"last digit {alphabet[other]}", "signature", (
                f"{head}.{body}.{mac[:-1]}{alphabet[other]}")
    for at in range(len(mac)):
        other = "A" if mac[at] != "A" else "B"
        yield f"MAC's digit {at}", "signature", (
            f"{head}.{body}.{mac[:at]}{other}{mac[at + 1:]}")
        yield f"a blank at {at}", "signature", (
            f"{head}.{body}.{mac[:at]} {mac[at:]}")
    for at in range(len(body)):
        other = "A" if body[at] != "A" else "B"
        yield f"payload's digit {at}", "signature", (
            f"{head}.{body[:at]}{other}{body[at + 1:]}.{mac}")
    dice = random.Random(1)
    # a MAC with both letters that the two alphabets spell otherwise
    while True:
        text = pyjwt(dict(GOOD, jti=dice.random()))
        if "-" in text.rsplit(".")[2] and "_" in text.rsplit(".")[2]:
            break
    head, body, mac = text.split(".")
    yield "the URL alphabet", "taken", text
    yield "the other alphabet", "signature", "{}.{}.{}".format(
        head, body, mac.replace("-", "+").replace("_", "/"))


def secrets():
    dice = random.Random(7515)
    for length in (1, 2, 31, 32, 33, 55, 56, 63, 64, 65, 127, 128, 129, 500):
        yield dice.randbytes(length)


# RFC 7515 A.1: header and payload hold CRLF, the key is 64 bytes.
A1_KEY = ("0323354b2b0fa5bc837e0665777ba68f5ab328e6f054c928a90f84b2d2502ebf"
          "d3fb5a92d20647ef968ab4c377623d223d2e2172052e4f08c0cd9af567d080a3")
A1_TOKEN = ("eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0K"
            "ICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb"
            "290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
A1_EXP = 1300819380

# RFC 4231: key, data, HMAC-SHA-256; case 5 is cut to 128 bits.
RFC4231 = [
    (b"\x0b" * 20, b"Hi There",
     "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
    (b"Jefe", b"what do ya want for nothing?",
     "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
    (b"\xaa" * 20, b"\xdd" * 50,
     "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
    (bytes(range(1, 26)), b"\xcd" * 50,
     "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"),
    (b"\x0c" * 20, b"Test With Truncation",
     "a3b6167473100ee06e0c796c2955552b"),
    (b"\xaa" * 131, b"Test Using Larger Than Block-Size Key - Hash Key First",
     "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"),
    (b"\xaa" * 131, b"This is a test using a larger than block-size key and "
     b"a larger than block-size data. The key needs to be hashed before "
     b"being used by the HMAC algorithm.",
     "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"),
]


def write(name, rows):
    path = OUT / name
    path.write_text("\n\n".join(
        "\n".join(f"{k} = {v}" for k, v in row.items()) for row in rows)
        + "\n")
    return path


def jws_rows():
    base = {"name": ISS, "secret": SECRET.hex(), "now": NOW}
    for what, verdict, token in [*made_by_others(), *hostile()]:
        yield dict(base, comment=what, result=verdict, token=token)
    for secret in secrets():
        yield dict(base, comment=f"secret of {len(secret)}", result="taken",
                   secret=secret.hex(), token=pyjwt(GOOD, key=secret))
        yield dict(base, comment="the same, cut", result="signature",
                   secret=secret.hex(), token=pyjwt(GOOD, key=secret[:-1]
                                                    or b"other2"))
    for now, verdict in ((A1_EXP, "no body hash"), (A1_EXP + 60, "time")):
        yield dict(name="joe", secret=A1_KEY, now=now, result=verdict,
                   comment="RFC 7515 A.1", token=A1_TOKEN)
    yield dict(name="joe", secret=A1_KEY, now=A1_EXP, result="signature",
               comment="RFC 7515 A.1, damaged",
               token=A1_TOKEN.replace("dBjft", "dBjfu"))


def hmac_rows():
    for number, (key, data, tag) in enumerate(RFC4231, 1):
        yield dict(comment=f"RFC 4231 case {number}", result="valid",
                   key=key.hex(), msg=data.hex(), tag=tag)


def check_signed(program):
    """Tokens that lkjwt signs, by PyJWT: (passed, failed)."""
    dice = random.Random(4231)
    texts = ["", "x", "\u00e9\u4e2d\U0001f600", "\\\"/\b", "a" * 3000, "\x7f"]
    rows = [(secret, {"iss": ISS, "n": dice.getrandbits(60), "text": text})
            for secret in secrets() for text in texts]
    path = write("sign.txt", [
        {"secret": secret.hex(), "payload": json.dumps(
            claims, ensure_ascii=False).encode().hex()}
        for secret, claims in rows])
    tokens = subprocess.run([program, "sign", path], check=True, text=True,
                            stdout=subprocess.PIPE).stdout.split("\n")[:-1]
    passed = 0
    for (secret, claims), token in zip(rows, tokens, strict=True):
        try:
            head = jwt.get_unverified_header(token)
            ok = head == {"alg": "HS256", "typ": "JWT"} and claims == (
                jwt.decode(token, secret, algorithms=["HS256"]))
        except jwt.InvalidTokenError as error:
            print(f"FAIL a token of ours: {error!r}: {token[:200]}")
            ok = False
        for wrong in (secret + b"x", b"another secret"):
            try:
                jwt.decode(token, wrong, algorithms=["HS256"])
                print("FAIL a token of ours under another secret")
                ok = False
            except jwt.InvalidSignatureError:
                pass
        passed += ok
    return passed, len(rows) - passed


def main():
    program = sys.argv[1]
    OUT.mkdir(parents=True, exist_ok=True)
    files = sorted(WYCHEPROOF.glob("*_test.txt"))
    if len(files) < 10:
        print("FAIL no vectors in .deps/wycheproof: test/setup.sh prove")
        print("0 passed, 1 failed")
        return 1
    files += [write("jws.txt", jws_rows()), write("rfc4231.txt", hmac_rows())]
    passed = failed = 0
    for path in files:
        made = subprocess.run([program, path], text=True,
                              stdout=subprocess.PIPE)
        count = re.search(r"^(\d+) passed, (\d+) failed\n\Z", made.stdout,
                          re.M)
        print(made.stdout[:count.start()] if count else made.stdout, end="")
        ok, bad = (int(count[1]), int(count[2])) if count else (0, 1)
        print(f"{path.name:38} {ok:5} vectors, {bad} failed")
        passed += ok
        failed += bad
    ok, bad = check_signed(program)
    print(f"{'tokens of ours, by PyJWT':38} {ok:5} tokens, {bad} failed")
    print(f"{passed + ok} passed, {failed + bad} failed")
    return failed + bad > 0


if __name__ == "__main__":
    import warnings
    warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
    sys.exit(main())
