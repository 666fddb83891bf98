"""Toxic peers: silent, a byte a second, without end, of a wrong length. The
deadlines are the ones a release has. All scenes play at once, each with a
service of its own: the right failure, an exchange that works, and a service
at rest."""
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import dnslib
import pytest
from dnslib import QTYPE, RR

from leave import NOT_FOUND, LeaveSfu, World
from outbound import FULL, PUB, Exchange, by_token, fresh, lkjwt, pki, pub
from peers import (HANG, SUB_PATH, WELL_KNOWN, Dns, Homeserver, Reply, Sfu,
                   protobuf_encode)
from service import CANARY_KEY, CANARY_SECRET
from store import LONG, RedisServer, StoreWorld
from tap import Forgetful, Tap, TcpDns, bind, unharmed

SCENES = {}


def scene(rows):
    """The function below plays once for each row: {id: arguments}."""
    def register(f):
        for name, row in rows.items():
            SCENES[f"{f.__name__}: {name}"] = lambda row=row: f(*row)
        return f
    return register


@pytest.fixture(scope="module")
def played(request):
    """The scenes that this run asks for."""
    pub(*range(150, 220))
    pki()                       # one, before there are threads
    wanted = [i.callspec.params["title"] for i in request.session.items
              if i.originalname == "test_toxic"]
    with ThreadPoolExecutor(40) as pool:
        yield {title: pool.submit(SCENES[title]) for title in wanted}


# ---- replies

class Endless(Reply):
    """first, then piece again and again, pause seconds apart."""

    def __init__(self, first, piece, pause=0):
        super().__init__()
        self.first, self.piece, self.pause = first, piece, pause


class Toxic:
    """A scripted server that can also answer without end."""

    def _send(self, conn, reply):
        if not isinstance(reply, Endless):
            return super()._send(conn, reply)
        conn.sendall(reply.first)
        while not self.stopping:
            conn.sendall(reply.piece)
            time.sleep(reply.pause)
        return False


class ToxicHomeserver(Toxic, Homeserver):
    pass


class ToxicSfu(Toxic, LeaveSfu):
    pass


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BIG = b"x" * 4096


def head(body, more=0):
    return OK + b"Content-Length: %d\r\n\r\n" % (len(body) + more)


REPLIES = {  # from the body of the right reply
    "silence": lambda body: Reply(raw=b"", hang=True),
    "half a head": lambda body: Reply(raw=head(body)[:20], hang=True),
    "half a body": lambda body: Reply(raw=head(body) + body[:-1], hang=True),
    "a body of a wrong length": lambda body: Reply(
        raw=head(body, 1) + body, hang=True),
    "a byte a second": lambda body: Reply(200, body, step=1, pause=1),
    "a head, then a byte a second": lambda body: Endless(
        head(body, 5000) + body, b" ", 1),
    "a field a second": lambda body: Endless(OK, b"X: y\r\n", 1),
    "a chunk a second": lambda body: Endless(CHUNKED, b"1\r\n \r\n", 1),
    "endless body": lambda body: Endless(OK + b"\r\n" + body, BIG),
    "endless chunks": lambda body: Endless(
        CHUNKED, b"1000\r\n%s\r\n" % BIG),
    "endless tiny chunks": lambda body: Endless(CHUNKED, b"1\r\n \r\n" * 999),
    "endless chunk": lambda body: Endless(CHUNKED + b"7fffffff\r\n", BIG),
    "endless chunk extension": lambda body: Endless(CHUNKED + b"1;", BIG),
    "endless trailer": lambda body: Endless(
        CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(body), body), b"X: y\r\n" * 99),
    "endless head": lambda body: Endless(OK, b"X: y\r\n" * 99),
    "endless field": lambda body: Endless(OK + b"X: ", BIG),
    "endless start line": lambda body: Endless(OK[:-2], BIG),
    "endless interim replies": lambda body: Endless(
        b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 99),
    "endless empty lines": lambda body: Endless(b"", b"\r\n" * 999),
}
SUB = b'{"sub":"@alice:%s"}'


def expected(make):
    """What is too slow meets the deadline, what is too much the limit."""
    name = next(k for k, v in REPLIES.items() if v is make)
    return ({"REPLY_LIMIT", "REPLY_BAD"} if name.startswith("endless")
            else "HS_TIMEOUT")


ROOM = protobuf_encode((1, "RM_abcdefghijkl"), (2, "x" * 43))


@scene({f"{name}{', TLS' if tls else ''}": (make, tls)
        for name, make in REPLIES.items() for tls in (False, True)})
def userinfo(make, tls):
    """The one 401, at the step http, and the right event."""
    with ToxicHomeserver((PUB % 150, 0), sub=by_token, tls=(
            pki().leaf(ips=[PUB % 150]) if tls else None)) as hs:
        name = hs.netloc
        with lkjwt(LKJWT_METRICS_BIND=bind(), **({} if tls else {
                "LKJWT_FEDERATION_API_URL_OVERRIDES": f"{name}={hs.url}"})
                   ) as svc, unharmed(svc):
            Exchange(svc, name).granted()
            hs.on(SUB_PATH, make(SUB % name.encode()))
            Exchange(svc, name).refused("http", event=expected(make))
            hs.off()
            Exchange(svc, name).granted()
        assert not hs.errors


@scene({f"{name}{', TLS' if tls else ''}": (make, tls)
        for name, make in REPLIES.items() for tls in (False, True)})
def create_room(make, tls):
    """500, within the time of one call: a client gets an answer."""
    with Homeserver(sub=by_token) as hs, ToxicSfu() as sfu:
        if tls:
            sfu.ctx = Forgetful(pki().leaf(ips=["127.0.0.1"]))
        with lkjwt(LIVEKIT_URL=f"{'wss' if tls else 'ws'}://{sfu.netloc}",
                   LKJWT_METRICS_BIND=bind(),
                   LKJWT_FEDERATION_API_URL_OVERRIDES=f"{FULL}={hs.url}",
                   ) as svc, unharmed(svc):
            Exchange(svc, FULL).granted()
            sfu.fail = make(ROOM)
            e = Exchange(svc, FULL)
            assert (e.reply.status, e.reply.errcode) == (500, "M_UNKNOWN")
            sfu.fail = None
            Exchange(svc, FULL).granted()
        assert not hs.errors and not sfu.errors


def every_name(data, rec, transport):
    """a160.w.test is the address with that last number."""
    r = rec.reply()
    if rec.q.qtype == QTYPE.A:
        number = int(str(rec.q.qname)[1:].partition(".")[0].partition("-")[0])
        r.add_answer(RR(rec.q.qname, QTYPE.A, rdata=dnslib.A(PUB % number),
                        ttl=60))
    return r


def further(req):
    """A redirect that always leads to another path."""
    n = int(req.path.rpartition("/")[2]) if req.path[1:].isdigit() else 0
    return Reply(302, "", [("Location", f"/{n + 1}")])


def to_and_fro(req):
    """From name to name and back, each time another path."""
    name, _, rest = req.host.partition(".")
    name = name[:-2] if name.endswith("-x") else name + "-x"
    return Reply(302, "", [("Location", f"https://{name}.{rest}{req.path}x")])


REDIRECTS = {"endless redirects": further,
             "endless redirects between two": to_and_fro}


@scene({name: (n, make) for n, (name, make) in enumerate([
    *REPLIES.items(), *((k, lambda body, v=v: v)
                        for k, v in REDIRECTS.items())], 160)})
def well_known(number, make):
    """As if there were none: the name itself is asked, at 8448."""
    with Dns() as dns, ToxicHomeserver(
            [(PUB % number, 443), (PUB % number, 8448)], sub=by_token,
            tls=pki().leaf(["*.w.test"], [PUB % number])) as hs, \
            lkjwt(dns, LKJWT_METRICS_BIND=bind()) as svc, unharmed(svc):
        dns.any_hook = every_name
        bad = make(b'{"m.server":"%s:8448"}' % (PUB % number).encode())
        name = f"a{number}.w.test"
        if callable(bad):           # whatever path is asked
            hs.answer = lambda req: (
                bad(req) if req.addr[1] == 443
                else Homeserver.answer(hs, req))
        else:
            hs.on(WELL_KNOWN, bad)
        Exchange(svc, name).granted()
        asked, = hs.asked()
        assert (asked.addr, asked.host) == ((PUB % number, 8448), name)
        assert len(hs.seen()) <= 6
        Exchange(svc, f"a{number}-2.w.test:8448").granted()


# ---- TLS

def again(piece, pause=0):
    """The piece over and over, in place of the peer."""
    def talk(conn):
        conn.settimeout(HANG)
        until = time.monotonic() + LONG
        while time.monotonic() < until:
            conn.sendall(piece)
            time.sleep(pause)
    return talk


RECORDS = {  # after so many bytes of the peer: what then
    **{f"silence after {n}": (n, "hold") for n in (0, 1, 5, 60, 500)},
    **{f"a byte a second after {n}": (n, "drip") for n in (0, 5, 60, 500)},
    "endless warnings": (0, again(b"\x15\x03\x03\0\2\1\x70" * 500)),
    "endless empty records": (0, again(b"\x16\x03\x03\0\0" * 500)),
    "endless hello requests": (0, again(b"\x16\x03\x03\0\4\0\0\0\0" * 500)),
    "a hello request a second": (0, again(b"\x16\x03\x03\0\4\0\0\0\0", 1)),
    "endless certificate": (0, again(
        b"\x16\x03\x03\x40\0\x0b\xff\xff\xff" + bytes(16380))),
    "endless server hello": (0, again(
        b"\x16\x03\x03\x40\0\2\xff\xff\xff" + bytes(16380))),
    "endless nonsense": (0, again(b"\xa5" * 4096)),
    "endless plain data": (0, again(b"\x17\x03\x03\x10\0" + BIG)),
    "endless warnings after 60": (60, again(
        b"\x15\x03\x03\0\2\1\x70" * 500)),
    "endless records of one byte after 60": (60, again(
        b"\x16\x03\x03\0\1\0" * 500)),
}


@scene({name: (190 + n, plan) for n, (name, plan)
        in enumerate(RECORDS.items())})
def handshake(number, plan):
    """The one 401, at the step tls."""
    with Homeserver((PUB % number, 0), sub=by_token, tls=pki().leaf(
            ips=[PUB % number])) as hs, \
            Tap(hs.addrs[0], PUB % number, plan=lambda n: plan) as tap, \
            lkjwt(LKJWT_METRICS_BIND=bind()) as svc, unharmed(svc):
        Exchange(svc, tap.netloc).refused("tls")
        assert tap.harmed
        tap.plan = None
        Exchange(svc, tap.netloc).granted()


@scene({name: (plan,) for name, plan in RECORDS.items()})
def handshake_of_the_sfu(plan):
    with Homeserver(sub=by_token) as hs, Sfu(
            CANARY_KEY, CANARY_SECRET,
            tls=pki().leaf(ips=["127.0.0.1"])) as sfu, \
            Tap(("127.0.0.1", sfu.port), plan=lambda n: plan) as tap, \
            lkjwt(LIVEKIT_URL=f"wss://127.0.0.1:{tap.port}",
                  LKJWT_METRICS_BIND=bind(),
                  LKJWT_FEDERATION_API_URL_OVERRIDES=f"{FULL}={hs.url}",
                  ) as svc, unharmed(svc):
        e = Exchange(svc, FULL)
        assert (e.reply.status, e.reply.errcode) == (500, "M_UNKNOWN")
        assert tap.harmed
        tap.plan = None
        Exchange(svc, FULL).granted()


# ---- DNS

def framed(*packets):
    return b"".join(struct.pack("!H", len(p)) + p for p in packets)


def right(rec):
    r = rec.reply()
    if rec.q.qtype == QTYPE.A:
        r.add_answer(RR(rec.q.qname, QTYPE.A, rdata=dnslib.A(PUB % 151),
                        ttl=60))
    return r.pack()


def wrong_id(rec):
    p = right(rec)
    return bytes([p[0] ^ 1]) + p[1:]


def slowly(wire):
    def talk(conn):
        for i in range(len(wire)):
            conn.sendall(wire[i:i + 1])
            time.sleep(1)
    return talk


def then_wait(wire):
    def talk(conn):
        conn.sendall(wire)
        time.sleep(HANG)
    return talk


TCP = {  # from the question: what goes on with the connection
    "silence": lambda rec: then_wait(b""),
    "half a length": lambda rec: then_wait(b"\0"),
    "half an answer": lambda rec: then_wait(framed(right(rec))[:-1]),
    "a byte a second": lambda rec: slowly(framed(right(rec))),
    "endless answers with a wrong id": lambda rec: again(
        framed(wrong_id(rec)) * 50),
    "an answer with a wrong id a second": lambda rec: again(
        framed(wrong_id(rec)), 1),
    "endless empty answers": lambda rec: again(bytes(2000)),
    "endless answer": lambda rec: again(b"\xff\xff" + bytes(65535)),
    "a length too large by one": lambda rec: then_wait(
        struct.pack("!H", len(right(rec)) + 1) + right(rec)),
    "a length too small by one": lambda rec: then_wait(
        struct.pack("!H", len(right(rec)) - 1) + right(rec)),
    "a length of 65535": lambda rec: then_wait(b"\xff\xff" + right(rec)),
    "a length of 12": lambda rec: then_wait(b"\0\x0c" + right(rec)),
}


@scene({name: (talk,) for name, talk in TCP.items()})
def dns_by_tcp(talk):
    """The one 401, at the step address."""
    with TcpDns(lambda conn, rec: talk(rec)(conn)) as dns:
        without_addresses(dns)


def without_addresses(dns):
    with Homeserver((PUB % 151, 0), sub=by_token,
                    tls=pki().leaf(["*.w.test"])) as hs, \
            lkjwt(dns, LKJWT_METRICS_BIND=bind()) as svc, unharmed(svc):
        Exchange(svc, f"{fresh()}:{hs.port}").refused("address")
        assert not hs.accepted
        dns.any_hook = lambda data, rec, transport: right(rec)
        Exchange(svc, f"{fresh()}:{hs.port}").granted()


def further_alias(data, rec, transport):
    """Each alias leads to one more."""
    r = rec.reply()
    r.add_answer(RR(rec.q.qname, QTYPE.CNAME, ttl=60,
                    rdata=dnslib.CNAME(fresh("alias.test"))))
    return r


class Flood:
    """A nameserver that answers each question with so much of this that it
    never ends, from the right address."""

    def __init__(self, make, pause=0):
        self.make, self.pause = make, pause

    def __call__(self, dns):
        def hook(data, rec, transport):
            until = time.monotonic() + 6
            while time.monotonic() < until and dns.running:
                dns.udp.sendto(self.make(rec), rec.peer)
                time.sleep(self.pause)
        return hook


UDP = {
    "endless aliases": lambda dns: further_alias,
    "endless answers with a wrong id": Flood(wrong_id),
    "endless answers to another question": Flood(
        lambda rec: right(dnslib.DNSRecord.question("other.w.test"))),
    "endless empty datagrams": Flood(lambda rec: b""),
    "a byte a second": Flood(lambda rec: b"\0", 1),
    "endless questions back": Flood(lambda rec: rec.pack()),
}


@scene({name: (make,) for name, make in UDP.items()})
def dns_by_udp(make):
    with Dns() as dns:
        dns.any_hook = make(dns)
        without_addresses(dns)
        assert dns.count() <= 40, "questions without end"


# ---- delegated leaves and Redis

@scene({kind: (kind,) for kind in ("hold", "drip")})
def slow_redis(kind):
    """Default deadlines: within 3 s without a whole reply it is away. The
    client has its 200, the job goes on, and all is stored in the end."""
    with RedisServer() as server, Tap(("127.0.0.1", server.port)) as tap, \
            StoreWorld(server, LIVEKIT_REDIS_URL=
                       f"redis://127.0.0.1:{tap.port}") as world, \
            unharmed(world.svc):
        tap.harm(0, kind)
        job = world.job().connected()
        world.wait_metric("redis_up", 0)
        assert tap.harmed
        world.wait_metric("redis_up", 1)
        world.stored(job, Connected=True)
        job.left().sent()
        world.erased(job)
        world.wait_metric("redis_unsaved", 0)


@scene({name: (make,) for name, make in REPLIES.items()})
def participant_looked_for(make):
    """Presence is unknown, never "absent": confirmed before a leave."""
    with World() as world, unharmed(world.svc):
        world.sfu.__class__ = ToxicSfu
        job = world.job().connected()
        looked = len(job.looked())
        job.presence(make(NOT_FOUND.body), NOT_FOUND)
        job.left("SIGNAL_CLOSE", absent=False).sent()
        assert len(job.looked()) - looked >= 2


@pytest.mark.parametrize("title", SCENES)
def test_toxic(played, title):
    played[title].result()
