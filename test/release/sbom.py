"""The software bill of materials: CycloneDX 1.6, as JSON.

The release is the subject, its files are its parts, and each file names what
is linked into it. Equal inputs give equal bytes: the serial number comes from
the files' hashes, the time from SOURCE_DATE_EPOCH or the last commit.
"""

import datetime
import os
import re
import subprocess
import uuid

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from arches import RELEASE, TOP, zig

LICENCE = LicenseFactory()
SPACE = uuid.UUID("3c3f5c1e-7b0c-4f0e-9a54-6f0f6a1d2b77")


def commit_time():
    """Of SOURCE_DATE_EPOCH or the last commit; else 1970."""
    said = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not said.isdigit():
        said = subprocess.run(
            ["git", "-C", str(TOP), "log", "-1", "--format=%ct"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            check=False).stdout.strip()
    return datetime.datetime.fromtimestamp(int(said or 0),
                                           datetime.timezone.utc)


def debian(package):
    """The version of an installed package; "" elsewhere than on Debian."""
    try:
        return subprocess.run(["dpkg-query", "-W", "-f", "${Version}",
                               package], text=True, check=True,
                              capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def sha256(text):
    return [HashType(alg=HashAlgorithm.SHA_256, content=text)]


def part(name, version, licence, about, kind=ComponentType.LIBRARY,
         purl=None, digest=None):
    return Component(
        name=name, version=version or None, type=kind, description=about,
        bom_ref=f"{name}@{version}", purl=purl,
        hashes=sha256(digest) if digest else (),
        licenses=[LICENCE.make_from_string(licence)])


def deb(package, version):
    return PackageURL("deb", "debian", package, version,
                      {"arch": "source"}) if version else None


def parts(version):
    """(what all hold, what musl-gcc adds, what zig adds)."""
    makefile = (TOP / "Makefile").read_text()
    tarball = re.search(r"^TARBALL_SHA = (\w+)", makefile, re.M)[1]
    zig_version = re.search(
        r"^Version: (\S+)", next(RELEASE.glob(
            "lib/python3*/site-packages/ziglang-*.dist-info/METADATA"))
        .read_text(), re.M)[1]
    header = zig().parent / "lib/libc/musl/src/internal/version.h"
    zig_musl = re.search(r'VERSION "([^"]+)"', header.read_text())[1]
    anchors, musl, gcc = map(debian, ("ca-certificates", "musl-dev",
                                      "libgcc-12-dev"))
    common = [
        part("lkjwt", version, "MIT", "lkjwt.c"),
        part("bearssl", "0.6", "MIT", "TLS, X.509 and hashes; the SHA-256 is"
             " that of Debian's upstream tarball",
             purl=deb("bearssl", "0.6+dfsg.1"), digest=tarball),
        part("mozilla-trust-anchors", anchors, "MPL-2.0",
             "names and keys of the certificates in ca-certificates",
             ComponentType.DATA, deb("ca-certificates", anchors)),
    ]
    return common, [
        part("musl", musl, "MIT", "C library", purl=deb("musl", musl)),
        part("libgcc", gcc, "GPL-3.0-or-later WITH GCC-exception-3.1",
             "arithmetic that the processor lacks",
             purl=deb("gcc-12", gcc)),
    ], [
        part("musl", zig_musl, "MIT", "C library, as Zig carries it"),
        part("zig", zig_version, "MIT", "compiler's support code, and what "
             "Zig puts in the place of musl's own",
             purl=PackageURL("pypi", None, "ziglang", zig_version)),
    ]


def write(path, version, files):
    """files: {arch: (file name, SHA-256)}."""
    common, native, cross = parts(version)
    subject = part("lkjwt-release", version, "MIT", "MatrixRTC authorization "
                   "service for LiveKit", ComponentType.APPLICATION)
    bom = Bom(metadata=BomMetaData(component=subject,
                                   timestamp=commit_time()),
              serial_number=uuid.uuid5(SPACE, " ".join(
                  digest for _, digest in files.values())))
    binaries = []
    for arch, (name, digest) in files.items():
        binary = Component(
            name=name, version=version, type=ComponentType.FILE,
            bom_ref=name, hashes=sha256(digest),
            licenses=[LICENCE.make_from_string("MIT")],
            properties=[Property(name="lkjwt:architecture",
                                 value=arch.name)])
        binaries.append(binary)
        bom.components.add(binary)
        inside = common + (cross if arch.target else native)
        for component in inside:
            bom.components.add(component)
        bom.register_dependency(binary, inside)
    bom.register_dependency(subject, binaries)
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem:
        raise ValueError(f"SBOM: {problem}")
    path.write_text(text + "\n")
