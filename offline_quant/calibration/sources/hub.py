"""`--calib hf:DATASET`: a dataset of the Hugging Face Hub, or of a local directory."""

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from bitsmoe_kernels.errors import BitsmoeError, one_line
from offline_quant.calibration.row_readers import Cursor, Row, numbered
from offline_quant.calibration.sources.base import TextCalibration
from offline_quant.calibration.text_source import TextSource
from offline_quant.calibration.windows import reading_bytes
from offline_quant.config import HUB, recorded_name
from offline_quant.model.download import NETWORK_ERRORS
from offline_quant.model.sizes import RunSizes
from offline_quant.runtime.progress import console

HUB_BYTES = 192 << 20
"""Bytes that a dataset's own readers take."""


class _Parts(NamedTuple):
    """The configuration and split of a dataset that are taken where the user names none."""

    config: str | None = None
    split: str | None = None


_DATASETS = {
    "allenai/c4": _Parts(config="en"),
    "wikitext": _Parts(config="wikitext-2-raw-v1"),
    "Salesforce/wikitext": _Parts(config="wikitext-2-raw-v1"),
    "mit-han-lab/pile-val-backup": _Parts(split="validation"),
    "HuggingFaceH4/ultrachat_200k": _Parts(split="train_sft"),
}
"""Datasets that are often used for calibration, and the parts of them that are taken."""


class _HubRows(Cursor):
    """Rows of a streamed dataset. Positions are rows."""

    def __init__(self, source: "HubText"):
        super().__init__(0)
        self._source = source

    def rows(self) -> Iterator[Row]:
        try:
            for number, row in enumerate(self._source.dataset, 1):
                self.position = number
                yield Row(row, numbered(number))
        except _dataset_errors() as e:
            raise self._source.unreadable(e) from None


class HubText(TextSource):
    """Text of a dataset, streamed.

    Args:
        spec: `hf:` and the name, or a local directory.
        option: of the command line, for messages.
        config: configuration; None: the usual one.
        split: None: the usual one, `train`, or the only one.
        column: where the text of its rows is; None: the first usual one.

    Raises:
        BitsmoeError: it cannot be reached, lacks a part that was named, or its first row cannot be used.
    """

    def __init__(self, spec: str, option: str, config: str | None, split: str | None, column: str | None):
        super().__init__(f"{option} {spec}".strip(), recorded_name(spec), option, column)
        self._where = spec.removeprefix(HUB)
        known = _DATASETS.get(self._where, _Parts())
        self._config = config or known.config
        parts = self._load()
        self._split = split or next((s for s in (known.split, "train") if s in parts), None)
        if self._split is None and len(parts) == 1:
            (self._split,) = parts
            console.print(f"{self.name}: takes its only split, {self._split}")
        if self._split not in parts:
            raise BitsmoeError(
                f"{self.name}: {f'has no split {split!r}' if split else 'has no split train'}; choose one with "
                f"{option}-split: {', '.join(parts)}"
            )
        self.dataset = parts[self._split]
        self.check_rows(1)
        if self.column is not None:
            self.dataset = self.dataset.select_columns([self.column])

    def _load(self) -> Any:
        import datasets  # heavy, and needed for this source only
        from datasets import packaged_modules

        # Such a reader would read all files below the current directory.
        if self._where in packaged_modules._PACKAGED_DATASETS_MODULES:
            raise BitsmoeError(f"{self.name}: is a reader of the library, not a dataset; give hf:DATASET, or a file")
        try:
            return datasets.load_dataset(self._where, self._config, streaming=True)
        except _dataset_errors() as e:
            try:
                names = datasets.get_dataset_config_names(self._where)
            except _dataset_errors():
                names = []
            if len(names) > 1 and self._config not in names:
                what = f"has no configuration {self._config!r}" if self._config else "has several configurations"
                raise BitsmoeError(
                    f"{self.name}: {what}; choose one with {self.option}-config: {', '.join(names)}"
                ) from None
            raise self.unreadable(e) from None

    def unreadable(self, error: Exception) -> BitsmoeError:
        """The error of a dataset that could not be read."""
        return BitsmoeError(f"{self.name}: the dataset cannot be reached or read ({one_line(error)})")

    @property
    def size(self) -> None:
        """See `TextSource`."""
        return None

    @property
    def memory(self) -> int:
        """See `TextSource`."""
        return HUB_BYTES

    @property
    def description(self) -> str:
        """See `TextSource`."""
        config = f"configuration {self._config}, " if self._config else ""
        return f"{self.recorded} ({config}split {self._split}{self.column_shown})"

    def cursor(self) -> Cursor:
        """See `TextSource`."""
        return _HubRows(self)


def _dataset_errors() -> tuple[type[Exception], ...]:
    from zipfile import BadZipFile

    from datasets.exceptions import DatasetsError
    from yaml import YAMLError

    return (
        *NETWORK_ERRORS, DatasetsError, YAMLError, BadZipFile, zlib.error, EOFError, StopIteration, ValueError,
        RuntimeError, TypeError, KeyError, ImportError,
    )  # fmt: skip


class HubCalibration(TextCalibration):
    """A dataset."""

    remote = True

    @staticmethod
    def matches(calib: str | None) -> bool:
        """`hf:` and a name."""
        return calib is not None and calib.startswith(HUB)

    @classmethod
    def open_text(
        cls, spec: str, option: str, config: str | None = None, split: str | None = None, column: str | None = None
    ) -> HubText:
        """See `TextCalibration`."""
        if spec == HUB:
            raise BitsmoeError(f"{option} {spec}: names no dataset; give hf:DATASET")
        return HubText(spec, option, config, split, column)

    def memory_bytes(self, sizes: RunSizes) -> int:
        """See `CalibrationSource`; known without opening the dataset."""
        return reading_bytes(HUB_BYTES, sizes.tokens)


def hub_dataset(recorded: str) -> str | None:
    """A dataset's name on the Hub, OWNER/NAME, from the name that a checkpoint records; None for other sources."""
    name = recorded.removeprefix(HUB)
    return name if recorded.startswith(HUB) and "/" in name else None
