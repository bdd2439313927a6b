"""The kind of a text file (plain text, JSON lines, JSON), told from its first bytes."""

import codecs
import csv
import io
import json
import re
from enum import StrEnum
from itertools import islice
from typing import Any

from bitsmoe_kernels.errors import BitsmoeError

SPACE = " \t\r\n"
"""White space of JSON."""
_OBJECT = re.compile(r"""\s*\{\s*(["'])[^"'\r\n]+\1\s*:""")
"""The beginning of an object, valid JSON or not."""
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
"""First bytes of such files."""
_OTHER_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_UNREAD = {
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it first, or use gzip",
    b"BZh": "compressed with bzip2; decompress it first, or use gzip",
    b"\xfd7zXZ\0": "compressed with xz; decompress it first, or use gzip",
    b"PK\x03\x04": "a zip archive; take the text out of it first",
    b"%PDF-": "a PDF; take the text out of it first",
    b"ARROW1": "an Arrow file; write it as parquet or as JSON lines",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`",
}
_TABLE_COLUMNS = {
    "text", "content", "prompt", "messages", "instruction", "question", "sentence", "body", "document", "passage",
    "review", "comment", "article", "abstract",
}  # fmt: skip
_TABLE_ROWS, _EQUAL_ROWS, _NAME_WORDS = 50, 5, 4


class Kind(StrEnum):
    """What a file holds."""

    TEXT = "plain text"
    LINES = "JSON lines"
    JSON = "JSON"
    PARQUET = "parquet"


def refuse_others(head: bytes, inside: str, gzipped: bool) -> None:
    """Refuse content that is no UTF-8 text and no format that is read.

    Args:
        head: the first bytes, decompressed.
        inside: how a message begins: the file and what surrounds the bytes.
        gzipped: whether they come out of gzip.

    Raises:
        BitsmoeError: names the format and the remedy.
    """
    for mark, encoding in _OTHER_BOMS.items():
        if head.startswith(mark):
            raise BitsmoeError(
                f"{inside} {encoding} text, which cannot be read as UTF-8; convert it, as with "
                f"`iconv -f {encoding} -t UTF-8`"
            )
    for mark, what in _UNREAD.items():
        if head.startswith(mark):
            raise BitsmoeError(f"{inside} {what}")
    if gzipped and head.startswith((GZIP, PARQUET)):
        raise BitsmoeError(f"{inside} gzip or parquet; decompress it first")
    if (at := head.find(b"\0")) >= 0:
        raise BitsmoeError(f"{inside} no UTF-8 text: byte {at} is zero, as in a binary file or in UTF-16; give text")


def decoded(head: bytes, complete: bool, errors: str) -> str:
    """Text of a file's first bytes; a character that `head` cuts in two is left out unless `complete`."""
    return codecs.getincrementaldecoder("utf-8")(errors).decode(head, final=complete)


def not_utf8(name: str, at: int, error: UnicodeDecodeError) -> BitsmoeError:
    """The error of a file `name` whose bytes from `at` on are no UTF-8."""
    return BitsmoeError(
        f"{name}: cannot be read as UTF-8 text: {error.reason} at byte {at}; convert it, as with `iconv -t UTF-8`"
    )


class _Broken:
    """In place of a value where there is no JSON."""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _Broken()


def kind_of(head: str, complete: bool) -> Kind | None:
    """The kind of a file that begins with `head`, or, if `complete`, is `head`; None: more of the file is needed."""
    lines = [line for line in re.split(r"\r\n?|\n", head)[: None if complete else -1] if line.strip()]
    values = [_value(line) for line in lines]
    if len(values) > 1 and any(all(isinstance(value, kind) for value in values) for kind in (str, list)):
        return Kind.LINES
    body = head.lstrip(SPACE)
    if body.startswith("[") and (kind := _kind_of_array(body, complete)) is not Kind.TEXT:
        return kind
    objects = [isinstance(v, dict) or bool(_OBJECT.match(line)) for v, line in zip(values, lines, strict=True)]
    if objects and 2 * sum(objects) + objects[0] > len(objects):
        return Kind.LINES
    if not body.startswith("{"):
        return Kind.TEXT
    try:
        _, end = json.JSONDecoder().raw_decode(body)
    except (ValueError, RecursionError) as e:
        if not complete:
            return None if cut_short(e, body) else Kind.TEXT
        return Kind.JSON if _OBJECT.match(body) and cut_short(e, body.rstrip(SPACE), margin=0) else Kind.TEXT
    rest = body[end:].lstrip(SPACE).removeprefix(",").lstrip(SPACE)
    return Kind.JSON if not rest or rest.startswith("{") else Kind.TEXT


def _kind_of_array(body: str, complete: bool) -> Kind | None:
    """The kind of a file that begins with a bracket; JSON if `[{` follows, or nothing but JSON up to the end."""
    at, count = 1, 0
    while True:
        at = past_space(body, at)
        if at < len(body) and body[at] == "]" and count == 0:
            break
        try:
            value, at = json.JSONDecoder().raw_decode(body, at)
        except (ValueError, RecursionError) as e:
            if not complete and cut_short(e, body):
                return Kind.JSON if count > 1 else None
            cut = _OBJECT.match(body, at) and cut_short(e, body.rstrip(SPACE), margin=0)
            return Kind.JSON if cut or (count > 1 and at >= len(body)) else Kind.TEXT
        count += 1
        if isinstance(value, dict):
            return Kind.JSON
        at = past_space(body, at)
        if at >= len(body):
            return (Kind.JSON if count > 1 else Kind.TEXT) if complete else (Kind.JSON if count > 1 else None)
        if body[at] != ",":
            break
        at += 1
    return Kind.JSON if body[at] == "]" and not body[at + 1 :].strip(SPACE) else Kind.TEXT


def past_space(text: str, at: int) -> int:
    """Index of the first character from `at` on that is no white space; the length of the text where all is."""
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at


def cut_short(error: Exception, text: str, margin: int = 8) -> bool:
    """Whether a JSON error may come from a missing end; the last `margin` characters may be part of a cut word."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - margin


def begins_table(text: str, complete: bool) -> bool:
    """Whether lines are rows of a table: a first row of column names, one of them usual for text, or equal rows."""
    if not complete:
        text = text[: text.rfind("\n") + 1]
    for by in ",\t;|":
        try:
            rows = [row for row in islice(csv.reader(io.StringIO(text), delimiter=by), _TABLE_ROWS) if row]
        except csv.Error:
            continue
        width = len(rows[0]) if rows else 0
        if width < 2 or len(rows) < 2 or sum(len(row) == width for row in rows) < 0.9 * len(rows):
            continue
        names = [set(re.findall(r"[^\W_]+", name.lower())) for name in rows[0]]
        plain = all(
            len(words) <= _NAME_WORDS and not re.search(r"[.!?:]|^ ", name)
            for words, name in zip(names, rows[0], strict=True)
        )
        if plain and any(words & _TABLE_COLUMNS for words in names):
            return True
        if len(rows) >= _EQUAL_ROWS and (by == "\t" or f'{by}"' in text) and all(len(row) == width for row in rows):
            return True
    return False
