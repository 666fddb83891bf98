"""Runs the fuzz targets under AFL++, from the seeds of test/fuzz/.

    afl.py SECONDS TARGET...

One line a target; what crashed or hung stays in build/afl/out/TARGET. The
last line counts the targets.
"""

import os
import pathlib
import shutil
import subprocess
import sys

FOLDER = pathlib.Path("build/afl")
# No file of the machine is changed for it: cores and clock as they are.
ENV = dict(os.environ, AFL_SKIP_CPUFREQ="1", AFL_NO_UI="1",
           AFL_NO_AFFINITY="1", AFL_FAST_CAL="1",
           AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES="1")


def stats(folder):
    path = folder / "default" / "fuzzer_stats"
    if not path.is_file():
        return {}
    rows = (line.partition(":") for line in path.read_text().split("\n"))
    return {key.strip(): value.strip() for key, _, value in rows}


def run(target, seconds):
    """None, or what went wrong."""
    seeds, out = FOLDER / "seeds" / target, FOLDER / "out" / target
    for folder in (seeds, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    subprocess.run(["build/fuzz-clang", "unpack", target, seeds], check=True)
    log = FOLDER / f"{target}.log"
    with log.open("w") as to:
        made = subprocess.run(
            ["afl-fuzz", "-V", str(seconds), "-t", "10000", "-m", "none",
             "-i", seeds, "-o", out, "--", "build/fuzz-afl"],
            env=dict(ENV, FUZZ_TARGET=target), stdout=to,
            stderr=subprocess.STDOUT)
    got = stats(out)
    if made.returncode or not got:
        return f"afl-fuzz ended with {made.returncode}: " + (
            log.read_text()[-1500:])
    bad = int(got["saved_crashes"]) + int(got["saved_hangs"])
    print(f"{target}: {got['execs_done']} runs, {got['corpus_found']} new, "
          f"{bad} found", flush=True)
    return f"see {out}/default" if bad else None


def main():
    seconds, targets = int(sys.argv[1]), sys.argv[2:]
    failed = 0
    for target in targets:
        problem = run(target, seconds)
        if problem:
            print(f"FAIL {target}: {problem}", flush=True)
            failed += 1
    print(f"{len(targets) - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
