"""The dtype of matrix products while a whole model is tuned."""

from collections.abc import Iterator

import pytest
import torch

from offline_quant.runtime import device


@pytest.fixture(autouse=True)
def _measure_again() -> Iterator[None]:
    device.bfloat16_is_faster.cache_clear()
    yield
    device.bfloat16_is_faster.cache_clear()


@pytest.mark.parametrize(
    ("instructions", "seconds", "taken"),
    [(True, 0.5, torch.bfloat16), (True, 0.9, torch.float32), (True, 2.0, torch.float32), (False, 0.5, torch.float32)],
)
def test_products_take_bfloat16_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, instructions: bool, seconds: float, taken: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(device, "_product_seconds", {torch.float32: 1.0, torch.bfloat16: seconds}.__getitem__)
    x = torch.ones(2, 2)
    with device.bfloat16_products(torch.device("cpu")):
        assert (x @ x).dtype == taken


def test_a_product_takes_time() -> None:
    assert 0 < device._product_seconds(torch.float32) < 60
