"""The kernels' layout holds what the file holds."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmoe_kernels.format.schema import Basis, ProjectionName
from bitsmoe_kernels.layout.fields import CLASSES, GROUP, PAIRS, TILE, field_place, mantissa_bits
from bitsmoe_kernels.layout.matrices import UNIT, Matrices, matrix_rows
from bitsmoe_kernels.layout.pack import KernelLayer, to_kernel_layout, unsupported
from bitsmoe_kernels.layout.words import positions
from bitsmoe_kernels.reference import LayerWeights
from builders import MadeLayer, Plan, build_form, build_layer
from moe_cases import RESTRICTED
from pretended_cuda import pretended_cuda

KWIDTHS = (2, 4)
DTYPES = (torch.float16, torch.bfloat16)
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def dtype_name(dtype: Any) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
both_kwidths = pytest.mark.parametrize("kwidth", KWIDTHS)


def wrap(made: MadeLayer) -> LayerWeights:
    return LayerWeights(made.layer, made.block_size, made.tensors)


def component_places(tiles: list[int], dtype: torch.dtype, kwidth: int) -> Tensor:
    """2^(m - p) of the coded components of a matrix, float64."""
    fp16 = dtype == torch.float16
    out = []
    for bits, n in zip(CLASSES, tiles, strict=False):
        lift = torch.empty(TILE, dtype=torch.float64)
        for a in range(PAIRS):
            lift[positions(kwidth)[:, a]] = 2.0 ** (mantissa_bits(fp16) - field_place(bits, a, fp16))
        out.append(lift.repeat(n))
    return torch.cat(out)


class Unpacked:
    """One matrix of `Matrices`, in float64, read by the formulas at the head of `matrices.py` alone."""

    def __init__(self, m: Matrices, i: int, dtype: torch.dtype, kwidth: int) -> None:
        codes, dense = matrix_rows(m, i, kwidth)
        self.columns = int(m.columns[i])
        self.lift = component_places(m.tiles[i].tolist(), dtype, kwidth)
        k = len(self.lift)
        empty = torch.zeros(0, self.columns)
        self.q = torch.cat([empty, *(codes[b][:, : self.columns] for b in sorted(codes))]).double()
        self.index, self.factor, self.offset = m.index[i, :k].long(), m.factor[i, :k].double(), m.offset[i, :k].double()
        self.dense, self.dense_index = dense[:, : self.columns].double(), m.index[i, k : k + len(dense)].long()
        self.dense_factor, self.dense_offset = m.factor[i, k:], m.offset[i, k:]
        self.scale = m.scale[i, : self.columns].double()
        rank, start = int(m.rank[i]), int(m.lowrank_start[i])
        self.lowrank = m.lowrank[start : start + rank].double()

    def coded(self, components: int) -> Tensor:
        """What the codes stand for: [components, columns]."""
        v = 1 + self.q / self.lift[:, None]
        rows = (v - self.offset[:, None]) * self.factor[:, None] * self.scale
        return torch.zeros(components, self.columns, dtype=torch.float64).index_add_(0, self.index, rows)

    def plain(self, inputs: int) -> Tensor:
        """What the dense tiles stand for: [inputs, columns]."""
        rank = len(self.lowrank)
        if rank:
            assert (self.dense_index == -1).all()
            assert not self.dense[rank:].any()
            return self.lowrank.T @ self.dense[:rank]
        out = torch.zeros(inputs, self.columns, dtype=torch.float64)
        live = self.dense_factor[: len(self.dense)] != 0
        assert not self.dense[~live].any()
        return out.index_add_(0, self.dense_index[live], self.dense[live])

    def file_codes(self, components: int) -> tuple[Tensor, Tensor]:
        """Codes [components, columns] and widths [components], from the two planes of wide codes."""
        q = torch.zeros(components, self.columns, dtype=torch.int64)
        bits = torch.zeros(components, dtype=torch.int64)
        low: dict[int, float] = {}
        for k in (self.factor != 0).nonzero().flatten().tolist():
            # A code's step tells the planes of one component apart: 16 to 1.
            c, step = int(self.index[k]), float(self.factor[k] / self.lift[k])
            low[c] = min(step, low.get(c, step))
        for k in (self.factor != 0).nonzero().flatten().tolist():
            c, step = int(self.index[k]), float(self.factor[k] / self.lift[k])
            plane = round(step / low[c])
            assert plane in (1, 16)
            q[c] += self.q[k].long() * plane
            width = torch.log2(2 * (self.offset[k] - 1) * self.lift[k] + 1)
            bits[c] += int(width.round())
        return q, bits


def matrix_parts(
    layer: KernelLayer, made: MadeLayer, e: int
) -> list[tuple[Matrices, int, ProjectionName, int, Tensor]]:
    """For each matrix of an expert: its index, projection, first component of its basis, and the file's columns."""
    I = made.layer.intermediate_size  # noqa: E741
    k = int(layer.down.tiles[e].sum()) * TILE
    if layer.fused:
        channels = torch.where(layer.down.factor[e, :k] != 0, layer.down.index[e, :k].long(), -1)
    else:
        at = torch.arange(-(-I // TILE) * TILE)
        channels = torch.where(at < I, at, -1)
    out: list[tuple[Matrices, int, ProjectionName, int, Tensor]] = []
    if layer.split:
        basis = made.layer.projections["gate"].basis
        out += [(layer.inputs, 2 * e, "gate", 0, channels)]
        out += [(layer.inputs, 2 * e + 1, "up", basis.rank if basis else 0, channels)]
    else:
        interleaved = torch.stack([channels, torch.where(channels < 0, -1, channels + I)], 1).flatten()
        out += [(layer.inputs, e, "gate_up", 0, interleaved)]
    return [*out, (layer.down, e, "down", 0, torch.arange(made.layer.hidden_size))]


def check_layout(made: MadeLayer, dtype: torch.dtype, kwidth: int) -> None:
    """All of the file comes back from a layer's kernel layout, and the kernels' assumptions hold."""
    weights = wrap(made)
    layer = to_kernel_layout(weights, dtype, kwidth)
    assert all(t.is_contiguous() for t in layer.tensors().values())
    for m in (layer.inputs, layer.down):
        assert not (m.start % GROUP).any(), "words are loaded four at a time"
        assert m.index.shape[1] % TILE == 0
    assert not (layer.inputs.columns % GROUP).any()
    assert layer.input_widths == sum(1 << c for c in range(4) if layer.inputs.tiles[:, c].any())
    assert layer.down_widths == sum(1 << c for c in range(4) if layer.down.tiles[:, c].any())
    for e in range(made.layer.num_experts):
        for m, i, name, source, columns in matrix_parts(layer, made, e):
            p, live = weights.projections[name], columns >= 0
            got = Unpacked(m, i, dtype, kwidth)
            assert got.columns == len(columns)
            assert not got.scale[~live].any()
            together = ("down",) if name == "down" else tuple(n for n in weights.projections if n != "down")
            biased = any(made.layer.projections[n].bias for n in together)
            assert m.bias.shape[1] == (m.scale.shape[1] if biased else 0)
            if biased:
                bias = m.bias[i, : len(columns)]
                stored = made.tensors[f"{name}_shift"][e].float() if p.spec.bias else torch.zeros(len(bias))
                assert torch.equal(bias[live], stored[columns[live]] if p.spec.bias else stored[live])
                assert not bias[~live].any()
            assert not got.dense[:, ~live].any()
            assert not got.dense_offset.any()
            # Padding adds nothing. Only the widest class is padded, by less than a tile; and a last block may be short,
            # in both its planes.
            padding, C = got.factor == 0, made.layer.components(name)
            assert int(padding.sum()) <= TILE - UNIT + 2 * (-C % UNIT)
            assert not got.q[padding].any()
            assert not got.offset[padding].any()
            if dtype == torch.float16:
                assert (got.factor.abs() <= 1).all()

            got.index = torch.where(padding, 0, got.index - source)
            assert all(0 <= c < C for c in got.index.tolist())
            q, bits = got.file_codes(C)
            order = p.order(e)
            order = torch.arange(C) if order is None else order
            kept = e in p.spec.kept_experts
            want_bits = made.tensors[f"{name}_bits"][e].long().repeat_interleave(made.block_size)[:C]
            assert torch.equal(bits[order], want_bits)
            assert torch.equal(q[order][:, live], made.codes[name][e][:, columns[live]].long())

            M = got.coded(C)
            W = (p.basis.double().T @ M if p.basis is not None else M) + got.plain(made.layer.side(name, "input"))
            want = p.weight(e).double().T[:, columns.clamp(min=0)] * live
            # The reference's own float32: some roundings of 2^-24 and, with a basis, of sums; 16-bit weights are
            # rounded to the activations' dtype.
            bound = (1e-6 if p.basis is None else 3e-6) + (HALF_ULP[dtype] if kept or len(got.lowrank) else 0)
            error, size = (float(v.abs().amax()) if v.numel() else 0.0 for v in (W - want, want))
            assert error <= bound * size
            if kept:
                assert torch.equal(got.plain(W.shape[0])[:, live], p.weight(e).T[:, columns[live]].to(dtype).double())
    check_bases(layer, weights, dtype)


def check_bases(layer: KernelLayer, weights: LayerWeights, dtype: torch.dtype) -> None:
    names: tuple[ProjectionName, ...] = ("gate", "up") if layer.split else ("gate_up",)
    having = [weights.projections[n] for n in names if weights.projections[n].spec.basis]
    if not having:
        assert layer.basis is None
        assert layer.basis_scale is None
        return
    assert layer.basis is not None
    assert layer.basis_scale is not None
    want = torch.cat([w.basis for w in having if w.basis is not None])
    if layer.basis.dtype == torch.int8:
        assert torch.equal(layer.basis.float() * layer.basis_scale[:, None], want)
    else:
        assert torch.equal(layer.basis, want.to(dtype))
        assert (layer.basis_scale == 1).all()


PLANS: dict[str, dict[ProjectionName, Plan]] = {
    "natural": {"gate_up": Plan(), "down": Plan()},
    "order of each expert": {"gate_up": Plan(order="expert"), "down": Plan()},
    "8-bit basis": {"gate_up": Plan(basis=Basis(rank=72, bits=8), order="shared"), "down": Plan()},
    "16-bit basis": {"gate_up": Plan(basis=Basis(rank=50, bits=16), order="expert"), "down": Plan()},
    "apart": {"gate": Plan(bits=(0, 1, 5)), "up": Plan(order="shared"), "down": Plan()},
    "apart with bases": {
        "gate": Plan(basis=Basis(rank=30, bits=8)),
        "up": Plan(basis=Basis(rank=72, bits=8), order="expert"),
        "down": Plan(bits=(0, 3)),
    },
    "extras": {
        "gate_up": Plan(kept_experts=(2,), ranks=(0, 3, 0)),
        "down": Plan(kept_experts=(0, 2), kept_dtype="float16", ranks=(0, 65, 0)),
    },
    "kept down": {"gate_up": Plan(), "down": Plan(kept_experts=(1,))},
    "all kept": {"gate_up": Plan(kept_experts=(0, 1, 2)), "down": Plan(kept_experts=(0, 1, 2))},
    "nothing": {"gate_up": Plan(bits=(0,)), "down": Plan(bits=(0,))},
    "nothing in down": {"gate_up": Plan(), "down": Plan(bits=(0,))},
    "nothing in gate and up": {"gate_up": Plan(bits=(0,)), "down": Plan()},
}


@pytest.mark.slow
@both_dtypes
@both_kwidths
@pytest.mark.parametrize("name", PLANS)
def test_the_file_comes_back(name: str, kwidth: int, dtype: torch.dtype) -> None:
    check_layout(build_layer(PLANS[name], num_experts=3, hidden_size=72, intermediate_size=136), dtype, kwidth)


@st.composite
def supported_layers(draw: st.DrawFn) -> MadeLayer:
    H, I = draw(st.integers(1, 150)), draw(st.integers(1, 150))  # noqa: E741
    bits = st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True).map(tuple)
    order = st.sampled_from(["none", "shared", "expert"])
    names: tuple[ProjectionName, ...] = draw(st.sampled_from([("gate_up",), ("gate", "up")]))
    plans = {n: Plan(bits=draw(bits), order=draw(order)) for n in names}
    return build_layer(
        plans | {"down": Plan(bits=draw(bits))},
        num_experts=2,
        hidden_size=H,
        intermediate_size=I,
        block_size=draw(st.sampled_from([16, 32])),
        seed=draw(st.integers(0, 999)),
    )


@pytest.mark.slow
@settings(max_examples=25)
@given(made=supported_layers(), dtype=st.sampled_from(DTYPES), kwidth=st.sampled_from(KWIDTHS))
def test_any_file_comes_back(made: MadeLayer, dtype: torch.dtype, kwidth: int) -> None:
    check_layout(made, dtype, kwidth)


@both_kwidths
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_take_their_bits_and_no_more(bits: int, kwidth: int) -> None:
    """Sizes of whole tiles need no padding."""
    plan = Plan(bits=(bits,))
    made = build_layer({"gate_up": plan, "down": plan}, num_experts=2, hidden_size=128, intermediate_size=192)
    layer = to_kernel_layout(wrap(made), torch.float16, kwidth)
    # A channel of a code above 4 bits is two components of down, and gate and up are made for each of them.
    times = 1 if bits <= 4 else 2
    for m, weights in ((layer.inputs, 2 * 2 * 128 * 192 * times), (layer.down, 2 * 128 * 192)):
        words = [t for t in (m.codes32, m.codes16) if t.numel() > 1]
        assert sum(t.nbytes for t in words) * 8 == bits * weights


@pytest.mark.parametrize("form", ["natural", "shared_basis", "extras"])
def test_a_layer_is_its_tensors_and_its_constants(form: str) -> None:
    layer = to_kernel_layout(wrap(build_form(form)), torch.bfloat16, 4)
    again = KernelLayer.of(layer.tensors(), layer.static())
    assert again.static() == layer.static()
    assert again.tensors().keys() == layer.tensors().keys()
    assert all(again.tensors()[k] is v for k, v in layer.tensors().items())


@pytest.mark.slow
@both_dtypes
@both_kwidths
@pytest.mark.parametrize("name", PLANS)
def test_a_layer_on_a_gpu_is_packed_there(name: str, kwidth: int, dtype: torch.dtype) -> None:
    made = build_layer(PLANS[name], num_experts=3, hidden_size=72, intermediate_size=40)
    expected = to_kernel_layout(wrap(made), dtype, kwidth)
    with pretended_cuda():
        there = {part: t.cuda() for part, t in made.tensors.items()}
        layer = to_kernel_layout(LayerWeights(made.layer, made.block_size, there), dtype, kwidth)
        again = KernelLayer.of(layer.tensors(), layer.static())
        assert again.static() == expected.static()
        got = again.tensors()
        assert got.keys() == expected.tensors().keys()
        assert all(t.is_cuda for t in got.values())
        for part, t in expected.tensors().items():
            assert got[part].dtype == t.dtype
            assert torch.equal(got[part].cpu(), t), part


def test_the_file_is_left_alone() -> None:
    made = build_form("extras")
    before = {k: v.clone() for k, v in made.tensors.items()}
    layer = to_kernel_layout(wrap(made), torch.float16, 2)
    for t in layer.tensors().values():
        t.zero_()
    assert all(torch.equal(made.tensors[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    ("plans", "reason"),
    [
        *RESTRICTED,
        (
            {"gate_up": Plan(basis=Basis(rank=8, bits=8), kept_experts=(0,)), "down": Plan()},
            "both a basis and experts at 16 bits or compensators",
        ),
        (
            {"gate_up": Plan(basis=Basis(rank=8, bits=8), ranks=(1,) * 4), "down": Plan()},
            "both a basis and experts at 16 bits or compensators",
        ),
    ],
)
def test_what_kernels_cannot_compute_is_named(plans: dict[ProjectionName, Plan], reason: str) -> None:
    made = build_layer(plans)
    said = unsupported(made.layer)
    assert said is not None
    assert reason in said
    with pytest.raises(ValueError, match=reason):
        to_kernel_layout(wrap(made), torch.float16, 2)


@pytest.mark.parametrize("name", PLANS)
def test_what_they_can_is_not(name: str) -> None:
    assert unsupported(build_layer(PLANS[name], num_experts=3, hidden_size=72, intermediate_size=40).layer) is None
