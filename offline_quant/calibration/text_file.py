"""Rows and text of a file; its content, not its name, says what it holds. All is read forwards and in pieces."""

import codecs
import csv
import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from bitsmoe_kernels.errors import BitsmoeError, one_line

ROW_BYTES = 32 << 20
"""Longest row that is read: it lies in memory as a whole."""
BLOCK_BYTES = 1 << 18
_HEAD_BYTES = 1 << 16
_BATCH_BYTES, _BATCH_ROWS = 1 << 20, 1024
_SPACE = " \t\r\n"
_OBJECT = re.compile(r"""\s*\{\s*(["'])[^"'\r\n]+\1\s*:""")
"""How an object begins, be it right JSON or not."""
_BOM = codecs.BOM_UTF8
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
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
_JSON_NAMES = (".json", ".jsonl", ".ndjson")
_CLAIMS = {
    ".csv": "a table, which is not read; write it as JSON lines or parquet",
    ".tsv": "a table, which is not read; write it as JSON lines or parquet",
    ".parquet": "parquet, but its content is not; download or make it again",
    ".gz": "gzip, but its content is not; download or make it again",
}
"""Names of which the content must not be taken for plain text."""
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


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        value: JSON data.
        where: says which row it is; called for faults only, for it may have to count.
        fault: why there is no value.
    """

    value: Any
    where: Callable[[], str]
    fault: str | None = None


@dataclass(frozen=True)
class TextFile:
    """A file that holds text.

    Attributes:
        path: of it.
        name: for messages.
        kind: what it holds.
        gzipped: whether gzip is around it.
        begin: bytes of a byte order mark.
    """

    path: Path
    name: str
    kind: Kind
    gzipped: bool = False
    begin: int = 0

    @property
    def description(self) -> str:
        """What it holds, in words."""
        return f"{self.kind} in gzip" if self.gzipped else str(self.kind)

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """Its bytes, decompressed; from gzip all of what is sought past is decompressed."""
        with _open(self.path, self.name, self.gzipped) as stream:
            yield stream

    @cached_property
    def size(self) -> int:
        """Bytes, decompressed; of parquet those of all columns. Gzip is read through for it, which checks it, too."""
        if self.kind is Kind.PARQUET:
            groups = self._parquet().metadata
            return sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
        if not self.gzipped:
            return self.path.stat().st_size
        with self.stream() as stream:
            return sum(len(block) for block in iter(lambda: stream.read(BLOCK_BYTES), b""))

    @cached_property
    def columns(self) -> list[str]:
        """Names of a parquet file's columns."""
        return list(self._parquet().schema_arrow.names)

    def cursor(self, column: str | None = None) -> "Cursor":
        """A reader of its own; of parquet for one column."""
        match self.kind:
            case Kind.TEXT:
                return PlainText(self)
            case Kind.LINES:
                return _Lines(self)
            case Kind.JSON:
                return _Json(self)
        return _Parquet(self, self._parquet(), column)

    def _parquet(self) -> Any:
        import pyarrow.parquet  # heavy, and needed for these files only

        try:
            return pyarrow.parquet.ParquetFile(self.path, buffer_size=_BATCH_BYTES, pre_buffer=False)
        except (pyarrow.ArrowException, OSError, ValueError) as e:
            raise BitsmoeError(f"{self.name}: damaged or truncated parquet file ({one_line(e)})") from None


def identify(path: Path, name: str, otherwise: str = "") -> TextFile:
    """What a file holds, from its first bytes.

    Args:
        path: of it.
        name: for messages.
        otherwise: what else the user may give, for messages.

    Raises:
        BitsmoeError: not there, not a regular file, or nothing that text is read from.
    """
    try:
        info = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise BitsmoeError(f"{name}: no such file{otherwise}") from None
    except OSError as e:
        raise BitsmoeError(f"{name}: cannot be read ({e.strerror})") from None
    if stat.S_ISDIR(info.st_mode):
        raise BitsmoeError(f"{name}: is a directory; give a file{otherwise}")
    if not stat.S_ISREG(info.st_mode):
        raise BitsmoeError(
            f"{name}: is a pipe or a device, and text is read more than once; write it to a file and give that"
        )
    if info.st_size == 0:
        raise BitsmoeError(f"{name}: the file is empty; give text")
    with _open(path, name, False) as stream:
        start = stream.read(8)
    if start.startswith(_PARQUET):
        return TextFile(path, name, Kind.PARQUET)
    gzipped = start.startswith(_GZIP)
    with _open(path, name, gzipped) as stream:
        return _identify_text(path, name, gzipped, stream)


def _identify_text(path: Path, name: str, gzipped: bool, stream: BinaryIO) -> TextFile:
    inside = f"{name}: holds gzip of" if gzipped else f"{name}: is"
    head, size = b"", _HEAD_BYTES
    while True:
        head += stream.read(size - len(head))
        complete = len(head) < size
        if not head:
            raise BitsmoeError(f"{name}: the gzip file is empty; give text")
        _refuse_others(head, inside, gzipped)
        begin = len(_BOM) if head.startswith(_BOM) else 0
        text = _decoded(head[begin:], complete, "replace")
        kind = _kind(text, complete)
        if kind is not None:
            break
        if size >= ROW_BYTES:  # the first row is too long; reading it says so
            kind = Kind.LINES if text.lstrip(_SPACE).startswith("{") else Kind.JSON
            break
        size *= 2
    if not text.strip() and complete:
        raise BitsmoeError(f"{name}: holds nothing but white space; give text")
    if kind is Kind.TEXT:
        try:
            _decoded(head[begin:], complete, "strict")
        except UnicodeDecodeError as e:
            raise _not_utf8(name, begin + e.start, e) from None
        suffixes = [s.lower() for s in path.suffixes if not gzipped or s.lower() != ".gz"]
        if suffixes and suffixes[-1] in _JSON_NAMES:
            kind = Kind.LINES  # reading it names the line that is none
        elif suffixes and (claim := _CLAIMS.get(suffixes[-1])):
            raise BitsmoeError(f"{name}: its name says {claim}")
        elif _begins_table(text, complete):
            raise BitsmoeError(f"{name}: begins like a table (CSV), which is not read; write it as JSON lines")
    return TextFile(path, name, kind, gzipped, begin)


def _refuse_others(head: bytes, inside: str, gzipped: bool) -> None:
    for mark, encoding in _OTHER_BOMS.items():
        if head.startswith(mark):
            raise BitsmoeError(
                f"{inside} {encoding} text, which cannot be read as UTF-8; convert it, as with "
                f"`iconv -f {encoding} -t UTF-8`"
            )
    for mark, what in _UNREAD.items():
        if head.startswith(mark):
            raise BitsmoeError(f"{inside} {what}")
    if gzipped and head.startswith((_GZIP, _PARQUET)):
        raise BitsmoeError(f"{inside} gzip or parquet; decompress it first")
    if (at := head.find(b"\0")) >= 0:
        raise BitsmoeError(f"{inside} no UTF-8 text: byte {at} is zero, as in a binary file or in UTF-16; give text")


def _decoded(head: bytes, complete: bool, errors: str) -> str:
    return codecs.getincrementaldecoder("utf-8")(errors).decode(head, final=complete)


def _not_utf8(name: str, at: int, error: UnicodeDecodeError) -> BitsmoeError:
    return BitsmoeError(
        f"{name}: cannot be read as UTF-8 text: {error.reason} at byte {at}; convert it, as with `iconv -t UTF-8`"
    )


@contextmanager
def _open(path: Path, name: str, gzipped: bool) -> Iterator[BinaryIO]:
    with _readable(name), cast(BinaryIO, gzip.open(path, "rb") if gzipped else path.open("rb")) as stream:
        yield stream


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """What goes wrong while a file is read is the file's fault."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise BitsmoeError(f"{name}: damaged or truncated gzip file ({one_line(e)})") from None
    except OSError as e:
        raise BitsmoeError(f"{name}: cannot be read ({e.strerror or one_line(e)})") from None


class _Broken:
    """In place of a value where there is no JSON."""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _Broken()


def _kind(head: str, complete: bool) -> Kind | None:
    """What a file holds that begins with `head`, or is it; None: more of it must be known."""
    lines = [line for line in re.split(r"\r\n?|\n", head)[: None if complete else -1] if line.strip()]
    values = [_value(line) for line in lines]
    if len(values) > 1 and any(all(isinstance(value, kind) for value in values) for kind in (str, list)):
        return Kind.LINES
    body = head.lstrip(_SPACE)
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
            return None if _cut_short(e, body) else Kind.TEXT
        return Kind.JSON if _OBJECT.match(body) and _cut_short(e, body.rstrip(_SPACE), margin=0) else Kind.TEXT
    rest = body[end:].lstrip(_SPACE).removeprefix(",").lstrip(_SPACE)
    return Kind.JSON if not rest or rest.startswith("{") else Kind.TEXT


def _kind_of_array(body: str, complete: bool) -> Kind | None:
    """Of text that begins with a bracket: `[{`, or nothing but JSON up to the end."""
    at, count = 1, 0
    while True:
        at = _past_space(body, at)
        if at < len(body) and body[at] == "]" and count == 0:
            break
        try:
            value, at = json.JSONDecoder().raw_decode(body, at)
        except (ValueError, RecursionError) as e:
            if not complete and _cut_short(e, body):
                return Kind.JSON if count > 1 else None
            cut = _OBJECT.match(body, at) and _cut_short(e, body.rstrip(_SPACE), margin=0)
            return Kind.JSON if cut or (count > 1 and at >= len(body)) else Kind.TEXT
        count += 1
        if isinstance(value, dict):
            return Kind.JSON
        at = _past_space(body, at)
        if at >= len(body):
            return (Kind.JSON if count > 1 else Kind.TEXT) if complete else (Kind.JSON if count > 1 else None)
        if body[at] != ",":
            break
        at += 1
    return Kind.JSON if body[at] == "]" and not body[at + 1 :].strip(_SPACE) else Kind.TEXT


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _cut_short(error: Exception, text: str, margin: int = 8) -> bool:
    """Whether what is wrong with JSON may be that its end is missing; `margin` characters may be a cut word of it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - margin


def _begins_table(text: str, complete: bool) -> bool:
    """Whether lines are rows of a table: columns that are named, one of them as text is as a rule, or equal rows."""
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


def numbered(row: int) -> Callable[[], str]:
    """`Row.where` of a row whose number, from 1, is known."""
    return lambda: f"row {row}"


class Cursor:
    """Reads a file once, forwards.

    Attributes:
        position: how far it has read.
        start_at: what begins before this position is left out. The user of the cursor may raise it at any time.
        size: the position at the end.
    """

    def __init__(self, size: int):
        self.position, self.start_at, self.size = 0, 0, size

    def rows(self) -> Iterator[Row]:
        """The rows; one that cannot be read comes with its fault."""
        raise NotImplementedError


class PlainText(Cursor):
    """A file of text without rows: one document, in pieces. Positions are bytes.

    Attributes:
        piece_bytes: read at once.
    """

    piece_bytes = BLOCK_BYTES

    def __init__(self, file: TextFile):
        super().__init__(file.size)
        self._file, self.position = file, file.begin
        self.start_at = file.begin

    def stretches(self) -> Iterator[tuple[bool, Iterator[str]]]:
        """Stretches of text, in pieces, line ends as `\\n`, and whether one begins where the file does.

        There is one stretch, and another from each `start_at` beyond `position`, from the next beginning of a line.
        """
        with self._file.stream() as stream:
            first = True
            while first or self.start_at > self.position:
                opens = self.start_at <= self._file.begin
                yield opens, self._pieces(stream)
                first = False

    def _pieces(self, stream: BinaryIO) -> Iterator[str]:
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
        within = self.start_at > self._file.begin
        self.position = self.start_at - within
        with _readable(self._file.name):
            stream.seek(self.position)
        block = self._read(stream)
        if within:
            block = _from_line_start(block) or self._read(stream)
        while True:
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise _not_utf8(self._file.name, self.position - len(e.object) + e.start, e) from None
            if "\0" in text:
                raise BitsmoeError(
                    f"{self._file.name}: holds a zero byte before byte {self.position}, as a binary file does; give "
                    "text"
                )
            if text:
                yield text
            if not block:
                return
            block = self._read(stream)

    def _read(self, stream: BinaryIO) -> bytes:
        with _readable(self._file.name):
            block = stream.read(self.piece_bytes)
        self.position += len(block)
        return block


def _from_line_start(block: bytes) -> bytes:
    """What follows the first line end of a block; without one, what follows its first character."""
    if found := re.search(rb"\r\n?|\n", block):
        return block[found.end() :]
    at = 1
    while at < len(block) and block[at] & 0xC0 == 0x80:
        at += 1
    return block[at:]


class _Lines(Cursor):
    """JSON values, one a line. Positions are bytes."""

    def __init__(self, file: TextFile):
        super().__init__(file.size)
        self._file, self.position = file, file.begin

    def rows(self) -> Iterator[Row]:
        with self._file.stream() as stream:
            stream.seek(self.position)
            pending = bytearray()
            while True:
                if self.start_at > self.position + len(pending):
                    # From one byte earlier on: what is left of a line there, or its end, is left out.
                    self.position = self.start_at - 1
                    stream.seek(self.position)
                    pending = bytearray()
                block = stream.read(BLOCK_BYTES)
                lines: list[bytes | bytearray] = [*block.splitlines(keepends=True)]
                if pending or not lines:
                    pending += lines[0] if lines else b""
                    lines[:1] = [pending] if pending else []
                pending = bytearray()
                if block and not lines[-1].endswith((b"\n", b"\r")):
                    pending += lines.pop()
                for line in lines:
                    begins = self.position
                    self.position += len(line)
                    if begins >= self.start_at and not line.isspace():
                        yield self._row(line, begins)
                if len(pending) > ROW_BYTES:
                    yield self._row(pending, self.position)
                    return
                if not block:
                    return

    def _row(self, line: bytes | bytearray, begins: int) -> Row:
        where = self._where(begins)
        if len(line) > ROW_BYTES:
            return Row(None, where, _too_long())
        try:
            return Row(json.loads(line.decode("utf-8")), where)
        except UnicodeDecodeError as e:
            return Row(None, where, f"not UTF-8 ({e.reason} at its byte {e.start})")
        except (ValueError, RecursionError) as e:
            return Row(None, where, _not_json(e, at_column=True))

    def _where(self, begins: int) -> Callable[[], str]:
        return lambda: f"line {self._line_number(begins)}"

    def _line_number(self, begins: int) -> int:
        """From 1, of the line that begins at a byte."""
        count, left, last = 1, begins, b""
        with self._file.stream() as stream:
            while left and (block := stream.read(min(left, BLOCK_BYTES))):
                left -= len(block)
                count += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
                count -= last == b"\r" and block.startswith(b"\n")
                last = block[-1:]
        return count


def _too_long() -> str:
    return f"longer than {ROW_BYTES >> 20} MB, the most a row may be; split it, or give its text as a file of its own"


def _not_json(error: Exception, at_column: bool = False) -> str:
    if isinstance(error, RecursionError):
        return "its JSON is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return f"its JSON cannot be read ({error})"
    return f"not JSON ({error.msg}{f' at column {error.colno}' if at_column else ''})"


class _Json(Cursor):
    """One JSON value: the elements of an array, or an object. Positions are bytes read."""

    def __init__(self, file: TextFile):
        super().__init__(file.size)
        self._file = file
        self._text, self._at, self._ended = "", 0, False

    def rows(self) -> Iterator[Row]:
        with self._file.stream() as stream:
            stream.seek(self._file.begin)
            self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")()
            good = yield from (self._elements() if self._next() == "[" else self._element(1))
            if good and self._next():
                what = "there is more; write one array, or one object on each line"
                yield Row(None, lambda: "after its JSON value", what)

    def _elements(self) -> Generator[Row, None, bool]:
        """Of an array; whether it was read to its end."""
        self._at += 1
        number = 1
        while number > 1 or self._next() != "]":
            if not (yield from self._element(number)):
                return False
            following = self._next()
            if following == "]":
                break
            if following != ",":
                fault = f"not JSON ({following!r} after it)" if following else "the file ends after it: it is cut short"
                yield Row(None, numbered(number), fault)
                return False
            self._at += 1
            number += 1
        self._at += 1
        return True

    def _element(self, number: int) -> Generator[Row, None, bool]:
        value, fault = self._decode()
        if fault or self.position >= self.start_at:
            yield Row(value, numbered(number), fault)
        return fault is None

    def _fill(self, wanted: int) -> bool:
        """Read on; whether there was more."""
        block = self._stream.read(wanted)
        try:
            more = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            raise _not_utf8(self._file.name, self.position + e.start, e) from None
        self.position += len(block)
        self._text, self._at = self._text[self._at :] + more, 0
        self._ended = not block
        return bool(block)

    def _next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._at = _past_space(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill(BLOCK_BYTES):
                return ""

    def _decode(self) -> tuple[Any, str | None]:
        """The next value, or what is wrong with it."""
        self._next()
        wanted = BLOCK_BYTES
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as e:
                if self._ended or not _cut_short(e, self._text):
                    cut = self._ended and _cut_short(e, self._text.rstrip(_SPACE), margin=0)
                    return None, "the file ends within it: it is cut short" if cut else _not_json(e)
            else:
                if end < len(self._text) or self._ended:  # a number may go on
                    begin, self._at = self._at, end
                    return (None, _too_long()) if end - begin > ROW_BYTES else (value, None)
            if len(self._text) - self._at > ROW_BYTES:
                return None, _too_long()
            self._fill(wanted)
            wanted = min(2 * wanted, ROW_BYTES)


class _Parquet(Cursor):
    """One column of a parquet file. Positions are rows."""

    def __init__(self, file: TextFile, parquet: Any, column: str | None):
        super().__init__(parquet.metadata.num_rows)
        self._file, self._parquet, self._column = file, parquet, column

    def rows(self) -> Iterator[Row]:
        import pyarrow

        metadata, at = self._parquet.metadata, 0
        try:
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                if at + rows > self.start_at:
                    yield from self._group(group, at, rows)
                at += rows
                self.position = at
        except (pyarrow.ArrowException, OSError, ValueError) as e:
            raise BitsmoeError(
                f"{self._file.name}: damaged parquet file, after row {self.position} ({one_line(e)})"
            ) from None

    def _group(self, group: int, at: int, rows: int) -> Iterator[Row]:
        average = self._parquet.metadata.row_group(group).total_byte_size // max(1, rows)
        batches = self._parquet.iter_batches(
            batch_size=max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, average))),
            row_groups=[group],
            columns=[self._column],
            use_threads=False,
        )
        for batch in batches:
            if at + batch.num_rows <= self.start_at:
                at += batch.num_rows
                continue
            column = batch.column(0)
            for i in range(batch.num_rows):
                at += 1
                if at > self.start_at:
                    self.position = at
                    yield Row({self._column: column[i].as_py()}, numbered(at))
