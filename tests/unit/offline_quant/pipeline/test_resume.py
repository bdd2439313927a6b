"""A run that dies goes on after its last finished layer and ends in the same bytes; several processes give them too."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitsmoe_kernels.errors import BitsmoeError
from builders import REPO
from families import make_model
from offline_quant.calibration import token_gradients
from offline_quant.calibration.sources import base as sources
from offline_quant.calibration.token_gradients import token_powers
from offline_quant.checkpoint.directory import PAGE_FILE, REPORT_FILE
from offline_quant.config import QuantizeConfig
from offline_quant.model.fingerprint import fingerprint
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel
from offline_quant.pipeline import calibrate, hidden_states, layer_loop
from offline_quant.pipeline import model_tuning as step
from offline_quant.pipeline import quantize as pipeline
from offline_quant.pipeline import resume as state_module
from offline_quant.pipeline import token_weights as token_weights_module
from offline_quant.pipeline.hidden_states import EMBEDDED
from offline_quant.pipeline.memory import check_memory, parse_bytes
from offline_quant.pipeline.quantize import quantize_model
from offline_quant.pipeline.records import LayerRecord
from offline_quant.pipeline.resume import RunState, state_directory
from offline_quant.pipeline.stopwatch import StageFigures
from offline_quant.report.schema import ModelReport, ModelTuning
from offline_quant.rounding import model_tuning as model_tuning_module
from offline_quant.runtime import chunks, launch
from offline_quant.runtime.device import bfloat16_products
from offline_quant.runtime.distributed import Workers
from offline_quant.runtime.launch import launch_workers
from offline_quant.runtime.offload import OffloadCache

pytestmark = pytest.mark.slow

TEXT = "She opened the door, and there stood her brother with the lamp in his hand. " * 60


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-MoE of three layers, the first dense, with shared experts."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "calib.txt").write_text(TEXT)
    return make_model("Qwen2MoeForCausalLM", folder / "model")


def options(source: Path, **changed: object) -> QuantizeConfig:
    base = {"bits": 4.5, "calib": str(source.parent / "calib.txt"), "calib_samples": 6, "calib_length": 64, "refine": 0}
    return QuantizeConfig.model_validate(base | changed)


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """What an undisturbed run writes."""
    quantize_model(str(source), source.parent / "whole", options(source))
    return source.parent / "whole"


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the page, which holds times."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != PAGE_FILE}


class Died(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("when", ["close_layer", "put_hidden", "publish"])
def test_a_run_that_dies_goes_on(source, whole, tmp_path, monkeypatch, layer, when):
    """Whether a layer was being worked on, just being closed, or the result was being put into its place."""
    out, usual = tmp_path / "q", getattr(RunState, when)

    def die(self, *args):
        if when == "publish" or args[0] == layer:
            raise Died
        usual(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, when, die)
        with pytest.raises(Died) as stopped:
            quantize_model(str(source), out, options(source))
    finished = 3 if when == "publish" else layer
    assert stopped.value.__notes__ == [
        f"{finished} finished layer(s) are kept in {state_directory(out)}: the same command with --resume goes on"
    ]
    assert not out.exists()
    worked = []
    layer_before = layer_loop._finish_layer
    monkeypatch.setattr(
        layer_loop, "_finish_layer", lambda run, index, *more: worked.append(index) or layer_before(run, index, *more)
    )
    quantize_model(str(source), out, options(source), resume=True)
    assert worked == list(range(finished, 3))
    assert contents(out) == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_a_disk_that_fails_costs_no_finished_layer(source, whole, tmp_path, monkeypatch):
    """It is no fault of the input, after which nothing would be worth keeping."""
    out, usual = tmp_path / "q", Path.read_text

    def fail(self, *args, **kwargs):
        if self.name == "layer.json" and self.parent.name == "layer-00001":
            raise OSError(5, "Input/output error", str(self))
        return usual(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        with pytest.raises(BitsmoeError, match="Input/output error") as stopped:
            quantize_model(str(source), out, options(source))
    assert stopped.value.__notes__[0].startswith("2 finished layer(s) are kept")
    quantize_model(str(source), out, options(source), resume=True)
    assert contents(out) == contents(whole)


def test_a_run_goes_on_without_the_dataset_it_has_read(source, tmp_path, monkeypatch):
    dataset, usual = tmp_path / "set", RunState.close_layer
    dataset.mkdir()
    (dataset / "validation.jsonl").write_text(json.dumps({"text": TEXT}))
    wanted = options(source, calib=f"hf:{dataset}", calib_split="validation")
    quantize_model(str(source), tmp_path / "whole", wanted)

    def die(self, index, *args):
        usual(self, index, *args)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "close_layer", die)
        with pytest.raises(Died):
            quantize_model(str(source), tmp_path / "q", wanted)
    shutil.rmtree(dataset)
    quantize_model(str(source), tmp_path / "q", wanted, resume=True)
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")
    record = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]["run"]
    assert (record["calib"], record["calib_split"]) == ("hf:set", "validation")
    assert str(tmp_path) not in "".join(p.read_text(errors="replace") for p in (tmp_path / "q").glob("*[nd]"))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("where", ["before it leaves", "half moved", "moved", "half removed", "all but removed"])
def test_a_run_that_dies_while_it_leaves_is_concluded(source, whole, tmp_path, monkeypatch, where, inside):
    """Everything was made: nothing is done again, whether the output is renamed whole or filled in its place."""
    out = tmp_path / "q"
    if inside:
        out.mkdir()
    moved, close = state_module.move_into_place, RunState.close

    def die(*args):
        raise Died

    def half_moved(made, place):
        if not inside:
            raise Died  # one rename: there is no half
        first = sorted(made.iterdir())[0]
        os.replace(first, place / first.name)
        raise Died

    def removed(path):
        if where == "moved" or (where == "half removed" and path.name == "layer-00001"):
            raise Died
        remove(path)

    remove = state_module.remove
    with monkeypatch.context() as patch:
        if where == "before it leaves":
            patch.setattr(RunState, "_leave", die)
        elif where == "half moved":
            patch.setattr(state_module, "move_into_place", half_moved)
        else:
            patch.setattr(state_module, "move_into_place", moved)
            patch.setattr(state_module, "remove", removed)
        if where == "all but removed":
            patch.setattr(RunState, "close", lambda run, keep: close(run, keep) if keep else die())
        with pytest.raises(Died):
            quantize_model(str(source), out, options(source))
    monkeypatch.setattr(layer_loop, "_finish_layer", None)
    if where == "before it leaves":
        with pytest.raises(BitsmoeError, match=r"bits was 4\.5, now 5\.0"):
            quantize_model(str(source), out, options(source, bits=5.0), resume=True)
    outcome = quantize_model(str(source), out, options(source), resume=True)
    assert contents(out) == contents(whole)
    assert outcome.report.model_dump() == json.loads((whole / REPORT_FILE).read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_resume_without_an_earlier_run_begins_one(source, whole, tmp_path):
    quantize_model(str(source), tmp_path / "q", options(source), resume=True)
    assert contents(tmp_path / "q") == contents(whole)


@pytest.fixture
def stopped(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a run that died in its last layer."""

    def die(*args: object) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "sanity_check", die)
        with pytest.raises(Died):
            quantize_model(str(source), tmp_path / "q", options(source))
    return tmp_path / "q"


def test_finished_layers_are_not_thrown_away_unasked(source, stopped):
    with pytest.raises(BitsmoeError, match=r"stopped after 3 layer\(s\), kept in .*add --resume to go on, or remove"):
        quantize_model(str(source), stopped, options(source))
    assert state_directory(stopped).exists()


def test_other_options_are_refused_with_all_differences(source, stopped):
    with pytest.raises(BitsmoeError) as refused:
        quantize_model(str(source), stopped, options(source, bits=5.0, seed=3), resume=True)
    assert "  - bits was 4.5, now 5.0\n  - seed was 0, now 3" in str(refused.value)
    assert state_directory(stopped).exists()


def test_another_text_of_the_same_name_is_refused(source, stopped, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "calib.txt").write_text(TEXT[1:])
    with pytest.raises(BitsmoeError, match=r"calibration text was '[0-9a-f]{64}', now '[0-9a-f]{64}'"):
        quantize_model(str(source), stopped, options(source, calib=str(tmp_path / "other" / "calib.txt")), resume=True)


def test_another_version_is_refused(source, stopped):
    path = state_directory(stopped) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(
        BitsmoeError,
        match=rf"left by another version of bitsmoe \(state 99, this one has {state_module.STATE_VERSION}\)",
    ):
        quantize_model(str(source), stopped, options(source), resume=True)


def test_two_runs_cannot_write_one_output(source, tmp_path):
    held = RunState(tmp_path / "q", {}, resume=False)
    with pytest.raises(BitsmoeError, match="another run is writing it"):
        quantize_model(str(source), tmp_path / "q", options(source))
    held.close(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_feels_weights_config_and_size(source, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(source, copy)
    before = fingerprint(copy)
    assert before == fingerprint(source)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert fingerprint(copy) != before
    shutil.copy(source / "model.safetensors", weights)
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert fingerprint(copy) != before


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "offline_quant.cli", "quantize", *map(str, arguments)]


def run(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`bitsmoe quantize` in a process of its own."""
    return subprocess.run(
        command(*arguments), cwd=REPO, capture_output=True, text=True, timeout=300, env=env, check=False
    )


FAST = ("--bits", "4.5", "--calib-samples", "6", "--calib-length", "64", "--refine", "0")


def test_a_killed_process_resumes_and_two_workers_give_the_bytes_of_one(source, whole, tmp_path):
    """Real processes: two workers are killed with SIGKILL once a layer is finished; two more go on."""
    out = tmp_path / "q"
    arguments = (source, "--out", out, "--calib", source.parent / "calib.txt", *FAST, "--workers", "2", "--resume")
    process = subprocess.Popen(command(*arguments), cwd=REPO, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (state_directory(out) / "layer-00001").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


@pytest.mark.nightly
def test_torchrun_starts_workers_too(source, whole, tmp_path):
    out = tmp_path / "q"
    arguments = command(source, "--out", out, "--calib", source.parent / "calib.txt", *FAST)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments[1:]]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(torchrun, cwd=REPO, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(whole)


def run_two_workers(source: Path, tmp_path: Path, first_code: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Two workers with some options more, whose processes begin with some code."""
    prelude = tmp_path / "site"
    prelude.mkdir()
    (prelude / "sitecustomize.py").write_text(first_code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(prelude), os.environ.get("PYTHONPATH", "")])}
    arguments = (source, "--out", tmp_path / "q", "--calib", source.parent / "calib.txt", *FAST, "--workers", "2")
    return run(*arguments, *more, env=environment)


def in_the_second(code: str) -> str:
    """Code that only the second worker runs."""
    return "import os\nif os.environ.get('RANK') == '1':\n" + textwrap.indent(code, "    ")


def test_a_worker_that_dies_is_reported(source, tmp_path):
    dies = in_the_second("import sys\nsys.stderr.write('out of luck')\nos._exit(1)\n")
    done = run_two_workers(source, tmp_path, dies)
    assert done.returncode == 2, done.stderr
    assert "worker 1 ended with status 1: out of luck" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_the_first_worker_ends_the_others(source, tmp_path):
    """They wait for it in a collective, where no signal but SIGKILL is heard."""
    (tmp_path / "short.txt").write_text("Too short.")
    done = run(source, "--out", tmp_path / "q", "--calib", tmp_path / "short.txt", *FAST, "--workers", "2")
    assert done.returncode == 2, done.stderr
    assert "give more text" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize(
    ("ends", "named"),
    [
        ((("lost the others", 1), ("Error: none here", 2)), "worker 2 ended with status 2: Error: none here"),
        ((("Error: another is gone", 2), ("step 3", -9)), "worker 2 ended with status -9: step 3"),
        ((("done", 0), ("lost the others", 1)), "worker 2 ended with status 1: lost the others"),
        ((("done", 0), ("done", 0)), "connection closed"),
    ],
)
def test_of_several_the_one_that_ended_first_is_named(ends, named, tmp_path):
    processes, said = [], [(tmp_path / str(i)).open("w+") for i in range(len(ends))]
    for (text, status), file in zip(ends, said, strict=True):
        code = f"echo '{text}' >&2; " + (f"exit {status}" if status >= 0 else f"kill {status} $$")
        processes.append(subprocess.Popen(["sh", "-c", code], stderr=file))
    assert str(launch._explained(RuntimeError("connection closed"), processes, said)) == named
    for file in said:
        file.close()


def test_a_worker_is_heard_though_it_is_quiet_and_leaves_nothing(source, tmp_path):
    """Of the processes only the first prints, but what is wrong with another is said."""
    fault = """
from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.pipeline import preflight
def check_device(device):
    raise BitsmoeError("--device: this one has none")
preflight.check_device = check_device
"""
    done = run_two_workers(source, tmp_path, in_the_second(fault))
    assert done.returncode == 2, done.stderr
    assert "worker 1 ended with status 2: Error: --device: this one has none" in " ".join(done.stderr.split())
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize("change", [{"objective": "alphaq"}, {"budget": "model"}], ids=str)
def test_two_workers_share_a_budget_weigh_tokens_and_fit_layers(source, tmp_path, monkeypatch, change):
    """Both have windows and experts of their own, and the bytes are those of one process.

    The second one would cut the experts into other chunks, as if it had a larger GPU.
    """
    monkeypatch.setattr(hidden_states, "BATCH_TOKENS", 128)
    monkeypatch.setattr(chunks, "CHUNK_EXPERTS", 3)
    quantize_model(str(source), tmp_path / "one", options(source, token_weights="model", fit="layer", **change))
    smaller = """
import os
from offline_quant.pipeline import hidden_states, moe_layer
from offline_quant.runtime import chunks
hidden_states.BATCH_TOKENS = 128
chunks.CHUNK_EXPERTS = 3
if os.environ.get("RANK") == "1":
    moe_layer.gpu_share = lambda device: 1 << 30
"""
    more = ("--token-weights", "model", "--fit", "layer", *(f"--{name}={value}" for name, value in change.items()))
    done = run_two_workers(source, tmp_path, smaller, *more)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "q") == contents(tmp_path / "one")


def test_every_token_is_weighed_once_and_a_resumed_run_weighs_none(source, whole, tmp_path, monkeypatch):
    """Three groups of two windows; a run that dies behind a layer, and one that does not."""
    monkeypatch.setattr(token_gradients, "TOKENS", 128)
    seen, kept = [], RunState.keep_token_powers

    def keep(self, powers):
        seen.append((self.windows.tokens, powers))
        kept(self, powers)

    monkeypatch.setattr(RunState, "keep_token_powers", keep)
    config = options(source, token_weights="model")
    quantize_model(str(source), tmp_path / "whole", config)
    (windows, powers), model = seen[0], StreamedModel(SourceModel(source))
    assert sorted(powers) == list(model.shape.layers)
    with bfloat16_products(model.device):
        wanted = [token_powers(model, windows[2 * i : 2 * i + 2], i) for i in range(3)]
    for index, power in powers.items():
        assert torch.allclose(power, torch.cat([part[index] for part in wanted]), rtol=1e-3)

    def die(self, index, *args):
        if index == 2:
            raise Died
        usual(self, index, *args)

    usual = RunState.close_layer
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "close_layer", die)
        with pytest.raises(Died):
            quantize_model(str(source), tmp_path / "q", config)
    monkeypatch.setattr(token_weights_module, "token_powers", lambda *_: pytest.fail("measured again"))
    quantize_model(str(source), tmp_path / "q", config, resume=True)
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")
    record = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]["run"]
    assert record["token_weights"] == "model"
    unweighed = contents(whole)
    assert any(unweighed[n] != data for n, data in contents(tmp_path / "q").items() if n.endswith(".safetensors"))


def test_hidden_states_go_once_everybody_has_read_them(source, tmp_path, monkeypatch):
    events, usual = [], RunState.drop_hidden

    class Watched(Workers):
        def barrier(self):
            events.append("wait")

    def drop(self, index):
        events.append(f"drop {index}")
        usual(self, index)

    monkeypatch.setattr(RunState, "drop_hidden", drop)
    quantize_model(str(source), tmp_path / "q", options(source, objective="alphaq"), workers=Watched())
    dropped = [(before, now) for before, now in pairwise(events) if now.startswith("drop")]
    assert {now for _, now in dropped} >= {"drop -1", "drop 0", "drop 1"}
    assert {before for before, _ in dropped} == {"wait"}


def test_an_output_directory_that_fills_up_costs_no_work(source, whole, tmp_path, monkeypatch):
    out, usual = tmp_path / "q", RunState.publish

    def publish(self):
        out.mkdir()
        (out / "note.txt").write_text("mine")
        usual(self)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "publish", publish)
        with pytest.raises(BitsmoeError, match="not an empty directory") as stopped:
            quantize_model(str(source), out, options(source))
    assert stopped.value.__notes__ == ["everything was made: the same command with --resume puts it in its place"]
    with pytest.raises(BitsmoeError, match="not an empty directory"):  # still
        quantize_model(str(source), out, options(source), resume=True)
    (out / "note.txt").unlink()
    assert quantize_model(str(source), out, options(source), resume=True).report
    assert contents(out) == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_tuning_resumes_too_and_wants_one_process(source, tmp_path, monkeypatch):
    config, reference = options(source, tune=True), tmp_path / "reference"
    quantize_model(str(source), reference, config)
    usual = RunState.close_layer

    def die(self, index, *args):
        if index == 2:
            raise Died
        usual(self, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "close_layer", die)
        with pytest.raises(Died):
            quantize_model(str(source), tmp_path / "q", config)
    quantize_model(str(source), tmp_path / "q", config, resume=True)
    assert contents(tmp_path / "q") == contents(reference)
    with pytest.raises(BitsmoeError, match="--tune: the experts of a layer are tuned in one process"):
        quantize_model(str(source), tmp_path / "other", options(source, tune=True), workers=Half(0))
    for option in ("tune_model", "tune_codes"):
        with pytest.raises(BitsmoeError, match=f"--{option.replace('_', '-')}: the whole model is tuned in one"):
            quantize_model(str(source), tmp_path / "other", options(source, **{option: True}), workers=Half(0))


@pytest.mark.parametrize(("option", "kinds"), [("tune_model", {"scale"}), ("tune_codes", {"scale", "codes"})])
def test_tuning_of_the_model_changes_what_it_says_and_goes_on_after_a_death(
    option: str, kinds: set[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_tuning_module, "RATE", 0.2)  # few steps, and a small divergence
    monkeypatch.setattr(model_tuning_module, "CODE_PASSES", 40)  # codes move slowly
    reports: list[ModelReport] = []
    rough = {"bits": 2.0, "feedback": False, "without": ("correction",)}  # something is left to tuning
    plain, config = (options(source, **rough, **{option: on}) for on in (False, True))
    for name, given in (("plain", plain), ("tuned", config)):
        result = quantize_model(str(source), tmp_path / name, given)
        assert result is not None
        reports.append(result.report)
    assert reports[0].model_tuning is None
    tuning = reports[1].model_tuning
    assert tuning is not None
    assert tuning.kept
    assert tuning.kl_after < tuning.kl_before
    assert f"{tuning.kl_before:.4g} -&gt; {tuning.kl_after:.4g}" in (tmp_path / "tuned" / PAGE_FILE).read_text()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "tuned"))
    changed = {name.rpartition("_")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == kinds
    # The verdict is on the tuned model, whose predictions differ from those of the one before.
    assert reports[0].sanity != reports[1].sanity

    def die(*_: object, **__: object) -> None:
        raise Died

    for place, name in ((step, "tune_model"), (pipeline, "write_checkpoint")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, die)
            with pytest.raises(Died):
                quantize_model(str(source), tmp_path / "died", config, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(step, "tune_model", die)  # it is done already
        quantize_model(str(source), tmp_path / "died", config, resume=True)
    assert contents(tmp_path / "died") == contents(tmp_path / "tuned")


def test_tuned_tensors_of_a_run_that_died_are_not_taken(tmp_path):
    """Those that were not worth keeping in the run that went on."""
    state, before, after = RunState(tmp_path / "q", {}, resume=False), torch.zeros(2), torch.ones(2)
    state.open_layer(EMBEDDED)
    state.open_layer(0)
    state.close_layer(0, {"scale": before}, LayerRecord(StageFigures()))
    for kept, expected in ((True, after), (False, before)):
        state.keep_tuning({0: {"scale": after}}, ModelTuning(kl_before=1.0, kl_after=2.0, kept=kept))
        assert torch.equal(dict(state.layer_tensors(0))["scale"], expected)


@pytest.mark.parametrize("changed", [{}, {"fit": "layer"}, {"objective": "alphaq", "tune_codes": True, "bits": 3}])
def test_a_run_keeps_as_much_on_disk_as_was_foretold(changed, source, tmp_path, monkeypatch):
    """Hidden states, and with them tensors of layers and of the result. At few bits tuning helps, and is kept."""
    held: list[tuple[int, int]] = []

    def watch(name):
        usual = getattr(RunState, name)

        def watched(self, *given, **more):
            usual(self, *given, **more)
            sizes = {p: p.stat().st_size for p in self.directory.rglob("*") if p.is_file()}
            hidden, tensors = (sum(n for p, n in sizes.items() if p.suffix == s) for s in (".f32", ".safetensors"))
            held.append((hidden, hidden + tensors))

        monkeypatch.setattr(RunState, name, watched)

    for name in ("put_hidden", "keep_tuning", "_note"):  # the last one once the result is there
        watch(name)
    memory = quantize_model(str(source), tmp_path / "q", options(source, **changed)).memory
    most, most_of_all = (max(figures) for figures in zip(*held, strict=True))
    assert most == memory.hidden
    assert most_of_all == pytest.approx(memory.most_disk, rel=0.05)  # headers of files come to that here


class Half(Workers):
    """A process of two, whose other half is computed here as well."""

    size = 2

    def __init__(self, rank: int):
        self.rank = rank


def test_every_item_has_one_owner():
    owners = [[i for i in range(7) if Half(rank).is_local(i)] for rank in (0, 1)]
    assert sorted(owners[0] + owners[1]) == list(range(7))


def test_a_spool_keeps_little_in_memory_and_the_rest_on_disk(tmp_path):
    offload = OffloadCache(tmp_path, memory_bytes=90)
    values = {f"t{i}": torch.randn(4, i + 1) for i in range(4)}
    for name, value in values.items():
        offload.put(name, value)
    assert {p.name for p in offload.directory.iterdir()} == {"t2", "t3"}  # 16 + 32 bytes fit, 48 more do not
    for name, value in values.items():
        assert torch.equal(offload.get(name), value)
    offload.put("t3", values["t0"])  # smaller now, so it fits
    assert torch.equal(offload.get("t3"), values["t0"])
    offload.drop("t0", "unknown")
    assert "t0" not in offload
    offload.clear()
    assert list(tmp_path.iterdir()) == []


def test_what_there_is_no_room_for_is_computed_again(source, whole, tmp_path, monkeypatch):
    """No room for anything that can be: the same bytes."""
    usual = OffloadCache.put

    def put(self, name, tensor, if_room=False):
        self.drop(name)
        if not if_room:
            usual(self, name, tensor)

    monkeypatch.setattr(OffloadCache, "put", put)
    quantize_model(str(source), tmp_path / "q", options(source))
    assert contents(tmp_path / "q") == contents(whole)


def test_a_model_that_must_write_its_own_text_is_held_to_the_limit_of_memory(source, tmp_path, monkeypatch):
    """Nobody knew before that the default dataset would not be reached."""

    def unreachable(*args):
        raise BitsmoeError("the dataset cannot be reached")

    monkeypatch.setattr(sources, "text_windows", unreachable)
    monkeypatch.setattr(calibrate, "sampling_bytes", lambda sizes: 2 * 10**12)
    with pytest.raises(BitsmoeError, match=r"--max-memory 1000.00 GB: this run would take about 200\d.\d\d GB"):
        quantize_model(str(source), tmp_path / "q", options(source, calib=None), max_memory=10**12)
    assert not list(tmp_path.iterdir())


def test_more_workers_than_processors_are_refused(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with (
        pytest.raises(BitsmoeError, match="--workers 5: this machine has 4 processors; use at most 4"),
        launch_workers(5),
    ):
        pass


def test_workers_are_not_asked_for_twice(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = "--workers 4: this is one of 2 processes that torchrun has started"
    with pytest.raises(BitsmoeError, match=expected), launch_workers(4):
        pass


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 << 29), ("800m", 8 * 10**8), ("12", 12)]
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "3XB", "GB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(BitsmoeError, match="must be a size such as 24GB"):
        parse_bytes(text)


def test_more_memory_than_allowed_is_refused_before_the_work(source, tmp_path):
    with pytest.raises(BitsmoeError, match=r"--max-memory 0.01 GB: this run would take about \d+\.\d\d GB"):
        quantize_model(str(source), tmp_path / "q", options(source), max_memory=10_000_000)
    assert list(tmp_path.iterdir()) == []
    outcome = quantize_model(str(source), tmp_path / "q", options(source), max_memory=10**12)
    check_memory(outcome.memory, None)
