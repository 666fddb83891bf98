"""Builds the image with buildah, without a daemon, and tries it.

Leaves build/image/lkjwt.tar (docker load, podman load). The tests read that
archive, not buildah's store: its configuration, its one layer, and the
service started from the unpacked layer.
"""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import scratch

TOP = pathlib.Path(__file__).resolve().parent.parent
BUILD = TOP / "build" / "image"
NAMES = {"lk-jwt-service", "lk-jwt-service-healthcheck"}


def build():
    shutil.rmtree(BUILD, ignore_errors=True)
    root = BUILD / "root"
    root.mkdir(parents=True)
    shutil.copy(TOP / "lkjwt", root / "lk-jwt-service")
    (root / "lk-jwt-service").chmod(0o755)
    (root / "lk-jwt-service-healthcheck").symlink_to("lk-jwt-service")
    store = ["buildah", "--storage-driver", "vfs", "--root",
             str(BUILD / "store"), "--runroot", str(BUILD / "run")]
    archive = BUILD / "lkjwt.tar"
    # chroot isolation asks for no privilege that a build machine lacks, and
    # nothing is run; a fixed time makes the layer reproducible.
    for command in (
            ["build", "--isolation", "chroot", "--format", "docker",
             "--layers=false", "--timestamp", "0", "--identity-label=false",
             "--quiet", "--file", str(TOP / "Dockerfile.scratch"),
             "--tag", "lkjwt:latest", str(BUILD)],
            ["push", "--quiet", "lkjwt:latest",
             f"docker-archive:{archive}:lkjwt:latest"]):
        subprocess.run(store + command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(BUILD / "store", ignore_errors=True)
    shutil.rmtree(BUILD / "run", ignore_errors=True)
    return archive


def checks(archive):
    with tarfile.open(archive) as outer:
        manifest = json.load(outer.extractfile("manifest.json"))[0]
        image = json.load(outer.extractfile(manifest["Config"]))
        layers = manifest["Layers"]
        config = image["config"]
        wanted = {
            "Cmd": ["/lk-jwt-service"],
            "User": "1000:1000",
            "ExposedPorts": {"8080/tcp": {}},
            "Healthcheck": {
                "Test": ["CMD", "/lk-jwt-service-healthcheck"],
                "Interval": 30 * 10 ** 9, "Timeout": 3 * 10 ** 9,
                "Retries": 3},
            "StopSignal": "SIGTERM",
        }
        for key, value in wanted.items():
            yield (f"image: {key} is {json.dumps(value)}",
                   "" if config.get(key) == value else str(config.get(key)))
        yield ("image: there is no entrypoint",
               str(config.get("Entrypoint") or ""))
        labels = config.get("Labels") or {}
        yield ("image: labels name title and licence",
               "" if labels.get("org.opencontainers.image.title") == "lkjwt"
               and labels.get("org.opencontainers.image.licenses") == "MIT"
               else str(labels))
        yield ("image: one layer", "" if len(layers) == 1 else str(layers))
        root = BUILD / "unpacked"
        root.mkdir()
        with tarfile.open(fileobj=outer.extractfile(layers[0])) as layer:
            members = {m.name.strip("/"): m for m in layer if m.name != "./"}
            layer.extractall(root)
    yield ("image: it holds the two names and no other file",
           "" if set(members) == NAMES else str(sorted(members)))
    link = members["lk-jwt-service-healthcheck"]
    yield ("image: the health check is a relative link to the service",
           "" if link.issym() and link.linkname == "lk-jwt-service"
           else f"{link.type} {link.linkname}")
    served = members["lk-jwt-service"]
    yield ("image: the binary belongs to root and only root may write it",
           "" if (served.uid, served.gid, served.mode & 0o7777) ==
           (0, 0, 0o755) else f"{served.uid}:{served.gid} {served.mode:o}")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()
               for path in (TOP / "lkjwt", root / "lk-jwt-service")]
    yield ("image: the binary is the one that make left",
           "" if digests[0] == digests[1] else str(digests))
    yield from scratch.checks(root, config["Cmd"],
                              config["Healthcheck"]["Test"][1:])


def main():
    os.umask(0o022)
    passed = failed = 0
    archive = build()
    for text, problem in checks(archive):
        print(f"FAIL {text}: {problem}" if problem else f"ok   {text}",
              flush=True)
        passed += not problem
        failed += bool(problem)
    print(f"image in {archive.relative_to(TOP)}, {archive.stat().st_size} bytes")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
