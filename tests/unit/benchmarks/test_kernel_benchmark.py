"""The kernel benchmark without a GPU: what it would run, what it counts, what it writes, what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import baselines, results, timing
from benchmarks.kernels.experts import GROUP, compulsory_bytes, reference, relative_error
from benchmarks.kernels.routing import REALISTIC, UNIFORM, route
from benchmarks.kernels.shapes import REHEARSAL, SHAPES, Shape
from benchmarks.kernels.synthetic import FORMS, NATURAL, WHITENED, BitsmoeExperts, format_layer, width_mix
from bitsmoe_kernels.layout.matrices import matrix_rows
from bitsmoe_kernels.reference import moe_forward

REPO = Path(__file__).resolve().parents[3]
SMALL = Shape("small", 96, 80, 3, 2, "made up")


def command(*args: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(REPO), str(REPO / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", *args],
        cwd=REPO, env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "layers", "weights"),
    # Layers with routed experts, and the weights of those: most of the models' published sizes.
    [
        ("Qwen3-30B-A3B", 48, 28.99e9),
        ("Qwen3-235B-A22B", 94, 227.1e9),
        ("Mixtral-8x7B", 32, 45.10e9),
        ("DeepSeek-V2-Lite", 26, 14.40e9),
    ],
)
def test_shapes_add_up_to_the_models(model: str, layers: int, weights: float):
    shape = next(s for s in SHAPES if s.model == model)
    assert layers * shape.num_experts * shape.expert_weights == pytest.approx(weights, rel=1e-3)
    # What the baselines and the plain kernels take for granted.
    assert shape.hidden_size % GROUP == 0
    assert shape.intermediate_size % GROUP == 0


@pytest.mark.parametrize("form", FORMS)
def test_synthetic_layers_are_layers_of_the_format(form: str):
    weights = format_layer(SMALL, form, 2.0, seed=3, device="cpu")
    specs = weights.layer.tensor_specs(weights.block_size)
    assert set(specs) == set(weights.tensors)
    for name, spec in specs.items():
        assert weights.tensors[name].dtype == spec.dtype, name
        assert weights.tensors[name].shape == spec.shape, name
    assert bool((weights.tensors["gate_up_component_scale"] > 0).all())
    assert (weights.layer.projections["gate_up"].basis is not None) == (form == WHITENED)


@pytest.mark.parametrize("form", FORMS)
def test_synthetic_layers_in_the_kernels_layout(form: str):
    weights = format_layer(SMALL, form, 2.0, seed=3, device="cpu")
    experts = BitsmoeExperts(weights, torch.bfloat16, 90)
    for e in range(SMALL.num_experts):
        stored, _ = matrix_rows(experts.layer.down, e, experts.layer.kwidth)
        # Every code of one to four bits is in the layout once; the rest is padding.
        bits = weights.tensors["down_bits"][e].repeat_interleave(16)[: SMALL.intermediate_size]
        used = sum(len(rows) for rows in stored.values())
        assert int((bits > 0).sum()) <= used < int((bits > 0).sum()) + 64
        total = sum(int(rows[:, : SMALL.hidden_size].long().sum()) for rows in stored.values())
        assert total == int(weights.projections["down"].codes(e).long().sum())
    copy = experts.copy()
    for name, tensor in experts.layer.tensors().items():
        assert torch.equal(copy.layer.tensors()[name], tensor)
        assert tensor.numel() == 0 or copy.layer.tensors()[name].data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_the_check_of_our_layers_knows_the_format(form: str):
    """`dense` is written anew for the benchmark; the format's own reference must agree."""
    weights = format_layer(SMALL, form, 2.0, seed=5, device="cpu")
    experts = BitsmoeExperts(weights, torch.float16, 90)
    x = torch.randn(5, SMALL.hidden_size)
    w, ids = route(UNIFORM, 5, SMALL.num_experts, SMALL.top_k, 0, "cpu")
    assert relative_error(moe_forward(weights, x, w, ids), reference(experts, x, w, ids)) < 1e-5


@pytest.mark.parametrize("average", [0.5, 1.75, 2.0, 3.2])
def test_widths_have_the_average_asked_for(average: float):
    mix = width_mix(average)
    assert float(mix.sum()) == pytest.approx(1)
    assert float(mix @ torch.arange(5.0, dtype=torch.float64)) == pytest.approx(average)
    assert bool((mix > 0).all())


@pytest.mark.parametrize("average", [0.0, 4.0, 7.0])
def test_impossible_averages_are_refused(average: float):
    with pytest.raises(ValueError, match="between 0 and 4"):
        width_mix(average)


def test_routing():
    shape = SHAPES[0]
    for kind in (UNIFORM, REALISTIC):
        weights, ids = route(kind, 512, shape.num_experts, shape.top_k, 4, "cpu")
        assert ids.shape == weights.shape == (512, 8)
        assert all(len(set(row)) == 8 for row in ids.tolist())
        assert int(ids.min()) >= 0
        assert int(ids.max()) < shape.num_experts
        torch.testing.assert_close(weights.sum(1), torch.ones(512))
        assert torch.equal(ids, route(kind, 512, shape.num_experts, shape.top_k, 4, "cpu")[1])
        busiest = int(ids.flatten().bincount().max()) / (512 * 8 / 128)
        assert (busiest > 3) == (kind == REALISTIC)


def test_bytes_by_hand():
    """One tile of each width, 16-bit words counted as they are stored; hit experts, basis and tokens in and out."""
    shape = Shape("by hand", 64, 64, 2, 1, "made up")
    weights = format_layer(shape, WHITENED, 2.0, seed=0, device="cpu")
    for name in ("gate_up", "down"):
        bits = torch.full_like(weights.tensors[f"{name}_bits"], 2)
        weights.tensors[f"{name}_bits"] = bits
        rows, F = int(bits.sum()), weights.tensors[f"{name}_codes"].shape[1]
        weights.tensors[f"{name}_codes"] = torch.zeros(rows, F, dtype=torch.int16)
    experts = BitsmoeExperts(weights, torch.bfloat16, 90)
    gate_up = 64 * 128 * 2 // 8 + 64 * 12 + 128 * 4
    down = 64 * 64 * 2 // 8 + 64 * 12 + 64 * 4
    assert experts.expert_bytes() == [gate_up + down] * 2
    assert experts.shared_bytes() == 64 * 64 + 64 * 4
    moved = compulsory_bytes(experts, [1, 1, 1], tokens=3, hidden_size=64, itemsize=2)
    assert moved == gate_up + down + 64 * 64 + 64 * 4 + 2 * 3 * 64 * 2
    assert compulsory_bytes(experts, [0, 1], 3, 64, 2) - moved == gate_up + down


def test_bytes_follow_the_widths():
    experts = BitsmoeExperts(format_layer(SMALL, NATURAL, 2.0, 1, "cpu"), torch.float16, 90)
    layer = experts.layer
    parts = (layer.inputs.codes32, layer.inputs.codes16, layer.down.codes32, layer.down.codes16)
    used = [int(m.tiles.sum()) * 64 * 12 + int(m.columns.sum()) * 4 for m in (layer.inputs, layer.down)]
    assert sum(experts.expert_bytes()) == sum(p.nbytes for p in parts) + sum(used)
    assert experts.shared_bytes() == 0


def test_plain_baselines_count_all_their_weights():
    gen = torch.Generator().manual_seed(0)
    shape = REHEARSAL[0]
    plain = baselines.PlainExperts(shape, torch.bfloat16, gen)
    assert plain.expert_bytes() == [2 * shape.expert_weights] * shape.num_experts
    int4 = baselines.Int4Experts(shape, torch.bfloat16, gen)
    assert int4.expert_bytes() == [shape.expert_weights // 2 + 2 * shape.expert_weights // GROUP] * shape.num_experts
    assert int4.copy().tensors["w13"].data_ptr() != int4.tensors["w13"].data_ptr()


def test_marlin_order():
    """Every weight is in the words once, and where a lane of the matrix instruction looks for it."""
    K, N = 32, 128
    codes = torch.randint(0, 16, (K, N), generator=torch.Generator().manual_seed(0))
    words = baselines.marlin_words(codes)
    assert words.shape == (K // 16, 2 * N)
    assert torch.equal(baselines.marlin_codes(words), codes.int())
    # Tile (1, 1), lane 6 of the instruction, its third group of 16 outputs: inputs 4, 5, 12, 13; outputs 33 and 41.
    word = int(words[1, 128 + 6 * 4 + 2]) & 0xFFFFFFFF
    k, n = 16 + torch.tensor([4, 5, 12, 13]), 64 + 32 + torch.tensor([1, 9])
    wanted = codes[k][:, n].mT.flatten().tolist()
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of each of the eight: even ones low, odd ones high
    assert [word >> 4 * nibble & 15 for nibble in order] == wanted


def test_marlin_scales():
    scales = torch.arange(2 * 128.0).view(2, 128)
    moved = baselines.marlin_scales(scales)
    assert moved[0, :10].tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 1, 9]
    assert moved[1, 64].item() == 192
    assert torch.equal(baselines.marlin_scales(moved), scales)


def test_calls_go_beyond_the_cache():
    l2 = 60_000_000
    for moved in (1_000_000, 13_600_000, 160_000_000, 5_000_000_000):
        calls = timing.calls_needed(moved, l2)
        assert calls == timing.MOST_CALLS or calls * moved >= 4 * l2
        assert timing.copies_needed(calls, 12 * moved) * min(12 * moved, timing.MOST_BYTES) >= min(
            4 * l2, calls * moved
        )


def row(**updates: object) -> dict[str, object]:
    return {
        "model": SHAPES[0].model, "method": "bitsmoe, whitened basis", "dtype": "bfloat16", "bits": 2.0, "tokens": 64,
        "routing": "realistic", "bits_per_weight": 2.1, "microseconds": 50.0, "again": 51.0, "share": 0.71,
        "split": {"gate_up_kernel": 25.0}, "source": "abc",
    } | updates  # fmt: skip


def test_results_go_on_where_they_stopped(tmp_path: Path):
    header = {"rehearsal": False, "machine": {"gpu": "G", "torch": "1", "triton": "2", "commit": "c"}}
    current = {"bitsmoe, whitened basis": "abc", "other": "new"}
    first = results.Results(tmp_path / "r.json", header, current)
    first.add(row())
    first.add(row(tokens=128))
    first.add(row(tokens=128, microseconds=70.0))
    first.add(row(method="other", source="old"))
    first.miss("third", ["m"], "no such thing")
    again = results.Results(tmp_path / "r.json", header, current)
    assert [(r["tokens"], r["microseconds"]) for r in again.rows] == [(64, 50.0), (128, 70.0)]
    assert again.rows[0]["commit"] == "c"
    assert again.data["not_measured"] == []
    elsewhere = {"rehearsal": False, "machine": {**header["machine"], "gpu": "H"}}
    assert results.Results(tmp_path / "r.json", elsewhere, current).rows == []
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.slow
def test_table_and_picture(tmp_path: Path):
    rows = [row(tokens=t, microseconds=float(t)) for t in (8, 64)]
    rows += [
        row(tokens=8, method="4-bit g128, GPTQ-Marlin", microseconds=13.0, split={}),
        row(tokens=64, method="2-bit g128, Humming", microseconds=96.0, split={}),
    ]
    machine = {"gpu": "G", "torch": "1", "triton": "2", "commit": "c"}
    missing = [{"method": "16-bit", "models": ["m"], "reason": "vllm is not installed"}]
    data = {"rehearsal": False, "machine": machine, "rows": rows, "not_measured": missing}
    text = results.as_markdown(data)
    assert "times faster than 4-bit g128, GPTQ-Marlin, realistic, bar 1.5 at 8 to 256 tokens: 8: 1.62" in text
    assert "times faster than 2-bit g128, Humming, realistic, bar 1.0 at 8 to 256 tokens: 64: 1.50" in text
    assert "share of copy bandwidth at 64 tokens, realistic, bar 70%: 71%" in text
    assert "- 16-bit (m): vllm is not installed" in text
    results.draw(data, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.slow
def test_without_a_gpu():
    done = command()
    assert done.returncode != 0
    assert "there is no CUDA device" in done.stderr
    assert "--rehearse" in done.stderr
    assert "--machine-code" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--rehearse", "--models", "GPT-5"), "no model GPT-5; there are rehearsal"),
        (("--rehearse", "--methods", "abacus"), "no method holds abacus"),
        (("--rehearse", "--marlin", "nowhere.so"), "--marlin nowhere.so: no such file"),
        (("--json",), "--json goes with --machine-code"),
    ],
)
def test_wrong_options(args: tuple[str, ...], said: str):
    done = command(*args)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.nightly
@pytest.mark.slow
def test_rehearsal(tmp_path: Path):
    """Our layer, a baseline and two that need a GPU, through processes, checks, files and table."""
    asked = (
        "--rehearse", "--out", str(tmp_path), "--methods", "whitened", "4-bit g128, plain", "Marlin", "Humming",
        "--tokens", "1", "--routing", "realistic",
    )  # fmt: skip
    done = command(*asked)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens, realistic: ran") == 2
    data = json.loads((tmp_path / "kernels-rehearsal.json").read_text())
    assert data["rehearsal"] is True
    assert [r["method"] for r in data["rows"]] == ["bitsmoe, whitened basis", "4-bit g128, plain Triton"]
    for found in data["rows"]:
        assert found["microseconds"] is found["share"] is found["again"] is None
        assert 0 < found["error"] < 1e-2
        assert found["bytes"] > 0
    assert {n["method"] for n in data["not_measured"]} == {"4-bit g128, GPTQ-Marlin", "2-bit g128, Humming"}
    assert all(n["reason"] == "needs a CUDA device" for n in data["not_measured"])
    assert "nothing was timed" in done.stdout
    assert not (tmp_path / "kernels-rehearsal.png").exists()
    again = command(*asked)
    assert again.returncode == 0, again.stderr
    assert "ran" not in again.stderr
    assert json.loads((tmp_path / "kernels-rehearsal.json").read_text())["rows"] == data["rows"]
