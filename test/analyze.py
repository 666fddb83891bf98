"""What analyzers say of lkjwt.c: clang's, gcc's, cppcheck, and the unit
tests under MemorySanitizer.

    analyze.py FOLDER     of BearSSL's headers

A finding that is none stands in a table here, by its kind and function, with
the reason; a row that nothing matches any more is a failure too. The last
line counts the tools, and the rows of the unit tests.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys

import audit

TOP = audit.TOP
# (kind, function): why it is none
NOT_SO = {
    ("comparePointers", "ca_load"):
        "both ends are labels about one .incbin: one object to the linker",
    ("legacyUninitvar", "lookup_srv"):
        "BB() takes the array's address and size, it reads nothing",
    ("legacyUninitvar", "main_limits"):
        "BB() takes the array's address and size, it reads nothing",
    ("ctuuninitvar", "js_blank"):
        "js_parse sets each member that is read; the tables fill up later",
    ("nullPointerRedundantCheck", "lookup_fail"):
        "the call is looked into only where has_addr or has_status say so",
    ("core.UndefinedBinaryOperatorResult", "io_port"):
        "getsockname() has filled it; the analyzer does not know the call",
    ("deadcode.DeadStores", "intake_take"):
        "one declaration of two places; the second is set anew below",
}


def run(*command):
    return subprocess.run(command, text=True, capture_output=True, cwd=TOP)


def function_at(src, line):
    for at in range(line - 1, -1, -1):
        text = src.code_lines[at]
        if re.match(r"[A-Za-z_].*\w\(", text) and not text.endswith(";"):
            return re.search(r"(\w+)\(", text)[1]
    return "?"


def judge(src, found, used):
    """What of (kind, line, message) no row explains; `used` gets those
    that one does."""
    wrong = []
    for kind, line, message in found:
        key = kind, function_at(src, int(line))
        if key in NOT_SO:
            used.add(key)
        else:
            wrong.append(f"{key[1]} ({line}): {message} [{kind}]")
    return wrong


def cppcheck(src, headers, used):
    made = run("cppcheck", "--quiet", "--std=c11", "--platform=unix64",
               "--enable=warning,performance,portability", "--max-configs=1",
               "-D__x86_64__", f"-I{headers}",
               "--suppress=missingIncludeSystem",
               "--template={file}\t{id}\t{line}\t{message}", "lkjwt.c")
    found = re.findall(r"^lkjwt\.c\t(\w+)\t(\d+)\t(.*)$", made.stderr,
                       re.M)
    return judge(src, found, used) + (
        [made.stderr] if made.returncode else [])


def clang(src, headers, used):
    made = run("clang", "--analyze", "-std=c11", "--analyzer-output", "text",
               "-isystem", headers, "-Xclang", "-analyzer-checker="
               "core,unix,deadcode,nullability,security.FloatLoopCounter",
               "lkjwt.c", "-o", "/dev/null")
    found = re.findall(r"^lkjwt\.c:(\d+):\d+: warning: (.*) \[(\S+)\]$",
                       made.stderr, re.M)
    return judge(src, [(kind, line, text) for line, text, kind in found],
                 used) + ([made.stderr] if made.returncode else [])


def gcc(_src, _headers, _used):
    made = run("make", "--no-print-directory", "warn-analyzer")
    return [made.stderr] if made.returncode else []


def memory():
    """Rows of the unit tests: (passed, failed, what was said of failures)."""
    made = run("test/netns", "build/unit-msan")
    said = "\n".join([*(line for line in made.stdout.split("\n")
                        if line.startswith("FAIL")), made.stderr[-2000:]])
    count = re.search(r"^(\d+) passed, (\d+) failed$", made.stdout, re.M)
    ok, bad = (int(count[1]), int(count[2])) if count else (0, 0)
    return ok, bad or int(made.returncode != 0), said.lstrip("\n")


def main():
    src = audit.Source()
    passed = failed = 0
    used = set()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = pool.submit(memory)  # takes longest
        tools = [(name, pool.submit(tool, src, sys.argv[1], used))
                 for name, tool in (("clang --analyze", clang),
                                    ("gcc -fanalyzer", gcc),
                                    ("cppcheck", cppcheck))]
        for name, tool in tools:
            wrong = tool.result()
            print(f"FAIL {name}: " + "\n  ".join(wrong) if wrong
                  else f"ok   {name}", flush=True)
            passed += not wrong
            failed += bool(wrong)
        ok, bad, said = rows.result()
    stale = [f"{kind} in {name}" for kind, name in NOT_SO
             if (kind, name) not in used]
    if stale:
        print("FAIL exceptions that nothing needs any more:", *stale)
        failed += 1
    print(f"{said}{'FAIL' if bad else 'ok  '} the unit tests under "
          f"MemorySanitizer: {ok} rows, {bad} failed")
    print(f"{passed + ok} passed, {failed + bad} failed")
    return failed + bad > 0


if __name__ == "__main__":
    sys.exit(main())
