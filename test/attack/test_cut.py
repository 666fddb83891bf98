"""Every peer, cut off at every byte of what it says: never taken for whole,
and the next exchange is as if nothing had been."""
import json
import ssl
import struct
from concurrent.futures import ThreadPoolExecutor

import dnslib
import pytest
from dnslib import QTYPE, RR

from leave import NOT_FOUND, World, participant
from outbound import FULL, PUB, Exchange, by_token, fresh, lkjwt, pki, pub
from peers import Dns, Homeserver, Reply, Sfu, chunked
from service import CANARY_KEY, CANARY_SECRET, StartFailed
from store import RedisServer, StoreWorld
from tap import Forgetful, Tap, TcpDns, bind, bugs, unharmed

LANES = 12
HOST = PUB % 140


def quiet(dns, sfu=None, **env):
    return lkjwt(dns, sfu, LIVEKIT_LOG_LEVEL="error",
                 LKJWT_METRICS_BIND=bind(), **env)


@pytest.fixture(scope="module")
def dns():
    """Every name is HOST."""
    pub(140)

    def answer(data, rec, transport):
        r = rec.reply()
        if rec.q.qtype == QTYPE.A:
            r.add_answer(RR(rec.q.qname, QTYPE.A, rdata=dnslib.A(HOST),
                            ttl=60))
        return r
    with Dns() as dns:
        dns.any_hook = answer
        yield dns


class Abrupt:
    """Each connection ends with its reply, TLS without a word: the last byte
    is the reply's."""

    def answer(self, req):
        reply = super().answer(req)
        reply.close = reply.dirty = True
        return reply


class AbruptHomeserver(Abrupt, Homeserver):
    def _send(self, conn, reply):
        # Set free, OpenSSL forgets a session that ended without a word.
        self.kept.append(conn._sslobj)
        return super()._send(conn, reply)


class AbruptSfu(Abrupt, Sfu):
    pass


def until_whole(first, tap, how, ask):
    """Cuts at first, first + LANES, ...; ask(harmed) judges what came of it,
    harmed() tells whether the last connection was cut. Over when three in a
    row were not. The offsets where it was."""
    cut = []
    n, whole = first, 0
    while whole < 3:
        tap.plan = lambda number: (n, how)
        harmed = ask(lambda: tap.connections in tap.harmed)
        whole = 0 if harmed else whole + 1
        cut += [n] if harmed else []
        tap.plan = None
        ask(lambda: False)
        n += LANES
    return cut


def in_lanes(lane):
    """lane(number) in threads. Signatures differ in length by some bytes, so
    only the end is not the same each time."""
    with ThreadPoolExecutor(LANES) as pool:
        cuts = sorted(sum(pool.map(lane, range(LANES)), []))
    assert set(range(len(cuts) - 8)) <= set(cuts), cuts
    return len(cuts)


@pytest.mark.parametrize("how, resumed", [
    ("end", False), ("reset", False), ("end", True)],
    ids=["end", "reset", "resumed"])
def test_homeserver_over_tls(how, resumed, dns):
    """Records, handshake and reply: 401, or all came."""
    cert = pki().leaf(["*.w.test"])
    with AbruptHomeserver((HOST, 0), tls=cert, sub=by_token) as hs:
        hs.ctx.options |= ssl.OP_NO_TICKET
        hs.kept = []

        def lane(number):
            with Tap((HOST, hs.port), HOST) as tap, quiet(dns) as svc, \
                    unharmed(svc):
                def ask(harmed):
                    name = f"n{number}.w.test" if resumed else fresh()
                    e = Exchange(svc, f"{name}:{tap.port}")
                    e.refused() if harmed() else e.granted()
                    return harmed()
                if resumed:
                    ask(lambda: False)
                return until_whole(number, tap, how, ask)
        assert in_lanes(lane) > (200 if resumed else 1000)
        assert not hs.errors
        assert (hs.resumed > hs.handshakes / 2) == resumed, hs.resumed


@pytest.mark.parametrize("tls, how", [
    (False, "end"), (False, "reset"), (True, "end")],
    ids=["plain end", "plain reset", "tls"])
def test_sfu(tls, how, dns):
    """CreateRoom is tried twice, then 500; no half of a reply is a room."""
    with Homeserver(sub=by_token) as hs, \
            AbruptSfu(CANARY_KEY, CANARY_SECRET) as sfu:
        if tls:
            sfu.ctx = Forgetful(pki().leaf(["localhost"], ["127.0.0.1"]))
        scheme = "wss" if tls else "ws"

        def lane(number):
            with Tap(("127.0.0.1", sfu.port)) as tap, quiet(
                    dns, LIVEKIT_URL=f"{scheme}://127.0.0.1:{tap.port}",
                    LKJWT_FEDERATION_API_URL_OVERRIDES=f"{FULL}={hs.url}"
                    ) as svc, unharmed(svc):
                def ask(harmed):
                    e = Exchange(svc, FULL)
                    if not harmed():
                        e.granted()
                        return False
                    assert e.reply.status == 500, e.reply
                    assert e.reply.errcode == "M_UNKNOWN"
                    return True
                return until_whole(number, tap, how, ask)
        assert in_lanes(lane) > (1000 if tls else 100)
        assert not hs.errors and not sfu.errors


# ---- Redis

class Store(StoreWorld):
    """A redis-server behind a tap, and one service after the other."""

    def __init__(self, server, url, cert):
        # Ports of its own: another lane must not get one in between.
        super().__init__(server, LIVEKIT_JWT_BIND=bind(),
                         LIVEKIT_REDIS_URL=url, **(
            {"LKJWT_CA_FILE": cert.pki.ca_file, "LKJWT_CA_ONLY": "true"}
            if cert else {}))

    def __enter__(self):
        return self

    def start(self):
        """False: Redis was not there, which was told, with exit status 1."""
        self.store.db.flushall()    # an ended one's leases live for 4 s
        try:
            self.serve()
        except StartFailed:
            told = self.svc.log_text()
            assert self.svc._proc.returncode == 1, told
            assert "LIVEKIT_REDIS_URL" in told, told
            return False
        return True

    def life(self):
        """One job from its delegation to its end; all of it stored."""
        job = self.job().connected()
        self.stored(job, Connected=True)
        job.left().sent()
        self.erased(job)
        assert self.leaves() == 0 and not bugs(self.svc)
        self.end()


def redis_lane(kind, number, cert):
    """commands, events: one connection is cut once, at any time of its life.
    tls: the first one is, until the service gets to serve."""
    cut = []
    with RedisServer(tls=cert) as server, Tap(("127.0.0.1", (
            server.tls_port if cert else server.port))) as tap:
        url = f"redis{'s' if cert else ''}://127.0.0.1:{tap.port}"
        with Store(server, url, cert) as world:
            n, whole = number, 0
            while whole < 3:
                before = len(tap.harmed)
                first = tap.connections + (2 if kind == "events" else 1)
                tap.plan = lambda c: (n, "end") if c == first else None
                started = world.start()
                if started:
                    world.life()
                harmed = len(tap.harmed) > before
                assert started or harmed
                over = started if cert else not harmed
                whole = whole + 1 if over else 0
                cut += [n] if harmed else []
                n += LANES
    return cut


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["commands", "events", "tls"])
def test_redis(kind, pki):
    """At the start: told and ended, or a second try. Later: the job goes on,
    and what was not written is written when Redis is back."""
    cert = pki.leaf(ips=["127.0.0.1"]) if kind == "tls" else None
    assert in_lanes(lambda n: redis_lane(kind, n, cert)) > 1000


# ---- DNS

def answer(rec):
    """An alias and three addresses; nothing of the alias itself."""
    r, to = rec.reply(), "to.cut.test"
    if str(rec.q.qname) == to + ".":
        return r.pack()
    r.add_answer(RR(rec.q.qname, QTYPE.CNAME, rdata=dnslib.CNAME(to), ttl=60))
    if rec.q.qtype == QTYPE.A:
        for last in (140, 141, 142):
            r.add_answer(RR(to, QTYPE.A, rdata=dnslib.A(PUB % last), ttl=60))
    return r.pack()


def cut_of(rec):
    """Where to cut is part of the name: n77.cut.test."""
    label = str(rec.q.qname)[1:].partition(".")[0]
    return int(label) if label.isdigit() else None


def by_udp():
    dns = Dns()
    dns.any_hook = lambda data, rec, t: answer(rec)[:cut_of(rec)]
    return dns


def by_tcp():
    def talk(conn, rec):
        wire = answer(rec)
        conn.sendall((struct.pack("!H", len(wire)) + wire)[:cut_of(rec)])
    return TcpDns(talk)


@pytest.mark.parametrize("make, more", [(by_udp, 0), (by_tcp, 2)],
                         ids=["udp", "tcp"])
def test_dns(make, more):
    """Half an answer is none."""
    pub(140, 141, 142)
    question = dnslib.DNSRecord.question
    whole = more + max(len(answer(question(f"n{n}.cut.test")))
                       for n in (0, 10, 100))
    with make() as dns, Homeserver(
            (HOST, 0), tls=pki().leaf(["*.cut.test"]), sub=by_token) as hs, \
            lkjwt(dns, LKJWT_LOOKUP_TIMEOUT_S="3",
                  LKJWT_METRICS_BIND=bind()) as svc, unharmed(svc):
        def ask(n):
            e = Exchange(svc, f"n{n}.cut.test:{hs.port}")
            size = more + len(answer(question(f"n{n}.cut.test")))
            e.granted() if n >= size else e.refused("address")
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(ask, range(whole + 2)))


# ---- well-known

def test_well_known(dns):
    """A cut one is none: the name itself is asked, at 8448."""
    to = f"{PUB % 141}:8448"
    pub(140, 141)
    body = json.dumps({"m.server": to}).encode()
    kinds = [Reply(200, body).wire(),
             b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
             + chunked(body), b"HTTP/1.0 200 OK\r\n\r\n" + body]

    def well_known(req):
        kind, n = map(int, req.host[1:].partition(".")[0].split("-"))
        return Reply(raw=kinds[kind][:n], close=True,
                     dirty=n < len(kinds[kind]) and n % 2 == 1)
    with Homeserver([(HOST, 443), (HOST, 8448), (PUB % 141, 8448)],
                    tls=pki().leaf(["*.w.test"], [PUB % 141]), sub=by_token,
                    well_known=well_known) as hs, \
            quiet(dns) as svc, unharmed(svc):
        def ask(case):
            kind, n = case
            name = f"w{kind}-{n}.w.test"
            Exchange(svc, name).granted()
            asked = [r for r in hs.asked()
                     if r.query["access_token"].endswith(f".{name}")]
            whole = n == len(kinds[kind])
            assert [r.addr for r in asked] == [
                (PUB % 141 if whole else HOST, 8448)], (case, asked)
        with ThreadPoolExecutor(LANES) as pool:
            list(pool.map(ask, [(k, n) for k, wire in enumerate(kinds)
                                for n in range(len(wire) + 1)]))


# ---- delegated leaves

def at_each_byte(reply, scene):
    """scene(job, cut reply) for each cut, all at once; every job ends."""
    wire = reply.wire()
    with World(8) as world, unharmed(world.svc):
        with ThreadPoolExecutor(64) as pool:
            list(pool.map(lambda n: scene(world.job(), Reply(
                raw=wire[:n], close=True)), range(len(wire))))
        assert world.leaves() == 0


def not_there(job, cut):
    looked = len(job.connected().looked())
    job.presence(cut, cut, NOT_FOUND).left("SIGNAL_CLOSE", absent=False)
    job.sent()
    assert len(job.looked()) - looked >= 3


def there(job, cut):
    looked = len(job.connected().looked())
    job.presence(cut, cut, participant(job.hashed))
    job.left("SIGNAL_CLOSE", absent=False).wait_looked(looked + 3)
    job.never_sent().left().sent()


def restart(job, cut):
    job.script("restart", cut, Reply(200, {}))
    job.connected().restarted(2)
    job.never_sent().left().sent()


def send(job, cut):
    job.script("send", cut, Reply(200, {}))
    job.connected().left().sent(2)
    job.ended()


LEAVES = {  # what is cut, scene
    "participant not found": (NOT_FOUND, not_there),
    "participant": (participant("x" * 43), there),
    "restart": (Reply(200, {}), restart),
    "send": (Reply(200, {}), send),
}


@pytest.mark.parametrize("reply, scene", LEAVES.values(), ids=LEAVES)
def test_delegated_leave(reply, scene):
    """The SFU's and the homeserver's halves of replies decide nothing: who is
    connected gets no leave, who left gets one, once it is confirmed."""
    at_each_byte(reply, scene)
