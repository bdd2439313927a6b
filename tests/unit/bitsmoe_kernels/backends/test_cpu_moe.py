"""The CPU kernels: the shared cases against float64, the same bits in every way, and odd inputs."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.backends.cpu_moe import moe_cpu_op
from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.schema import Basis
from bitsmoe_kernels.layout.cpu_layout import MOST_INPUTS, unsupported
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from bruteforce import array, assert_close, biases, expert_weights
from bruteforce import moe as brute_moe
from builders import MadeLayer, Plan, build_form, build_layer, layers
from cpu_block import Block
from cpu_cases import DTYPES, blocks, check, packed, rms, rounded_moe, run_case, same_bits
from moe_cases import CASES, LARGE, call_of, exact, guarded_memory

ISAS = library.usable() if library.why_not() is None else ()
THREADS = (1, 2, 3)


def dtype_name(dtype: Any) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
every_isa = pytest.mark.parametrize("isa", ISAS)
sixteen_bits = pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)


def random_call(
    T: int, made: MadeLayer, dtype: torch.dtype, top_k: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(T, made.layer.hidden_size, generator=gen).to(dtype)
    ids = torch.randint(made.layer.num_experts, (T, top_k), generator=gen, dtype=torch.int32)
    return x, torch.rand(T, top_k, generator=gen) + 0.5, ids


def exact_of(made: MadeLayer) -> Any:
    return expert_weights(made.layer.model_dump(mode="json"), made.block_size, made.tensors)


def test_the_kernels_can_be_used_here() -> None:
    """Else nothing below would be tried."""
    assert library.why_not() is None
    assert library.best() == ISAS[0]


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.nightly] if name in LARGE and dtype != torch.bfloat16 else [])
        for name in CASES
        for dtype in DTYPES
    ],
    ids=dtype_name,
)
def test_case(name: str, dtype: torch.dtype) -> None:
    """Within bounds; the same bits by every instruction set, on any threads, whatever lies around the tensors."""
    first = run_case(name, dtype, ISAS[0], 1)
    check(name, dtype, first)
    for isa, threads in product(ISAS, THREADS):
        assert same_bits(run_case(name, dtype, isa, threads), first), (isa, threads)
    for margins in (1, -1):  # expert 1; NaN in every dtype
        assert same_bits(run_case(name, dtype, ISAS[0], 2, margins), first)


@every_dtype
@pytest.mark.parametrize("name", ["all widths, blocks of 16", "8-bit basis", "compensators and kept experts"])
def test_a_case_of_each_kind(name: str, dtype: torch.dtype) -> None:
    """`test_case` in short."""
    for isa in ISAS:
        check(name, dtype, run_case(name, dtype, isa, 2))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.ranks) > 1])
def test_ranks_add_up(name: str) -> None:
    """To the whole layer, which no sharding made."""
    total = sum((y.double() for y in run_case(name, torch.float32)), torch.zeros((), dtype=torch.float64))
    assert_close(total, exact(name, torch.float32))


@every_dtype
def test_nobody_routed_gives_zeros(dtype: torch.dtype) -> None:
    (y,) = run_case("negative ids", dtype)
    assert y.any(1).tolist() == [True, False, True, True, True]
    (y,) = run_case("no codes", dtype)
    assert not y.any()


def test_the_bounds_tell_a_wrong_code_from_a_right_one() -> None:
    """One code of one expert off by one."""
    name = "ragged tails"
    ((block, _),) = blocks(name)
    at = Block(block).matrix("down", 1).record.codes_at
    wrong = block.clone()
    wrong[at] ^= 3
    ys = [library.forward(wrong, *call_of(name, torch.bfloat16))]
    with pytest.raises(AssertionError):
        check(name, torch.bfloat16, ys)


OUTLIERS = {
    "natural": {"gate_up": Plan(bits=(1, 2, 3)), "down": Plan(bits=(1, 2, 3))},
    "8-bit basis": {"gate_up": Plan(bits=(1, 2, 3), basis=Basis(rank=512, bits=8), order="shared"), "down": Plan()},
    "16-bit basis": {"gate_up": Plan(bits=(2,), basis=Basis(rank=512, bits=16)), "down": Plan(bits=(2,))},
}


@pytest.mark.slow
@sixteen_bits
@pytest.mark.parametrize("times", [1, 30])
@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("name", OUTLIERS)
def test_errors_are_below_those_of_bfloat16(name: str, spread: float, times: int, dtype: torch.dtype) -> None:
    """At usual sizes, with 8 channels 30 times as large, and components' scales log-normal.

    The result of float16 is rounded to 11 bits, so that it shows the error of activations almost alone.
    """
    made = build_layer(OUTLIERS[name], num_experts=2, hidden_size=512, intermediate_size=256, seed=3)
    gen = torch.Generator().manual_seed(1)
    tensors = dict(made.tensors)
    for projection in made.layer.projections:
        scale = tensors[f"{projection}_component_scale"].float()
        tensors[f"{projection}_component_scale"] = (
            scale * (torch.randn(scale.shape, generator=gen) * spread).exp()
        ).half()
    made = replace(made, tensors=tensors)
    x, weights, ids = random_call(6, made, torch.float32)
    x[:, torch.randperm(512, generator=gen)[:8]] *= times
    x = (x / 16).to(dtype)
    y = library.forward(packed(made), x, weights, ids)
    want = brute_moe(exact_of(made), x, weights, ids)
    of_bfloat16 = rms(
        rounded_moe(LayerWeights(made.layer, made.block_size, made.tensors), x, weights, ids, None) - want
    )
    of_output = rms(array(torch.from_numpy(want).to(dtype)) - want)
    error = rms(array(y) - want)
    print(f"{error / rms(want):.2e} of {of_bfloat16 / rms(want):.2e} and {of_output / rms(want):.2e}")
    assert error <= np.hypot(of_bfloat16, of_output)
    if dtype == torch.float16:
        assert error <= of_bfloat16


@every_dtype
@every_isa
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("level", [-128, 127])
def test_the_largest_sums_fit(level: int, tokens: int, isa: str, dtype: torch.dtype) -> None:
    """As many inputs as there may be, all codes of a basis at one end, digits of activations too."""
    H = MOST_INPUTS
    plan = Plan(basis=Basis(rank=2, bits=8), bits=(8,))
    made = build_layer({"gate_up": plan, "down": Plan()}, num_experts=1, hidden_size=H, intermediate_size=1)
    basis, scale = torch.full((2, H), level, dtype=torch.int8), torch.ones(2) / (128 * H)
    made = replace(made, tensors=made.tensors | {"gate_up_basis": basis, "gate_up_basis_scale": scale})
    # The largest number becomes 32,639. The others are 32,384 = 127 * 256 - 128: their digits are 127 and -128.
    x = torch.full((tokens, H), (127 * 256 - 128) / 32639)
    x[:, 0] = 1
    x[1::2] *= -1
    x = x.to(dtype)
    weights, ids = torch.full((tokens, 1), 1000.0), torch.zeros(tokens, 1, dtype=torch.int32)
    y = library.forward(packed(made), x, weights, ids, None, isa, 2)
    want = brute_moe(exact_of(made), x, weights, ids)
    error = np.abs(array(y) - want).max() / np.abs(want).max()
    assert error <= {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]


@every_isa
def test_bits_are_the_same_every_time(isa: str) -> None:
    """Threads take work as they come: more of them than there are cores, again and again."""
    made = build_layer(GROUPED["basis"], num_experts=2, hidden_size=200, intermediate_size=136)
    block, (x, weights, ids) = packed(made), random_call(20, made, torch.bfloat16)
    first = library.forward(block, x, weights, ids, None, isa, 1)
    for _ in range(100):
        assert same_bits([library.forward(block, x, weights, ids, None, isa, 4)], [first])


GROUPS = (1, 2, 5, 6, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 40, 128, 300, 511, 512, 513, 600)
"""Tokens of a call: around those that an instruction set takes together, and what one pass takes."""
GROUPED = {
    "natural": {"gate_up": Plan(), "down": Plan()},
    "basis": {"gate_up": Plan(basis=Basis(rank=70, bits=8), order="expert", ranks=(0, 2)), "down": Plan(ranks=(1, 0))},
    "16-bit basis": {"gate_up": Plan(basis=Basis(rank=70, bits=16)), "down": Plan(kept_experts=(0,))},
    "apart": {"gate": Plan(kept_experts=(1,)), "up": Plan(ranks=(1, 3)), "down": Plan(bits=(8, 1))},
}


@pytest.mark.slow
@every_dtype
@every_isa
@pytest.mark.parametrize("name", GROUPED)
def test_a_token_gives_the_same_bits_in_any_company(name: str, isa: str, dtype: torch.dtype) -> None:
    made = build_layer(GROUPED[name], num_experts=2, hidden_size=72, intermediate_size=136)
    block = packed(made)
    x, weights, ids = random_call(max(GROUPS), made, dtype)
    whole = library.forward(block, x, weights, ids, None, isa, 2)
    for n in GROUPS:
        for first in (0, len(x) - n):
            rows = slice(first, first + n)
            got = library.forward(block, x[rows], weights[rows], ids[rows], None, isa, 2)
            assert same_bits([got], [whole[rows]]), (n, first)
    # All of them with one expert, and in another order.
    ids = torch.zeros_like(ids[:, :1])
    backwards = torch.arange(len(x)).flip(0)
    one = library.forward(block, x, weights[:, :1], ids, None, isa, 1)
    other = library.forward(block, x[backwards], weights[backwards, :1], ids, None, isa, 3)
    assert same_bits([other[backwards]], [one])


@every_dtype
@every_isa
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_poisoned_token_spoils_itself_only(tokens: int, poison: float, isa: str, dtype: torch.dtype) -> None:
    for plans in GROUPED.values():
        made = build_layer(plans, num_experts=2, hidden_size=72, intermediate_size=40)
        block, (x, weights, ids) = packed(made), random_call(tokens, made, dtype)
        clean = library.forward(block, x, weights, ids, None, isa, 2)
        x[1, 3] = poison
        got = library.forward(block, x, weights, ids, None, isa, 2)
        others = [i for i in range(len(x)) if i != 1]
        assert same_bits([got[others]], [clean[others]])
        assert not got[1].isfinite().all()
        x[1] = poison
        assert not library.forward(block, x, weights, ids, None, isa, 2)[1].isfinite().any()


@every_dtype
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_routing_weight_spoils_its_token_only(poison: float, dtype: torch.dtype) -> None:
    made = build_form("natural")
    block, (x, weights, ids) = packed(made), random_call(5, made, dtype)
    clean = library.forward(block, x, weights, ids)
    weights[2, 1] = poison
    got = library.forward(block, x, weights, ids)
    assert not got[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert same_bits([got[others]], [clean[others]])


@every_dtype
@pytest.mark.parametrize("amplitude", [1500, 6e4])
def test_results_beyond_the_dtype_are_infinite_and_no_others(amplitude: float, dtype: torch.dtype) -> None:
    """As the reference's are: float16 ends at 65,504. At an amplitude of 1500 some are beyond it, then all."""
    made = build_form("natural", num_experts=2)
    x, weights, ids = random_call(4, made, torch.float32)
    x = (x / x.abs().max() * amplitude).to(dtype)
    y = library.forward(packed(made), x, weights, ids)
    want = brute_moe(exact_of(made), x, weights, ids)
    largest = float(torch.finfo(dtype).max)
    beyond, fits = np.abs(want) > largest * 1.01, np.abs(want) < largest * 0.99
    assert beyond.any() == (dtype == torch.float16)
    assert y.isinf()[torch.from_numpy(beyond)].all()
    assert y.isfinite()[torch.from_numpy(fits)].all()
    error = (array(y) - want)[fits]
    assert np.abs(error).max(initial=0) <= (1e-5 if dtype == torch.float32 else 2.0**-7) * np.abs(want).max()


@pytest.mark.parametrize("amplitude", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_float32_activations_of_any_size_are_exact(amplitude: float) -> None:
    """Gate and up are scaled, so that silu sees ordinary numbers."""
    made = build_layer({"gate": Plan(), "up": Plan(), "down": Plan()}, num_experts=2)
    scale = made.tensors["gate_component_scale"].float() / max(1.0, amplitude)
    made = replace(made, tensors=made.tensors | {"gate_component_scale": scale.half()})
    x, weights, ids = random_call(4, made, torch.float32)
    x = x * amplitude
    assert_close(library.forward(packed(made), x, weights, ids), brute_moe(exact_of(made), x, weights, ids))


def test_the_largest_number_keeps_its_neighbours_exact() -> None:
    """float32: one channel 2^20 times the others, whose weights bring them back to the same size."""
    made = build_layer({"gate_up": Plan(bits=(4,)), "down": Plan(bits=(4,))}, num_experts=1, hidden_size=32)
    scale = made.tensors["gate_up_component_scale"].float()
    scale[:, 0] /= 2.0**20
    made = replace(made, tensors=made.tensors | {"gate_up_component_scale": scale.half()})
    x, weights, ids = random_call(4, made, torch.float32, top_k=1)
    x[:, 0] *= 2.0**20
    assert_close(library.forward(packed(made), x, weights, ids), brute_moe(exact_of(made), x, weights, ids))


@every_isa
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64, torch.int16], ids=dtype_name)
@pytest.mark.parametrize("mapped", [False, True])
def test_ids_of_no_expert_are_skipped(mapped: bool, ids_dtype: torch.dtype, isa: str) -> None:
    made = build_form("natural", num_experts=3)
    block, gen = packed(made), torch.Generator().manual_seed(0)
    info = torch.iinfo(ids_dtype)
    odd = torch.tensor(
        [-1, 3, 5, 6, 7, info.max, info.min, *([2**40, 2**32 + 1, 2**63 - 1] if info.bits == 64 else [])]
    )
    expert_map = torch.tensor([2, -1, 0, 3, -(2**31), 1], dtype=torch.int32) if mapped else None
    ids = torch.randint(6 if mapped else 3, (50, 3), generator=gen)
    junk = odd[torch.randint(len(odd), ids.shape, generator=gen)]
    ids = torch.where(torch.rand(ids.shape, generator=gen) < 0.4, junk, ids).to(ids_dtype)
    x, weights, _ = random_call(50, made, torch.float32, top_k=3)
    with guarded_memory() as memory:
        args = [memory.put(v) for v in (x, weights, ids)]
        local = None if expert_map is None else memory.put(expert_map)
        got = library.forward(memory.put(block), *args, local, isa, 2)
    assert_close(got, brute_moe(exact_of(made), x, weights, ids, expert_map))


@pytest.mark.parametrize("map_dtype", [torch.int64, torch.int32])
def test_a_map_of_experts_may_have_any_entry(map_dtype: torch.dtype) -> None:
    made = build_form("natural", num_experts=3)
    entries = [1, 0, -1, 3, 2, -5, 2**31 - 1, *([2**32 + 1, 2**40] if map_dtype == torch.int64 else [])]
    local = torch.tensor(entries, dtype=map_dtype)
    ids = torch.arange(len(entries), dtype=torch.int32)[:, None]
    x, weights, _ = random_call(len(entries), made, torch.float32, top_k=1)
    assert_close(
        library.forward(packed(made), x, weights, ids, local), brute_moe(exact_of(made), x, weights, ids, local)
    )


@every_dtype
@pytest.mark.parametrize("T", [0, 1, 600])
@pytest.mark.parametrize("top_k", [1, 4])
def test_any_number_of_tokens(T: int, top_k: int, dtype: torch.dtype) -> None:
    """600 are more than one pass takes."""
    assert library.TOKENS_AT_ONCE < 600
    made = build_form("natural")
    x, weights, ids = random_call(T, made, dtype, top_k=top_k)
    y = library.forward(packed(made), x, weights, ids)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    want = moe_forward(LayerWeights(made.layer, made.block_size, made.tensors), x.float(), weights, ids)
    torch.testing.assert_close(y.float(), want, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_no_expert_for_anybody() -> None:
    made = build_form("natural")
    x, weights, ids = random_call(3, made, torch.float32)
    assert not library.forward(packed(made), x, weights[:, :0], ids[:, :0]).any()


@every_dtype
def test_strided_inputs(dtype: torch.dtype) -> None:
    made = build_form("natural")
    x, weights, ids = random_call(5, made, dtype)
    want = library.forward(packed(made), x, weights, ids)
    far = [torch.stack([v, v + 1], -1)[..., 0] for v in (x, weights, ids)]
    assert not any(v.is_contiguous() for v in far)
    assert same_bits([library.forward(packed(made), *far)], [want])
    turned = [v.T.contiguous().T for v in (x, weights.double(), ids.long())]
    assert same_bits([library.forward(packed(made), *turned)], [want])


@pytest.mark.slow
@given(made=layers().filter(lambda made: unsupported(made.layer) is None))
def test_any_supported_layer(made: MadeLayer) -> None:
    x, weights, ids = random_call(7, made, torch.float32)
    block = packed(made)
    got = [library.forward(block, x, weights, ids, None, isa, 2) for isa in ISAS]
    assert all(same_bits([y], got[:1]) for y in got)
    bias = biases(made.layer.model_dump(mode="json"), made.tensors)
    assert_close(got[0], brute_moe(exact_of(made), x, weights, ids, None, made.layer.hidden_act, bias))


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("form", ["natural", "shared_basis", "extras"])
def test_opcheck(form: str, dtype: torch.dtype) -> None:
    made = build_form(form)
    x, weights, ids = random_call(5, made, dtype)
    tensors = [packed(made)]
    local = torch.tensor([1, 0, -1, 2], dtype=torch.int32)
    for expert_map in (None, local):
        torch.library.opcheck(moe_cpu_op, (x, weights, ids, expert_map, tensors, ""))
    strided = torch.randn(40, 5).T.to(dtype)
    torch.library.opcheck(moe_cpu_op, (strided, weights, ids, None, tensors, ""))
    torch.library.opcheck(moe_cpu_op, (x[:0], weights[:0], ids[:0], None, tensors, ""))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    """Inductor gets the same graph: `test_torch_reference.py` tries it, with an op made alike."""
    made = build_form("shared_basis")
    tensors = [packed(made)]

    def model(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return moe_cpu_op(x * 2, weights.softmax(-1), ids, None, tensors, "") + x

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 1, 9):
        args = random_call(T, made, torch.float32)
        torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", ["magic", "end", "all"])
def test_a_block_of_another_layout_is_refused(cut: str) -> None:
    made = build_form("natural")
    block = packed(made)
    match cut:
        case "magic":
            block[0] += 1
        case "end":
            block = block[:-64]
        case "all":
            block = block[:100]
    with pytest.raises(BitsmoeError, match="not in the layout of the compiled CPU kernels"):
        library.forward(block, *random_call(2, made, torch.float32))


@pytest.mark.parametrize(
    ("x", "weights", "ids"),
    [
        ((3, 41), (3, 2), (3, 2)),
        ((3, 39), (3, 2), (3, 2)),
        ((4, 40), (3, 2), (3, 2)),
        ((3, 40), (3, 1), (3, 2)),
        ((3, 40), (2, 2), (3, 2)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x: tuple[int, int], weights: tuple[int, int], ids: tuple[int, int]) -> None:
    """Else memory beyond a tensor would be read."""
    block = packed(build_form("natural", hidden_size=40))
    with pytest.raises(BitsmoeError, match=r"of shapes .* do not fit hidden size 40"):
        library.forward(block, torch.ones(x), torch.ones(weights), torch.zeros(ids, dtype=torch.int32))


@every_isa
def test_silu_of_any_number(isa: str) -> None:
    """Gate and down are the identity, kept at 16 bits, and up gives 1: the result is silu itself."""
    H = 64
    made = build_layer(
        {"gate_up": Plan(kept_experts=(0,)), "down": Plan(kept_experts=(0,))},
        num_experts=1, hidden_size=H, intermediate_size=H,
    )  # fmt: skip
    one = torch.zeros(H, H)
    one[:, 0] = 1
    kept = {"gate_up_kept": torch.cat([torch.eye(H), one])[None].bfloat16(), "down_kept": torch.eye(H)[None].bfloat16()}
    x = torch.cat([torch.ones(400, 1), torch.linspace(-120, 120, 400 * (H - 1)).view(400, -1)], 1)
    x[:20, 1:] = torch.logspace(-20, 0, 20)[:, None]
    x[20, 1:] = 0
    weights, ids = torch.ones(400, 1), torch.zeros(400, 1, dtype=torch.int32)
    block = packed(replace(made, tensors=made.tensors | kept))
    y = array(library.forward(block, x, weights, ids, None, isa, 2))
    v = array(x)
    want = v / (1 + np.exp(-v))
    # Below -87 a result is about 1e-36, whatever it should be.
    small = v < -87
    assert np.abs(y - want)[small].max() < 1e-35
    assert (np.abs(y - want) <= 4e-7 * np.abs(want))[~small].all()


def test_an_instruction_set_of_another_machine_is_refused() -> None:
    made, other = build_form("natural"), "avx2" if ISAS == ("neon",) else "neon"
    with pytest.raises(BitsmoeError, match=f"instruction set {other!r} cannot be used here, only {ISAS[0]}"):
        library.forward(packed(made), *random_call(2, made, torch.float32), None, other)
