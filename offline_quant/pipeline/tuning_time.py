"""How long tuning will take, said before layers are worked on: by the time that one layer takes on this machine."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from offline_quant.model.sizes import RunSizes
from offline_quant.pipeline.context import RunContext
from offline_quant.rounding import model_tuning, tuning
from offline_quant.runtime.device import bfloat16_products
from offline_quant.runtime.progress import clock, console

TRIED_TOKENS, TRIED_HEAD_TOKENS = 2_048, 256
"""Tokens that pass through a layer, and through the head, to learn their times."""
TRIES = 2
"""The first one reads weights and fills caches; the fastest counts."""


def foretell_tuning(run: RunContext, sizes: RunSizes) -> None:
    """Print how long `--tune`, `--tune-model` and `--tune-codes` will take, where there is something left to tune."""
    if seconds := tuning_seconds(run, sizes):
        console.print(f"Tuning: about {clock(seconds)} besides the usual time, by the pace of one layer now")
        run.clock.lap("time of a layer")


def tuning_seconds(run: RunContext, sizes: RunSizes) -> float:
    """Seconds of the clock that tuning will take, about, after what an earlier run has done; 0: nothing is left."""
    finished = run.state.finished()
    layers = sum(index >= finished for index in run.shape.layers) if run.config.tune else 0
    model = run.config.tunes_model and run.state.tuning is None
    if not (layers or model):
        return 0.0
    layer, head = _token_seconds(run)
    seconds = layer * layers * tuning.passes(run.windows.numel(), sizes.shape.num_experts / sizes.top_k)
    if model:
        passes, heads = model_tuning.passes(run.windows, len(run.judged), run.config.tune_codes)
        seconds += layer * run.num_layers * passes + head * heads
    return seconds


def _token_seconds(run: RunContext) -> tuple[float, float]:
    """Time of a token in one layer with experts and in the head, forwards."""
    model, count = run.streamed, max(1, TRIED_TOKENS // run.windows.shape[1])
    windows = run.windows[:count]
    hidden, arguments = model.embed(windows)
    states = hidden.flatten(0, 1)[:TRIED_HEAD_TOKENS]
    head = model.head
    with model.layer(run.shape.layers[0]) as module, torch.no_grad(), bfloat16_products(model.device):
        layer = _least_seconds(lambda: model.run(module, hidden, arguments))
        logits = _least_seconds(lambda: model.logits(states, head).log_softmax(-1))
    return layer / windows.numel(), logits / len(states)


def _least_seconds(work: Callable[[], Tensor]) -> float:
    taken = []
    for _ in range(TRIES):
        began = time.monotonic()
        float(work().flatten()[0])  # a GPU has finished then
        taken.append(time.monotonic() - began)
    return min(taken)
