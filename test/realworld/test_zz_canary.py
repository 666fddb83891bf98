"""Last in this suite: nothing that a homeserver issued is in anything lkjwt printed."""
from servers import User
from service import find_leaks


def test_s09_no_issued_token_is_in_any_output():
    assert len(User.issued) > 20, "the suites before this one issue tokens"
    # The demo prints a token on purpose: its own, to a stand-in.
    leaks = [leak for leak in find_leaks(*User.issued)
             if not leak[0].startswith("demo-")]
    assert leaks == []
