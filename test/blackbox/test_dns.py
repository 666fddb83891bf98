"""The stub resolver (SECURITY.md T21, S20): what it asks, whom it believes, what it remembers.

Server names carry a port, so a look-up is A and AAAA alone unless the test is about SRV. A trap listens
where forged answers point: nothing may connect to it.
"""
import os
import random
import shutil
import socket
import struct
import time

import dnslib
import pytest
from dnslib import QTYPE, RCODE, RR

from outbound import Exchange, by_token, fresh, lkjwt, outbound_env, pki, pub, PUB, PUB6, text_file
from peers import Dns, Homeserver, wait_for
from service import BIN, Service, run_cli

GOOD, TRAP, OTHER, GOOD6 = PUB % 40, PUB % 41, PUB % 42, PUB6 % 40
PORT = 8448


@pytest.fixture(scope="module")
def servers():
    pub(40, 41, 42)
    certs = {"*.dns.test": pki().leaf(["*.dns.test"]), None: pki().leaf(["intranet"], ips=[GOOD])}
    good = Homeserver([(GOOD, PORT), (GOOD6, PORT), (GOOD, 8450)], tls=certs, sub=by_token)
    trap = Homeserver([(TRAP, PORT)], tls=certs, sub=by_token)
    with good, trap:
        yield good, trap


@pytest.fixture
def hs(servers):
    good, trap = servers
    good.forget()
    good.close_each = False
    yield good
    assert trap.connections == 0 and not good.errors


@pytest.fixture
def dns(hs):
    with Dns() as d:
        yield d


@pytest.fixture
def svc(dns):
    with lkjwt(dns, LKJWT_LOOKUP_TIMEOUT_S="5") as s:
        yield s


def name_port(dns, *rrs, port=PORT):
    """A fresh name with these records; name:port."""
    n = fresh("dns.test")
    dns.add("".join(f"{n}. {rr}\n" for rr in rrs))
    return n, f"{n}:{port}"


# ---- the hosts file -------------------------------------------------------------------------------

HOSTS = {
    "plain": f"{GOOD} h.dns.test\n",
    "tabs": f"{GOOD}\t\th.dns.test\t\n",
    "alias": f"{GOOD} other.dns.test h.dns.test third\n",
    "comment-lines": f"# {TRAP} h.dns.test\n\n   # x\n{GOOD} h.dns.test # {TRAP}\n",
    "comment-cuts-names": f"{TRAP} x.dns.test # h.dns.test\n{GOOD} h.dns.test\n",
    "case": f"{GOOD} H.DNS.Test\n",
    "crlf": f"{TRAP} x.dns.test\r\n{GOOD} h.dns.test\r\n",
    "no-final-newline": f"{GOOD} h.dns.test",
    "leading-blank": f"  {GOOD} h.dns.test\n",
    "ipv6": f"{GOOD6} h.dns.test\n",
    "both": f"{GOOD6} h.dns.test\n{GOOD} h.dns.test\n",
    "several": f"{OTHER} h.dns.test\n{GOOD} h.dns.test\n",
    "not-a-prefix": f"{TRAP} h.dns.test.x\n{TRAP} xh.dns.test\n{GOOD} h.dns.test\n",
    "bad-lines": f"999.1.1.1 h.dns.test\nfoo\n1.2.3 h.dns.test\n{GOOD}\n:::: h.dns.test\n{GOOD} h.dns.test\n",
    "long-line": f"{TRAP} " + "x" * 5000 + f"\n{GOOD} h.dns.test\n",
    "many-lines": "".join(f"{TRAP} m{i}.dns.test\n" for i in range(2000)) + f"{GOOD} h.dns.test\n",
    "binary": b"\0\xff\xfe\n" + f"{GOOD} h.dns.test\n".encode(),
}


@pytest.mark.parametrize("text", HOSTS.values(), ids=HOSTS)
def test_hosts_file_answers_without_dns(text, hs, dns):
    dns.add(f"h.dns.test. A {TRAP}\n")
    with lkjwt(dns, LKJWT_HOSTS_FILE=text_file(text)) as svc:
        Exchange(svc, f"h.dns.test:{PORT}").granted()
        assert not dns.count() and len(hs.asked()) == 1
        # a name that is not there goes to the nameserver
        _, server = name_port(dns, f"A {GOOD}")
        Exchange(svc, server).granted()
        assert dns.count()


def test_hosts_file_missing_is_as_empty(hs, dns):
    _, server = name_port(dns, f"A {GOOD}")
    with lkjwt(dns, LKJWT_HOSTS_FILE="/nonexistent/hosts") as svc:
        Exchange(svc, server).granted()


def test_hosts_file_serves_every_hop(hs, dns):
    """The name of a well-known and its delegation both come from the file."""
    with Homeserver([(GOOD, 443)], tls={"*.dns.test": pki().leaf(["*.dns.test"])}, well_known="d.dns.test") as web, \
            lkjwt(dns, LKJWT_HOSTS_FILE=text_file(f"{GOOD} h.dns.test d.dns.test\n")) as svc:
        Exchange(svc, "h.dns.test").granted()
        assert len(web.requests) == 1 and hs.asked()[0].host == "d.dns.test"
        assert {q[1] for q in dns.queries} <= {"SRV"}


# ---- which nameserver ------------------------------------------------------------------------------

def test_resolver_forms(hs):
    """ip (port 53), ip:port, IPv6 in brackets with and without port."""
    zone = f"h.dns.test. A {GOOD}\n"
    forms = [("127.0.0.77", 53, "127.0.0.77"), ("127.0.0.1", 0, "127.0.0.1:%d"), ("::1", 0, "[::1]:%d"),
             ("::1", 53, "[::1]"), ("::1", 53, "::1")]
    for addr, port, form in forms:
        with Dns(zone, addr, port) as d, lkjwt(form % d.port if "%" in form else form) as svc:
            Exchange(svc, f"h.dns.test:{PORT}").granted()
            assert d.count("h.dns.test", "A") == 1


def silent(data, rec, transport):
    return None


def rcode(code):
    def answer(data, rec, transport):
        r = rec.reply()
        r.header.rcode = getattr(RCODE, code)
        return r
    return answer


FIRST = {"silent": silent, "servfail": rcode("SERVFAIL"), "refused": rcode("REFUSED"), "notimp": rcode("NOTIMP"),
         "formerr": rcode("FORMERR"), "garbage": lambda *_: b"\0" * 40, "short": lambda *_: b"\0\1\2",
         "nobody": None}


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_next_nameserver(first, hs, dns):
    _, server = name_port(dns, f"A {GOOD}")
    with Dns() as bad:
        bad.any_hook = first
        resolvers = f"{bad.netloc if first else '127.0.0.1:9'},{dns.netloc}"
        with lkjwt(resolvers) as svc:
            Exchange(svc, server).granted()
        assert bad.count() or not first


def test_nxdomain_of_the_first_nameserver_is_final(hs, dns):
    _, server = name_port(dns, f"A {TRAP}")
    with Dns() as first, lkjwt(f"{first.netloc},{dns.netloc}") as svc:
        Exchange(svc, server).refused("address")
        assert first.count() and not dns.count()


def test_at_most_three_nameservers(hs, dns):
    _, server = name_port(dns, f"A {OTHER}")
    with lkjwt("127.0.0.1:9,127.0.0.1:10," + dns.netloc) as svc:
        Exchange(svc, server).refused("connect")
    r = run_cli([], outbound_env("127.0.0.1:9,127.0.0.1:10,127.0.0.1:11," + dns.netloc))
    assert r.code == 1 and "LKJWT_RESOLVER" in r.err


# ---- answers that are not believed -----------------------------------------------------------------

def forged(rec, address=TRAP, **header):
    r = rec.reply()
    for k, v in header.items():
        setattr(r.header, k, v)
    if rec.q.qtype == QTYPE.A:
        r.add_answer(RR(rec.q.qname, QTYPE.A, rdata=dnslib.A(address), ttl=60))
    return r


def other_question(**kw):
    def make(data, rec, dns):
        r = forged(rec)
        r.questions = [dnslib.DNSQuestion(kw.get("qname", rec.q.qname), kw.get("qtype", rec.q.qtype),
                                          kw.get("qclass", rec.q.qclass))]
        return r.pack()
    return make


def from_elsewhere(data, rec, dns):
    """The right answer from another port of the nameserver's address, and from another address."""
    for addr in ("127.0.0.1", "127.0.0.99"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.bind((addr, 0))
            s.sendto(forged(rec).pack(), rec.peer)
    return []


def counts(qd=1, an=1):
    def make(data, rec, dns):
        p = bytearray(forged(rec).pack())
        p[4:8] = struct.pack("!HH", qd, an)
        return bytes(p)
    return make


IGNORED = {
    "wrong-id": lambda data, rec, dns: forged(rec, id=rec.header.id ^ 1).pack(),
    "every-neighbour-id": lambda data, rec, dns: [forged(rec, id=(rec.header.id + i) & 0xffff).pack()
                                                  for i in range(1, 100)],
    "wrong-source": from_elsewhere,
    "a-query": lambda data, rec, dns: forged(rec, qr=0).pack(),
    "echo-of-the-query": lambda data, rec, dns: data,
    "other-name": other_question(qname="evil.dns.test"),
    "longer-name": lambda data, rec, dns: other_question(qname="a." + str(rec.q.qname))(data, rec, dns),
    "shorter-name": lambda data, rec, dns: other_question(qname="dns.test")(data, rec, dns),
    "other-type": other_question(qtype=QTYPE.TXT),
    "other-class": other_question(qclass=3),
    "no-question": counts(qd=0),
    "two-questions": counts(qd=2),
    "empty": lambda data, rec, dns: b"",
    "one-byte": lambda data, rec, dns: data[:1],
    "eleven-bytes": lambda data, rec, dns: forged(rec).pack()[:11],
    "header-only": lambda data, rec, dns: forged(rec).pack()[:12],
    "question-cut": lambda data, rec, dns: forged(rec).pack()[:20],
    "zeros": lambda data, rec, dns: bytes(512),
    "ones": lambda data, rec, dns: b"\xff" * 512,
    "100-packets": lambda data, rec, dns: [os.urandom(64) for _ in range(100)],
}


@pytest.mark.parametrize("forge", IGNORED.values(), ids=IGNORED)
def test_s20_forged_packets_before_the_answer_are_ignored(forge, svc, dns, hs):
    name, server = name_port(dns, f"A {GOOD}")

    def hook(data, rec, transport):
        first = forge(data, rec, dns)
        return (first if isinstance(first, list) else [first]) + [dns.resolve(rec)]
    dns.hook(name, "A", hook)
    Exchange(svc, server).granted()


# ---- answers that are malformed or too much ----------------------------------------------------------

def crafted(answer, an=1):
    """Header and question of the query, then these bytes as the answer section (also for AAAA)."""
    def hook(data, rec, transport):
        end = data.index(b"\0", 12) + 5
        return data[:2] + b"\x81\x80" + struct.pack("!HHHH", 1, an, 0, 0) + data[12:end] + answer
    return hook


def rr(owner, rtype, rdata, ttl=60, rdlength=None):
    return owner + struct.pack("!HHIH", rtype, 1, ttl, len(rdata) if rdlength is None else rdlength) + rdata


def at(data, offset):
    """A compression pointer to that offset of the answer section."""
    return bytes([0xc0, data.index(b"\0", 12) + 5 + offset])


SELF = b"\xc0\x0c"              # pointer to the question name
A_TRAP = socket.inet_aton(TRAP)


def chain(n, address=GOOD):
    """n CNAMEs, then an address."""
    def hook(data, rec, transport):
        r = rec.reply()
        name = str(rec.q.qname)
        for i in range(n):
            r.add_answer(RR(name, QTYPE.CNAME, rdata=dnslib.CNAME(f"c{i}.dns.test"), ttl=60))
            name = f"c{i}.dns.test"
        if rec.q.qtype == QTYPE.A:
            r.add_answer(RR(name, QTYPE.A, rdata=dnslib.A(address), ttl=60))
        return r
    return hook


def cname_loop(*names):
    def hook(data, rec, transport):
        r = rec.reply()
        ring = [str(rec.q.qname), *names]
        for a, b in zip(ring, ring[1:] + ring[:1]):
            r.add_answer(RR(a, QTYPE.CNAME, rdata=dnslib.CNAME(b), ttl=60))
        return r
    return hook


def owner_elsewhere(data, rec, transport):
    r = rec.reply()
    r.add_answer(RR("evil.dns.test", QTYPE.A, rdata=dnslib.A(TRAP), ttl=60))
    return r


def in_section(section):
    def hook(data, rec, transport):
        r = rec.reply()
        getattr(r, section)(RR(rec.q.qname, QTYPE.A, rdata=dnslib.A(TRAP), ttl=60))
        return r
    return hook


def broken_chain(data, rec, transport):
    """The CNAME leads to b, the address belongs to c."""
    r = rec.reply()
    r.add_answer(RR(rec.q.qname, QTYPE.CNAME, rdata=dnslib.CNAME("b.dns.test"), ttl=60))
    r.add_answer(RR("c.dns.test", QTYPE.A, rdata=dnslib.A(TRAP), ttl=60))
    return r


BAD_ANSWERS = {
    "pointer-to-itself": lambda data, rec, t: crafted(rr(at(data, 0), 1, A_TRAP))(data, rec, t),
    "pointer-forward": lambda data, rec, t: crafted(rr(at(data, 2), 1, A_TRAP))(data, rec, t),
    "pointer-beyond": crafted(rr(b"\xff\xff", 1, A_TRAP)),
    "two-pointers-in-a-ring": lambda data, rec, t: crafted(rr(at(data, 2) + at(data, 0), 1, A_TRAP))(data, rec, t),
    "label-type-0x40": crafted(rr(b"\x41a\0", 1, A_TRAP)),
    "label-type-0x80": crafted(rr(b"\x81a\0", 1, A_TRAP)),
    "label-over-the-end": crafted(b"\x3fabc"),
    "name-of-300": crafted(rr(b"\x3f" + b"a" * 63 + (b"\x3f" + b"a" * 63) * 4 + b"\0", 1, A_TRAP)),
    "name-without-end": crafted(b"\x01a" * 100),
    "rdlength-beyond": crafted(rr(SELF, 1, A_TRAP, rdlength=400)),
    "rdlength-65535": crafted(rr(SELF, 1, A_TRAP, rdlength=65535)),
    "a-of-3": crafted(rr(SELF, 1, A_TRAP[:3])),
    "a-of-5": crafted(rr(SELF, 1, A_TRAP + b"x")),
    "a-of-0": crafted(rr(SELF, 1, b"")),
    "record-cut": crafted(rr(SELF, 1, A_TRAP)[:8]),
    "count-65535": crafted(b"", an=65535),
    "count-2-of-1": crafted(rr(SELF, 1, A_TRAP), an=2),
    "cname-pointer-ring": lambda data, rec, t: crafted(rr(SELF, 5, at(data, 12)))(data, rec, t),
    "cname-empty": crafted(rr(SELF, 5, b"")),
    "cname-beyond-rdata": crafted(rr(SELF, 5, b"\x03abc")),
    "cname-to-itself": cname_loop(),
    "cname-loop-2": cname_loop("b.dns.test"),
    "cname-loop-3": cname_loop("b.dns.test", "c.dns.test"),
    "9-cnames": chain(9, TRAP),
    "15-cnames": chain(15, TRAP),
    "owner-elsewhere": owner_elsewhere,
    "authority-section": in_section("add_auth"),
    "additional-section": in_section("add_ar"),
    "broken-chain": broken_chain,
    "other-class": lambda data, rec, t: crafted(SELF + struct.pack("!HHIH", 1, 3, 60, 4) + A_TRAP)(data, rec, t),
    "no-data": rcode("NOERROR"),
    "nxdomain": rcode("NXDOMAIN"),
    "servfail": rcode("SERVFAIL"),
    "refused": rcode("REFUSED"),
    "silence": silent,
}


@pytest.mark.parametrize("hook", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_s20_bad_answers_fail_the_step_address(hook, dns, hs):
    """An A record of a malformed answer is not used, nor does one harm the next look-up."""
    with lkjwt(dns, LKJWT_LOOKUP_TIMEOUT_S="1") as svc:
        bad, good = name_port(dns), name_port(dns, f"A {GOOD}")
        dns.hook(bad[0], "*", hook)
        Exchange(svc, bad[1]).refused("address")
        Exchange(svc, good[1]).granted()


GOOD_ANSWERS = {
    "aaaa-no-data": {"A": None},
    "aaaa-servfail": {"AAAA": rcode("SERVFAIL")},
    "aaaa-nxdomain": {"AAAA": rcode("NXDOMAIN")},
    "aaaa-refused": {"AAAA": rcode("REFUSED")},
    "aaaa-notimp": {"AAAA": rcode("NOTIMP")},
    "aaaa-silent": {"AAAA": silent},
    "aaaa-malformed": {"AAAA": crafted(rr(SELF, 28, b"x" * 15))},
    "cname-1": {"A": chain(1)},
    "cname-8": {"A": chain(8)},
    "cname-last": {"A": lambda data, rec, t: reverse(chain(3)(data, rec, t))},
    "strangers-beside": {"A": lambda data, rec, t: beside(data, rec)},
    "16-records": {"A": lambda data, rec, t: many(rec, 16)},
    "no-compression": {"A": lambda data, rec, t: crafted(rr(data[12:data.index(b"\0", 12) + 1], 1,
                                                             socket.inet_aton(GOOD)))(data, rec, t)},
    "extra-types": {"A": lambda data, rec, t: crafted(
        rr(SELF, 46, b"x" * 30) + rr(SELF, 16, b"\3abc") + rr(SELF, 1, socket.inet_aton(GOOD)), an=3)(data, rec, t)},
    "edns": {"A": lambda data, rec, t: edns(data, rec)},
    "authoritative": {"A": lambda data, rec, t: flags(rec, aa=1, ad=1, ra=0)},
    "ttl-0": {"A": lambda data, rec, t: crafted(rr(SELF, 1, socket.inet_aton(GOOD), ttl=0))(data, rec, t)},
    "ttl-top-bit": {"A": lambda data, rec, t: crafted(rr(SELF, 1, socket.inet_aton(GOOD), ttl=1 << 31))(data, rec, t)},
    "slow": {"A": lambda data, rec, t: (time.sleep(0.3), honest(rec))[1]},
    "lost-once": {"A": None},
}


def honest(rec, address=GOOD):
    return forged(rec, address)


def reverse(r):
    r.rr.reverse()
    return r


def beside(data, rec):
    r = rec.reply()
    r.add_answer(RR("evil.dns.test", QTYPE.A, rdata=dnslib.A(TRAP), ttl=60))
    r.add_answer(RR(rec.q.qname, QTYPE.A, rdata=dnslib.A(GOOD), ttl=60))
    r.add_answer(RR("x." + str(rec.q.qname), QTYPE.A, rdata=dnslib.A(TRAP), ttl=60))
    r.add_auth(RR(rec.q.qname, QTYPE.A, rdata=dnslib.A(TRAP), ttl=60))
    r.add_ar(RR(rec.q.qname, QTYPE.A, rdata=dnslib.A(TRAP), ttl=60))
    return r


def many(rec, n):
    r = rec.reply()
    for _ in range(n):
        r.add_answer(RR(rec.q.qname, QTYPE.A, rdata=dnslib.A(GOOD), ttl=60))
    return r


def edns(data, rec):
    r = honest(rec)
    r.add_ar(dnslib.EDNS0(udp_len=1232))
    return r


def flags(rec, **kw):
    r = honest(rec)
    for k, v in kw.items():
        setattr(r.header, k, v)
    return r


@pytest.mark.parametrize("hooks", GOOD_ANSWERS.values(), ids=GOOD_ANSWERS)
def test_good_answers(hooks, svc, dns, hs, request):
    name, server = name_port(dns, f"A {GOOD}")
    for rtype, hook in hooks.items():
        if hook:
            dns.hook(name, rtype, hook)
    if "lost-once" in request.node.name:
        dns.hook(name, "*", lambda data, rec, t: dns.resolve(rec) if dns.count(name) > 2 else None)
    Exchange(svc, server).granted()
    assert len(hs.asked()) == 1


def test_chain_that_comes_one_alias_at_a_time(svc, dns, hs):
    """A nameserver that does not follow CNAMEs is asked again for the target, as long as that leads on."""
    name, server = name_port(dns)
    for i, n in enumerate([name, "s1.dns.test", "s2.dns.test", "s3.dns.test"]):
        def alias(data, rec, transport, target=f"s{i + 1}.dns.test"):
            r = rec.reply()
            r.add_answer(RR(rec.q.qname, QTYPE.CNAME, rdata=dnslib.CNAME(target), ttl=60))
            return r
        dns.hook(n, "*", alias)
    dns.add(f"s4.dns.test. A {GOOD}\n")
    Exchange(svc, server).granted()
    # and a ring of such answers ends
    def ring(data, rec, transport):
        r = rec.reply()
        r.add_answer(RR(rec.q.qname, QTYPE.CNAME, rdata=dnslib.CNAME("s1.dns.test"), ttl=60))
        return r
    dns.hook("s3.dns.test", "*", ring)
    name, server = name_port(dns)
    dns.hook(name, "*", ring)
    dns.forget()
    Exchange(svc, server).refused("address")
    assert dns.count() <= 2 * 10


def test_s20_mutated_answers(dns, hs):
    """Answers with bytes changed at random: no crash, no trap, and the service goes on."""
    rng = random.Random(20)
    with lkjwt(dns, LKJWT_LOOKUP_TIMEOUT_S="1", LIVEKIT_LOG_LEVEL="error") as svc:
        for _ in range(300):
            name, server = name_port(dns, f"CNAME x.{fresh('dns.test')}.")

            def mutate(data, rec, transport):
                r = rec.reply()
                r.add_answer(RR(name, QTYPE.CNAME, rdata=dnslib.CNAME("a.dns.test"), ttl=60))
                for _ in range(3):
                    r.add_answer(RR("a.dns.test", rec.q.qtype, ttl=60, rdata=(
                        dnslib.A(GOOD) if rec.q.qtype == QTYPE.A else dnslib.AAAA(GOOD6))))
                p = bytearray(r.pack())
                for _ in range(rng.randint(1, 4)):      # behind the id, so that the packet is looked at
                    p[rng.randrange(2, len(p))] = rng.choice([0, 1, 0x3f, 0xc0, 0xff, rng.randrange(256)])
                return [bytes(p[:rng.choice([len(p), len(p), rng.randrange(len(p))])]), rec.reply()]
            dns.hook(name, "*", mutate)
            assert Exchange(svc, server).reply.status in (200, 401)
        _, server = name_port(dns, f"A {GOOD}")
        Exchange(svc, server).granted()


# ---- truncation ---------------------------------------------------------------------------------------

def truncated(dns, keep):
    """UDP: TC set, with the trap as what fitted, or nothing; TCP: the honest answer."""
    def hook(data, rec, transport):
        if transport == "tcp":
            return dns.resolve(rec)
        r = forged(rec) if keep else rec.reply()
        r.header.tc = 1
        return r
    return hook


@pytest.mark.parametrize("keep", [False, True], ids=["empty", "partial"])
@pytest.mark.parametrize("step", [0, 1], ids=["whole", "byte-by-byte"])
def test_truncated_answer_is_asked_by_tcp(keep, step, svc, dns, hs):
    dns.tcp_step = step
    name, server = name_port(dns, f"A {GOOD}")
    dns.hook(name, "*", truncated(dns, keep))
    Exchange(svc, server).granted()
    assert {"udp", "tcp"} == {q[2] for q in dns.queries if q[1] == "A"}


BAD_TCP = {
    "no-answer": lambda data, rec: None,
    "wrong-id": lambda data, rec: forged(rec, id=rec.header.id ^ 1),
    "other-question": lambda data, rec: other_question(qname="evil.dns.test")(data, rec, None),
    "truncated-again": lambda data, rec: flags_trap(rec),
    "garbage": lambda data, rec: b"\0" * 30,
    "empty": lambda data, rec: b"",
}


def flags_trap(rec):
    r = forged(rec)
    r.header.tc = 1
    return r


@pytest.mark.parametrize("tcp", BAD_TCP.values(), ids=BAD_TCP)
def test_bad_tcp_answers(tcp, dns, hs):
    with lkjwt(dns, LKJWT_LOOKUP_TIMEOUT_S="1") as svc:
        name, server = name_port(dns)
        dns.hook(name, "*", lambda data, rec, t: tcp(data, rec) if t == "tcp" else truncated(dns, False)(data, rec, t))
        Exchange(svc, server).refused("address")
        _, good = name_port(dns, f"A {GOOD}")
        Exchange(svc, good).granted()


# ---- SRV: what "no record" is -------------------------------------------------------------------------

SRV_ROWS = {
    # how _matrix-fed answers -> the port where the exchange ends up (8450: _matrix._tcp was asked)
    "nxdomain": (rcode("NXDOMAIN"), 8450), "no-data": (rcode("NOERROR"), 8450),
    "servfail": (rcode("SERVFAIL"), 8448), "refused": (rcode("REFUSED"), 8448), "notimp": (rcode("NOTIMP"), 8448),
    "silent": (silent, 8448),
    "rdata-cut": (crafted(rr(SELF, 33, b"\0\1\0\1\x21")), 8448),
    "target-ring": (lambda data, rec, t: crafted(rr(SELF, 33, b"\0\1\0\1\x21\x02" + at(data, 18)))(
        data, rec, t), 8448),
}


@pytest.mark.parametrize("row", SRV_ROWS.values(), ids=SRV_ROWS)
def test_srv_errors(row, dns, hs):
    hook, port = row
    name = fresh("dns.test")
    dns.add(f"{name}. A {GOOD}\n_matrix._tcp.{name}. SRV 1 1 8450 {name}.\n")
    dns.hook(f"_matrix-fed._tcp.{name}", "SRV", hook)
    with lkjwt(dns) as svc:
        Exchange(svc, name).granted()
    asked, = hs.asked()
    assert asked.addr == (GOOD, port) and asked.host == name


def test_srv_record_of_port_0_is_none(dns, hs):
    name = fresh("dns.test")
    dns.add(f"{name}. A {GOOD}\n_matrix-fed._tcp.{name}. SRV 1 1 0 {name}.\n_matrix-fed._tcp.{name}. SRV 2 1 8450 {name}.\n")
    with lkjwt(dns) as svc:
        Exchange(svc, name).granted()
        assert hs.asked()[0].addr == (GOOD, 8450)


def test_srv_at_most_four_targets(dns, hs):
    """Five targets by priority: the fourth works, the fifth is never tried."""
    def zone(name, working):
        return f"{name}. A {GOOD}\n" + "".join(
            f"_matrix-fed._tcp.{name}. SRV {i} 1 {PORT if i == working else 8499} {name}.\n" for i in range(1, 6))
    fourth, fifth = fresh("dns.test"), fresh("dns.test")
    dns.add(zone(fourth, 4) + zone(fifth, 5))
    with lkjwt(dns) as svc:
        Exchange(svc, fourth).granted()
        Exchange(svc, fifth).refused("connect")
        assert len(hs.asked()) == 1


def test_srv_cname_and_glue(dns, hs):
    """An SRV name that is an alias works; addresses in the additional section are not believed."""
    name = fresh("dns.test")
    dns.add(f"{name}. A {GOOD}\n_matrix-fed._tcp.{name}. CNAME _srv.dns.test.\n"
            f"_srv.dns.test. SRV 1 1 8450 real.dns.test.\nreal.dns.test. A {GOOD}\n")

    def glue(data, rec, transport):
        r = dns.resolve(rec)
        r.add_ar(RR("real.dns.test", QTYPE.A, rdata=dnslib.A(TRAP), ttl=60))
        return r
    dns.hook(f"_matrix-fed._tcp.{name}", "SRV", glue)
    with lkjwt(dns) as svc:
        Exchange(svc, name).granted()
        assert hs.asked()[0].addr == (GOOD, 8450)


# ---- caches -------------------------------------------------------------------------------------------

def test_positive_cache(svc, dns, hs):
    """Each exchange dials anew, but asks nobody: the first answer holds for its TTL."""
    hs.close_each = True
    name, server = name_port(dns, f"A {GOOD}")
    for _ in range(5):
        Exchange(svc, server).granted()
    assert (hs.connections, dns.count(name, "A"), dns.count(name, "AAAA")) == (5, 1, 1)


@pytest.mark.parametrize("kind", ["NXDOMAIN", "NOERROR"])
def test_negative_cache(kind, svc, dns, hs):
    name, server = name_port(dns)

    def hook(data, rec, transport):
        r = dns.reply(rec, getattr(RCODE, kind))
        r.add_auth(RR("dns.test.", QTYPE.SOA, ttl=300, rdata=dnslib.SOA("ns.test.", "a.test.", (1, 1, 1, 1, 300))))
        return r
    dns.hook(name, "*", hook)
    for _ in range(4):
        Exchange(svc, server).refused("address")
    assert (dns.count(name, "A"), dns.count(name, "AAAA")) == (1, 1)


def test_ttl_is_obeyed_and_a_stranger_gets_no_stale_address(svc, dns, hs):
    """TTL 1 counts as 5 s: after that the new address is used, without a restart."""
    hs.close_each = True
    dns.ttl = 1
    name, server = name_port(dns, f"A {OTHER}")
    Exchange(svc, server).refused("connect")
    dns.set(f"{name}. A {GOOD}\n")
    wait_for("the new address", lambda: Exchange(svc, server).reply.status == 200 or time.sleep(0.5))
    assert dns.count(name, "A") >= 2


def test_listed_server_lives_on_stale_addresses(dns, hs):
    hs.close_each = True
    dns.ttl = 1
    name, server = name_port(dns, f"A {GOOD}")
    with lkjwt(dns, LIVEKIT_FULL_ACCESS_HOMESERVERS=f"x.test {name}:{PORT}",
               LKJWT_FEDERATION_API_URL_OVERRIDES=f"over.test=https://{name}:{PORT}") as svc:
        Exchange(svc, "over.test").granted()
        dns.any_hook = rcode("SERVFAIL")
        before = dns.count()
        wait_for("a query that fails", lambda: (Exchange(svc, "over.test").granted(), dns.count() > before)[1]
                 or time.sleep(0.5))
        Exchange(svc, "over.test").granted()


# ---- what a query looks like ----------------------------------------------------------------------------

def test_ids_and_ports_are_not_predictable(svc, dns, hs):
    for _ in range(30):
        Exchange(svc, name_port(dns, f"A {GOOD}")[1]).granted()
    ids, ports = [p["id"] for p in dns.packets], [p["peer"][1] for p in dns.packets]
    assert len(dns.packets) == 60
    assert len(set(ids)) > 50 and len(set(ports)) > 45
    steps = {(b - a) & 0xffff for a, b in zip(ids, ids[1:])}
    assert len(steps) > 40
    for p in dns.packets:
        q = dnslib.DNSRecord.parse(p["data"])
        assert (q.header.rd, q.header.qr, q.header.opcode, len(q.questions), len(q.rr), len(q.auth)) == (1, 0, 0, 1, 0, 0)


NEVER_ASKED = ["intranet:8448", "a" * 64 + ".dns.test:8448", "a..dns.test:8448", ".dns.test:8448",
               ".".join(["a" * 63] * 3 + ["b" * 63]) + ":8448", "..:8448", ".:8448", "-:8448"]


@pytest.mark.parametrize("server", NEVER_ASKED, ids=[s[:24] for s in NEVER_ASKED])
def test_names_dns_cannot_hold_are_not_asked(server, svc, dns, hs):
    """Valid by the grammar of server names, but no name to ask a nameserver for (a dot is needed, too)."""
    Exchange(svc, server).refused()
    assert not dns.queries


def test_listed_name_without_dot_is_asked(dns, hs):
    dns.add(f"intranet. A {GOOD}\n")
    with lkjwt(dns, LIVEKIT_FULL_ACCESS_HOMESERVERS=f"intranet:{PORT}") as svc:
        e = Exchange(svc, f"intranet:{PORT}")
        assert e.reply.status == 500            # full access; there is no SFU in this test
        assert len(hs.asked()) == 1


# ---- resolv.conf and /etc/hosts in their usual place ---------------------------------------------------

class Root:
    """An empty root folder with the binary, so that /etc is ours."""

    def __init__(self, path):
        self.path = path
        (path / "etc").mkdir()
        shutil.copy(BIN, path / "lkjwt")
        shutil.copy(pki().ca_file, path / "ca.pem")
        self.n = 0

    def write(self, name, text):
        """By rename, as package scripts and container engines do."""
        self.n += 1
        new = self.path / "etc" / f"new{self.n}"
        new.write_text(text)
        new.rename(self.path / "etc" / name)

    def service(self, **over):
        env = outbound_env(None, None, ca="/ca.pem", LKJWT_RESOLVER=None, LKJWT_HOSTS_FILE=None, **over)
        return Service(env, argv=["/usr/sbin/chroot", str(self.path), "/lkjwt"])


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path)


NS1, NS2, NS3, NS4 = "127.0.0.61", "127.0.0.62", "127.0.0.63", "127.0.0.64"
RESOLV = {
    "plain": f"nameserver {NS1}\n",
    "no-newline": f"nameserver {NS1}",
    "comments": f"# nameserver {NS4}\n; nameserver {NS4}\n\nnameserver {NS1} # x\n",
    "blanks": f"  nameserver \t {NS1}  \n",
    "crlf": f"search x.test\r\nnameserver {NS1}\r\n",
    "unknown-words": f"sortlist 1.2.3.4\nfoo bar\noptions rotate inet6 no-such:9 edns0\nnameserver {NS1}\nnameserver\n",
    "bad-address-skipped": f"nameserver example.org\nnameserver 1.2.3\nnameserver {NS1}\n",
    "first-silent": f"nameserver {NS2}\nnameserver {NS1}\noptions timeout:1\n",
    "first-nobody": f"nameserver {NS3}\nnameserver {NS1}\n",
    "ipv6": "nameserver ::1\n",
    "bad-options": f"nameserver {NS1}\noptions timeout:x attempts: ndots:-1 timeout:99999999999999\n",
    "long-line": "search " + "x" * 8000 + f"\nnameserver {NS1}\n",
}


@pytest.fixture(scope="module")
def ports_53(servers):
    """Nameservers on port 53: NS1 and ::1 answer, NS2 is silent, NS3 is nobody."""
    with Dns("", NS1, 53) as one, Dns("", NS2, 53) as two, Dns("", "::1", 53) as six:
        two.any_hook = silent
        six.rrs = one.rrs
        yield one, two, six


@pytest.fixture
def ns(ports_53, hs):
    for d in ports_53:
        d.forget()
    ports_53[0].set(f"h.dns.test. A {GOOD}\n")
    ports_53[2].rrs = ports_53[0].rrs
    return ports_53


@pytest.mark.parametrize("text", RESOLV.values(), ids=RESOLV)
def test_resolv_conf(text, ns, root, hs):
    root.write("resolv.conf", text)
    with root.service() as svc:
        Exchange(svc, f"h.dns.test:{PORT}").granted()
    assert ns[0].count() or ns[2].count()


def test_resolv_conf_etc_hosts(ns, root, hs):
    root.write("resolv.conf", f"nameserver {NS1}\n")
    root.write("hosts", f"127.0.0.1 localhost\n{GOOD} e.dns.test\n")
    with root.service() as svc:
        Exchange(svc, f"e.dns.test:{PORT}").granted()
    assert not ns[0].count()


@pytest.mark.parametrize("attempts", [1, 2])
def test_resolv_conf_attempts(attempts, ns, root, hs):
    """Each of two silent nameservers is asked that often for each type."""
    root.write("resolv.conf", f"nameserver {NS2}\nnameserver {NS2}\noptions timeout:1 attempts:{attempts}\n")
    with root.service() as svc:
        Exchange(svc, f"h.dns.test:{PORT}").refused("address")
    assert (ns[1].count("h.dns.test", "A"), ns[1].count("h.dns.test", "AAAA")) == (2 * attempts, 2 * attempts)


def test_resolv_conf_only_three_nameservers(ns, root, hs):
    root.write("resolv.conf", "nameserver 127.0.0.71\nnameserver 127.0.0.72\nnameserver 127.0.0.73\n"
                              f"nameserver {NS1}\noptions timeout:1 attempts:1\n")
    with root.service() as svc:
        Exchange(svc, f"h.dns.test:{PORT}").refused("address")
    assert not ns[0].count()


SEARCH = {
    # resolv.conf lines, host in an operator's URL, names asked until the one that exists
    "search": ("search one.test two.test", "intra", ["intra.one.test", "intra.two.test"]),
    "search-last-wins": ("search no.test\nsearch one.test two.test", "intra", ["intra.one.test", "intra.two.test"]),
    "domain": ("domain two.test", "intra", ["intra.two.test"]),
    "no-search": ("", "intra", ["intra"]),
    "search-then-bare": ("search one.test", "bare", ["bare.one.test", "bare"]),
    "dot-goes-first": ("search two.test", "a.b", ["a.b"]),
    "dot-then-search": ("search two.test", "intra.x", ["intra.x", "intra.x.two.test"]),
    "ndots-2": ("search one.test two.test\noptions ndots:2", "intra.x", ["intra.x.one.test", "intra.x.two.test"]),
    "ndots-2-two-dots": ("search one.test\noptions ndots:2", "a.b.c", ["a.b.c"]),
}


@pytest.mark.parametrize("row", SEARCH.values(), ids=SEARCH)
def test_search_list_serves_the_operators_names(row, ns, root):
    conf, host, names = row
    ns[0].set(f"{names[-1]}. A 127.0.0.1\n")
    root.write("resolv.conf", f"nameserver {NS1}\n{conf}\n")
    with Homeserver(sub=by_token) as plain, root.service(
            LKJWT_FEDERATION_API_URL_OVERRIDES=f"over.test=http://{host}:{plain.port}") as svc:
        Exchange(svc, "over.test").granted()
        assert plain.asked()[0].host == f"{host}:{plain.port}"
    asked = []
    for q in ns[0].queries:
        if q[1] == "A" and q[0] not in asked:
            asked.append(q[0])
    assert asked == [n + "." for n in names]


def test_search_list_takes_both_families_from_one_name(ns, root):
    """An AAAA record of a later candidate is not mixed with the A record of the one that exists."""
    with Homeserver(sub=by_token) as right, Homeserver([("::1", right.port)], sub=by_token) as wrong:
        ns[0].set("intra.one.test. A 127.0.0.1\nintra.two.test. AAAA ::1\n")
        root.write("resolv.conf", f"nameserver {NS1}\nsearch one.test two.test\n")
        with root.service(LKJWT_FEDERATION_API_URL_OVERRIDES=f"over.test=http://intra:{right.port}") as svc:
            Exchange(svc, "over.test").granted()
        assert len(right.asked()) == 1 and not wrong.connections
        assert not ns[0].count("intra.two.test")


def test_names_from_clients_skip_the_search_list(ns, root, hs):
    ns[0].set(f"h.dns.x.dns.test. A {TRAP}\nh.x.dns.test. A {TRAP}\n")
    root.write("resolv.conf", f"nameserver {NS1}\nsearch x.dns.test\noptions ndots:5\n")
    with root.service() as svc:
        Exchange(svc, f"h.dns:{PORT}").refused("address")
        Exchange(svc, f"h:{PORT}").refused()
    assert {q[0] for q in ns[0].queries} == {"h.dns."}


@pytest.mark.parametrize("how", ["rename", "in-place"])
def test_resolv_conf_is_read_again_when_it_changes(how, ns, root, hs):
    root.write("resolv.conf", f"nameserver {NS3}\noptions timeout:1 attempts:1\n")
    with root.service() as svc:
        Exchange(svc, f"h.dns.test:{PORT}").refused("address")
        text = f"nameserver {NS1}\noptions timeout:1 attempts:1\n"
        if how == "rename":
            root.write("resolv.conf", text)
        else:
            (root.path / "etc" / "resolv.conf").write_text(text)
        ns[0].add("".join(f"r{i}.dns.test. A {GOOD}\n" for i in range(40)))
        names = iter(range(40))
        wait_for("the new nameserver", lambda: Exchange(svc, f"r{next(names)}.dns.test:{PORT}").reply.status == 200
                 or time.sleep(0.5))
