"""Runs make targets that are suites of tests and adds up what they say.

    count.py audit + low unit fuzz-replay + blackbox + realworld , fresh

Lanes, divided by `+`, run side by side, the suites of a lane one after the
other; what follows a comma begins when all before it has ended. A lane that
begins with `low` gives way to the others: compilers beside suites that wait.
What a suite says is shown whole, in the order above, live as far as that
allows, and stands in build/log/SUITE.log from the moment it is said; that one
has ended is shown at once.

Every suite runs, also after one has failed. A suite that stops without a
count, counts nothing, skips, or exits with an error it did not count is a
failure of its own. The last line is `N passed, N failed`.
"""

import itertools
import os
import pathlib
import queue
import re
import subprocess
import sys
import threading
import time

OWN = re.compile(r"^(\d+) passed, (\d+) failed$")
PYTEST = re.compile(
    r"^(?:=+ )?((?:\d+ (?:passed|failed|errors?|skipped|deselected|xfailed"
    r"|xpassed|warnings?|rerun)(?:, )?)+) in [\d.]+s")
LOW_PRIORITY = 10
LOGS = pathlib.Path("build/log")


def tally(line):
    """(passed, failed) if the line is a closing count, else None."""
    own = OWN.match(line)
    if own:
        return int(own[1]), int(own[2])
    closing = PYTEST.match(line)
    if not closing:
        return None
    passed = failed = 0
    for number, word in re.findall(r"(\d+) (\w+)", closing[1]):
        if word == "passed":
            passed += int(number)
        elif word not in ("warning", "warnings"):
            failed += int(number)
    return passed, failed


class Suite:
    def __init__(self, name, low):
        self.name, self.low = name, low
        self.said = queue.Queue()  # text; None when it has ended
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = (LOGS / f"{name}.log").open("w", buffering=1)
        self.passed = self.failed = 0

    def run(self):
        try:
            self.count()
        except Exception as error:
            self.failed += 1
            self.say(f"==== {self.name}: {error!r}\n")
        finally:
            self.log.close()
            self.said.put(None)

    def say(self, text):
        self.log.write(text)
        self.said.put(text)

    def count(self):
        self.say(f"==== {self.name}\n")
        began = time.monotonic()
        counts = 0
        process = subprocess.Popen(
            ["make", "--no-print-directory", self.name], text=True,
            errors="replace", stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=(lambda: os.nice(LOW_PRIORITY)) if self.low else None)
        for line in process.stdout:
            found = tally(line.rstrip("\n"))
            if found is None:
                self.say(line)
                continue
            # Only the sum may stand alone on a line as `N passed, N failed`.
            self.say("  " + line)
            counts += 1
            self.passed += found[0]
            self.failed += found[1]
        status = process.wait()
        if (status and not self.failed) or not self.passed or not counts:
            self.failed += 1
        end = (f"==== {self.name}: {self.passed} passed, {self.failed} failed, "
               f"exit status {status}, {time.monotonic() - began:.0f} s\n")
        print(end.replace("=", "-", 4), end="", flush=True)
        self.say(end)


def divided(words, mark):
    return [list(group) for is_mark, group in itertools.groupby(
        words, lambda word: word == mark) if not is_mark]


def run_lane(suites):
    for suite in suites:
        suite.run()


def main():
    began = time.monotonic()
    done = []
    for stage in divided(sys.argv[1:], ","):
        lanes = [[Suite(name, lane[0] == "low") for name in lane
                  if name != "low"] for lane in divided(stage, "+")]
        threads = [threading.Thread(target=run_lane, args=(lane,),
                                    daemon=True) for lane in lanes]
        for thread in threads:
            thread.start()
        for suite in itertools.chain(*lanes):
            for text in iter(suite.said.get, None):
                print(text, end="", flush=True)
            done.append(suite)
    for suite in done:
        print(f"{suite.name:12}{suite.passed:6} passed "
              f"{suite.failed:4} failed")
    print(f"{time.monotonic() - began:.0f} s")
    failed = sum(suite.failed for suite in done)
    print(f"{sum(suite.passed for suite in done)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
