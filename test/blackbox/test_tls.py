"""The HTTPS client against real servers and real certificates (SECURITY.md 5; S16, S21, S22).

The server name is always name:port, so that the only look-ups are an address and the certificate.
"""
import contextlib
import datetime
import ipaddress
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID, ObjectIdentifier

from outbound import Exchange, by_token, lkjwt, pki, pub, PUB, PUB6, text_file
from peers import (Cert, Dns, Homeserver, Nginx, Pki, Process, RawServer, Reply, SCRATCH, SUB_PATH, accepts, free_port,
                   new_key, now_utc, wait_for, which)

HOST, HOST6, NAME = PUB % 50, PUB6 % 50, "tls.test"
TOKEN = "tlstoken"              # openssl s_server serves files, so here the token is part of a file's name
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module", autouse=True)
def addresses():
    pub(50)


@pytest.fixture(scope="module")
def dns(addresses):
    names = [NAME, "a.tls.test", "b.a.tls.test", "xn--tls.test", "other.test"]
    with Dns("".join(f"{n}. A {HOST}\n" for n in names)) as d:
        yield d


@pytest.fixture
def svc(dns):
    with lkjwt(dns) as s:
        yield s


def serve(cert, certs=None, addr=HOST, **kw):
    kw.setdefault("ciphers", "DEFAULT:@SECLEVEL=0")     # OpenSSL itself shall not refuse what we show
    return Homeserver([(addr, 0)], tls=cert, certs=certs, sub=by_token, **kw)


# ---- key types on real servers --------------------------------------------------------------------------

class OpensslServer(Process):
    """openssl s_server, which answers with the file of the path asked."""

    def __init__(self, cert, server, *args):
        self.dir = tempfile.mkdtemp(prefix="lkjwt-s_server-", dir=SCRATCH)
        self.port = free_port(HOST)
        path = os.path.join(self.dir, SUB_PATH.strip("/") + f"?access_token={TOKEN}")
        os.makedirs(os.path.dirname(path))
        body = '{"sub":"@alice:%s:%d"}' % (server, self.port)
        with open(path, "w", newline="") as f:
            f.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}")
        chain, key = cert.files()
        super().__init__([which("openssl"), "s_server", "-accept", f"{HOST}:{self.port}", "-cert", chain, "-key", key,
                          "-cert_chain", chain, "-HTTP", *args], lambda: "ACCEPT" in self.log_text(), cwd=self.dir)

    def stop(self):
        super().stop()
        shutil.rmtree(self.dir, ignore_errors=True)


class GnutlsServer(Process):
    """gnutls-serv answers every request with an HTML page: TLS in full, then a reply that is not JSON."""

    def __init__(self, cert, server, *args, priority="NORMAL"):
        self.port = free_port(HOST)
        chain, key = cert.files()
        super().__init__([which("gnutls-serv"), "--http", "--port", str(self.port), "--x509certfile", chain,
                          "--x509keyfile", key, "--priority", priority, *args],
                         lambda: accepts(HOST, self.port))


class NginxServer(Nginx):
    """nginx with one homeserver name; its access log tells what TLS did."""

    def __init__(self, cert, server, *, tls="TLSv1.2", extra=""):
        port = free_port(HOST)
        chain, key = cert.files()
        super().__init__(f"""
            log_format t '$ssl_protocol $ssl_cipher $ssl_session_reused $connection $connection_requests $ssl_server_name';
            server {{
                listen {HOST}:{port} ssl;
                access_log tls.log t;
                ssl_certificate {chain}; ssl_certificate_key {key};
                ssl_protocols {tls}; {extra}
                location = {SUB_PATH} {{ default_type application/json; return 200 '{{"sub":"@alice:{server}:{port}"}}'; }}
            }}""", HOST, port)

    def tls_log(self, lines=1):
        """Words of each request's line; nginx writes one when the request is done."""
        def read():
            with open(os.path.join(self.dir, "tls.log")) as f:
                got = [line.split() for line in f.read().splitlines()]
            return got if len(got) >= lines else None
        return wait_for("nginx's log", read)


KINDS = ["rsa2048", "rsa4096", "p256", "p384", "mixed", "rsa3072"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """(CA, leaf) of a key type; leaf + intermediate go over the wire."""
    if request.param == "mixed":
        p = Pki(key="rsa4096", inter_key="p384")
        return p, p.leaf([NAME], key="p256")
    p = Pki(key=request.param)
    return p, p.leaf([NAME])


@pytest.mark.parametrize("server", [OpensslServer, GnutlsServer, NginxServer], ids=["openssl", "gnutls", "nginx"])
def test_key_types_on_real_servers(server, kind, dns):
    p, leaf = kind
    with server(leaf, NAME) as s:
        with lkjwt(dns, ca=p.ca_file) as svc:
            e = Exchange(svc, f"{NAME}:{s.port}", token=TOKEN)
            if server is GnutlsServer:
                e.refused("http")               # past TLS: the page came
            else:
                e.granted()
        # the certificate was what opened the door: with another CA it stays shut
        with lkjwt(dns) as svc:
            Exchange(svc, f"{NAME}:{s.port}", token=TOKEN).refused("tls")


SUITES = {
    "rsa": ("rsa2048", ["ECDHE-RSA-CHACHA20-POLY1305", "ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-GCM-SHA384"],
            ["ECDHE-RSA-AES128-SHA256", "ECDHE-RSA-AES256-SHA", "AES128-GCM-SHA256", "DHE-RSA-AES128-GCM-SHA256"]),
    "ecdsa": ("p256", ["ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-GCM-SHA256",
                       "ECDHE-ECDSA-AES256-GCM-SHA384"],
              ["ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES256-SHA", "ECDHE-ECDSA-AES128-CCM"]),
}


@pytest.mark.parametrize("kind, suite, good", [
    pytest.param(kind, s, good, id=s) for kind, yes, no in SUITES.values() for s, good in
    [(x, True) for x in yes] + [(x, False) for x in no]])
def test_cipher_suites(kind, suite, good, dns):
    p = Pki(key=kind)
    with serve(p.leaf([NAME]), ciphers=suite + ":@SECLEVEL=0", max_version=ssl.TLSVersion.TLSv1_2) as hs, \
            lkjwt(dns, ca=p.ca_file) as svc:
        e = Exchange(svc, f"{NAME}:{hs.port}")
        if good:
            e.granted()
            assert hs.asked()[0].tls == "TLSv1.2"
        else:
            e.refused("tls", event="TLS_REFUSED")
            assert not hs.handshakes


@pytest.mark.parametrize("curve, good", [("X25519", True), ("P-256", True), ("P-384", True), ("P-521", False),
                                         ("X448", False)])
def test_curves(curve, good, dns):
    with OpensslServer(pki().leaf([NAME]), NAME, "-groups", curve) as s, lkjwt(dns) as svc:
        e = Exchange(svc, f"{NAME}:{s.port}", token=TOKEN)
        e.granted() if good else e.refused("tls")


ONLY_13 = {
    "openssl": (lambda c: OpensslServer(c, NAME, "-tls1_3"), {"TLS_VERSION"}),
    "gnutls": (lambda c: GnutlsServer(c, NAME, priority="NORMAL:-VERS-ALL:+VERS-TLS1.3"), {"TLS_REFUSED"}),
    "nginx": (lambda c: NginxServer(c, NAME, tls="TLSv1.3"), {"TLS_VERSION"}),
}


@pytest.mark.parametrize("make, events", ONLY_13.values(), ids=ONLY_13)
def test_tls_1_3_only_is_named(make, events, svc):
    """The refusal is named, with the remedy: TLS 1.2 or an override."""
    with make(pki().leaf([NAME])) as s:
        line = Exchange(svc, f"{NAME}:{s.port}", token=TOKEN).refused("tls", event=events)
        text = " ".join(line.values())
        assert "TLS 1.2" in text and "override" in text
        assert f"{HOST}:{s.port}" == line["addr"]


@pytest.mark.parametrize("verify", ["optional", "optional_no_ca"])
def test_server_that_would_like_a_client_certificate(verify, svc):
    extra = f"ssl_verify_client {verify}; ssl_client_certificate {pki().ca_file};"
    with NginxServer(pki().leaf([NAME]), NAME, extra=extra) as ngx:
        Exchange(svc, f"{NAME}:{ngx.port}").granted()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_refused(version, svc):
    with serve(pki().leaf([NAME]), min_version=version, max_version=version, ciphers="ALL:@SECLEVEL=0") as hs:
        Exchange(svc, f"{NAME}:{hs.port}").refused("tls")
        assert not hs.handshakes


# ---- certificates ---------------------------------------------------------------------------------------

def dns_trees(*names):
    return [x509.DNSName(n) for n in names]


def ip_trees(*nets):
    return [x509.IPAddress(ipaddress.ip_network(n)) for n in nets]


def below(issuer_kw, leaf_kw=None, names=(NAME,)):
    """A leaf below an intermediate of its own."""
    return lambda p: p.leaf(names, issuer=p.ca("sub", **issuer_kw), **(leaf_kw or {}))


def path_of(n, **first):
    """A chain of n certificates, leaf included."""
    def make(p):
        issuer = p.root
        for i in range(n - 1):
            issuer = p.ca(f"sub {i}", issuer=issuer, **(first if i == 0 else {}))
        return p.leaf([NAME], issuer=issuer)
    return make


def sent(make, order):
    """The same leaf with another list of certificates on the wire: order(leaf, pki) gives it."""
    def build(p):
        leaf = make(p)
        return leaf, order(leaf, p)
    return build


def plain(p):
    return p.leaf([NAME])


def two_below(p):
    return p.leaf([NAME], issuer=p.ca("second", issuer=p.ca("first")))


def stranger():
    return Pki(name="stranger")


def self_issued(p):
    """An intermediate that changed its key: same subject, new key, signed by the old one."""
    old = p.ca("rollover")
    new = p.ca("rollover", issuer=old)
    return p.leaf([NAME], issuer=old), new


def unknown(critical):
    return [(x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00"), critical)]


def policies(critical):
    return [(x509.CertificatePolicies([x509.PolicyInformation(ObjectIdentifier("2.23.140.1.2.1"), None)]), critical)]


# builder(Pki) -> leaf, or (leaf, certificates to send); optional second: server name (default NAME)
GOOD = {
    "plain": plain,
    "by-the-root-itself": lambda p: p.leaf([NAME], issuer=p.root),
    "path-5": path_of(5),
    "issued-by-openssl": lambda p: by_openssl(p, plain(p)),
    "root-sent-too": sent(plain, lambda l, p: l.path() + [p.root]),
    "misordered": sent(two_below, lambda l, p: [l, *reversed(l.path()[1:])]),
    "misordered-with-root": sent(two_below, lambda l, p: [l, p.root, *reversed(l.path()[1:])]),
    "root-first-after-leaf": sent(plain, lambda l, p: [l, p.root, l.issuer]),
    "double-intermediate": sent(plain, lambda l, p: [l, l.issuer, l.issuer]),
    "leaf-twice": sent(plain, lambda l, p: [l, l, l.issuer]),
    "stranger-between": sent(plain, lambda l, p: [l, stranger().inter, l.issuer]),
    "8-certificates": sent(plain, lambda l, p: [l] + [stranger().root for _ in range(6)] + [l.issuer]),
    "self-issued-beside": lambda p: (lambda l, new: (l, [l, new, l.issuer]))(*self_issued(p)),
    "san-case": lambda p: p.leaf(["TLS.Test"]),
    "san-among-many": lambda p: p.leaf([f"x{i}.test" for i in range(100)] + [NAME], ips=["10.0.0.1"]),
    "cn-of-another": lambda p: p.leaf([NAME], cn="other.test"),
    "eku-absent": lambda p: p.leaf([NAME], eku=()),
    "eku-any": lambda p: p.leaf([NAME], eku=("any",)),
    "eku-both": lambda p: p.leaf([NAME], eku=("clientAuth", "serverAuth")),
    "eku-critical": lambda p: p.leaf([NAME], eku_critical=True),
    "issuer-eku": below({"eku": ("serverAuth", "clientAuth")}),
    "key-usage-absent": lambda p: p.leaf([NAME], digital_signature=None),
    "unknown-extension": lambda p: p.leaf([NAME], extra=unknown(False)),
    "policies": lambda p: p.leaf([NAME], extra=policies(False)),
    "sha-384": lambda p: p.leaf([NAME], sign_hash=hashes.SHA384()),
    "sha-512": lambda p: p.leaf([NAME], sign_hash=hashes.SHA512()),
    "rsa-leaf-ec-issuer": lambda p: p.leaf([NAME], key="rsa2048"),
    "valid-50-years": lambda p: p.leaf([NAME], not_after=now_utc() + 365 * 50 * DAY),
    "valid-from-1970": lambda p: p.leaf([NAME], not_before=datetime.datetime(1970, 1, 1)),
    "wildcard": (lambda p: p.leaf(["*.tls.test"]), "a.tls.test"),
    "wildcard-case": (lambda p: p.leaf(["*.TLS.test"]), "A.tls.test"),
    "punycode": (lambda p: p.leaf(["xn--tls.test"]), "xn--tls.test"),
    "server-name-case": (plain, "TLS.test"),
    "ip-san": (lambda p: p.leaf(ips=[HOST]), HOST),
    "ip-san-among": (lambda p: p.leaf(["x.test"], ips=["10.0.0.1", HOST6, HOST]), HOST),
    "ip6-san": (lambda p: p.leaf(ips=[HOST6]), f"[{HOST6}]"),
    "constraints-permitted": below({"permitted": dns_trees("tls.test")}),
    "constraints-permitted-parent": below({"permitted": dns_trees("test")}),
    "constraints-permitted-case": below({"permitted": dns_trees("TLS.TEST")}),
    "constraints-excluded-other": below({"excluded": dns_trees("other.test")}),
    "constraints-not-critical": below({"permitted": dns_trees("test"), "constraints_critical": False}),
    "constraints-ip": (lambda p: p.leaf(ips=[HOST], issuer=p.ca("sub", permitted=ip_trees("51.15.0.0/24"))), HOST),
    "constraints-ip6": (lambda p: p.leaf(ips=[HOST6], issuer=p.ca("sub", permitted=ip_trees("2a01:4f8::/32"))),
                        f"[{HOST6}]"),
    "constraints-ip-only": below({"permitted": ip_trees("10.0.0.0/8")}),
}


def foreign(p):
    return Pki().leaf([NAME])


def wrong_signer(p):
    return p.leaf([NAME], signer=new_key("p256"))


def by_openssl(p, cert, digest="sha256", extensions=True):
    """The same certificate issued anew by the openssl command: with SHA-1, or as version 1."""
    d = tempfile.mkdtemp(dir=p.dir)
    issuer, files = cert.issuer, {n: os.path.join(d, n) for n in ("key", "csr", "crt", "ca", "cakey", "old")}
    for n, data in (("key", cert.key_pem), ("ca", issuer.pem), ("cakey", issuer.key_pem), ("old", cert.pem)):
        with open(files[n], "wb") as f:
            f.write(data)
    run = lambda *a: subprocess.run([which("openssl"), "x509", *a], check=True, capture_output=True)  # noqa: E731
    copy = ["-copy_extensions", "copy"] if extensions else ["-clrext"]
    run("-x509toreq", "-in", files["old"], "-signkey", files["key"], "-out", files["csr"],
        *(["-copy_extensions", "copy"] if extensions else []))
    run("-req", "-in", files["csr"], "-CA", files["ca"], "-CAkey", files["cakey"], "-days", "9", "-set_serial", "77",
        f"-{digest}", *copy, "-out", files["crt"])
    with open(files["crt"], "rb") as f:
        new = x509.load_pem_x509_certificate(f.read())
    assert new.version == (x509.Version.v3 if extensions else x509.Version.v1)
    assert new.signature_hash_algorithm.name == digest
    return Cert(p, new, cert.key, issuer)


def nine(p):
    leaf = plain(p)
    return leaf, [leaf] + [stranger().root for _ in range(7)] + [leaf.issuer]


def over_32_kb(p):
    leaf = plain(p)
    big = p.ca("big", extra=[(x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.99999.2"), b"\x04\x82\x75\x30"
                                                         + bytes(30000)), False)])
    return leaf, [leaf, big, leaf.issuer, big]


def flipped(p):
    """One bit of the leaf's signature."""
    leaf = plain(p)
    der = bytearray(leaf.der)
    der[-1] ^= 1
    pem = ssl.DER_cert_to_PEM_cert(bytes(der)).encode()
    return leaf, [pem, leaf.issuer]


BAD = {
    "expired": lambda p: p.leaf([NAME], not_before=now_utc() - 9 * DAY, not_after=now_utc() - DAY),
    "expired-a-second-ago": lambda p: p.leaf([NAME], not_before=now_utc() - 9 * DAY,
                                             not_after=now_utc() - datetime.timedelta(seconds=1)),
    "not-yet-valid": lambda p: p.leaf([NAME], not_before=now_utc() + DAY, not_after=now_utc() + 9 * DAY),
    "issuer-expired": below({"not_before": now_utc() - 9 * DAY, "not_after": now_utc() - DAY}),
    "issuer-not-yet-valid": below({"not_before": now_utc() + DAY, "not_after": now_utc() + 9 * DAY}),
    "wrong-name": lambda p: p.leaf(["other.test"]),
    "longer-name": lambda p: p.leaf(["tls.test.other.test", "xtls.test"]),
    "cn-only": lambda p: p.leaf(cn=NAME),
    "cn-right-san-wrong": lambda p: p.leaf(["other.test"], cn=NAME),
    "name-in-uri": lambda p: p.leaf(extra=[(x509.SubjectAlternativeName(
        [x509.UniformResourceIdentifier(f"https://{NAME}"), x509.RFC822Name(f"a@{NAME}")]), False)], cn=NAME),
    "eku-client": lambda p: p.leaf([NAME], eku=("clientAuth",)),
    "eku-client-critical": lambda p: p.leaf([NAME], eku=("clientAuth",), eku_critical=True),
    "eku-mail": lambda p: p.leaf([NAME], eku=("emailProtection",)),
    "issuer-eku-client": below({"eku": ("clientAuth",)}),
    "key-usage-no-signature": lambda p: p.leaf([NAME], digital_signature=False, key="rsa2048"),
    "leaf-is-a-ca": lambda p: p.leaf([NAME], ca=True),
    "wildcard-of-a-suffix": lambda p: p.leaf(["*.test"]),
    "wildcard-alone": lambda p: p.leaf(["*"]),
    "wildcard-itself": lambda p: p.leaf(["*.tls.test"]),
    "wildcard-two-labels": (lambda p: p.leaf(["*.tls.test"]), "b.a.tls.test"),
    "wildcard-part-left": (lambda p: p.leaf(["a*.tls.test"]), "a.tls.test"),
    "wildcard-part-right": (lambda p: p.leaf(["*a.tls.test"]), "a.tls.test"),
    "wildcard-second-label": (lambda p: p.leaf(["a.*.test"]), "a.tls.test"),
    "wildcard-double": (lambda p: p.leaf(["*.*.test"]), "a.tls.test"),
    "nul-in-name": lambda p: p.leaf([f"{NAME}\0.evil.test"]),
    "nul-at-end": lambda p: p.leaf([f"{NAME}\0"]),
    "trailing-blank": lambda p: p.leaf([f"{NAME} "]),
    "ip-as-dns-name": (lambda p: p.leaf([HOST]), HOST),
    "ip-other": (lambda p: p.leaf([NAME], ips=["51.15.0.51"]), HOST),
    "ip-in-cn": (lambda p: p.leaf(["x.test"], cn=HOST), HOST),
    "ip6-other": (lambda p: p.leaf(ips=["2a01:4f8::51", HOST]), f"[{HOST6}]"),
    "ip-san-for-a-name": lambda p: p.leaf(ips=[HOST]),
    "missing-intermediate": sent(plain, lambda l, p: [l]),
    "other-intermediate": sent(plain, lambda l, p: [l, stranger().inter]),
    "same-subject-other-key": sent(plain, lambda l, p: [l, Pki(name=p.name).inter]),
    "intermediate-first": lambda p: (lambda l: (l, [l, l]))(p.leaf([NAME], issuer=p.ca("unsent"))),
    "self-signed": lambda p: p.leaf([NAME], self_signed=True),
    "unknown-ca": foreign,
    "unknown-ca-with-root": lambda p: (lambda l: (l, l.path() + [l.pki.root]))(foreign(p)),
    "wrong-signer": wrong_signer,
    "signature-bit": flipped,
    "issuer-not-ca": below({"is_ca": False}),
    "issuer-no-basic-constraints": below({"basic": False}),
    "issuer-is-a-leaf": lambda p: p.leaf([NAME], issuer=p.leaf(["x.test"])),
    "issuer-no-cert-sign": below({"key_usage": "sign"}),
    "path-length": lambda p: p.leaf([NAME], issuer=p.ca("sub sub", issuer=p.ca("sub", path_len=0))),
    "path-6": path_of(6),
    "constraints-permitted-other": below({"permitted": dns_trees("other.test")}),
    "constraints-permitted-below": below({"permitted": dns_trees("a.tls.test")}),
    "constraints-permitted-suffix-text": below({"permitted": dns_trees("ls.test")}),
    "constraints-excluded": below({"excluded": dns_trees("tls.test")}),
    "constraints-excluded-parent": below({"excluded": dns_trees("test")}),
    "constraints-excluded-case": below({"excluded": dns_trees("TLS.TEST")}),
    "constraints-both": below({"permitted": dns_trees("test"), "excluded": dns_trees("tls.test")}),
    "constraints-other-san": below({"permitted": dns_trees("tls.test")}, names=(NAME, "other.test")),
    "constraints-wildcard": (below({"excluded": dns_trees("a.tls.test")}, names=("*.tls.test",)), "a.tls.test"),
    "constraints-not-critical": below({"permitted": dns_trees("other.test"), "constraints_critical": False}),
    "constraints-ip-other": (lambda p: p.leaf(ips=[HOST], issuer=p.ca("sub", permitted=ip_trees("10.0.0.0/8"))), HOST),
    "constraints-ip-excluded": (lambda p: p.leaf(ips=[HOST], issuer=p.ca("sub", excluded=ip_trees("51.0.0.0/8"))), HOST),
    "constraints-above": lambda p: p.leaf([NAME], issuer=p.ca("sub sub", issuer=p.ca("sub", permitted=dns_trees("o.test")))),
    "constraints-mail": below({"permitted": [x509.RFC822Name("test")]}),
    "constraints-uri": below({"excluded": [x509.UniformResourceIdentifier("other.test")]}),
    "constraints-directory": below({"permitted": [x509.DirectoryName(x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, "leaf")]))]}),
    "unknown-critical-extension": lambda p: p.leaf([NAME], extra=unknown(True)),
    "issuer-unknown-critical": below({"extra": unknown(True)}),
    "sha-1": lambda p: by_openssl(p, plain(p), "sha1"),
    "issuer-sha-1": lambda p: p.leaf([NAME], issuer=by_openssl(p, p.ca("sub"), "sha1")),
    "sha-224": lambda p: p.leaf([NAME], sign_hash=hashes.SHA224()),
    "rsa-1024": lambda p: p.leaf([NAME], key="rsa1024"),
    "issuer-rsa-1024": below({"key": "rsa1024"}),
    "p-521": lambda p: p.leaf([NAME], key="p521"),
    "issuer-p-521": below({"key": "p521"}),
    "issuer-ed25519": below({"key": "ed25519"}),
    "ed25519": lambda p: p.leaf([NAME], key="ed25519"),
    "version-1": lambda p: by_openssl(p, plain(p), extensions=False),
    "9-certificates": nine,
    "over-32-kb": over_32_kb,
}
# The event of a case, by the beginning of its name; the first that fits.
EVENTS = [
    (("expired", "not-yet", "issuer-expired", "issuer-not-yet"), {"TLS_EXPIRED"}),
    (("wrong-name", "longer", "cn-", "name-in", "wildcard", "nul-", "trailing", "ip"), {"TLS_NAME"}),
    (("eku-", "issuer-eku", "key-usage", "leaf-is"), {"TLS_USAGE"}),
    (("missing-", "other-", "intermediate-first", "self-signed", "unknown-ca", "path-6"), {"TLS_UNTRUSTED", "TLS_CHAIN"}),
    (("same-subject", "wrong-signer", "signature", "sha-", "issuer-sha"), {"TLS_SIGNATURE", "TLS_UNTRUSTED"}),
    (("constraints",), {"TLS_CONSTRAINT"}),
    (("9-", "over-", "version-1"), {"TLS_CHAIN"}),
    (("ed25519", "p-521"), {"TLS_REFUSED", "TLS_CHAIN"}),
    (("",), {"TLS_CHAIN", "TLS_UNTRUSTED", "TLS_SIGNATURE", "TLS_USAGE"}),
]


def unpack(row):
    row = row if isinstance(row, tuple) else (row, NAME)
    return row


def show(row):
    build, name = unpack(row)
    built = build(pki())
    leaf, certs = built if isinstance(built, tuple) else (built, None)
    return leaf, certs, name


def tls_addr(name):
    return HOST6 if name.startswith("[") else HOST


@pytest.mark.parametrize("row", GOOD.values(), ids=GOOD)
def test_good_certificates(row, svc):
    leaf, certs, name = show(row)
    with serve(leaf, certs, addr=tls_addr(name)) as hs:
        Exchange(svc, f"{name}:{hs.port}").granted()
        assert hs.asked()[0].sni == (None if name[0] == "[" or name[0].isdigit() else name)


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_s21_bad_certificates(row, svc, request):
    leaf, certs, name = show(row)
    with serve(leaf, certs, addr=tls_addr(name)) as hs:
        line = Exchange(svc, f"{name}:{hs.port}").refused("tls")
        assert line["addr"] == f"{tls_addr(name) if ':' not in tls_addr(name) else f'[{HOST6}]'}:{hs.port}"
        wanted = next(events for names, events in EVENTS if request.node.callspec.id.startswith(names))
        assert line["event"] in wanted
        assert not hs.requests, "a request went out over an unverified connection"


def test_s16_a_long_chain_costs_no_signature_check(svc):
    """151 P-521 certificates behind the leaf: about 1.6 s of arithmetic for who would check them."""
    p = pki()
    leaf = plain(p)
    long = p.ca("long", key="p521")
    with serve(leaf, [leaf] + [long] * 151) as hs:
        Exchange(svc, f"{NAME}:{hs.port}").refused("tls", event="TLS_CHAIN")
        assert not hs.requests


def test_s22_a_session_dies_with_its_certificate(dns):
    """Resumed while the leaf is valid, verified and refused afterwards."""
    leaf = pki().leaf([NAME], not_after=now_utc() + datetime.timedelta(seconds=4))
    with serve(leaf) as hs, lkjwt(dns) as svc:
        hs.ctx.options |= ssl.OP_NO_TICKET
        hs.close_each = True
        Exchange(svc, f"{NAME}:{hs.port}").granted()

        def expired():
            time.sleep(0.3)
            e = Exchange(svc, f"{NAME}:{hs.port}")
            return e if e.reply.status == 401 else None
        wait_for("the expiry", expired).refused("tls", event="TLS_EXPIRED")


def test_s21_mutated_certificates(dns):
    """Any certificate of the chain with bits flipped anywhere is refused, whatever of it still parses."""
    rng = random.Random(21)
    shown = 0
    with lkjwt(dns) as svc:
        # half of them with the two extensions that are judged by lkjwt instead of BearSSL
        strict = pki().ca("strict", permitted=dns_trees("test"))
        for i in range(500):
            leaf = pki().leaf([NAME], issuer=strict, eku_critical=True) if i % 4 > 1 else plain(pki())
            chain = [leaf, leaf.issuer]
            which_one = i % 2
            der = bytearray(chain[which_one].der)
            at = rng.randrange(len(der))
            der[at] ^= 1 << rng.randrange(8)
            chain[which_one] = ssl.DER_cert_to_PEM_cert(bytes(der)).encode()
            try:
                hs = serve(leaf, chain)
            except ssl.SSLError:
                continue            # OpenSSL cannot even show this one
            with hs:
                e = Exchange(svc, f"{NAME}:{hs.port}")
                assert e.reply.status == 401, f"certificate {which_one} of {i}, byte {at}: {bytes(der).hex()}"
                e.refused()
                shown += 1
    assert shown > 100


def test_root_with_name_constraints(dns):
    p = Pki()
    p.root = p.ca("constrained root", issuer=None, permitted=dns_trees("other.test"))
    ca = text_file(p.root.pem)
    issuer = p.ca("sub", issuer=p.root)
    with lkjwt(dns, ca=ca) as svc, serve(p.leaf([NAME], issuer=issuer)) as bad, \
            serve(p.leaf(["other.test"], issuer=issuer)) as good:
        Exchange(svc, f"{NAME}:{bad.port}").refused("tls")
        Exchange(svc, f"other.test:{good.port}").granted()


@pytest.mark.parametrize("ca", [True, False], ids=["ca-true", "ca-false"])
def test_self_signed_certificate_named_as_anchor(ca, dns):
    """What homelabs do: the server's own certificate is the CA file."""
    leaf = pki().leaf([NAME], self_signed=True, ca=ca)
    with serve(leaf) as hs, lkjwt(dns, ca=text_file(leaf.pem)) as svc:
        Exchange(svc, f"{NAME}:{hs.port}").granted()
    with serve(pki().leaf(["other.test"], self_signed=True, ca=ca)) as hs, \
            lkjwt(dns, ca=text_file(leaf.pem)) as svc:
        Exchange(svc, f"{NAME}:{hs.port}").refused("tls")


# ---- where the anchors come from ----------------------------------------------------------------------

def pem_dir(*pems):
    d = tempfile.mkdtemp(prefix="lkjwt-cadir-", dir=SCRATCH)
    for i, pem in enumerate(pems):
        with open(os.path.join(d, f"ca{i}.pem"), "wb") as f:
            f.write(pem)
    return d


def messy(pem):
    """A bundle as people keep them: words around, CRLF, a key, a certificate that is cut, a request."""
    other = Pki().root
    junk = b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
    return (b"# our CA\nsubject=CN = x\n" + other.key_pem + junk + pem.replace(b"\n", b"\r\n") + b"\n\nend\n" + other.pem)


ANCHORS = {
    "LKJWT_CA_FILE": lambda p: {"LKJWT_CA_FILE": p.ca_file},
    "SSL_CERT_FILE": lambda p: {"SSL_CERT_FILE": p.ca_file},
    "SSL_CERT_DIR": lambda p: {"SSL_CERT_DIR": pem_dir(p.root.pem)},
    "SSL_CERT_DIR-several": lambda p: {"SSL_CERT_DIR": pem_dir(Pki().root.pem, b"no PEM here", b"", p.root.pem)},
    "all-three": lambda p: {"LKJWT_CA_FILE": Pki().ca_file, "SSL_CERT_FILE": Pki().ca_file,
                            "SSL_CERT_DIR": pem_dir(p.root.pem)},
    "bundle": lambda p: {"LKJWT_CA_FILE": text_file(b"".join(Pki(name=f"ca {i}").root.pem for i in range(50)) + p.root.pem)},
    "messy": lambda p: {"LKJWT_CA_FILE": text_file(messy(p.root.pem))},
    "intermediate-as-anchor": lambda p: {"LKJWT_CA_FILE": text_file(p.inter.pem)},
    "twice": lambda p: {"LKJWT_CA_FILE": text_file(p.root.pem * 3), "SSL_CERT_FILE": p.ca_file},
    "unsupported-key-beside": lambda p: {"LKJWT_CA_FILE": text_file(
        Pki(key="ed25519").root.pem + Pki(key="p521").root.pem + p.root.pem)},
}


@pytest.mark.parametrize("only", [True, False], ids=["only", "union"])
@pytest.mark.parametrize("env", ANCHORS.values(), ids=ANCHORS)
def test_anchors(env, only, dns):
    p = pki()
    over = {"LKJWT_CA_FILE": None, "LKJWT_CA_ONLY": "true" if only else None, **env(p)}
    with serve(p.leaf([NAME])) as hs, lkjwt(dns, **over) as svc:
        Exchange(svc, f"{NAME}:{hs.port}").granted()
        line = svc.wait_event("ANCHORS")
        assert int(line["count"]) > (0 if only else 1)


def test_without_our_ca_nothing_of_ours_is_trusted(dns):
    with serve(pki().leaf([NAME])) as hs, lkjwt(dns, LKJWT_CA_FILE=None, LKJWT_CA_ONLY=None) as svc:
        assert int(svc.wait_event("ANCHORS")["count"]) > 50      # the system's bundle or the built-in set
        Exchange(svc, f"{NAME}:{hs.port}").refused("tls")
    with serve(pki().leaf([NAME])) as hs, lkjwt(dns, ca=Pki().ca_file) as svc:
        assert svc.wait_event("ANCHORS")["count"] == "1"
        Exchange(svc, f"{NAME}:{hs.port}").refused("tls")


# ---- SIGHUP ----------------------------------------------------------------------------------------------

def test_sighup_reads_the_ca_files_again(dns):
    a, b = Pki(), Pki()
    path = text_file(a.root.pem)
    with serve(a.leaf([NAME])) as of_a, serve(b.leaf([NAME])) as of_b, lkjwt(dns, ca=path) as svc:
        ask_a, ask_b = (lambda: Exchange(svc, f"{NAME}:{of_a.port}")), (lambda: Exchange(svc, f"{NAME}:{of_b.port}"))

        def reload(text, event, count):
            with open(path, "wb") as f:
                f.write(text)
            svc.signal(signal.SIGHUP)
            return svc.wait_event(event, count)

        ask_a().granted()
        ask_b().refused("tls")
        reload(a.root.pem + b.root.pem, "ANCHORS", 2)
        ask_a().granted()
        ask_b().granted()
        # bad files keep the old set, and say so
        for i, bad in enumerate([b"", b"no PEM", b.root.pem[:-200], b"-----BEGIN CERTIFICATE-----\nAAAA\n"
                                 b"-----END CERTIFICATE-----\n"], 1):
            reload(bad, "ANCHORS_BAD", i)
            ask_a().granted()
            ask_b().granted()
        os.unlink(path)
        svc.signal(signal.SIGHUP)
        svc.wait_event("ANCHORS_BAD", 5)
        ask_b().granted()
        # a change closes kept connections and forgets sessions: what is no longer trusted is not used
        reload(b.root.pem, "ANCHORS", 3)
        ask_a().refused("tls")
        ask_b().granted()


# ---- the insecure switch -----------------------------------------------------------------------------------

YES = "YES_I_KNOW_WHAT_I_AM_DOING"
UNVERIFIED = ["expired", "wrong-name", "cn-only", "self-signed", "unknown-ca", "missing-intermediate", "eku-client",
              "sha-1"]


@pytest.mark.parametrize("case", UNVERIFIED)
def test_insecure_switch_accepts_anything(case, dns):
    leaf, certs, name = show(BAD[case])
    with serve(leaf, certs) as hs, lkjwt(dns, LIVEKIT_INSECURE_SKIP_VERIFY_TLS=YES) as svc:
        Exchange(svc, f"{name}:{hs.port}").granted()
        loud = svc.wait_event("INSECURE")
        assert loud["level"] == "warning" and "NOT CHECKED" in loud["msg"]


@pytest.mark.parametrize("value", ["true", "1", "yes", YES.lower(), YES + " ", " " + YES, YES + "\n", YES[:-1], "YES"])
def test_insecure_switch_needs_its_exact_value(value, dns):
    with serve(foreign(None)) as hs, lkjwt(dns, LIVEKIT_INSECURE_SKIP_VERIFY_TLS=value) as svc:
        Exchange(svc, f"{NAME}:{hs.port}").refused("tls")
        assert not hs.requests and not svc.events("INSECURE")


# ---- keep-alive and resumption -------------------------------------------------------------------------------

def test_keep_alive(svc):
    with serve(pki().leaf([NAME])) as hs:
        for _ in range(20):
            Exchange(svc, f"{NAME}:{hs.port}").granted()
        assert (hs.connections, hs.handshakes, len(hs.asked())) == (1, 1, 20)
        assert {r.alpn for r in hs.asked()} == {"http/1.1"}


def test_keep_alive_on_nginx(svc):
    with NginxServer(pki().leaf([NAME]), NAME) as ngx:
        for _ in range(5):
            Exchange(svc, f"{NAME}:{ngx.port}").granted()
        log = ngx.tls_log(5)
    assert len({w[3] for w in log}) == 1 and [w[4] for w in log] == list("12345")
    assert {w[5] for w in log} == {NAME} and {w[0] for w in log} == {"TLSv1.2"}


def test_connection_close_is_obeyed(svc):
    with serve(pki().leaf([NAME])) as hs:
        hs.close_each = True
        for _ in range(5):
            Exchange(svc, f"{NAME}:{hs.port}").granted()
        assert (hs.connections, len(hs.asked())) == (5, 5)


def test_resumption_on_nginx(svc):
    extra = "ssl_session_cache shared:t:1m; ssl_session_tickets off; keepalive_timeout 0;"
    with NginxServer(pki().leaf([NAME]), NAME, extra=extra) as ngx:
        for _ in range(5):
            Exchange(svc, f"{NAME}:{ngx.port}").granted()
        assert [w[2] for w in ngx.tls_log(5)] == [".", "r", "r", "r", "r"]


def test_resumption_on_openssl(svc):
    with serve(pki().leaf([NAME])) as hs:
        hs.ctx.options |= ssl.OP_NO_TICKET
        hs.close_each = True
        for _ in range(4):
            Exchange(svc, f"{NAME}:{hs.port}").granted()
        assert (hs.handshakes, hs.resumed) == (4, 3)


def test_s22_a_session_is_not_used_for_another_name_or_after_a_reload(dns):
    p = pki()
    path = text_file(p.root.pem)
    with serve(p.leaf([NAME, "other.test"])) as hs, lkjwt(dns, ca=path) as svc:
        hs.ctx.options |= ssl.OP_NO_TICKET
        hs.close_each = True
        Exchange(svc, f"{NAME}:{hs.port}").granted()
        Exchange(svc, f"other.test:{hs.port}").granted()
        assert hs.resumed == 0
        with open(path, "ab") as f:
            f.write(Pki().root.pem)
        svc.signal(signal.SIGHUP)
        svc.wait_event("ANCHORS", 2)
        Exchange(svc, f"{NAME}:{hs.port}").granted()
        assert (hs.handshakes, hs.resumed) == (3, 0)


def test_server_that_lost_its_sessions(svc):
    """A refused resumption is a full handshake, not a failure."""
    leaf = pki().leaf([NAME])
    with serve(leaf) as hs:
        port = hs.port
        hs.close_each = True
        Exchange(svc, f"{NAME}:{port}").granted()
    with Homeserver([(HOST, port)], tls=leaf, sub=by_token) as hs:
        Exchange(svc, f"{NAME}:{port}").granted()
        assert (hs.handshakes, hs.resumed) == (1, 0)


def dying(how, rng):
    """Answers the first request of a connection; a later one meets a connection that dies before a reply byte."""
    seen = {}

    def hook(req):
        seen[req.conn] = seen.get(req.conn, 0) + 1
        if seen[req.conn] > 1 and how in ("close", "dirty", "reset") and rng.random() < 0.5:
            return Reply(raw=b"", close=how != "reset", dirty=how == "dirty", reset=how == "reset")
        return None
    return hook


@pytest.mark.parametrize("how", ["close", "dirty", "reset"])
def test_kept_connections_that_die_at_random_cost_no_exchange(how, svc):
    with serve(pki().leaf([NAME])) as hs:
        hs.on(SUB_PATH, dying(how, random.Random(7)))
        for _ in range(200):
            Exchange(svc, f"{NAME}:{hs.port}").granted()
        assert hs.connections > 20 and len(hs.asked()) == 200 + hs.connections - 1


class ClosesAfterReply(Homeserver):
    """Promises keep-alive, but ends the connection behind each reply."""

    def _send(self, conn, r):
        super()._send(conn, r)
        return False


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_homeserver_that_closes_after_each_reply(tls, dns):
    if tls:
        hs = ClosesAfterReply([(HOST, 0)], tls=pki().leaf([NAME]), sub=by_token)
        over, server = None, f"{NAME}:{hs.port}"
    else:
        hs = ClosesAfterReply([("127.0.0.1", 0)], sub=by_token)
        over, server = f"o.test={hs.url}", "o.test"
    with hs, lkjwt(dns, LKJWT_FEDERATION_API_URL_OVERRIDES=over) as svc:
        for _ in range(200):
            Exchange(svc, server).granted()
        assert hs.connections == 200


def test_homeserver_that_restarts_between_exchanges(svc):
    with serve(pki().leaf([NAME])) as hs:
        for _ in range(30):
            Exchange(svc, f"{NAME}:{hs.port}").granted()
            hs.drop_connections()
        assert hs.connections == 30


def test_fresh_connection_that_dies_is_one_more_try_at_most(svc):
    """No reply byte ever: the exchange fails, promptly, after at most one more call."""
    with serve(pki().leaf([NAME])) as hs:
        hs.on(SUB_PATH, lambda r: Reply(raw=b"", close=True))
        Exchange(svc, f"{NAME}:{hs.port}").refused("http")
        assert 1 <= len(hs.asked()) <= 2


def test_no_retry_once_a_reply_byte_came(svc):
    with serve(pki().leaf([NAME])) as hs:
        Exchange(svc, f"{NAME}:{hs.port}").granted()
        hs.on(SUB_PATH, lambda r: Reply(raw=b"H", close=True))
        Exchange(svc, f"{NAME}:{hs.port}").refused("http")
        assert len(hs.asked()) == 2


# ---- truncation ------------------------------------------------------------------------------------------------

BODY = b'{"sub":"@alice:%s"}'


def delimited(kind, server):
    body = BODY % server.encode()
    return {"length": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body,
            "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body),
            "until-close": b"HTTP/1.1 200 OK\r\n\r\n" + body,
            "http-1.0": b"HTTP/1.0 200 OK\r\n\r\n" + body}[kind]


@pytest.mark.parametrize("kind, dirty, good", [
    ("length", False, True), ("length", True, True), ("chunked", False, True), ("chunked", True, True),
    ("until-close", False, True), ("until-close", True, False), ("http-1.0", False, True), ("http-1.0", True, False)])
def test_end_of_a_reply(kind, dirty, good, svc):
    """A body that ends with the connection counts only behind close_notify."""
    with serve(pki().leaf([NAME])) as hs:
        server = f"{NAME}:{hs.port}"
        hs.on(SUB_PATH, lambda r: Reply(raw=delimited(kind, server), close=True, dirty=dirty))
        e = Exchange(svc, server)
        e.granted() if good else e.refused("http")


@pytest.mark.parametrize("kind", ["length", "chunked", "until-close"])
@pytest.mark.parametrize("dirty", [False, True], ids=["notify", "dirty"])
def test_reply_cut_at_every_byte(kind, dirty, dns):
    """No beginning of a reply is a reply, with or without close_notify."""
    with serve(pki().leaf([NAME])) as hs, lkjwt(dns, LIVEKIT_LOG_LEVEL="warn") as svc:
        server = f"{NAME}:{hs.port}"
        wire = delimited(kind, server)
        end = len(wire)
        for cut in range(end):
            hs.on(SUB_PATH, lambda r: Reply(raw=wire[:cut], close=True, dirty=dirty))
            e = Exchange(svc, server)
            assert e.reply.status == 401, f"granted after {cut} of {end} bytes: {wire[:cut]!r}"
            e.refused()
        hs.on(SUB_PATH, lambda r: Reply(raw=wire, close=True))
        Exchange(svc, server).granted()


# ---- peers that do not do TLS, or do it oddly ---------------------------------------------------------------------

def alert(code, level=2):
    return b"\x15\x03\x03\x00\x02" + bytes([level, code])


def hello_then(data):
    def talk(conn, number):
        conn.recv(4096)
        conn.sendall(data)
        conn.settimeout(0.2)
        with contextlib.suppress(OSError):
            conn.recv(4096)
    return talk


NOT_TLS = {
    "plain-http": hello_then(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
    "closes-at-once": lambda conn, n: None,
    "closes-after-hello": lambda conn, n: conn.recv(4096),
    "garbage": hello_then(b"\0" * 1000),
    "ones": hello_then(b"\xff" * 1000),
    "handshake-failure": hello_then(alert(40)),
    "protocol-version": hello_then(alert(70)),
    "internal-error": hello_then(alert(80)),
    "unrecognized-name": hello_then(alert(112)),
    "unknown-alert": hello_then(alert(255)),
    "warnings-without-end": hello_then(alert(112, 1) * 10000),
    "empty-records": hello_then(b"\x16\x03\x03\x00\x00" * 1000),
    "record-too-long": hello_then(b"\x16\x03\x03\xff\xff" + b"x" * 65535),
    "record-cut": hello_then(b"\x16\x03\x03\x01\x00\x02"),
    "hello-of-16-mb": hello_then(b"\x16\x03\x03\x40\x00\x02\xff\xff\xff" + b"\0" * 16380 + b"\x16\x03\x03\x40\x00" * 3),
    "certificate-of-16-mb": hello_then(b"\x16\x03\x03\x00\x04\x0b\xff\xff\xff"),
    "ssl-3": hello_then(b"\x16\x03\x00\x00\x2a\x02\x00\x00\x26\x03\x00" + b"x" * 36),
    "version-9": hello_then(b"\x16\x03\x09\x00\x2a\x02\x00\x00\x26\x03\x09" + b"x" * 36),
    "application-data": hello_then(b"\x17\x03\x03\x00\x10" + b"x" * 16),
    "client-hello-back": lambda conn, n: conn.sendall(conn.recv(4096)),
}


@pytest.mark.parametrize("talk", NOT_TLS.values(), ids=NOT_TLS)
def test_peers_that_are_not_tls_servers(talk, svc, request):
    with RawServer(talk, HOST) as raw, serve(pki().leaf([NAME])) as hs:
        line = Exchange(svc, f"{NAME}:{raw.port}").refused("tls")
        wanted = {"protocol-version": "TLS_VERSION", "handshake-failure": "TLS_REFUSED"}
        case = request.node.callspec.id
        if case in wanted:
            assert line["event"] == wanted[case]
        assert raw.connections <= 2
        Exchange(svc, f"{NAME}:{hs.port}").granted()


def test_silent_peer_is_given_up(dns):
    stop = threading.Event()
    with RawServer(lambda conn, n: stop.wait(60), HOST) as raw, lkjwt(dns, LKJWT_LOOKUP_TIMEOUT_S="1") as svc:
        e = Exchange(svc, f"{NAME}:{raw.port}")
        stop.set()
        e.refused("tls", event={"TLS_TIMEOUT", "HS_TIMEOUT"})


def relay(target, step):
    """Forwards both ways, the server's bytes in pieces of that size, each in a segment of its own."""
    def talk(conn, number):
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with socket.create_connection(target) as up:
            def back():
                with contextlib.suppress(OSError):
                    while data := up.recv(65536):
                        for i in range(0, len(data), step):
                            conn.sendall(data[i:i + step])
                    conn.shutdown(socket.SHUT_WR)
            t = threading.Thread(target=back, daemon=True)
            t.start()
            while data := conn.recv(65536):
                up.sendall(data)
            up.shutdown(socket.SHUT_WR)
            t.join(10)
    return talk


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_tls_in_small_pieces(step, svc):
    with serve(pki().leaf([NAME])) as hs, RawServer(relay((HOST, hs.port), step), HOST) as raw:
        for _ in range(3):
            Exchange(svc, f"{NAME}:{raw.port}").granted()


def test_relay_that_flips_a_bit(svc):
    """A byte changed on the way, wherever it is, never becomes an accepted reply."""
    flips = 0
    with serve(pki().leaf([NAME])) as hs:
        for at in list(range(0, 120, 7)) + list(range(150, 2000, 97)):
            flipped = []

            def talk(conn, number):
                with socket.create_connection((HOST, hs.port)) as up:
                    def back():
                        n = 0
                        with contextlib.suppress(OSError):
                            while data := bytearray(up.recv(65536)):
                                if n <= at < n + len(data):
                                    data[at - n] ^= 0x10
                                    flipped.append(at)
                                n += len(data)
                                conn.sendall(data)
                            conn.shutdown(socket.SHUT_RDWR)
                    t = threading.Thread(target=back, daemon=True)
                    t.start()
                    with contextlib.suppress(OSError):
                        while data := conn.recv(65536):
                            up.sendall(data)
                        up.shutdown(socket.SHUT_RDWR)
                    t.join(10)
            with RawServer(talk, HOST) as raw:
                e = Exchange(svc, f"{NAME}:{raw.port}")
                e.refused() if flipped else e.granted()
            flips += bool(flipped)
    assert flips > 20
