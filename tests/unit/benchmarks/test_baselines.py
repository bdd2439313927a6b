"""Other people's quantizers: everything around their libraries, without the libraries."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.baselines import environments
from benchmarks.baselines.checkpoint import write_checkpoint
from benchmarks.baselines.driver import BASELINES, run_baseline, write_windows
from benchmarks.baselines.environments import interpreter, pins, requirements_file
from benchmarks.baselines.gguf import importance_matrix
from benchmarks.baselines.job import WINDOWS, Names, all_in_bpw, expert_matrices, is_expert, on_grid
from benchmarks.baselines.rtn import round_to_nearest
from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.models.families import FAMILIES
from builders import TINY_MOE
from families import make_model
from offline_quant.calibration.sources.registry import open_text
from offline_quant.calibration.windows import load_tokenizer, text_windows
from offline_quant.model.source import SourceModel

E, H, I = 3, 16, 24  # noqa: E741


@pytest.fixture
def model(tmp_path):
    """A checkpoint of two layers with random weights; nothing here runs it."""
    directory = tmp_path / "model"
    directory.mkdir()
    config = json.loads((TINY_MOE / "config.json").read_text())
    config |= {"hidden_size": H, "moe_intermediate_size": I, "num_experts": E, "num_hidden_layers": 2}
    config["num_experts_per_tok"] = 2
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    gen = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (8, H)}
    for layer in range(2):
        shapes[f"model.layers.{layer}.mlp.gate.weight"] = (E, H)
        for e in range(E):
            prefix = f"model.layers.{layer}.mlp.experts.{e}"
            shapes |= {f"{prefix}.gate_proj.weight": (I, H), f"{prefix}.up_proj.weight": (I, H)}
            shapes |= {f"{prefix}.down_proj.weight": (H, I)}
    tensors = {name: torch.randn(shape, generator=gen).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def windows(tmp_path):
    path = tmp_path / "windows.safetensors"
    save_file({WINDOWS: torch.zeros(2, 8, dtype=torch.int64)}, path)
    return path


@pytest.mark.parametrize(
    ("shapes", "bits", "group", "zero_bits", "expected", "formula"),
    [
        ([(256, 256)], 2, 128, 0, 2.125, "2 + (16 scale) / 128"),
        ([(256, 256), (512, 128)], 2, 128, 2, 2.140625, "2 + (16 scale + 2 zero point) / 128"),
        ([(256, 256)], 3, 128, 3, 3.1484375, "3 + (16 scale + 3 zero point) / 128"),
        ([(256, 256)], 2, 64, 16, 2.5, "2 + (16 scale + 16 zero point) / 64"),
        # 200 weights in a row are two groups, the second one not full
        ([(10, 200)], 2, 128, 2, 2 + 2 * 18 / 200, "2 + (16 scale + 2 zero point) / 128"),
        ([(10, 200), (10, 128)], 4, 128, 0, 4 + 3 * 16 / 328, "4 + (16 scale) / 128"),
    ],
)
def test_bits_per_weight_count_codes_scales_and_zero_points(shapes, bits, group, zero_bits, expected, formula):
    bpw, text = all_in_bpw(shapes, bits, group, zero_bits)
    assert bpw == pytest.approx(expected, abs=1e-12)
    assert text == formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (2, False), (3, True), (3, False)])
def test_weights_are_rebuilt_with_scales_as_they_are_stored(dtype, bits, signed):
    gen = torch.Generator().manual_seed(bits)
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(low, low + 2**bits, (6, 32), generator=gen)
    scale = torch.rand(6, 2, generator=gen) / 10 + 0.01  # more than 16 bits of precision
    zero = torch.randint(low, low + 2**bits, (6, 2), generator=gen)
    wide = [x.repeat_interleave(16, dim=1) for x in (scale, zero)]
    weight = ((codes - wide[1]) * wide[0]).to(dtype)
    got = on_grid(weight, scale, zero, range(low, low + 2**bits))
    assert torch.equal(got, (codes - wide[1]) * wide[0].half().float())
    assert not torch.equal(got, weight.float())


def test_weights_that_were_not_quantized_are_refused():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)) / 10
    scale, zero = torch.full((4, 2), 0.1), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="off the grid"):
        on_grid(weight, scale, zero, range(-100, 100))
    rounded = (weight / 0.1).round().clamp(-2, 2) * 0.1  # five values, one more than two bits can say
    on_grid(rounded, scale, zero, range(-2, 3))
    with pytest.raises(ValueError, match="off the grid"):
        on_grid(rounded, scale, zero, range(-2, 2))


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("gptq", "llmcompressor==0.14.0"),
        ("autoround", "auto-round==0.16.0"),
        ("gguf", "llama_cpp_python=="),
        ("hqq", "hqq=="),
    ],
)
def test_requirements_are_pinned(name, library):
    found = pins(requirements_file(name))
    assert found[0].startswith("torch==")
    assert sum(line.startswith(library) for line in found) == 1
    names = [line.split("==")[0].lower() for line in found]
    assert len(set(names)) == len(names)


def test_loose_requirements_are_refused(tmp_path):
    path = tmp_path / "loose.txt"
    path.write_text("torch==2.13.0\nnumpy>=2  # not pinned\nhttps://example.org/a.whl\ntqdm==4.70.1\n")
    with pytest.raises(BitsmoeError, match=r"numpy>=2.*example") as e:
        pins(path)
    assert "tqdm" not in str(e.value)
    path.write_text("numpy==2.4.6\ntorch==2.13.0\n")
    with pytest.raises(BitsmoeError, match="must begin with torch==VERSION"):
        pins(path)


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv(environments.ROOT_VARIABLE, str(tmp_path))
    # pip as it is where there is neither a network nor a folder of packages
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(BitsmoeError, match=r"baseline hqq: its environment .* cannot be made") as e:
        interpreter("hqq")
    assert "No matching distribution found for torch==" in str(e.value)
    assert environments.ROOT_VARIABLE in str(e.value)


def test_an_environment_is_made_once_for_its_pins(tmp_path, monkeypatch):
    monkeypatch.setenv(environments.ROOT_VARIABLE, str(tmp_path / "environments"))
    file = tmp_path / "some.txt"
    monkeypatch.setattr(environments, "requirements_file", lambda name: file)
    commands = []

    def run(name, directory, command):
        commands.append(command)
        (directory / "bin").mkdir(parents=True, exist_ok=True)
        (directory / "bin" / "python").touch()

    monkeypatch.setattr(environments, "_run", run)
    file.write_text("torch==2.13.0\ntqdm==4.70.1\n")
    python = interpreter("some")
    assert [c[-1] for c in commands] == [str(python.parents[1]), "torch==2.13.0", str(file)]
    assert interpreter("some") == python
    assert len(commands) == 3
    file.write_text("torch==2.13.0\ntqdm==4.70.2\n")
    assert interpreter("some") != python
    assert len(commands) == 6


def test_experts_are_found_in_both_forms_of_checkpoint(tmp_path, model):
    single = expert_matrices(model)
    assert len(single) == 2 * E * 3
    tensors = load_file(model / "model.safetensors")
    fused = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{e}.{part}_proj.weight"] for e in range(E)])
            for part in ("gate", "up", "down")
        )
        fused |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], 1), f"{prefix}.down_proj": down}
    (tmp_path / "fused").mkdir()
    save_file(fused, tmp_path / "fused" / "model.safetensors")
    found = expert_matrices(tmp_path / "fused")
    assert found.keys() == single.keys()
    assert all(torch.equal(found[name], single[name]) for name in single)


def test_a_checkpoint_takes_the_experts_and_leaves_the_rest(tmp_path, model):
    experts = {name: torch.randn(w.shape) for name, w in expert_matrices(model).items()}
    write_checkpoint(model, tmp_path / "out", experts)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, experts.get(name, before[name])), name
    read = SourceModel(tmp_path / "out").experts(1)
    assert torch.equal(read.gate_up[2, I:], experts["model.layers.1.mlp.experts.2.up_proj.weight"])
    assert torch.equal(read.down[0], experts["model.layers.1.mlp.experts.0.down_proj.weight"])
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_experts_that_do_not_fit_are_all_named(tmp_path, model):
    experts = {name: w.float() for name, w in expert_matrices(model).items()}
    missing, misshapen, broken, *_ = sorted(experts)
    del experts[missing]
    experts[misshapen] = experts[misshapen].T
    experts[broken][3, 4] = math.nan
    experts["model.layers.0.mlp.gate.weight"] = torch.zeros(E, H)
    with pytest.raises(BitsmoeError) as e:
        write_checkpoint(model, tmp_path / "out", experts)
    for fault in (
        f"{missing} is missing",
        f"{misshapen} has shape",
        f"{broken} holds NaN",
        "mlp.gate.weight is of no routed expert",
    ):
        assert fault in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_round_to_nearest_goes_the_whole_way(tmp_path, model):
    result = run_baseline("rtn", model, None, 3, tmp_path / "out", group_size=8)
    assert result["baseline"] == "rtn"
    assert result["bits"] == 3
    assert result["bpw"] == result["bpw_stored"] == 3 + 19 / 8
    assert result["settings"] == {"group_size": 8}
    assert result["versions"]["torch"] == torch.__version__
    assert result["peak_bytes"] > 50e6  # an interpreter with torch in it, so the unit is bytes
    assert result["seconds"] >= 0
    assert result["cpu_seconds"] >= 0
    before, after = expert_matrices(model), expert_matrices(tmp_path / "out")
    for name, weight in before.items():
        assert torch.equal(after[name], round_to_nearest(weight, 3, 8)), name


def test_every_family_has_the_same_names_in_modules():
    for family in FAMILIES.values():
        if family.text or family.stacked or family.decoder(0) != family.module_decoder(0):
            continue  # of these no baseline is run
        names = Names(family.module_names, family.projections)
        prefix = f"{family.decoder(3)}.{family.experts}.7"
        found = [names.module(f"{prefix}.{projection}.weight") for projection in family.projections]
        assert found == [
            f"model.layers.3.{family.module_experts}.7.{name}_proj.weight" for name in ("gate", "up", "down")
        ]
        assert all(is_expert(name.removesuffix(".weight")) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "DeepseekV3ForCausalLM"])
def test_experts_are_found_whatever_a_family_calls_them(tmp_path, architecture):
    model = make_model(architecture, tmp_path / "model")
    run_baseline("rtn", model, None, 3, tmp_path / "out", group_size=8)
    before, after = (SourceModel(tmp_path / name) for name in ("model", "out"))
    shape = before.shape
    for layer in shape.layers:
        original, rounded = (source.experts(layer, range(shape.num_experts)) for source in (before, after))
        for e in range(shape.num_experts):
            assert torch.equal(rounded.gate_up[e], round_to_nearest(original.gate_up[e], 3, 8))
            assert torch.equal(rounded.down[e], round_to_nearest(original.down[e], 3, 8))


@pytest.mark.slow
def test_a_run_that_fails_shows_its_last_lines(tmp_path, model):
    with pytest.raises(BitsmoeError, match="baseline rtn: ended with status 1") as e:
        run_baseline("rtn", model, None, 3, tmp_path / "out", group_size=7)
    assert "RuntimeError" in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BASELINES)
def test_requests_are_checked_before_any_work(tmp_path, model, windows, name, monkeypatch):
    monkeypatch.setattr("benchmarks.baselines.driver.interpreter", lambda name: pytest.fail("work began"))
    with pytest.raises(BitsmoeError, match=rf"baseline {name}: bits is 2.5.*; no setting 'iterations'"):
        run_baseline(name, model, windows, 2.5, tmp_path / "out", iterations=3)
    if BASELINES[name]:
        with pytest.raises(BitsmoeError, match="no file of token windows"):
            run_baseline(name, model, None, 2, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").touch()
    with pytest.raises(BitsmoeError, match="not an empty directory"):
        run_baseline(name, model, windows, 2, tmp_path / "taken")


def test_unknown_baselines_and_bad_windows_are_refused(tmp_path, model):
    with pytest.raises(BitsmoeError, match="unknown baseline 'awq'; there are gptq, autoround, gguf, hqq, rtn"):
        run_baseline("awq", model, None, 2, tmp_path / "out")
    path = tmp_path / "windows.safetensors"
    with pytest.raises(BitsmoeError, match="not a safetensors file"):
        run_baseline("gptq", model, path, 2, tmp_path / "out")
    save_file({"tokens": torch.zeros(2, 8, dtype=torch.int64)}, path)
    with pytest.raises(BitsmoeError, match="with a tensor 'windows'"):
        run_baseline("gptq", model, path, 2, tmp_path / "out")
    save_file({WINDOWS: torch.zeros(8, dtype=torch.int64)}, path)
    with pytest.raises(BitsmoeError, match=r"has shape \[8\]"):
        run_baseline("gptq", model, path, 2, tmp_path / "out")


def test_windows_are_those_of_the_quantizer(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 800)
    got = write_windows(TINY_MOE, str(text), tmp_path / "windows.safetensors")
    assert got.shape[1] == 512  # the model's longest, less than the quantizer's default
    assert torch.equal(got, text_windows(load_tokenizer(TINY_MOE), open_text(str(text)), 512, 128))
    assert torch.equal(load_file(tmp_path / "windows.safetensors")[WINDOWS], got)


def small_model(**changes):
    """A model of the demo's architecture with random weights, float32."""
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(TINY_MOE, num_experts=E)
    config.update({"hidden_size": H, "moe_intermediate_size": I, "head_dim": 8, "vocab_size": 50, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_importance_is_the_mean_square_of_what_enters_each_matrix():
    model = small_model(num_hidden_layers=2, num_experts_per_tok=2, initializer_range=0.3)
    windows = torch.randint(0, 50, (3, 11))
    got = importance_matrix(model, windows, batch_size=2)
    seen = {}  # of every token, what its experts read

    def keep(module, args):
        seen.setdefault(module, []).append((args[0].reshape(-1, H).double(), args[1].reshape(-1, 2)))

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(windows)
    assert len(got) == 2 * E * 3
    for at, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        entering, hidden = {e: [] for e in range(E)}, {e: [] for e in range(E)}
        for x, chosen in seen[experts]:
            for token, called in zip(x, chosen.tolist(), strict=True):
                for e in called:
                    gate, up = experts.gate_up_proj[e].double().split(I)
                    entering[e].append(token)
                    hidden[e].append(torch.nn.functional.silu(gate @ token) * (up @ token))
        for e in range(E):
            for projection, inputs in (("gate", entering), ("up", entering), ("down", hidden)):
                expected = torch.stack(inputs[e]).square().mean(0).float()
                found = got[f"model.layers.{at}.mlp.experts.{e}.{projection}_proj.weight"]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_an_expert_that_no_token_calls_has_columns_of_equal_importance():
    model = small_model(num_hidden_layers=1, num_experts_per_tok=1)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()  # ties: the same expert for all
    got = importance_matrix(model, torch.arange(20).reshape(2, 10), batch_size=1)
    ones = [e for e in range(E) if torch.equal(got[f"model.layers.0.mlp.experts.{e}.down_proj.weight"], torch.ones(I))]
    assert len(ones) == E - 1
