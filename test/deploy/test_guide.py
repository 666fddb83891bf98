"""docs/deploy.md, the guide: every line of `lkjwt --check` that it quotes is
one that the binary prints in a situation made here, every failure made here
is in it, and the files it speaks of exist."""
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from synapse.config.homeserver import HomeServerConfig
from synapse.util.duration import Duration

import symptoms
from service import BIN as LKJWT, Service, base_env
from tools import BIN, CHART, DEPLOY, ROOT, documents, run, validate

GUIDE = Path(os.environ.get("LKJWT_GUIDE", ROOT / "docs/deploy.md"))
LINE = re.compile(r"^(?: +|\| (`+))((?:ok|no) {4}[a-z-]+ +\S.*?)(?(1)\1 \|.*)$", re.M)


def quotes(guide):
    return {m[2] for m in LINE.finditer(guide)}


def block(guide, heading, first):
    """The YAML under that heading that begins with that word."""
    part = guide.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"^    {first}(?:.*\n)(?:    .*\n)*", part, re.M)
    return yaml.safe_load(re.sub(r"^    ", "", found[0], flags=re.M))


@pytest.fixture(scope="module")
def said():
    """{case: (exit code, lines)}, by the real binary."""
    with symptoms.world() as world:
        return {name: symptoms.check(world, *case) for name, case in symptoms.CASES.items()}


@pytest.fixture(scope="module")
def guide():
    return GUIDE.read_text()


def test_codes(said):
    good = {"all is well", "restricted"}
    assert {name for name, (code, _) in said.items() if code == 0} == good
    assert {lines[-1] for name, (_, lines) in said.items() if name not in good} == {"there are faults"}


def test_quotes_are_real(said, guide):
    real = {line for _, lines in said.values() for line in lines}
    quoted = quotes(guide)
    assert quoted and quoted <= real, quoted - real


def test_every_failure_is_explained(said, guide):
    quoted = quotes(guide)
    for name, (code, lines) in said.items():
        failed = [line for line in lines if line.startswith("no ") and line.split()[1] not in ("well-known", "srv")]
        assert bool(failed) == (code == 1), name
        assert set(failed) <= quoted, (name, failed)
    assert set(said["all is well"][1]) <= {*quoted, "all is well"}


def test_symptoms_are_there(guide):
    for word in ("MISSING_MATRIX_RTC_FOCUS", "OPEN_ID_ERROR", "401", "404", "Unable to create room on SFU", "unmute",
                 "rc_delayed_event_mgmt", "PREFIX_HINT", "NO_WEBHOOK"):
        assert word in guide, word


def test_prefix_hint():
    """What the guide says of a proxy that leaves the prefix in."""
    with Service(base_env()) as s:
        assert s.post("/livekit/jwt/get_token", {}).status == 404
        assert s.wait_event("PREFIX_HINT")["path"] == "/livekit/jwt/get_token"
    with Service(base_env(LKJWT_PATH_PREFIX="/livekit/jwt")) as s:
        assert s.post("/livekit/jwt/get_token", {}).errcode == "M_BAD_JSON"


def test_files_exist(guide):
    """Paths and variables in the guide are the repository's and README's."""
    named = set(re.findall(r"\bdeploy/[A-Za-z0-9_./-]*[A-Za-z0-9]", guide))
    named.remove("deploy/lkjwt")    # the Deployment
    assert len(named) > 8 and not [p for p in named if not (ROOT / p).exists()], named
    readme = (ROOT / "README.md").read_text()
    used = set(re.findall(r"\b(?:LIVEKIT|LKJWT)_[A-Z_]+[A-Z]\b", guide))
    assert used and not [v for v in used if f"`{v}`" not in readme], used
    for path in DEPLOY.glob("[!.]*"):
        assert f"deploy/{path.name}" in guide, path


def test_helm_values_exist(guide):
    """Each --set of the guide is a value of the chart."""

    values = yaml.safe_load((DEPLOY / "helm/values.yaml").read_text())
    named = re.findall(r"--set(?:-file)? ([A-Za-z.]+)=", guide)
    assert named
    for name in named:
        at = values
        for part in name.split("."):
            assert part in at, name
            at = at[part]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_synapse_knows_the_settings(guide):
    """Real Synapse reads them as what they are meant for: it says nothing of a name that it does not know."""
    more = {**block(guide, "Synapse", "public_baseurl"), **block(guide, "Synapse", "listeners")}
    config = HomeServerConfig()
    # The paths are not opened here.
    config.parse_config_dict({"server_name": "example.org", "signing_key": "ed25519 a_x " + "A" * 43,
                              "tls_certificate_path": "/x", "tls_private_key_path": "/x",
                              "trusted_key_servers": [], **more}, "", "")
    assert (config.ratelimiting.rc_delayed_event_mgmt.per_second,
            config.ratelimiting.rc_delayed_event_mgmt.burst_count) == (20, 100)
    assert config.server.max_event_delay_duration == Duration(hours=24)
    assert [config.experimental.msc4143_enabled, config.experimental.msc4222_enabled,
            config.experimental.msc4354_enabled] == [True] * 3
    url = "https://matrix-rtc.example.org/livekit/jwt"
    assert config.matrix_rtc.transports == [{"type": "livekit", "livekit_service_url": url}]
    assert config.server.extra_well_known_client_content == json.loads(
        (DEPLOY / "well-known/matrix/client").read_text(), object_pairs_hook=lambda p: {
            k: v for k, v in p if k != "m.homeserver"})
    assert config.server.listeners[0].http_options.resources[0].names == ["openid"]


def test_livekit_settings(guide):
    """The guide's are those of the file that test_compose.py runs, but for addresses."""
    ours, run = block(guide, "LiveKit", "key_file"), yaml.safe_load((DEPLOY / "compose/livekit.yaml").read_text())
    assert ours["room"] == run["room"] and ours["webhook"]["api_key"] == run["webhook"]["api_key"]
    assert [set(ours), set(ours["webhook"])] == [{"key_file", "room", "webhook"}, set(run["webhook"])]


def commands(guide, heading, first):
    """The shell text under that heading that begins with that word."""
    part = guide.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"^    {re.escape(first)}(?:.*\n)(?:    .*\n)*", part, re.M)
    return re.sub(r"^    ", "", found[0], flags=re.M)


def test_helm_command(guide, tmp_path):
    """The one that installs, made to print instead."""
    text = commands(guide, "Kubernetes", "printf")
    assert "helm install lkjwt deploy/helm" in text
    text = text.replace("helm install lkjwt deploy/helm", f"{BIN}/helm template lkjwt {CHART} --kube-version 1.37")
    docs = documents(run("sh", "-ec", text, cwd=tmp_path)[0])
    assert {"Secret", "Deployment", "Ingress", "NetworkPolicy"} <= {d["kind"] for d in docs}
    assert validate(docs, "1.37") == (0, "")


def test_systemd_commands(guide, tmp_path):
    """The installation into another root, and the check with what it put there."""
    def here(text):
        assert "/usr/local/bin/lkjwt" in text and "/etc/lkjwt/" in text
        for top in ("/usr/local/bin", "/etc"):
            text = re.sub(rf"(?<![\w.]){top}/", f"{tmp_path}{top}/", text)
        return text
    for folder in ("usr/local/bin", "etc/systemd/system"):
        (tmp_path / folder).mkdir(parents=True)
    text = commands(guide, "systemd", "install").replace("install -m 755 lkjwt ", f"install -m 755 {LKJWT} ")
    run("sh", "-ec", here(text).replace("systemctl ", "true "), cwd=ROOT)
    keys = tmp_path / "etc/lkjwt/keys"
    assert keys.stat().st_mode & 0o777 == 0o600 and re.fullmatch(r"lkjwt: [0-9a-f]{64}\n", keys.read_text())
    out, _ = run("sh", "-ec", here(commands(guide, "systemd", "(set -a")), code=1)     # no SFU, no network here
    assert re.search(r"^ok +config +complete$", out, re.M) and re.search(r"^no +sfu ", out, re.M), out
