"""`--calib self`: text that the model itself writes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline_quant.calibration.sources.base import CalibrationSource, CalibrationText
from offline_quant.config import SELF
from offline_quant.model.sizes import FLOAT, RunSizes
from offline_quant.model.streaming import StreamedModel
from offline_quant.runtime.progress import bar

WRITTEN_BY_MODEL = CalibrationText(SELF, "written by the model itself")


class SelfCalibration(CalibrationSource):
    """Text sampled from the model."""

    written_by_model = True

    @staticmethod
    def matches(calib: str | None) -> bool:
        """`self`."""
        return calib == SELF

    def memory_bytes(self, sizes: RunSizes) -> int:
        """See `CalibrationSource`."""
        return sampling_bytes(sizes)

    def windows(self, tokenizer: Any, length: int) -> None:
        """None: see `sample_windows`."""


def sampling_bytes(sizes: RunSizes) -> int:
    """Bytes of memory that `sample_windows` takes: the whole model in float32, and its key-value cache."""
    heads = sizes.heads
    cached = 2 * int(sizes.model_config.get("num_key_value_heads") or heads) * sizes.head_size
    if sizes.query_size != sizes.value_size:
        cached = heads * (sizes.query_size + sizes.value_size)
    # One layer's cache is copied to grow.
    return sizes.mapped_bytes + FLOAT * (sizes.num_values + sizes.tokens * cached * (sizes.num_layers + 1))


@torch.no_grad()
def sample_windows(model: StreamedModel, tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Tokens sampled from the model itself at temperature 1, for models whose training text is not at hand.

    A window begins with the tokenizer's document-opening token, or with a random ordinary token where there is none;
    sampling goes on past end-of-text tokens, as in packed training text.

    Returns:
        int64 [count, length].
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    whole = model.materialize()
    start = tokenizer.bos_token_id
    model.check_ids(torch.tensor([start or 0]))
    if start is None:
        ids = torch.randint(
            0, min(tokenizer.vocab_size, model.vocabulary), (count, 1), generator=generator, device=model.device
        )
    else:
        ids = torch.full((count, 1), start, device=model.device)
    out, cache = [ids], None
    with bar("Sampling text", length - 1) as on_progress:
        for _ in range(length - 1):
            result = whole(input_ids=out[-1], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            probability = result.logits[:, -1].float().softmax(-1)
            out.append(torch.multinomial(probability, 1, generator=generator))
            on_progress()
    return torch.cat(out, 1).cpu()


def write_sampled_text(model: StreamedModel, tokenizer: Any, path: Path, count: int, length: int, seed: int) -> None:
    """Write text sampled from the model: `count` windows of `length` tokens, see `sample_windows`."""
    windows = sample_windows(model, tokenizer, count, length, seed)
    path.write_text("".join(tokenizer.batch_decode(windows, skip_special_tokens=True)), encoding="utf-8")
