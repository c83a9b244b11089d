import io
import pickle

import pytest
from rich.console import Console

from megablip.doctor.finding import Finding, show
from megablip.errors import ShardError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Größe, 名前", "plain, Größe, 名前"),
        ("two\nlines", "two\nlines"),
        ("\x1b[2Jgone\r", "\\x1b[2Jgone\\r"),
        (b"\xff.jpg".decode("utf-8", "surrogateescape"), "\\udcff.jpg"),
        ("right\u202eleft", "right\\u202eleft"),
    ],
)
def test_what_no_terminal_should_get_is_escaped(text, shown):
    error = ShardError(f"key '{text}'", where=text, remedy="write it again")
    for same in (error, pickle.loads(pickle.dumps(error))):
        assert str(same) == f"key '{shown}'\n  where: {shown}\n  to do: write it again"
        assert same.where == text
    assert printable(text) == shown
    file = io.StringIO()
    show([Finding("shards", text)], Console(file=file, width=100))
    assert all(line in file.getvalue() for line in shown.split("\n"))
    assert "\x1b" not in file.getvalue()
