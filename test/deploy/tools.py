"""The pinned tools of `test/setup.sh deploy`, and the files under deploy/ as
the suites use them: changed by exact replacement only."""
import re
import subprocess
import sys

import yaml

from service import ROOT

DEPLOY = ROOT / "deploy"
BIN = ROOT / ".deps" / "bin"
CHART = DEPLOY / "helm"
KUBE = {part: ROOT / ".deps" / "kube" / version for part, version in re.findall(
    r"^kube_(new|old)=(\S+)", (ROOT / "test/setup.sh").read_text(), re.M)}
# The oldest and the newest, both sides of what changed, and some between.
VERSIONS = ["1.19", "1.20", "1.21", "1.24", "1.25", "1.29", "1.33", "1.37"]


def run(*argv, code=0, **more):
    """(stdout, stderr); AssertionError on another exit code."""
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=120, **more)
    assert code is None or done.returncode == code, f"{argv}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def tool(name, *argv, **more):
    return run(BIN / name, *argv, **more)


def documents(text):
    return [d for d in yaml.safe_load_all(text) if d is not None]


def template(*argv, version="1.37", **more):
    return tool("helm", "template", "lkjwt", CHART, "--namespace", "matrix-rtc",
                "--kube-version", version, *argv, **more)[0]


# One process for all files of a version: starting Python costs more than
# reading schemas.
VALIDATE = """
import sys, yaml
import kubernetes_validate as kv
bad = 0
version = sys.argv[1]
for d in yaml.safe_load_all(sys.stdin):
    try:
        kv.validate(d, version, strict=True)
    except Exception as e:
        bad = 1
        print(version, d["apiVersion"], d["kind"], str(getattr(e, "message", e))[:300])
sys.exit(bad)
"""


def validate(docs, version):
    """Against the strict schemas of that Kubernetes."""
    part = "new" if int(version.split(".")[1]) >= 25 else "old"
    text = yaml.safe_dump_all(list(docs))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", VALIDATE, version], input=text, text=True,
                          capture_output=True, timeout=120, env={"PYTHONPATH": str(KUBE[part])})
    return done.returncode, done.stdout + done.stderr


def snippet(path, *pairs):
    """A file of deploy/ with its examples exchanged for what stands here."""
    text = (DEPLOY / path).read_text()
    for old, new in pairs:
        assert old in text, f"{path} has no {old!r}"
        text = text.replace(old, str(new))
    return text
