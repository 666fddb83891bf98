"""One homeserver, one SFU, the pages and the proxy before the service; for
each row of CALLS a service and a call of two users."""
import contextlib
import itertools
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import sync_playwright

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "blackbox"), str(TESTS / "realworld")]

from peers import Pki    # noqa: E402
from servers import LiveKit, Server, Synapse    # noqa: E402
from service import CANARY_KEY, CANARY_SECRET, free_port    # noqa: E402
from sites import (KEPT, MEMBERSHIP, PREFIX, Browser, ImageService, Pages, Person, Recorder,    # noqa: E402
                   eventually, film, members)
from store import RedisServer    # noqa: E402

HOME, NAME = "127.0.0.2", "call.test:8448"
PLENTY = {"per_second": 1000, "burst_count": 1000}
# Colour planes of the cameras, and how the colour is told: brightest of red, green, blue.
CAMERAS = {"ann": ((90, 200), 0), "bob": ((200, 100), 2)}

CALLS = {
    # name: the mode of Element Call; what befalls the service, which then has Redis, around the end of a page
    "compatibility": ("compatibility", None),
    "matrix-2.0": ("matrix_2_0", None),
    "restarted-before": ("compatibility", "restart"),
    "down-meanwhile": ("matrix_2_0", "down"),
}


running = []    # the call, also while it is being made, for the report of a failed test


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows the pages, and the ends of all logs."""
    report = (yield).get_result()
    if not report.failed:
        return
    for one in running:
        for person in one.people.values():
            with contextlib.suppress(Exception):    # the page may be the one that was killed
                person.screenshot(f"failed-{one.name}")
            report.sections.append((f"console of {person.name}", "\n".join(person.console[-60:])))
        report.sections.append(("requests", "\n".join(map(repr, one.world.recorder.noted()))))
        report.sections.append(("service", one.service.log_text()[-6000:]))
    for s in Server.all:
        report.sections.append((s.name, s.tail()))


def connect():
    """An interface besides lo, without which Chromium is offline. Only where lo is alone: in a namespace of ours."""
    if [name for _, name in socket.if_nameindex()] == ["lo"]:
        for command in ("link add media0 type veth peer name media1", "address add 10.0.0.1/32 dev media0",
                        "link set media0 up", "link set media1 up"):
            subprocess.run(["ip", *command.split()], check=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shutil.rmtree(KEPT, ignore_errors=True)
    connect()
    pki = Pki(str(folder / "pki"))
    mounts = folder / "etc"
    mounts.mkdir()
    shutil.copy(pki.ca_file, mounts / "ca.pem")
    (mounts / "hosts").write_text(f"{HOME} call.test\n")
    recorder, pages = Recorder(), Pages()
    home = Synapse(
        folder / "synapse", NAME, HOME, 8448, pki.leaf(["call.test"]), ["openid"], public=True,
        matrix_rtc={"transports": [{"type": "livekit", "livekit_service_url": recorder.url + PREFIX}]},
        experimental_features={f"msc{n}_enabled": True for n in (4140, 4143, 4222, 4354)},
        rc_delayed_event_mgmt=PLENTY, rc_login={n: PLENTY for n in ("address", "account", "failed_attempts")},
        rc_joins={n: PLENTY for n in ("local", "remote")})
    sfu = LiveKit(folder / "sfu", webhook=f"{recorder.url}{PREFIX}/sfu_webhook")
    for name, ((u, v), _) in CAMERAS.items():
        film(folder / f"{name}.y4m", u, v)
    try:
        for s in (home, sfu):
            s.start()
        for s in (home, sfu):
            s.ready()
        with sync_playwright() as playwright:
            yield SimpleNamespace(folder=folder, mounts=mounts, home=home, sfu=sfu, recorder=recorder, pages=pages,
                                  playwright=playwright, number=itertools.count())
    finally:
        for s in (home, sfu, recorder, pages):
            s.stop()


@pytest.fixture(scope="module", params=CALLS)
def call(request, world):
    """A call that ann opens and bob joins. Nothing is awaited here but that the room has them."""
    mode, fate = CALLS[request.param]
    folder = world.folder / request.param
    folder.mkdir()
    world.recorder.notes.clear()
    with contextlib.ExitStack() as end:
        redis = RedisServer() if fate else None
        if redis:
            end.callback(redis.stop)
        env = {"LIVEKIT_URL": world.sfu.url, "LIVEKIT_KEY": CANARY_KEY, "LIVEKIT_SECRET": CANARY_SECRET,
               "LIVEKIT_FULL_ACCESS_HOMESERVERS": NAME, "LIVEKIT_JWT_BIND": f"127.0.0.1:{free_port()}",
               "LIVEKIT_LOG_LEVEL": "debug", "SSL_CERT_FILE": "/etc/lkjwt/ca.pem",
               "LKJWT_HOSTS_FILE": "/etc/lkjwt/hosts", **({"LIVEKIT_REDIS_URL": redis.url()} if redis else {})}
        service = ImageService(env, folder, world.mounts)
        end.callback(service.stop)
        world.recorder.target = service.start().base

        users = {name: world.home.register(f"{name}{next(world.number)}") for name in CAMERAS}
        room = users["ann"].create_room(MEMBERSHIP["compatibility"])
        users["bob"].join_room(room)
        browsers = {name: Browser(folder / name, world.folder / f"{name}.y4m") for name in CAMERAS}
        for browser in browsers.values():
            end.callback(browser.stop)
        people = {}
        running[:] = [SimpleNamespace(name=request.param, world=world, mode=mode, fate=fate, service=service, room=room,
                                      people=people)]
        for name, user in users.items():
            people[name] = Person(name, user, browsers[name], world, mode, room)
            people[name].click("lobby_joinCall")
            # One after the other: who finds a member asks for more than who is the first.
            eventually(f"{name} in the room", lambda: user.id in members(user, mode, room))
        vars(running[0]).update(people)
        yield running[0]
