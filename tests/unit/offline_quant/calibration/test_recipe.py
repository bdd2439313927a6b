"""A source of calibration tokens is one file with one class, and one line in the registry."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from builders import REPO
from families import make_model
from offline_quant.calibration.sources import registry
from offline_quant.calibration.sources.registry import calibration_source, open_text
from offline_quant.config import QuantizeConfig
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.report import model_card

RECIPE = (REPO / "docs" / "developing" / "calibration_source.md").read_text(encoding="utf-8")
(COUNTING,) = re.findall(r"```python title=.*?\n(.*?)```", RECIPE, re.DOTALL)
REPEATING = '''
"""`--calib repeat:TEXT`: a text again and again."""

from offline_quant.calibration.row_readers import Cursor, Row, numbered
from offline_quant.calibration.sources.base import TextCalibration
from offline_quant.calibration.text_source import TextSource


class Repeats(Cursor):
    def __init__(self, text):
        super().__init__(1000)
        self.text = text

    def rows(self):
        for number in range(1, self.size + 1):
            self.position = number
            yield Row(self.text, numbered(number))


class RepeatedText(TextSource):
    size, memory, description = None, 0, "one text again and again"

    def cursor(self):
        return Repeats(self.recorded.removeprefix("repeat:"))


class RepeatingCalibration(TextCalibration):
    @staticmethod
    def matches(calib):
        return calib is not None and calib.startswith("repeat:")

    @classmethod
    def open_text(cls, spec, option, config=None, split=None, column=None):
        return RepeatedText(spec, spec, option, column)
'''


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Adds the class of a new file to the registry; a file of the user's, which any name may be, stays the last."""

    def added(code: str, name: str) -> None:
        path = tmp_path / f"{name}.py"
        path.write_text(code)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(registry, "SOURCES", (getattr(module, name), *registry.SOURCES))

    return added


def quantized(directory: Path, calib: str) -> tuple[dict, str]:
    """What a run records of its calibration text, and the model card's line on it."""
    options = {"bits": 4.5, "calib_samples": 3, "calib_length": 24, "refine": 0, "calib": calib}
    source = make_model("Qwen3MoeForCausalLM", directory / "model")
    outcome = quantize_model(str(source), directory / "out", QuantizeConfig(**options))
    assert outcome.report.calibration_tokens == 72
    config = json.loads((directory / "out/config.json").read_text())
    card = (directory / "out" / model_card.CARD_FILE).read_text()
    (line,) = [line for line in card.splitlines() if "tokens of calibration text" in line]
    return config["quantization_config"]["run"], line


@pytest.mark.slow
def test_a_source_of_tokens_is_added(tmp_path, add):
    add(COUNTING, "CountingCalibration")
    found = calibration_source(QuantizeConfig(bits=2, calib="count:3", calib_samples=2))
    assert torch.equal(found.windows(type("T", (), {"vocab_size": 7}), 2).tokens, torch.tensor([[0, 3], [6, 2]]))
    record, line = quantized(tmp_path, "count:5")
    assert record["calib"] == "count:5"
    assert "72 tokens of calibration text (`counted in steps of 5`)" in line


@pytest.mark.slow
def test_a_source_of_text_is_added(tmp_path, add):
    add(REPEATING, "RepeatingCalibration")
    (document, *_) = open_text("repeat:abc ").read().documents()
    assert list(document.pieces) == ["abc "]
    record, line = quantized(tmp_path, "repeat:She opened the door. ")
    assert record["calib"] == "repeat:She opened the door. "
    assert "(`one text again and again`)" in line


def test_the_others_are_chosen_as_before(add):
    add(COUNTING, "CountingCalibration")
    names = {None: "Default", "self": "Self", "hf:a/b": "Hub", "a.txt": "File", "counts.txt": "File"}
    for calib, name in names.items():
        assert type(calibration_source(QuantizeConfig(bits=2, calib=calib))).__name__ == f"{name}Calibration"
