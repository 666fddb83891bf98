"""The compose file, the systemd unit and .well-known, read by their readers."""
import errno
import json
import os
import re
import resource

import pytest
import yaml

import test_jail as jail
from service import BIN as LKJWT, run_cli
from tools import DEPLOY, run, tool

UNIT = DEPLOY / "systemd/lkjwt.service"


def environment(path):
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if line and not line.startswith("#"))


# ---- compose

@pytest.fixture(scope="module")
def services():
    """compose.yaml as the reference implementation understands it."""
    found = yaml.safe_load(tool("compose", "compose.yaml", cwd=DEPLOY)[0])
    assert found["secrets"]["keys"]["file"] == str(DEPLOY / "compose/keys")
    for service in found["services"].values():      # what it names is declared
        assert set(service["networks"]) <= set(found["networks"])
        assert {s["source"] for s in service.get("secrets", [])} <= set(found["secrets"])
        assert {v["source"] for v in service.get("volumes", []) if v["type"] == "volume"} <= set(found["volumes"])
    return found["services"]


def test_compose_is_refused_when_wrong(tmp_path):
    for old, new in (("read_only: true", "read_onyl: true"), ("cap_drop: [ALL]", "cap_drop: ALL")):
        text = (DEPLOY / "compose.yaml").read_text()
        assert old in text
        (tmp_path / "compose.yaml").write_text(text.replace(old, new))
        tool("compose", tmp_path / "compose.yaml", code=1)


def test_compose_service_is_boxed(services):
    box = services["lkjwt"]
    assert (box["user"], box["read_only"], box["cap_drop"], box["security_opt"]) == (
        "1000:1000", True, ["ALL"], ["no-new-privileges:true"])
    assert "ports" not in box and "volumes" not in box and "command" not in box
    assert not [v for v in box["environment"] if re.search("SECRET|PASSWORD|KEY$", v)]
    assert int(box["stop_grace_period"].rstrip("s")) > 7
    # Only the proxy and the SFU's media are open to the outside.
    assert {(name, p["target"]) for name, s in services.items() for p in s.get("ports", [])} == {
        ("caddy", 80), ("caddy", 443), ("livekit", 7881), ("livekit", 7882)}


def test_compose_names_lead_somewhere(services):
    """Each name:port in the environment and the SFU's configuration is a service, on a network of both."""
    sfu = yaml.safe_load((DEPLOY / "compose/livekit.yaml").read_text())
    texts = {"livekit": sfu["webhook"]["urls"]}
    texts |= {name: s.get("environment", {}).values() for name, s in services.items() if name != "livekit"}
    found = {(who, *m) for who, values in texts.items() for v in values
             for m in re.findall(r"(?:^|//)(lkjwt|livekit|redis|caddy):(\d+)", v)}
    assert found == {("livekit", "lkjwt", "8080"), ("lkjwt", "livekit", "7880"), ("lkjwt", "redis", "6379"),
                     ("caddy", "lkjwt", "8080"), ("caddy", "livekit", "7880")}
    for who, whom, _ in found:
        assert set(services[who]["networks"]) & set(services[whom]["networks"])
    # The same key on both sides; who tells of leaves signs with it.
    key, = yaml.safe_load((DEPLOY / "compose/keys.example").read_text())
    assert sfu["webhook"]["api_key"] == key and sfu["key_file"] == "/run/secrets/keys"
    assert services["lkjwt"]["environment"]["LIVEKIT_KEY_FILE"] == sfu["key_file"]


# ---- systemd

def test_unit(tmp_path, capsys):
    """systemd has nothing to say against it; its exposure is printed."""
    unit = tmp_path / "lkjwt.service"
    text = UNIT.read_text()
    assert text.count("/usr/local/bin/lkjwt\n") == 2
    unit.write_text(text.replace("ExecStart=/usr/local/bin/lkjwt", f"ExecStart={LKJWT}"))
    out, err = run("systemd-analyze", "verify", "--man=no", unit)
    assert out + err == ""
    out, _ = run("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=15", unit)
    line = out.strip().splitlines()[-1]
    with capsys.disabled():
        print(f"\n{line}")
    assert float(re.search(r"level for \S+: ([\d.]+)", line)[1]) <= 1.2


def expand(name, sets):
    """The calls of a name as SystemCallFilter= has them."""
    return set().union(*(expand(n, sets) for n in sets[name])) if name in sets else {name}


def test_unit_leaves_every_layer(rig):
    """Under the unit's system call filter, address families and no executable memory, as that user: it serves, and
    its own sandbox misses nothing."""
    sets, group = {}, None
    for line in run("systemd-analyze", "--no-pager", "syscall-filter")[0].splitlines():
        if line.startswith("@"):
            group = sets.setdefault(line.strip(), [])
        elif line[:4] == "    " and not line.strip().startswith("#"):
            group.append(line.strip())
    text, allowed = UNIT.read_text(), expand("@default", sets)
    for line in re.findall(r"^SystemCallFilter=(.+)$", text, re.M):
        names = set().union(*(expand(n, sets) for n in line.lstrip("~").split()))
        allowed = allowed - names | expand("@default", sets) if line[0] == "~" else allowed | names
    assert "SystemCallErrorNumber=EPERM\n" in text and "MemoryDenyWriteExecute=yes\n" in text
    assert "RestrictAddressFamilies=AF_INET AF_INET6\n" in text
    assert len(allowed) > 200 and not allowed & {"mount", "ptrace", "setuid", "bpf", "reboot"}
    outer = jail.Outer(*jail.FAMILIES, *jail.NO_EXEC, allow=sorted(allowed), default=jail.ERRNO | errno.EPERM)

    def start():
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        os.setgroups([])
        os.setgid(4243)
        os.setuid(4242)
        jail.libc.prctl(jail.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        outer.install()
    with jail.jailed(rig, start) as s:
        jail.check_layers(s)
        jail.use(s, rig)
        assert s.stop() == 0
    assert s.events("LIMITS")[0]["LKJWT_MAX_CONNS"] == "1024"


def test_unit_settings(tmp_path):
    """The credential is where the variable looks; the example environment is one that lkjwt takes."""
    text = UNIT.read_text()
    for name, var in (("keys", "LIVEKIT_KEY_FILE"), ("redis-password", "LKJWT_REDIS_PASSWORD_FROM_FILE")):
        assert f"LoadCredential={name}:/etc/lkjwt/{name}\n" in text and f"Environment={var}=%d/{name}\n" in text
    env = environment(DEPLOY / "systemd/lkjwt.env")
    assert re.search("EnvironmentFile=/etc/lkjwt/lkjwt.env\n", text)
    (tmp_path / "keys").write_text((DEPLOY / "compose/keys.example").read_text())
    done = run_cli(["--print-config"], {**env, "LIVEKIT_KEY_FILE": str(tmp_path / "keys")})
    assert done.code == 0, done
    assert [line for line in done.err.splitlines() if "level=warning" in line and "LIVEKIT_REDIS_URL" not in line] == []


# ---- what clients read

def test_well_known():
    """The focus is where the proxies put it, without a slash at the end."""
    found = json.loads((DEPLOY / "well-known/matrix/client").read_text())
    assert found["m.homeserver"]["base_url"].startswith("https://")
    assert found["org.matrix.msc4143.rtc_foci"] == [
        {"type": "livekit", "livekit_service_url": "https://matrix-rtc.example.org/livekit/jwt"}]


def test_files_agree():
    """One address for the SFU, one for the service, one port for metrics, in every file."""
    for path in ("compose.yaml", "systemd/lkjwt.env", "kubernetes/lkjwt.env", "kubernetes-example/kustomization.yaml"):
        text = (DEPLOY / path).read_text()
        assert "wss://matrix-rtc.example.org/livekit/sfu" in text, path
        if "example/" not in path:
            assert re.search(r"LKJWT_METRICS_BIND\W+\S*:8081", text), path
    for path in (DEPLOY / "proxies").iterdir():
        assert "/livekit/jwt" in path.read_text() and "/livekit/sfu" in path.read_text(), path
