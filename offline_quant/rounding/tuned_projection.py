"""What both kinds of tuning share: projections whose scales, and codes, are parameters, and the steps that these take.

Codes are rounded from latent real values, and gradients pass straight through the rounding. The latent values start on
the codes, so a code changes only when many batches agree on it (compare AutoRound, arXiv 2309.05516).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmoe_kernels.format.schema import Layer, ProjectionName, code_dtype
from bitsmoe_kernels.reference import LayerWeights, ProjectionWeights
from offline_quant.rounding.packing import pack_codes


class _Rounded(torch.autograd.Function):
    """Levels of the codes nearest to latent levels; gradients pass as if nothing were rounded."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, top: Tensor) -> Tensor:
        """Levels [C, F] of latent levels [C, F] and highest codes [C, 1], 0 where nothing is stored."""
        ctx.stored = top > 0
        half = top / 2
        return (hidden + half).round_().clamp_(min=torch.zeros_like(top), max=top).sub_(half)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Gradient of the latent levels."""
        return gradient * ctx.stored, None


def _places(weights: ProjectionWeights, expert: int) -> Tensor | None:
    """The stored row of every component, int64 [C]; None: its own."""
    order = weights.order(expert)
    return None if order is None else order.argsort()


class _LatentCodes(nn.Module):
    """Codes of one projection as parameters, by expert: levels [C, F] in the order of components."""

    def __init__(self, weights: ProjectionWeights, experts: int):
        super().__init__()
        width = weights.part("bits").repeat_interleave(weights.block_size, 1)
        top = torch.exp2(width[:, : weights.layer.components(weights.name), None].float()) - 1
        places = [_places(weights, e) for e in range(experts)]
        self.tops = [top[e] if p is None else top[e, p] for e, p in enumerate(places)]
        """Highest code of every row, [C, 1]; 0 where nothing is stored."""
        levels = (weights.levels(e) for e in range(experts))
        self.levels = nn.ParameterList(q if p is None else q[p] for q, p in zip(levels, places, strict=True))

    def forward(self, expert: int) -> Tensor:
        """Levels as they are rounded now, with gradients."""
        return _Rounded.apply(self.levels[expert], self.tops[expert])

    def tensors(self, weights: ProjectionWeights) -> dict[str, Tensor]:
        """Codes as the file stores them, on the CPU."""
        packed, bits = [], weights.part("bits").cpu()
        for e in range(len(self.levels)):
            order, codes = weights.order(e), (self(e).detach() + self.tops[e] / 2).to(torch.uint8)
            stored = codes if order is None else codes[order]
            packed.append(pack_codes(stored.cpu(), bits[e], weights.block_size))
        return {f"{weights.name}_codes": torch.cat(packed).to(code_dtype(weights.block_size))}


class TunedProjection(nn.Module):
    """What changes in one projection of every expert.

    Args:
        layer, name: which.
        device: of the parameters.
        coded: the projection as it is stored, where codes change; None: scales alone do.
    """

    def __init__(self, layer: Layer, name: ProjectionName, device: torch.device, coded: ProjectionWeights | None):
        super().__init__()
        # Relative changes. An expert that a step does not reach has no gradient, and does not move.
        self.components, self.features = (
            nn.ParameterList(torch.zeros(size, device=device) for _ in range(layer.num_experts))
            for size in (layer.components(name), layer.features(name))
        )
        self.latent = None if coded is None else _LatentCodes(coded, layer.num_experts)

    def scale_parameters(self) -> list[nn.Parameter]:
        """Parameters of all scales."""
        return [*self.components, *self.features]

    def code_parameters(self) -> list[nn.Parameter]:
        """Parameters of all codes, in levels."""
        return list(self.latent.levels) if self.latent else []

    def _scales(self, weights: ProjectionWeights, expert: int) -> tuple[Tensor, Tensor]:
        """Component scales [C], in stored order, and feature scales [F] of an expert, float32."""
        s, t = weights.part("component_scale")[expert], weights.part("feature_scale")[expert]
        return s.float() * (1 + self.components[expert]), t.float() * (1 + self.features[expert])

    def forward(self, weights: ProjectionWeights, expert: int, x: Tensor, z: Tensor) -> Tensor:
        """As `weights.forward`, with what changed and with gradients."""
        if expert in weights.spec.kept_experts:
            return weights.forward(expert, x, z)
        s, t = self._scales(weights, expert)
        # Rows of codes are sorted instead of activations, whose gradient takes far longer.
        places = _places(weights, expert)
        s = s if places is None else s[places]
        if self.latent:
            # The gradient of codes takes a product of the matrix's size: scales go into the matrix.
            return weights.product(expert, x, z, s[:, None] * self.latent(expert) * t, None, None, None)
        q = weights.levels(expert)
        return weights.product(expert, x, z, q if places is None else q[places], s, t, None)

    def tensors(self, weights: ProjectionWeights) -> dict[str, Tensor]:
        """Parts that may have changed, as the file stores them, on the CPU."""
        found = [self._scales(weights, e) for e in range(len(self.components))]
        components, features = (torch.stack([pair[i].detach() for pair in found]).half().cpu() for i in (0, 1))
        scales = {f"{weights.name}_component_scale": components, f"{weights.name}_feature_scale": features}
        return scales | (self.latent.tensors(weights) if self.latent else {})


def tuned_projections(
    layer: Layer, device: torch.device, coded: LayerWeights | None = None
) -> dict[ProjectionName, TunedProjection]:
    """What changes in every projection of a layer; arguments as for TunedProjection."""
    return {
        name: TunedProjection(layer, name, device, None if coded is None else coded.projections[name])
        for name in layer.projections
    }


def adam(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer of groups of parameters with their initial `rate`, for `take_step`."""
    return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-20, fused=True)


def take_step(optimizer: torch.optim.Optimizer, share: float) -> None:
    """A step at a share of the initial rates. Gradients are released."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * share
    optimizer.step()
    optimizer.zero_grad()
