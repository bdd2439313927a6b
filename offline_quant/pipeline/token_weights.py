"""`--token-weights model`: how much every calibration token counts in every layer, by gradients of the whole model."""

from dataclasses import replace

import torch
from torch import Tensor

from offline_quant.calibration.token_gradients import token_powers, token_weights, windows_together
from offline_quant.pipeline.context import RunContext
from offline_quant.runtime.device import bfloat16_products
from offline_quant.runtime.progress import bar


def weigh_tokens(run: RunContext) -> RunContext:
    """The run with weights of its tokens; what an earlier run measured is taken where there is something."""
    powers = run.state.token_powers
    if powers is None:
        powers = _measured(run)
        if run.workers.rank == 0:
            run.state.keep_token_powers(powers)
        run.clock.lap("token weights")
    return replace(run, token_weights={index: token_weights(power) for index, power in powers.items()})


def _measured(run: RunContext) -> dict[int, Tensor]:
    """Squared norms of gradients, float64 [T], by layer index."""
    groups = run.windows.split(windows_together(run.windows))
    own = sum(run.workers.is_local(i) for i in range(len(groups)))
    with bar("Weighing tokens", 2 * run.num_layers * own) as on_layer:

        def measure(number: int) -> dict[int, Tensor]:
            with bfloat16_products(run.streamed.device):
                return token_powers(run.streamed, groups[number], run.config.seed + number, on_layer)

        parts = list(run.workers.map(range(len(groups)), measure))
    return {index: torch.cat([part[index] for part in parts]) for index in run.shape.layers}
