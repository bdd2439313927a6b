"""The CPU kernels' block of bytes holds what the file holds."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, Layer, Projection, ProjectionName
from bitsmoe_kernels.layout.cpu_layout import MOST_INPUTS, to_cpu_layout, unsupported
from bitsmoe_kernels.reference import LayerWeights
from bruteforce import array, expert_weights
from builders import MadeLayer, Plan, build_form, build_layer, layers
from cpu_block import HEAD_BYTES, Array, Block, Matrix, spread_out
from moe_cases import RESTRICTED

WIDTHS = range(9)


def wrap(made: MadeLayer) -> LayerWeights:
    return LayerWeights(made.layer, made.block_size, made.tensors)


def parts_of(made: MadeLayer) -> list[tuple[str, ProjectionName, slice]]:
    """For each matrix of an expert: its projection and the file's columns that are its outputs."""
    H, I = made.layer.hidden_size, made.layer.intermediate_size  # noqa: E741 - the paper's symbol
    if "gate_up" in made.layer.projections:
        return [("gate", "gate_up", slice(0, I)), ("up", "gate_up", slice(I, 2 * I)), ("down", "down", slice(0, H))]
    gate: list[tuple[str, ProjectionName, slice]] = [("gate", "gate", slice(0, I))] if made.layer.gated else []
    return [*gate, ("up", "up", slice(0, I)), ("down", "down", slice(0, H))]


def file_rows(m: Matrix, order: list[int], offset: int) -> tuple[np.ndarray, np.ndarray, Array]:
    """Codes [C, outputs], widths [C] and scales [C] of a matrix, in the file's order, from the planes of its runs."""
    C = len(order)
    row_of = {source + offset: row for row, source in enumerate(order)}
    q, width, scale = np.zeros((C, m.record.outputs), np.int64), np.zeros(C, np.int64), np.full(C, np.nan)
    for run, codes in zip(m.runs, m.codes, strict=True):
        assert run.twice_half == (1 << run.bits) - 1
        assert m.index is not None
        assert m.scale is not None
        for c in range(run.components):
            at = run.component + c
            if not m.scale[at]:  # padding: a code there would have no effect, but none is there
                assert not codes[c].any()
                continue
            row = row_of[int(m.index[at])]
            assert not q[row].any() or int(q[row].max()) >> run.shift == 0, "planes overlap"
            assert np.isnan(scale[row]) or scale[row] == m.scale[at]
            q[row] += codes[c] << run.shift
            width[row] += run.bits
            scale[row] = m.scale[at]
    return q, width, scale


def check_basis(made: MadeLayer, block: Block) -> tuple[Array | None, dict[str, int]]:
    """The basis of gate and up together, and the first of its rows of each projection."""
    names = [n for n in ("gate_up", "gate", "up") if n in made.layer.projections and made.layer.projections[n].basis]
    head = block.head
    assert head.input_source == bool(names)
    if not names:
        assert head.basis == -1
        assert head.basis_rows == 0
        return None, {}
    m = block.matrix("basis")
    R = sum(len(made.tensors[f"{n}_basis"]) for n in names)
    assert (m.record.outputs, m.record.inputs, head.basis_rows) == (R, head.hidden, R)
    want = np.concatenate([array(made.tensors[f"{n}_basis"]) for n in names])
    if m.dense is not None:
        np.testing.assert_array_equal(m.dense, want)
        assert head.basis_acts > 0
        got = m.dense
    else:
        (run,), (codes,) = m.runs, m.codes
        assert (run.bits, run.shift, run.twice_half, m.index) == (8, 0, 256, None)
        np.testing.assert_array_equal(codes[: head.hidden].T - 128, want)
        np.testing.assert_array_equal(
            m.feature, np.concatenate([array(made.tensors[f"{n}_basis_scale"]) for n in names])
        )
        assert head.basis_acts >= block.row_bytes(m.record)
        got = m.coded(head.hidden)
    starts, row = {}, 0
    for n in names:
        starts[n], row = row, row + len(made.tensors[f"{n}_basis"])
    return got, starts


def check_layout(made: MadeLayer) -> Block:
    """All of the file comes back from a layer's block, and what layout.h says of it holds."""
    packed = to_cpu_layout(wrap(made))
    assert packed.is_contiguous()
    block, layer = Block(packed), made.layer
    head = block.head
    assert (head.experts, head.hidden, head.inner) == (layer.num_experts, layer.hidden_size, layer.intermediate_size)
    assert head.shared_acts == ("gate" not in layer.projections)
    assert (head.gate < 0) == (not layer.gated)
    basis, starts = check_basis(made, block)
    exact = dict(
        zip(
            ("gate", "up", "down"),
            expert_weights(layer.model_dump(mode="json"), made.block_size, made.tensors),
            strict=True,
        )
    )
    for e in range(layer.num_experts):
        for kind, name, columns in parts_of(made):
            m, p, t = block.matrix(kind, e), layer.projections[name], made.tensors
            K, C = layer.side(name, "input"), layer.components(name)
            assert (m.record.outputs, m.record.inputs) == (columns.stop - columns.start, K)
            assert (m.record.bias_at >= 0) == p.bias
            np.testing.assert_array_equal(m.bias, array(t[f"{name}_shift"])[e, columns] if p.bias else 0)
            if e in p.kept_experts:
                assert m.record.dense_kind == (p.kept_dtype == "float16")
                np.testing.assert_array_equal(m.dense, array(t[f"{name}_kept"][p.kept_experts.index(e), columns]))
                continue
            assert m.dense is None
            order = {"none": lambda: torch.arange(C), "shared": lambda: t[f"{name}_order"],  # noqa: B023
                     "expert": lambda: t[f"{name}_order"][e]}[p.order]()  # noqa: B023  # fmt: skip
            q, width, scale = file_rows(m, order.long().tolist(), starts.get(name, 0))
            bits = t[f"{name}_bits"][e].long().repeat_interleave(made.block_size)[:C].numpy()
            np.testing.assert_array_equal(width, bits)
            np.testing.assert_array_equal(q, made.codes[name][e][:, columns].numpy())
            np.testing.assert_array_equal(scale[bits > 0], array(t[f"{name}_component_scale"][e])[bits > 0])
            np.testing.assert_array_equal(m.feature, array(t[f"{name}_feature_scale"][e, columns]))
            ranks = t[f"{name}_lowrank_rank"].tolist() if p.lowrank_total else [0] * layer.num_experts
            rows = slice(sum(ranks[:e]), sum(ranks[: e + 1]))
            assert m.record.rank == ranks[e]
            if ranks[e]:
                np.testing.assert_array_equal(m.into, array(t[f"{name}_lowrank_in"][rows]))
                np.testing.assert_array_equal(m.out, array(t[f"{name}_lowrank_out"][rows, columns]))
            assert (head.down_acts if kind == "down" else head.input_acts) >= block.row_bytes(m.record)
            # What all of it means, once more as one product.
            W = m.coded(len(basis) if basis is not None and kind != "down" else K)
            W = (W @ basis if basis is not None and kind != "down" else W) + m.out.T @ m.into
            np.testing.assert_allclose(W, exact[kind][e], rtol=0, atol=1e-12 * max(1.0, np.abs(W).max(initial=0)))
    check_pieces(block)
    return block


def check_pieces(block: Block) -> None:
    """No two pieces overlap, none is beyond the end, and their numbers are aligned."""
    spans = sorted({(piece.start, piece.start + piece.size) for piece in block.pieces() if piece.size})
    assert all(start % 8 == 0 for start, _ in spans)
    assert spans[0][0] >= HEAD_BYTES
    assert spans[-1][1] <= block.head.bytes
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))


PLANS: dict[str, dict[ProjectionName, Plan]] = {
    "natural": {"gate_up": Plan(), "down": Plan()},
    "one order": {"gate_up": Plan(order="shared"), "down": Plan()},
    "order of each expert": {"gate_up": Plan(order="expert"), "down": Plan()},
    "8-bit basis": {"gate_up": Plan(basis=Basis(rank=72, bits=8), order="shared"), "down": Plan()},
    "16-bit basis": {"gate_up": Plan(basis=Basis(rank=50, bits=16), order="expert"), "down": Plan()},
    "apart": {"gate": Plan(bits=(0, 1, 5)), "up": Plan(order="shared"), "down": Plan()},
    "apart with bases": {
        "gate": Plan(basis=Basis(rank=30, bits=8)),
        "up": Plan(basis=Basis(rank=72, bits=8), order="expert"),
        "down": Plan(bits=(0, 3)),
    },
    "apart with 16-bit bases": {
        "gate": Plan(basis=Basis(rank=17, bits=16), order="expert"),
        "up": Plan(basis=Basis(rank=1, bits=16)),
        "down": Plan(),
    },
    "extras": {
        "gate_up": Plan(kept_experts=(2,), ranks=(0, 3, 0)),
        "down": Plan(kept_experts=(0, 2), kept_dtype="float16", ranks=(0, 65, 0)),
    },
    "extras beside a basis": {
        "gate_up": Plan(basis=Basis(rank=40, bits=8), order="expert", kept_experts=(1,), ranks=(2, 0, 1)),
        "down": Plan(ranks=(0, 0, 4)),
    },
    "extras apart beside bases": {
        "gate": Plan(basis=Basis(rank=40, bits=16), kept_experts=(1,), kept_dtype="float16"),
        "up": Plan(basis=Basis(rank=33, bits=16), ranks=(5, 1, 0)),
        "down": Plan(kept_experts=(1,)),
    },
    "kept down": {"gate_up": Plan(), "down": Plan(kept_experts=(1,))},
    "all kept": {"gate_up": Plan(kept_experts=(0, 1, 2)), "down": Plan(kept_experts=(0, 1, 2))},
    "no gate": {"up": Plan(order="expert"), "down": Plan()},
    "no gate, 8-bit basis": {"up": Plan(basis=Basis(rank=72, bits=8), order="expert"), "down": Plan()},
    "no gate, extras": {"up": Plan(kept_experts=(2,), ranks=(0, 3, 0), bias=True), "down": Plan(ranks=(1, 0, 2))},
    "nothing": {"gate_up": Plan(bits=(0,)), "down": Plan(bits=(0,))},
    "nothing in down": {"gate_up": Plan(), "down": Plan(bits=(0,))},
    "nothing in gate and up": {"gate_up": Plan(bits=(0,)), "down": Plan()},
}

SIZES = {
    "whole strips and groups": (64, 128),
    "ragged": (72, 136),
    "one": (1, 1),
    "less than a unit": (5, 3),
    "one over a unit, a strip and a group": (17, 65),
    "an odd number of units": (48, 80),
}
"""Hidden and intermediate sizes."""


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("name", PLANS)
def test_the_file_comes_back(name: str, block_size: int) -> None:
    check_layout(build_layer(PLANS[name], num_experts=3, hidden_size=72, intermediate_size=136, block_size=block_size))


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_comes_back(bits: int, size: str, block_size: int) -> None:
    plan, sizes = Plan(bits=(bits,)), dict(zip(("hidden_size", "intermediate_size"), SIZES[size], strict=True))
    check_layout(build_layer({"gate_up": plan, "down": plan}, num_experts=2, block_size=block_size, **sizes))


@pytest.mark.parametrize("bits", [1, 3, 5, 7])
@pytest.mark.parametrize("units", [1, 2, 3])
def test_an_odd_number_of_one_bit_units_is_padded_to_a_step(bits: int, units: int) -> None:
    made = build_layer(
        {"gate_up": Plan(bits=(bits,)), "down": Plan()}, num_experts=1, hidden_size=16 * units, intermediate_size=16
    )
    m = check_layout(made).matrix("gate")
    (run,) = [run for run in m.runs if run.bits == 1]
    assert run.components == 32 * -(-units // 2)


@pytest.mark.slow
@given(made=layers().filter(lambda made: unsupported(made.layer) is None))
def test_any_supported_file_comes_back(made: MadeLayer) -> None:
    check_layout(made)


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data())
def test_any_mixture_of_widths_comes_back(data: st.DataObject) -> None:
    bits = st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True).map(tuple)
    order = st.sampled_from(["none", "shared", "expert"])
    names = data.draw(st.sampled_from([("gate_up",), ("gate", "up")]))
    plans = {n: Plan(bits=data.draw(bits), order=data.draw(order)) for n in names}
    check_layout(
        build_layer(
            plans | {"down": Plan(bits=data.draw(bits))},
            num_experts=2,
            hidden_size=data.draw(st.integers(1, 150)),
            intermediate_size=data.draw(st.integers(1, 150)),
            block_size=data.draw(st.sampled_from([16, 32])),
            seed=data.draw(st.integers(0, 999)),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(1,), (2,), (3,), (1, 2, 3), (2, 4), (8,)], ids=str)
@pytest.mark.parametrize("basis", [None, 8, 16])
def test_memory_is_that_of_the_file(bits: tuple[int, ...], basis: int | None) -> None:
    """At the shapes of Qwen3-30B-A3B's experts. A basis is shared by 128 of them; fewer make its share larger."""
    gate_up = Plan(bits=bits)
    if basis:
        gate_up = Plan(bits=bits, basis=Basis(rank=2048, bits=8 if basis == 8 else 16), order="shared")
    made = build_layer(
        {"gate_up": gate_up, "down": Plan(bits=bits)}, num_experts=3, hidden_size=2048, intermediate_size=768
    )
    file = sum(t.nbytes for t in made.tensors.values())
    packed = to_cpu_layout(wrap(made))
    assert 0.95 * file <= packed.nbytes <= 1.05 * file
    # Unused bytes are few as well.
    used = sum({piece.start: piece.size for piece in Block(packed).pieces()}.values())
    assert packed.nbytes - used <= 0.01 * packed.nbytes


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["apart with bases", "extras", "nothing"])
def test_codes_are_written_everywhere(name: str) -> None:
    """Memory that was not cleared does not show, in padding of outputs and components either."""
    check_layout(build_layer(PLANS[name], num_experts=3, hidden_size=17, intermediate_size=33))


@pytest.mark.parametrize("name", ["shared_basis", "extras", "ordered"])
def test_equal_layers_are_equal_bytes(name: str) -> None:
    """Whatever memory held before, and whatever the strides of the file's tensors are."""
    made = build_form(name)

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t.roll(1, 0)], -1)[..., 0]

    want = to_cpu_layout(wrap(made))
    torch.use_deterministic_algorithms(True)  # fills new memory
    try:
        assert torch.equal(to_cpu_layout(wrap(made)), want)
    finally:
        torch.use_deterministic_algorithms(False)
    other = LayerWeights(made.layer, made.block_size, {k: strided(v) for k, v in made.tensors.items()})
    assert not other.tensors["down_codes"].is_contiguous()
    assert torch.equal(to_cpu_layout(other), want)


def test_the_file_is_left_alone() -> None:
    made = build_form("extras")
    before = {k: v.clone() for k, v in made.tensors.items()}
    to_cpu_layout(wrap(made)).zero_()
    assert all(torch.equal(made.tensors[k], v) for k, v in before.items())


def test_pieces_that_were_moved_apart_are_the_same_layer() -> None:
    made = build_layer(PLANS["apart with bases"], num_experts=3, hidden_size=72, intermediate_size=40)
    packed = to_cpu_layout(wrap(made))
    far, margins = spread_out(packed)
    assert sum(size for _, size in margins) >= 256 * len({p.start for p in Block(packed).pieces()})
    for name, e, _ in Block(packed).tables():
        a, b = Block(packed).matrix(name, e), Block(far).matrix(name, e)
        assert a.runs == b.runs
        assert all(np.array_equal(x, y) for x, y in zip(a.codes, b.codes, strict=True))
        assert np.array_equal(a.coded(200), b.coded(200))


@pytest.mark.parametrize(("plans", "reason"), RESTRICTED)
def test_what_the_kernels_cannot_compute_is_named(plans: dict[ProjectionName, Plan], reason: str) -> None:
    made = build_layer(plans)
    said = unsupported(made.layer)
    assert said is not None
    assert reason in said
    with pytest.raises(ValueError, match=reason):
        to_cpu_layout(wrap(made))


@pytest.mark.parametrize("side", ["hidden_size", "intermediate_size"])
def test_inputs_whose_sums_would_not_fit_an_integer_are_refused(side: str) -> None:
    spec = Projection(code_rows=0)
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    for size, fits in ((MOST_INPUTS, True), (MOST_INPUTS + 1, False)):
        layer = Layer(num_experts=1, **sizes | {side: size}, projections={"gate_up": spec, "down": spec})
        assert (unsupported(layer) is None) == fits
    # 255 times -128 for each input, doubled, is the largest number that has to fit; half of it is subtracted.
    assert 2 * 255 * 128 * MOST_INPUTS < 2**31


def test_bases_of_more_rows_than_an_index_tells_apart_are_refused() -> None:
    for rank, fits in ((32768, True), (32769, False)):
        basis = Basis(rank=rank, bits=8)
        spec = {n: Projection(basis=basis if n != "down" else None, code_rows=0) for n in ("gate", "up", "down")}
        layer = Layer(num_experts=1, hidden_size=64, intermediate_size=64, projections=spec)
        assert (unsupported(layer) is None) == fits


@pytest.mark.parametrize("name", PLANS)
def test_what_they_can_is_not(name: str) -> None:
    assert unsupported(build_layer(PLANS[name], num_experts=3, hidden_size=72, intermediate_size=40).layer) is None
