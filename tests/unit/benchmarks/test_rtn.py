"""The baseline of the quality claim, against plain loops."""

import pytest
import torch

from benchmarks.baselines.rtn import SETTINGS, round_to_nearest

GROUP = SETTINGS["group_size"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_round_to_nearest_equals_plain_loops(bits):
    weight = torch.randn(3, 2 * GROUP, generator=torch.Generator().manual_seed(bits)) / 10
    weight[0, :GROUP] = weight[0, :GROUP].abs()  # all of one sign: the grid still holds zero
    weight[1, GROUP:] = 0
    got = round_to_nearest(weight, bits)
    for row in range(3):
        for start in (0, GROUP):
            group = weight[row, start : start + GROUP].tolist()
            low, high = min(0.0, *group), max(0.0, *group)
            scale = max(float(torch.tensor((high - low) / (2**bits - 1)).half()), 1e-8)
            zero = round(-low / scale)
            levels = [(code - zero) * scale for code in range(2**bits)]
            for value, rounded in zip(group, got[row, start : start + GROUP].tolist(), strict=True):
                assert rounded in [pytest.approx(level, abs=1e-7) for level in levels]
                assert abs(rounded - value) <= min(abs(level - value) for level in levels) + 1e-6
