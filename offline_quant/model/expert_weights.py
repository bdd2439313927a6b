"""The weights of some routed experts, and the changes that leave what they compute the same."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.expert_mlp import ACTIVATIONS, HiddenAct, activated
from bitsmoe_kernels.format.schema import ProjectionName

UNBALANCED = 2.0**8
"""Ratio of the largest values of up and down, either way, from which `ExpertWeights.balanced` changes an expert."""


class ExpertBiases(NamedTuple):
    """Biases of n routed experts.

    Attributes:
        gate_up: float32 [n, 2 I]; of experts without a gate up's, [n, I].
        down: float32 [n, H].
    """

    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of n routed experts.

    Attributes:
        gate_up: float32 [n, 2 I, H], gate and up one behind the other; of experts without a gate up alone, [n, I, H].
        down: float32 [n, H, I].
        biases: None where the experts have none.
    """

    gate_up: Tensor
    down: Tensor
    biases: ExpertBiases | None = None

    @property
    def _input_matrices(self) -> int:
        return self.gate_up.shape[1] // self.down.shape[2]

    def to(self, device: torch.device) -> "ExpertWeights":
        """The same on a device."""
        biases = None if self.biases is None else ExpertBiases(*(b.to(device) for b in self.biases))
        return ExpertWeights(self.gate_up.to(device), self.down.to(device), biases)

    def one(self, index: int) -> "OneExpert":
        """One of the experts."""
        biases = (None, None) if self.biases is None else (b[index] for b in self.biases)
        return OneExpert(self.gate_up[index], self.down[index], *biases)

    def bias(self, name: ProjectionName) -> Tensor | None:
        """Bias [n, N] of a projection; None where the experts have none."""
        if self.biases is None:
            return None
        return _named(self.biases.gate_up, self.biases.down, self._input_matrices)[name]

    def projection(self, name: ProjectionName) -> Tensor:
        """W [n, N, K] of a projection."""
        return _named(self.gate_up, self.down, self._input_matrices)[name]

    def stored_bias(self, name: ProjectionName, prefix: str, chunk: range) -> Tensor | None:
        """Bias of a projection as files store it, float16 [n, N]; None where the experts have none.

        Raises:
            BitsmoeError: names the layer, `prefix`, and those experts of `chunk` whose values are beyond float16.
        """
        bias = self.bias(name)
        stored = None if bias is None else bias.half()
        if stored is not None and not bool((fits := stored.isfinite().all(1)).all()):
            experts = [e for e, fine in zip(chunk, fits.tolist(), strict=True) if not fine]
            raise BitsmoeError(f"{prefix}: the bias of {name} of expert(s) {experts} is too large for float16")
        return stored

    def balanced(self, hidden_act: HiddenAct) -> "ExpertWeights":
        """Experts of the same function, whose up and down do not differ much in size.

        A power of two goes from one to the other: errors of both are weighed together, and their scales are float16.
        Ordinary experts are not changed, nor those whose activation has no degree in up.
        """
        if (degree := ACTIVATIONS[hidden_act].degree) is None:
            return self
        *gate, up = self.gate_up.chunk(self._input_matrices, 1)
        sizes = [torch.maximum(w.amax((1, 2)), -w.amin((1, 2))) for w in (up, self.down)]
        ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / sizes[1], 1.0)
        unbalanced = (ratio > UNBALANCED) | (ratio < 1 / UNBALANCED)
        if not bool(unbalanced.any()):
            return self
        # With up over s, down times s^degree computes the same.
        shift = torch.exp2((ratio.log2() / (1 + degree)).round().clamp(-48, 48)).where(unbalanced, 1.0)[:, None, None]
        biases = self.biases
        if biases is not None:
            *of_gate, of_up = biases.gate_up.chunk(self._input_matrices, 1)
            biases = ExpertBiases(torch.cat([*of_gate, of_up / shift[:, :, 0]], 1), biases.down)
        return ExpertWeights(torch.cat([*gate, up / shift], 1), self.down * shift**degree, biases)

    def permuted(self, order: Tensor) -> "ExpertWeights":
        """Experts of the same function, intermediate channels in another order.

        Args:
            order: int64 [n, I], the channel of these weights at each place.
        """
        rows = torch.cat([order + i * order.shape[1] for i in range(self._input_matrices)], 1)
        gate_up = self.gate_up.gather(1, rows[:, :, None].expand_as(self.gate_up))
        biases = None if self.biases is None else ExpertBiases(self.biases.gate_up.gather(1, rows), self.biases.down)
        return ExpertWeights(gate_up, self.down.gather(2, order[:, None].expand_as(self.down)), biases)


def _named(gate_up: Tensor, down: Tensor, input_matrices: int) -> dict[ProjectionName, Tensor]:
    """What belongs to each projection, of what belongs to all inputs [n, N, ...] and to down."""
    if input_matrices == 1:
        return {"up": gate_up, "down": down}
    gate, up = gate_up.chunk(2, 1)
    return {"gate_up": gate_up, "gate": gate, "up": up, "down": down}


class OneExpert(NamedTuple):
    """Weights of one routed expert.

    Attributes:
        gate_up: float32 [2 I, H]; of an expert without a gate up alone, [I, H].
        down: float32 [H, I].
        gate_up_bias: float32 [2 I] or [I]; None: none.
        down_bias: float32 [H]; None: none.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The matrices that read the expert's input by name, [I, H] each."""
        matrices = self.gate_up.split(self.down.shape[1])
        return dict(zip(("gate", "up")[-len(matrices) :], matrices, strict=True))

    def preactivations(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of gate and of up, or of up alone, [n, I] each, of x [n, H]."""
        matrices = self.inputs.values()
        biases = [None] * len(matrices) if self.gate_up_bias is None else self.gate_up_bias.chunk(len(matrices))
        return tuple(linear(x, W, b) for W, b in zip(matrices, biases, strict=True))

    def forward(self, x: Tensor, hidden_act: HiddenAct) -> Tensor:
        """Output [n, H] of x [n, H]; gradients pass."""
        both = linear(x, self.gate_up, self.gate_up_bias)
        return self.output(activated(both.split(self.down.shape[1], -1), hidden_act))

    def output(self, hidden: Tensor) -> Tensor:
        """Output [n, H] of what enters down, [n, I]."""
        return linear(hidden, self.down, self.down_bias)
