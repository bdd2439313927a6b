"""What a source of calibration tokens can do."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from offline_quant.calibration.text_source import TextSource
from offline_quant.calibration.windows import reading_bytes, text_windows
from offline_quant.config import QuantizeConfig
from offline_quant.model.sizes import RunSizes
from offline_quant.runtime.progress import console


@dataclass(frozen=True)
class CalibrationText:
    """The origin of calibration tokens.

    Attributes:
        recorded: what the checkpoint's config.json records.
        description: a line for people.
    """

    recorded: str
    description: str


@dataclass(frozen=True)
class CalibrationWindows:
    """Calibration tokens and their origin.

    Attributes:
        tokens: int64 [windows, length].
        text: the origin.
    """

    tokens: Tensor
    text: CalibrationText


class CalibrationSource(ABC):
    """One way to get calibration tokens, chosen by the value of `--calib`.

    A source is made from the options alone. `open` looks at the text before any work.

    Attributes:
        remote: whether the text may be out of reach later. A resumed run that has its tokens does not open it again.
        written_by_model: whether `windows` returns None whatever happens.

    Args:
        config: options.
    """

    remote: ClassVar[bool] = False
    written_by_model: ClassVar[bool] = False

    def __init__(self, config: QuantizeConfig):
        self.config = config

    @staticmethod
    @abstractmethod
    def matches(calib: str | None) -> bool:
        """Whether a value of `--calib` chooses this source; None: the option was not given."""

    def open(self) -> None:  # noqa: B027 - nothing to check by default
        """Check what is cheap to check.

        Raises:
            BitsmoeError: names the fault and the remedy.
        """

    def check_tokenizer(self, tokenizer: Any) -> None:  # noqa: B027 - any will do by default
        """Refuse text that the model's tokenizer cannot take; call after `open`.

        Raises:
            BitsmoeError: names the remedies.
        """

    def fingerprint(self) -> str | None:
        """A hash of the text, by which a resumed run knows it again; None: its name must do. Call after `open`."""
        return None

    @abstractmethod
    def memory_bytes(self, sizes: RunSizes) -> int:
        """Bytes of memory that `windows` takes at most, or the model that writes the text; call after `open`."""

    @abstractmethod
    def windows(self, tokenizer: Any, length: int) -> CalibrationWindows | None:
        """At most `config.calib_samples` windows of `length` tokens.

        Returns:
            The windows; None: the model itself is to write the text, see `self_written`.

        Raises:
            BitsmoeError: text that cannot be used, or too little of it.
        """


def windows_of_text(text: TextSource, config: QuantizeConfig, tokenizer: Any, length: int) -> CalibrationWindows:
    """Windows of a source of text, see `CalibrationSource.windows`."""
    tokens = text_windows(tokenizer, text, length, config.calib_samples, config.seed)
    return CalibrationWindows(tokens, CalibrationText(text.recorded, text.description))


class TextCalibration(CalibrationSource):
    """A source that is text already: what `open_text` opens."""

    def __init__(self, config: QuantizeConfig):
        super().__init__(config)
        self._text: TextSource | None = None

    @classmethod
    @abstractmethod
    def open_text(
        cls, spec: str, option: str, config: str | None = None, split: str | None = None, column: str | None = None
    ) -> TextSource:
        """Open text and check its first rows, see `registry.open_text`."""

    @property
    def text(self) -> TextSource:
        """The text, opened when it is first needed."""
        if self._text is None:
            c = self.config
            self._text = self.open_text(str(c.calib), "--calib", c.calib_config, c.calib_split, c.calib_column)
        return self._text

    def open(self) -> None:
        """See `CalibrationSource`."""
        self._text = self.text

    def check_tokenizer(self, tokenizer: Any) -> None:
        """See `CalibrationSource`: chats need a chat template."""
        self.text.check_tokenizer(tokenizer)

    def memory_bytes(self, sizes: RunSizes) -> int:
        """See `CalibrationSource`."""
        return reading_bytes(self.text.memory, sizes.tokens)

    def windows(self, tokenizer: Any, length: int) -> CalibrationWindows:
        """See `CalibrationSource`."""
        console.print(f"Calibration text: {self.text.description}")
        return windows_of_text(self.text, self.config, tokenizer, length)
