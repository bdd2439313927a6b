"""vLLM serves every architecture of the table: the tokens of the quantized model are those of its dequantized one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitsmoe_kernels.format.families import FAMILIES
from builders import TINY_MOE
from families import make_model
from offline_quant.config import QuantizeConfig
from offline_quant.dequantize import dequantize_checkpoint
from offline_quant.pipeline import quantize_model

TOKENS = 24
PROMPTS = [[(7 * i + 31 * start) % 4000 + 1 for i in range(12 + start)] for start in (0, 5, 9)]
MAX_ERROR = 1e-4
"""Of a token's log-probability in float32, and how far apart two are that count as a tie, see test_serving.py."""
MAX_ERROR_FLOAT16 = 5e-2
"""The same in float16, where the root mean square of either's error is up to 3e-3."""
BFLOAT16_ONLY = "Qwen3NextForCausalLM"
"""vLLM's linear attention on a CPU is written for nothing else."""

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
models, dtype, prompts, tokens = json.loads(sys.argv[1])
results = []
for model in models:
    llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=1, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=2, detokenize=False)
    out = []
    for prompt in prompts:  # one after another: batched together they are summed in another order
        found = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
        out.append([[t, sorted((v.logprob for v in top.values()), reverse=True)]
                    for t, top in zip(found.token_ids, found.logprobs)])
    results.append(out)
    del llm
print("RESULT" + json.dumps(results))
"""

Steps = list[list[tuple[int, list[float]]]]


def generate(models: list[Path], dtype: str, cache: Path) -> list[Steps]:
    """Token and best log-probabilities of every greedy step of every prompt, by each model in turn."""
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CACHE_ROOT": str(cache),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", GENERATE, json.dumps([list(map(str, models)), dtype, PROMPTS, TOKENS])],
        capture_output=True, text=True, env=os.environ | environment, timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout.split("RESULT")[1])


def assert_same(got: Steps, want: Steps, max_error: float = MAX_ERROR) -> None:
    for prompt, a, b in zip(PROMPTS, got, want, strict=True):
        assert len(a) == len(b) == TOKENS
        for i, ((token, top), (expected, best)) in enumerate(zip(a, b, strict=True)):
            if token != expected:
                assert best[0] - best[1] <= max_error, f"{prompt}: step {i} is {token}, the reference has {expected}"
                break
            assert abs(top[0] - best[0]) <= max_error, f"{prompt}: step {i}, {top} against {best}"


def errors(steps: Steps, model: torch.nn.Module) -> torch.Tensor:
    """Of the log-probability of every generated token, against transformers in float32."""
    out = []
    for prompt, made in zip(PROMPTS, steps, strict=True):
        tokens = torch.tensor([token for token, _ in made])
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor(prompt), tokens])[None]).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        out.append(torch.tensor([top[0] for _, top in made]) - exact)
    return torch.cat(out)


@pytest.fixture
def calib(tmp_path: Path) -> str:
    path = tmp_path / "calib.txt"
    path.write_text("She opened the door, and there stood her brother with the lamp in his hand. " * 40)
    return str(path)


@pytest.mark.parametrize("architecture", [a for a in FAMILIES if a != "Qwen3MoeForCausalLM"])
def test_tokens_equal_those_of_the_dequantized_checkpoint(architecture: str, tmp_path: Path, calib: str) -> None:
    """Qwen3-MoE is in test_serving.py, through real servers."""
    model, quantized, plain = (tmp_path / name for name in ("model", "quantized", "plain"))
    make_model(architecture, model)
    config = QuantizeConfig(bits=4.5, calib=calib, calib_samples=4, calib_length=64, refine=0)
    quantize_model(str(model), quantized, config)
    dequantize_checkpoint(quantized, plain, torch.float32)
    dtype = "bfloat16" if architecture == BFLOAT16_ONLY else "float32"
    got, want = generate([quantized, plain], dtype, tmp_path / "cache")
    if architecture != BFLOAT16_ONLY:
        assert_same(got, want)
        return
    # Rounding the reference's weights to bfloat16 parts the two; neither may be farther from the exact model.
    exact = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    ours, theirs = (errors(steps, exact).square().mean().sqrt() for steps in (got, want))
    assert ours <= 1.25 * theirs, (ours, theirs)
    assert theirs < 0.2


def test_linear_layers_outside_the_experts_at_four_bits(tmp_path: Path, calib: str) -> None:
    """vLLM's kernels for them have no float32. In float16 ours may not be farther from the exact model.

    The demo model, and one with shared experts, a dense first layer, biases of attention and a head of its own.
    """
    sources = {"demo": TINY_MOE, "shared": make_model("Qwen2MoeForCausalLM", tmp_path / "model")}
    quick = {"basis": "natural", "feedback": False, "calib_samples": 4, "calib_length": 64, "refine": 0}
    checkpoints: list[Path] = []
    for name, source in sources.items():
        quantized, plain = tmp_path / f"{name}-quantized", tmp_path / f"{name}-plain"
        config = QuantizeConfig(bits=4.5, dense_bits=4, calib=calib, **quick)
        quantize_model(str(source), quantized, config)
        dequantize_checkpoint(quantized, plain, torch.float32)
        checkpoints += [quantized, plain]
    found = generate(checkpoints, "float16", tmp_path / "cache")
    for plain, got, want in zip(checkpoints[1::2], found[::2], found[1::2], strict=True):
        assert_same(got, want, MAX_ERROR_FLOAT16)
        exact = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
        ours, theirs = (errors(steps, exact).square().mean().sqrt() for steps in (got, want))
        assert ours <= 1.25 * theirs, (ours, theirs)
        assert theirs < 0.01
