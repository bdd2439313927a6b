"""Hidden states between decoder layers, on disk: those of the calibration text and those of the original model."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from enum import StrEnum

import torch
from torch import Tensor

from offline_quant.model.expert_inputs import ExpertInputs
from offline_quant.model.sizes import FLOAT, RunSizes
from offline_quant.model.streaming import StreamedModel
from offline_quant.pipeline.resume import RunState
from offline_quant.runtime.distributed import Workers

BATCH_TOKENS, BATCH_VALUES = 16_384, 1 << 23
"""Most tokens, and values of hidden states, that pass through a layer together."""
EMBEDDED = -1
"""In place of a layer's index: the hidden states that enter the first layer."""


class Stream(StrEnum):
    """A set of hidden states; files are named after it and the batch: `batch-3.f32`."""

    CALIBRATION = "batch"
    ORIGINAL = "original"


class HiddenStates:
    """Hidden states of some windows, as they leave one decoder layer after another.

    Attributes:
        batches: windows int64 [n, L] that pass together.
        local: batches whose hidden states this process keeps.

    Args:
        stream: names the files.
        model: the layers that `propagate` runs.
        batches: see above.
        state: of the run, which holds the files.
        local: see above.
    """

    def __init__(
        self, stream: Stream, model: StreamedModel, batches: Sequence[Tensor], state: RunState, local: Sequence[int]
    ):
        self.batches, self.local = batches, local
        self._stream, self._model, self._state = stream, model, state

    @property
    def tokens(self) -> int:
        """Tokens of all batches."""
        return sum(batch.numel() for batch in self.batches)

    def read(self, layer: int, batch: int) -> Tensor:
        """Hidden states [n, L, ...] of a batch that leave a layer; EMBEDDED: that enter the first."""
        shape = (*self.batches[batch].shape, *self._model.state_shape)
        return self._state.hidden(layer, self._name(batch), shape)

    def read_all(self, layer: int) -> Iterator[Tensor]:
        """`read` of one batch after another."""
        return (self.read(layer, batch) for batch in range(len(self.batches)))

    def _write(self, layer: int, batch: int, hidden: Tensor) -> None:
        self._state.put_hidden(layer, self._name(batch), hidden)

    def _name(self, batch: int) -> str:
        return f"{self._stream}-{batch}"

    def embed(self) -> None:
        """Write the hidden states that enter the first layer."""
        self._state.open_layer(EMBEDDED)
        for i in self.local:
            self._write(EMBEDDED, i, self._model.embed(self.batches[i])[0])

    def propagate(self, layer: int) -> None:
        """Take the hidden states through a layer, experts included."""
        if not self.local:
            return
        with self._model.layer(layer) as module:
            entering = ((self.read(layer - 1, i), self._model.arguments(self.batches[i])) for i in self.local)
            for i, out in zip(self.local, self._model.through(module, entering), strict=True):
                self._write(layer, i, out)

    def enter_experts(self, layer: int, workers: Workers) -> ExpertInputs:
        """Take the hidden states through a layer without its routed experts; `add_expert_output` completes them.

        Args:
            layer: index of the decoder layer.
            workers: each of them takes its own batches.

        Returns:
            The inputs of the experts, of all batches, on the model's device.
        """
        with self._model.layer(layer) as module:

            def enter(i: int) -> ExpertInputs:
                arguments = self._model.arguments(self.batches[i])
                inputs, rest = self._model.expert_inputs(module, self.read(layer - 1, i), arguments)
                self._write(layer, i, rest)
                return inputs.cpu()

            entered = workers.map(range(len(self.batches)), enter)
            return ExpertInputs.gathered(entered, self.tokens, self._model.device)

    def add_expert_output(self, layer: int, routed: Iterator[Tensor], windows: int) -> None:
        """Complete the hidden states of a layer with the output of its experts.

        Args:
            layer: index of the decoder layer.
            routed: the output [n, H] of some tokens, one after another.
            windows: complete the batches of this many windows; no more of `routed` is computed.
        """
        pieces: list[Tensor] = []
        factor = self._model.expert_factor(layer)
        with self._model.layer(layer) if factor is None else nullcontext() as module:
            for i, tokens in enumerate(self.batches[: -(-windows // len(self.batches[0]))]):
                while sum(map(len, pieces)) < tokens.numel():
                    pieces.append(next(routed).cpu())
                output, *pieces = torch.cat(pieces).tensor_split([tokens.numel()])
                if i not in self.local:
                    continue
                if module is None:
                    rest = self.read(layer, i)
                    hidden = rest.add(output.view_as(rest), alpha=factor)
                else:
                    arguments = self._model.arguments(tokens)
                    hidden = self._model.with_output(module, self.read(layer - 1, i), arguments, output)
                self._write(layer, i, hidden)


def target_output(original: HiddenStates, calibration: HiddenStates, layer: int, factor: float) -> Tensor:
    """The experts' output that would make a layer's hidden states those of the original model.

    Args:
        original: hidden states of the original model; of the same windows.
        calibration: those of the quantized model, after `enter_experts`.
        layer: index of the decoder layer.
        factor: `StreamedModel.expert_factor` of the layer.

    Returns:
        float32 [T, H], on the CPU.
    """
    target: Tensor | None = None
    start = 0
    for wanted, rest in zip(original.read_all(layer), calibration.read_all(layer), strict=True):
        if target is None:
            target = torch.empty(calibration.tokens, wanted.shape[-1])
        part = target[start : start + wanted[..., 0].numel()]
        torch.sub(wanted.view_as(part), rest.view_as(part), out=part).div_(factor)
        start += len(part)
    assert target is not None
    return target


def batch_windows(length: int, state_values: int) -> int:
    """Windows of calibration text that pass through a layer together, with so many values of a token between layers."""
    return max(1, min(BATCH_TOKENS, BATCH_VALUES // state_values) // length)


def hidden_disk_bytes(sizes: RunSizes, original_tokens: int, examined: bool) -> int:
    """Bytes on disk of the hidden states of a run, those that enter a layer and those that leave it.

    Args:
        sizes: of the run.
        original_tokens: those that pass through the original model as well.
        examined: whether layers are looked at before they are quantized; what left the last one stays.
    """
    tokens = 2 * (sizes.tokens + original_tokens) + (sizes.tokens if examined else 0)
    return FLOAT * tokens * sizes.state_values
