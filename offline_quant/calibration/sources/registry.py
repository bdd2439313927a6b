"""All sources of calibration text, and the lookup that chooses one."""

from offline_quant.calibration.sources.base import CalibrationSource, TextCalibration
from offline_quant.calibration.sources.default import DefaultCalibration
from offline_quant.calibration.sources.file import FileCalibration
from offline_quant.calibration.sources.hub import HubCalibration
from offline_quant.calibration.sources.self_written import SelfCalibration
from offline_quant.calibration.text_source import TextSource
from offline_quant.config import QuantizeConfig

SOURCES: tuple[type[CalibrationSource], ...] = (DefaultCalibration, SelfCalibration, HubCalibration, FileCalibration)
"""The first that matches is taken. A file matches any name, so it comes last."""


def calibration_source(config: QuantizeConfig) -> CalibrationSource:
    """The source that `--calib` chooses, not yet opened."""
    return next(source for source in SOURCES if source.matches(config.calib))(config)


def text_kind(spec: str) -> type[TextCalibration]:
    """The kind of source that opens a text by its name."""
    return next(source for source in SOURCES if issubclass(source, TextCalibration) and source.matches(spec))


def open_text(
    spec: str, option: str = "", config: str | None = None, split: str | None = None, column: str | None = None
) -> TextSource:
    """Open a text, and check what is cheap to check: its kind, and its first rows.

    Args:
        spec: a file, or `hf:` with a dataset's name or directory.
        option: of the command line, for messages; its name begins those of the options for the parts.
        config: configuration of a dataset.
        split: of a dataset; None: `train`, or the only one.
        column: where the text of a row is; None: the first of `text_source.COLUMNS`.

    Raises:
        BitsmoeError: names the fault and the remedy.
    """
    return text_kind(spec).open_text(spec, option, config, split, column)
