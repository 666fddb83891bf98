"""The invariants that a reader of lkjwt.c may rely on, checked by machine.

One line a check, in the order of a reading: the source, its parts, the
binary. The last line counts them. STYLE's words: PART I is pure, PART II
sees the world through io_* alone, PART III has the system calls.
"""

import collections
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

import scratch

TOP = pathlib.Path(__file__).resolve().parent.parent
SOURCE = TOP / "lkjwt.c"
README = TOP / "README.md"
OBJECT = TOP / "build" / "lkjwt.o"
UNSTRIPPED = TOP / "build" / "lkjwt.unstripped"
BINARY = TOP / "lkjwt"
SIZE_MAX = 512 * 1024
COLUMNS = 79
GRANT_LINES = 40

HEAP = """malloc calloc realloc reallocarray free aligned_alloc memalign
    posix_memalign valloc brk sbrk __libc_malloc __libc_free __expand_heap
    """.split()
# The first row overruns or lies about errors; the second drags a heap in.
BANNED = """strcpy strcat sprintf vsprintf strtok atoi atol atof gets scanf
    sscanf fscanf alloca strncpy strncat
    fopen fdopen getline getdelim strdup strndup setenv putenv atexit syslog
    strftime localtime_r gmtime_r localtime gmtime timegm mktime getaddrinfo
    gethostbyname opendir qsort_r system popen""".split()
# What PART I may call: memory, text, and the arithmetic of BearSSL. No
# system call, no clock, no randomness.
PURE = re.compile(r"""^(mem(cpy|move|set|cmp|chr|rchr|mem)
    |str(len|cmp|ncmp|chr|nlen)|snprintf|inet_(ntop|pton)
    |__stack_chk_fail|_GLOBAL_OFFSET_TABLE_
    |br_(sha\d+|hmac|hmac_key|enc|dec|ccopy|rsa|ec|ecdsa)\w*)$""", re.X)
# PART II adds BearSSL's engine, which calls nothing either, the loop's table
# of what is watched, and the exit of an assertion that failed.
MACHINE = re.compile(PURE.pattern + r"|^(br|io|loop)_\w+$|^_exit$", re.X)


def run(*command, **more):
    return subprocess.run(command, text=True, capture_output=True, cwd=TOP,
                          **more)


def blank_comments(text):
    """Comments and string literals to blanks, line numbers kept."""
    token = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"'
                       r"|'(?:\\.|[^'\\\n])*'", re.S)
    return token.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


class Source:
    def __init__(self):
        self.text = SOURCE.read_text()
        self.lines = self.text.split("\n")
        self.code = blank_comments(self.text)
        self.code_lines = self.code.split("\n")
        # (section, line index of its banner, the banner's first line)
        self.banners = [(m[1], at, line) for at, line in enumerate(self.lines)
                        if (m := re.match(r"/\* ==== (\d\d\w?) ", line))]

    def part(self, name):
        """Line index of the first banner of a part; I ends where any
        banner of another kind follows."""
        return next(at for _, at, line in self.banners if name in line)

    def part_one_end(self):
        begin = self.part("PART I:")
        return next(at for _, at, line in self.banners
                    if at > begin and "PART I:" not in line)

    def section(self, number):
        ends = [at for _, at, _ in self.banners] + [len(self.lines)]
        at = next(at for name, at, _ in self.banners if name == number)
        return "\n".join(self.lines[at:min(e for e in ends if e > at)])

    def events(self):
        """(name, number) of each row of the event table."""
        table = re.search(r"#define EVENT_TAB\(X\)(.*\\\n)*.*", self.text)
        return re.findall(r"\bX\((\w+),\s*(\d+)", table[0])

    def where(self, pattern, lines=None):
        """Line numbers where the pattern stands in the code."""
        return [at + 1 for at, line in
                enumerate(self.code_lines if lines is None else lines)
                if re.search(pattern, line)]


# ---- the source ------------------------------------------------------------

def check_columns(src):
    long = [at + 1 for at, line in enumerate(src.lines)
            if len(line.expandtabs(8)) > COLUMNS]
    yield f"source: no line over {COLUMNS} columns", listed(long)
    odd = src.where(r"[^\x00-\x7f]|\t| $", src.lines)
    yield "source: ASCII, no tab, no blank at a line's end", listed(odd)


def check_map(src):
    names = [name for name, _, _ in src.banners]
    yield ("source: sections from 00, each once, in order",
           "" if names == sorted(set(names)) and names[:1] == ["00"]
           and names[-1] == "27" else listed(names))


def check_events(src):
    rows = src.events()
    code = re.sub(r"#define \w+_TAB\(X\)(.*\\\n)*.*", "", src.code)
    yield "events: the table has rows", "" if rows else "no X(NAME, number"
    numbers = collections.Counter(number for _, number in rows)
    twice = [number for number, count in numbers.items() if count > 1]
    yield "events: no number is given twice", listed(twice)
    used = set(re.findall(r"\bEV_(\w+)", code))
    unused = [name for name, _ in rows if name not in used]
    yield "events: each is used in the code", listed(unused)
    known = {name for name, _ in rows} | {"NONE", "CNT"}
    yield ("events: each that the code names is in the table",
           listed(sorted(used - known - {""})))


def check_words(src):
    banned = [f"{word} in line {at}" for word in BANNED + HEAP
              for at in src.where(rf"(?<![\w.>]){word}\s*\(")]
    yield "source: no banned call, no heap call", listed(banned)
    # A statement that logs ends at its semicolon, not at its line; what
    # opens a block first is the head of a function.
    leaks = []
    for call in re.finditer(r"(?i)\b\w*log\w*\s*\(", src.code):
        statement = src.code[call.start():src.code.find(";", call.end())]
        if "\n{" not in statement and re.search(r"\bsec_\w", statement):
            leaks.append(src.code.count("\n", 0, call.start()) + 1)
    yield "source: no secret (sec_) in a statement that logs", listed(leaks)


def check_manual(src):
    manual = src.section("00")
    rest = src.text[len(manual):]
    names = set(re.findall(r"(?<![\w/.*-])(?!test_)[a-z]\w*_[a-z]\w*"
                           r"(?![\w*]|\.py)", manual))
    yield ("manual: each name it mentions is in the source",
           listed(sorted(name for name in names
                         if not re.search(rf"\b{name}\b", rest))))
    told = dict(re.findall(r"\n \*   S(\d+) .*?\b(test_s\d\d_\w+)", manual,
                           re.S))
    tests = claim_tests()
    yield ("manual: it lists S1 to S30, each with a test of its name",
           listed([f"S{n}" for n in CLAIMS
                   if told.get(str(n)) not in tests[n]]))


CLAIMS = range(1, 31)  # S1 to S30


def claim_tests():
    """Names of the tests of each claim: test_s01_..., test_s08_s12_..."""
    found = collections.defaultdict(set)
    for path in [*(TOP / "test").glob("*/test_*.py"),
                 *(TOP / "test").glob("unit_*.h")]:
        for name, claims in re.findall(r"\b(test_((?:s\d\d_)+)\w+)\(",
                                       path.read_text()):
            for number in re.findall(r"\d\d", claims):
                found[int(number)].add(name)
    return found


def check_claims(src):
    tests = claim_tests()
    yield ("claims: S1 to S30 have tests of their names, no other number has",
           listed([f"S{n}" for n in set(CLAIMS) ^ set(tests)]))


def functions(src):
    """(name, text) of each function; comments and literals are blanks."""
    name, head = None, 0
    for at, line in enumerate(src.code_lines):
        if re.match(r"[A-Za-z_].*\w\(", line) and not line.endswith(";"):
            name, head = re.search(r"(\w+)\(", line)[1], at
        elif line == "}" and name:
            yield name, "\n".join(src.code_lines[head:at + 1])
            name = None


# What may be compared by other means than ct_eq: nobody may guess at these.
PLAIN_COMPARISON = {
    "main": "the name of a command",
    "hs_swap": "hashes of certificates that the peer itself has sent",
}
SECRET = re.compile(r"\b(mac|want|sum|digest|hash|sec_\w+"
                    r"|\w*(?:secret|password)\w*)\b")


def check_secrets(src):
    """S29 and S30, as far as the source shows them."""
    body = dict(functions(src))
    users = {name for name, text in body.items() if "ct_eq(" in text}
    yield ("S29: MACs and hashes of bodies are compared where they should be",
           differ(users - {"ct_eq"}, {"jwt_signers", "srv_webhook",
                                      "stream_webhook", "as_is_homeserver"},
                  "more", "missing"))
    wrong = [f"{name}: {call}" for name in users - {"ct_eq"} for call in
             re.findall(r"ct_eq\(.*?\)", body[name], re.S)
             if not re.fullmatch(r"ct_eq\([\w.]+, [\w.]+, 32\)", call)]
    yield "S29: over their whole length", listed(wrong)
    compare = body.get("ct_eq", "")
    yield ("S29: ct_eq has no branch but its count, and looks at all bytes",
           "" if len(re.findall(r"\bfor\b", compare)) == 1
           and "|= a[i] ^ b[i]" in compare
           and compare.count("return") == 1 and not re.search(
               r"\b(if|while|break|continue|goto|memcmp)\b|\?|&&|\|\|",
               compare) else compare)
    # a call's arguments: what is in brackets, brackets in them included
    plain = {name for name, text in body.items() for args in re.findall(
                 r"\b(?:memcmp|strn?cmp|sl_i?eq)"
                 r"\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)", text)
             if SECRET.search(args)}
    yield ("S29: nothing else compares what is secret",
           differ(plain, set(PLAIN_COMPARISON), "source", "the list here"))
    starts = {name: text for name, text in body.items()
              if re.search(r"\bbr_ssl_(client|engine|server)_\w*"
                           r"(reset|init_full)\(", text)}
    order = [r"uint8_t seed\[32\];", r"io_random\(seed, sizeof seed\);",
             r"br_ssl_engine_inject_entropy\(&cc->eng, seed, sizeof seed\);",
             r"wipe\(seed, sizeof seed\);", r"br_ssl_client_reset\("]
    yield ("S30: TLS contexts start in one function, seeded by io_random",
           "" if len(starts) == 1 and re.search(
               r"[^\0]*".join(order), *starts.values()) else listed(starts))
    yield ("S30: no library opens a device for randomness",
           "" if b"/dev/urandom" not in BINARY.read_bytes()
           and b"/dev/random" not in BINARY.read_bytes() else "it does")


def check_grants(src):
    told = re.search(r"^ \* GRANTS:(?:.*\n)((?: \* .*\n)+)",
                     src.section("00"), re.M)
    told = set(re.findall(r"^ \*   (\w+) ", told[1], re.M)) if told else set()
    names, long = set(), []
    for at, line in enumerate(src.lines):
        if at < src.banners[1][1] or not re.match(r"(/\*| \*).*\bGRANTS\b",
                                                  line):
            continue
        head = next(i for i in range(at, len(src.lines))
                    if re.match(r"[A-Za-z].*\w\(", src.code_lines[i]))
        end = next(i for i in range(head, len(src.lines))
                   if src.lines[i].startswith("}"))
        name = re.search(r"(\w+)\(", src.code_lines[head])[1]
        names.add(name)
        if end - head + 1 > GRANT_LINES:
            long.append(f"{name}: {end - head + 1}")
    yield ("grants: functions that give access are marked",
           "" if 5 <= len(names) <= 10 else f"{len(names)} marked")
    yield ("grants: section 00 lists those and no other",
           differ(told, names, "manual", "source"))
    yield f"grants: none is longer than {GRANT_LINES} lines", listed(long)


# ---- parts, compiled alone -------------------------------------------------

def compile_part(src, end, folder):
    """Symbols of the lines before `end`, as nm prints them."""
    part = folder / f"upto{end}.c"
    part.write_text("\n".join(src.lines[:end]) + "\n")
    inc = next(path for path in (TOP / "build/bearssl/inc", TOP / "build/inc",
                                 pathlib.Path(os.environ.get("BEARSSL", "/-"))
                                 / "inc") if path.is_dir())
    made = run("musl-gcc", "-std=c11", "-O1", "-w", "-fno-pie",
               "-fno-stack-protector", "-fkeep-static-functions",
               "-isystem", str(inc), f"-Wa,-I{TOP / 'build'}", "-c",
               str(part), "-o", str(part.with_suffix(".o")))
    if made.returncode:
        return None, made.stderr[:400]
    return [line.split() for line in
            run("nm", str(part.with_suffix(".o"))).stdout.splitlines()], ""


def check_parts(src, folder):
    symbols, problem = compile_part(src, src.part_one_end(), folder)
    yield "PART I: it compiles alone", problem
    if symbols is not None:
        foreign = [s[-1] for s in symbols
                   if s[-2] in "UwW" and not PURE.match(s[-1])]
        yield ("PART I: it calls memory and arithmetic only",
               listed(foreign))
        state = [s[-1] for s in symbols if s[-2] in "dDbBcCsSgG"]
        yield "PART I: it holds no writable data", listed(state)
    symbols, problem = compile_part(src, src.part("PART III:"), folder)
    yield "PART II: it compiles without PART III", problem
    if symbols is not None:
        foreign = [s[-1] for s in symbols
                   if s[-2] in "UwW" and not MACHINE.match(s[-1])]
        yield ("PART II: it reaches the world through io_* alone",
               listed(foreign))
    for kind, text in (("gcc", "gcc compiles it without a warning"),
                       ("clang", "clang compiles it without a warning"),
                       ("analyzer", "gcc's static analyzer finds nothing")):
        made = run("make", "--no-print-directory", f"warn-{kind}")
        yield (f"source: {text}",
               "" if made.returncode == 0 else made.stderr[-600:])


# ---- the binary ------------------------------------------------------------

def check_binary(_):
    names = run("nm", "-g", "--defined-only", str(OBJECT)).stdout.split()[2::3]
    yield ("binary: lkjwt.o exports main and nothing else",
           "" if names == ["main"] else listed(names))
    symbols = {line.split()[-1] for line in
               run("nm", str(UNSTRIPPED)).stdout.splitlines()}
    yield "binary: no heap symbol", listed(sorted(symbols & set(HEAP)))
    heads = run("readelf", "-lWd", str(BINARY)).stdout
    yield ("binary: asks for no loader and no library",
           listed(re.findall(r"INTERP|NEEDED", heads)))
    yield ("binary: addresses are random (static PIE)",
           "" if "file type is DYN" in heads else "not a PIE")
    flags = re.findall(r"^  (\w+) .* ([R ][W ][E ]) 0x", heads, re.M)
    yield ("binary: no memory is writable and executable, the stack included",
           listed([name for name, flag in flags if "W" in flag
                   and "E" in flag]) if flags else "no program header read")
    yield ("binary: relocated data is read-only (RELRO)",
           "" if "GNU_RELRO" in heads else "no GNU_RELRO")
    yield ("binary: stack protector",
           "" if "__stack_chk_fail" in symbols else "not linked in")
    size = BINARY.stat().st_size
    yield (f"binary: at most {SIZE_MAX} bytes ({size})",
           "" if size <= SIZE_MAX else "too big")
    text = BINARY.read_bytes()
    yield ("binary: holds no path of the build folder",
           "" if str(TOP).encode() not in text else str(TOP))


def check_twice(folder):
    """Built again from nothing, in a folder of another name."""
    copy = folder / "another-folder"
    copy.mkdir()
    for file in ("Makefile", "lkjwt.c"):
        shutil.copy(TOP / file, copy / file)
    if (TOP / ".deps").is_dir():
        (copy / ".deps").symlink_to(TOP / ".deps")
    made = subprocess.run(["make", "-s", "all"], cwd=copy, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        yield "build: twice, in two folders", made.stdout[-600:]
        return
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()
               for path in (BINARY, copy / "lkjwt")]
    yield (f"build: twice, in two folders, byte for byte the same "
           f"({digests[0][:16]})",
           "" if digests[0] == digests[1] else listed(digests))


def check_scratch(folder):
    root = folder / "root"
    root.mkdir()
    shutil.copy(BINARY, root / "lk-jwt-service")
    (root / "lk-jwt-service-healthcheck").symlink_to("lk-jwt-service")
    yield from scratch.checks(root)


# ---- what it says of itself ------------------------------------------------

ENV_NAME = r"\b(?:LIVEKIT|LKJWT|LK_JWT|SSL_CERT|HTTPS?|ALL)_[A-Z][A-Z_]*\b"


def words(text):
    """The words alone: line breaks, comment marks and dashes may differ."""
    return " ".join(re.findall(r"[A-Za-z0-9.,'\"()]+", text))


def check_licence(_):
    said = words(run(str(BINARY), "--license").stdout)
    # One text serves all three: each file's notice, then what they share.
    texts = {"LICENSE": TOP / "LICENSE",
             "BearSSL's LICENSE.txt": TOP / "build/bearssl/LICENSE.txt"}
    for name, path in texts.items():
        if not path.is_file():  # BearSSL may have come built
            continue
        notice, _, terms = path.read_text().partition("Permission is")
        notice = notice.replace("MIT License", "")
        wanted = [words(notice), words("Permission is" + terms)]
        missing = [text[:60] for text in wanted if text not in said]
        yield f"licence: --license prints {name}", listed(missing)
    yield ("licence: it names musl and its authors",
           "" if "musl" in said and "Rich Felker" in said else "not found")


def metrics_served():
    """Names of the metrics that a service just started serves."""
    env = dict(scratch.ENV, LIVEKIT_JWT_BIND="127.0.0.1:0",
               LKJWT_METRICS_BIND="127.0.0.1:0")
    names = set()
    with subprocess.Popen([str(BINARY)], env=env, text=True,
                          stderr=subprocess.PIPE) as service:
        for line in service.stderr:
            found = re.search(r"\bmetrics=\S*:(\d+)", line)
            if found:
                with urllib.request.urlopen(
                        f"http://127.0.0.1:{found[1]}/metrics",
                        timeout=scratch.DEADLINE_S) as reply:
                    names = set(re.findall(r"^# TYPE (\w+)",
                                           reply.read().decode(), re.M))
                break
        service.terminate()
    return names


def check_readme(src):
    readme = README.read_text() if README.is_file() else ""
    yield "README: is there", "" if readme else "no README.md"
    said = run(str(BINARY), "--help").stdout
    ours = set(re.findall(ENV_NAME, said))
    table = "\n".join(line for line in readme.split("\n")
                      if line.startswith("|"))
    theirs = set(re.findall(ENV_NAME, table))
    yield "README: --help names variables", "" if len(ours) > 20 else said
    yield ("README: its tables name the variables that --help names",
           differ(theirs, ours))
    rows = set(src.events())
    listed_rows = {(name, number) for number, name in re.findall(
        r"^\|\s*(\d{4})\s*\|\s*`?(\w+)`?\s*\|", readme, re.M)}
    yield ("README: its table of events is that of the source",
           differ({f"{b} {a}" for a, b in listed_rows},
                  {f"{b} {a}" for a, b in rows}))
    metric = r"\b((?:lkjwt|process)_[a-z0-9_]+)"
    served = metrics_served()
    told = set(re.findall(r"`" + metric, table))
    yield ("README: its table of metrics is that of the source",
           differ(told, served))


def listed(items):
    items = [str(item) for item in items]
    return ", ".join(items[:12]) + (f" and {len(items) - 12} more"
                                    if len(items) > 12 else "")


def differ(one, other, one_name="README", other_name="program"):
    parts = []
    if one - other:
        parts.append(f"{one_name} only: {listed(sorted(one - other))}")
    if other - one:
        parts.append(f"{other_name} only: {listed(sorted(other - one))}")
    return "; ".join(parts)


def main():
    os.umask(0o022)
    src = Source()
    passed = failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        groups = [
            lambda: check_columns(src), lambda: check_map(src),
            lambda: check_events(src), lambda: check_words(src),
            lambda: check_manual(src), lambda: check_claims(src),
            lambda: check_secrets(src), lambda: check_grants(src),
            lambda: check_parts(src, folder), lambda: check_binary(src),
            lambda: check_twice(folder),
            lambda: check_scratch(folder), lambda: check_licence(src),
            lambda: check_readme(src),
        ]
        for group in groups:
            try:
                for text, problem in group():
                    print(f"FAIL {text}: {problem}" if problem
                          else f"ok   {text}", flush=True)
                    passed += not problem
                    failed += bool(problem)
            except Exception as error:
                print(f"FAIL a check broke off: {error!r}", flush=True)
                failed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
