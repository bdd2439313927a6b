"""Recipes of docs/developing, followed to the letter in a copy of the quantizer."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from builders import REPO
from families import make_model
from offline_quant.allocation.objectives import OBJECTIVES
from offline_quant.config import BasisForm, ObjectiveName, QuantizeConfig
from offline_quant.decomposition.forms import FORMS
from offline_quant.rounding.gaussian import kappa

SMALL = ("--calib-samples", "3", "--calib-length", "48", "--refine", "0")


def follow(page: str, tree: Path) -> None:
    """Write the files of a recipe below a copy of the code, and make its edits."""
    text = (REPO / "docs" / "developing" / page).read_text(encoding="utf-8")
    for language, name, block in re.findall(r'```(\w+) title="(.*?)"\n(.*?)```', text, re.DOTALL):
        file = tree / name
        if language == "python":
            assert not file.exists()
            file.write_text(block, encoding="utf-8")
            continue
        old, new = ("\n".join(x[1:] for x in block.splitlines() if x.startswith(sign)) for sign in "-+")
        before = file.read_text(encoding="utf-8")
        assert before.count(old) == 1, f"{name} does not hold {old}"
        file.write_text(before.replace(old, new), encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copytree(REPO / "offline_quant", tmp_path / "offline_quant", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def quantized(tree: Path, model: Path, *options: str, calib: str = "calib.txt") -> dict:
    """The report of a model quantized by the copy."""
    (tree / "calib.txt").write_text("She opened the door, and there stood her brother with the lamp. " * 60)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tree), str(REPO / "kernels")))}
    command = ("quantize", str(model), "--out", "q", "--calib", calib, *SMALL, *options)
    done = subprocess.run(
        [sys.executable, "-m", "offline_quant.cli", *command],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict = json.loads((tree / "q" / "bitsmoe_report.json").read_text())
    return report


@pytest.mark.slow
def test_an_objective(tree: Path) -> None:
    model = make_model("Qwen3MoeForCausalLM", tree / "model")
    follow("objective.md", tree)
    report = quantized(tree, model, "--bits", "4.5", "--objective", "energy")
    assert report["options"]["objective"] == "energy"
    tensors = load_file(model / "model.safetensors")
    for row in report["layers"]:
        expected = 0.0
        for name, bits in row["mean_bits_by_expert"].items():
            for e, width in enumerate(bits):
                parts = ("gate", "up") if name == "gate_up" else (name,)
                matrices = [tensors[f"{row['layer']}.{e}.{part}_proj.weight"] for part in parts]
                expected += sum(float(W.double().square().sum()) for W in matrices) * kappa(int(width))
        assert row["predicted_error"] == pytest.approx(expected, rel=1e-6)
        assert row["solver_gap"] < 1e-2


@pytest.mark.slow
def test_a_decomposition(tree: Path) -> None:
    model = make_model("Qwen3MoeForCausalLM", tree / "model")
    follow("decomposition.md", tree)
    report = quantized(tree, model, "--bits", "10", "--basis", "rotated")
    assert [row["basis"] for row in report["layers"]] == ["rotated"] * len(report["layers"])
    stored = load_file(tree / "q" / "model.safetensors")
    for row in report["layers"]:
        assert row["output_error"] < 0.01
        prefix = f"{row['layer']}.gate_up_basis"
        basis = stored[prefix].double() * stored[f"{prefix}_scale"].double()[:, None]
        assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=0.05)


@pytest.mark.slow
def test_a_calibration_source(tree: Path) -> None:
    model = make_model("Qwen3MoeForCausalLM", tree / "model")
    follow("calibration_source.md", tree)
    report = quantized(tree, model, "--bits", "4.5", "--plan", calib="count:5")
    assert report["options"]["calib"] == "count:5"
    assert report["calibration_tokens"] == 3 * 48


def test_options_name_what_is_registered() -> None:
    assert set(get_args(ObjectiveName)) == OBJECTIVES.keys()
    assert set(get_args(BasisForm)) - {"auto"} <= FORMS.keys()
    whole = " and ".join(name for name, objective in OBJECTIVES.items() if objective.scope == "model")
    assert f"Default: model for {whole}, else layer." in str(QuantizeConfig.model_fields["budget"].description)
    assert {form for objective in OBJECTIVES.values() for form in objective.forms} <= FORMS.keys()
