"""Runs the modules of a folder by pytest, several at once, each in a process
and a network of its own; those named test_zz_* after all others, one by one.

    .deps/venv/bin/python test/modules.py FOLDER

For suites that wait more than they compute. What the binary writes lies in
build/canary-SUITE, which is empty at the start. Output is shown where a
module fails; the last line counts all tests, a skipped one as failed.
"""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import time

from count import tally

TOP = pathlib.Path(__file__).resolve().parent.parent
AT_ONCE = 2 * os.cpu_count()
COMMAND = [str(TOP / "test/netns"), sys.executable, "-m", "pytest", "-q",
           "-p", "no:cacheprovider", "--timeout=300", "--durations=3"]


def run(path, env):
    """(passed, failed) of a module."""
    began = time.monotonic()
    made = subprocess.run([*COMMAND, str(path)], cwd=TOP, env=env, text=True,
                          errors="replace", stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    counts = [found for found in map(tally, made.stdout.splitlines())
              if found]
    passed, failed = counts[-1] if counts else (0, 1)
    if (made.returncode or not passed) and not failed:
        failed = 1
    text = f"{path.stem}: {passed} passed and {failed} failed, "
    text += f"{time.monotonic() - began:.0f} s\n"
    if failed:
        # Indented, for none of it is the sum.
        text += "".join(f"  {line}\n" for line in made.stdout.splitlines())
    print(text, end="", flush=True)
    return passed, failed


def main():
    folder = pathlib.Path(sys.argv[1]).resolve()
    canary = TOP / "build" / f"canary-{folder.name}"
    shutil.rmtree(canary, ignore_errors=True)
    env = dict(os.environ, LKJWT_CANARY_DIR=str(canary),
               LKJWT_CANARY_KEEP="1")
    # The biggest first, so that the end is not one module's.
    modules = sorted(folder.glob("test_*.py"),
                     key=lambda path: -path.stat().st_size)
    last = [path for path in modules if path.name.startswith("test_zz_")]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        counts = list(pool.map(lambda path: run(path, env),
                               [path for path in modules if path not in last]))
    counts += [run(path, env) for path in last]
    failed = sum(count[1] for count in counts)
    print(f"{sum(count[0] for count in counts)} passed, {failed} failed")
    return 1 if failed or not counts else 0


if __name__ == "__main__":
    sys.exit(main())
