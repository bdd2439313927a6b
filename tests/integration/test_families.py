"""vLLM serves every architecture of the table: the tokens of the quantized model are those of its dequantized one."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitsmoe_kernels.models.families import FAMILIES
from builders import TINY_MOE
from families import CONFIGS, family_cases, make_model, whole_model
from offline_quant.checkpoint.dequantize import dequantize_checkpoint
from offline_quant.config import QuantizeConfig
from offline_quant.pipeline.quantize import quantize_model
from vllm_processes import Completions, Generator, Step

TOKENS = 24
PROMPTS = [[(7 * i + 31 * start) % 4000 + 1 for i in range(12 + start % 10)] for start in (0, 5, 9)]
MANY_PROMPTS = [[(7 * i + 31 * start) % 4000 + 1 for i in range(12 + start % 10)] for start in range(24)]
"""For errors that only statistics can compare: over three prompts the ratio of two medians has a standard deviation of
a fifth, over these of less than a tenth."""
MAX_ERROR = 1e-4
"""Of a token's log-probability in float32, and how far apart two are that count as a tie, see test_serving.py."""
MAX_ERROR_TRANSFORMERS = 1e-3
"""The same against transformers, whose state-space layers sum in another order."""
MAX_ERROR_FLOAT16 = 5e-2
"""The same in float16, where the root mean square of either's error is up to 3e-3."""
NARROW_FLOAT16 = 2e-3
"""Of two router logits in float16: twice the distance of its numbers around 1. Either expert may be taken then."""
ELSEWHERE = "Qwen3MoeForCausalLM"
"""In test_serving.py, through real servers."""


def assert_same(
    got: Completions, want: Completions, max_error: float = MAX_ERROR, narrow: torch.Tensor | None = None
) -> None:
    """Of `PROMPTS`; `narrow` [prompts, TOKENS] marks steps that do not count, see `narrow_choices`."""
    for p, (prompt, a, b) in enumerate(zip(PROMPTS, got, want, strict=True)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            ignored = narrow is not None and bool(narrow[p, i])
            off = y.margin if x.token != y.token else abs(x.logprob - y.logprob)
            assert ignored or off <= max_error, f"{prompt}: step {i} is {x}, the reference has {y}"
            if x.token != y.token:
                break


def errors(prompts: list[list[int]], completions: Completions, model: torch.nn.Module) -> torch.Tensor:
    """Of the log-probability of every generated token, against transformers in float32."""
    out = []
    for prompt, made in zip(prompts, completions, strict=True):
        tokens = torch.tensor([step.token for step in made])
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor(prompt), tokens])[None]).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        out.append(torch.tensor([step.logprob for step in made]) - exact)
    return torch.cat(out)


def narrow_choices(prompts: list[list[int]], completions: Completions, model: torch.nn.Module) -> torch.Tensor:
    """Steps where a router of the exact model prefers an expert by less than NARROW_FLOAT16, bool [n, TOKENS]."""
    out = []
    for prompt, made in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *(step.token for step in made)]])
        with torch.no_grad():
            logits = torch.stack(model(ids, output_router_logits=True).router_logits)[:, len(prompt) - 1 : -1]
        best = logits.topk(model.config.num_experts_per_tok + 1).values
        out.append((best[..., -2] - best[..., -1] < NARROW_FLOAT16).any(0))
    return torch.stack(out)


@pytest.fixture
def calib(tmp_path: Path) -> str:
    path = tmp_path / "calib.txt"
    path.write_text("She opened the door, and there stood her brother with the lamp in his hand. " * 40)
    return str(path)


@pytest.mark.parametrize(
    "architecture",
    family_cases(name for name, family in FAMILIES.items() if family.tested != "transformers" and name != ELSEWHERE),
)
def test_tokens_equal_those_of_the_dequantized_checkpoint(
    architecture: str, tmp_path: Path, calib: str, generate: Generator
) -> None:
    model, quantized, plain = (tmp_path / name for name in ("model", "quantized", "plain"))
    # vLLM's blocks of keys and values must divide chunks of attention, and on a CPU be multiples of 32.
    chunked = {"attention_chunk_size": 32} if "attention_chunk_size" in CONFIGS[architecture] else {}
    make_model(architecture, model, **chunked)
    config = QuantizeConfig(bits=4.5, calib=calib, calib_samples=4, calib_length=64, refine=0)
    quantize_model(str(model), quantized, config)
    dequantize_checkpoint(quantized, plain, torch.float32)
    # With AMX vLLM would take a backend for DeepSeek's attention that has no float32.
    options: dict[str, Any] = {"attention_backend": "CPU_MLA"} if "kv_lora_rank" in CONFIGS[architecture] else {}
    if chunked:
        options["block_size"] = 32
    if FAMILIES[architecture].text:
        options["limit_mm_per_prompt"] = dict.fromkeys(("image", "video", "vision_chunk"), 0)
    if FAMILIES[architecture].tested == "tokens":
        assert_same(*(generate(directory, PROMPTS, TOKENS, "float32", **options) for directory in (quantized, plain)))
        return
    # Rounding the reference's weights to bfloat16 parts the two; neither may be farther from the exact model.
    exact = whole_model(plain)
    # Medians: one expert that a token narrowly misses, on either side, outweighs all other tokens in a mean square.
    ours, theirs = (
        errors(MANY_PROMPTS, generate(directory, MANY_PROMPTS, TOKENS // 2, "bfloat16", **options), exact)
        .abs()
        .median()
        for directory in (quantized, plain)
    )
    assert ours <= 1.25 * theirs, (ours, theirs)
    assert theirs < 0.02


@pytest.mark.parametrize("more", [{}, {"moe_latent_size": 48}], ids=["its own width", "latent"])
def test_experts_without_a_gate(more: dict[str, Any], tmp_path: Path, calib: str, generate: Generator) -> None:
    """Against transformers: on CPUs vLLM has no experts without a gate, and refuses ours too if it is let."""
    model, quantized, plain = (tmp_path / name for name in ("model", "quantized", "plain"))
    make_model("NemotronHForCausalLM", model, **more)
    config = QuantizeConfig(bits=4.5, calib=calib, calib_samples=4, calib_length=64, refine=0)
    quantize_model(str(model), quantized, config)
    dequantize_checkpoint(quantized, plain, torch.float32)
    exact, want = whole_model(plain), []
    for prompt in PROMPTS:
        ids, steps = torch.tensor([prompt]), []
        for _ in range(TOKENS):
            with torch.no_grad():
                best = exact(input_ids=ids).logits[0, -1].log_softmax(-1).topk(2)
            steps.append(Step(int(best.indices[0]), float(best.values[0]), float(best.values[0] - best.values[1])))
            ids = torch.cat([ids, best.indices[None, :1]], 1)
        want.append(steps)
    assert_same(generate(quantized, PROMPTS, TOKENS, "float32"), want, MAX_ERROR_TRANSFORMERS)


@pytest.mark.parametrize(
    ("demo", "bits"),
    [(False, 4), *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((True, 4), (False, 8)))],
)
def test_linear_layers_outside_the_experts_at_four_and_eight_bits(
    demo: bool, bits: Literal[4, 8], tmp_path: Path, calib: str, generate: Generator
) -> None:
    """vLLM's kernels for them have no float32. In float16 ours may not be farther from the exact model.

    The demo model, and one with shared experts, a dense first layer, biases of attention and a head of its own. On a
    CPU vLLM has kernels for 4 bits, where there is AVX-512; ours takes the others.
    """
    source = TINY_MOE if demo else make_model("Qwen2MoeForCausalLM", tmp_path / "model")
    quick = {"basis": "natural", "feedback": False, "calib_samples": 4, "calib_length": 64, "refine": 0}
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    quantize_model(str(source), quantized, QuantizeConfig(bits=4.5, dense_bits=bits, calib=calib, **quick))
    dequantize_checkpoint(quantized, plain, torch.float32)
    got, want = (generate(directory, PROMPTS, TOKENS, "float16") for directory in (quantized, plain))
    exact = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    narrow = narrow_choices(PROMPTS, want, exact)
    assert float(narrow.float().mean()) < 0.1
    assert_same(got, want, MAX_ERROR_FLOAT16, narrow)
    ours, theirs = (
        errors(PROMPTS, made, exact)[~narrow_choices(PROMPTS, made, exact).flatten()].square().mean().sqrt()
        for made in (got, want)
    )
    assert ours <= 1.25 * theirs, (ours, theirs)
    assert theirs < 0.01
