"""Runs make targets that are suites of tests and adds up what they say.

Every suite runs, also after one has failed. A suite that stops without a
count, counts nothing, skips, or exits with an error it did not count is a
failure of its own. The last line is `N passed, N failed`.
"""

import re
import subprocess
import sys
import time

OWN = re.compile(r"^(\d+) passed, (\d+) failed$")
PYTEST = re.compile(
    r"^(?:=+ )?((?:\d+ (?:passed|failed|errors?|skipped|deselected|xfailed"
    r"|xpassed|warnings?|rerun)(?:, )?)+) in [\d.]+s")


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


def run(suite):
    print(f"==== {suite}", flush=True)
    began = time.monotonic()
    passed = failed = counts = 0
    process = subprocess.Popen(
        ["make", "--no-print-directory", suite], text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        found = tally(line.rstrip("\n"))
        if found is None:
            print(line, end="", flush=True)
            continue
        # Only the sum may stand alone on a line as `N passed, N failed`.
        print(" ", line, end="", flush=True)
        counts += 1
        passed += found[0]
        failed += found[1]
    status = process.wait()
    if (status and not failed) or not passed or not counts:
        failed += 1
    print(f"==== {suite}: {passed} passed, {failed} failed, exit status "
          f"{status}, {time.monotonic() - began:.0f} s", flush=True)
    return suite, passed, failed


def main():
    results = [run(suite) for suite in sys.argv[1:]]
    for suite, passed, failed in results:
        print(f"{suite:12}{passed:6} passed {failed:4} failed")
    failed = sum(result[2] for result in results)
    print(f"{sum(result[1] for result in results)} passed, {failed} failed")
    return 1 if failed else 0


sys.exit(main())
