"""Searches with the fuzz targets, from the seeds of test/fuzz/, as many at
once as there are processors.

    search.py libfuzzer|afl SECONDS TARGET...

One line a target. What libFuzzer finds lies in build/fuzz-found/, its corpus
in build/corpus/TARGET; what crashed or hung under AFL++ in
build/afl/out/TARGET. The last line counts the targets.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys

FOUND = pathlib.Path("build/fuzz-found")
CORPUS = pathlib.Path("build/corpus")
AFL = pathlib.Path("build/afl")
# No file of the machine is changed for it: cores and clock as they are.
AFL_ENV = dict(os.environ, AFL_SKIP_CPUFREQ="1", AFL_NO_UI="1",
               AFL_NO_AFFINITY="1", AFL_FAST_CAL="1",
               AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES="1")


def unpack(target, folder):
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["build/fuzz-clang", "unpack", target, folder], check=True)


def logged(path, command, env):
    """(exit status, what was said) of a command that writes a log."""
    with path.open("w") as to:
        made = subprocess.run(command, env=env, stdout=to,
                              stderr=subprocess.STDOUT)
    return made.returncode, path.read_text(errors="replace")


# Each returns (what to say of a target, None or what went wrong).

def libfuzzer(target, seconds):
    unpack(target, CORPUS / target)
    FOUND.mkdir(parents=True, exist_ok=True)
    code, said = logged(
        FOUND / f"{target}.log",
        ["build/fuzz", f"-max_total_time={seconds}", "-max_len=4096",
         "-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1",
         f"-artifact_prefix={FOUND / target}-", CORPUS / target],
        dict(os.environ, FUZZ_TARGET=target))
    runs = re.search(r"number_of_executed_units: (\d+)", said)
    if code or not runs:
        return "", "\n".join(said.split("\n")[-40:])
    return f"{runs[1]} runs", None


def stats(folder):
    path = folder / "default" / "fuzzer_stats"
    if not path.is_file():
        return {}
    rows = (line.partition(":") for line in path.read_text().split("\n"))
    return {key.strip(): value.strip() for key, _, value in rows}


def afl(target, seconds):
    seeds, out = AFL / "seeds" / target, AFL / "out" / target
    for folder in (seeds, out):
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True)
    unpack(target, seeds)
    code, said = logged(
        AFL / f"{target}.log",
        ["afl-fuzz", "-V", str(seconds), "-t", "10000", "-m", "none",
         "-i", seeds, "-o", out, "--", "build/fuzz-afl"],
        dict(AFL_ENV, FUZZ_TARGET=target))
    got = stats(out)
    if code or not got:
        return "", f"afl-fuzz ended with {code}: {said[-1500:]}"
    bad = int(got["saved_crashes"]) + int(got["saved_hangs"])
    return (f"{got['execs_done']} runs, {got['corpus_found']} new, "
            f"{bad} found", f"see {out}/default" if bad else None)


def main():
    search = {"libfuzzer": libfuzzer, "afl": afl}[sys.argv[1]]
    seconds, targets = int(sys.argv[2]), sys.argv[3:]
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for target, future in [(target, pool.submit(search, target, seconds))
                               for target in targets]:
            try:
                said, problem = future.result()
            except Exception as error:
                said, problem = "", repr(error)
            if said:
                print(f"{target}: {said}", flush=True)
            if problem:
                print(f"FAIL {target}: {problem}", flush=True)
                failed += 1
    print(f"{len(targets) - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
