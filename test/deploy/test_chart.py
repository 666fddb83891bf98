"""The Helm chart: what it renders for every Kubernetes since 1.19, that the
plain manifests are its, and what a cluster's owner relies on."""
import base64
import json
import re
import shutil

import pytest
import yaml

from service import run_cli
from tools import CHART, DEPLOY, ROOT, VERSIONS, documents, run, template, tool, validate

OWN_KINDS = {"monitoring.coreos.com/v1", "external-secrets.io/v1"}     # their schemas are their operators'
BASE = ["--set", "livekit.url=wss://sfu.example.org", "--set", "homeservers={example.org,example.com}",
        "--set", "redis.url=redis://redis.redis.svc:6379/0"]
KEYS = ["--set", "secret.keys=key: secret"]
INGRESS = ["--set", "ingress.host=rtc.example.org"]
VARIANTS = {
    "least": [*BASE, "--set", "secret.existing=mine"],
    "most": [*BASE, *KEYS, *INGRESS, "--set", "redis.password=true", "--set", "secret.redisPassword=pw",
             "--set", "ingress.pathPrefix=/livekit/jwt", "--set", "ingress.className=nginx",
             "--set", "ingress.tlsSecret=tls", "--set", "namespace.create=true", "--set", "podMonitor.enabled=true",
             "--set", "prometheusRule.enabled=true", "--set", "caConfigMap=ca",
             "--set", "env.LIVEKIT_LOG_LEVEL=debug", "--set", "env.LKJWT_JOBS_MAX=5000",
             "--set", "image.pullSecrets[0].name=pull", "--set", "nodeSelector.disk=ssd",
             "--set", "tolerations[0].operator=Exists", "--set", "podAnnotations.note=here",
             "--set", "service.annotations.note=here", "--set", "ingress.annotations.note=here",
             "--set", "livekit.apiUrl=http://livekit:7880"],
    "one replica without Redis": [*BASE[:4], *KEYS, "--set", "replicas=1"],
    "external secret": [*BASE, "--set", "secret.external.enabled=true", "--set", "secret.external.store.name=vault",
                        "--set", "redis.password=true", "--set", "secret.external.redisPassword=rtc/redis"],
    "application service": [*BASE, *KEYS, "--set", "applicationService.serverName=example.org",
                            "--set", "applicationService.url=http://synapse.matrix.svc:8008",
                            "--set", "applicationService.standalone=false", "--set-json",
                            "secret.registration=" + json.dumps("id: rtc\nas_token: " + 64 * "a" + "\nhs_token: " + 64 * "b" + "\n")],
    "no network policy": [*BASE, *KEYS, "--set", "networkPolicy.enabled=false"],
}


def objects(*argv, **more):
    """{kind: object}; no kind twice."""
    docs = documents(template(*argv, **more))
    assert len({d["kind"] for d in docs}) == len(docs)
    return {d["kind"]: d for d in docs}


@pytest.fixture(scope="module")
def most():
    return objects(*VARIANTS["most"])


def container(found):
    only, = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


# ---- valid everywhere

def test_lint():
    for argv in ([], *VARIANTS.values()):
        out, err = tool("helm", "lint", "--strict", CHART, *argv)
        assert "[WARNING]" not in out + err and "[ERROR]" not in out + err, out + err


@pytest.mark.parametrize("version", VERSIONS)
def test_valid(version):
    """Every variant passes that Kubernetes's own strict schemas."""
    docs = []
    for argv in VARIANTS.values():
        docs += [d for d in documents(template(*argv, version=version))
                 if d["apiVersion"] not in OWN_KINDS and d not in docs]
    kinds = {d["kind"] for d in docs}
    assert kinds == {"Namespace", "Secret", "ConfigMap", "ServiceAccount", "Deployment", "PodDisruptionBudget",
                     "Service", "Ingress", "NetworkPolicy"}
    budget, = {d["apiVersion"] for d in docs if d["kind"] == "PodDisruptionBudget"}
    assert budget == ("policy/v1beta1" if version in ("1.19", "1.20") else "policy/v1")
    assert validate(docs, version) == (0, "")


def test_validator_is_strict():
    """It would notice: a member that does not exist, a kind that is not there yet, a wrong type."""
    budget = {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "x"}}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"ports": [{"port": "no"}]}}
    other = {**service, "spec": {"prots": []}}
    for version, wrong in (("1.20", [budget, service, other]), ("1.37", [service, other])):
        code, said = validate([budget, service, other], version)
        assert code == 1 and len(said.splitlines()) == len(wrong), said


def test_older_kubernetes_is_refused():
    _, err = tool("helm", "template", CHART, "--kube-version", "1.18", *VARIANTS["least"], code=1)
    assert "1.18" in err


FAULTS = {
    "no homeserver": (["--set", "homeservers=null"], "homeservers"),
    "no url": (["--set", "livekit.url="], "livekit.url"),
    "url of another kind": (["--set", "livekit.url=ftp://x"], "url"),
    "no secret": (["--set", "secret.keys="], "secret"),
    "replicas without Redis": (["--set", "redis.url="], "redis.url"),
    "password in the URL": (["--set", "redis.url=redis://:pw@redis:6379"], "redis"),
    "password promised": (["--set", "redis.password=true"], "redisPassword"),
    "store without name": (["--set", "secret.external.enabled=true"], "store"),
    "secret as a variable": (["--set", "env.LIVEKIT_SECRET=x"], "LIVEKIT_SECRET"),
    "token as a variable": (["--set", "env.LIVEKIT_AS_TOKEN=x"], "LIVEKIT_AS_TOKEN"),
    "registration promised": (["--set", "applicationService.serverName=example.org"], "secret.registration"),
    "registration promised by a store": (["--set", "applicationService.serverName=example.org", "--set",
                                          "secret.external.enabled=true", "--set", "secret.external.store.name=vault"],
                                         "secret.external.registration"),
    "prefix with a slash": (["--set", "ingress.pathPrefix=/a/"], "pathPrefix"),
    "misspelt value": (["--set", "replica=2"], "replica"),
}


@pytest.mark.parametrize("argv, word", FAULTS.values(), ids=FAULTS)
def test_fault_is_told(argv, word):
    _, err = tool("helm", "template", CHART, *BASE, *KEYS, *argv, code=1)
    assert word in err, err


# ---- what the objects say

def test_pod(most):
    spec = most["Deployment"]["spec"]
    pod, box = spec["template"]["spec"], container(most)
    assert spec["replicas"] == 2
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert [c["topologyKey"] for c in pod["topologySpreadConstraints"]] == [
        "kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert pod["automountServiceAccountToken"] is False
    assert most["ServiceAccount"]["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
                                      "seccompProfile": {"type": "RuntimeDefault"}}
    assert box["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                      "capabilities": {"drop": ["ALL"]}}
    assert box["resources"] == {"requests": {"cpu": "50m", "memory": "64Mi"},
                                "limits": {"cpu": "100m", "memory": "128Mi"}}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert box[probe]["httpGet"] == {"path": "/healthz", "port": "http"} and box[probe]["timeoutSeconds"] == 1
    # The image's own command and health check; no root, no host.
    assert not {"command", "args", "env"} & set(box)
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


def test_stop_fits_the_grace_period(most):
    """Lame duck and drain end before the kubelet kills, and no liveness probe does in between."""
    for argv, lame, drain in (([], 5, 7), (["--set", "lameDuckSeconds=20", "--set", "drainSeconds=30"], 20, 30)):
        found = objects(*VARIANTS["most"], *argv)
        env = found["ConfigMap"]["data"]
        assert (env["LKJWT_LAME_DUCK_S"], env["LKJWT_DRAIN_S"]) == (str(lame), str(drain))
        assert found["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > lame + drain
    box = container(most)
    assert box["readinessProbe"]["periodSeconds"] * box["readinessProbe"]["failureThreshold"] <= 10
    assert box["livenessProbe"]["periodSeconds"] * box["livenessProbe"]["failureThreshold"] > 5 + 7


def test_secrets_are_files(most):
    """Nothing secret in an environment, a ConfigMap or an argument."""
    assert most["Secret"]["stringData"] == {"keys": "key: secret", "redis-password": "pw"}
    pod, env = most["Deployment"]["spec"]["template"]["spec"], most["ConfigMap"]["data"]
    assert container(most)["envFrom"] == [{"configMapRef": {"name": "lkjwt"}}]
    volume, = [v for v in pod["volumes"] if "secret" in v]
    assert volume["secret"] == {"secretName": most["Secret"]["metadata"]["name"], "defaultMode": 0o440}
    mount, = [m for m in container(most)["volumeMounts"] if m["name"] == volume["name"]]
    assert env["LIVEKIT_KEY_FILE"] == mount["mountPath"] + "/keys" and mount["readOnly"]
    assert env["LKJWT_REDIS_PASSWORD_FROM_FILE"] == mount["mountPath"] + "/redis-password"
    assert not {"LIVEKIT_KEY", "LIVEKIT_SECRET", "LIVEKIT_REDIS_PASSWORD"} & set(env)
    assert "pw" not in env.values() and "secret" not in env.values()


def test_settings_are_text(tmp_path):
    """Numbers and booleans of a values file arrive as they stand there."""
    (tmp_path / "values.yaml").write_text("env: {LKJWT_MAX_BODY: 12345678, LKJWT_CA_ONLY: true, LKJWT_STRICT: 'yes'}")
    env = objects(*VARIANTS["least"], "--values", tmp_path / "values.yaml")["ConfigMap"]["data"]
    assert {k: env[k] for k in ("LKJWT_MAX_BODY", "LKJWT_CA_ONLY", "LKJWT_STRICT")} == {
        "LKJWT_MAX_BODY": "12345678", "LKJWT_CA_ONLY": "true", "LKJWT_STRICT": "yes"}


def test_external_secret():
    """What the External Secrets Operator is to make has the names that the pod mounts."""
    found = objects(*VARIANTS["external secret"])
    assert "Secret" not in found
    made = found["ExternalSecret"]
    assert made["spec"] == {
        "refreshInterval": "1h", "secretStoreRef": {"kind": "ClusterSecretStore", "name": "vault"},
        "target": {"name": "lkjwt-keys", "creationPolicy": "Owner"},
        "data": [{"secretKey": "keys", "remoteRef": {"key": "matrix-rtc/livekit-keys"}},
                 {"secretKey": "redis-password", "remoteRef": {"key": "rtc/redis"}}]}
    volume, = found["Deployment"]["spec"]["template"]["spec"]["volumes"]
    assert volume["secret"]["secretName"] == "lkjwt-keys"


def test_ingress_and_service(most):
    """The four paths, under the prefix that lkjwt is told; never the webhook or the metrics."""
    rule, = most["Ingress"]["spec"]["rules"]
    assert [p["path"] for p in rule["http"]["paths"]] == [
        "/livekit/jwt" + p for p in ("/sfu/get", "/get_token", "/delegate_delayed_leave", "/healthz")]
    assert {p["pathType"] for p in rule["http"]["paths"]} == {"Exact"}
    assert most["ConfigMap"]["data"]["LKJWT_PATH_PREFIX"] == "/livekit/jwt"
    port, = most["Service"]["spec"]["ports"]
    assert {p["backend"]["service"]["port"]["name"] for p in rule["http"]["paths"]} == {port["name"]} == {"http"}
    ports = {p["name"]: p["containerPort"] for p in container(most)["ports"]}
    assert port["targetPort"] == "http" and ports == {"http": 8080, "metrics": 8081}
    assert most["ConfigMap"]["data"]["LIVEKIT_JWT_BIND"] == ":8080"
    assert most["ConfigMap"]["data"]["LKJWT_METRICS_BIND"] == ":8081"


def test_selectors_find_the_pods(most):
    labels = most["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for where in (most["Deployment"]["spec"]["selector"]["matchLabels"], most["Service"]["spec"]["selector"],
                  most["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
                  most["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
                  most["PodMonitor"]["spec"]["selector"]["matchLabels"]):
        assert where and where.items() <= labels.items()
    assert most["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1


def test_network_policy(most):
    """Each way in and out, and no other."""
    def ways(rules, who):
        return {(p.get("protocol"), p.get("port")): [next(iter(f.values())) for f in rule.get(who, [])]
                for rule in rules for p in rule.get("ports", [{}])}

    def names(peers):
        return [p.get("cidr") or p["matchLabels"]["kubernetes.io/metadata.name"] for p in peers]
    spec = most["NetworkPolicy"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    come, go = ways(spec["ingress"], "from"), ways(spec["egress"], "to")
    nodes = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]
    assert {k: names(v) for k, v in come.items()} == {
        ("TCP", 8080): ["ingress-nginx", "livekit", *nodes], ("TCP", 8081): ["monitoring"]}
    assert {k: names(v) for k, v in go.items()} == {
        ("UDP", 53): [], ("TCP", 53): [], ("TCP", 443): [], ("TCP", 8448): [],      # anywhere
        (None, None): ["matrix"],                                                   # any port
        ("TCP", 7880): ["livekit", *nodes], ("TCP", 6379): ["redis"]}


def test_monitoring(most):
    """For the Prometheus Operator: the pods' metrics port, and the alert rules as they are."""
    endpoint, = most["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint == {"port": "metrics", "path": "/metrics", "interval": "30s"}
    rules = yaml.safe_load((DEPLOY / "alerts/lkjwt.rules.yaml").read_text())
    assert most["PrometheusRule"]["spec"] == rules and set(rules) == {"groups"}
    assert {"PodMonitor", "PrometheusRule", "ExternalSecret", "Ingress"}.isdisjoint(objects(*VARIANTS["least"]))


def test_change_means_new_pods():
    """Settings and keys are read at start only."""
    def pod(*argv):
        return objects(*BASE, *KEYS, *argv)["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    same = pod()
    assert pod("--set", "replicas=3") == same
    assert pod("--set", "env.LIVEKIT_LOG_LEVEL=debug") != same
    assert pod("--set", "secret.keys=other: secret") != same


def test_application_service(tmp_path):
    """Both tokens are in the file that the pod reads, and nowhere else; its homeserver may come in."""
    argv = VARIANTS["application service"]
    found = objects(*argv)
    env, secret = dict(found["ConfigMap"]["data"]), found["Secret"]["stringData"]
    assert set(secret) == {"keys", "registration"}
    assert 64 * "a" not in json.dumps({k: v for k, v in found.items() if k != "Secret"})
    who = found["NetworkPolicy"]["spec"]["ingress"][0]["from"]
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "matrix"}}} in who
    # lkjwt reads that file, and is what the values say.
    for name, entry in (("LIVEKIT_KEY_FILE", "keys"), ("LIVEKIT_AS_REGISTRATION_FILE", "registration")):
        assert env[name] == f"/etc/lkjwt/secret/{entry}"
        (tmp_path / entry).write_text(secret[entry].replace("secret", "a-secret-of-more-than-thirty-two-bytes"))
        env[name] = str(tmp_path / entry)
    done = run_cli(["--print-config"], env)
    assert done.code == 0 and "warning" not in done.text.lower(), done
    assert re.search(r"LKJWT_STANDALONE=off", done.text) and "synapse.matrix.svc:8008" in done.text, done
    made = objects(*BASE, "--set", "applicationService.serverName=example.org", "--set", "secret.external.enabled=true",
                   "--set", "secret.external.store.name=vault", "--set", "secret.external.registration=rtc/as")
    assert made["ExternalSecret"]["spec"]["data"][-1] == {"secretKey": "registration", "remoteRef": {"key": "rtc/as"}}
    assert "LKJWT_STANDALONE" not in made["ConfigMap"]["data"]
    # Without the mode none of it is there.
    least = objects(*VARIANTS["least"])
    assert not [k for k in least["ConfigMap"]["data"] if "AS_" in k or "HS_" in k]


def test_settings_are_ones_lkjwt_knows(most, tmp_path, pki):
    """The binary takes exactly this environment, and warns of nothing."""
    env = dict(most["ConfigMap"]["data"])
    for name in ("LIVEKIT_KEY_FILE", "LKJWT_REDIS_PASSWORD_FROM_FILE", "LKJWT_CA_FILE"):
        env[name] = str(tmp_path / env[name].rsplit("/", 1)[1])
    (tmp_path / "keys").write_text("key: a-secret-of-more-than-thirty-two-bytes")
    (tmp_path / "redis-password").write_text("pw")
    shutil.copy(pki.ca_file, tmp_path / "ca.crt")
    done = run_cli(["--print-config"], env)
    assert done.code == 0 and "warning" not in done.text.lower(), done


# ---- the plain manifests

def test_manifests_are_the_charts(tmp_path):
    """deploy/render.sh would change nothing."""
    run(ROOT / "deploy/render.sh", tmp_path, env={"HELM": str(ROOT / ".deps/bin/helm"), "PATH": "/usr/bin:/bin"})
    have = DEPLOY / "kubernetes"
    made = {f.name: f.read_text() for f in tmp_path.iterdir()}
    assert set(made) == {f.name for f in have.iterdir()} - {"kustomization.yaml", "values.yaml"}
    for name, text in made.items():
        assert (have / name).read_text() == text, f"{name}: run deploy/render.sh"
    assert (CHART / "files/lkjwt.rules.yaml").read_text() == (DEPLOY / "alerts/lkjwt.rules.yaml").read_text()


def test_kustomization():
    """It makes each object that the chart does but those of operators, which its comments name."""
    folder = DEPLOY / "kubernetes"
    docs = {d["kind"]: d for d in documents(tool("kustomize", "build", folder)[0])}
    text = (folder / "kustomization.yaml").read_text()
    assert all(f.name in text for f in folder.iterdir() if f.name not in ("kustomization.yaml", "values.yaml"))
    plain = {f: documents((folder / f).read_text())[0] for f in
             [*yaml.safe_load(text)["resources"], "configmap.yaml", "secret.yaml"]}
    assert set(docs) == {d["kind"] for d in plain.values()}
    assert docs["ConfigMap"]["data"] == plain["configmap.yaml"]["data"]
    keys = base64.b64decode(docs["Secret"]["data"]["keys"]).decode()
    assert keys.strip() == plain["secret.yaml"]["stringData"]["keys"]
    assert {d["metadata"].get("namespace", "matrix-rtc") for d in docs.values()} == {"matrix-rtc"}
    assert validate(docs.values(), "1.37") == (0, "")
    docs["PodDisruptionBudget"], = documents((folder / "poddisruptionbudget-v1beta1.yaml").read_text())
    assert validate(docs.values(), "1.20") == (0, "")


def test_example(tmp_path):
    """An installation: its own settings and keys, under names that change with them."""
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "kubernetes")
    mine = shutil.copytree(DEPLOY / "kubernetes-example", tmp_path / "mine")
    names = []
    for keys in ("key: one", "key: two"):
        (mine / "keys").write_text(keys)
        docs = {d["kind"]: d for d in documents(tool("kustomize", "build", mine)[0])}
        assert validate(docs.values(), "1.37") == (0, "")
        pod = docs["Deployment"]["spec"]["template"]["spec"]
        assert pod["volumes"][0]["secret"]["secretName"] == docs["Secret"]["metadata"]["name"]
        assert pod["containers"][0]["envFrom"][0]["configMapRef"]["name"] == docs["ConfigMap"]["metadata"]["name"]
        assert pod["containers"][0]["image"] == "images.example.org/lkjwt:0.1.0"
        assert base64.b64decode(docs["Secret"]["data"]["keys"]).decode() == keys
        assert docs["ConfigMap"]["data"]["LKJWT_LAME_DUCK_S"] == "5"
        names.append(docs["Secret"]["metadata"]["name"])
    assert names[0] != names[1]


def test_placeholder_does_not_start(tmp_path):
    """The manifests as they are end with a message, not with a known key."""
    secret, = documents((DEPLOY / "kubernetes/secret.yaml").read_text())
    (tmp_path / "keys").write_text(secret["stringData"]["keys"])
    env = {"LIVEKIT_URL": "wss://sfu.example.org", "LIVEKIT_FULL_ACCESS_HOMESERVERS": "example.org"}
    done = run_cli(["--print-config"], {**env, "LIVEKIT_KEY_FILE": str(tmp_path / "keys")})
    assert done.code == 1 and re.search(r"LIVEKIT_KEY_FILE", done.text), done


def test_versions_agree():
    """The chart's appVersion is the binary's."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert run_cli(["--version"]).out.splitlines()[0] == f"lkjwt {chart['appVersion']}"
