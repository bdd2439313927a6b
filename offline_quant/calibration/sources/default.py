"""Without `--calib`: the default dataset, or text the model writes where that cannot be reached."""

from typing import Any

from rich.text import Text

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.calibration.sources.base import CalibrationSource, CalibrationWindows, windows_of_text
from offline_quant.calibration.sources.hub import HUB_BYTES, HubCalibration
from offline_quant.calibration.windows import reading_bytes
from offline_quant.model.sizes import RunSizes
from offline_quant.runtime.progress import console

DEFAULT_DATASET = "hf:allenai/c4"


class DefaultCalibration(CalibrationSource):
    """The default dataset, opened late: where it cannot be reached, a warning says so."""

    @staticmethod
    def matches(calib: str | None) -> bool:
        """No value."""
        return calib is None

    def memory_bytes(self, sizes: RunSizes) -> int:
        """See `CalibrationSource`; of the dataset."""
        return reading_bytes(HUB_BYTES, sizes.tokens)

    def windows(self, tokenizer: Any, length: int) -> CalibrationWindows | None:
        """See `CalibrationSource`."""
        console.print(f"Reading calibration text from {DEFAULT_DATASET} (choose with --calib)")
        try:
            return windows_of_text(HubCalibration.open_text(DEFAULT_DATASET, ""), self.config, tokenizer, length)
        except BitsmoeError as e:
            console.print(
                Text("Warning:", "bold yellow"), f"{e}\nCalibrating on text sampled from the model itself instead."
            )
            return None
