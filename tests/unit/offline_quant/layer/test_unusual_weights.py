"""Legal but unusual weights: dead, constant, rescaled, huge. They are quantized, or refused for what they are."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from families import make_model
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation.evaluate import evaluate
from offline_quant.model.expert_weights import ExpertWeights
from offline_quant.pipeline.quantize import quantize_model

pytestmark = pytest.mark.slow

Change = Callable[[dict[str, Tensor]], None]
TEXT = "The old man looked at the sea, and the sea was grey and quiet as the morning came up behind the hills. " * 40
EXPERTS = "model.layers.0.mlp.experts"
EVERY = ("gate", "up", "down")


def matrices(*which: str, experts: tuple[int, ...] = (2,)) -> list[str]:
    return [f"{EXPERTS}.{e}.{p}_proj.weight" for e in experts for p in which]


ALL_EXPERTS = tuple(range(8))


def filled(names: list[str], value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            tensors[name].fill_(value)

    return change


def rescaled(*factors: tuple[list[str], float]) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for names, factor in factors:
            for name in names:
                tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    return change


def outlier(name: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][5, 7] = value

    return change


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("Qwen3MoeForCausalLM", tmp_path_factory.mktemp("original"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Callable[[Change], Path]:
    def make(change: Change) -> Path:
        directory = Path(shutil.copytree(original, tmp_path / "model"))
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return make


def quantized(model: Path, **options: Any) -> tuple[Path, Path]:
    """The result and the text it was calibrated on."""
    text, out = model.with_name("text.txt"), model.with_name("quantized")
    text.write_text(TEXT, encoding="utf-8")
    config = QuantizeConfig(**{"bits": 3.0, "calib": str(text), "calib_samples": 4, "calib_length": 64} | options)
    quantize_model(str(model), out, config)
    return out, text


CASES: dict[str, Change] = {
    "dead expert": filled(matrices(*EVERY), 0.0),
    "dead down": filled(matrices("down"), 0.0),
    "dead gate": filled(matrices("gate"), 0.0),
    "dead up": filled(matrices("up"), 0.0),
    "dead layer": filled(matrices(*EVERY, experts=ALL_EXPERTS), 0.0),
    "constant expert": filled(matrices(*EVERY), 0.05),
    "constant layer": filled(matrices(*EVERY, experts=ALL_EXPERTS), 0.05),
    "nothing enters": filled(["model.layers.0.post_attention_layernorm.weight"], 0.0),
    "router without preference": filled(["model.layers.0.mlp.gate.weight"], 0.0),
    "nothing at all": filled(["model.embed_tokens.weight"], 0.0),
    "up and down far apart": rescaled((matrices("up"), 2.0**20), (matrices("down"), 2.0**-20)),
    "down and up far apart": rescaled((matrices("up"), 2.0**-38), (matrices("down"), 2.0**38)),
    "far apart in all experts": rescaled(
        (matrices("up", experts=ALL_EXPERTS), 2.0**16), (matrices("down", experts=ALL_EXPERTS), 2.0**-16)
    ),
    "huge expert": rescaled((matrices("down"), 1e8)),
    "tiny expert": rescaled((matrices("down"), 1e-30)),
    "one huge value of up": outlier(matrices("up")[0], 1e6),
}


@pytest.mark.parametrize("case", CASES)
def test_an_unusual_expert_is_quantized(case: str, model: Callable[[Change], Path]) -> None:
    """What comes out computes what went in, as well as at this width it does for ordinary experts."""
    directory = model(CASES[case])
    # A huge expert's error is the whole layer's.
    out, text = quantized(directory, bits=4.0 if case == "huge expert" else 3.0)
    kl = evaluate(out, text, directory).kl
    assert kl is not None
    assert kl < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"basis": "paper", "bits": 6.0},
        {"objective": "bt-moe"},
        {"tune": True},
        *(
            pytest.param(options, marks=pytest.mark.nightly)
            for options in (
                {"basis": "whitened"},
                {"feedback": False},
                {"refine": 0},
                {"objective": "alphaq"},
                {"objective": "frequency"},
                {"budget": "model"},
                {"dense_bits": 8},
            )
        ),
    ],
    ids=str,
)
def test_a_dead_expert_under_every_option(options: dict[str, Any], model: Callable[[Change], Path]) -> None:
    directory = model(CASES["dead expert"])
    out, text = quantized(directory, **options)
    kl = evaluate(out, text, directory).kl
    assert kl is not None
    assert kl < 0.02


def test_experts_that_compute_the_same_cost_the_same(model: Callable[[Change], Path], tmp_path: Path) -> None:
    """A factor that up hands to down changes nothing about an expert, so it must change nothing about its result."""
    directory = model(lambda tensors: None)
    plain, text = quantized(directory)
    base = evaluate(plain, text, directory)
    tensors = load_file(directory / "model.safetensors")
    rescaled((matrices("up"), 2.0**24), (matrices("down"), 2.0**-24))(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    plain.rename(tmp_path / "plain")
    again, _ = quantized(directory)
    found = evaluate(again, text, directory)
    assert base.kl is not None
    assert found.kl == pytest.approx(base.kl, rel=0.5)
    assert found.perplexity_reference == pytest.approx(evaluate(directory, text).perplexity)


@pytest.mark.parametrize("shift", [0, 3, 12, -12, 40, -40])
def test_balanced_experts_compute_the_same(shift: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(3, 12, 5, generator=generator), torch.randn(3, 5, 6, generator=generator)
    gate_up[1, 6:] *= 2.0**shift
    down[1] *= 2.0**-shift
    down[2] = 0
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)

    def computed(gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (gate_up.double() @ x.T).chunk(2, 1)
        return down.double() @ (torch.nn.functional.silu(gate) * up)

    found = ExpertWeights(gate_up, down).balanced("silu")
    assert torch.equal(computed(found.gate_up, found.down), computed(gate_up, down))
    ratio = found.gate_up[1, 6:].abs().amax() / found.down[1].abs().amax()
    assert 2**-9 < ratio < 2**9
    if abs(shift) < 8:
        assert torch.equal(found.gate_up, gate_up)


@pytest.mark.parametrize("shift", [0, 3, 12, -12, 30, -30])
def test_balanced_experts_without_a_gate(shift: int) -> None:
    """Up over 2^k takes down times 2^(2 k)."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(3, 6, 5, generator=generator), torch.randn(3, 5, 6, generator=generator)
    up[1] *= 2.0**shift
    down[1] *= 2.0 ** (-2 * shift)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)

    def computed(up: Tensor, down: Tensor) -> Tensor:
        return down.double() @ (up.double() @ x.T).relu().square()

    found = ExpertWeights(up, down).balanced("relu2")
    assert torch.equal(computed(found.gate_up, found.down), computed(up, down))
    assert 2**-9 < found.gate_up[1].abs().amax() / found.down[1].abs().amax() < 2**9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rescaled((matrices("down"), 1e30)), f"{matrices('down')[0]}: holds values up to .*; up to 1e\\+12"),
        (rescaled((matrices("gate"), 1e12)), f"{EXPERTS}: .*(too large|beyond float32)"),
        (rescaled((matrices(*EVERY, experts=ALL_EXPERTS), 1e9)), f"{EXPERTS}: .*(too large|beyond float32)"),
    ],
)
def test_what_float32_cannot_hold_is_refused_for_what_it_is(
    change: Change, said: str, model: Callable[[Change], Path]
) -> None:
    directory = model(change)
    with pytest.raises(BitsmoeError) as refusal:
        quantized(directory)
    assert re.search(said, str(refusal.value)), refusal.value
    assert "calibration statistics" not in str(refusal.value)
