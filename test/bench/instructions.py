"""Instructions that the service executes per request, as built for x86_64,
aarch64 and armv7: what a small board has to do, counted where there is none.

    instructions.py

Each binary runs in qemu-user, which logs every block of code that it enters;
a block's instructions are counted once, when it is translated. Kernel code is
not counted. The stand-ins are those of the black-box tests. Prints a table in
Markdown; the figures go to build/bench/instructions.json. The binaries are
those of `make release`. Run it under test/netns.
"""

import http.client
import json
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import threading
import time

TOP = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TOP / "test/release"), str(TOP / "test/blackbox")]

import leave  # noqa: E402
from arches import SHIPPED, binary  # noqa: E402
from exchange import Rig, alias, hashed, make_body  # noqa: E402
from peers import Homeserver, Pki  # noqa: E402
from service import Service  # noqa: E402

REQUESTS, CONTACTS = 30, 3


class Counter(threading.Thread):
    """Reads qemu's log from a pipe. settled(): instructions so far, once
    nothing more comes."""

    def __init__(self, pipe):
        super().__init__(daemon=True)
        self.pipe, self.lines, self.total = pipe, 0, 0
        self.start()

    def run(self):
        size, block = {}, None
        with open(self.pipe, "rb", 1 << 20) as log:
            for line in log:
                self.lines += 1
                if line.startswith(b"Trace "):
                    # Trace 0: host address [base/program counter/flags/...]
                    self.total += size[int(line.split(b"/")[1], 16)]
                elif line.startswith(b"IN:"):
                    block = None
                elif line.startswith(b"0x"):
                    if block is None:
                        block = int(line.partition(b":")[0], 16)
                        size[block] = 0
                    size[block] += 1

    def settled(self):
        seen = -1
        while seen != self.lines:
            seen = self.lines
            time.sleep(0.5)
        return self.total


def emulator(arch):
    name = arch.qemu or f"qemu-{platform.machine()}-static"
    return shutil.which(name) or sys.exit(f"no {name}")


def measure(arch, rig, strangers, folder):
    """{what: instructions each}"""
    pipe = os.path.join(folder, arch.name)
    os.mkfifo(pipe)
    counter = Counter(pipe)
    env = rig.env(LIVEKIT_FULL_ACCESS_HOMESERVERS="*", LKJWT_JAIL="off",
                  LKJWT_KEEPALIVE_S="600")
    argv = [emulator(arch), "-d", "in_asm,exec,nochain", "-D", pipe,
            str(binary(arch))]
    with Service(env, argv=argv, start_timeout=120) as svc:
        host, port = svc.bind.rsplit(":", 1)
        conn = http.client.HTTPConnection(host, int(port), timeout=120)

        def ask(method, path, body=None, **headers):
            conn.request(method, path, body, {
                "Origin": "https://call.example.org", **headers})
            reply = conn.getresponse()
            text = reply.read()
            if reply.status != 200:
                sys.exit(f"{arch.name}: {path}: {reply.status} {text!r}\n"
                         + svc.log_text())

        def token(homeserver):
            user, proof = rig.user(homeserver)
            ask("POST", "/get_token", json.dumps(make_body(
                "/get_token", homeserver.netloc, user, proof)),
                **{"Content-Type": "application/json"})

        def webhook():
            text = json.dumps(leave.event("track_published", alias("!r:s"),
                                          hashed("@u:s", "D", "M")))
            ask("POST", "/sfu_webhook", text,
                Authorization=leave.webhook_token(text))

        def each(count, call, *args):
            call(*args)
            first = counter.settled()
            for _ in range(count):
                call(*args)
            return (counter.settled() - first) / count

        found = {
            "/healthz": each(REQUESTS, ask, "GET", "/healthz"),
            "token exchange, warm connections":
                each(REQUESTS, token, rig.full),
            "webhook": each(REQUESTS, webhook)}
        first = counter.settled()
        for homeserver in strangers:
            token(homeserver)
        found["first contact with a homeserver, P-256 chain"] = (
            counter.settled() - first) / len(strangers)
    return found


def main():
    pki = Pki()
    rig = Rig(pki)
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in SHIPPED:
            strangers = [Homeserver(tls=pki.leaf(issuer=pki.ca(
                f"intermediate {n}", path_len=0), ips=["127.0.0.1"]))
                for n in range(CONTACTS)]
            table[arch.name] = measure(arch, rig, strangers, folder)
            for server in strangers:
                server.stop()
    rig.stop()
    names = list(table)
    print("| instructions | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for what in table[names[0]]:
        print(f"| {what} | " + " | ".join(
            f"{table[name][what]:,.0f}" for name in names) + " |")
    out = TOP / "build/bench"
    out.mkdir(parents=True, exist_ok=True)
    (out / "instructions.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
