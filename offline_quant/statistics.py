"""Second moments of what the experts of one layer see on calibration text, weighed by what the layer's output feels.

Symbols: w routing weight of a token at an expert, g and u its gate and up outputs, h = silu(g) * u, D the down matrix.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RARE_SHARE = 0.25
"""Least weight of an expert in the allocation, relative to the mean expert's."""
HEAVIEST_TOKEN = 20.0
"""Most that one token counts in an expert's moments, relative to the mean token: a few would else decide alone."""
LEAST_OUTPUT = 0.02
"""Least weight of a gate or up output, relative to the expert's mean output."""
OUTPUT_TOKENS = 2_048
"""Tokens on which a layer's output is compared."""
DAMPING = 0.01
"""Added to the diagonal of moments, relative to its mean (GPTQ's customary 1%)."""


@dataclass(frozen=True)
class LayerInputs:
    """What entered the routed experts of one layer, and where it went.

    Attributes:
        x: float32 [T, H].
        topk_ids: int64 [T, top_k].
        topk_weights: float32 [T, top_k].
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


class LayerStatistics:
    """Moments for each expert, shrunk towards those of all tokens, so that a rare expert has usable ones too.

    An expert's own tokens count once each; a sample of all tokens adds the weight of H / 8 more. Moments are taken
    about zero: the mean activation stays one strong direction.

    Args:
        inputs: calibration activations of the layer.
        num_experts: E.
    """

    def __init__(self, inputs: LayerInputs, num_experts: int):
        self.inputs = inputs
        tokens, slots = inputs.topk_ids.shape
        flat = inputs.topk_ids.flatten()
        self.counts = torch.bincount(flat, minlength=num_experts)
        """Tokens routed to each expert, int64 [E]."""
        order = flat.argsort(dim=0, stable=True)
        self._token = (order // slots).split(self.counts.tolist())
        self._weight = inputs.topk_weights.flatten()[order].split(self.counts.tolist())
        hidden = inputs.x.shape[1]
        self.pooled = inputs.x.T @ inputs.x / tokens
        """C [H, H] over all tokens."""
        self.pseudo_count = max(1, hidden // 8)
        self._sample = inputs.x[:: max(1, tokens // hidden)]
        self._typical = inputs.topk_weights.square().mean()
        self._hidden: dict[int, Tensor] = {}

    @property
    def share(self) -> Tensor:
        """Share of expert slots that went to each expert, as the allocation weighs it, float32 [E].

        A quarter of the mean at least: an expert that calibration rarely or never reached may matter elsewhere, and
        the floor costs it about one bit against the average one instead of all of them.
        """
        counts = self.counts.float()
        return (
            counts.clamp(min=RARE_SHARE * float(counts.mean()))
            / len(self.inputs.topk_ids)
            / self.inputs.topk_ids.shape[1]
        )

    def _tokens(self, expert: int) -> tuple[Tensor, Tensor]:
        """Inputs [n, H] of an expert and of the sample, and their weight [n]: w^2, divided by the tokens they are."""
        own = self._weight[expert].square()
        prior = self._typical * (self.pseudo_count / len(self._sample))
        x = torch.cat([self.inputs.x[self._token[expert]], self._sample])
        return x, torch.cat([own, prior.expand(len(self._sample))]) / (len(own) + self.pseudo_count)

    def expert_moments(self, expert: int, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What errors of an expert's matrices cost at the layer's output, to first order.

        An error d of gate output n moves the output by w D[:, n] silu'(g) u d, one of up output n by
        w D[:, n] silu(g) d. The mean square of these factors over tokens is the weight of an output; their sum over
        outputs weighs a token. The activations h are kept for `hidden_moments`.

        Args:
            expert: which.
            gate_up: [2 I, H].
            down: [H, I].

        Returns:
            M [H, H], second moments of x with tokens weighed, of mean weight one; the outputs' weights [2 I];
            E[w^2 h h^T] [I, I].
        """
        x, mass = self._tokens(expert)
        gate, up = (x @ gate_up.T).chunk(2, -1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid).mul_(up)
        hidden = self._hidden[expert] = silu * up
        norms = down.square().sum(0)
        D = _second_moment(hidden, mass)
        felt = slope.square_(), silu.square_()
        token = mass * (felt[0] @ norms + felt[1] @ norms)
        outputs = torch.cat([(mass @ f) * norms for f in felt])
        outputs = outputs.clamp(min=LEAST_OUTPUT * float(outputs.mean())).clamp(min=1e-30)
        token = token.clamp(max=HEAVIEST_TOKEN * float(token.mean()))
        M = _second_moment(x, token / token.sum().clamp(min=1e-30))
        return M, outputs, D

    def plain_moments(self, expert: int) -> Tensor:
        """Second moments [H, H] of an expert's inputs, every token alike."""
        x = self.inputs.x[self._token[expert]]
        return (x.T @ x + self.pseudo_count * self.pooled) / (len(x) + self.pseudo_count)

    def hidden_moments(self, expert: int, gate_up: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of the activations that the down projection will see, and how they miss the original ones.

        To be called after `expert_moments`. The new activations are kept for `routed_output`.

        Args:
            expert: which.
            gate_up: [2 I, H], quantized, its channels sorted.
            order: int64 [I], the original channel that stands at each place now.

        Returns:
            E[w^2 h' h'^T] and E[w^2 (h - h') h'^T], both [I, I]; h' from the quantized weights, h from the original.
        """
        x, mass = self._tokens(expert)
        seen = _hidden(x, gate_up)
        weighed = seen * mass[:, None]
        moments = weighed.T @ seen
        missing = (self._hidden[expert].T @ weighed)[order] - moments
        self._hidden[expert] = seen
        return moments, missing

    def routed_output(self, down: Tensor) -> Tensor:
        """What the routed experts add to the layer's output, [T, H], with the activations last kept for each expert.

        Args:
            down: [E, H, I], channels in the order of those activations.
        """
        y = torch.zeros_like(self.inputs.x)
        for expert, (token, weight) in enumerate(zip(self._token, self._weight, strict=True)):
            own = self._hidden[expert][: len(token)]  # after them come those of the sample
            y.index_add_(0, token, (own @ down[expert].T).mul_(weight[:, None]))
        return y

    def output_errors(self, gate_up: Tensor, down: Tensor, quantized: Tensor) -> tuple[float, float]:
        """Energy of the error and of the original output of the routed experts, on a sample of tokens.

        Args:
            gate_up: [E, 2 I, H] and
            down: [E, H, I], the original experts.
            quantized: [T, H], what `routed_output` said of the quantized ones.
        """
        step = max(1, len(self.inputs.x) // OUTPUT_TOKENS)
        x, ids, weights = self.inputs.x[::step], self.inputs.topk_ids[::step], self.inputs.topk_weights[::step]
        y = torch.zeros_like(x)
        for e in range(len(self.counts)):
            token, slot = (ids == e).nonzero(as_tuple=True)
            y.index_add_(0, token, weights[token, slot, None] * (_hidden(x[token], gate_up[e]) @ down[e].T))
        return float((quantized[::step] - y).double().square().sum()), float(y.double().square().sum())


def _second_moment(x: Tensor, mass: Tensor) -> Tensor:
    """sum_t mass[t] x[t] x[t]^T."""
    return (x * mass[:, None]).T @ x


def _hidden(x: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return F.silu(gate) * up


def corrected(down: Tensor, moments: Tensor, missing: Tensor) -> Tensor:
    """The down matrix that makes up for errors of gate and up, as far as the activations h' tell them.

    Least squares: D' = D E[h h'^T] E[h' h'^T]^-1. Rounding shrinks gate and up coherently, and D' undoes most of that
    for nothing (compare GPTAQ, arXiv 2504.02692, which corrects the inputs of a layer in this way).

    Args:
        down: D [H, I].
        moments: E[h' h'^T] [I, I].
        missing: E[(h - h') h'^T] [I, I].
    """
    ridge = (DAMPING * moments.diagonal().mean()).clamp(min=torch.finfo(moments.dtype).tiny)
    M = moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    return down + down @ torch.linalg.solve(M, missing.T).T
