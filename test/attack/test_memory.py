"""SECURITY.md T30: what a dump of the process, or its environment, would give
away. Read by root, who may."""
import json
import re

from exchange import check_granted
from service import CANARY_KEY, CANARY_SECRET, CANARY_TOKEN


def found(svc, text):
    """Where the text stands in what the process could write."""
    places = []
    with open(f"/proc/{svc.pid}/environ", "rb") as f:
        if text.encode() in f.read():
            places.append("environ")
    with open(f"/proc/{svc.pid}/maps") as maps, \
            open(f"/proc/{svc.pid}/mem", "rb", 0) as mem:
        for line in maps:
            first, last, mode = re.match(r"(\w+)-(\w+) (\S+)", line).groups()
            if "w" in mode:
                mem.seek(int(first, 16))
                if text.encode() in mem.read(int(last, 16) - int(first, 16)):
                    places.append(line.split()[0])
    return places


def test_secrets_are_wiped(rig):
    """The API secret signs, and stands nowhere; nor does the token of a
    request that was answered, or of one that was refused."""
    with rig.service() as svc:
        assert found(svc, CANARY_KEY), "the search finds nothing at all"
        assert found(svc, CANARY_SECRET) == []
        for path in ("/get_token", "/sfu/get"):
            for hs in (rig.full, rig.other):
                check_granted(svc.post(path, rig.body(path, hs)))
                svc.post(path, rig.body(path, hs, "@x:y", CANARY_TOKEN))
                svc.post(path, json.dumps(rig.body(path, hs)) + " " * 20000)
                svc.post(path, json.dumps(rig.body(path, hs))[:-1])
        assert found(svc, CANARY_SECRET) == []
        assert found(svc, CANARY_TOKEN) == []
