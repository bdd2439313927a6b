"""Second moments of what the experts of one layer see on calibration text, weighed by what the layer's output feels.

Symbols: w routing weight of a token at an expert, g and u its gate and up outputs, h = silu(g) * u, D the down matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitsmoe_kernels.expert_mlp import activation_with_slope_, gated_
from offline_quant.linalg import add_product, mirrored
from offline_quant.model.expert_inputs import LayerInputs
from offline_quant.runtime.distributed import Team
from offline_quant.runtime.malloc import give_back
from offline_quant.runtime.offload import Spool

RARE_SHARE = 0.25
"""Least weight of an expert in the allocation, relative to the mean expert's."""
HEAVIEST_TOKEN = 20.0
"""Most that one token counts in an expert's moments, relative to the mean token: a few would else decide alone."""
LEAST_OUTPUT = 0.02
"""Least weight of a gate or up output, relative to the expert's mean output."""
OUTPUT_TOKENS = 2_048
"""Tokens on which a layer's output is compared."""
BLOCK_TOKENS = 1024
"""Tokens that pass through an expert at a time, so that what is made of them stays in the processor's cache."""
SLOT_VALUES = 1 << 25
"""Float32 values of tokens' slots that are filled at a time."""
PLANNING_STEP, PLANNING_TOKENS = 4, 8
"""At most so many tokens are passed over for one that counts in the moments of an expert's activations before it is
quantized, and so many for each of its channels count at least, if there are."""


@dataclass(frozen=True)
class RoutedTokens:
    """What one expert's down matrix reads.

    Attributes:
        token: int64 [n], which tokens of the layer are the expert's.
        weight: float32 [n], routing weights.
        hidden: float32 [n, I], activations of the quantized gate and up.
        mass: what its moments were divided by: n and what stands for the tokens of all experts.
    """

    token: Tensor
    weight: Tensor
    hidden: Tensor
    mass: float


class LayerStatistics:
    """Moments for each expert, shrunk towards those of all tokens, so that a rare expert has usable ones too.

    An expert's own tokens count once each; a sample of all tokens adds the weight of H / 8 more. Moments are taken
    about zero: the mean activation stays one strong direction. Tokens pass in blocks that a processor's cache holds.

    Args:
        inputs: calibration activations of the layer.
        num_experts: E.
        spool: where the activations of the experts are kept between passes.
    """

    def __init__(self, inputs: LayerInputs, num_experts: int, spool: Spool | None = None):
        self.inputs = inputs
        self.spool = spool or Spool()
        tokens, slots = inputs.topk_ids.shape
        flat = inputs.topk_ids.flatten()
        self.counts = torch.bincount(flat, minlength=num_experts)
        """Tokens routed to each expert, int64 [E]."""
        place = flat.argsort(dim=0, stable=True)
        self._place = place.split(self.counts.tolist())
        self._weights = inputs.topk_weights.flatten()
        hidden = inputs.x.shape[1]
        self.pooled = mirrored(add_product(inputs.x.new_zeros(hidden, hidden), inputs.x, inputs.x)) / tokens
        """C [H, H] over all tokens."""
        self.pseudo_count = max(1, hidden // 8)
        self._sample = torch.arange(0, tokens, max(1, tokens // hidden), device=place.device)
        self._typical = inputs.topk_weights.square().mean()
        self._slots = slots

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
        """Tokens of an expert and of the sample, int64 [n], and their weight [n]: w^2 over the number of tokens."""
        place = self._place[expert]
        own = self._weights[place].square()
        prior = self._typical * (self.pseudo_count / len(self._sample))
        tokens = torch.cat([place // self._slots, self._sample])
        return tokens, torch.cat([own, prior.expand(len(self._sample))]) / (len(own) + self.pseudo_count)

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
        tokens, mass = self._tokens(expert)
        W_gate, W_up = (w.T for w in gate_up.chunk(2))
        norms = down.square().sum(0)
        I, H = len(norms), len(down)  # noqa: E741
        hidden, token, outputs = down.new_empty(len(tokens), I), torch.empty_like(mass), down.new_zeros(2 * I)
        D = down.new_zeros(I, I)
        step = min(PLANNING_STEP, max(1, len(tokens) // (PLANNING_TOKENS * I)))
        for part in _blocks(len(tokens)):
            x, m = self.inputs.x.index_select(0, tokens[part]), mass[part]
            gate, up = x @ W_gate, x @ W_up
            silu, slope = activation_with_slope_(gate)
            h = torch.mul(silu, up, out=hidden[part])
            slope.mul_(up).square_()
            silu.square_()
            torch.add(slope @ norms, silu @ norms, out=token[part])
            outputs[:I] += m @ slope
            outputs[I:] += m @ silu
            # D decides who gets bits, not what is rounded to what: part of the tokens will do.
            some = h[::step]
            add_product(D, some * (step * m[::step, None]), some)
        self.spool.put(f"activations-{expert}", hidden)
        token *= mass
        outputs *= norms.repeat(2)
        outputs = outputs.clamp(min=LEAST_OUTPUT * float(outputs.mean())).clamp(min=1e-30)
        token = token.clamp(max=HEAVIEST_TOKEN * float(token.mean()))
        if not bool(token.any()):  # a dead expert: no error of it is felt, and its inputs count alike
            token = mass.clone()
        token /= token.sum().clamp(min=torch.finfo(token.dtype).tiny)
        M = down.new_zeros(H, H)
        for part in _blocks(len(tokens)):
            x = self.inputs.x.index_select(0, tokens[part])
            add_product(M, x * token[part, None], x)
        return mirrored(M), outputs, mirrored(D)

    def plain_moments(self, expert: int) -> Tensor:
        """Second moments [H, H] of an expert's inputs, every token alike."""
        x = self.inputs.x[self._place[expert] // self._slots]
        return (x.T @ x + self.pseudo_count * self.pooled) / (len(x) + self.pseudo_count)

    def hidden_moments(self, expert: int, gate_up: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of what enters the down projection once gate and up are quantized, and what that lacks.

        To be called after `expert_moments`, once: the activations kept are replaced by those of the quantized weights.

        Args:
            expert: which.
            gate_up: [2 I, H], quantized, its channels sorted.
            order: int64 [I], the original channel that stands at each place now.

        Returns:
            E[w^2 h' h'^T] and E[w^2 (h - h') h'^T], both [I, I]; h' from the quantized weights, h from the original.
        """
        tokens, mass = self._tokens(expert)
        W_gate, W_up = (w.T for w in gate_up.chunk(2))
        original = self.spool.get(f"activations-{expert}").to(gate_up.device)
        seen, I = torch.empty_like(original), len(order)  # noqa: E741
        moments, crossed = gate_up.new_zeros(I, I), gate_up.new_zeros(I, I)
        for part in _blocks(len(tokens)):
            x = self.inputs.x.index_select(0, tokens[part])
            h = gated_(x @ W_gate, x @ W_up, out=seen[part])
            weighed = h * mass[part, None]
            add_product(moments, h, weighed)
            crossed.addmm_(original[part].T, weighed)
        self.spool.put(f"activations-{expert}", seen)
        moments = mirrored(moments)
        return moments, crossed[order] - moments

    def routed(self, expert: int) -> RoutedTokens:
        """An expert's own tokens with the activations last kept for it."""
        place = self._place[expert]
        hidden = self.spool.get(f"activations-{expert}")[: len(place)].to(place.device)  # then come those of the sample
        return RoutedTokens(place // self._slots, self._weights[place], hidden, float(len(place) + self.pseudo_count))

    def routed_output(self, team: Team, experts: Sequence[int], down: Callable[[int], Tensor]) -> Iterator[Tensor]:
        """What the routed experts add to the layer's output, with the activations last kept for each expert.

        Every token's slots are filled by one expert each and then summed in their order: the result does not depend on
        who computes which expert, or when.

        Args:
            team: who else computes experts.
            experts: those of this process.
            down: [H, I] of an expert, its channels in the order of those activations.

        Yields:
            [n, H] of some n tokens, one after another.
        """
        tokens, hidden = self.inputs.x.shape
        step = max(1, min(tokens, SLOT_VALUES // (self._slots * hidden)))
        held = self.inputs.x.new_empty(step * self._slots, hidden)  # fresh pages every time would cost as much again
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            slots = held[: (end - start) * self._slots]
            if team.size > 1:
                slots.zero_()  # others fill the rest
            bounds = torch.tensor([start * self._slots, end * self._slots], device=slots.device)
            for e in experts:
                place = self._place[e]
                first, last = torch.searchsorted(place, bounds).tolist()
                if first == last:
                    continue
                place = place[first:last]
                h = self.spool.get(f"activations-{e}")[first:last].to(slots.device)
                slots[place - start * self._slots] = (h @ down(e).T).mul_(self._weights[place, None])
            give_back()
            yield team.merged(slots).view(end - start, self._slots, hidden).sum(1)

    def sampled_outputs(self, expert: int, down: Tensor) -> tuple[Tensor, Tensor]:
        """An expert's share of the output at every `sample_step`-th token, by the activations last kept.

        Returns:
            Slots, int64 [n], as places in the flattened [T, top_k]; their outputs [n, H], not yet weighed.
        """
        place = self._place[expert]
        rows = (place // self._slots % self.sample_step == 0).nonzero()[:, 0]
        h = self.spool.get(f"activations-{expert}")[rows.cpu()].to(place.device)
        return place[rows], (h @ down.T).mul_(self._weights[place[rows], None])

    @property
    def sample_step(self) -> int:
        """Of the tokens on which a layer's output is compared."""
        return max(1, len(self.inputs.x) // OUTPUT_TOKENS)


def _blocks(count: int) -> list[slice]:
    return [slice(i, min(i + BLOCK_TOKENS, count)) for i in range(0, count, BLOCK_TOKENS)]
