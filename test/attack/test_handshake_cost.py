"""What refusing a hostile chain costs: a table, no verdict on the figures.
The chains are those of test_tls.py, and some that are made to be dear."""
import datetime
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

import test_tls
from outbound import Exchange, lkjwt, pki
from peers import Cert, Pki
from test_tls import NAME, addresses, dns, serve  # noqa: F401

TIMES = 8


def deep(p, root, kind, depth=4):
    """depth certificates below an authority."""
    issuer = root
    for i in range(depth - 1):
        issuer = p.ca(f"deep {i}", key=kind, issuer=issuer)
    return p.leaf([NAME], key=kind, issuer=issuer)


def impostor(kind, depth=5):
    """Right names and signatures up to an authority that has our root's name
    and not its key: only the last check fails."""
    def make(p):
        false = Pki(name=p.name, key=kind)
        return deep(false, false.root, kind, depth)
    return make


def loop(p):
    """Each of two authorities is below the other."""
    a, b = p.ca("loop a", key="p384"), p.ca("loop b", key="p384")
    ab = p.build("loop a", a.key, b, extensions=[
        (e.value, e.critical) for e in a.cert.extensions])
    ba = p.build("loop b", b.key, a, extensions=[
        (e.value, e.critical) for e in b.cert.extensions])
    leaf = p.leaf([NAME], issuer=ab)
    return leaf, [leaf, ab, ba, ab, ba]


def of_8192_bits(p):
    """An issuer whose key nobody has: only its size matters."""
    n = (1 << 8191) + 12345
    key = SimpleNamespace(public_key=rsa.RSAPublicNumbers(
        65537, n).public_key, private=None)
    like = p.ca("wide")
    issuer = p.build("wide", key, p.root, extensions=[
        (e.value, e.critical) for e in like.cert.extensions])
    return p.leaf([NAME], issuer=issuer, signer=p.root.key)


def twice(p):
    """An issuer's extension that stands there twice, and contradicts."""
    like = p.ca("twice")
    other = x509.Extension(x509.BasicConstraints.oid, True,
                           x509.BasicConstraints(False, None))
    b = x509.CertificateBuilder(
        p.root.cert.subject, like.cert.subject, like.key.public_key(),
        like.cert.serial_number, datetime.datetime(2026, 1, 1),
        datetime.datetime(2036, 1, 1), [*like.cert.extensions, other])
    issuer = Cert(p, b.sign(p.root.key, hashes.SHA256()), like.key, p.root)
    return p.leaf([NAME], issuer=issuer)


def many(kind, count):
    def make(p):
        leaf = p.leaf([NAME])
        return leaf, [leaf] + [p.ca("many", key=kind)] * count
    return make


HOSTILE = {
    **test_tls.BAD,
    "151 x P-521": many("p521", 151),
    "30 x RSA 4096": many("rsa4096", 30),
    "an impostor's P-384 path of 5": impostor("p384"),
    "an impostor's P-256 path of 5": impostor("p256"),
    "an impostor's RSA 4096 path of 5": impostor("rsa4096"),
    "a P-384 path of 7": impostor("p384", 7),
    "loop": loop,
    "rsa-8192": of_8192_bits,
    "an extension twice": twice,
    "1000 names": lambda p: p.leaf([f"x{i}.test" for i in range(1000)]),
}


def cpu_ms(svc):
    with open(f"/proc/{svc.pid}/schedstat") as f:
        return int(f.read().split()[0]) / 1e6


def refusals(row, dns):  # noqa: F811
    """(event, ms of the first, ms of each further one)"""
    built, name = test_tls.unpack(row)
    built = built(pki())
    leaf, certs = built if isinstance(built, tuple) else (built, None)
    took = []
    with serve(leaf, certs, addr=test_tls.tls_addr(name)) as hs, \
            lkjwt(dns) as svc:
        for n in range(TIMES):
            before, seen = cpu_ms(svc), hs.connections
            e = Exchange(svc, f"{name}:{hs.port}")
            line = e.refused("tls")
            if hs.connections > seen:       # a breaker may spare some
                took.append(cpu_ms(svc) - before)
        assert not hs.requests
    assert took
    again = sum(took[1:]) / len(took[1:]) if took[1:] else float("nan")
    return line["event"], took[0], again


@pytest.mark.timeout(600)
def test_cost_of_refused_handshakes(dns, capsys):  # noqa: F811
    rows = {name: refusals(row, dns) for name, row in HOSTILE.items()}
    with capsys.disabled():
        print(f"\n{'CPU per refused handshake':40}{'event':16}"
              f"{'first':>8}{'again':>8} ms")
        for name, (event, first, again) in sorted(
                rows.items(), key=lambda r: -r[1][1]):
            print(f"{name:40}{event:16}{first:8.2f}{again:8.2f}")
