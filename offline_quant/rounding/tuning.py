"""Tuning of a quantized layer by gradients: scales and codes, all experts together, against one target for its output.

Closed-form steps see one expert's matrix at a time. Gradients of the layer's output see all of them and the activation.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.expert_mlp import activated, input_matrices
from bitsmoe_kernels.format.schema import Layer, ProjectionName
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.rounding.tuned_projection import adam, take_step, tuned_projections

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
FORWARDS, STEP_FORWARDS = 2.5, 450.0
"""A token of a step takes as long as so many forwards through the layer. What a step does once, with every weight,
takes as long as the second number of tokens, if all experts are active."""


class _TunedLayer:
    """The routed experts of a layer with parameters."""

    def __init__(self, weights: LayerWeights, device: torch.device):
        self.weights = weights
        self.parts = tuned_projections(weights.layer, device, weights)

    def groups(self) -> list[dict[str, Any]]:
        """Parameters by their rates."""
        found = []
        projections = self.weights.projections.items()
        widths = torch.cat([p.part("bits").flatten() for n, p in projections if n != "down"])
        codes = CODE_RATE * 2 ** (CODE_RATE_BITS - float(widths.float().mean()))
        for name, part in self.parts.items():
            down = DOWN_RATE if name == "down" else 1.0
            found.append({"params": part.code_parameters(), "rate": codes * down})
            found.append({"params": part.scale_parameters(), "rate": SCALE_RATE * down})
        return found

    def expert(self, expert: int, x: Tensor, z: Mapping[ProjectionName, Tensor]) -> Tensor:
        """One expert on its tokens, [n, H]."""
        p, act = self.weights.projections, self.weights.layer.hidden_act
        outputs = [part(p[n], expert, x, z[n]) for n, part in self.parts.items() if n != "down"]
        h = activated(torch.cat(outputs, -1).chunk(input_matrices(act), -1), act)
        return self.parts["down"](p["down"], expert, h, p["down"].project(h))

    def backward(self, inputs: ExpertInputs, target: Tensor) -> None:
        """Gradients of the mean squared error against the target [n, H], one expert at a time.

        Each expert runs twice, first to learn the error of the sum and then with gradients: what is kept for gradients
        is that of one expert, however many there are.
        """
        x, ids = inputs.x, inputs.topk_ids
        z = {n: p.project(x) for n, p in self.weights.projections.items() if n != "down"}
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

    tuned = _TunedLayer(LayerWeights(layer, block_size, given), device)
    optimizer = adam(tuned.groups())
    generator = torch.Generator().manual_seed(seed)
    batch = _batch(len(target))
    shuffled = torch.empty(0, dtype=torch.int64)
    for step in range(steps if batch else 0):
        if len(shuffled) < batch:
            shuffled = torch.randperm(len(target), generator=generator)
        rows, shuffled = shuffled[:batch].to(device), shuffled[batch:]
        tuned.backward(_take(inputs, rows), target[rows])
        take_step(optimizer, 1 - step / steps)
    result = {k: v.cpu() for k, v in given.items()}
    for name, part in tuned.parts.items():
        result |= part.tensors(tuned.weights.projections[name])
    return result if lost(result) < lost(given) else {k: v.cpu() for k, v in given.items()}


def _batch(tokens: int) -> int:
    """Tokens of a step."""
    return min(BATCH_TOKENS, -(-tokens // LEAST_BATCHES))


def passes(tokens: int, sparsity: float) -> float:
    """How many passes of a token through a layer, forwards, `tune` takes as long as.

    Args:
        tokens: T.
        sparsity: num_experts / top_k.
    """
    return STEPS * (FORWARDS * _batch(tokens) + STEP_FORWARDS * sparsity)


def _take(inputs: ExpertInputs, rows: Tensor) -> ExpertInputs:
    return ExpertInputs(inputs.x[rows], inputs.topk_ids[rows], inputs.topk_weights[rows])
