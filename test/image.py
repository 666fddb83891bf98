"""Builds the image of each architecture with buildah, without a daemon, and
tries it.

Leaves in build/image:
  lkjwt-amd64.tar, lkjwt-arm64.tar, lkjwt-armv7.tar   docker load, podman load
  all/   the manifest list and all it names, as skopeo or buildah push it
The tests read these, not buildah's store: the configuration, the one layer,
and the service started from the unpacked layer.
"""

import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tarfile

import scratch

sys.path.insert(0, str(pathlib.Path(__file__).with_name("release")))
from arches import SHIPPED, TOP, binary, emulator  # noqa: E402

BUILD = TOP / "build" / "image"
NAMES = {"lk-jwt-service", "lk-jwt-service-healthcheck"}
LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
IMAGE = "application/vnd.docker.distribution.manifest.v2+json"


def short(arch):
    return arch.platform.removeprefix("linux/").replace("arm/", "arm")


def buildah(*words):
    return subprocess.run(
        ["buildah", "--storage-driver", "vfs", "--root", BUILD / "store",
         "--runroot", BUILD / "run", *words], check=True, text=True,
        stdout=subprocess.PIPE).stdout


def build():
    shutil.rmtree(BUILD, ignore_errors=True)
    version = subprocess.run([TOP / "lkjwt", "--version"], check=True,
                             text=True, stdout=subprocess.PIPE).stdout.split()
    for arch in SHIPPED:
        name = short(arch)
        root = BUILD / name / "root"
        root.mkdir(parents=True)
        shutil.copy(binary(arch), root / "lk-jwt-service")
        (root / "lk-jwt-service").chmod(0o755)
        (root / "lk-jwt-service-healthcheck").symlink_to("lk-jwt-service")
        # chroot isolation asks for no privilege that a build machine lacks,
        # and nothing is run; a fixed time makes the layer reproducible.
        buildah("build", "--isolation", "chroot", "--format", "docker",
                "--layers=false", "--timestamp", "0",
                "--identity-label=false", "--quiet",
                "--platform", arch.platform, "--label",
                f"org.opencontainers.image.version={version[1]}",
                "--file", TOP / "Dockerfile.scratch",
                "--manifest", "lkjwt:latest", "--tag", f"lkjwt:{name}",
                BUILD / name)
        buildah("push", "--quiet", f"lkjwt:{name}",
                f"docker-archive:{BUILD}/lkjwt-{name}.tar:lkjwt:latest")
    # OCI's own format has no HEALTHCHECK, so neither archive is of it.
    buildah("manifest", "push", "--all", "--format", "v2s2", "--quiet",
            "lkjwt:latest", f"dir:{BUILD}/all")
    shutil.rmtree(BUILD / "store", ignore_errors=True)
    shutil.rmtree(BUILD / "run", ignore_errors=True)
    return version[1]


def config_checks(config, version):
    wanted = {
        "Cmd": ["/lk-jwt-service"],
        "User": "1000:1000",
        "ExposedPorts": {"8080/tcp": {}},
        "Healthcheck": {
            "Test": ["CMD", "/lk-jwt-service-healthcheck"],
            "Interval": 30 * 10 ** 9, "Timeout": 3 * 10 ** 9, "Retries": 3},
        "StopSignal": "SIGTERM",
    }
    for key, value in wanted.items():
        yield (f"{key} is {json.dumps(value)}",
               "" if config.get(key) == value else str(config.get(key)))
    yield "there is no entrypoint", str(config.get("Entrypoint") or "")
    yield "there is no volume", str(config.get("Volumes") or "")
    labels = config.get("Labels") or {}
    told = {"title": "lkjwt", "licenses": "MIT", "version": version}
    wrong = [key for key, value in told.items()
             if labels.get(f"org.opencontainers.image.{key}") != value]
    yield ("labels name title, licence and version",
           f"{wrong} of {labels}" if wrong else "")


def archive_checks(arch, version, ids):
    """The archive of one architecture, and the service from its layer."""
    name = short(arch)
    with tarfile.open(BUILD / f"lkjwt-{name}.tar") as outer:
        manifest = json.load(outer.extractfile("manifest.json"))[0]
        raw = outer.extractfile(manifest["Config"]).read()
        image = json.loads(raw)
        ids[arch.platform] = hashlib.sha256(raw).hexdigest()
        config, layers = image["config"], manifest["Layers"]
        found = "/".join(filter(None, (image["os"], image["architecture"],
                                       image.get("variant"))))
        yield f"it is for {arch.platform}", (
            "" if found == arch.platform else found)
        yield from config_checks(config, version)
        yield "one layer", "" if len(layers) == 1 else str(layers)
        root = BUILD / "unpacked" / name
        root.mkdir(parents=True)
        with tarfile.open(fileobj=outer.extractfile(layers[0])) as layer:
            members = {m.name.strip("/"): m for m in layer if m.name != "./"}
            layer.extractall(root)
    yield ("it holds the two names and no other file",
           "" if set(members) == NAMES else str(sorted(members)))
    link = members["lk-jwt-service-healthcheck"]
    yield ("the health check is a relative link to the service",
           "" if link.issym() and link.linkname == "lk-jwt-service"
           else f"{link.type} {link.linkname}")
    served = members["lk-jwt-service"]
    yield ("the binary belongs to root and only root may write it",
           "" if (served.uid, served.gid, served.mode & 0o7777) ==
           (0, 0, 0o755) else f"{served.uid}:{served.gid} {served.mode:o}")
    yield ("the binary is the one that make left",
           "" if binary(arch).read_bytes() ==
           (root / "lk-jwt-service").read_bytes() else "another")
    before = []
    if arch.target:  # beside it, for this machine, what runs it
        shutil.copy(emulator(arch)[0], root / "emulator")
        before = ["/emulator"]
    for uid in (1000, random.randrange(2000, 1 << 31)):
        yield from scratch.checks(root, before + config["Cmd"],
                                  before + config["Healthcheck"]["Test"][1:],
                                  uid)


def list_checks(ids):
    """The folder that is pushed: one list, three images of Docker's format."""
    folder = BUILD / "all"
    top = json.loads((folder / "manifest.json").read_text())
    yield ("the list is a manifest list of Docker's format",
           "" if top.get("mediaType") == LIST else str(top.get("mediaType")))
    found = {}
    for entry in top["manifests"]:
        where = entry["platform"]
        name = "/".join(filter(None, (where["os"], where["architecture"],
                                      where.get("variant"))))
        digest = entry["digest"].removeprefix("sha256:")
        text = (folder / f"{digest}.manifest.json").read_bytes()
        if hashlib.sha256(text).hexdigest() != digest:
            yield f"{name}: its manifest has the digest of the list", digest
        manifest = json.loads(text)
        if manifest["mediaType"] != IMAGE:
            yield (f"{name}: its manifest is of Docker's format",
                   manifest["mediaType"])
        found[name] = manifest["config"]["digest"].removeprefix("sha256:")
    yield ("the list names each architecture, with the archive's image",
           "" if found == ids and len(top["manifests"]) == len(ids)
           else f"{found}, archives {ids}")


def rows(version):
    ids = {}
    for arch in SHIPPED:
        for text, problem in archive_checks(arch, version, ids):
            yield f"image {short(arch)}: {text}", problem
    for text, problem in list_checks(ids):
        yield f"image: {text}", problem


def main():
    os.umask(0o022)
    passed = failed = 0
    for text, problem in rows(build()):
        print(f"FAIL {text}: {problem}" if problem else f"ok   {text}",
              flush=True)
        passed += not problem
        failed += bool(problem)
    for path in sorted(BUILD.glob("*.tar")):
        print(f"{path.stat().st_size:9} {path.relative_to(TOP)}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
