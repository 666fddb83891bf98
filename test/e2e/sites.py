"""What a call needs besides Synapse, LiveKit and the service: web pages, a
proxy that keeps notes, browsers."""
import contextlib
import json
import mimetypes
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from peers import HttpServer, Reply, inner_pid
from servers import die_with_us
from service import BIN, DEADLINE, ROOT, Service

HERE = Path(__file__).resolve().parent
KEPT = ROOT / "build/e2e"    # screenshots of the last run
PACKAGES = ROOT / ".deps/e2e/node_modules"
PREFIX = "/livekit/jwt"
LONG = 90    # seconds; only a hang is longer
# What a member sends to the room, by the mode of Element Call: state, or an event that sticks.
MEMBERSHIP = {"compatibility": "org.matrix.msc3401.call.member", "matrix_2_0": "org.matrix.msc4143.rtc.member"}


def eventually(what, ask):
    end = time.monotonic() + LONG
    while not (got := ask()):
        assert time.monotonic() < end, f"waited {LONG} s for {what}"
        time.sleep(0.2)
    return got


def members(user, mode, room):
    """The users who are in the call, as a user's homeserver has it."""
    path = f"/rooms/{urllib.parse.quote(room)}"
    if mode == "compatibility":
        status, events = user.ask(f"{path}/state")
    else:
        status, got = user.ask(f"{path}/messages?dir=b&limit=200")
        events = got["chunk"][::-1]
    assert status == 200
    last = {e["sender"]: e["content"] for e in events if e["type"] == MEMBERSHIP[mode]}
    return {sender for sender, content in last.items() if "application" in content}


class Pages(HttpServer):
    """The widget host and Element Call, /MODE/host.html, with the mode in its configuration."""

    FILES = {"host.html": HERE / "host.html", "host.js": HERE / "host.js",
             "api.js": PACKAGES / "matrix-widget-api/dist/api.js"}
    CALL = PACKAGES / "@element-hq/element-call-embedded/dist"

    def answer(self, req):
        mode, _, name = req.path[1:].partition("/")
        if name == "call/config.json":
            return Reply(200, {**json.loads((self.CALL / "config.json").read_text()), "matrix_rtc_mode": mode})
        path = self.FILES.get(name) or self.CALL / name.removeprefix("call/")
        if ".." in name or not path.is_file():
            return Reply(404)
        return Reply(200, path.read_bytes(), ctype=mimetypes.guess_type(path.name)[0] or "application/octet-stream")


class Note:
    """A request that went through the proxy, and its reply."""

    def __init__(self, req, path, reply):
        self.method, self.path, self.status = req.method, path, reply.status
        self.origin = req.header("origin")
        self.allowed = dict((k.lower(), v) for k, v in reply.headers).get("access-control-allow-origin")
        self.asked, self.got = ({} if not text else json.loads(text) for text in (req.body, reply.body))

    def __repr__(self):
        return f"<{self.method} {self.path} {sorted(self.asked)} {self.status} allowed={self.allowed}>"


class Recorder(HttpServer):
    """The reverse proxy before the service. It takes the prefix off, on another origin than the pages."""

    SKIP = ("host", "connection", "content-length", "accept-encoding", "transfer-encoding")

    def __init__(self):
        self.target, self.notes = None, []
        super().__init__()

    def answer(self, req):
        path = req.target.removeprefix(PREFIX)
        out = urllib.request.Request(
            self.target + path, req.body or None, method=req.method,
            headers={k: v for k, v in req.headers if k not in self.SKIP})
        try:
            got = urllib.request.urlopen(out, timeout=DEADLINE)
        except urllib.error.HTTPError as e:
            got = e
        except OSError:
            return Reply(502)
        with got:
            reply = Reply(got.status, got.read(),
                          [(k, v) for k, v in got.headers.items() if k.lower() not in self.SKIP])
        with self.lock:
            self.notes.append(Note(req, path, reply))
        return reply

    def noted(self, method=None, path=None):
        with self.lock:
            return [n for n in self.notes if method in (None, n.method) and path in (None, n.path)]


class ImageService(Service):
    """The service as a container runs it: the image's files as a read-only root, uid 1000, no capability, and
    mounted files in /etc/lkjwt."""

    def __init__(self, env, folder, mounts):
        root = folder / "root"    # as Dockerfile.scratch copies it; the mount point is what a runtime adds
        if not root.exists():
            (root / "etc/lkjwt").mkdir(parents=True)
            shutil.copy(BIN, root / "lk-jwt-service")
            (root / "lk-jwt-service-healthcheck").symlink_to("lk-jwt-service")
        super().__init__(env, argv=[
            "bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--uid", "1000",
            "--gid", "1000", "--cap-drop", "ALL", "--as-pid-1", "--die-with-parent", "--ro-bind", str(root), "/",
            "--ro-bind", str(mounts), "/etc/lkjwt", "--", "/lk-jwt-service"], preexec_fn=die_with_us)

    def stop(self, timeout=DEADLINE):
        if self.proc and self.proc.poll() is None:
            os.kill(inner_pid(self), signal.SIGTERM)    # bubblewrap passes none on
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.proc.wait(timeout)
        return super().stop(timeout)


def film(path, u, v):
    """A second of moving stripes in one colour: what a camera sees."""
    width, height, frames = 640, 360, 15
    with open(path, "wb") as f:
        f.write(f"YUV4MPEG2 W{width} H{height} F{frames}:1 Ip A1:1 C420jpeg\n".encode())
        for n in range(frames):
            row = bytes(60 + (x + n * width // frames) * 4 % width // 5 for x in range(width))
            f.write(b"FRAME\n" + row * height + bytes([u]) * (width * height // 4) + bytes([v]) * (width * height // 4))


class Browser:
    """Chromium, one for each user, its camera showing a film."""

    def __init__(self, folder, camera):
        self.dir = Path(folder)
        self.dir.mkdir(parents=True)
        with open(self.dir / "log", "wb") as log:
            self.proc = subprocess.Popen([
                "/usr/bin/chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
                "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-video-capture={camera}", "--autoplay-policy=no-user-gesture-required",
                "--window-size=1120,880", "--no-startup-window", "--remote-debugging-port=0",
                f"--user-data-dir={self.dir}/data"],
                env={**os.environ, "HOME": str(self.dir)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=die_with_us, start_new_session=True)

    def url(self):
        port = self.dir / "data/DevToolsActivePort"

        def ask():
            assert self.proc.poll() is None, (self.dir / "log").read_text()
            return port.exists() and port.read_text().count("\n") and port.read_text().split("\n")[0]
        return f"http://127.0.0.1:{eventually('the port of Chromium', ask)}"

    def kill(self):
        """At once; its children end when they miss it."""
        self.proc.kill()
        self.proc.wait()

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.proc.pid, signal.SIGKILL)
        self.proc.wait()
        shutil.rmtree(self.dir / "data", ignore_errors=True)


LOOK = """() => [...document.querySelectorAll('[data-testid=videoTile]')].map(tile => {
    const video = tile.querySelector('video');
    const told = {text: tile.innerText, width: video ? video.videoWidth : 0};
    if (!told.width) return told;
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [32, 18];
    const paint = canvas.getContext('2d');
    paint.drawImage(video, 0, 0, 32, 18);
    const bytes = paint.getImageData(0, 0, 32, 18).data;
    const dots = new Set(), sum = [0, 0, 0];
    for (let i = 0; i < bytes.length; i += 4) {
        dots.add(bytes.slice(i, i + 3).join());
        for (const c of [0, 1, 2]) sum[c] += bytes[i + c] / (32 * 18);
    }
    return {...told, time: video.currentTime, colours: dots.size, mean: sum.map(Math.round)};
})"""


class Person:
    """A user at a page of their own."""

    def __init__(self, name, user, browser, world, mode, room):
        self.name, self.user, self.browser = name, user, browser
        self.shown = user.id[1:].split(":")[0]    # on tiles
        remote = world.playwright.chromium.connect_over_cdp(browser.url(), timeout=LONG * 1000)
        self.page = remote.contexts[0].new_page()
        self.page.set_default_timeout(LONG * 1000)
        self.console = []
        self.page.on("console", lambda m: self.console.append(f"{m.type}: {m.text}"))
        self.page.goto(f"{world.pages.url}/{mode}/host.html")
        self.page.evaluate("start", {"server": user.server.url, "user": user.id, "device": user.device,
                                     "token": user.access_token, "room": room})
        self.call = self.page.frame_locator("iframe")

    def click(self, test_id):
        self.call.get_by_test_id(test_id).click()

    def tiles(self):
        """What this page shows: [{text, width, time, colours, mean}]"""
        frames = [f for f in self.page.frames if f != self.page.main_frame]
        return frames[0].evaluate(LOOK) if frames else []

    def seen(self):
        return self.page.evaluate("seen")

    def screenshot(self, name):
        KEPT.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=KEPT / f"{name}-{self.name}.png")
