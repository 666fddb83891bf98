"""Last in this suite: the secrets used throughout stand nowhere in what the
service wrote while it was attacked."""
from service import CANARY_DIR, find_leaks


def test_s09_no_secret_after_an_attack():
    together = b"".join(f.read_bytes() for f in CANARY_DIR.iterdir())
    for word in (b"START", b"lkjwt_events_total"):  # there is what to search
        assert word in together, word
    assert find_leaks() == []
