"""`--calib FILE`: a file of text or of rows."""

import hashlib
from pathlib import Path

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.calibration.chat import UnusableError, shown_keys
from offline_quant.calibration.file_kind import Kind
from offline_quant.calibration.row_readers import Cursor, open_cursor
from offline_quant.calibration.sources.base import TextCalibration
from offline_quant.calibration.text_file import ROW_BYTES, TextFile, identify
from offline_quant.calibration.text_source import TextSource

_CHECKED_ROWS = 16


class FileText(TextSource):
    """Text of a file.

    Args:
        file: the file.
        option: of the command line, for messages.
        column: where the text of its rows is; None: the first usual one.
    """

    def __init__(self, file: TextFile, option: str, column: str | None):
        super().__init__(file.name, file.path.name, option, column)
        self._file = file
        if file.kind is Kind.PARQUET:
            try:
                self.column = column or self._text_column(file.columns)
            except UnusableError as e:
                raise BitsmoeError(f"{self.name}: {e}") from None
            if self.column not in file.columns:
                raise BitsmoeError(f"{self.name}: has no column {self.column!r}; found {shown_keys(file.columns)}")
        self.check_rows(_CHECKED_ROWS)

    @property
    def size(self) -> int:
        """See `TextSource`."""
        return self._file.size

    @property
    def memory(self) -> int:
        """See `TextSource`."""
        if self._file.kind is Kind.TEXT:
            return 0
        return 3 * (ROW_BYTES if self._file.gzipped else min(ROW_BYTES, self._file.size))

    @property
    def description(self) -> str:
        """See `TextSource`."""
        return f"{self.recorded} ({self._file.description}{self.column_shown})"

    def cursor(self) -> Cursor:
        """See `TextSource`."""
        return open_cursor(self._file, self.column)


class FileCalibration(TextCalibration):
    """A file of the user's."""

    @staticmethod
    def matches(calib: str | None) -> bool:
        """Any name: it comes last in the registry."""
        return calib is not None

    @classmethod
    def open_text(
        cls, spec: str, option: str, config: str | None = None, split: str | None = None, column: str | None = None
    ) -> FileText:
        """See `TextCalibration`; a file has no configurations and splits."""
        others = "; use `self`, a file of text, or hf:DATASET" if option == "--calib" else ""
        return FileText(identify(Path(spec), f"{option} {spec}".strip(), others), option, column)

    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        with Path(str(self.config.calib)).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
