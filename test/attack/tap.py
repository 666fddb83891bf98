"""What the attacks share: a relay that harms what a real peer says, and the
look at the service afterwards."""
import contextlib
import os
import select
import socket
import struct
import threading
import time
from types import SimpleNamespace

import dnslib

from peers import HANG, Dns, RawServer, tls_context, wait_for
from service import free_port
from store import Healthy

RESET = struct.pack("ii", 1, 0)     # SO_LINGER: close() sends RST


class Tap(RawServer):
    """Relays to target. plan: function(number of the connection) -> None, or
    (how many bytes of the target pass, what then): "end", "reset", "hold"
    (silence), "drip" (a byte a second) or function(socket) that goes on in
    its place. Harm comes with the first byte that does not pass; .harmed has
    the numbers of the connections it came to, .passed the bytes that passed
    on each."""

    def __init__(self, target, addr="127.0.0.1", port=0, plan=None):
        self.target, self.plan = target, plan
        self.harmed, self.passed, self.over = [], {}, threading.Event()
        self.limits = {}            # of each connection: [bytes, what then]
        super().__init__(self._relay, addr, port)

    def harm(self, left, then):
        """From now on, on each connection there is."""
        for limit in list(self.limits.values()):
            limit[:] = left, then

    def _relay(self, conn, number):
        limit = [1 << 60, None]
        limit[:] = (self.plan and self.plan(number)) or limit
        self.limits[number], self.passed[number] = limit, 0
        try:
            self._talk(conn, number, limit)
        finally:
            del self.limits[number]

    def _talk(self, conn, number, limit):
        held, drops = bytearray(), False
        with socket.create_connection(self.target, HANG) as up:
            for s in (conn, up):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            names = {conn.fileno(): conn, up.fileno(): up}
            poll = select.poll()
            for fd in names:
                poll.register(fd, select.POLLIN)
            next_at = 0
            while not self.over.is_set():
                for fd, _ in poll.poll(50 if held else 500):
                    data = names[fd].recv(65536)
                    if fd == conn.fileno():
                        if not data:
                            return
                        up.sendall(data)
                        continue
                    if not data:
                        poll.unregister(fd)
                        if not drops and not held:
                            with contextlib.suppress(OSError):
                                conn.shutdown(socket.SHUT_WR)
                        continue
                    left, then = limit
                    if left:
                        conn.sendall(data[:left])
                        self.passed[number] += min(left, len(data))
                    rest, limit[0] = data[left:], max(0, left - len(data))
                    if not rest or drops:
                        continue
                    if not held:
                        self.harmed.append(number)
                    if then == "reset":
                        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                        RESET)
                        return
                    if then == "drip":
                        held += rest
                        continue
                    if callable(then):
                        then(conn)
                        return
                    drops = True
                    if then == "end":
                        conn.shutdown(socket.SHUT_WR)
                if held and time.monotonic() >= next_at:
                    conn.sendall(held[:1])
                    self.passed[number] += 1
                    del held[:1]
                    next_at = time.monotonic() + 1

    def stop(self):
        self.over.set()
        super().stop()


class Forgetful:
    """A server's TLS of which no session can be resumed."""

    def __init__(self, cert):
        self.cert = cert

    def wrap_socket(self, *args, **kw):
        return tls_context(self.cert).wrap_socket(*args, **kw)


class TcpDns(Dns):
    """By UDP every answer is truncated; by TCP talk(connection, question)
    says what it likes."""

    def __init__(self, talk):
        self.talk = talk
        super().__init__()
        self.any_hook = self._truncated

    @staticmethod
    def _truncated(data, rec, transport):
        r = rec.reply()
        r.header.tc = 1
        return r

    def _tcp_one(self, conn, peer):
        with contextlib.suppress(OSError), conn:
            conn.settimeout(HANG)
            f = conn.makefile("rb")
            size, = struct.unpack("!H", f.read(2))
            self.talk(conn, dnslib.DNSRecord.parse(f.read(size)))


def bind():
    return f"127.0.0.1:{free_port()}"


def descriptors(svc):
    return len(os.listdir(f"/proc/{svc.pid}/fd"))


def bugs(svc):
    """Events of the class that no input may cause."""
    return {k: v for k, v in svc.metrics().items()
            if k.startswith('lkjwt_events_total{event="BUG') and v}


@contextlib.contextmanager
def unharmed(svc):
    """Meanwhile /healthz answers. Afterwards every pool is as empty as
    before, each descriptor closed, and nothing of class "bug" was met."""
    base = descriptors(svc)
    with Healthy(SimpleNamespace(svc=svc)):
        yield
    wait_for("a service at rest", lambda: at_rest(svc, base))
    assert svc.proc.poll() is None and not bugs(svc)


def at_rest(svc, base):
    m = svc.metrics()
    busy = [m[f"lkjwt_{name}"] for name in
            ("exchanges", "exchanges_waiting", "upstream_calls")]
    idle = m["lkjwt_upstream_idle_connections"]
    return (not any(busy) and m["lkjwt_connections"] <= 1
            and descriptors(svc) - idle <= base)
