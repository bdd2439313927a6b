"""The kernels on a GPU: the cases of the unit tests unchanged, CUDA graphs, determinism, a memory checker.

The cases hold ids of no expert too, as do the routings of graphs.
"""

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels._triton import direct, gemm, prepare
from bitsmoe_kernels.backends import triton_launch as moe
from bitsmoe_kernels.backends.launch_config import DECODE, PREFILL, Tile, kwidth_of, table_of
from bitsmoe_kernels.format.schema import Basis
from bitsmoe_kernels.layout.pack import KernelLayer, to_kernel_layout
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from bitsmoe_kernels.sharding import shard_layer
from builders import REPO, Plan, build_layer
from kernel_cases import DTYPES, NAMES, WARMED_UP, check, parts, run_case
from moe_cases import CASES, bytes_of, call_of, made_layer

pytestmark = pytest.mark.gpu

# One of each: plain, with a basis, two matrices for an expert, plain numbers and compensators.
FORMS = ["all widths, blocks of 16", "8-bit basis", "gate and up apart with bases", "compensators and kept experts"]


def dtype_name(dtype: Any) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bytes_of(a), bytes_of(b))


@pytest.mark.usefixtures("poisoned_memory")
@both_dtypes
@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, "cuda")


def tiles() -> list[Tile]:
    """All that the table has for this GPU."""
    major, minor = torch.cuda.get_device_capability()
    table = table_of(10 * major + minor)
    return list(dict.fromkeys((*table[DECODE], *table[PREFILL])))


@pytest.mark.usefixtures("poisoned_memory")
@both_dtypes
@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].tile is None])
def test_case_with_every_tile(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with those that the table has for more tokens than the cases have."""
    for tile in tiles():
        monkeypatch.setitem(CASES, name, replace(CASES[name], tile=tile))
        check(name, dtype, "cuda")


@both_dtypes
@pytest.mark.parametrize(
    ("E", "H", "inner", "top_k", "basis"),
    [(128, 2048, 768, 8, True), (8, 7168, 2048, 2, False), (4, 512, 7168, 2, False)],
)
def test_full_sizes(E: int, H: int, inner: int, top_k: int, basis: bool, dtype: torch.dtype) -> None:
    """Thousands of components and 128 experts: sums that round toward zero, and as many programs as a layer has."""
    gate_up = Plan(bits=(0, 1, 2, 3, 4), basis=Basis(rank=H, bits=8) if basis else None)
    plans: dict[Any, Plan] = {"gate_up": gate_up, "down": Plan(bits=(0, 1, 2, 3, 4))}
    made = build_layer(plans, num_experts=E, hidden_size=H, intermediate_size=inner)
    weights = LayerWeights(made.layer, made.block_size, {k: v.cuda() for k, v in made.tensors.items()})
    major, minor = torch.cuda.get_device_capability()
    layer = to_kernel_layout(weights, dtype, kwidth_of(10 * major + minor))
    gen = torch.Generator().manual_seed(0)
    for T in (1, 8, 37, 300, 1100):
        x = torch.randn(T, H, generator=gen).to(dtype).cuda()
        ids = torch.rand(T, E, generator=gen).topk(top_k).indices.int().cuda()
        topk_weights = (torch.rand(T, top_k, generator=gen) + 0.5).cuda()
        want = moe_forward(weights, x.float(), topk_weights, ids)
        error = (moe.moe_forward(layer, x, topk_weights, ids).float() - want).square().mean().sqrt()
        assert error <= (1e-3 if dtype == torch.float16 else 6e-3) * want.square().mean().sqrt(), T


def routings(ids: Tensor, experts: int) -> list[Tensor]:
    """Others of the same shape: shifted, all to one expert, every other token to nobody, beyond the last, the first."""
    shifted, one, none, beyond = (ids + 1) % experts, torch.full_like(ids, experts - 1), ids.clone(), ids.clone()
    none[::2] = -1
    beyond[::2, 0], beyond[1::2] = experts, 2**31 - 1
    return [shifted, one, none, beyond, ids]


@both_dtypes
@pytest.mark.parametrize("name", [*FORMS, "ragged tails", "routed in pieces"])
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


def compiled() -> int:
    """Variants of the kernels that Triton holds."""
    around = (prepare.begin_kernel, prepare.scale_kernel)
    kernels = (*around, gemm.gate_up_kernel, gemm.down_kernel, direct.gate_up_direct, direct.down_direct)
    return sum(len(cache) for kernel in kernels for cache, *_ in kernel.device_caches.values())


@both_dtypes
@pytest.mark.parametrize("name", ["8-bit basis", "compensators and kept experts"])
def test_numbers_of_tokens(name: str, dtype: torch.dtype) -> None:
    """Of every remainder, with inputs that begin anywhere: near the reference, and no kernel is compiled anew."""
    case, made = CASES[name], made_layer(name)
    ((layer, _),) = parts(name, dtype, "cuda")
    gen = torch.Generator().manual_seed(0)

    def call(T: int, skipped: int = 0) -> tuple[list[Tensor], Tensor]:
        x = torch.randn(T, case.hidden, generator=gen).to(dtype)
        ids = torch.randint(-1, case.experts + 1, (T * 3 + skipped,), generator=gen, dtype=torch.int32)
        weights = torch.rand(T * 3 + skipped, generator=gen) + 0.5
        ids, weights = (v.cuda()[skipped:].view(T, 3) for v in (ids, weights))
        return [x, weights.cpu(), ids.cpu()], moe.moe_forward(layer, x.cuda(), weights, ids)

    for T in WARMED_UP:
        call(T)
    before = compiled()
    for T in (1, 3, 5, 6, 7, 65, 66, 67, 511, 513, 524, 525, 682, 683, 2047, 2049):
        given, got = call(T, skipped=T % 4)
        want = moe_forward(LayerWeights(made.layer, made.block_size, made.tensors), given[0].float(), *given[1:])
        error = (got.cpu().float() - want).square().mean().sqrt()
        assert error <= (2e-3 if dtype == torch.float16 else 8e-3) * want.square().mean().sqrt(), T
    assert compiled() == before


@both_dtypes
@pytest.mark.parametrize("part", [(0, 1, None), (1, 2, (2, 0))])
@pytest.mark.parametrize("name", FORMS)
def test_a_layer_is_split_and_packed_on_the_device(
    name: str, part: tuple[int, int, tuple[int, ...] | None], dtype: torch.dtype
) -> None:
    """As on a CPU: codes and places to the bit, scales but for what the device's exp2 and log2 round."""
    case, made = CASES[name], made_layer(name)
    packed = []
    for device in ("cpu", "cuda"):
        there = {k: v.to(device) for k, v in made.tensors.items()}
        layer, tensors = shard_layer(made.layer, there, made.block_size, *part)
        packed.append(to_kernel_layout(LayerWeights(layer, made.block_size, tensors), dtype, case.kwidth))
    expected, got = (p.tensors() for p in packed)
    assert packed[0].static() == packed[1].static()
    assert got.keys() == expected.keys()
    for k, v in expected.items():
        assert got[k].is_cuda
        torch.testing.assert_close(got[k].cpu(), v, rtol=1e-6 if v.dtype == torch.float32 else 0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_arguments() -> None:
    """Whichever is the current one."""
    name = "compensators and kept experts"
    (expected,) = run_case(name, torch.bfloat16, "cuda:0")
    ((layer, _),) = parts(name, torch.bfloat16)
    there = KernelLayer.of({k: v.to("cuda:1") for k, v in layer.tensors().items()}, layer.static())
    with torch.cuda.device(0):
        y = moe.moe_forward(there, *(v.to("cuda:1") for v in call_of(name, torch.bfloat16)))
        assert torch.cuda.current_device() == 0
    assert y.device == torch.device("cuda:1")
    assert same_bits(y.cpu(), expected.cpu())


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


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        *itertools.product(
            ["negative ids", "ids of no expert in a map", "sizes of no round number"], ["memcheck", "racecheck"]
        ),
        # Rows of slots that are elsewhere are never written; blocks that are not full read one, and do not use it.
        ("8-bit basis", "initcheck"),
        ("five tiles", "initcheck"),
    ],
)
def test_memory_checker(name: str, tool: str) -> None:
    """NVIDIA's compute-sanitizer (part of the CUDA toolkit) finds no access beyond what was allocated, and no race.

    Nor a read of memory that nobody wrote.

    By hand: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m pytest tests/gpu -k test_case
    """
    checker = shutil.which("compute-sanitizer")
    assert checker, "compute-sanitizer is not on PATH; it comes with the CUDA toolkit (bin/compute-sanitizer)"
    test = f"tests/gpu/test_kernels.py::test_case_with_every_tile[{name}-bfloat16]"
    # Without torch's own pool every tensor is an allocation, and a step beyond its end is seen.
    done = subprocess.run(
        [checker, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", test],
        cwd=REPO,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout
    said = done.stdout + done.stderr
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said
