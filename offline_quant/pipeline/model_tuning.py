"""`--tune-model` and `--tune-codes`: all finished layers are tuned together. All uses of `rounding.model_tuning`."""

from collections.abc import Mapping

from torch import Tensor

from bitsmoe_kernels.format.schema import Layer
from offline_quant.pipeline.context import RunContext
from offline_quant.report.schema import ModelTuning
from offline_quant.rounding.model_tuning import StoredLayers, layer_visits, tune_model
from offline_quant.runtime.progress import bar

_STATES = "tuned"


def tune_whole_model(run: RunContext, schemas: Mapping[str, Layer]) -> ModelTuning:
    """Tune a model whose layers are all finished; what an earlier run did is taken where there is something.

    Args:
        run: the run.
        schemas: of all MoE layers, by tensor prefix.
    """
    if (earlier := run.state.tuning) is not None:
        return earlier
    stored = StoredLayers(
        {index: schemas[run.shape.prefix(index)] for index in run.shape.layers},
        run.config.block_size,
        lambda index: {name.rpartition(".")[2]: tensor for name, tensor in run.state.layer_tensors(index)},
    )
    judged = len(run.judged)
    with bar("Tuning the model", layer_visits(run.num_layers, run.windows, judged, run.config.tune_codes)) as on_layer:
        tuned = tune_model(
            run.streamed, stored, run.windows, lambda i: _original(run, i), judged, run.config.seed, on_layer,
            run.config.tune_codes,
        )  # fmt: skip
    last = run.num_layers - 1
    run.state.put_hidden(last, _STATES, tuned.states)
    changed = {
        index: {f"{run.shape.prefix(index)}.{name}": tensor for name, tensor in tensors.items()}
        for index, tensors in tuned.tensors.items()
    }
    report = ModelTuning(kl_before=tuned.before, kl_after=tuned.after, kept=bool(changed))
    run.state.keep_tuning(changed, report)
    run.clock.lap("tuning of the model")
    return report


def _original(run: RunContext, window: int) -> Tensor:
    """Hidden states [L, ...] of a window that leave the original model's last layer."""
    batch, place = divmod(window, len(run.originals.batches[0]))
    return run.originals.read(run.num_layers - 1, batch)[place]


def tuned_states(run: RunContext) -> Tensor:
    """Hidden states [n, L, ...] of the judged windows that leave the tuned model's last layer."""
    shape = (*run.judged.shape, *run.streamed.state_shape)
    return run.state.hidden(run.num_layers - 1, _STATES, shape)
