"""Two replicas as Kubernetes would run them: 64 MiB and a tenth of a core
each, behind haproxy, with Redis; and vegeta, which asks at a steady rate
whatever the answers are."""

import base64
import collections
import contextlib
import json
import os
import resource
import signal
import subprocess
import tempfile
from pathlib import Path

import replicas
import service
from peers import SCRATCH, which

VEGETA = str(Path(__file__).resolve().parents[2] / ".deps" / "bin" / "vegeta")
MEMORY = 64 << 20
PERIOD, QUOTA = 100_000, 10_000         # microseconds: 100m
TICK = os.sysconf("SC_CLK_TCK")


# ---- a pod's limits

class Quota:
    """How the machine lets us limit CPU. enter: lines of shell by which a
    process limits itself; used(pid): seconds of CPU since its start;
    throttled(pid): share of the periods in which it had to wait, or None."""

    ROOTS = ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct",
             "/sys/fs/cgroup")

    def __init__(self):
        self.folder = None
        for root in self.ROOTS:
            folder = f"{root}/lkjwt-load-{os.getpid()}"
            with contextlib.suppress(OSError):
                os.mkdir(folder)
                self.folder = folder
                self._allow()
                break
            self._remove()
        if self.folder:
            self.name = "cgroup " + self.file
            self.enter = (
                f'mkdir "{self.folder}/$$"\n'
                f'echo "{self.text}" >"{self.folder}/$$/{self.file}"\n'
                f'echo $$ >"{self.folder}/$$/cgroup.procs"\n')
        else:
            # It ends with the process it watches.
            self.name = "cpulimit"
            self.enter = (f'"{which("cpulimit")}" -b -z -p $$ -l '
                          f"{100 * QUOTA // PERIOD} >/dev/null 2>&1\n")

    def _allow(self):
        """A folder in it takes a quota, in one version's form or the
        other's; OSError if not."""
        below = f"{self.folder}/try"
        os.mkdir(below)
        try:
            if os.path.exists(f"{below}/cpu.cfs_quota_us"):
                self.file, self.text = "cpu.cfs_quota_us", str(QUOTA)
            else:
                with open(f"{self.folder}/cgroup.subtree_control", "w") as f:
                    f.write("+cpu")
                self.file, self.text = "cpu.max", f"{QUOTA} {PERIOD}"
            with open(f"{below}/{self.file}", "w") as f:
                f.write(self.text)
        finally:
            os.rmdir(below)

    def of(self, pid):
        """What the kernel holds the process to."""
        with open(f"{self.folder}/{pid}/{self.file}") as f:
            return f.read().strip()

    def throttled(self, pid):
        if not self.folder:
            return None
        with open(f"{self.folder}/{pid}/cpu.stat") as f:
            stat = dict(line.split() for line in f)
        return int(stat["nr_throttled"]) / max(1, int(stat["nr_periods"]))

    def _remove(self):
        if self.folder:
            with contextlib.suppress(OSError):
                for name in os.listdir(self.folder):
                    below = f"{self.folder}/{name}"
                    if os.path.isdir(below):
                        os.rmdir(below)
                os.rmdir(self.folder)
        self.folder = None

    stop = _remove


def used(pid):
    """Seconds of CPU since the process began."""
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def peak(pid):
    """Most bytes that were ever resident."""
    with open(f"/proc/{pid}/status") as f:
        line = next(line for line in f if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


# What base_env() turns off for the suites that use one user for all.
LIMITS = {"LKJWT_RATE_USER": None, "LKJWT_RATE_SERVER": None,
          "LKJWT_BREAKER_FAILURES": None}

# A server that is marked down still answers what it has. Nothing is tried
# twice: not to lose a request is the replicas' own doing. A lookup may wait
# 20 s for its turn, then take 20 more.
HAPROXY = replicas.HAPROXY
for old, new in ((" on-marked-down shutdown-sessions", ""),
                 ("retries 3\n    option redispatch 1", "retries 0"),
                 ("timeout server 30s", "timeout server 60s")):
    assert old in HAPROXY, old
    HAPROXY = HAPROXY.replace(old, new)


class Fleet(replicas.Cluster):
    """A Cluster whose replicas are limited from their first instruction."""

    def __init__(self, store, **env):
        self.quota = Quota()
        self.before = service.BIN, replicas.HAPROXY
        wrapper = os.path.join(tempfile.mkdtemp(dir=SCRATCH), "pod")
        with open(wrapper, "w") as f:
            f.write(f"#!/bin/sh\nset -e\n{self.quota.enter}"
                    f'ulimit -v {MEMORY // 1024}\nexec "{service.BIN}" "$@"\n')
        os.chmod(wrapper, 0o755)
        service.BIN, replicas.HAPROXY = wrapper, HAPROXY
        super().__init__(store, count=2, servers=4, LIVEKIT_LOG_LEVEL="info",
                         LKJWT_LAME_DUCK_S="5", **LIMITS, **env)

    def stop(self, check=True):
        try:
            for attack in Attack.all:
                attack.end()
            super().stop(check)
        finally:
            service.BIN, replicas.HAPROXY = self.before
            self.quota.stop()

    def pids(self):
        return [r.svc.pid for r in self.replicas if r.svc]

    def limits_hold(self):
        """The limits are in force, and memory never came near."""
        for pid in self.pids():
            limit = resource.prlimit(pid, resource.RLIMIT_AS)
            assert limit == (MEMORY, MEMORY), limit
            with open(f"/proc/{pid}/cgroup") as f:
                held = f"lkjwt-load-{os.getpid()}/{pid}\n" in f.read()
            assert held or not self.quota.folder
            assert not held or self.quota.of(pid) == self.quota.text
            assert peak(pid) < MEMORY, peak(pid)


# ---- load

class Result:
    """What vegeta saw."""

    def __init__(self, lines):
        self.all = [r for r in map(json.loads, lines)
                    if r["error"] != "no targets to attack"]     # the end
        self.codes = collections.Counter(
            (r["url"].partition("/")[2].partition("/")[2].partition("/")[2],
             r["code"]) for r in self.all)
        self.errors = [r["error"] for r in self.all if r["code"] == 0]

    def __len__(self):
        return len(self.all)

    def of(self, code):
        return [r for r in self.all if r["code"] == code]

    def quantile(self, q):
        """Milliseconds."""
        spent = sorted(r["latency"] for r in self.all)
        return spent[min(len(spent) - 1, int(q * len(spent)))] / 1e6

    def all_well(self):
        """Every request was answered, with 200."""
        bad = [r for r in self.all if r["code"] != 200]
        assert self.all and not bad, (self.codes, bad[:3])
        return self

    def __str__(self):
        return (f"{len(self)} requests, p50 {self.quantile(.5):.1f} ms, "
                f"p99 {self.quantile(.99):.1f} ms, slowest "
                f"{self.quantile(1):.0f} ms")


class Attack:
    """vegeta at work. targets: (method, path, body, headers); each is asked
    for once, and the last of them ends it, if stop() does not."""

    all = []

    def __init__(self, port, targets, rate, timeout=30):
        folder = tempfile.mkdtemp(prefix="lkjwt-load-", dir=SCRATCH)
        self.file = os.path.join(folder, "results")
        asked = os.path.join(folder, "targets")
        with open(asked, "w") as f:
            for method, path, body, headers in targets:
                f.write(json.dumps({
                    "method": method, "url": f"http://127.0.0.1:{port}{path}",
                    "body": base64.b64encode(body.encode()).decode(),
                    "header": {k: [v] for k, v in headers}}) + "\n")
        self.process = subprocess.Popen(
            [VEGETA, "attack", "-format=json", f"-targets={asked}", "-lazy",
             f"-rate={rate}/s", f"-timeout={timeout}s", "-redirects=-1",
             "-max-workers=2000", f"-output={self.file}"])

        self.all.append(self)

    def end(self):
        """Whatever it does; where a test failed."""
        if self.running():
            self.process.kill()
            self.process.wait()

    def running(self):
        return self.process.poll() is None

    def result(self):
        """When all is answered."""
        assert self.process.wait(300) == 0
        lines = subprocess.run([VEGETA, "encode", "--to=json", self.file],
                               text=True, check=True, capture_output=True)
        return Result(lines.stdout.splitlines())

    def stop(self):
        """No further request; the answers to those made."""
        self.process.send_signal(signal.SIGINT)
        return self.result()
