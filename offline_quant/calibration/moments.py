"""Second moments of what the experts of one layer see on calibration text, weighed by what the layer's output feels.

Symbols: w routing weight of a token at an expert, g and u its gate and up outputs, h = silu(g) * u, D the down matrix.
An expert without a gate has u alone.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bitsmoe_kernels.expert_mlp import HIDDEN_ACT, HiddenAct, activated_, activated_with_slopes_
from offline_quant.linalg import add_product, mirrored
from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.model.expert_weights import OneExpert

RARE_SHARE = 0.25
"""Least weight of an expert in the allocation, relative to the mean expert's."""
HEAVIEST_TOKEN = 20.0
"""Most that one token counts in an expert's moments, relative to the mean token: a few would else decide alone."""
MASSIVE = 1000.0
"""Energy of a token's activations, relative to the median token's, from where on it counts no more."""
LEAST_OUTPUT = 0.02
"""Least weight of a gate or up output, relative to the expert's mean output."""
BLOCK_TOKENS = 1024
"""Tokens that pass through an expert at a time, so that what is made of them stays in the processor's cache."""
PLANNING_STEP, PLANNING_TOKENS = 4, 8
"""For planning, every 4th token counts in the moments of an expert's activations, but at least 8 tokens for each
intermediate channel if there are as many."""


@dataclass(frozen=True)
class MeasuredExpert:
    """What errors of an expert's matrices cost at the layer's output, to first order.

    Attributes:
        inputs: float32 [H, H], second moments of x with tokens weighed, of mean weight one.
        output_weights: float32 [2 I], mean square of what an error of each gate and up output moves; [I] of up alone.
        down: float32 [I, I], E[w^2 h h^T].
        activations: float32 [n, I], h of the expert's own tokens, then of the sample of all tokens.
    """

    inputs: Tensor
    output_weights: Tensor
    down: Tensor
    activations: Tensor

    @property
    def is_finite(self) -> bool:
        """Whether float32 could hold it all."""
        return all(bool(t.isfinite().all()) for t in (self.inputs, self.output_weights, self.down))


@dataclass(frozen=True)
class QuantizedInputs:
    """What enters the down projection once gate and up are quantized.

    Attributes:
        moments: float32 [I, I], E[w^2 h' h'^T], h' from the quantized weights.
        missing: float32 [I, I], E[w^2 (h - h') h'^T], h from the original ones.
        activations: float32 [n, I], h' of the expert's own tokens, then of the sample of all tokens.
    """

    moments: Tensor
    missing: Tensor
    activations: Tensor


@dataclass(frozen=True)
class RoutedTokens:
    """What one expert's down matrix reads.

    Attributes:
        token: int64 [n], which tokens of the layer are the expert's.
        weight: float32 [n], routing weights.
        share: float32 [n], how much each counts.
        hidden: float32 [n, I], activations of the quantized gate and up.
        mass: n and the weight of the sample of all tokens, which its moments were divided by.
    """

    token: Tensor
    weight: Tensor
    share: Tensor
    hidden: Tensor
    mass: float


class LayerMoments:
    """Moments for each expert, shrunk towards those of all tokens, so that a rare expert has usable ones too.

    An expert's own tokens count once each; a sample of all tokens adds the weight of H / 8 more. Moments are taken
    about zero: the mean activation stays one strong direction. Tokens pass in blocks that a processor's cache holds.

    Args:
        inputs: calibration activations of the layer.
        num_experts: E.
        hidden_act: the experts' activation.
        token_weights: float32 [T], how much each token counts, of mean one; None: all alike.
    """

    def __init__(
        self,
        inputs: ExpertInputs,
        num_experts: int,
        hidden_act: HiddenAct = HIDDEN_ACT,
        token_weights: Tensor | None = None,
    ):
        self.inputs, self.hidden_act = inputs, hidden_act
        tokens, self.top_k = inputs.topk_ids.shape
        self._share = inputs.x.new_ones(tokens) if token_weights is None else token_weights.to(inputs.x)
        flat = inputs.topk_ids.flatten()
        self.counts = torch.bincount(flat, minlength=num_experts)
        """Tokens routed to each expert, int64 [E]."""
        self.slots = flat.argsort(dim=0, stable=True).split(self.counts.tolist())
        """Of each expert, int64 [n]: places in the flattened [T, top_k] that went to it, ascending."""
        self.slot_weights = inputs.topk_weights.flatten()
        """Routing weights, float32 [T * top_k]."""
        hidden = inputs.x.shape[1]
        self.pooled = mirrored(add_product(inputs.x.new_zeros(hidden, hidden), inputs.x, inputs.x)) / tokens
        """C [H, H] over all tokens."""
        self.pseudo_count = max(1, hidden // 8)
        self._sample = torch.arange(0, tokens, max(1, tokens // hidden), device=flat.device)
        self._typical = inputs.topk_weights.square().mean()

    @cached_property
    def routing_frequency(self) -> Tensor:
        """Share of expert slots that went to each expert, as the allocation weighs it, float32 [E].

        A quarter of the mean at least: an expert that calibration rarely or never reached may matter elsewhere, and
        the floor costs it about one bit against the average one instead of all of them.
        """
        counts = self.counts.float()
        return counts.clamp(min=RARE_SHARE * float(counts.mean())) / len(self.inputs.topk_ids) / self.top_k

    def _tokens(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens of an expert and of the sample, int64 [n], and their weight [n]: w^2 over the number of tokens, times
        how much each counts."""
        slots = self.slots[expert]
        own = self.slot_weights[slots].square()
        prior = self._typical * (self.pseudo_count / len(self._sample))
        tokens = torch.cat([slots // self.top_k, self._sample])
        mass = torch.cat([own, prior.expand(len(self._sample))]) / (len(own) + self.pseudo_count)
        return tokens, mass * self._share[tokens]

    def measure_expert(self, expert: int, weights: OneExpert) -> MeasuredExpert:
        """What errors of an expert's matrices cost at the layer's output, to first order.

        An error d of gate output n moves the output by w D[:, n] (dh/dg) d, one of up output n by w D[:, n] (dh/du) d,
        with h = silu(g) u or another activation. The mean square of these factors over tokens is the weight of an
        output; their sum over outputs weighs a token.

        Args:
            expert: which.
            weights: of it.
        """
        tokens, mass = self._tokens(expert)
        down = weights.down
        norms = down.square().sum(0)
        I, H = len(norms), len(down)  # noqa: E741
        hidden, token = down.new_empty(len(tokens), I), torch.empty_like(mass)
        outputs = down.new_zeros(len(weights.gate_up))
        D = down.new_zeros(I, I)
        step = min(PLANNING_STEP, max(1, len(tokens) // (PLANNING_TOKENS * I)))
        for part in _blocks(len(tokens)):
            x, h = self.inputs.x.index_select(0, tokens[part]), hidden[part]
            slopes = activated_with_slopes_(weights.preactivations(x), h, self.hidden_act)
            if not part.start:
                typical = _typical_energy(h)
            m = _cut_heavy_(mass[part], h, typical)
            felt = [slope.square_() @ norms for slope in slopes]
            token[part] = felt[0] if len(felt) == 1 else felt[0] + felt[1]
            for weight, slope in zip(outputs.split(I), slopes, strict=True):
                weight += m @ slope
            # D decides who gets bits, not what is rounded to what: part of the tokens will do.
            some = h[::step]
            add_product(D, some * (step * m[::step, None]), some)
        token *= mass
        outputs *= norms.repeat(len(outputs) // I)
        outputs = outputs.clamp(min=LEAST_OUTPUT * float(outputs.mean())).clamp(min=1e-30)
        token = token.clamp(max=HEAVIEST_TOKEN * float(token.mean()))
        if not bool(token.any()):  # a dead expert: no error of it is felt, and its inputs count alike
            token = mass.clone()
        token /= token.sum().clamp(min=torch.finfo(token.dtype).tiny)
        M = down.new_zeros(H, H)
        for part in _blocks(len(tokens)):
            x = self.inputs.x.index_select(0, tokens[part])
            add_product(M, x * token[part, None], x)
        return MeasuredExpert(mirrored(M), outputs, mirrored(D), hidden)

    def plain_moments(self, expert: int) -> Tensor:
        """Second moments [H, H] of an expert's inputs, every token alike."""
        x = self.inputs.x[self.slots[expert] // self.top_k]
        return (x.T @ x + self.pseudo_count * self.pooled) / (len(x) + self.pseudo_count)

    def measure_quantized(self, expert: int, weights: OneExpert, order: Tensor, original: Tensor) -> QuantizedInputs:
        """Moments of what enters the down projection once gate and up are quantized, and what that lacks.

        Args:
            expert: which.
            weights: its quantized gate and up, channels sorted; down is not read.
            order: int64 [I], the original channel that stands at each place now.
            original: [n, I], activations that `measure_expert` found.
        """
        tokens, mass = self._tokens(expert)
        seen, I = torch.empty_like(original), len(order)  # noqa: E741
        moments, crossed = (weights.gate_up.new_zeros(I, I) for _ in range(2))
        typical = _typical_energy(original)
        for part in _blocks(len(tokens)):
            x = self.inputs.x.index_select(0, tokens[part])
            h = activated_(weights.preactivations(x), seen[part], self.hidden_act)
            weighed = h * _cut_heavy_(mass[part], original[part], typical)[:, None]
            add_product(moments, h, weighed)
            crossed.addmm_(original[part].T, weighed)
        moments = mirrored(moments)
        return QuantizedInputs(moments, crossed[order] - moments, seen)

    def routed_tokens(self, expert: int, activations: Tensor) -> RoutedTokens:
        """An expert's own tokens.

        Args:
            expert: which.
            activations: [n, I], of its tokens and of the sample.
        """
        slots = self.slots[expert]
        token = slots // self.top_k
        hidden = activations[: len(slots)].to(slots.device)
        share = _cut_heavy_(self._share[token], hidden, _typical_energy(hidden))
        return RoutedTokens(token, self.slot_weights[slots], share, hidden, float(len(slots) + self.pseudo_count))


def _typical_energy(h: Tensor) -> Tensor:
    """Energy of the median token's activations, of the first block of h [n, I]."""
    return h[:BLOCK_TOKENS].square().sum(1).median()


def _cut_heavy_(mass: Tensor, h: Tensor, typical: Tensor) -> Tensor:
    """Weights of tokens [t], made less in place where activations h [t, I] have far more than the typical energy."""
    share = (MASSIVE * typical / h.square().sum(1)).clamp_(max=1)
    return mass.mul_(torch.where(typical > 0, share, 1.0))  # most tokens may activate nothing


def _blocks(count: int) -> list[slice]:
    return [slice(i, min(i + BLOCK_TOKENS, count)) for i in range(0, count, BLOCK_TOKENS)]
