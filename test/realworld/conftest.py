"""Two real homeservers, a real SFU, and the service between them, all on the
loopback device of a network namespace (test/netns)."""
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TOP = Path(__file__).resolve().parents[2]
os.environ.setdefault("LKJWT_CANARY_DIR", str(TOP / "build" / "canary-realworld"))
sys.path.insert(0, str(TOP / "test" / "blackbox"))

from fixtures import pytest_sessionstart    # noqa: E402, F401
from peers import Homeserver, Pki, Reply    # noqa: E402
from service import CANARY_KEY, CANARY_SECRET, Service    # noqa: E402
from servers import LiveKit, Server, Synapse, die_with_us    # noqa: E402

# alpha.test is found by well-known: name, front and homeserver each have an
# address of their own, and no certificate fits the other's name. beta.test
# has its port in its name, serves what clients ask itself, and keeps
# Synapse's own limit of calls to delayed events.
ALPHA_FRONT, ALPHA, BETA = "127.0.0.2", "127.0.0.3", "127.0.0.4"
LED = {"org.matrix.msc4143.rtc_foci": [{"type": "livekit", "livekit_service_url": "https://alpha.test/livekit/jwt"}]}
HOSTS = f"{ALPHA_FRONT} alpha.test\n{ALPHA} matrix.alpha.test\n{BETA} beta.test\n"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows the ends of all logs."""
    report = (yield).get_result()
    if report.failed:
        for s in Server.all:
            report.sections.append((s.name, s.tail()))
        for s in {id(s): s for s in services_in(item.funcargs)}.values():
            report.sections.append((f"service on {s.bind}", s.log_text()[-6000:]))


def services_in(thing):
    if isinstance(thing, Service):
        yield thing
    elif isinstance(thing, (dict, SimpleNamespace)):
        for one in (thing if isinstance(thing, dict) else vars(thing)).values():
            yield from services_in(one)


@pytest.fixture(scope="session", autouse=True)
def network():
    """An interface besides lo: WebRTC clients never use lo, and then have no
    address to send from. Only where lo is alone, thus in a namespace of ours."""
    names = [name for _, name in socket.if_nameindex()]
    if names == ["lo"]:
        for command in ("link add media0 type veth peer name media1",
                        "address add 10.0.0.1/32 dev media0",
                        "link set media0 up", "link set media1 up"):
            subprocess.run(["ip", *command.split()], check=True)


@pytest.fixture(scope="session")
def pki(tmp_path_factory):
    return Pki(str(tmp_path_factory.mktemp("pki")), key="p384")


@pytest.fixture(scope="session")
def world(pki, tmp_path_factory):
    """The servers, and their users."""
    folder = tmp_path_factory.mktemp("world")
    hosts = folder / "hosts"
    hosts.write_text(HOSTS)
    alpha = Synapse(folder / "alpha", "alpha.test", ALPHA, 8448, pki.leaf(["matrix.alpha.test"], key="p256"),
                    ["client", "federation"], rc_delayed_event_mgmt={"per_second": 1000, "burst_count": 1000})
    beta = Synapse(folder / "beta", "beta.test:8449", BETA, 8449, pki.leaf(["beta.test"], [BETA], key="rsa2048"),
                   ["openid"], public=True, extra_well_known_client_content=LED)
    sfu = LiveKit(folder / "sfu")
    front = Homeserver((ALPHA_FRONT, 443), pki.leaf(["alpha.test"]), well_known="matrix.alpha.test:8448")
    front.on("/.well-known/matrix/client",
             Reply(200, {"m.homeserver": {"base_url": "https://matrix.alpha.test:8448/"}, **LED}))
    try:
        for s in (alpha, beta, sfu):
            s.start()
        for s in (alpha, beta, sfu):
            s.ready()
        yield SimpleNamespace(
            alpha=alpha, beta=beta, sfu=sfu, front=front, hosts=str(hosts), servers=(alpha, beta),
            users={s.server_name: [s.register(n) for n in ("ann", "bob", "cleo")] for s in (alpha, beta)})
    finally:
        front.stop()
        for s in (alpha, beta, sfu):
            s.stop()


@pytest.fixture(scope="session")
def env(world, pki):
    """The service's environment, given who has full access."""
    def make(full, **more):
        return {"LIVEKIT_URL": world.sfu.url, "LIVEKIT_KEY": CANARY_KEY, "LIVEKIT_SECRET": CANARY_SECRET,
                "LIVEKIT_FULL_ACCESS_HOMESERVERS": full, "SSL_CERT_FILE": pki.ca_file, "LKJWT_UID": "0",
                "LKJWT_HOSTS_FILE": world.hosts, "LKJWT_ALLOW_NETWORKS": "127.0.0.0/8", **more}
    return make


@pytest.fixture(scope="session")
def services(world, env):
    """One service for each homeserver in the favoured role."""
    running = []
    try:
        for s in world.servers:
            running.append(Service(env(s.server_name), preexec_fn=die_with_us).start())
        yield dict(zip((s.server_name for s in world.servers), running))
    finally:
        codes = [s.stop() for s in running]
    assert codes == [0] * len(codes), "SIGTERM ends the service with 0"


@pytest.fixture(params=["well-known", "explicit-port"])
def roles(request, world, services):
    """Who has full access, who has not, and the service that sees it so."""
    home, guest = world.servers if request.param == "well-known" else world.servers[::-1]
    return SimpleNamespace(home=home, guest=guest, service=services[home.server_name],
                           users=world.users[home.server_name], guests=world.users[guest.server_name])
