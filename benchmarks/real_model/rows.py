"""The rows that are run on each cut."""

from typing import Any

from benchmarks import quality
from benchmarks.quality import OURS, STRONG, Row

SAMPLES = 32
"""Windows of calibration text."""
GROUP = {"group_size": 64}
AUTOROUND = {**GROUP, "seqlen": 512}
"""Windows of 2,048 tokens would take most of a day on two cores."""
LEAST, MORE = 2.28, 3.28
"""Budgets where groups of 64 have about as many bits."""


def _ours(bits: float, *seeds: int, **options: Any) -> list[Row]:
    label = " ".join(
        ["bitsmoe", *(f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in options.items())]
    )
    return [Row(label, OURS, bits, seed, options) for seed in seeds or (0,)]


_FITTED: dict[str, Any] = {"fit": "layer"}
_WEIGHED: dict[str, Any] = {"token_weights": "model"}
_SLOWER: tuple[dict[str, Any], ...] = (
    _WEIGHED,
    _FITTED,
    {**_FITTED, **_WEIGHED},
    {**_FITTED, "tune_model": True},
    {**_FITTED, **_WEIGHED, "tune_model": True},
    {"tune": True},
    {"tune_model": True},
    {"tune_codes": True},
    {"tune": True, "tune_codes": True},
)
GROUPS: dict[str, list[Row]] = {
    "main": [
        *(row for bits in (2.0, LEAST, 2.5, MORE, 4.0) for row in _ours(bits)),
        *(row for options in _SLOWER for bits in (LEAST, MORE) for row in _ours(bits, **options)),
        *(row for basis in ("natural", "whitened") for row in _ours(LEAST, basis=basis)),
        *(Row("GPTQ g64, its strongest settings", "gptq", bits, 0, {**STRONG, **GROUP}) for bits in (2, 3)),
        *(Row("AutoRound g64, 200 iterations of 8 x 512 tokens", "autoround", bits, 0, AUTOROUND) for bits in (2, 3)),
        *(Row("HQQ g64", "hqq", bits, 0, GROUP) for bits in (2, 3)),
        *(Row("round-to-nearest g64", "rtn", bits, 0, GROUP) for bits in (2, 3)),
    ],
    "seeds": [row for options in ({}, _SLOWER[-1]) for row in _ours(LEAST, *quality.SEEDS, **options)],
}  # fmt: skip
