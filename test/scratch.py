"""Runs the service where there is nothing else: a folder that holds only the
binary as a read-only root, a uid of no account, no capability, as PID 1.

For a container's file system (image.py) and for the bare binary (audit.py).
"""

import os
import pathlib
import re
import subprocess
import time

ENV = {
    "LIVEKIT_URL": "wss://sfu.example",
    "LIVEKIT_KEY": "scratch",
    "LIVEKIT_SECRET": "a-secret-of-more-than-thirty-two-bytes",
    "LIVEKIT_FULL_ACCESS_HOMESERVERS": "*",
    "LIVEKIT_JWT_BIND": "127.0.0.1:8080",
}
DEADLINE_S = 20
NETNS = str(pathlib.Path(__file__).with_name("netns"))


def jail(root, command, namespace, uid):
    """bubblewrap's command line; the network is the one of `namespace`, a
    process, so that service and health check share one."""
    inside = [] if namespace is None else [
        "nsenter", f"--net=/proc/{namespace}/ns/net", "--"]
    env = [word for pair in ENV.items() for word in ("--setenv", *pair)]
    return inside + [
        "bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc",
        "--unshare-uts", "--uid", str(uid), "--gid", str(uid),
        "--cap-drop", "ALL", "--as-pid-1", "--die-with-parent",
        "--ro-bind", str(root), "/", "--clearenv", *env, "--", *command]


def status(pid):
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return dict(re.findall(r"^(\w+):\t(.*)$", text, re.M))


def children(pid):
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()]


def healthcheck(root, command, namespace, uid):
    return subprocess.run(jail(root, command, namespace, uid), text=True,
                          timeout=DEADLINE_S, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)


def checks(root, serve=("/lk-jwt-service",),
           probe=("/lk-jwt-service-healthcheck",), uid=1000):
    """Yields (text, problem); problem is empty when all is well."""
    holder = subprocess.Popen([NETNS, "sh", "-c", "echo up; exec sleep 600"],
                              stdout=subprocess.PIPE, text=True)
    service = None
    try:
        holder.stdout.readline()
        result = healthcheck(root, probe, holder.pid, uid)
        yield ("scratch: the health check exits 1 and says why when nothing "
               "listens", "" if result.returncode == 1
               and result.stdout.count("\n") == 1
               else f"exit {result.returncode}, {result.stdout!r}")
        log = root.with_name(root.name + ".log")
        with open(log, "wb") as stderr:
            service = subprocess.Popen(jail(root, serve, holder.pid,
                                            uid), stderr=stderr)
        limit = time.monotonic() + DEADLINE_S
        while True:
            result = healthcheck(root, probe, holder.pid, uid)
            ended = service.poll() is not None
            if result.returncode == 0 or ended or time.monotonic() > limit:
                break
            time.sleep(0.05)
        good = result.returncode == 0 and not ended
        yield ("scratch: /healthz is 200 by the health check of that name",
               "" if good else f"{result.stdout!r}; log: {log.read_text()!r}")
        if not good:
            return
        inner = service.pid
        while children(inner):
            inner = children(inner)[0]
        facts = status(inner)
        sets = {name: facts[name] for name in
                ("CapPrm", "CapEff", "CapBnd", "CapAmb", "CapInh")}
        yield ("scratch: it holds no capability",
               "" if all(int(value, 16) == 0 for value in sets.values())
               else str(sets))
        yield ("scratch: it is PID 1 of its namespace",
               "" if facts["NSpid"].split()[-1] == "1" else facts["NSpid"])
        mapped = pathlib.Path(f"/proc/{inner}/uid_map").read_text().split()
        yield (f"scratch: it runs as uid {uid}",
               "" if mapped[0] == str(uid) and mapped[2] == "1"
               else str(mapped))
        mounts = pathlib.Path(f"/proc/{inner}/mounts").read_text().split("\n")
        options = [line.split()[3].split(",") for line in mounts if line]
        yield ("scratch: its only file system is read-only",
               "" if len(options) == 1 and "ro" in options[0] else str(mounts))
        os.kill(inner, 15)
        try:
            code = service.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            code = "still running"
        yield ("scratch: SIGTERM ends PID 1 with exit status 0",
               "" if code == 0 else f"exit status {code}")
    finally:
        for process in (service, holder):
            if process and process.poll() is None:
                process.kill()
                process.wait()
