"""What is read of others: kinds of files, and the guard before a parser that has none."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.errors import UserError
from utils.store.text import MOST_DEPTH, Guarded, foreign_kind, read_json, read_text

values = st.recursive(
    st.none() | st.text(alphabet='[{"\\\\}]a é'),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=9,
)


@given(values, st.integers(1, 9))
def test_brackets_in_strings_do_not_count(value, size):
    """Also where a chunk ends within a string, or between a backslash and what it escapes."""
    content = json.dumps([value, "]" * 300, "[" * 300, "\\"], ensure_ascii=False).encode()
    file = Guarded(io.BytesIO(content))
    assert b"".join(iter(lambda: file.read(size), b"")) == content
    assert (file._depth, file._in_string) == (0, 0)


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_the_depth_has_a_limit(size):
    def read(depth):
        file = Guarded(io.BytesIO(b'{"a":' * (depth // 2) + b"[" * (depth - depth // 2)))
        return b"".join(iter(lambda: file.read(size), b""))

    assert read(MOST_DEPTH)
    with pytest.raises(ValueError, match="inside one another"):
        read(MOST_DEPTH + 1)


@pytest.mark.parametrize("text", ["{}", "[1]", "a", "\ufeff{}", "é", "\n", "\t\n"])
def test_utf8_is_not_foreign(text):
    assert foreign_kind(text.encode()) is None
    assert "UTF-16" in (foreign_kind(text.encode("utf-16")) or "")


def test_json_with_and_without_a_mark(tmp_path):
    path = tmp_path / "config.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text('{"a": "é", "b": Infinity}', encoding=encoding)
        assert read_json(path) == {"a": "é", "b": float("inf")}
        assert read_text(path)[0] == "{"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "cannot be read as JSON: maximum recursion depth"),
        ("9" * 5000, "cannot be read as JSON: Exceeds the limit"),
        ("version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=words) as refusal:
        read_json(path)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_broken_link_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.symlink_to(tmp_path / "blob")
    with pytest.raises(UserError, match=r"config\.json is a link to a file that is not there"):
        read_json(path)
