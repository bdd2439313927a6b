"""How much memory and disk a run will take, before it starts."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.safetensors_io import MAPPED_BYTES, largest_shard
from bitsmoe_kernels.format.schema import TensorSpec
from bitsmoe_kernels.models.families import MoEShape
from offline_quant.calibration import sensitivity
from offline_quant.calibration.output_sample import SLOT_VALUES
from offline_quant.evaluation import sanity
from offline_quant.model.streaming import TOGETHER
from offline_quant.runtime.chunks import chunk_values, chunks_of
from offline_quant.runtime.offload import MEMORY_BYTES

SHARD_BYTES = 1 << 30
"""Of a shard of the result, which is put together in memory."""
LATER = 80 << 20
"""What libraries take that are loaded when they are needed: the solver, the plots."""
SCORE_COPIES = 2.5
"""Of attention scores, where they are computed as a whole: measured on DeepSeek-V3's shapes."""
LOGIT_COPIES = 3.5
"""Of logits while gradients of drawn tokens are taken: measured with the vocabulary of Qwen3-30B-A3B, where they are
most of what `--budget model` takes (6.6 GB with one layer of 32 experts)."""
_FLOAT, _INT, _DOUBLE = 4, 8, 8
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes.

    Attributes:
        peak: largest resident memory of one process.
        calibration_state: of it, what the calibration set takes while a layer is quantized: inputs of its experts and
            their routing.
        disk: besides the result, while the run goes on.
        result: of all tensors of the result, about.
    """

    peak: int
    calibration_state: int
    disk: int
    result: int


def estimate_memory(
    shape: MoEShape,
    specs: dict[str, TensorSpec],
    model_config: dict[str, Any],
    bits: float,
    tokens: int,
    batch_tokens: int,
    length: int,
    baseline: int,
    tune: bool = False,
    bases: bool = True,
    sensitive: bool = False,
    sampled: bool = False,
    device: torch.device = _CPU,
    reading: int = 0,
) -> MemoryEstimate:
    """What a run takes.

    Args:
        shape: of the experts.
        specs: of all tensors in the checkpoint.
        model_config: config.json.
        bits: per weight of the result.
        tokens: of calibration text.
        batch_tokens: of them that pass through a layer together.
        length: of a window of them.
        baseline: resident bytes of the process before the run.
        tune: whether scales and codes are tuned, which takes a whole layer and what its optimizer remembers.
        bases: whether a form with shared bases may be chosen.
        sensitive: whether sensitivities of all layers are measured, with gradients.
        sampled: whether the model writes its calibration text itself, for which it is whole in memory.
        device: where layers are worked on. Of a GPU's chunks only the source weights pass through memory; the rest is
            counted as without one, which is too much.
        reading: what it takes to read and tokenize calibration text.
    """
    E, H, I = shape.num_experts, shape.hidden_size, shape.intermediate_size  # noqa: E741
    top_k = int(model_config.get("num_experts_per_tok", 1))
    weights = 3 * E * H * I
    state = tokens * (_FLOAT * H + top_k * (_FLOAT + 3 * _INT))
    largest = max((spec.nbytes for spec in specs.values()), default=0)
    source = sum(spec.nbytes for spec in specs.values())
    mapped = min(MAPPED_BYTES, source)
    whole_tensor = min(MAPPED_BYTES + largest, source)
    chunk = len(chunks_of(E, H, I, device)[0])
    read = 2 * chunk * 3 * H * I  # a chunk, and the one before it
    worked = read if device.type == "cuda" else chunk * chunk_values(H, I)
    spooled = _FLOAT * (E * (4 * H * H + 3 * I * I) + tokens * top_k * I + E * H * I)
    dense = _FLOAT * max(_layer_values(shape, specs, i) for i in shape.layers)
    coded = int(min(bits, 8.5) * weights / 8)
    heads = int(model_config.get("num_attention_heads", 1))
    width = max(H, heads * int(model_config.get("head_dim") or H // heads))
    # Where queries and values differ in width (DeepSeek), torch computes attention scores as a whole.
    queries = int(model_config.get("qk_nope_head_dim") or 0) + int(model_config.get("qk_rope_head_dim") or 0)
    whole = queries != int(model_config.get("v_head_dim") or 0)
    scores = int(SCORE_COPIES * heads * batch_tokens * length) if whole else 0
    kept = state + min(MEMORY_BYTES, spooled)
    judged = min(tokens, sanity.TOKENS)
    # Of several batches at once: hidden states, what enters the experts, what they put out, and what passes them by.
    together = 4 * H * min(TOGETHER * batch_tokens, tokens if tune else judged)
    attention = batch_tokens * (6 * H + 4 * width) + scores
    experts = read if device.type == "cuda" else 2 * read  # as much again for what is computed with them
    forward = kept + mapped + dense + _FLOAT * (together + max(attention, experts))
    slots = min(SLOT_VALUES, tokens * top_k * H)
    codes = {
        "chunk": coded + _FLOAT * worked,
        "bases": 8 * _DOUBLE * H * H if bases else 0,
        "tuning": 2 * coded + _FLOAT * (5 * weights + 3 * tokens * H) if tune else 0,
        # Slots of some tokens; an expert's share of them, their sums, and what is put together of these.
        "output": coded + _FLOAT * (slots + 3 * slots // top_k),
    }
    running = kept + mapped + max(codes.values())
    # Logits of some rows of the head, and of the rows before or what their sum of exponentials takes.
    rows = min(sanity.VOCABULARY_ROWS, int(model_config["vocab_size"]))
    judging = _FLOAT * (3 * judged * H + rows * (H + 2 * judged)) + whole_tensor
    hidden = 3 * _FLOAT * tokens * H
    layers = int(model_config["num_hidden_layers"])
    differentiated = 0
    if sensitive:  # hidden states of all layers, and logits or a whole layer with what its gradients take
        measured = min(tokens, sensitivity.TOKENS)
        batch = min(measured, sensitivity.BATCH_TOKENS)
        logits = int(_FLOAT * int(model_config["vocab_size"]) * (H + LOGIT_COPIES * batch))
        whole_layer = dense + _FLOAT * (weights + batch * (top_k * (4 * H + 8 * I) + 6 * H + 4 * width))
        differentiated = _FLOAT * measured * H * (layers + 2) + mapped + max(logits, whole_layer)
    sampling = 0
    if sampled:
        kv_heads = int(model_config.get("num_key_value_heads") or heads)
        cached = 2 * kv_heads * int(model_config.get("head_dim") or H // heads)
        if whole:
            cached = heads * (queries + int(model_config.get("v_head_dim") or 0))
        values = sum(math.prod(spec.shape) for spec in specs.values())
        sampling = mapped + _FLOAT * (values + tokens * cached * (layers + 1))  # one layer's cache is copied to grow
    others = [spec.nbytes for name, spec in specs.items() if not shape.is_expert_tensor(name)]
    # A layer's experts are about two tensors: codes of gate and up, and of down.
    shard = largest_shard([*[2 * coded // 3, coded // 3] * len(shape.layers), *others], SHARD_BYTES)
    writing = shard + max(coded, whole_tensor)  # and what its tensors are copied from
    return MemoryEstimate(
        peak=baseline
        + LATER
        + max(whole_tensor, forward, running, judging, writing, differentiated, sampling, reading),
        calibration_state=state,
        disk=hidden + max(0, _FLOAT * (tokens * top_k * I + E * H * I) - MEMORY_BYTES),
        result=sum(others) + coded * len(shape.layers),
    )


def _layer_values(shape: MoEShape, specs: dict[str, TensorSpec], layer: int) -> int:
    """Values of a decoder layer's tensors outside its experts."""
    prefix = f"{shape.family.decoder(layer)}."
    return sum(
        math.prod(spec.shape)
        for name, spec in specs.items()
        if name.startswith(prefix) and not name.startswith(f"{shape.prefix(layer)}.")
    )


def check_memory(found: MemoryEstimate, limit: int | None) -> None:
    """Refuse a run that would take more memory than is allowed.

    Raises:
        BitsmoeError: names both figures and what to do.
    """
    if limit is not None and found.peak > limit:
        raise BitsmoeError(
            f"--max-memory {limit / 1e9:.2f} GB: this run would take about {found.peak / 1e9:.2f} GB, "
            f"{found.calibration_state / 1e9:.2f} GB of it for calibration text; allow more, or give less of it "
            "(--calib-samples, --calib-length)"
        )


def parse_bytes(text: str) -> int:
    """Bytes from a number with a unit: 24GB, 24 GiB, 800MB.

    Raises:
        BitsmoeError: not of this form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise BitsmoeError(f"--max-memory {text!r}: must be a size such as 24GB or 900MB")
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** (" KMGT".index(match[2].upper() or " ")))
