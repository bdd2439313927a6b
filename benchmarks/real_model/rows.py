"""The rows that are run on each cut."""

from typing import Any

from benchmarks import quality
from benchmarks.quality import OURS, STRONG, Row

SAMPLES = 32
"""Windows of calibration text."""
GROUP = {"group_size": 64}
AUTOROUND = {**GROUP, "seqlen": 512, "amp": False}
"""Windows of 2,048 tokens would take most of a day on two cores. Many CPUs multiply slower in bfloat16."""
EXTENDED = {**AUTOROUND, "symmetric": True, "alg_ext": True}
LEAST, MORE = 2.28, 3.28
"""Budgets where groups of 64 have about as many bits."""


def _ours(bits: float, *seeds: int, **options: Any) -> list[Row]:
    label = " ".join(
        ["bitsmoe", *(f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in options.items())]
    )
    return [Row(label, OURS, bits, seed, options) for seed in seeds or (0,)]


_FITTED: dict[str, Any] = {"fit": "layer"}
_SHARED: dict[str, Any] = {"budget": "model"}
_TUNED: dict[str, Any] = {"tune_model": True}
_BEST: dict[str, Any] = {**_FITTED, "token_weights": "model", **_TUNED}
"""The best of what was measured on this model; codes of all layers bring nothing with so little text."""
GROUPS: dict[str, list[Row]] = {
    "main": [
        *(row for bits in (2.0, LEAST, 2.5, MORE, 4.0) for row in _ours(bits)),
        *(row for bits in (LEAST, MORE) for row in _ours(bits, **_FITTED)),
        *(row for bits in (LEAST, MORE) for row in _ours(bits, **_SHARED)),
        *(row for bits in (LEAST, 2.5, MORE) for row in _ours(bits, **_BEST)),
        *(row for bits in (LEAST, MORE) for row in _ours(bits, **_SHARED, **_BEST)),
        *(row for bits in (LEAST, MORE) for row in _ours(bits, tune=True)),
        *(row for bits in (LEAST, MORE) for row in _ours(bits, tune=True, token_weights="model", **_TUNED)),
        *(row for options in (_TUNED, {**_FITTED, **_TUNED}) for row in _ours(LEAST, **options)),
        *(row for basis in ("natural", "whitened") for row in _ours(LEAST, basis=basis)),
        *(Row("GPTQ g64, its strongest settings", "gptq", bits, 0, {**STRONG, **GROUP}) for bits in (2, 3)),
        *(Row("AutoRound g64, 200 iterations of 8 x 512 tokens", "autoround", bits, 0, AUTOROUND) for bits in (2, 3)),
        Row("AutoRound g64, extended, symmetric, 200 iterations of 8 x 512 tokens", "autoround", 2, 0, EXTENDED),
        Row("AutoRound g64, its advice: extended, 1,000 iterations of 8 x 512 tokens", "autoround", 2, 0,
            {**EXTENDED, "iters": 1000}),
        *(Row("HQQ g64", "hqq", bits, 0, GROUP) for bits in (2, 3)),
        *(Row("round-to-nearest g64", "rtn", bits, 0, GROUP) for bits in (2, 3)),
    ],
    "seeds": [row for options in ({}, _FITTED) for row in _ours(LEAST, *quality.SEEDS, **options)],
}  # fmt: skip
