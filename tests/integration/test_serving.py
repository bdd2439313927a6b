"""Real servers: a quantized checkpoint generates the tokens that its dequantized weights generate."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitsmoe_kernels.format.checkpoint import Checkpoint
from bitsmoe_kernels.format.safetensors_io import ShardReader, read_json
from bitsmoe_vllm.options import LORA_TARGETS
from builders import TINY_MOE, build_form, write_checkpoint, write_first_layers
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.config import QuantizeConfig
from offline_quant.pipeline.quantize import quantize_model
from vllm_processes import Completions, Generator, Step
from vllm_server import serve

README = Path(__file__).parents[2] / "README.md"
MAX_TOKENS = 32
PROMPTS = (
    "The ship",
    "He opened the door and",
    '"I do not know," said she,',
    "In the morning the rain had",
    "There was once a king who",
    "When they came to the river,",
    "It",
    "The old man looked at the sea for a long time, and then he",
)
TIE = 1e-4
"""Log-probabilities this close are a tie: which of them is best depends on the order of summation."""
MAX_ERROR = 1e-4
"""Of a token's log-probability. Both sides compute in float32, in different orders; 1e-5 is usual."""

COMMON = ("--dtype", "float32", "--max-model-len", "256")
EAGER = ("--enforce-eager",)
TP2 = ("--tensor-parallel-size", "2")
EP2 = (*TP2, "--enable-expert-parallel")
PP2 = ("--pipeline-parallel-size", "2")
SETUPS = {
    "tp1-eager": EAGER,
    "tp1-compiled": (),
    "ep2-eager": (*EP2, *EAGER),
    "ep2-compiled": EP2,
    "pp2-compiled": PP2,
}
"""Tensor parallelism, eager, is in the test of all forms below. Pipeline parallelism on a CPU needs compiled stages."""
BY_DAY = "tp1-compiled"


Serve = Callable[[Path, tuple[str, ...]], Completions]


@pytest.fixture(scope="module")
def serve_once(tmp_path_factory: pytest.TempPathFactory, vllm_cache: Path) -> Serve:
    """Greedy completions of all PROMPTS by a server started for them."""
    logs = tmp_path_factory.mktemp("vllm_logs")

    def run(model: Path, options: tuple[str, ...]) -> Completions:
        log = logs / f"{model.name}{'_'.join(options)}.log"
        ranks = 2 if {TP2[0], PP2[0]} & set(options) else 1
        with serve(model, *COMMON, *options, log=log, ranks=ranks, cache=vllm_cache) as server:
            # One request after another: batched together they are summed in another order.
            return [
                steps(server.complete(p, MAX_TOKENS, logprobs=2, ignore_eos=True, return_tokens_as_token_ids=True))
                for p in PROMPTS
            ]

    return run


def steps(choice: dict[str, Any]) -> list[Step]:
    logprobs = choice["logprobs"]
    out = []
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        best, second = sorted(top.values(), reverse=True)[:2]
        out.append(Step(int(token.removeprefix("token_id:")), logprob, best - second))
    assert len(out) == MAX_TOKENS
    return out


@pytest.fixture(scope="module")
def reference(dequantized: Path, generate: Generator) -> Completions:
    """What vLLM makes of the dequantized checkpoint: an ordinary model, nothing of this project runs."""
    return generate(dequantized, PROMPTS, MAX_TOKENS)


def assert_same_tokens(got: Completions, want: Completions) -> None:
    """Completions may part only at a tie of the reference, and that is reported."""
    for prompt, a, b in zip(PROMPTS, got, want, strict=True):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if x.token != y.token:
                assert y.margin <= TIE, f"{prompt!r}: step {i} is {x}, the reference has {y}"
                warnings.warn(f"{prompt!r}: parts at step {i}, a tie within {y.margin:.1e}", stacklevel=2)
                break
            assert abs(x.logprob - y.logprob) <= MAX_ERROR, f"{prompt!r}: step {i} is {x}, the reference has {y}"


@pytest.mark.parametrize(
    "setup", [pytest.param(name, marks=[] if name == BY_DAY else [pytest.mark.nightly]) for name in SETUPS]
)
def test_tokens_equal_those_of_the_dequantized_checkpoint(
    setup: str, quantized: Path, reference: Completions, serve_once: Serve
) -> None:
    assert_same_tokens(serve_once(quantized, SETUPS[setup]), reference)


@pytest.mark.parametrize(
    ("objective", "bits"), [("alphaq", 2.5), pytest.param("bt-moe", 3.5, marks=pytest.mark.nightly)]
)
def test_sibling_methods_are_served(objective: str, bits: float, tmp_path: Path, generate: Generator) -> None:
    """One width for a matrix, gate and up apart; compensators beside the codes."""
    directory, dequantized = tmp_path / "quantized", tmp_path / "dequantized"
    config = QuantizeConfig(
        bits=bits, objective=objective, ranks=(0, 8, 32), calib=str(README), calib_samples=4, refine=1
    )
    quantize_model(str(write_first_layers(tmp_path / "model", 2)), directory, config)
    projections = [p for layer in Checkpoint(directory).config.layers.values() for p in layer.projections.values()]
    assert any(p.lowrank_total for p in projections) == (objective == "bt-moe")
    dequantize_checkpoint(directory, dequantized, torch.float32)
    got, want = (generate(model, PROMPTS, MAX_TOKENS) for model in (directory, dequantized))
    assert_same_tokens(got, want)


def test_lora_adapters_of_attention_can_be_served(quantized: Path, reference: Completions, generate: Generator) -> None:
    """The way that the refusal of `--enable-lora` names: it starts, and without an adapter nothing changes."""
    targets = {"enable_lora": True, "lora_target_modules": LORA_TARGETS.split()}
    assert_same_tokens(generate(quantized, PROMPTS, MAX_TOKENS, **targets), reference)


def test_reloaded_weights_are_those_of_the_other_model(quantized: Path, tmp_path: Path, generate: Generator) -> None:
    """With the same bit-widths, as after training goes on: every expert twice as large, and attention changed too."""
    other, dequantized = tmp_path / "other", tmp_path / "dequantized"
    shutil.copytree(quantized, other)
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("down_feature_scale"):
                tensors[name] = tensor * 2
            elif name.endswith("o_proj.weight"):
                tensors[name] = -tensor
        save_file(tensors, file, metadata={"format": "pt"})
    dequantize_checkpoint(other, dequantized, torch.float32)
    got, want = generate(quantized, PROMPTS, MAX_TOKENS, reload=other), generate(dequantized, PROMPTS, MAX_TOKENS)
    assert_same_tokens(got, want)


def test_every_form_of_the_format_is_served(tmp_path: Path, serve_once: Serve, generate: Generator) -> None:
    """Layers of forms the quantizer does not write by itself, on two ranks: bases on either side, separate gate and up,
    experts kept at 16 bits, compensators, an order for each expert."""
    source, directory = ShardReader(TINY_MOE), tmp_path / "forms"
    directory.mkdir()
    forms = ("expert_order_basis", "paper", "left", "extras")
    write_checkpoint(
        directory,
        {
            f"model.layers.{i}.mlp.experts": build_form(
                form, num_experts=16, hidden_size=256, intermediate_size=256, block_size=32, seed=i
            )
            for i, form in enumerate(forms)
        },
        other_tensors={name: source.get(name) for name in source if ".experts." not in name},
        model_config=read_json(TINY_MOE / "config.json"),
    )
    for file in TINY_MOE.glob("*token*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    dequantized = tmp_path / "forms_dequantized"
    dequantize_checkpoint(directory, dequantized, torch.float32)
    want = generate(dequantized, PROMPTS, MAX_TOKENS)
    assert_same_tokens(serve_once(directory, (*TP2, *EAGER)), want)
