"""The kernels on a GPU: the cases of the unit tests unchanged, CUDA graphs, determinism, a memory checker."""

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels import moe
from builders import REPO
from kernel_cases import CASES, DTYPES, call_of, check, parts, run_case

pytestmark = pytest.mark.gpu

# One of each: plain, with a basis, two matrices for an expert, plain numbers and compensators.
FORMS = ["all widths, blocks of 16", "8-bit basis", "gate and up apart with bases", "compensators and kept experts"]


def dtype_name(dtype: Any) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.usefixtures("poisoned_memory")
@both_dtypes
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, "cuda")


def routings(ids: Tensor, experts: int) -> list[Tensor]:
    """Other routings of the same shape: shifted, all to one expert, every other token to nobody, the first again."""
    shifted, one, none = (ids + 1) % experts, torch.full_like(ids, experts - 1), ids.clone()
    none[::2] = -1
    return [shifted, one, none, ids]


@both_dtypes
@pytest.mark.parametrize("name", [*FORMS, "ragged tails", "routed by torch"])
def test_a_graph_replays_under_other_routings(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured once, then fed other inputs, routings and weights in the same memory: the bits of a call without it."""
    for limit, value in CASES[name].limits.items():
        monkeypatch.setattr(moe, limit, value)
    ((layer, _),) = parts(name, dtype, "cuda")
    x, weights, ids = (v.cuda() for v in call_of(name, dtype))
    expected = []
    inputs = []
    for seed, other in enumerate(routings(ids.clamp(min=0), CASES[name].experts)):
        fresh, fresh_weights, _ = (v.cuda() for v in call_of(name, dtype, seed=seed + 1))
        inputs.append((fresh, fresh_weights, other))
        expected.append(moe.moe_forward(layer, fresh, fresh_weights, other))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe.moe_forward(layer, x, weights, ids)
    # Twice: nothing a replay leaves behind may reach the next one.
    for (fresh, fresh_weights, other), want in [*zip(inputs, expected, strict=True)] * 2:
        x.copy_(fresh)
        weights.copy_(fresh_weights)
        ids.copy_(other)
        y.fill_(float("nan"))
        graph.replay()
        assert same_bits(y, want)


@both_dtypes
@pytest.mark.parametrize("name", [*FORMS, "ragged tails", "tile 2 of 80", "an expert twice for a token"])
def test_twenty_runs_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    first = run_case(name, dtype, "cuda")
    for _ in range(19):
        assert all(same_bits(a, b) for a, b in zip(first, run_case(name, dtype, "cuda"), strict=True))


def test_many_tokens_are_deterministic() -> None:
    """Blocks of a token end in any order once they fill the device; its parts are still summed in one."""
    ((layer, _),) = parts("ragged tails", torch.bfloat16, "cuda")
    gen = torch.Generator().manual_seed(0)
    T = 2048
    x = torch.randn(T, CASES["ragged tails"].hidden, generator=gen).bfloat16().cuda()
    ids = torch.rand(T, 4, generator=gen).topk(4).indices.cuda()
    weights = torch.rand(T, 4, generator=gen).cuda()
    first = moe.moe_forward(layer, x, weights, ids)
    assert first.isfinite().all()
    assert all(same_bits(first, moe.moe_forward(layer, x, weights, ids)) for _ in range(20))


def test_a_call_never_waits_for_the_device() -> None:
    for name in FORMS:
        ((layer, _),) = parts(name, torch.bfloat16, "cuda")
        arguments = [v.cuda() for v in call_of(name, torch.bfloat16)]
        moe.moe_forward(layer, *arguments)  # compiled, and its memory known
        torch.cuda.set_sync_debug_mode("error")
        try:
            moe.moe_forward(layer, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["negative ids", "sizes of no round number"])
def test_memory_checker(name: str) -> None:
    """NVIDIA's compute-sanitizer (part of the CUDA toolkit) finds no access beyond what was allocated.

    By hand: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest tests/gpu -k test_case
    """
    checker = shutil.which("compute-sanitizer")
    assert checker, "compute-sanitizer is not on PATH; it comes with the CUDA toolkit (bin/compute-sanitizer)"
    test = f"tests/gpu/test_kernels.py::test_case[{name}-bfloat16]"
    # Without torch's own pool every tensor is an allocation, and a step beyond its end is seen.
    done = subprocess.run(
        [checker, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", test],
        cwd=REPO,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
