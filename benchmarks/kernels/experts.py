"""What every method gives the benchmark: experts that can be run, copied, weighed and written out as plain numbers."""

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128
"""Weights that share a scale in the 2-bit and 4-bit baselines."""


class Dense(Protocol):
    """What a reference needs to know of a layer's experts."""

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gate over up [2 I, H] and down [H, I] of an expert, float64, as the stored numbers say."""
        ...


class Experts(Dense, Protocol):
    """The routed experts of one layer in the form a method wants them."""

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The layer: x [T, H], weights float32 and ids int32 [T, top_k] -> [T, H] in x's dtype."""
        ...

    def expert_bytes(self) -> list[int]:
        """Bytes a call must read of each expert it hits."""
        ...

    def shared_bytes(self) -> int:
        """Bytes every call must read besides."""
        ...

    def stored_bytes(self) -> int:
        """Bytes of the layer where it is kept, all included."""
        ...

    def copy(self) -> "Experts":
        """The same numbers at other addresses."""
        ...


def reference(experts: Dense, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The layer in float64, expert by expert."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    xd = x.double()
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate_up, down = experts.dense(expert)
        gate, up = (xd[token] @ gate_up.mT).chunk(2, -1)
        y = (F.silu(gate) * up) @ down.mT
        out.index_add_(0, token, y * weights[token, slot, None].double())
    return out


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Root of the summed squared differences over that of the wanted numbers; NaN stays NaN."""
    return float((got.double() - wanted).norm() / wanted.norm())


LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative error a method may have: a few roundings to 11 or 8 bits, one after another (weights, h, output)."""


def compulsory_bytes(experts: Experts, ids: Iterable[int], tokens: int, hidden_size: int, itemsize: int) -> int:
    """Bytes a call cannot avoid moving.

    Weights, scales and metadata of the experts that are hit, once each; a basis; tokens in and out. What a method keeps
    between its own kernels is not counted: it need not leave the L2 cache.
    """
    each = experts.expert_bytes()
    return sum(each[e] for e in set(ids)) + experts.shared_bytes() + 2 * tokens * hidden_size * itemsize
