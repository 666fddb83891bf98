"""docs/lkjwt.8 is well-formed and says what the program does and README.md
says: nothing is missing, nothing is left over."""

import re
import shutil
import signal
import subprocess

import pytest

import manpage
from service import Service, base_env, run_cli

README = (manpage.ROOT / "README.md").read_text()
TEXT = manpage.PAGE.read_text()
SOURCE = (manpage.ROOT / "lkjwt.c").read_text()


def items(heading):
    """The arguments of .It of the first list under that heading."""
    found = re.search(rf'^\.S[hs] {heading}\n(.*?)^\.El$', TEXT, re.M | re.S)
    return re.findall(r"^\.It (.*)$", found[1], re.M)


def words(heading, macro):
    """The names in these items, their macro left out."""
    return [word for item in items(heading)
            for word in item.removeprefix(macro + " ").split(" , ")]


def test_lint():
    done = subprocess.run([shutil.which("mandoc"), "-T", "lint",
                           manpage.PAGE], text=True, capture_output=True)
    # That a page referred to is installed here says nothing about this one.
    said = [line for line in done.stdout.splitlines()
            if "referenced manual not found" not in line]
    assert said == [], "\n".join(said)


@pytest.mark.parametrize("output", ["ascii", "utf8", "html", "markdown"])
def test_renders(output):
    done = subprocess.run([shutil.which("mandoc"), "-T", output,
                           manpage.PAGE], text=True, capture_output=True)
    assert done.returncode == 0
    bare = re.sub(r".\x08|[\\*&]|<[^>]*>", "", done.stdout)
    bare = " ".join(bare.split())
    for word in ("LKJWT_METRICS_BIND", "SIGTERM", "EXIT STATUS", "--check"):
        assert word in bare, (output, word)


def test_columns():
    assert [line for line in TEXT.splitlines() if len(line) > 79] == []


def test_variables_are_those_of_help():
    assert manpage.split()[1] == manpage.table(), (
        "run: python3 test/dash/manpage.py")


def test_variables_are_those_of_readme():
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", README, re.M))
    page = {}
    for item in items("ENVIRONMENT"):
        name, _, rest = item.removeprefix("Ev ").partition(" Pq ")
        page[name] = rest.removeprefix("default Ql ")
    assert page == {n: d.strip("`") for n, d in rows.items()}
    # The old names, which stand outside the tables.
    named = set(re.findall(r"^\.Ev ([A-Z_]+)", TEXT, re.M)) - set(page)
    old = re.search(r"^Old and rival names .*?:(.*?)\.", README, re.M | re.S)
    assert named == set(re.findall(r"\w+", old[1]))


def test_options_are_those_of_help():
    """In the synopsis and in the list, with their arguments."""
    said = [line.removeprefix("lkjwt").strip()
            for line, _ in manpage.parts()[0]]
    listed = [re.sub(r" Op Ar (\w+)", r" [\1]", item).replace("Fl -", "--")
              for item in items("DESCRIPTION")]
    lines = re.search(r"^\.Sh SYNOPSIS\n(.*?)^\.Sh", TEXT, re.M | re.S)[1]
    synopsis = [" ".join(one.split()) for one in re.sub(
        r"\.Op Ar (\w+)", r"[\1]", lines).replace(
        ".Fl -", "--").split(".Nm\n")[1:]]
    want = [line.replace("SERVER_NAME", "server_name") for line in said]
    assert synopsis == want
    assert [""] + listed == want


def test_endpoints_are_those_of_readme():
    table = README[README.index("\n## Endpoints"):]
    table = table[:table.index("\nPaths may")]
    named = re.findall(r"^\| `(/\w[\w/]*)`", table, re.M)
    assert sorted(words("Endpoints", "Pa")) == sorted(named)


def test_signals_are_those_caught():
    """What a running service handles, as the kernel has it."""
    with Service(base_env()) as s:
        with open(f"/proc/{s.pid}/status") as f:
            mask = int(re.search(r"^SigCgt:\s*(\w+)", f.read(), re.M)[1], 16)
    caught = {signal.Signals(n).name for n in range(1, 32)
              if mask >> (n - 1) & 1}
    assert set(words("Signals", "Dv")) == caught
    told = {s.name for s in signal.Signals
            if re.search(rf"\b{s.name}\b", README)}
    assert told - {"SIGKILL", "SIGSTOP", "SIGCONT"} <= caught


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_signals_do_what_is_said(number):
    with Service(base_env()) as s:
        s.signal(signal.SIGHUP)
        s.wait_event("ANCHORS", 2)
        s.signal(getattr(signal, number))
        assert s.wait() == 0


CODES = [
    ("version", ["--version"], {}, 0),
    ("help", ["--help"], {}, 0),
    ("license", ["--license"], {}, 0),
    ("faults", [], {}, 1),
    ("a variable with a fault", [], base_env(LKJWT_MAX_CONNS="0"), 1),
    ("no Redis", [], base_env(LIVEKIT_REDIS_URL="redis://127.0.0.1:1"), 1),
    ("unknown option", ["--no-such"], base_env(), 1),
    ("argument too many", ["--version", "x"], base_env(), 1),
    ("check", ["--check"], base_env(), 1),
    ("healthcheck", ["--healthcheck"], base_env(), 1),
    ("print-config", ["--print-config"], base_env(), 0),
    ("print-config with faults", ["--print-config"], {}, 1),
]


@pytest.mark.parametrize("args,env,code", [row[1:] for row in CODES],
                         ids=[row[0] for row in CODES])
def test_exit_status(args, env, code):
    assert run_cli(args, env).code == code


def test_exit_codes_are_those_of_the_source():
    """Each number main or an early end can give."""
    ends = set(re.findall(r"\b_exit\((\d+)\)", SOURCE)) | {"0", "1"}
    assert set(words("EXIT STATUS", "")) == ends
