"""The campaign on a GPU, as far as it goes without one: parts, steps, what it refuses and what it leaves."""

import importlib.metadata
import json
import re
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from benchmarks import serving
from benchmarks.baselines import environments
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import parts, steps
from benchmarks.gpu.steps import Setting, Step
from benchmarks.scale import MODELS
from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.schema import CheckpointConfig


def setting(
    tmp_path: Path, corpus: Path | None = None, rehearsal: bool = True, deadline: float | None = None
) -> Setting:
    return Setting(tmp_path / "out", tmp_path / "scratch", tmp_path / "site", corpus, rehearsal, deadline)


def test_a_machine_gets_what_it_lacks(tmp_path: Path) -> None:
    there = tmp_path / "freeze.txt"
    there.write_text("# a comment\nTyping_Extensions==4.1\nhighspy @ file:///somewhere\nnumpy>=2\n\npydantic.core\n")
    assert parts.present(there) == {"typing-extensions", "highspy", "numpy", "pydantic-core"}
    part = parts.Part(("pydantic-core==2.50.4", "pydantic==2.14.3", "typing-extensions==4.16.0"))
    assert parts.wanted(part, parts.present(there)) == ["pydantic==2.14.3"]


def test_torch_and_triton_are_the_machine_s_own() -> None:
    there = parts.present(parts.PRESENT)
    for part in parts.PARTS.values():
        lacking = {canonicalize_name(p.partition("==")[0]) for p in parts.wanted(part, there)}
        assert lacking or part.wheel
        assert not lacking & {"torch", "triton", "numpy", "transformers"}


def test_packages_of_a_baseline_may_lie_beside_the_interpreter_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environments.ROOT_VARIABLE, str(tmp_path))
    assert environments.packages("gptq") is None
    (tmp_path / "gptq").mkdir()
    monkeypatch.setattr(environments, "_run", lambda *_: pytest.fail("an environment is being made"))
    assert environments.interpreter("gptq") == Path(sys.executable)
    assert environments.packages("gptq") == tmp_path / "gptq"


def archive(path: Path, **files: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)


def test_of_a_large_wheel_travels_what_is_needed(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in (
            "vllm/__init__.py", f"vllm/{parts.MARLIN}", "vllm/_C_stable_libtorch.abi3.so", "vllm/vllm-rs",
            "vllm/third_party/deep_gemm/x.hpp", "vllm/third_party/pynvml.py", "vllm-0.26.0.dist-info/METADATA",
        ):  # fmt: skip
            file.writestr(name, name)

    def taken(name: str) -> list[str]:
        parts._take(wheel, parts.PARTS[name], tmp_path / "out.zip")
        with zipfile.ZipFile(tmp_path / "out.zip") as file:
            return sorted(file.namelist())

    assert taken("kernels") == [parts.MARLIN]  # in no package: the kernels' benchmark must not find a vLLM
    assert taken("serving-core") == ["vllm/_C_stable_libtorch.abi3.so"]
    assert taken("serving-experts") == [f"vllm/{parts.MARLIN}"]
    assert taken("serving") == ["vllm-0.26.0.dist-info/METADATA", "vllm/__init__.py", "vllm/third_party/pynvml.py"]


def test_parts_are_installed_once_and_together_make_a_package(tmp_path: Path) -> None:
    given, site = tmp_path / "parts", tmp_path / "site"
    archive(given / "serving" / parts.TAKEN, **{"vllm/__init__.py": b"", "vllm/a.py": b"1"})
    archive(given / "serving-core" / parts.TAKEN, **{"vllm/_C.so": b"code"})
    (given / "strange").mkdir()
    assert parts.install(given, site) == ["serving", "serving-core"]
    assert (site / "serving" / "vllm" / "_C.so").read_bytes() == b"code"
    shutil.rmtree(given)
    archive(given / "serving-experts" / parts.TAKEN, **{"vllm/_moe_C.so": b"more"})  # came later
    assert parts.install(given, site) == ["serving", "serving-core", "serving-experts"]
    assert sorted(p.name for p in (site / "serving" / "vllm").iterdir()) == [
        "_C.so",
        "__init__.py",
        "_moe_C.so",
        "a.py",
    ]
    (given / "serving-attention").mkdir()
    (given / "serving-attention" / parts.TAKEN).write_bytes(b"PK broken")
    with pytest.raises(BitsmoeError, match="part serving-attention cannot be installed"):
        parts.install(given, site)
    (given / "gptq").mkdir()
    (given / "gptq" / "broken-1.0-py3-none-any.whl").write_bytes(b"no archive")
    with pytest.raises(BitsmoeError, match="part gptq cannot be installed"):
        parts.install(given, site)
    assert not (site / "gptq.done").exists()


def test_vllm_finds_the_plugin_of_sources_that_are_not_installed(tmp_path: Path) -> None:
    (tmp_path / "parts" / "base").mkdir(parents=True)
    assert parts.install(tmp_path / "parts", tmp_path / "site") == ["base"]
    (found,) = importlib.metadata.distributions(path=[str(tmp_path / "site" / "base")])
    assert found.name == "bitsmoe-vllm"
    (plugin,) = found.entry_points.select(group="vllm.general_plugins")
    assert (plugin.name, plugin.value) == ("bitsmoe", "bitsmoe_vllm:register")


def test_all_that_is_missing_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(steps, "run", lambda *_: pytest.fail("something ran"))
    command = ["gpu", "run", "--steps", "kernels", "quantizer", "train", "--parts", str(tmp_path / "nothing")]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch")])
    with pytest.raises(SystemExit) as e:
        program.main()
    for fault in (
        "step kernels needs part base, kernels",
        "step quantizer needs part base, gptq",
        "step train needs --corpus",
        "sees no CUDA device; --rehearse runs every step on a CPU",
    ):
        assert fault in str(e.value.code)


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_every_command_runs_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [script("print('first')"), script("import sys; print('second'); sys.exit(3)"), script("print('third')")]
    monkeypatch.setitem(steps.STEPS, "tests", Step("something", lambda s: said))
    monkeypatch.setitem(steps.STEPS, "tune", Step("something", lambda s: [script("print('later')")]))
    s = setting(tmp_path)
    assert not steps.run(["tests"], s)
    assert steps.run(["tune"], s)
    report = json.loads((s.out / "steps.json").read_text())
    assert [c["status"] for c in report["tests"]] == [0, 3, 0]
    assert [c["status"] for c in report["tune"]] == [0]
    log = (s.out / "tests.log").read_text()
    assert [line for line in log.splitlines() if not line.startswith("$")] == ["first", "second", "third"]


@pytest.mark.slow
def test_time_that_is_up_stops_what_runs_and_begins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LEAST_SECONDS", 0.5)
    commands = [script("print('begun', flush=True); import time; time.sleep(60)"), script("print('never')")]
    monkeypatch.setitem(steps.STEPS, "tests", Step("something", lambda s: commands))
    began = time.time()
    s = setting(tmp_path, deadline=began + 2)
    assert not steps.run(["tests"], s)
    assert time.time() - began < 30
    report = json.loads((s.out / "steps.json").read_text())
    assert [c["status"] for c in report["tests"]] == ["stopped: the time was up", "not begun: the time was up"]
    assert "begun" in (s.out / "tests.log").read_text()


def test_a_trained_model_is_handed_over_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "PIECE_BYTES", 10)
    model, out = tmp_path / "m", tmp_path / "out"
    for folder in (model, out, tmp_path / "t"):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(range(25)))
    (tmp_path / "t" / "tokenizer.json").write_text("[]")
    steps.complete(model, tmp_path / "t", out)
    assert (model / "tokenizer.json").read_text() == "[]"
    pieces = sorted(out.glob("m-model.safetensors.*"))
    assert b"".join(p.read_bytes() for p in pieces) == bytes(range(25))
    assert len(pieces) == 3
    assert (out / "m-config.json").read_text() == "{}"


@pytest.mark.slow
def test_tests_for_a_gpu_are_found(tmp_path: Path) -> None:
    """As the first step finds them, from sources that are not installed."""
    s = setting(tmp_path)
    assert steps.run(["tests"], s), (s.out / "tests.log").read_text()
    assert "test_memory_checker" in (s.out / "tests.log").read_text()


def test_every_step_names_its_commands(tmp_path: Path) -> None:
    for rehearsal in (True, False):
        for name, step in steps.STEPS.items():
            commands = step.commands(setting(tmp_path, tmp_path, rehearsal))
            assert commands, name
            text = " ".join(" ".join(command) for command in commands)
            assert ("cuda" in text) == (not rehearsal and name in ("quantizer", "train", "quality"))


def test_made_up_models_are_described_as_checkpoints_are() -> None:
    config = {**MODELS["qwen3-30b-a3b"].config, "num_hidden_layers": 2}
    ours = serving.quantization(serving.BITSMOE, config, 2.0)
    assert ours is not None
    read = CheckpointConfig.model_validate({k: v for k, v in ours.items() if k != "quantization"})
    assert len(read.layers) == 2
    assert ours["bpw"] == pytest.approx(read.all_in_bpw())
    assert 2.0 < ours["bpw"] < 2.3
    assert serving.quantization(serving.PLAIN, config, 2.0) is None
    theirs = serving.quantization(serving.GPTQ, config, 2.0)
    assert theirs is not None
    kept = [pattern.removeprefix("-:") for pattern in theirs["dynamic"]]
    names = {"self_attn.qkv_proj": True, "mlp.gate": True, "mlp.experts": False, "mlp.experts.3.gate_proj": False}
    for name, left in names.items():
        assert any(re.match(p, f"model.layers.7.{name}") for p in kept) == left


def test_speeds_are_compared() -> None:
    methods = {
        serving.BITSMOE: {"tokens_per_second": {"1": 100.0, "8": 400.0}},
        serving.GPTQ: {"tokens_per_second": {"1": 50.0, "8": 500.0}},
        serving.PLAIN: {"failed": "status 1"},
    }
    text = serving.as_text({"model": "m", "layers": 2, "device": "d", "vllm": "0", "methods": methods})
    assert "batch 1: 50.0 (bitsmoe 2.00x), batch 8: 500.0 (bitsmoe 0.80x)" in text
    assert "16-bit: status 1" in text
