"""Where lkjwt refuses to connect (SECURITY.md 3; S1, S2, S3).

One stand-in listens on ports 443 and 8448 of every address of the namespace, the denied ones included
as far as the kernel lets them stand on lo: .accepted is the list of addresses that saw a connection.
"""
import ipaddress
import socket

import pytest
from dnslib import A, QTYPE, RR

from outbound import Exchange, by_token, fresh, lkjwt, outbound_env, pki, pub, PUB, PUB6, text_file
from peers import Dns, Homeserver, Reply, add_addr, del_addr
from service import run_cli

WEB, WEB6 = PUB % 60, PUB6 % 60
NEVER = ["0.0.0.0", "0.1.2.3", "0.255.255.255", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.254",
         "255.255.255.255", "::", "::2", "::7f00:1", "::ffff", "ff02::1", "ff0e::1", "ff00::", "::ffff:0.0.0.0", "::ffff:240.0.0.1",
         "64:ff9b::", "64:ff9b::e000:1", "2002::1", "2002:f000:1::1"]
SPECIAL = ["169.254.0.1", "169.254.169.254", "192.0.0.1", "192.0.0.255", "192.0.2.1", "192.88.99.1", "198.18.0.1",
           "198.19.255.255", "198.51.100.1", "203.0.113.255", "64:ff9b:1::1", "64:ff9b:1:ffff::1", "100::1", "2001::1",
           "2001:1ff:ffff::1", "2001:db8::1", "2001:db8:ffff::1", "3fff::1", "3fff:fff::1", "5f00::1", "5f00:ffff::1",
           "fe80::1", "febf::1", "fec0::1", "feff::1", "::ffff:169.254.169.254", "::ffff:0:a9fe:a9fe", "64:ff9b::a9fe:a9fe",
           "2002:a9fe:a9fe::1", "2002:c000:201::"]
PRIVATE = ["127.0.0.1", "127.255.255.254", "10.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255",
           "192.168.0.1", "192.168.255.255", "100.64.0.1", "100.127.255.255", "::1", "fc00::1", "fdff:ffff::1",
           "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:192.168.1.1", "::ffff:0:7f00:1", "::ffff:0:a00:1", "64:ff9b::7f00:1",
           "64:ff9b::ac10:1", "2002:7f00:1::1", "2002:a00:1::", "2002:c0a8:101:ffff::1"]
PUBLIC = ["1.0.0.1", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.1", "126.255.255.255", "128.0.0.1",
          "169.253.255.255", "169.255.0.1", "172.15.255.255", "172.32.0.1", "191.255.255.255", "192.0.1.1", "192.0.3.1",
          "192.88.98.255", "192.88.100.1", "192.167.255.255", "192.169.0.1", "198.17.255.255", "198.20.0.1", "198.51.99.255",
          "198.51.101.1", "203.0.112.255", "203.0.114.1", "223.255.255.255", "64:ff9b::330f:3c", "2001:200::1", "2001:db7::1",
          "2001:db9::1", "2002:330f:3c::1", "2600::1", "3ffe::1", "::ffff:51.15.0.60", "::ffff:0:330f:3c", "fbff::1", "fe00::1"]
DENIED = NEVER + SPECIAL + PRIVATE


def plain(address):
    """The address as the stand-in reports it."""
    ip = ipaddress.ip_address(address)
    return str(ip.ipv4_mapped) if ip.version == 6 and ip.ipv4_mapped else str(ip)


# No device can have these; a connect() to the first two would end at a listener all the same.
NOT_ON_LO = {"0.0.0.0", "::", "255.255.255.255", "224.0.0.1", "239.255.255.255", "ff02::1", "ff0e::1", "ff00::",
             "::ffff:0.0.0.0"}


def spellings(address):
    fam = socket.AF_INET6 if ":" in address else socket.AF_INET
    return {address, plain(address), socket.inet_ntop(fam, socket.inet_pton(fam, address))}


def literal(address):
    return f"[{address}]" if ":" in address else address


@pytest.fixture(scope="module")
def stand_in():
    pub(60)
    up = [plain(a) for a in DENIED + PUBLIC if a not in NOT_ON_LO]
    add_addr(*up)
    certs = {"*.ssrf.test": pki().leaf(["*.ssrf.test"]),
             None: pki().leaf(ips=dict.fromkeys(f(a) for a in [WEB, WEB6, "64:ff9b::a00:1"] + PUBLIC + PRIVATE + SPECIAL
                                         for f in (plain, str)))}
    with Homeserver([("*", 443), ("*", 8448)], tls=certs, sub=by_token) as hs:
        yield hs
    del_addr(*[a for a in up if a not in (WEB, WEB6)])


@pytest.fixture
def hs(stand_in):
    stand_in.off()
    stand_in.forget()
    stand_in.well_known = None
    yield stand_in


@pytest.fixture
def dns(hs):
    with Dns() as d:
        yield d


def address_record(name, address):
    return f"{name}. {'AAAA' if ':' in address else 'A'} {ipaddress.ip_address(address).exploded}\n"


def hop_literal(address, dns, hs):
    return literal(address)


def hop_literal_port(address, dns, hs):
    return literal(address) + ":443"


def hop_record(address, dns, hs):
    name = fresh("ssrf.test")
    dns.add(address_record(name, address))
    return name


def hop_record_port(address, dns, hs):
    return hop_record(address, dns, hs) + ":8448"


def served_name(dns):
    name = fresh("ssrf.test")
    dns.add(f"{name}. A {WEB}\n")
    return name


def hop_delegation(address, dns, hs):
    hs.well_known = literal(address)
    return served_name(dns)


def hop_delegation_port(address, dns, hs):
    hs.well_known = literal(address) + ":443"
    return served_name(dns)


def hop_delegation_name(address, dns, hs):
    hs.well_known = hop_record(address, dns, hs)
    return served_name(dns)


def hop_srv(address, dns, hs):
    name, target = served_name(dns), hop_record(address, dns, hs)
    dns.add(f"_matrix-fed._tcp.{name}. SRV 1 1 8448 {target}.\n")
    return name


def hop_srv_old(address, dns, hs):
    name, target = served_name(dns), hop_record(address, dns, hs)
    dns.add(f"_matrix._tcp.{name}. SRV 1 1 8448 {target}.\n")
    return name


def hop_redirect(address, dns, hs):
    hs.well_known = lambda r: Reply(302, headers=[("Location", f"https://{literal(address)}/moved")])
    return served_name(dns)


def hop_redirect_name(address, dns, hs):
    target = hop_record(address, dns, hs)
    hs.well_known = lambda r: Reply(302, headers=[("Location", f"https://{target}:8448/moved")])
    return served_name(dns)


HOPS = [hop_literal, hop_literal_port, hop_record, hop_record_port, hop_delegation, hop_delegation_port, hop_delegation_name,
        hop_srv, hop_srv_old, hop_redirect, hop_redirect_name]


@pytest.mark.parametrize("address", DENIED)
def test_s01_no_connection_to_a_denied_address_on_any_hop(address, dns, hs):
    hs.on("/moved", Reply(200, {"m.server": WEB}))
    for hop in HOPS:
        hs.forget()
        with lkjwt(dns) as svc:
            e = Exchange(svc, hop(address, dns, hs))
            if hop in (hop_redirect, hop_redirect_name):
                e.granted()                     # the well-known failed; step 4 leads to the name's own address
            else:
                e.refused(event="SSRF_DENIED")
            line = e.line(event="SSRF_DENIED")
            text = " ".join(line.values())
            assert any(spelling in text for spelling in spellings(address)), (hop, line)
            # the way out is named, except where there is none
            assert ("LKJWT_ALLOW_NETWORKS=" in text) is (address not in NEVER), (hop, line)
        assert {a for a, _ in hs.accepted} <= {WEB}, hop
        hs.well_known = None


@pytest.mark.parametrize("address", PUBLIC)
def test_public_neighbours_are_reached(address, dns, hs):
    with lkjwt(dns) as svc:
        Exchange(svc, literal(address)).granted()
        Exchange(svc, hop_record_port(address, dns, hs)).granted()
    assert {a for a, _ in hs.accepted} == {plain(address)}


EMBEDDINGS = {"mapped": "::ffff:{hi:x}:{lo:x}", "translated": "::ffff:0:{hi:x}:{lo:x}", "nat64": "64:ff9b::{hi:x}:{lo:x}",
              "6to4": "2002:{hi:x}:{lo:x}::1"}


@pytest.mark.parametrize("form", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_s03_embedded_ipv4_is_judged_as_that_ipv4(form, dns, hs):
    """LKJWT_ALLOW_NETWORKS names the IPv4 network; the IPv6 form follows it, whichever it is."""
    def embed(v4):
        n = int(ipaddress.ip_address(v4))
        return form.format(hi=n >> 16, lo=n & 0xffff)
    with lkjwt(dns, LKJWT_ALLOW_NETWORKS="10.0.0.0/8") as svc:
        Exchange(svc, f"[{embed('192.168.0.1')}]").refused(event="SSRF_DENIED")
        Exchange(svc, f"[{embed('127.0.0.1')}]").refused(event="SSRF_DENIED")
        assert not hs.accepted
        address = embed("10.0.0.1")
        add_addr(plain(address))
        name = fresh("ssrf.test")
        dns.add(address_record(name, address))
        Exchange(svc, f"{name}:8448").granted()
        assert [a for a, _ in hs.accepted] == [plain(address)]


P, L, N = "10.0.0.1", "169.254.169.254", "0.1.2.3"
P6, EMBEDDED = "fc00::1", "64:ff9b::a00:1"
LISTED = "listed.ssrf.test"
RULES = {
    # id: environment, server name ({a}: of that address), address, reached?
    "stranger": ({}, "{a}", P, False),
    "listed": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": f"x.test {LISTED}:8448"}, f"{LISTED}:8448", P, True),
    "listed-ipv6": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": f"{LISTED}:8448"}, f"{LISTED}:8448", P6, True),
    "listed-embedded": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": f"{LISTED}:8448"}, f"{LISTED}:8448", EMBEDDED, True),
    "listed-exactly": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": LISTED}, f"{LISTED}:8448", P, False),
    "listed-literal": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": P}, P, P, True),
    "listed-special": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": f"{LISTED}:8448"}, f"{LISTED}:8448", L, False),
    "listed-never": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": f"{LISTED}:8448"}, f"{LISTED}:8448", N, False),
    "listed-by-cs-api-override": ({"LIVEKIT_CS_API_URL_OVERRIDES": f"{LISTED}:8448=http://127.0.0.1:1"},
                                  f"{LISTED}:8448", P, True),
    "listed-deny": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": f"{LISTED}:8448", "LKJWT_PRIVATE_NETWORKS": "deny"},
                    f"{LISTED}:8448", P, False),
    "auto-is-the-default": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": f"{LISTED}:8448", "LKJWT_PRIVATE_NETWORKS": "auto"},
                            f"{LISTED}:8448", P, True),
    "star": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*"}, f"{LISTED}:8448", P, True),
    "star-literal": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*"}, P, P, False),
    "star-special": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*"}, f"{LISTED}:8448", L, False),
    "star-deny": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*", "LKJWT_PRIVATE_NETWORKS": "deny"}, f"{LISTED}:8448", P, False),
    "star-among": ({"LIVEKIT_FULL_ACCESS_HOMESERVERS": "*,x.test"}, f"{LISTED}:8448", P, False),
    "network": ({"LKJWT_ALLOW_NETWORKS": "10.0.0.0/8"}, f"{LISTED}:8448", P, True),
    "network-literal": ({"LKJWT_ALLOW_NETWORKS": "10.0.0.1/32"}, P, P, True),
    "network-edge": ({"LKJWT_ALLOW_NETWORKS": "10.0.0.2/31"}, P, P, False),
    "network-odd-prefix": ({"LKJWT_ALLOW_NETWORKS": "10.0.0.0/31"}, P, P, True),
    "network-list": ({"LKJWT_ALLOW_NETWORKS": "fd00::/8, 192.168.0.0/16 ,10.0.0.0/8"}, P, P, True),
    "network-other": ({"LKJWT_ALLOW_NETWORKS": "192.168.0.0/16"}, P, P, False),
    "network-ipv6": ({"LKJWT_ALLOW_NETWORKS": "fc00::/7"}, f"[{P6}]", P6, True),
    "network-of-embedded": ({"LKJWT_ALLOW_NETWORKS": "10.0.0.0/8"}, f"[{EMBEDDED}]", EMBEDDED, True),
    "network-special": ({"LKJWT_ALLOW_NETWORKS": "169.254.0.0/16"}, L, L, True),
    "network-everything-special": ({"LKJWT_ALLOW_NETWORKS": "0.0.0.0/0,::/0"}, L, L, True),
    "network-everything-never": ({"LKJWT_ALLOW_NETWORKS": "0.0.0.0/0,::/0"}, N, N, False),
    "network-everything-never-ipv6": ({"LKJWT_ALLOW_NETWORKS": "0.0.0.0/0,::/0"}, "[::2]", "::2", False),
    "network-and-deny": ({"LKJWT_ALLOW_NETWORKS": "10.0.0.0/8", "LKJWT_PRIVATE_NETWORKS": "deny"}, P, P, True),
    "lab-switch": ({"LIVEKIT_INSECURE_SKIP_VERIFY_TLS": "YES_I_KNOW_WHAT_I_AM_DOING"}, P, P, True),
    "lab-switch-special": ({"LIVEKIT_INSECURE_SKIP_VERIFY_TLS": "YES_I_KNOW_WHAT_I_AM_DOING"}, L, L, False),
    "lab-switch-deny": ({"LIVEKIT_INSECURE_SKIP_VERIFY_TLS": "YES_I_KNOW_WHAT_I_AM_DOING", "LKJWT_PRIVATE_NETWORKS": "deny"},
                        P, P, False),
    "hosts-file": ({"LKJWT_HOSTS_FILE": None}, f"{LISTED}:8448", P, False),
}


@pytest.mark.parametrize("env, server, address, reached", RULES.values(), ids=RULES)
def test_who_may_reach_what(env, server, address, reached, dns, hs):
    dns.add(address_record(LISTED, address))
    server = hop_record_port(address, dns, hs) if server == "{a}" else server
    if "LKJWT_HOSTS_FILE" in env:
        env = {"LKJWT_HOSTS_FILE": text_file(f"{address} {LISTED}\n")}
    with lkjwt(dns, **env) as svc:
        e = Exchange(svc, server)
        if reached:
            # full access goes on to the SFU, and there is none: the look-up itself went well
            assert e.reply.status in (200, 500), e.reply
            assert {a for a, _ in hs.accepted} == {plain(address)} and len(hs.asked()) == 1
        else:
            e.refused(event="SSRF_DENIED")
            assert not hs.accepted
        star = env.get("LIVEKIT_FULL_ACCESS_HOMESERVERS") == "*" and "LKJWT_PRIVATE_NETWORKS" not in env
        if star:
            svc.wait_event("PRIVATE_OPEN")
        else:
            svc.wait_event("START")             # it would stand before this line
            assert not svc.events("PRIVATE_OPEN")


def test_listed_reaches_private_networks_on_every_hop(dns, hs):
    for hop in (hop_record, hop_delegation, hop_delegation_name, hop_srv, hop_srv_old):
        hs.forget()
        server = hop(P, dns, hs)
        with lkjwt(dns, LIVEKIT_FULL_ACCESS_HOMESERVERS=server) as svc:
            assert Exchange(svc, server).reply.status == 500        # no SFU here
            assert hs.asked()[-1].addr[0] == P
        hs.well_known = None


@pytest.mark.parametrize("env", [{}, {"LKJWT_PRIVATE_NETWORKS": "deny"}], ids=["auto", "deny"])
@pytest.mark.parametrize("address", [P, L, "127.0.0.1", P6])
def test_operator_addresses_are_reached(address, env, dns, hs):
    """An override is the operator's word, whatever the network; a stranger gains nothing from it."""
    url = f"https://{literal(address)}:8448"
    with lkjwt(dns, LKJWT_FEDERATION_API_URL_OVERRIDES=f"over.test={url}", **env) as svc:
        Exchange(svc, "over.test").granted()
        Exchange(svc, literal(address)).refused(event="SSRF_DENIED")
        Exchange(svc, f"{literal(address)}:8448").refused(event="SSRF_DENIED")
    assert len(hs.asked()) == 1


@pytest.mark.parametrize("order", [0, 1])
def test_denied_addresses_are_skipped(order, dns, hs):
    name = fresh("ssrf.test")
    records = [address_record(name, a) for a in (P, L, WEB)]
    dns.add("".join(records if order else records[::-1]) + address_record(name, "::1"))
    with lkjwt(dns) as svc:
        Exchange(svc, f"{name}:8448").granted()
    assert {a for a, _ in hs.accepted} == {WEB}


def test_s02_rebinding_gains_nothing(dns, hs):
    """A nameserver that alternates between a public and a loopback address, TTL 0."""
    name = fresh("ssrf.test")
    n = [0]

    def alternate(data, rec, transport):
        n[0] += 1
        r = dns.reply(rec)
        r.add_answer(RR(rec.q.qname, QTYPE.A, rdata=A(WEB if n[0] % 2 else "127.0.0.1"), ttl=0))
        return r
    hs.close_each = True
    try:
        for _ in range(20):
            dns.hook(name, "A", alternate)
            with lkjwt(dns) as svc:
                for _ in range(3):
                    Exchange(svc, f"{name}:8448")
                Exchange(svc, name)
        assert {a for a, _ in hs.accepted} == {WEB} and n[0] >= 20
    finally:
        hs.close_each = False


BAD_NETWORKS = ["10.0.0.0/33", "10.0.0.0/-1", "10.0.0/8", "10.0.0.0/", "/8", "x", "::/129", "10.0.0.0/8;fd00::/8", "10.0.0.0/8x"]


@pytest.mark.parametrize("value", BAD_NETWORKS)
def test_bad_networks_stop_the_start(value):
    r = run_cli([], outbound_env(LKJWT_ALLOW_NETWORKS=value), timeout=20)
    assert r.code == 1 and "LKJWT_ALLOW_NETWORKS" in r.err
