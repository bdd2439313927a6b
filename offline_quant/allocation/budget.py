"""Bits left for codes under an all-in budget."""

from collections.abc import Iterable

import numpy as np

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.schema import Layer
from offline_quant.config import QuantizeConfig


def least_bits(schemas: Iterable[Layer], config: QuantizeConfig) -> float:
    """Bits per weight that scales, metadata and basis alone take in the smallest of some schemas."""
    return min(8 * schema.nbytes(config.block_size) / schema.num_weights for schema in schemas)


def budget_bits(schema: Layer, config: QuantizeConfig, subject: str) -> int:
    """Bits left for codes under the all-in budget of one layer.

    Raises:
        BitsmoeError: scales, metadata and basis alone exceed it; names the smallest possible budget.
    """
    overhead = 8 * schema.nbytes(config.block_size)
    budget = int(config.known_bits * schema.num_weights)
    if overhead > budget:
        least = overhead / schema.num_weights
        raise BitsmoeError(
            f"--bits {config.bits}: impossible for {subject}: scales, metadata and basis alone take {least:.4f} bits "
            f"per weight; use at least --bits {np.ceil(least * 1000) / 1000:.3f}"
        )
    return budget - overhead
