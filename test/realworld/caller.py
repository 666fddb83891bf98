"""A user in a call: LiveKit's own SDK, which sends a tone and some bytes and
tells what it hears and reads of the others. As a program: users who join,
and wait to be told to leave, or to be killed."""
import asyncio
import json
import os
import subprocess
import sys

import numpy
from livekit import rtc

RATE = 48000
FRAME = RATE // 100
WINDOW = RATE // 2      # samples looked at in one go: 2 Hz apart in the spectrum
HANG = 30


async def soon(what, coro):
    try:
        return await asyncio.wait_for(coro, HANG)
    except asyncio.TimeoutError:
        raise AssertionError(f"waited {HANG} s for {what}") from None


class Caller:
    def __init__(self):
        self.room = rtc.Room()
        self.read = asyncio.Queue()     # (identity of the sender, bytes)
        self._streams = {}              # identity -> future of an AudioStream
        self._tone = None
        self.room.on("data_received", self._on_data)
        self.room.on("track_subscribed", self._on_track)

    def _on_data(self, packet):
        self.read.put_nowait((packet.participant and packet.participant.identity, bytes(packet.data)))

    def _on_track(self, track, publication, participant):
        if track.kind == rtc.TrackKind.KIND_AUDIO:
            self._stream(participant.identity).set_result(
                rtc.AudioStream(track, sample_rate=RATE, num_channels=1))

    def _stream(self, identity):
        if identity not in self._streams:
            self._streams[identity] = asyncio.get_running_loop().create_future()
        return self._streams[identity]

    async def join(self, grant):
        """Connect with the service's reply; rtc.ConnectError when refused."""
        await soon("the SFU to let in or refuse", self.room.connect(grant["url"], grant["jwt"]))

    async def publish(self):
        """A microphone track, silent until sing()."""
        self._source = rtc.AudioSource(RATE, 1)
        track = rtc.LocalAudioTrack.create_audio_track("microphone", self._source)
        options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
        await soon("the track to be published", self.room.local_participant.publish_track(track, options))

    async def sing(self, hertz):
        await self.publish()

        async def play():
            at = 0
            while True:
                wave = 8000 * numpy.sin(2 * numpy.pi * hertz * numpy.arange(at, at + FRAME) / RATE)
                at += FRAME
                await self._source.capture_frame(
                    rtc.AudioFrame(wave.astype(numpy.int16).tobytes(), RATE, 1, FRAME))
        self._tone = asyncio.create_task(play())

    async def say(self, data):
        await soon("the data to be sent", self.room.local_participant.publish_data(data, reliable=True))

    async def hears(self, identity, hertz):
        """Returns once half a second of that participant's audio is the tone."""
        async def listen():
            stream = await self._stream(identity)
            samples = numpy.zeros(0)
            async for event in stream:
                assert event.frame.sample_rate == RATE and event.frame.num_channels == 1
                samples = numpy.append(samples, numpy.frombuffer(event.frame.data, numpy.int16))
                if len(samples) < WINDOW:
                    continue
                peak = numpy.argmax(numpy.abs(numpy.fft.rfft(samples))) * RATE / len(samples)
                if abs(peak - hertz) <= 4 and numpy.abs(samples).max() > 1000:
                    await stream.aclose()
                    return
                samples = samples[FRAME * 10:]    # the start is silence, then noise
            raise AssertionError(f"the audio of {identity} ended")
        await soon(f"{hertz} Hz from {identity}", listen())

    async def reads(self):
        """The next (sender, bytes)."""
        return await soon("data", self.read.get())

    async def leave(self):
        if self._tone:
            self._tone.cancel()
            await asyncio.gather(self._tone, return_exceptions=True)
        await soon("the end of the call", self.room.disconnect())


class Call:
    """`async with Call() as call: ann = await call.join(grant)`; all leave at the end."""

    async def __aenter__(self):
        self.callers = []
        return self

    async def __aexit__(self, *_):
        for c in self.callers:
            await c.leave()

    async def join(self, grant):
        caller = Caller()
        self.callers.append(caller)
        await caller.join(grant)
        return caller


class Elsewhere:
    """Users in a process of their own, one for each reply of the service. Returns when all have joined."""

    def __init__(self, *grants):
        # It ends when its input does, so it does not outlive a killed suite.
        self.proc = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     text=True)
        self._tell(json.dumps([[g["url"], g["jwt"]] for g in grants]))
        said = self.proc.stdout.readline()
        if said != "joined\n":
            self.kill()
            raise AssertionError(f"they could not join: {said!r}")

    def _tell(self, line):
        self.proc.stdin.write(line + "\n")
        self.proc.stdin.flush()

    def leave(self):
        """A clean end: the SFU is told."""
        self._tell("leave")
        code = self.proc.wait(HANG)
        assert code == 0, f"exit status {code}"
        self._close()

    def kill(self):
        """kill -9: the SFU finds out by itself."""
        self.proc.kill()
        self.proc.wait()
        self._close()

    def _close(self):
        self.proc.stdin.close()
        self.proc.stdout.close()


async def main():
    loop = asyncio.get_running_loop()
    grants = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    async with Call() as call:
        await asyncio.gather(*(call.join({"url": url, "jwt": jwt}) for url, jwt in grants))
        print("joined", flush=True)
        await loop.run_in_executor(None, sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main())
    os._exit(0)    # all have left; the SDK's threads may crash while the interpreter ends around them
