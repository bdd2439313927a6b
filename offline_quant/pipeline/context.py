"""What all layers of a run are worked on with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from bitsmoe_kernels.models.families import MoEShape
from offline_quant.config import QuantizeConfig
from offline_quant.evaluation import sanity
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel
from offline_quant.pipeline.hidden_states import HiddenStates, Stream, batch_windows
from offline_quant.pipeline.preflight import RunInputs
from offline_quant.pipeline.resume import RunState
from offline_quant.pipeline.stopwatch import Stopwatch
from offline_quant.runtime.distributed import Workers


@dataclass(frozen=True)
class RunContext:
    """A run once its calibration tokens are known.

    Attributes:
        source: the model's weights.
        original: the model, run layer by layer.
        streamed: the same with its linear layers outside the experts as in the result.
        config: options.
        plan_only: nothing is quantized.
        windows: calibration tokens, int64 [n, L].
        judged: the first of them, by which the result is judged.
        calibration: their hidden states in the quantized model: layers make up for the error of those before them.
        originals: hidden states in the original model: of the judged windows, or where layers are fitted or the
            model is tuned of all, which they aim at; no windows with `plan_only`.
        state: what is kept on disk.
        workers: processes of the run.
        clock: time and memory.
        token_weights: float32 [T] by layer index, how much each calibration token counts; empty: all alike.
    """

    source: SourceModel
    original: StreamedModel
    streamed: StreamedModel
    config: QuantizeConfig
    plan_only: bool
    windows: Tensor
    judged: Tensor
    calibration: HiddenStates
    originals: HiddenStates
    state: RunState
    workers: Workers
    clock: Stopwatch
    token_weights: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> MoEShape:
        """Sizes and names of the model's experts."""
        return self.source.shape

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.streamed.num_layers

    def windows_read_after(self, layer: int) -> int:
        """Windows whose hidden states are read after a layer; of the last one, only the judged windows are."""
        return len(self.judged if layer == self.num_layers - 1 else self.windows)

    def with_bits(self, bits: float) -> "RunContext":
        """The run with bits that were picked for `--target-kl`."""
        return replace(self, config=self.config.with_bits(bits))

    def embed(self) -> None:
        """Write the hidden states that enter the first layer."""
        self.calibration.embed()
        self.originals.embed()


def start_run(
    inputs: RunInputs,
    config: QuantizeConfig,
    windows: Tensor,
    state: RunState,
    workers: Workers,
    clock: Stopwatch,
    plan_only: bool,
) -> RunContext:
    """The context of a run, from what was checked before it and its calibration tokens."""
    batches = windows.split(batch_windows(windows.shape[1], inputs.streamed.state_shape.numel()))
    judged = windows[: max(1, sanity.TOKENS // windows.shape[1])]
    originals = (windows if config.fits_layer or config.tunes_model else judged).split(len(batches[0]))
    if plan_only:
        originals = ()

    def hidden_states(stream: Stream, model: StreamedModel, batches: Sequence[Tensor]) -> HiddenStates:
        local = [i for i in range(len(batches)) if workers.is_local(i)]
        return HiddenStates(stream, model, batches, state, local)

    return RunContext(
        inputs.source, inputs.original, inputs.streamed, config, plan_only, windows, judged,
        hidden_states(Stream.CALIBRATION, inputs.streamed, batches),
        hidden_states(Stream.ORIGINAL, inputs.original, originals),
        state, workers, clock,
    )  # fmt: skip
