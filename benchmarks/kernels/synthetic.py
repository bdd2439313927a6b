"""bitsmoe layers of real size with random codes, through the format and `layout.to_kernel_layout` like real ones.

Every word of codes is valid, so nothing has to be packed: a layer of Qwen3-235B-A22B takes seconds on a GPU.
"""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.kernels.shapes import Shape
from bitsmoe_kernels.backends import triton_launch as moe
from bitsmoe_kernels.backends.launch_config import Tile, kwidth_of
from bitsmoe_kernels.format.schema import Basis, Layer, Projection, order_dtype
from bitsmoe_kernels.layout.fields import CLASSES, DENSE, TILE
from bitsmoe_kernels.layout.matrices import Matrices
from bitsmoe_kernels.layout.pack import KernelLayer, to_kernel_layout
from bitsmoe_kernels.reference import LayerWeights

BLOCK = 16
WHITENED, NATURAL = "whitened", "natural"
FORMS = (WHITENED, NATURAL)
"""With the 8-bit basis of full rank that gate and up share, or without any."""
MIX = (1, 2, 4, 2, 1)
"""How often blocks of 0 to 4 bits occur at an average of 2; other averages tilt it exponentially."""


def width_mix(average: float) -> Tensor:
    """Probabilities of 0 to 4 bits with the given average.

    Raises:
        ValueError: an average that is not between 0 and 4.
    """
    if not 0 < average < len(MIX) - 1:
        raise ValueError(f"an average of {average} bits: must be between 0 and {len(MIX) - 1}")
    bits, low, high = torch.arange(len(MIX), dtype=torch.float64), -20.0, 20.0
    for _ in range(80):
        tilt = (low + high) / 2
        p = torch.tensor(MIX) * torch.exp(tilt * (bits - average))
        p = p / p.sum()
        low, high = (tilt, high) if p @ bits < average else (low, tilt)
    return p


def format_layer(shape: Shape, form: str, widths: float | Tensor, seed: int, device: str) -> LayerWeights:
    """A random layer in the checkpoint's form, whose weights have a standard deviation of about 1 / sqrt(inputs).

    Args:
        shape: of the layer.
        form: of FORMS.
        widths: average code width, mixed as `width_mix` says; or probabilities of the code widths from 0 on.
        seed: of everything.
        device: where the tensors are.
    """
    gen = torch.Generator(device).manual_seed(seed)
    basis = Basis(rank=shape.hidden_size, bits=8) if form == WHITENED else None
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    layer = Layer(
        num_experts=E, hidden_size=H, intermediate_size=I,
        projections={
            "gate_up": Projection(code_rows=0, order="expert", basis=basis),
            "down": Projection(code_rows=0),
        },
    )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    projections = {}
    mix = (widths if isinstance(widths, Tensor) else width_mix(widths)).to(device)
    for name, p in layer.projections.items():
        C, F = layer.components(name), layer.features(name)
        bits = torch.multinomial(mix, E * -(-C // BLOCK), replacement=True, generator=gen).view(E, -1).to(torch.uint8)
        rows = int(bits.sum())
        # Codes of b bits spread over about 2^b / sqrt(12) steps.
        step = torch.exp2(-bits.float()).repeat_interleave(BLOCK, 1)[:, :C] * 12**0.5
        tensors |= {
            f"{name}_codes": torch.randint(-(2**15), 2**15, (rows, F), generator=gen, device=device, dtype=torch.int16),
            f"{name}_bits": bits,
            f"{name}_component_scale": ((torch.rand(E, C, generator=gen, device=device) + 0.5) * step).half(),
            f"{name}_feature_scale": ((torch.rand(E, F, generator=gen, device=device) + 0.5) / C**0.5).half(),
        }
        if p.order == "expert":
            order = torch.rand(E, C, generator=gen, device=device).argsort(-1)
            tensors[f"{name}_order"] = order.to(order_dtype(C))
        if p.basis:
            tensors[f"{name}_basis"] = torch.randint(-127, 128, (C, H), generator=gen, device=device, dtype=torch.int8)
            tensors[f"{name}_basis_scale"] = (torch.rand(C, generator=gen, device=device) + 0.5) / 73 / H**0.5
        projections[name] = p.model_copy(update={"code_rows": rows})
    return LayerWeights(layer.model_copy(update={"projections": projections}), BLOCK, tensors)


def matrix_bytes(m: Matrices) -> Tensor:
    """Bytes a call reads of each matrix: codes, index, factor and offset of its components, scales. int64 [M]."""
    per_output = [TILE * b // 8 for b in CLASSES] + [TILE * DENSE // 8]
    tiles, columns = m.tiles.long().cpu(), m.columns.long().cpu()
    padded = -(-columns // 16) * 16
    codes = (tiles * torch.tensor(per_output)).sum(1) * padded
    return codes + tiles.sum(1) * TILE * 12 + columns * 4


class BitsmoeExperts:
    """A layer in the kernels' layout.

    Args:
        weights: in the checkpoint's form; kept for the reference only where `keep` says so.
    """

    def __init__(self, weights: LayerWeights, dtype: torch.dtype, capability: int, keep: bool = True):
        self.weights = weights if keep else None
        self.stored = weights.layer.nbytes(weights.block_size)
        self.layer: KernelLayer = to_kernel_layout(weights, dtype, kwidth_of(capability))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, tile: Tile | None = None) -> Tensor:
        """See `Experts`; tile: other than the table's."""
        return moe.moe_forward(self.layer, x, weights, ids, tile=tile)

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """See `Experts`. From the checkpoint's tensors, which the kernels' layout has no part in."""
        assert self.weights is not None
        p = self.weights.projections
        m = p["gate_up"].matrix(expert).double()
        order = p["gate_up"].order(expert)
        rows = torch.empty_like(m).index_copy_(0, order, m) if order is not None else m
        basis = p["gate_up"].basis
        if basis is not None:
            rows = basis.double().mT @ rows
        return rows.mT, p["down"].matrix(expert).double().mT

    def expert_bytes(self) -> list[int]:
        """See `Experts`."""
        E = len(self.layer.down.columns)
        return (matrix_bytes(self.layer.inputs).view(E, -1).sum(1) + matrix_bytes(self.layer.down)).tolist()

    def shared_bytes(self) -> int:
        """See `Experts`."""
        parts = (self.layer.basis, self.layer.basis_scale)
        return sum(p.nbytes for p in parts if p is not None)

    def stored_bytes(self) -> int:
        """See `Experts`: of the checkpoint's tensors."""
        return self.stored

    def copy(self) -> "BitsmoeExperts":
        """See `Experts`."""
        other = object.__new__(BitsmoeExperts)
        other.weights, other.stored = self.weights, self.stored
        tensors = {k: v.clone() for k, v in self.layer.tensors().items()}
        other.layer = KernelLayer.of(tensors, self.layer.static())
        return other


def fewer_experts(shape: Shape, experts: int) -> Shape:
    """The same sizes with fewer experts, for checks against a reference."""
    E = min(experts, shape.num_experts)
    return replace(shape, num_experts=E, top_k=min(shape.top_k, E))
