"""Files that hold text. A file's content, not its name, decides its kind."""

import codecs
import gzip
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from bitsmoe_kernels.errors import BitsmoeError, one_line
from offline_quant.calibration.file_kind import (
    GZIP,
    PARQUET,
    SPACE,
    Kind,
    begins_table,
    decoded,
    kind_of,
    not_utf8,
    refuse_others,
)

ROW_BYTES = 32 << 20
"""Bytes of the longest row that is read; a row is in memory as a whole."""
BLOCK_BYTES = 1 << 18
_HEAD_BYTES = 1 << 16
PARQUET_BUFFER_BYTES = 1 << 20
"""Read at once from a parquet file."""
_BOM = codecs.BOM_UTF8
_JSON_NAMES = (".json", ".jsonl", ".ndjson")
_CLAIMS = {
    ".csv": "a table, which is not read; write it as JSON lines or parquet",
    ".tsv": "a table, which is not read; write it as JSON lines or parquet",
    ".parquet": "parquet, but its content is not; download or make it again",
    ".gz": "gzip, but its content is not; download or make it again",
}
"""Suffixes whose files must not be read as plain text, with the reason."""


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
        """The file's bytes, decompressed. Seeking forwards in gzip decompresses everything in between."""
        with _open(self.path, self.name, self.gzipped) as stream:
            yield stream

    @cached_property
    def size(self) -> int:
        """Decompressed bytes; of parquet, those of all columns. Gzip is read to its end, which also checks it."""
        if self.kind is Kind.PARQUET:
            groups = self.parquet().metadata
            return sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
        if not self.gzipped:
            return self.path.stat().st_size
        with self.stream() as stream:
            return sum(len(block) for block in iter(lambda: stream.read(BLOCK_BYTES), b""))

    @cached_property
    def columns(self) -> list[str]:
        """Names of a parquet file's columns."""
        return list(self.parquet().schema_arrow.names)

    def parquet(self) -> Any:
        """The file opened by pyarrow.

        Raises:
            BitsmoeError: it is damaged.
        """
        import pyarrow.parquet  # heavy, and needed for these files only

        try:
            return pyarrow.parquet.ParquetFile(self.path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
        except (pyarrow.ArrowException, OSError, ValueError) as e:
            raise BitsmoeError(f"{self.name}: damaged or truncated parquet file ({one_line(e)})") from None


def identify(path: Path, name: str, otherwise: str = "") -> TextFile:
    """Find a file's kind from its first bytes.

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
    if start.startswith(PARQUET):
        return TextFile(path, name, Kind.PARQUET)
    gzipped = start.startswith(GZIP)
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
        refuse_others(head, inside, gzipped)
        begin = len(_BOM) if head.startswith(_BOM) else 0
        text = decoded(head[begin:], complete, "replace")
        kind = kind_of(text, complete)
        if kind is not None:
            break
        if size >= ROW_BYTES:  # the first row is too long; reading it says so
            kind = Kind.LINES if text.lstrip(SPACE).startswith("{") else Kind.JSON
            break
        size *= 2
    if not text.strip() and complete:
        raise BitsmoeError(f"{name}: holds nothing but white space; give text")
    if kind is Kind.TEXT:
        try:
            decoded(head[begin:], complete, "strict")
        except UnicodeDecodeError as e:
            raise not_utf8(name, begin + e.start, e) from None
        suffixes = [s.lower() for s in path.suffixes if not gzipped or s.lower() != ".gz"]
        if suffixes and suffixes[-1] in _JSON_NAMES:
            kind = Kind.LINES  # reading it names the line that is none
        elif suffixes and (claim := _CLAIMS.get(suffixes[-1])):
            raise BitsmoeError(f"{name}: its name says {claim}")
        elif begins_table(text, complete):
            raise BitsmoeError(f"{name}: begins like a table (CSV), which is not read; write it as JSON lines")
    return TextFile(path, name, kind, gzipped, begin)


@contextmanager
def _open(path: Path, name: str, gzipped: bool) -> Iterator[BinaryIO]:
    with readable(name), cast(BinaryIO, gzip.open(path, "rb") if gzipped else path.open("rb")) as stream:
        yield stream


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn errors of reading a file into a `BitsmoeError` that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise BitsmoeError(f"{name}: damaged or truncated gzip file ({one_line(e)})") from None
    except OSError as e:
        raise BitsmoeError(f"{name}: cannot be read ({e.strerror or one_line(e)})") from None
