"""What quantizing one layer alone does to the model, for all layers in one pass through it.

Every layer is quantized for trial. Hidden states of some tokens pass on with the error of that layer only, beside those
without an error. So each layer of the original is loaded once, and routing that changes behind an error counts.
"""

from torch import Tensor

from offline_quant.evaluation.forecast import divergence
from offline_quant.model.sizes import FLOAT, RunSizes
from offline_quant.model.streaming import StreamedModel, forward_bytes
from offline_quant.runtime.distributed import Workers

TOKENS, WINDOW_TOKENS = 2_048, 256
"""Tokens whose hidden states pass on with errors, and how many of them one window may give: texts differ."""


class Trials:
    """Hidden states of the original model, without errors and with those of one layer each.

    Attributes:
        spans: which tokens of the windows they are: the first of windows evenly spread.

    Args:
        model: the original.
        windows: int64 [n, L], of calibration text.
        workers: each keeps the hidden states with errors of some layers.
    """

    def __init__(self, model: StreamedModel, windows: Tensor, workers: Workers):
        count, length = _tried(*windows.shape)
        picked = [i * len(windows) // count for i in range(count)]
        self.spans = [range(at, at + length) for at in (i * windows.shape[1] for i in picked)]
        self._model, self._workers = model, workers
        self._plain, self._arguments = model.embed(windows[picked, :length])
        self._disturbed: dict[int, Tensor] = {}
        self._passed = 0

    def disturb(self, layer: int, error: Tensor) -> None:
        """Pass through all layers up to one, which has an error; layers come in their order.

        Args:
            layer: index of a layer with routed experts.
            error: float32 [n, H] on the CPU, of what these give for the tokens of `spans`.
        """
        while self._passed < layer:
            self._pass(None)
        self._pass(error)

    def divergences(self) -> dict[int, float]:
        """KL from the original, in nats per token, for the error of each layer alone, by layer index."""
        while self._passed < self._model.num_layers:
            self._pass(None)
        layers = self._model.shape.layers
        found = self._workers.map(layers, lambda index: divergence(self._model, self._plain, self._disturbed[index]))
        return dict(zip(layers, found, strict=True))

    def _pass(self, error: Tensor | None) -> None:
        index, model = self._passed, self._model
        batches = [(hidden, self._arguments) for hidden in (self._plain, *self._disturbed.values())]
        with model.layer(index) as module:
            self._plain, *others = model.through(module, batches)
            self._disturbed = dict(zip(self._disturbed, others, strict=True))
            if error is not None and self._workers.is_local(list(model.shape.layers).index(index)):
                self._disturbed[index] = next(model.through(module, batches[:1], lambda output: output + error))
        self._passed += 1


def trials_bytes(sizes: RunSizes) -> int:
    """Bytes of memory that `Trials` takes: hidden states, those of a layer's pass, and an error."""
    count, length = _tried(sizes.tokens // sizes.length, sizes.length)
    tokens, layers = count * length, len(sizes.shape.layers)
    held = FLOAT * tokens * (2 * (layers + 1) * sizes.state_values + 3 * sizes.shape.hidden_size)
    return held + forward_bytes(sizes, layers * tokens)


def _tried(windows: int, length: int) -> tuple[int, int]:
    """How many windows, and how many tokens of each, of so many of a length."""
    length = min(length, WINDOW_TOKENS)
    return min(windows, max(1, TOKENS // length)), length
