"""The dashboard, the alerts and the metrics of a loaded service fit: a real
Prometheus scrapes two replicas behind haproxy with Redis, every panel has
data, every name is one that the service has, and troubles raise alerts."""

import itertools
import json
import math
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import metrics
from exchange import make_body
from leave import WEBHOOK
from outbound import by_token, token_for
from peers import Dns, Homeserver, Pki, Reply, which
from replicas import Cluster, until
from service import Service, base_env, free_port
from store import RedisServer

# What a service in good health has nothing to show of, so that its panel
# stands at zero. All others must move.
ZERO = {"Not yet written", "Lost and displaced", "Server errors"}
# Families that neither the dashboard nor an alert uses, and why.
LEFT_OUT = {}
SERVER, ADDR = "w.dash.test", "127.0.0.9"


# ---- the stage

class Stage:
    """Two replicas, and people who do all that a panel shows."""

    def __init__(self):
        self.pki = Pki()
        self.store = RedisServer()
        self.dns = Dns(f"{SERVER}. A {ADDR}\ndead.dash.test. A 127.0.0.8\n")
        self.cluster = Cluster(
            self.store, count=2, servers=2, LKJWT_RESOLVER=self.dns.netloc,
            LKJWT_ALLOW_NETWORKS="127.0.0.0/8",
            LKJWT_CA_FILE=self.pki.ca_file, LKJWT_CA_ONLY="true",
            # The defaults, which base_env() turns off.
            LKJWT_RATE_USER=None, LKJWT_RATE_SERVER=None,
            LKJWT_BREAKER_FAILURES=None,
            LIVEKIT_FULL_ACCESS_HOMESERVERS=(
                f"h0.replicas.test,h1.replicas.test,{SERVER}"))
        # Found by well-known, asked over TLS, and closing each time.
        self.homeserver = Homeserver(
            [(ADDR, 443)], tls=self.pki.leaf([SERVER]), sub=by_slow_token,
            well_known=f"{SERVER}:443")
        self.homeserver.close_each = True
        self.homeserver.on("/.well-known/matrix/client", Reply(200, {
            "m.homeserver": {"base_url": self.cluster.api.url}}))
        self.rounds, self.failed, self.over = 0, [], threading.Event()
        self.prometheus, self.threads = None, []

    def __enter__(self):
        try:
            self.cluster.__enter__()
            self.prometheus = metrics.Prometheus(
                r.env["LKJWT_METRICS_BIND"] for r in self.cluster.replicas)
        except BaseException:
            self.__exit__()
            raise
        for what in (self.run, self.linger):
            self.threads.append(threading.Thread(target=self.guard,
                                                 args=(what,)))
            self.threads[-1].start()
        return self

    def __exit__(self, *_):
        self.rest()
        if self.prometheus:
            self.prometheus.stop()
        self.cluster.stop(check=False)
        self.homeserver.stop()
        self.dns.stop()
        self.store.stop()

    def rest(self):
        """The people go home."""
        self.over.set()
        for t in self.threads:
            t.join(60)

    def guard(self, what):
        try:
            what()
        except Exception as e:
            self.failed.append(e)

    def run(self):
        for n in itertools.count():
            if self.over.wait(0.05):
                return
            self.round(n)
            self.rounds += 1

    def post(self, path, body, **more):
        return self.cluster.front.post(path, body, timeout=60, **more)

    def token(self, n, server, path="/get_token", **more):
        return self.post(path, make_body(
            path, server, f"@u{n}:{server}", token_for(server, f"u{n}"),
            room=f"!r:{server}", **more))

    def round(self, n):
        """Somebody joins and leaves; others have all kinds of ill luck."""
        p = self.cluster.person(
            way=("delegate", "get_token", "sfu_get")[n % 3])
        assert self.token(n, p.server).status == 200
        assert self.token(n, SERVER, "/sfu/get").status == 200
        p.connected()
        if n % 2:
            p.delegate(again=True).settled()
        p.leave()
        p.sent()
        if n % 10 == 0:
            # Over TLS to a client-server API that discovery names.
            reply = self.token(n, SERVER, delay_id=f"syd_w{n}",
                               delay_timeout=3600000)
            assert reply.status == 200, reply
            assert self.post("/sfu/get", {"room": 1}).status == 400
            assert self.token(n, "nobody.dash.test").status == 401
            # Until the breaker opens, and whenever it may try again.
            for _ in range(3 if n else 15):
                assert self.token(n, "dead.dash.test:1").status == 401
            self.post("/get_token", make_body(
                "/get_token", p.server, "@else:where",
                token_for(p.server, "u1")))
        if n == 0:
            self.post(WEBHOOK, {"event": "room_started"},
                      headers=[("Authorization", "none")])
            self.cluster.front.request("GET", "/nothing")
        if n % 10 == 0:
            # More than the one user may hand over, on either replica.
            for i in range(n and 39, 40):
                self.token(0, "h0.replicas.test", device=f"D{i}-{n}",
                           member=f"m{i}", delay_id=f"syd_many{i}-{n}",
                           delay_timeout=3600000)

    def linger(self):
        """Somebody's homeserver always takes its time, so that there are
        requests in progress whenever Prometheus looks."""
        while not self.over.wait(0.1):
            assert self.token("slow", SERVER).status == 200


def by_slow_token(req):
    if ".uslow." in req.query["access_token"]:
        time.sleep(2)
    return by_token(req)


@pytest.fixture(scope="module")
def stage():
    with Stage() as s:
        yield s


@pytest.fixture(scope="module")
def quiet():
    """What a service that has done nothing exposes."""
    with Service(base_env(
            LKJWT_METRICS_BIND=f"127.0.0.1:{free_port()}")) as s:
        text = s.metrics_text()
    names, values = metrics.exposed(text)
    return SimpleNamespace(text=text, names=names, values=values)


# ---- names

def well_formed(text):
    done = subprocess.run([which("promtool"), "check", "metrics"], text=True,
                          input=text, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_metrics_are_well_formed(quiet):
    well_formed(quiet.text)
    # What promtool lets pass is found all the same.
    with pytest.raises(AssertionError):
        well_formed(quiet.text.replace("_total", "_sum"))


def test_rules_are_well_formed():
    done = subprocess.run([which("promtool"), "check", "rules",
                           metrics.RULES], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_by_promtool():
    path = metrics.TOP / "test" / "dash" / "lkjwt.rules-test.yaml"
    done = subprocess.run([which("promtool"), "test", "rules", path],
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Each alert fires there once.
    fired = set(re.findall(r'alertname[=:] ?"?(\w+)', path.read_text()))
    assert fired == {name for name, _ in metrics.alerts()}


@pytest.mark.parametrize("source", ["alerts", "targets"])
def test_names_are_exposed(quiet, source):
    """Each family, and each value of a label that is one of ours."""
    own = {"event", "route", "target", "result", "layer"}
    for title, expr in getattr(metrics, source)():
        assert metrics.families(expr) <= quiet.names, (title, expr)
        for label, one in metrics.matchers(metrics.fill(expr)):
            if label in own:
                known = quiet.values[label]
                assert any(re.fullmatch(one, v) for v in known), (title, one)


def test_every_family_is_used():
    used = set()
    for _, expr in metrics.alerts() + metrics.targets():
        used |= metrics.families(expr)
    readme = (metrics.TOP / "README.md").read_text()
    listed = set(re.findall(r"^\| `((?:lkjwt|process)_\w+)` \|", readme, re.M))
    assert used | set(LEFT_OUT) == listed
    assert not used & set(LEFT_OUT)


# ---- the file

def test_dashboard_is_well_formed():
    d = metrics.dashboard()
    assert d["id"] is None and d["uid"] == "lkjwt" and "__inputs" not in d
    text = metrics.DASHBOARD.read_text()
    assert text == json.dumps(d, indent=1, ensure_ascii=False) + "\n"
    for key in ("id", "title"):
        seen = [p[key] for p in d["panels"]]
        assert len(set(seen)) == len(seen), seen
    known = {v["name"] for v in d["templating"]["list"]}
    named = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval",
                                                    "__range", "__all"}
    assert named == known
    source = {"type": "prometheus", "uid": "${datasource}"}
    for p in metrics.panels():
        assert p["description"] and p["fieldConfig"]["defaults"]["unit"]
        assert p["datasource"] == source and p["targets"], p["title"]
        refs = [t["refId"] for t in p["targets"]]
        assert len(set(refs)) == len(refs)
        for t in p["targets"]:
            assert t["datasource"] == source
            assert 'job=~"$job", instance=~"$instance"' in t["expr"], t
            # A counter's rate in steps that Grafana knows to be long enough.
            for window in re.findall(r"\[(.*?)\]", t["expr"]):
                assert window in ("$__rate_interval", "$__range"), t


def lost(one, other, path=""):
    """What `one` has and `other` has not, or has otherwise."""
    if isinstance(one, dict) and isinstance(other, dict):
        for k in one:
            yield from lost(one[k], other.get(k, "nothing"), f"{path}.{k}")
    elif isinstance(one, list) and isinstance(other, list):
        for a, b in itertools.zip_longest(one, other, fillvalue="nothing"):
            yield from lost(a, b, path)
    elif one != other:
        yield path, one


def test_dashboard_is_known_to_grafana():
    """Read and written by Grafana's own model of a dashboard: it knows each
    member, and what its plugins make of theirs."""
    sys.path.insert(0, str(metrics.TOP / ".deps" / "grafana"))
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models import dashboard
    plugins.register_default_plugins()
    d = metrics.dashboard()
    read = dashboard.Dashboard.from_json(d)
    back = json.loads(encoder.JSONEncoder().encode(read))
    assert len(back["panels"]) == len(d["panels"])
    # Prometheus' own members of an annotation are none of the model's.
    assert {path for path, _ in lost(d, back)} <= {".id"} | {
        f".annotations.list.{name}"
        for name in ("step", "titleFormat", "textFormat")}
    spoilt = json.loads(json.dumps(d))
    spoilt["panels"][1]["targets"][0]["expression"] = "1"
    read = dashboard.Dashboard.from_json(spoilt)
    back = json.loads(encoder.JSONEncoder().encode(read))
    assert (".panels.targets.expression", "1") in list(lost(spoilt, back))


def test_panels_do_not_overlap():
    taken = {}
    for p in metrics.dashboard()["panels"]:
        g = p["gridPos"]
        assert 0 <= g["x"] and g["x"] + g["w"] <= 24, p["title"]
        for cell in itertools.product(range(g["x"], g["x"] + g["w"]),
                                      range(g["y"], g["y"] + g["h"])):
            assert cell not in taken, (p["title"], taken[cell])
            taken[cell] = p["title"]


# ---- data

def working(stage):
    """The load is on, and nothing went wrong with it."""
    until("ten rounds of load", lambda: stage.rounds >= 10 or stage.failed)
    assert not stage.failed, stage.failed


PANELS = [(p["title"], [t["expr"] for t in p["targets"]])
          for p in metrics.panels()]


def test_scrapes_succeed(stage, quiet):
    """Prometheus takes all of it, and it is what a quiet service has."""
    working(stage)

    def up():
        found = stage.prometheus.get("targets")["activeTargets"]
        return len(found) == 2 and all(t["health"] == "up" for t in found)
    until("both targets up", up, tell=lambda: stage.prometheus.get("targets"))
    for r in stage.cluster.replicas:
        text = r.svc.metrics_text()
        well_formed(text)
        names, values = metrics.exposed(text)
        assert names == quiet.names
        assert values["event"] == quiet.values["event"]
        lines = [line for line in text.splitlines() if line[0] != "#"]
        bind = r.env["LKJWT_METRICS_BIND"]
        [(_, taken)] = stage.prometheus.query(
            f'scrape_samples_scraped{{instance="{bind}"}}')
        assert abs(taken - len(lines)) < 10, (taken, len(lines))


@pytest.mark.parametrize("title,exprs", PANELS, ids=[p[0] for p in PANELS])
def test_panel_has_data(stage, title, exprs):
    working(stage)

    def shown():
        found = [stage.prometheus.query(metrics.fill(e)) for e in exprs]
        real = [[v for _, v in one if math.isfinite(v)] for one in found]
        moved = any(v for one in real for v in one)
        return all(real) and (moved or title in ZERO)

    until(f"data for {title}", shown, 60, tell=lambda: [
        (e, stage.prometheus.query(metrics.fill(e))) for e in exprs])
    assert not stage.failed, stage.failed


def test_panel_of_one_instance(stage):
    """The variables select: half of it is one replica's."""
    working(stage)
    one = stage.cluster.replicas[0].env["LKJWT_METRICS_BIND"]
    for title, expr in metrics.targets():
        found = stage.prometheus.query(metrics.fill(expr, instance=one))
        named = {labels["instance"] for labels, _ in found
                 if "instance" in labels}
        assert named <= {one}, title
        assert stage.prometheus.query(
            metrics.fill(expr, job="another", instance=one)) == [] \
            or "vector(0)" in expr, title


def test_variables_find_jobs_and_instances(stage):
    working(stage)
    found = stage.prometheus.query("lkjwt_build_info")
    assert {labels["job"] for labels, _ in found} == {"lkjwt"}
    assert len({labels["instance"] for labels, _ in found}) == 2
    for v in metrics.dashboard()["templating"]["list"]:
        if v["type"] == "query":
            asked = v["query"]["query"]
            assert re.fullmatch(r"label_values\(lkjwt_build_info(\{.*\})?, "
                                rf"{v['name']}\)", asked), asked


# ---- alerts

def test_every_rule_is_evaluated(stage):
    working(stage)
    def evaluated():
        rules = [r for g in stage.prometheus.get("rules")["groups"]
                 for r in g["rules"]]
        assert len(rules) == len(metrics.alerts())
        return all(r["health"] == "ok" for r in rules)
    until("healthy rules", evaluated)


def test_no_alert_while_all_is_well(stage):
    """Nor is one pending, under load with its usual refusals, but for the
    dead server that somebody asks for. (Shards on their way from one replica
    to the other are pending for a moment.)"""
    working(stage)
    until("no alert", lambda: not set(stage.prometheus.alerts())
          - {"LkjwtBreakersOpen"}, 30, tell=stage.prometheus.alerts)


def test_z_troubles_raise_alerts(stage):
    """Last of all: what breaks is what is told."""
    working(stage)
    stage.rest()
    cluster, n = stage.cluster, itertools.count(10000)

    def told(*names, meanwhile=lambda: None):
        def one_more():
            meanwhile()
            return set(names) <= set(stage.prometheus.alerts())
        until(f"alerts {names}", one_more, tell=stage.prometheus.alerts)

    def refused():
        assert stage.token(next(n), "h0.replicas.test").status == 500
    cluster.sfu.fail = lambda req: Reply(500, {"code": "internal"})
    told("LkjwtServerErrors", "LkjwtSfuRefuses", meanwhile=refused)
    stage.store.stop()
    told("LkjwtRedisDown")
    cluster.replicas[1].kill()
    told("LkjwtDown")
