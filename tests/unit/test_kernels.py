"""The kernels on a CPU, by Triton's interpreter: the shared cases, what is launched, and the choice of tiles."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_cases
from bitsmoe_kernels import moe
from bitsmoe_kernels.layout import KernelLayer, to_kernel_layout
from bitsmoe_kernels.reference import LayerWeights
from bitsmoe_kernels.tiles import DECODE, PREFILL, TILES, kwidth_of, pick_tile, table_of
from builders import MadeLayer, Plan, build_form, build_layer, form_plans
from kernel_cases import CASES, DTYPES, check, run_case

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


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_nobody_routed_gives_zeros(dtype: torch.dtype) -> None:
    (y,) = run_case("negative ids", dtype)
    assert y.any(1).tolist() == [True, False, True, True, True]
    (y,) = run_case("no codes", dtype)
    assert not y.any()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["blocks without codes", "gate and up apart", "compensators of down"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_results_beyond_the_dtype_stay_finite(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of 1e4 into ordinary weights: h is 1e8, which float16 does not hold; its largest number stands for it."""
    monkeypatch.setitem(CASES, name, replace(CASES[name], amplitude=1e4))
    (y,) = run_case(name, dtype)
    assert y.isfinite().all()
    assert float(y.abs().max()) > 1e4


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["all tokens to one expert", "compensators of down", "8-bit basis"])
def test_a_poisoned_token_spoils_itself_only(name: str, poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    (clean,) = run_case(name, torch.bfloat16)
    x, weights, ids = kernel_cases.call_of(name, torch.bfloat16)
    x[1, 3] = poison
    ((layer, _),) = kernel_cases.parts(name, torch.bfloat16)
    got = moe.moe_forward(layer, x, weights, ids)
    others = [i for i in range(len(x)) if i != 1]
    assert torch.equal(got[others], clean[others])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["an expert twice for a token", "compensators of down", "routed by torch"])
def test_two_calls_give_the_same_bits(name: str) -> None:
    for first, second in zip(run_case(name, torch.float16), run_case(name, torch.float16), strict=True):
        assert torch.equal(first.view(torch.int16), second.view(torch.int16))


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
        # gate_up: 272 outputs in programs of 128; those of down are 200, in programs of 128 too.
        ("natural", {"route": (1,), "scale": (2, 1, 1), "gate_up": (3, 2), "down": (2, 2)}),
        ("ordered", {"route": (1,), "scale": (2, 1, 1), "gate_up": (3, 2), "down": (2, 2)}),
        ("shared_basis", {"route": (1,), "basis": (7, 1), "scale": (2, 1, 1), "gate_up": (3, 2), "down": (2, 2)}),
        ("expert_order_basis", {"route": (1,), "basis": (5, 1), "scale": (2, 1, 1), "gate_up": (3, 2), "down": (2, 2)}),
        ("kept", {"route": (1,), "scale": (2, 1, 1), "gate_up": (3, 2), "down": (2, 2)}),
        ("apart", {"route": (1,), "scale": (2, 1, 2), "gate_up": (3, 2), "down": (2, 2)}),
    ],
)
def test_launches_at_batch_1(form: str, expected: dict[str, tuple[int, ...]], launches: list[Any]) -> None:
    """At most 4 besides the routing."""
    bits = (2, 4)  # no width above 4: every channel is one component of down
    plans: dict[str, dict[Any, Plan]] = {
        "kept": {"gate_up": Plan(kept_experts=(1,)), "down": Plan(kept_experts=(5,))},
        "apart": {"gate": Plan(), "up": Plan(), "down": Plan()},
    }
    named = plans.get(form) or form_plans(form, *SIZES.values())
    made = build_layer({k: replace(p, bits=bits) for k, p in named.items()}, **SIZES)
    moe.moe_forward(kernel_layer(made), *call(1, 200, [[3, 5]]))
    assert [(name, grid) for name, grid, _ in launches] == list(expected.items())
    assert len(launches) - 1 <= 4


def test_compensators_of_down_take_one_more(launches: list[Any]) -> None:
    made = build_layer({"gate_up": Plan(ranks=(1,) * 8), "down": Plan(ranks=(1,) * 8)}, **SIZES)
    moe.moe_forward(kernel_layer(made), *call(1, 200, [[3, 5]]))
    assert [name for name, *_ in launches] == ["route", "scale", "gate_up", "scale", "down"]


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
            tile = pick_tile(capability, 2 * tokens, 8)
            grids = {name: grid for name, grid, _ in launches}
            options = {name: known for name, _, known in launches}
            assert grids["down"] == (-(-200 // tile.outputs), min(2 * tokens, 2 * tokens // tile.tokens + 8))
            for name in ("gate_up", "down"):
                want = {"BT": tile.tokens, "num_warps": tile.warps, "UNROLL": tile.unroll, "STAGES": tile.stages}
                assert set(want.items()) <= {v for v in options[name] if isinstance(v, tuple)}
            assert ("BN", tile.outputs) in options["down"]


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


@pytest.mark.usefixtures("launches")
def test_routing_by_torch_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "ROUTED_SLOTS", 0)
    layer, arguments = kernel_layer(build_form("natural", **SIZES)), call(9, 200, [[3, 5]] * 9)
    with Ops() as ops:
        moe.moe_forward(layer, *arguments, torch.arange(8, dtype=torch.int32))
    assert "argsort" in ops.seen or "sort" in ops.seen
    # Sizes that follow from data.
    assert not set(ops.seen) & {
        "_local_scalar_dense",
        "item",
        "nonzero",
        "masked_select",
        "unique",
        "_unique2",
        "bincount",
    }


def route(ids: Tensor, expert_map: Tensor | None, E: int, tokens: int) -> tuple[list[int], dict[int, list[list[int]]]]:
    """Experts of the slots, and of each expert the slots of its blocks."""
    r = moe._route(ids, expert_map, E, tokens, 3)
    n = int(r.num_blocks)
    assert n <= r.max_blocks
    assert not r.arrived.any()
    blocks: dict[int, list[list[int]]] = {}
    for expert, slots in zip(r.block_expert[:n].tolist(), r.block_slot.view(-1, tokens)[:n].tolist(), strict=True):
        blocks.setdefault(expert, []).append(slots)
    assert list(blocks) == sorted(blocks)
    return r.local.tolist(), blocks


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("routed_slots", [0, moe.ROUTED_SLOTS])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mapped", [False, True])
def test_every_slot_is_in_one_block_of_its_expert(
    routed_slots: int, ids_dtype: torch.dtype, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop: blocks by expert, slots in ascending order, -1 behind the last one."""
    monkeypatch.setattr(moe, "ROUTED_SLOTS", routed_slots)
    tokens, E = 16, 5
    gen = torch.Generator().manual_seed(0)
    expert_map = torch.tensor([4, -1, 0, 2, -1, 1, 3], dtype=torch.int32) if mapped else None
    for ids in (
        torch.randint(-1, 7 if mapped else 5, (70, 2), generator=gen),
        torch.full((33, 2), 2),
        torch.full((3, 4), -1),
        torch.full((16, 1), 3),
    ):
        local = [int(expert_map[e]) if mapped and e >= 0 else e for e in ids.flatten().tolist()]  # type: ignore[index]
        want: dict[int, list[list[int]]] = {}
        for e in sorted({e for e in local if e >= 0}):
            slots = [s for s, mine in enumerate(local) if mine == e]
            slots += [-1] * (-len(slots) % tokens)
            want[e] = [slots[i : i + tokens] for i in range(0, len(slots), tokens)]
        got_local, got = route(ids.to(ids_dtype), expert_map, E, tokens)
        assert got_local == local
        assert got == want


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120, 121])
@pytest.mark.parametrize("experts", [1, 8, 128])
def test_tiles_grow_with_tokens(capability: int, experts: int) -> None:
    table = table_of(capability)
    rows = [*table[DECODE], *table[PREFILL]]
    picked = [pick_tile(capability, slots, experts) for slots in range(1, 200 * experts, max(1, experts // 8))]
    assert set(picked) == set(rows)
    assert [t.tokens for t in picked] == sorted(t.tokens for t in picked)
    (decode,) = table[DECODE]
    assert pick_tile(capability, 0, experts) == decode
    # A block of decode holds an expert's mean share of the slots.
    assert pick_tile(capability, decode.tokens * experts, experts) == decode
    assert pick_tile(capability, decode.tokens * experts + 1, experts) != decode
    assert pick_tile(capability, 10**9, experts) == rows[-1]


def test_tables_serve_architectures_from_theirs_on() -> None:
    assert table_of(86) == table_of(89) == TILES[80]
    assert table_of(103) == TILES[100]
    assert table_of(121) == TILES[120]
    for capability in (0, 70, 75, 79):
        with pytest.raises(ValueError, match=r"compute capability \d\.\d is below 8\.0"):
            pick_tile(capability, 1, 1)


def test_a_rank_without_experts_gets_a_tile() -> None:
    assert pick_tile(90, 5, 0) == TILES[90][DECODE][0]


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
