"""A real Prometheus, and what a dashboard and rules ask of it."""

import json
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import yaml

from peers import SCRATCH, Process, free_port, which

TOP = Path(__file__).resolve().parents[2]
RULES = TOP / "deploy" / "alerts" / "lkjwt.rules.yaml"
DASHBOARD = TOP / "deploy" / "grafana" / "lkjwt.json"

FAMILY = re.compile(r"\b(?:lkjwt|process)_[a-z_]+\b")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


class Prometheus(Process):
    """Scrapes these addresses as a job named lkjwt, each second, and
    evaluates the alerts as often."""

    def __init__(self, targets, rules=RULES):
        folder = tempfile.mkdtemp(prefix="lkjwt-prometheus-", dir=SCRATCH)
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "lkjwt", "static_configs": [
                {"targets": list(targets)}]}]}
        path = os.path.join(folder, "prometheus.yml")
        with open(path, "w") as f:
            yaml.safe_dump(config, f)
        super().__init__(
            [which("prometheus"), f"--config.file={path}",
             f"--storage.tsdb.path={folder}/data", "--log.level=warn",
             f"--web.listen-address=127.0.0.1:{self.port}"], self._ready)

    def _ready(self):
        try:
            with urllib.request.urlopen(f"{self.base}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def get(self, path, **query):
        """The data of an answer of the API; its complaint is raised."""
        url = f"{self.base}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as e:
            said = json.load(e)
            raise AssertionError(f"{said['error']}: {query}") from None

    def query(self, expr):
        """[(labels, value)] of an instant query."""
        return [(one["metric"], float(one["value"][1]))
                for one in self.get("query", query=expr)["result"]]

    def alerts(self):
        """{alert: state} of all that are pending or fire."""
        return {a["labels"]["alertname"]: a["state"]
                for a in self.get("alerts")["alerts"]}


# ---- what is asked

def alerts():
    """[(name, expression)] of the rules."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [(rule["alert"], rule["expr"])
            for group in groups for rule in group["rules"]]


def dashboard():
    return json.loads(DASHBOARD.read_text())


def panels():
    """Panels that show something: not rows."""
    return [p for p in dashboard()["panels"] if p["type"] != "row"]


def targets():
    """[(panel's title, expression)] of the dashboard, annotations too."""
    found = [(p["title"], t["expr"]) for p in panels() for t in p["targets"]]
    return found + [(a["name"], a["expr"])
                    for a in dashboard()["annotations"]["list"]]


def fill(expr, **variables):
    """The expression as Grafana sends it."""
    variables = {"__rate_interval": "20s", "__range": "5m", "job": "lkjwt",
                 "instance": ".*", **variables}
    return re.sub(r"\$(\w+)", lambda m: variables[m[1]], expr)


def families(expr):
    """The metric families an expression names."""
    return {re.sub(r"_(bucket|sum|count)$", "", name)
            for name in FAMILY.findall(expr)}


def matchers(expr):
    """[(label, value or one alternative of a pattern)] of its selectors."""
    return [(label, one) for label, op, text in MATCHER.findall(expr)
            for one in (text.split("|") if "~" in op else [text])]


def exposed(text):
    """What a service's /metrics has: families, {label: values}."""
    names = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    values = {}
    for label, value in re.findall(r'(\w+)="([^"]*)"', text):
        values.setdefault(label, set()).add(value)
    return names, values
