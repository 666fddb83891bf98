"""Builds what an operator downloads, into build/dist, and tries it.

  lkjwt-VERSION-linux-ARCH     x86_64, aarch64, armv7 (hard float)
  lkjwt-VERSION.cdx.json       what is in them (CycloneDX)
  SHA256SUMS

riscv64 and i386 are built and pass the unit tests, and are not shipped.
Every other architecture runs the unit tests; aarch64 and armv7 also the
black-box tests of BLACKBOX, below.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import sbom

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import modules  # noqa: E402
from arches import (ARCHES, CROSS, SHIPPED, TOP, binary, compiler, emulator,
                    environ, folder_of, make)

DIST = TOP / "build" / "dist"
SIZE_MAX = {"x86_64": 512 << 10}
# Black-box suites that meet the most of the machine: bytes, times, addresses,
# TLS. A file alone is the whole of it.
BLACKBOX = {
    "exchange": "", "framing": "", "validation": "", "webhook": "",
    "tls": "key_types_on_real_servers cipher_suites curves anchors "
           "good_certificates s21_bad_certificates old_versions_are_refused "
           "tls_1_3_only_is_named tls_in_small_pieces reply_cut_at_every_byte "
           "keep_alive keep_alive_on_nginx resumption_on_nginx "
           "resumption_on_openssl s22_a_session_dies_with_its_certificate "
           "s16_a_long_chain_costs_no_signature_check",
    "leave": "delegate_makes_no_room_and_no_token what_is_told_of_a_job "
             "timeout_in_range s18_timeout_out_of_range base_url required "
             "s28_stopping_sends_nothing well_known_client port_and_override "
             "the_api_is_remembered s17_jobs_of_a_user metrics "
             "scene[waiting_joined_by_webhook]",
    "zz_canary": "",
}
# 50 handshakes while /healthz is timed: an emulator's speed, not the code's.
LEFT_OUT = ("exchange.py::test_hanging_homeserver_harms_nobody_else",)
# The Makefile's own options where they matter to Zig: it makes a C library
# for each set of them.
UNIT = ["-std=gnu11", "-O2", "-g", "-fPIE", "-ffunction-sections",
        "-fdata-sections", "-fno-strict-overflow",
        "-fno-delete-null-pointer-checks", "-fstack-protector-strong",
        "-fstack-clash-protection", "-Wall", "-Wextra", "-Werror",
        "-Wno-unused-function", "-Wno-unused-command-line-argument",
        "-DUNIT_EMULATED", "-static", "-pie"]
# Long ones, of no machine in particular, take ten minutes in an emulator;
# i386 runs them, where this machine can, for all of 32 bits.
SLOW = {"jobs", "redis", "faults"}
HEAP = ("malloc", "calloc", "realloc", "free", "aligned_alloc",
        "posix_memalign", "memalign", "__libc_malloc", "brk", "sbrk")
NETNS = str(TOP / "test" / "netns")


def run(*command, **more):
    return subprocess.run([str(word) for word in command], text=True,
                          errors="replace", stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, **more)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listed(items):
    return ", ".join(sorted(items)[:12])


# ---- the binary -------------------------------------------------------------

def check_file(arch):
    """What test/audit.py asks of ./lkjwt, of each architecture."""
    folder = folder_of(arch)
    file = folder / "lkjwt"
    head = run("readelf", "-h", file).stdout
    found = re.search(r"Machine: +(.*)", head)[1]
    yield "is for that machine", "" if found == arch.machine else found
    more = run("readelf", "-lWd", file).stdout
    yield ("asks for no loader and no library",
           listed(re.findall(r"INTERP|NEEDED", more)))
    yield "is a static PIE", "" if "file type is DYN" in more else more[:99]
    flags = re.findall(r"^  (\w+) .* ([R ][W ][E ]) 0x", more, re.M)
    yield ("no memory is writable and executable, the stack included",
           listed(name for name, flag in flags if "W" in flag
                  and "E" in flag) if flags else "no program header read")
    yield "RELRO", "" if "GNU_RELRO" in more else "no GNU_RELRO"
    symbols = run("llvm-nm", folder / "build/lkjwt.unstripped").stdout
    symbols = {line.split()[-1] for line in symbols.splitlines() if line}
    yield "has no heap symbol", listed(symbols & set(HEAP))
    yield ("has the stack protector", "" if "__stack_chk_fail" in symbols
           else "not linked in")
    exported = run("llvm-nm", "-g", "--defined-only",
                   folder / "build/lkjwt.o").stdout.split()[2::3]
    yield ("lkjwt.o exports main and nothing else",
           "" if exported == ["main"] else listed(exported))
    text = file.read_bytes()
    yield ("holds no path of the build folder",
           "" if str(TOP).encode() not in text else str(TOP))
    size, limit = len(text), SIZE_MAX.get(arch.name)
    yield (f"{size} bytes" + (f", at most {limit}" if limit else ""),
           "" if size <= (limit or size) else "too big")
    if arch.bits == 32:
        # lkjwt.c asserts that time_t is wide; here that each call is, too.
        wanted = run("llvm-nm", "-u", folder / "build/lkjwt.o").stdout
        wanted = set(re.findall(r"U (\S+)", wanted))
        narrow = {"clock_gettime", "stat", "fstatat", "fstat", "lstat",
                  "ppoll", "time", "nanosleep", "utimensat"}
        yield ("every call that tells time is the 64-bit one",
               listed(wanted & narrow) if "__clock_gettime64" in wanted
               else "no __clock_gettime64")
    if arch.name == "armv7":
        tags = run("readelf", "-A", file).stdout
        missing = [tag for tag in ("Tag_CPU_arch: v7",
                                   "Tag_ABI_VFP_args: VFP registers")
                   if tag not in tags]
        yield "is for ARMv7, floats in registers", listed(missing)
    said = run(*emulator(arch), file, "--version")
    yield ("--version answers", "" if said.returncode == 0
           and re.fullmatch(r"lkjwt \S+\n", said.stdout) else said.stdout)
    anchors = [(at / "build/ca.bin").read_bytes() for at in (folder, TOP)]
    yield ("has the trust anchors of ./lkjwt", "" if anchors[0] == anchors[1]
           and anchors[0] in text else "others")


def check_twice(arch, other):
    """Built again from nothing, in a folder of another name."""
    again = make(arch, other / f"another-folder-{arch.name}")
    digests = [sha256(folder_of(arch) / "lkjwt"), sha256(again)]
    yield ("built twice, in two folders, byte for byte the same",
           "" if digests[0] == digests[1] else listed(digests))


# ---- its tests --------------------------------------------------------------

def build_unit(arch):
    folder = CROSS / arch.name
    path = folder / "build" / "unit"
    sources = [*(TOP / "test").glob("unit*"), TOP / "lkjwt.c",
               folder / "build/release/libbearssl.a"]
    if not path.is_file() or path.stat().st_mtime < max(
            source.stat().st_mtime for source in sources):
        made = run(*compiler(arch), *UNIT, "-isystem",
                   folder / "build/bearssl/inc", f"-Wa,-I{folder}/build",
                   TOP / "test/unit.c", folder / "build/release/libbearssl.a",
                   "-o", path, env=environ(folder))
        if made.returncode:
            raise RuntimeError(f"{arch.name}, unit tests: "
                               f"{made.stdout[-2000:]}")
    return path


def run_unit(arch):
    """(passed, failed, what to show) of the unit tests."""
    groups = []
    if emulator(arch):
        groups = [name for name in re.findall(
            r'\{ "([\w-]+)", *test_\w+ \}', (TOP / "test/unit.c").read_text())
            if name not in SLOW]
    done = run("nice", NETNS, *emulator(arch), build_unit(arch), *groups,
               cwd=TOP)
    last = re.search(r"(?:^|\n)(\d+) passed, (\d+) failed\n$", done.stdout)
    if not last:
        return 0, 1, done.stdout[-4000:]
    return (int(last[1]), int(last[2]) or int(done.returncode != 0),
            done.stdout[-8000:-len(last[0])])


def run_blackbox(arch, pool):
    """(passed, failed, "") of the suites; they find the binary by its path:
    one that starts it emulated."""
    folder = CROSS / arch.name / "build"
    start = folder / "lkjwt-emulated"
    start.write_text("#!/bin/sh\nexec {} {} \"$@\"\n".format(
        *emulator(arch), CROSS / arch.name / "lkjwt"))
    start.chmod(0o755)
    rows = []
    for file, names in BLACKBOX.items():
        path = f"test/blackbox/test_{file}.py"
        left_out = [f"--deselect=test/blackbox/test_{name}"
                    for name in LEFT_OUT if name.startswith(f"{file}.py::")]
        rows.append((f"{file}, {arch.name}", [
            *([f"{path}::test_{name}" for name in names.split()] or [path]),
            *left_out], len(left_out)))
    return *modules.run_all(rows, folder / "canary", pool,
                            LKJWT_BIN=str(start)), ""


# ---- what is shipped --------------------------------------------------------

def distribute():
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir(parents=True)
    version = run(TOP / "lkjwt", "--version").stdout.split()[1]
    files = {}
    for arch in SHIPPED:
        path = DIST / f"lkjwt-{version}-linux-{arch.name}"
        shutil.copyfile(folder_of(arch) / "lkjwt", path)
        path.chmod(0o755)
        files[arch] = (path.name, sha256(path))
    bill = DIST / f"lkjwt-{version}.cdx.json"
    sbom.write(bill, version, files)
    names = [name for name, _ in files.values()] + [bill.name]
    (DIST / "SHA256SUMS").write_text("".join(
        f"{sha256(DIST / name)}  {name}\n" for name in sorted(names)))
    again = DIST / "again.json"
    sbom.write(again, version, files)
    same = again.read_bytes() == bill.read_bytes()
    again.unlink()
    yield "the SBOM is valid CycloneDX 1.6", ""
    yield ("the SBOM is made twice alike", "" if same else "differs")
    done = run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=DIST)
    yield ("sha256sum --check SHA256SUMS",
           "" if done.returncode == 0 else done.stdout)
    extra = {path.name for path in DIST.iterdir()} - {*names, "SHA256SUMS"}
    yield "SHA256SUMS names every file", listed(extra)


class Tally:
    def __init__(self):
        self.passed = self.failed = 0
        self.begun = time.monotonic()

    def checks(self, title, rows):
        try:
            for text, problem in rows:
                print(f"FAIL {title}: {text}: {problem}" if problem
                      else f"ok   {title}: {text}", flush=True)
                self.add(int(not problem), int(bool(problem)))
        except Exception as error:  # the other architectures go on
            print(f"FAIL {title}: {error!r}", flush=True)
            self.add(0, 1)

    def suite(self, title, arch, future):
        try:
            passed, failed, shown = future.result()
        except Exception as error:
            passed, failed, shown = 0, 1, f"FAIL {error}"
        print(f"-- {title}, {arch.name}: {passed} passed and {failed} "
              f"failed, {time.monotonic() - self.begun:.0f} s from the start"
              f"\n{shown}".rstrip(), flush=True)
        self.add(passed, failed)

    def add(self, passed, failed):
        self.passed += passed
        self.failed += failed


def main():
    os.umask(0o022)
    tally = Tally()
    cross = [arch for arch in ARCHES if arch.target]
    with tempfile.TemporaryDirectory() as name, \
            concurrent.futures.ThreadPoolExecutor(2) as pool:
        other = pathlib.Path(name)
        # Two at a time, and what is needed first, first.
        built = {arch: pool.submit(binary, arch) for arch in ARCHES}
        units = {arch: pool.submit(
            lambda a=arch: built[a].result() and build_unit(a))
            for arch in cross}
        twice = {arch: pool.submit(
            lambda a=arch: built[a].result()
            and list(check_twice(a, other))) for arch in SHIPPED}
        for arch in ARCHES:
            tally.checks(arch.name, iter_of(built[arch], check_file, arch))
        for arch in cross:
            units[arch].exception()
        for arch in SHIPPED:
            tally.checks(arch.name, iter_of(twice[arch]))
        tally.checks("dist", distribute())
        # All of them read what this makes.
        run(TOP / ".deps/venv/bin/python", "test/unit/make.py", cwd=TOP)
        # The black box waits, the unit tests compute and give way to it.
        suites = [("unit", arch, pool.submit(run_unit, arch))
                  for arch in cross]
        with concurrent.futures.ThreadPoolExecutor(2) as each, \
                concurrent.futures.ThreadPoolExecutor(
                    modules.AT_ONCE) as waiting:
            suites += [("black box", arch,
                        each.submit(run_blackbox, arch, waiting))
                       for arch in SHIPPED if arch.target]
            for title, arch, future in suites:
                tally.suite(title, arch, future)
    for path in sorted(DIST.iterdir()):
        print(f"{path.stat().st_size:9} {path.relative_to(TOP)}")
    print(f"{tally.passed} passed, {tally.failed} failed")
    return 1 if tally.failed else 0


def iter_of(future, call=None, *args):
    """The rows of a future, or of a call once the future has ended well."""
    result = future.result()
    yield from (call(*args) if call else result)


if __name__ == "__main__":
    sys.exit(main())
