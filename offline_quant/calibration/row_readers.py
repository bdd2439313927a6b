"""Readers of a file's rows or text, forwards and in pieces."""

import codecs
import io
import json
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from bitsmoe_kernels.errors import BitsmoeError, one_line
from offline_quant.calibration.file_kind import SPACE, Kind, cut_short, not_utf8, past_space
from offline_quant.calibration.text_file import BLOCK_BYTES, PARQUET_BUFFER_BYTES, ROW_BYTES, TextFile, readable

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        value: JSON data.
        where: names the row, for messages; it may read the file again to count lines.
        fault: why there is no value.
    """

    value: Any
    where: Callable[[], str]
    fault: str | None = None


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
        with readable(self._file.name):
            stream.seek(self.position)
        block = self._read(stream)
        if within:
            block = _from_line_start(block) or self._read(stream)
        while True:
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                raise not_utf8(self._file.name, self.position - len(e.object) + e.start, e) from None
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
        with readable(self._file.name):
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
            raise not_utf8(self._file.name, self.position + e.start, e) from None
        self.position += len(block)
        self._text, self._at = self._text[self._at :] + more, 0
        self._ended = not block
        return bool(block)

    def _next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._at = past_space(self._text, self._at)
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
                if self._ended or not cut_short(e, self._text):
                    cut = self._ended and cut_short(e, self._text.rstrip(SPACE), margin=0)
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
            batch_size=max(1, min(_BATCH_ROWS, PARQUET_BUFFER_BYTES // max(1, average))),
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


def open_cursor(file: TextFile, column: str | None = None) -> Cursor:
    """A reader of a file; of parquet for one column."""
    match file.kind:
        case Kind.TEXT:
            return PlainText(file)
        case Kind.LINES:
            return _Lines(file)
        case Kind.JSON:
            return _Json(file)
    return _Parquet(file, file.parquet(), column)
