"""Tuning of a quantized layer by gradients: scales and codes, all experts together, against one target for its output.

Closed-form steps see one expert's matrix at a time. Gradients of the layer's output see all of them and the activation.
Codes are rounded from latent real values, and gradients pass straight through the rounding. The latent values start on
the codes, so a code changes only when many batches agree on it (compare AutoRound, arXiv 2309.05516).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bitsmoe_kernels.expert_mlp import activated, input_matrices
from bitsmoe_kernels.format.schema import Layer, ProjectionName, code_dtype
from bitsmoe_kernels.reference import LayerWeights, ProjectionWeights, moe_forward
from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.rounding.packing import pack_codes

STEPS = 96
BATCH_TOKENS = 2_048
LEAST_BATCHES = 16
"""Fewest batches the tokens are cut into: a code changes where several batches agree."""
CODE_RATE, CODE_RATE_BITS = 0.06, 2.0
"""Initial Adam rate of latent codes, in levels per step, where gate and up have CODE_RATE_BITS bits on average. It is
halved for every bit more, and decays linearly to 0."""
SCALE_RATE = 0.002
"""Initial Adam rate of scales, relative, per step."""
DOWN_RATE = 0.3
"""Rates of down relative to those of gate and up. Down was fitted last, to this same target."""
JUDGED_SHARE = 16
"""One token in this many judges the result. They are among those tuned and quantized on: other tokens, which only one
of the two has seen, would favour it."""


class ScaleChanges(nn.Module):
    """Relative changes of the scales of one projection, by expert, as parameters."""

    def __init__(self, components: int, features: int, experts: int, device: torch.device):
        super().__init__()
        # An expert that a step does not reach has no gradient, and does not move.
        self.components = nn.ParameterList(torch.zeros(components, device=device) for _ in range(experts))
        self.features = nn.ParameterList(torch.zeros(features, device=device) for _ in range(experts))

    def scales(self, weights: ProjectionWeights, expert: int) -> tuple[Tensor, Tensor]:
        """Component scales [C] and feature scales [F] of an expert, float32."""
        s, t = weights.part("component_scale")[expert], weights.part("feature_scale")[expert]
        return s.float() * (1 + self.components[expert]), t.float() * (1 + self.features[expert])

    def tensors(self, weights: ProjectionWeights) -> dict[str, Tensor]:
        """Scales as the file stores them, on the CPU."""
        found = [self.scales(weights, e) for e in range(len(self.components))]
        components, features = (torch.stack([pair[i].detach() for pair in found]).half().cpu() for i in (0, 1))
        return {f"{weights.name}_component_scale": components, f"{weights.name}_feature_scale": features}


class _TunedProjection(nn.Module):
    """One projection of every expert with its scales and codes as parameters."""

    def __init__(self, weights: ProjectionWeights, experts: int):
        super().__init__()
        self.weights = weights
        bits, codes = weights.part("bits"), weights.layer.components(weights.name)
        width = bits.repeat_interleave(weights.block_size, 1)[:, :codes, None].float()
        self.top = torch.exp2(width) - 1
        """Highest code of every row, [E, C, 1]; 0 where nothing is stored."""
        self.levels = nn.ParameterList(weights.levels(e) for e in range(experts))
        features = weights.part("feature_scale").shape[1]
        self.changes = ScaleChanges(codes, features, experts, bits.device)

    def codes(self, expert: int) -> Tensor:
        """Codes as they are rounded now, float32 [C, F]."""
        top = self.top[expert]
        return (self.levels[expert].detach() + top / 2).round().clamp(min=torch.zeros_like(top), max=top)

    def forward(self, expert: int, x: Tensor, z: Tensor) -> Tensor:
        """As `ProjectionWeights.forward`, with gradients."""
        w = self.weights
        if expert in w.spec.kept_experts:
            return w.forward(expert, x, z)
        hidden, top = self.levels[expert], self.top[expert]
        level = (hidden + (self.codes(expert) - top / 2 - hidden).detach()) * (top > 0)
        return w.product(expert, x, z, level, *self.changes.scales(w, expert), w.order(expert))

    def tensors(self) -> dict[str, Tensor]:
        """Parts that may have changed, as the file stores them, on the CPU."""
        w, bits = self.weights, self.weights.part("bits").cpu()
        codes = [
            pack_codes(self.codes(e).to(torch.uint8).cpu(), bits[e], w.block_size) for e in range(len(self.levels))
        ]
        return {f"{w.name}_codes": torch.cat(codes).to(code_dtype(w.block_size)), **self.changes.tensors(w)}


class _TunedLayer:
    """The routed experts of a layer with parameters."""

    def __init__(self, weights: LayerWeights):
        experts = weights.layer.num_experts
        self.hidden_act = weights.layer.hidden_act
        self.parts = {n: _TunedProjection(p, experts) for n, p in weights.projections.items()}

    def groups(self) -> list[dict[str, object]]:
        """Parameters by their rates."""
        found = []
        widths = torch.cat([part.weights.part("bits").flatten() for n, part in self.parts.items() if n != "down"])
        codes = CODE_RATE * 2 ** (CODE_RATE_BITS - float(widths.float().mean()))
        for name, part in self.parts.items():
            down = DOWN_RATE if name == "down" else 1.0
            found.append({"params": list(part.levels), "rate": codes * down})
            found.append({"params": list(part.changes.parameters()), "rate": SCALE_RATE * down})
        return found

    def expert(self, expert: int, x: Tensor, z: Mapping[ProjectionName, Tensor]) -> Tensor:
        """One expert on its tokens, [n, H]."""
        outputs = [part(expert, x, z[n]) for n, part in self.parts.items() if n != "down"]
        pre = torch.cat(outputs, -1).chunk(input_matrices(self.hidden_act), -1)
        h = activated(pre, self.hidden_act)
        down = self.parts["down"]
        return down(expert, h, down.weights.project(h))

    def backward(self, inputs: ExpertInputs, target: Tensor) -> None:
        """Gradients of the mean squared error against the target [n, H], one expert at a time.

        Each expert runs twice, first to learn the error of the sum and then with gradients: what is kept for gradients
        is that of one expert, however many there are.
        """
        x, ids = inputs.x, inputs.topk_ids
        z = {n: p.weights.project(x) for n, p in self.parts.items() if n != "down"}
        experts = ids.unique().tolist()
        places = [(ids == e).nonzero(as_tuple=True) for e in experts]
        error = -target
        with torch.no_grad():
            for e, (token, slot) in zip(experts, places, strict=True):
                y = self.expert(e, x[token], {n: part[token] for n, part in z.items()})
                error = error.index_add(0, token, y * inputs.topk_weights[token, slot, None])
        error /= target.square().mean().clamp(min=1e-30).sqrt() * len(x)
        for e, (token, slot) in zip(experts, places, strict=True):
            y = self.expert(e, x[token], {n: part[token] for n, part in z.items()})
            if y.requires_grad:
                y.backward(error[token] * inputs.topk_weights[token, slot, None])


def tune(
    layer: Layer,
    block_size: int,
    tensors: Mapping[str, Tensor],
    inputs: ExpertInputs,
    target: Tensor,
    seed: int = 0,
    steps: int = STEPS,
) -> dict[str, Tensor]:
    """Tune scales and codes of a quantized layer.

    Widths, orders, bases and compensators stay as they are, and so do names, dtypes and shapes.

    Args:
        layer: schema.
        block_size: G.
        tensors: the layer's tensors, `{projection}_{part}`, on the device of the inputs.
        inputs: calibration activations of the layer and their routing.
        target: float32 [T, H], what the experts should add to the layer's output.
        seed: of the order of tokens.
        steps: batches.

    Returns:
        All tensors, on the CPU. The given ones, where tuning did not lower the error on a sample of the tokens.
    """
    given = dict(tensors)
    device = inputs.x.device
    sample = torch.arange(0, len(target), JUDGED_SHARE, device=device)
    judged, wanted = _take(inputs, sample), target[sample]

    def lost(of: Mapping[str, Tensor]) -> float:
        weights = LayerWeights(layer, block_size, {k: v.to(device) for k, v in of.items()})
        found = moe_forward(weights, judged.x, judged.topk_weights, judged.topk_ids)
        return float((found - wanted).double().square().sum())

    tuned = _TunedLayer(LayerWeights(layer, block_size, given))
    optimizer = torch.optim.Adam(tuned.groups(), lr=0.0, betas=(0.9, 0.99), eps=1e-20)
    generator = torch.Generator().manual_seed(seed)
    batch = min(BATCH_TOKENS, -(-len(target) // LEAST_BATCHES))
    shuffled = torch.empty(0, dtype=torch.int64)
    for step in range(steps if batch else 0):
        if len(shuffled) < batch:
            shuffled = torch.randperm(len(target), generator=generator)
        rows, shuffled = shuffled[:batch].to(device), shuffled[batch:]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - step / steps)
        optimizer.zero_grad()
        tuned.backward(_take(inputs, rows), target[rows])
        optimizer.step()
    result = {k: v.cpu() for k, v in given.items()}
    for part in tuned.parts.values():
        result |= part.tensors()
    return result if lost(result) < lost(given) else {k: v.cpu() for k, v in given.items()}


def _take(inputs: ExpertInputs, rows: Tensor) -> ExpertInputs:
    return ExpertInputs(inputs.x[rows], inputs.topk_ids[rows], inputs.topk_weights[rows])
