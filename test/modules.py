"""Runs the modules of a folder by pytest, several at once, each in a process
and a network of its own; those named test_zz_* after all others, one by one.

    python3 test/modules.py FOLDER

For suites that wait more than they compute. What the binary writes lies in
build/canary-SUITE, which is empty at the start. What a module says is shown
but for pytest's dots; the last line counts all tests, a skipped one as failed.

Some modules keep the protocol's own deadlines, of a second or two, which a
machine that is busy with the other suites can miss: what failed in PACED is
run once more by itself at the end, and that counts.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

from count import tally

TOP = pathlib.Path(__file__).resolve().parent.parent
# More would take from rows that measure time what they gain in none.
AT_ONCE = (os.cpu_count() or 1) + 1
COMMAND = [str(TOP / "test/netns"), str(TOP / ".deps/venv/bin/python"), "-m",
           "pytest", "-q", "--timeout=300"]
PACED = ("leave", "redis", "replicas")
FEW = 12  # more failures are no matter of pace
DOTS = re.compile(r"[.]*( *\[ *\d+%\])?")


def run(title, words, left_out, env):
    """(passed, failed) of a module; words are pytest's arguments, by which
    that many tests are deselected."""
    began = time.monotonic()
    made = subprocess.run([*COMMAND, *memory(title, env), *map(str, words)],
                          cwd=TOP, env=env,
                          text=True, errors="replace", stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    counts = [found for found in map(tally, made.stdout.splitlines())
              if found]
    passed, failed = counts[-1] if counts else (0, 1)
    failed = abs(failed - left_out)  # one that is deselected counts there
    if (made.returncode or not passed) and not failed:
        failed = 1
    text = f"{title}: {passed} passed and {failed} failed, "
    text += f"{time.monotonic() - began:.0f} s\n"
    for line in made.stdout.splitlines():
        # Indented, for none of it is the sum.
        if not DOTS.fullmatch(line) and (failed or not tally(line)):
            text += f"  {line}\n"
    print(text, end="", flush=True)
    return passed, failed


def paced(title):
    """The module's name if it is one of PACED."""
    name = title.partition(",")[0]
    return name if name in PACED else None


def memory(title, env):
    """pytest's arguments for where it keeps what failed."""
    name = paced(title)
    if not name:
        return ["-p", "no:cacheprovider"]
    return ["-o", f"cache_dir={env['LKJWT_CANARY_DIR']}-failed-{name}"]


def again(row, count, env):
    """The count of a module, what failed in it run by itself."""
    title, words, left_out = row
    passed, failed = count
    if not paced(title) or not 0 < failed <= FEW:
        return count
    print(f"{title}: the {failed} that failed, by themselves", flush=True)
    good, bad = run(title, [*words, "--lf", "--lfnf=none"], passed + left_out,
                    env)
    if bad or good != failed:
        return count
    return passed + failed, 0


def run_all(modules, canary, pool, **env):
    """(passed, failed) of the modules, rows of run()'s arguments, in that
    order but for zz_*; canary is the folder to keep output in."""
    shutil.rmtree(canary, ignore_errors=True)
    env = dict(os.environ, LKJWT_CANARY_DIR=str(canary),
               LKJWT_CANARY_KEEP="1", **env)
    last = [row for row in modules if "zz_" in row[0]]
    first = [row for row in modules if row not in last]
    counts = list(pool.map(lambda row: run(*row, env), first))
    counts = [again(row, count, env) for row, count in zip(first, counts)]
    counts += [run(*row, env) for row in last]
    return tuple(map(sum, zip(*counts)))


def main():
    folder = pathlib.Path(sys.argv[1]).resolve()
    # The biggest first, so that the end is not one module's.
    modules = [(path.stem.removeprefix("test_"), [path], 0) for path in sorted(
        folder.glob("test_*.py"), key=lambda path: -path.stat().st_size)]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        passed, failed = run_all(
            modules, TOP / "build" / f"canary-{folder.name}", pool)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
