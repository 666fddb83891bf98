"""docs/lkjwt.8: the table of variables in it is what `lkjwt --help` says.

As a program (`python3 test/dash/manpage.py`) it writes that table anew.
"""

import os
import pathlib
import re
import subprocess
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "lkjwt.8"
BIN = pathlib.Path(os.environ.get("LKJWT_BIN", ROOT / "lkjwt")).resolve()
BEGIN, END = '.\\" variables: begin\n', '.\\" variables: end\n'


def text(words):
    """Prose of --help as lines of roff."""
    words = words.replace("\\", "\\e")
    words = re.sub(r"`([^`]*)`", r"\\(oq\1\\(cq", words)
    lines = textwrap.wrap(words, 76, break_on_hyphens=False)
    return "".join(("\\&" if line[0] in ".'" else "") + line + "\n"
                   for line in lines)


def parts():
    """What --help prints: [(command line, meaning)] and [(variable,
    "required", its default or "", meaning)]."""
    said = subprocess.run([BIN, "--help"], env={}, text=True, check=True,
                          capture_output=True).stdout
    usage, _, variables = said.partition("\nEnvironment:\n")
    pair = re.compile(r"^  (\S.*?) *\n {8}(\S.*)$", re.M)
    rows = []
    for head, meaning in pair.findall(variables):
        name, _, rest = head.partition(" ")
        rows.append((name, rest[1:-1], meaning))
    return pair.findall(usage), rows


def table():
    """The list's items in mdoc."""
    out = []
    for name, default, meaning in parts()[1]:
        out.append(f".It Ev {name}")
        if default == "required":
            out[-1] += " Pq required"
        elif default:
            out[-1] += f" Pq default Ql {default}"
        out.append(text(meaning).rstrip("\n"))
    return "\n".join(out) + "\n"


def split():
    """The page before, in and after the table of variables."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    body, mark, tail = rest.partition(END)
    assert mark, f"{PAGE.name} lacks its marks"
    return head, body, tail


if __name__ == "__main__":
    before, _, after = split()
    PAGE.write_text(before + BEGIN + table() + END + after)
