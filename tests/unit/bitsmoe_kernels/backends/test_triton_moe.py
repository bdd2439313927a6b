"""The kernels on a CPU, by Triton's interpreter: the shared cases, what is launched, and the choice of tiles."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bitsmoe_kernels._triton import gemm, prepare
from bitsmoe_kernels.backends import triton_launch as moe
from bitsmoe_kernels.backends.launch_config import DECODE, PREFILL, TILES, kwidth_of, pick_tile, table_of
from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.layout.pack import KernelLayer, to_kernel_layout
from bitsmoe_kernels.reference import LayerWeights
from bruteforce import gated, matrices
from builders import MadeLayer, Plan, build_form, build_layer, form_plans
from kernel_cases import DTYPES, NAMES, WARMED_UP, check, parts, run_case, shuffled_grid, with_fault
from moe_cases import CASES, LARGE, MARGIN, bytes_of, call_of, guarded_memory
from pretended_cuda import pretended_cuda
from tensor_core import AMPERE, HOPPER, MatrixUnit, multiply_add, rounding_toward_zero

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # Padding computes with poisoned memory, and numpy says so.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def dtype_name(dtype: Any) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


def kernel_layer(made: MadeLayer, dtype: torch.dtype = torch.float16, kwidth: int = 2) -> KernelLayer:
    return to_kernel_layout(LayerWeights(made.layer, made.block_size, made.tensors), dtype, kwidth)


def call(T: int, H: int, ids: list[list[int]] | Tensor, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(0)
    x, ids = torch.randn(T, H, generator=gen).to(dtype), torch.as_tensor(ids, dtype=torch.int32)
    return x, torch.rand(ids.shape, generator=gen), ids


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.nightly] if name in LARGE else [])
        for name in NAMES
        for dtype in DTYPES
    ],
    ids=dtype_name,
)
def test_case(name: str, dtype: torch.dtype) -> None:
    with shuffled_grid(list(CASES).index(name)):
        check(name, dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_nobody_routed_gives_zeros(dtype: torch.dtype) -> None:
    (y,) = run_case("negative ids", dtype)
    assert y.any(1).tolist() == [True, False, True, True, True]
    (y,) = run_case("no codes", dtype)
    assert not y.any()


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["blocks without codes", "gate and up apart", "compensators of down"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_results_beyond_the_dtype_stay_finite(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of 1e4 into ordinary weights: h is 1e8, which float16 does not hold; its largest number stands for it."""
    monkeypatch.setitem(CASES, name, replace(CASES[name], amplitude=1e4))
    (y,) = run_case(name, dtype)
    assert y.isfinite().all()
    assert float(y.abs().max()) > 1e4


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["all tokens to one expert", "compensators of down", "8-bit basis"])
def test_a_poisoned_token_spoils_itself_only(name: str, poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    (clean,) = run_case(name, torch.bfloat16)
    x, weights, ids = call_of(name, torch.bfloat16)
    x[1, 3] = poison
    ((layer, _),) = parts(name, torch.bfloat16)
    got = moe.moe_forward(layer, x, weights, ids)
    others = [i for i in range(len(x)) if i != 1]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize(("terms", "extra", "lost"), [(8, 1, 0), (16, 2, 0), (16, 0, 2), (1, 2, 2)])
def test_a_matrix_unit_cuts_what_lies_below_the_largest_term(terms: int, extra: int, lost: int) -> None:
    """1 and twice 2^-24: 1 + 2^-23 where all are added together and a bit below the last is kept; else 1."""
    left, acc = np.ones((1, 3)), np.zeros((1, 1))
    right = np.array([[1.0], [2.0**-24], [2.0**-24]])
    for sign in (1, -1):
        got = multiply_add(sign * left, right, acc, MatrixUnit(terms, extra))
        assert got == sign * (1 + (2 - lost) * 2.0**-24)


ROUNDED, MOST = 2.1e-4, 4e-4
"""Relative RMS error of a projection: with rounded activations alone, and at most on a matrix unit (issue 27)."""


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("unit", [AMPERE, pytest.param(HOPPER, marks=pytest.mark.nightly)], ids=["Ampere", "Hopper"])
@pytest.mark.parametrize(
    "bits", [(1, 2, 3, 4), *(pytest.param((width,), marks=pytest.mark.nightly) for width in (1, 2, 3, 4))], ids=str
)
@pytest.mark.parametrize(("hidden", "inner"), [(2048, 64), (7168, 64), (64, 7168)])
def test_float16_on_a_matrix_unit(hidden: int, inner: int, bits: tuple[int, ...], unit: MatrixUnit) -> None:
    """What sums that round toward zero add to the error of one long projection."""
    made = build_layer(
        {"gate_up": Plan(bits=bits), "down": Plan(bits=bits)},
        num_experts=1,
        hidden_size=hidden,
        intermediate_size=inner,
    )
    x, _, ids = call(16, hidden, [[0]] * 16)
    gate_up, down = (matrices(made.layer.model_dump(mode="json"), p, 16, made.tensors)[0] for p in ("gate_up", "down"))
    gate, up = np.split(x.double().numpy() @ gate_up, 2, 1)
    want = gated(gate, up, made.layer.hidden_act) @ down
    with rounding_toward_zero(unit):
        on_unit = moe.moe_forward(kernel_layer(made), x, torch.ones(16, 1), ids)
    exactly = moe.moe_forward(kernel_layer(made), x, torch.ones(16, 1), ids)
    error, least = (((y.double().numpy() - want) ** 2).mean() / (want**2).mean() for y in (on_unit, exactly))
    assert least > 0
    assert error - least <= MOST**2 - ROUNDED**2


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LARGE])
def test_case_on_a_matrix_unit(name: str, dtype: torch.dtype) -> None:
    with rounding_toward_zero(AMPERE):
        check(name, dtype)


@pytest.mark.parametrize(("at", "where"), [(-1, "before"), (3, "behind")])
def test_a_step_beyond_a_tensor_is_seen(at: int, where: str) -> None:
    with guarded_memory():
        tensor = torch.empty(3).zero_()
    with pytest.raises(AssertionError, match=f"written {where}"), guarded_memory() as memory:
        memory.put(tensor).as_strided((1,), (1,), MARGIN // 4 + at).zero_()


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["an expert twice for a token", "compensators of down", "routed in pieces"])
def test_bits_do_not_depend_on_the_order_of_programs(name: str) -> None:
    first = run_case(name, torch.float16)
    for seed in range(2):
        with shuffled_grid(seed) as seen:
            second = run_case(name, torch.float16)
        assert all(torch.equal(bytes_of(a), bytes_of(b)) for a, b in zip(first, second, strict=True))
        assert any(order != sorted(order) for order in seen)
        for order in seen:
            sizes = [1 + max(at) for at in zip(*order, strict=True)]
            assert sorted(order) == [*product(*map(range, sizes))]


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
def test_a_kernel_that_trusts_in_an_order_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Down summed up by the token's block that comes last in the grid, whether or not the others have arrived."""
    right = "last = valid & (before + 1 == TOP_K)"
    wrong = """final = expert
    for j in tl.range(TOP_K, num_stages=1, loop_unroll_factor=1):
        final = tl.maximum(final, tl.load(local + token * TOP_K + j))
    last = valid & (final == expert)"""
    monkeypatch.setattr(gemm, "down_kernel", with_fault(gemm, right, wrong, tmp_path).down_kernel)
    check("ragged tails", torch.float16)  # in the interpreter's own order nothing is wrong
    with shuffled_grid(0), pytest.raises(AssertionError):
        check("ragged tails", torch.float16)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], list[Any]]]:
    """Kernels in the order of their launch, by name, grid and everything the CPU decides. Nothing is run."""
    seen: list[tuple[str, tuple[int, ...], list[Any]]] = []

    def known(value: Any) -> Any:
        return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value

    def record(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        assert all(v.is_contiguous() for v in args if isinstance(v, Tensor))
        seen.append((name, grid, [known(v) for v in args] + [(k, known(v)) for k, v in sorted(options.items())]))

    monkeypatch.setattr(moe, "_launch", record)
    return seen


SIZES = {"num_experts": 8, "hidden_size": 200, "intermediate_size": 136}


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        # begin: experts, tokens, and the basis in four parts. gate_up: 384 stored outputs in programs of 64, or of 128
        # where gate and up are apart; down: 200 in programs of 64.
        ("natural", {"begin": (8 + 1,), "scale": (2, 1, 1), "gate_up": (6, 2), "down": (4, 2)}),
        ("ordered", {"begin": (8 + 1,), "scale": (2, 1, 1), "gate_up": (6, 2), "down": (4, 2)}),
        ("shared_basis", {"begin": (8 + 1 + 7 * 4,), "scale": (2, 1, 1), "gate_up": (6, 2), "down": (4, 2)}),
        ("expert_order_basis", {"begin": (8 + 1 + 5 * 4,), "scale": (2, 1, 1), "gate_up": (6, 2), "down": (4, 2)}),
        ("kept", {"begin": (8 + 1,), "scale": (2, 1, 1), "gate_up": (6, 2), "down": (4, 2)}),
        ("apart", {"begin": (8 + 1,), "scale": (2, 1, 2), "gate_up": (3, 2), "down": (4, 2)}),
    ],
)
def test_launches_at_batch_1(form: str, expected: dict[str, tuple[int, ...]], launches: list[Any]) -> None:
    """At most 4, with a basis and without."""
    bits = (2, 4)  # no width above 4: every channel is one component of down
    plans: dict[str, dict[Any, Plan]] = {
        "kept": {"gate_up": Plan(kept_experts=(1,)), "down": Plan(kept_experts=(5,))},
        "apart": {"gate": Plan(), "up": Plan(), "down": Plan()},
    }
    named = plans.get(form) or form_plans(form, *SIZES.values())
    made = build_layer({k: replace(p, bits=bits) for k, p in named.items()}, **SIZES)
    moe.moe_forward(kernel_layer(made), *call(1, 200, [[3, 5]]))
    assert [(name, grid) for name, grid, _ in launches] == list(expected.items())
    assert len(launches) <= 4


def test_compensators_of_down_take_one_more(launches: list[Any]) -> None:
    made = build_layer({"gate_up": Plan(ranks=(1,) * 8), "down": Plan(ranks=(1,) * 8)}, **SIZES)
    moe.moe_forward(kernel_layer(made), *call(1, 200, [[3, 5]]))
    assert [name for name, *_ in launches] == ["begin", "scale", "gate_up", "scale", "down"]


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("form", ["shared_basis", "extras"])
def test_launches_do_not_depend_on_routing(form: str, tokens: int, launches: list[Any]) -> None:
    layer = kernel_layer(build_form(form, **SIZES))
    seen = []
    for ids in ([[0, 1]] * tokens, [[t % 8, (t + 3) % 8] for t in range(tokens)], [[-1, 7]] * tokens):
        moe.moe_forward(layer, *call(tokens, 200, ids))
        seen.append(list(launches))
        launches.clear()
    assert seen[0] == seen[1] == seen[2]


def test_the_tile_is_the_tables(launches: list[Any]) -> None:
    layer = kernel_layer(build_form("natural", **SIZES))
    for tokens in (1, 100, 300):
        for capability in TILES:
            launches.clear()
            moe.moe_forward(layer, *call(tokens, 200, [[0, 1]] * tokens), device=moe.Device(capability, False))
            tile = pick_tile(capability, 2 * tokens, 8, layer.inputs.scale.shape[1])
            grids = {name: grid for name, grid, _ in launches}
            options = {name: known for name, _, known in launches}
            assert grids["down"] == (-(-200 // tile.outputs), min(2 * tokens, 2 * tokens // tile.tokens + 8))
            for name in ("gate_up", "down"):
                want = {"BT": tile.tokens, "num_warps": tile.warps, "UNROLL": tile.unroll, "STAGES": tile.stages}
                assert set(want.items()) <= {v for v in options[name] if isinstance(v, tuple)}
            assert ("BN", tile.outputs) in options["down"]
            assert ("BN", tile.gate_up) in options["gate_up"]


class Ops(TorchDispatchMode):
    """Names of the torch operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


MEMORY_ONLY = {"empty", "new_empty", "empty_like", "view", "_unsafe_view", "split_with_sizes", "detach", "alias"}


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("form", ["natural", "shared_basis", "extras"])
def test_torch_launches_nothing_beside_the_kernels(form: str) -> None:
    """It hands out memory: no copy, no fill, and nothing that waits for the device."""
    layer = kernel_layer(build_form(form, **SIZES))
    for expert_map in (None, torch.arange(8, dtype=torch.int32)):
        arguments = call(1, 200, [[3, 5]])
        with Ops() as ops:
            moe.moe_forward(layer, *arguments, expert_map)
        assert set(ops.seen) <= MEMORY_ONLY


def route(ids: Tensor, expert_map: Tensor | None, E: int, tokens: int) -> tuple[list[int], dict[int, list[list[int]]]]:
    """Experts of the slots, and of each expert the slots of its blocks."""
    with guarded_memory() as memory:
        ids, expert_map = memory.put(ids), None if expert_map is None else memory.put(expert_map)
        out = memory.put(torch.full((len(ids), 5), float("nan")))
        r = moe._route(ids, expert_map, E, tokens, 3, out)
    n = int(r.num_blocks)
    assert n <= r.max_blocks
    elsewhere = (r.local.view(ids.shape) < 0).sum(1)
    assert (r.arrived.view(-1, 3) == elsewhere[:, None]).all()
    # Nobody else writes rows of tokens that have no slot here; somebody does the others.
    cleared = elsewhere == ids.shape[1]
    assert (out[cleared] == 0).all()
    assert out[~cleared].isnan().all()
    blocks: dict[int, list[list[int]]] = {}
    for expert, slots in zip(r.block_expert[:n].tolist(), r.block_slot.view(-1, tokens)[:n].tolist(), strict=True):
        blocks.setdefault(expert, []).append(slots)
    assert list(blocks) == sorted(blocks)
    return r.local.tolist(), blocks


def check_route(ids: Tensor, expert_map: Tensor | None, E: int, tokens: int) -> None:
    """Against a loop: blocks by expert, slots in ascending order, -1 behind the last one."""
    places = list(range(E)) if expert_map is None else expert_map.tolist()
    local = [places[e] if 0 <= e < len(places) else -1 for e in ids.flatten().tolist()]
    local = [e if 0 <= e < E else -1 for e in local]
    want: dict[int, list[list[int]]] = {}
    for e in sorted({e for e in local if e >= 0}):
        slots = [s for s, mine in enumerate(local) if mine == e]
        slots += [-1] * (-len(slots) % tokens)
        want[e] = [slots[i : i + tokens] for i in range(0, len(slots), tokens)]
    got_local, got = route(ids, expert_map, E, tokens)
    assert got_local == local
    assert got == want


def junk_ids(shape: tuple[int, int], experts: int, dtype: torch.dtype) -> Tensor:
    """Ids of which three quarters name an expert; all others do not, by little or by much."""
    gen = torch.Generator().manual_seed(0)
    beyond = [-1, -(2**31), experts, experts + 1, 2 * experts, 2**31 - 1]
    if dtype == torch.int64:
        beyond += [2**31, 2**32 + 1, 2**62, 2**62 + 1, -(2**63)]
    ids = torch.randint(experts, shape, generator=gen).to(dtype)
    junk = torch.tensor(beyond, dtype=dtype)[torch.randint(len(beyond), shape, generator=gen)]
    return torch.where(torch.rand(shape, generator=gen) < 0.25, junk, ids)


pieces = pytest.mark.parametrize("chunk", [16, moe.ROUTE_CHUNK])
both_ids = pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=dtype_name)


@pytest.mark.usefixtures("poisoned_memory")
@pieces
@both_ids
@pytest.mark.parametrize("mapped", [False, True])
def test_every_slot_is_in_one_block_of_its_expert(
    chunk: int, ids_dtype: torch.dtype, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "ROUTE_CHUNK", chunk)
    gen = torch.Generator().manual_seed(0)
    expert_map = torch.tensor([4, -1, 0, 2, -1, 1, 3], dtype=torch.int32) if mapped else None
    for ids in (
        torch.randint(-1, 7 if mapped else 5, (70, 2), generator=gen),
        torch.full((33, 2), 2),
        torch.full((3, 4), -1),
        torch.full((16, 1), 3),
    ):
        check_route(ids.to(ids_dtype), expert_map, 5, 16)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pieces
@both_ids
@pytest.mark.parametrize("experts", [1, 3, 4, pytest.param(60, marks=pytest.mark.nightly)])
def test_slots_of_no_expert_are_in_no_block(
    chunk: int, ids_dtype: torch.dtype, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written outside of the buffers, nothing read outside of the ids and the map."""
    monkeypatch.setattr(moe, "ROUTE_CHUNK", chunk)
    # Of a map's experts half are here; some of its entries are of no expert themselves.
    places = [e // 2 if e % 2 else [-1, -5, experts, experts + 1, 2**31 - 1][e % 5] for e in range(2 * experts)]
    expert_map = torch.tensor(places, dtype=torch.int32)
    for shape in ((40, 2), (1, 1), (7, 3)):
        check_route(junk_ids(shape, experts, ids_dtype), None, experts, 16)
        for mapped in (expert_map, expert_map.long()):
            check_route(junk_ids(shape, 2 * experts, ids_dtype), mapped, experts, 16)
    for beyond in (experts, 2**31 - 1):
        check_route(torch.full((9, 2), beyond, dtype=ids_dtype), None, experts, 16)
        check_route(torch.full((9, 2), beyond + experts, dtype=torch.int64), expert_map, experts, 16)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("right", "wrong", "mapped"),
    [
        ("(expert >= 0) & (expert < EXPERTS)", "expert >= 0", False),
        ("(expert >= 0) & (expert < EXPERTS)", "expert >= 0", True),
        ("(mapped >= 0) & (mapped < E)", "mapped >= 0", True),
        ("tl.load(ids + s, mask=s < S, other=-1)", "tl.load(ids + s, mask=s < S, other=-1).to(tl.int32)", False),
    ],
)
def test_a_routing_kernel_without_bounds_is_found(
    right: str, wrong: str, mapped: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(prepare, "begin_kernel", with_fault(prepare, right, wrong, tmp_path).begin_kernel)
    expert_map = torch.tensor([0, 9, 1, 2, 3], dtype=torch.int32) if mapped else None
    check_route(torch.tensor([[0, 2], [3, 0]]), expert_map, 4, 16)
    with pytest.raises(AssertionError):
        check_route(torch.tensor([[0, 2], [5 if mapped else 4, 1], [2**32 + 1, 3]]), expert_map, 4, 16)


MOST_VARIANTS = {"begin": 3, "scale": 4, "gate_up": 5, "down": 5}
"""One for each tile; one for each of the basis' tiles, whose parts are added up in the next launch, in either order."""


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Names of kernels launched and the keys under which Triton caches what it compiles for them. Nothing is run."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    binders: dict[Any, Callable[..., Any]] = {}
    seen: set[tuple[str, str]] = set()

    def record(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if kernel.fn not in binders:
            # The interpreter's kernels are none of Triton's; those in Gluon are.
            compiled = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
            binders[kernel.fn] = create_function_from_signature(compiled.signature, compiled.params, backend)
        _, specialization, options = binders[kernel.fn](*args, **options)
        seen.add((name, compute_cache_key({}, specialization, options)))

    monkeypatch.setattr(moe, "_launch", record)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    ("form", "experts", "top_k", "mapped"),
    [("natural", 64, 6, False), ("shared_basis", 8, 2, True), ("shared_basis", 16, 5, False), ("extras", 4, 1, True)],
)
def test_no_number_of_tokens_makes_triton_compile_anew(
    form: str, experts: int, top_k: int, mapped: bool, dtype: torch.dtype, variants: set[tuple[str, str]]
) -> None:
    """Beyond what the sizes that vLLM captures and profiles have compiled."""
    layer = kernel_layer(build_form(form, num_experts=experts, hidden_size=64, intermediate_size=32), dtype)
    expert_map = torch.arange(experts, dtype=torch.int32) if mapped else None

    def call_with(T: int, skipped: int = 0) -> None:
        weights, ids = torch.ones(T * top_k + skipped), torch.zeros(T * top_k + skipped, dtype=torch.int32)
        routing = [v[skipped:].view(T, top_k) for v in (weights, ids)]
        moe.moe_forward(layer, torch.empty(T, 64, dtype=dtype), *routing, expert_map, moe.Device(90, True))

    for T in WARMED_UP:
        call_with(T)
    warmed_up = set(variants)
    counts = Counter(name for name, _ in warmed_up)
    assert all(n <= MOST_VARIANTS[name] for name, n in counts.items()), counts
    for T in (*range(1, 2049), 2049, 5000):
        call_with(T, skipped=T % 4)  # a view that begins anywhere
    assert variants == warmed_up


@pytest.mark.parametrize("capability", TILES)
def test_powers_of_two_meet_every_tile_that_any_number_of_tokens_does(capability: int) -> None:
    for experts, top_k in ((8, 2), (64, 6), (60, 4), (128, 8), (160, 8), (256, 8), (512, 10)):
        for outputs in (64, 1536, 28_672):
            every = {pick_tile(capability, T * top_k, experts, outputs) for T in range(1, 2049)}
            assert every == {pick_tile(capability, T * top_k, experts, outputs) for T in WARMED_UP}


def test_a_rank_of_experts_takes_the_tile_of_them_all(launches: list[Any]) -> None:
    """Slots are spread over all experts: a rank with 2 of 16 gets an eighth of them. Its blocks would hold all."""
    layer = kernel_layer(build_form("natural", num_experts=2, hidden_size=200, intermediate_size=136))
    expert_map = torch.full((16,), -1, dtype=torch.int32)
    expert_map[[3, 9]] = torch.arange(2, dtype=torch.int32)
    moe.moe_forward(layer, *call(100, 200, [[0, 3]] * 100), expert_map)
    tile = TILES[90][DECODE][-1]
    (down,) = [(grid, known) for name, grid, known in launches if name == "down"]
    assert down[0] == (-(-200 // tile.outputs), 200 // tile.tokens + 2)
    assert ("BT", tile.tokens) in down[1]
    launches.clear()
    moe.moe_forward(layer, *call(100, 200, [[0, 1]] * 100))
    (known,) = [known for name, _, known in launches if name == "down"]
    assert ("BT", pick_tile(90, 200, 2, 272).tokens) in known
    assert pick_tile(90, 200, 2, 272).tokens > tile.tokens


@pytest.mark.slow
def test_kernels_are_launched_on_the_device_of_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the current one; it is the same one afterwards."""
    monkeypatch.setattr(moe, "TOKENS_AT_ONCE", 4)
    layer = kernel_layer(build_form("extras", **SIZES))
    seen: list[tuple[int, str]] = []

    def record(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        assert all(v.is_cuda for v in args if isinstance(v, Tensor))
        seen.append((torch.cuda.current_device(), name))
        if fails:
            raise ZeroDivisionError

    monkeypatch.setattr(moe, "_launch", record)
    expert_map = torch.arange(8, dtype=torch.int32)
    with pretended_cuda():
        there = KernelLayer.of({k: v.cuda() for k, v in layer.tensors().items()}, layer.static())
        arguments = [v.cuda() for v in (*call(5, 200, [[3, 5]] * 5), expert_map)]
        with torch.cuda.device(1):
            fails = False
            y = moe.moe_forward(there, *arguments)
            assert torch.cuda.current_device() == 1
            fails = True
            with pytest.raises(ZeroDivisionError):
                moe.moe_forward(there, *arguments)
            assert torch.cuda.current_device() == 1
        assert y.is_cuda
        assert y.shape == (5, 200)
    assert {device for device, _ in seen} == {0}
    assert {"scale", "gate_up", "down"} <= {name for _, name in seen}


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("elsewhere", ["topk_weights", "topk_ids", "expert_map", "basis", "down_scale"])
def test_tensors_of_two_devices_are_refused(elsewhere: str) -> None:
    layer = kernel_layer(build_form("shared_basis", **SIZES))
    x, topk_weights, topk_ids = call(2, 200, [[3, 5]] * 2)
    given = {"topk_weights": topk_weights, "topk_ids": topk_ids, "expert_map": torch.arange(8, dtype=torch.int32)}
    with pretended_cuda():
        tensors = {k: v if k == elsewhere else v.cuda() for k, v in layer.tensors().items()}
        given = {k: v if k == elsewhere else v.cuda() for k, v in given.items()}
        with pytest.raises(BitsmoeError) as raised:
            moe.moe_forward(KernelLayer.of(tensors, layer.static()), x.cuda(), **given)
    title, *faults = str(raised.value).splitlines()
    assert title == "activations are on cuda:0, but not all tensors: move these there:"
    assert faults == [f"  - {elsewhere} is on cpu"]


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120, 121])
@pytest.mark.parametrize("experts", [1, 8, 128])
def test_tiles_grow_with_tokens(capability: int, experts: int) -> None:
    table = table_of(capability)
    rows = [*table[DECODE][1:], *table[PREFILL]]
    picked = [pick_tile(capability, slots, experts, 1 << 20) for slots in range(1, 200 * experts, max(1, experts // 8))]
    assert set(picked) == set(rows)
    assert [t.tokens for t in picked] == sorted(t.tokens for t in picked)
    for decode in table[DECODE][1:]:
        # A block of decode holds an expert's mean share of the slots.
        assert pick_tile(capability, decode.tokens * experts, experts, 1 << 20) == decode
        assert pick_tile(capability, decode.tokens * experts + 1, experts, 1 << 20) != decode
    assert pick_tile(capability, 10**9, experts, 64) == rows[-1]


def test_few_programs_are_small_ones() -> None:
    small, few, *_ = TILES[90][DECODE]
    assert (small.outputs, small.gate_up) < (few.outputs, few.gate_up)
    assert pick_tile(90, 0, 8, 1536) == pick_tile(90, 8, 128, 2048) == small
    assert pick_tile(90, 8, 128, 2049) == pick_tile(90, 9, 128, 2048) == few
    # As many outputs, but more slots than a block of the small tile has for each expert.
    assert pick_tile(90, 9, 1, 64) == TILES[90][DECODE][2]


def test_tables_serve_architectures_from_theirs_on() -> None:
    assert table_of(86) == table_of(89) == TILES[80]
    assert table_of(103) == TILES[100]
    assert table_of(121) == TILES[120]
    for capability in (0, 70, 75, 79):
        with pytest.raises(ValueError, match=r"compute capability \d\.\d is below 8\.0"):
            pick_tile(capability, 1, 1, 64)


def test_a_rank_without_experts_gets_a_tile() -> None:
    assert pick_tile(90, 5, 0, 64) == TILES[90][DECODE][1]


def test_matrix_unit_of_each_architecture() -> None:
    assert {capability: kwidth_of(capability) for capability in (80, 89, 90, 100, 120)} == {
        80: 4,
        89: 4,
        90: 2,
        100: 4,
        120: 4,
    }


def test_the_interpreter_stands_for_hopper_and_takes_no_machine_instructions() -> None:
    assert moe.Device.of(torch.empty(1)) == moe.Device(90, False)
