"""`import bitsmoe` as a user's program has it: its examples run, its types are true, and importing it costs nothing."""

import doctest
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

import bitsmoe
from builders import REPO, write_first_layers
from fake_hub import TOKEN, FakeHub, fake_hub
from offline_quant.config import QuantizeConfig

TEXT = "She opened the door, and there stood her brother with the lamp in his hand. " * 150
FUNCTIONS = ("quantize", "evaluate", "inspect", "dequantize", "push")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    """Those of the package and of its functions, in order, on the first layer of the demo model."""
    monkeypatch.chdir(tmp_path)
    write_first_layers(Path("tiny_moe"), 1)
    Path("calib.txt").write_text(TEXT)
    Path("held_out.txt").write_text(TEXT)
    parser, runner, names = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False), {}
    for item in (bitsmoe, *(getattr(bitsmoe, name) for name in FUNCTIONS)):
        examples = parser.get_doctest(inspect.getdoc(item), names, item.__name__, None, 0)
        assert examples.examples, item.__name__
        runner.run(examples, clear_globs=False)
        names = examples.globs
    assert runner.summarize().failed == 0
    assert hub.repositories["me/tiny-3bit"].private
    assert "config.json" in hub.repositories["me/tiny-3bit"].branches["main"]
    assert sorted(p.name for p in Path("plan").iterdir()) == ["bitsmoe_report.json", "report.html"]
    assert (Path("tiny-plain") / "model.safetensors").exists()


def test_importing_loads_nothing_heavy() -> None:
    code = """
import os, sys, bitsmoe
print(sorted({"torch", "transformers", "pydantic", "rich"} & sys.modules.keys()), os.environ.get("OMP_WAIT_POLICY"))
print(dir(bitsmoe) == sorted(bitsmoe.__all__), hasattr(bitsmoe, "nothing"), issubclass(bitsmoe.BitsmoeError, Exception))
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "[] PASSIVE\nTrue False True\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "given", "policy"), [("torch", None, None), ("sys", "ACTIVE", "ACTIVE")], ids=["after torch", "chosen"]
)
def test_the_wait_policy_is_left_alone(before: str, given: str | None, policy: str | None) -> None:
    """Where it would come too late, and where the user has one."""
    code = f"import {before}, bitsmoe, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{policy}\n"


@pytest.mark.slow
def test_a_missing_dependency_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; import bitsmoe; bitsmoe.quantize"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: import of torch halted" in done.stderr
    assert done.stderr.endswith("run: pip install 'bitsmoe-vllm[quantize]'\n")


def test_options_are_keywords_with_their_names_and_defaults() -> None:
    parameters = inspect.signature(bitsmoe.quantize).parameters
    fields = {field.alias or name: field for name, field in QuantizeConfig.model_fields.items()}
    assert list(parameters) == ["model", "out", *fields, "revision", "resume", "max_memory", "plan"]
    assert [p.name for p in parameters.values() if p.default is p.empty] == ["model", "out"]
    for name, field in fields.items():
        assert field.is_required() or parameters[name].default == field.default


def test_faults_are_one_error_that_names_the_option(tmp_path: Path) -> None:
    for options, message in (
        ({"bits": 0, "seed": -1}, "--bits 0: Input should be greater than 0\n--seed -1: Input should be greater than"),
        ({"bits": 2, "calib_split": "x"}, "--calib-split: for --calib FILE or hf:DATASET only"),
        ({"bits": 2, "max_memory": "much"}, "--max-memory 'much': must be a size such as 24GB"),
        ({"bits": 2, "device": "tpu"}, "--device tpu: must be cpu, cuda or cuda:N"),
    ):
        with pytest.raises(bitsmoe.BitsmoeError, match=re.escape(message)):
            bitsmoe.quantize(tmp_path / "none", tmp_path / "q", **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'bitz'"):
        bitsmoe.quantize(tmp_path / "none", tmp_path / "q", bits=2, bitz=2)  # type: ignore[call-arg]
    with pytest.raises(bitsmoe.BitsmoeError, match="--dtype int8: must be one of float32, bfloat16, float16"):
        bitsmoe.dequantize(tmp_path, tmp_path / "q", "int8")  # type: ignore[arg-type]
    for call in (bitsmoe.inspect, lambda path: bitsmoe.push(path, "a/b"), lambda path: bitsmoe.dequantize(path, "q")):
        with pytest.raises(bitsmoe.BitsmoeError, match="none: no such directory"):
            call(str(tmp_path / "none"))
    with pytest.raises(bitsmoe.BitsmoeError, match="--text hf:a/b: must be a file"):
        bitsmoe.evaluate(tmp_path, "hf:a/b")
    assert list(tmp_path.iterdir()) == []


PROGRAM = """
from pathlib import Path

import bitsmoe

result = bitsmoe.quantize("model", Path("out"), bits=2, objective="alphaq", without=("trim",), max_memory="24GB")
reveal_type(result.report.layers[0].measured_error)
reveal_type(result.seconds)
reveal_type(bitsmoe.evaluate("out", text="held_out.txt").kl)
reveal_type(bitsmoe.inspect("out").layers[0].projections["down"].bpw)
reveal_type(bitsmoe.QuantizeConfig(bits=2).seed)
reveal_type(bitsmoe.__version__)
try:
    reveal_type(bitsmoe.push("out", "me/out"))
except bitsmoe.BitsmoeError as e:
    print(e)
bitsmoe.dequantize("out", "plain", "int8")
bitsmoe.quantize("model", "out", bits=2, objective="best")
bitsmoe.quantize("model", "out", bitz=2)
"""
SKIPPED = """
[mypy]
explicit_package_bases = true
[mypy-torch.*,transformers.*,datasets.*,huggingface_hub.*,highspy.*,matplotlib.*,rich.*,safetensors.*,yaml.*,pyarrow.*]
follow_imports = skip
"""
"""Libraries whose types are no part of the API: to read them takes a minute."""


@pytest.mark.slow
def test_types_are_those_a_users_program_sees(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(SKIPPED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "program.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": f"{REPO}:{REPO / 'kernels'}"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    shown = re.findall(r'Revealed type is "(.+)"', done.stdout)
    assert shown == ["float | None", "dict[str, float]", "float | None", "float", "int", "str", "str"], done.stdout
    errors = re.findall(r"error: .*\[(.+)\]", done.stdout)
    assert errors == ["arg-type", "arg-type", "call-arg"], done.stdout


def test_an_installed_package_is_typed() -> None:
    """Type checkers believe the annotations of an installed package only beside this file."""
    for package in (REPO / "bitsmoe", REPO / "offline_quant", REPO / "kernels" / "bitsmoe_kernels"):
        assert (package / "py.typed").is_file()
