"""The benchmark on a CPU: who computes what in which order, what is counted, what is written. Nothing is timed."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.cpu import bandwidth, layer, llama, report, rounds
from benchmarks.cpu import rivals as in_process
from benchmarks.cpu.__main__ import main
from benchmarks.cpu.rounds import Call, Measured, bytes_of, calls_for, play, turn_calls
from benchmarks.kernels.shapes import SHAPES, Shape
from benchmarks.kernels.synthetic import NATURAL, WHITENED
from bitsmoe_kernels._cpu import library
from bitsmoe_kernels.format.schema import CheckpointConfig

QWEN = SHAPES[0]
SMALL = Shape("small", 128, 96, 4, 2, "made up")


class Fake:
    """A rival that takes a second a call, and writes down what it is asked."""

    bits, expert_bytes, shared_bytes, detail = 2.0, 10.0, 3.0, ""

    def __init__(self, name: str, copies: int, seconds: float, log: list[str]):
        self.name, self.copies, self.seconds, self.log = name, copies, seconds, log
        self.asked: list[list[tuple[int, list[list[int]]]]] = []

    def check(self) -> float:
        return 0.0

    def turn(self, x: Tensor, calls: Sequence[tuple[int, Call]]) -> float:
        self.log.append(self.name)
        self.asked.append([(copy, call.ids.tolist()) for copy, call in calls])
        return self.seconds * len(calls)


@pytest.mark.parametrize(
    "shape",
    [QWEN, SHAPES[2], Shape("experts that top_k does not divide", 64, 64, 10, 4, "made up")],
    ids=lambda s: s.model,
)
def test_calls_of_one_token_share_out_the_experts(shape: Shape):
    calls = calls_for(shape, 1, seed=3)
    dealt = Counter(e for call in calls for e in call.ids.flatten().tolist())
    assert len(calls) == shape.num_experts // shape.top_k
    assert set(dealt.values()) == {1}
    assert set(dealt) <= set(range(shape.num_experts))
    for call in calls:
        assert call.ids.shape == call.weights.shape == (1, shape.top_k)
        assert float(call.weights.sum()) == pytest.approx(1)
    assert [c.ids.tolist() for c in calls] != [c.ids.tolist() for c in calls_for(shape, 1, seed=4)]


def test_a_longer_call_routes_each_token_to_different_experts():
    (call,) = calls_for(QWEN, 16, seed=5)
    assert call.ids.shape == (16, 8)
    assert all(len(set(row)) == 8 for row in call.ids.tolist())
    assert 8 < len(call.ids.unique()) < 128


@pytest.mark.parametrize("tokens", [1, 4])
def test_rivals_get_the_same_calls_whatever_their_copies(tokens: int):
    few, many = turn_calls(QWEN, tokens, 2, 7), turn_calls(QWEN, tokens, 4, 7)
    assert len(few) * 2 == len(many)
    for (copy, call), (other, same) in zip(few, many[: len(few)], strict=True):
        assert copy == other
        assert torch.equal(call.ids, same.ids)
    assert not torch.equal(few[0][1].ids, turn_calls(QWEN, tokens, 2, 8)[0][1].ids)


def test_bytes_of_a_call_count_an_expert_once():
    rival = Fake("a", 1, 1.0, [])
    ids = torch.tensor([[0, 1], [1, 3]], dtype=torch.int32)
    call = Call(torch.ones(2, 2), ids)
    assert bytes_of(rival, [(0, call), (0, Call(torch.ones(1, 2), ids[:1]))]) == (3 + 2) / 2 * 10 + 3


def test_everyone_has_a_turn_in_each_round_and_memory_is_read_before_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rounds, "QUIET_SECONDS", 0)
    log: list[str] = []

    def read() -> float:
        log.append("read")
        return 5e9

    fast, slow = Fake("fast", 2, 0.01, log), Fake("slow", 2, 1.0, log)
    found, bandwidths = play([fast, slow], SMALL, torch.zeros(1, 128), rounds=3, seconds=60, read=read)
    assert log == ["read", "fast", "read", "slow"] * 4  # one more round finds out how long a call takes
    assert bandwidths == [5e9] * 8
    assert found["fast"].seconds == pytest.approx([0.01] * 3)
    assert found["fast"].calls == 4  # two copies of four experts, two of them a call
    assert found["slow"].calls == 1  # longer than a turn
    assert [len(turn) for turn in fast.asked] == [1, 4, 4, 4]
    for theirs, mine in zip(slow.asked, fast.asked, strict=True):
        assert theirs == mine[:1]


def test_a_slow_rival_has_one_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rounds, "QUIET_SECONDS", 0)
    log: list[str] = []
    rivals = [Fake("slow", 1, rounds.SLOW_SECONDS + 1, log), Fake("other", 1, 1.0, log)]
    found, _ = play(rivals, SMALL, torch.zeros(4, 128), rounds=3, seconds=60, read=lambda: 1.0)
    assert log == ["slow", "other"] * 2 + ["other"] * 2
    assert (len(found["slow"].seconds), len(found["other"].seconds)) == (1, 3)


def test_rounds_end_when_the_time_is_up_but_there_are_two(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rounds, "QUIET_SECONDS", 0)
    found, _ = play([Fake("a", 1, 1.0, [])], SMALL, torch.zeros(4, 128), rounds=9, seconds=0, read=lambda: 1.0)
    assert len(found["a"].seconds) == 2


@pytest.mark.parametrize(("text", "expected"), [("307200K\n", 300 << 20), ("32M\n", 32 << 20), ("4096\n", 4096)])
def test_the_last_level_cache(tmp_path: Path, text: str, expected: int):
    (tmp_path / "size").write_text(text)
    assert bandwidth.last_level_bytes(tmp_path / "size") == expected


def test_an_unknown_cache_counts_as_a_large_one(tmp_path: Path):
    assert bandwidth.last_level_bytes(tmp_path / "none") == bandwidth.UNKNOWN_CACHE


@pytest.mark.skipif(library.why_not() is not None, reason="no CPU kernels here, so perhaps no compiler")
@pytest.mark.parametrize("threads", [1, 3])
def test_every_word_is_read(monkeypatch: pytest.MonkeyPatch, threads: int):
    monkeypatch.setattr(bandwidth, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth, "last_level_bytes", lambda: 0)
    reader = bandwidth.Reader(threads)
    assert reader.read() > 0
    reader._buffer[17] = 2  # the sum of what was read is checked
    with pytest.raises(AssertionError):
        reader.read()


def test_a_row_by_hand():
    rival = Fake("llama.cpp Q2_K", 1, 0, [])
    found = layer.row("M", 4, rival, Measured([4e-3, 8e-3, 6e-3], 5, 6e6), 2e9)
    assert (found["microseconds"], found["least"], found["rounds"], found["calls"]) == (1500, 1000, 3, 5)
    assert found["bytes_per_token"] == 1.5e6
    assert found["bandwidth_share"] == pytest.approx(0.5)  # 6 MB in 6 ms are 1 GB/s


def test_ratios_are_to_the_same_layer_and_tokens():
    q2, plain, ours = llama.title("Q2_K"), in_process.VllmPlain.name, "bitsmoe"
    times = [("A", 1, q2, 30.0), ("A", 1, plain, 80.0), ("A", 1, ours, 20.0), ("A", 4, ours, 5.0), ("B", 1, q2, 7.0)]
    rows = [{"model": m, "tokens": t, "rival": n, "microseconds": us} for m, t, n, us in times]
    found = {(r["model"], r["tokens"], r["rival"]): (r["times_q2_k"], r["times_16_bits"]) for r in layer.compared(rows)}
    assert found["A", 1, ours] == (1.5, 4.0)
    assert found["A", 1, q2] == (1.0, pytest.approx(80 / 30))
    assert found["A", 4, ours] == (None, None)
    assert found["B", 1, q2] == (1.0, None)


@pytest.mark.parametrize(("form", "bits"), [(NATURAL, 2.0), (NATURAL, 3.1), (WHITENED, 2.125)])
def test_layers_have_the_bits_asked_for(form: str, bits: float):
    shape = Shape("a quarter", 1024, 384, 32, 4, "made up")
    bare = in_process.bare_bits(shape, form)
    weights = in_process.format_layer(shape, form, in_process.width_mix(bits - bare), 0, "cpu")
    layer_bits = 8 * weights.layer.nbytes(16) / weights.layer.num_weights
    assert layer_bits == pytest.approx(bits, rel=0.02)  # widths are drawn at random


@pytest.mark.parametrize("average", [0.3, 2.0, 3.1, 7.5])
def test_widths_are_spread_around_their_average(average: float):
    mix, bits = in_process.width_mix(average), torch.arange(9.0, dtype=torch.float64)
    assert float(mix.sum()) == pytest.approx(1)
    assert float(mix @ bits) == pytest.approx(average)
    most = int(mix.argmax())
    assert abs(most - average) < 1
    assert bool((mix[: most + 1].diff() > 0).all())
    assert bool((mix[most:].diff() < 0).all())


@pytest.mark.parametrize("average", [0.0, 8.0])
def test_impossible_averages_are_refused(average: float):
    with pytest.raises(ValueError, match="between 0 and 8"):
        in_process.width_mix(average)


@pytest.mark.parametrize("form", [NATURAL, WHITENED])
def test_the_reference_as_a_rival(form: str):
    rival = in_process.Reference(SMALL, form, None)
    assert rival.check() < in_process.ROUNDED
    assert set(rival.weights.tensors["down_bits"].unique().tolist()) == {2}
    x = in_process.made_up_tokens(3, SMALL)
    (call,) = calls_for(SMALL, 3, 0)
    assert rival.forward(0, x, call).shape == x.shape
    assert rival.turn(x, [(0, call)]) > 0


@pytest.mark.skipif(library.why_not() is not None, reason="no CPU kernels here")
@pytest.mark.parametrize("form", [NATURAL, WHITENED])
def test_our_kernels_as_a_rival(form: str):
    best = in_process.Kernels(SMALL, form, None, working_set=300_000)
    for isa in (None, *library.usable()):
        rival = best.using("name", isa)
        assert rival.name == "name" != best.name
        assert rival.check() < in_process.ROUNDED
        assert rival.detail == (isa or library.best())
        assert rival.copies == -(-300_000 // rival._layers[0].nbytes)
        assert len({t.data_ptr() for t in rival._layers}) == rival.copies > 1
        x = in_process.made_up_tokens(3, SMALL)
        (call,) = calls_for(SMALL, 3, 0)
        first, last = rival.forward(0, x, call), rival.forward(rival.copies - 1, x, call)
        assert torch.equal(first, last)
        # What a call reads, times the experts, is the layer.
        assert rival.expert_bytes * SMALL.num_experts + rival.shared_bytes == rival._layers[0].nbytes


@pytest.mark.skipif(library.why_not() is not None, reason="no CPU kernels here")
def test_a_wrong_rival_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    rival = in_process.Kernels(SMALL, NATURAL, None, working_set=1)
    monkeypatch.setattr(rival, "small", lambda x, weights, ids: torch.full_like(x, torch.nan))
    with pytest.raises(ValueError, match="wrong result: relative error nan"):
        rival.check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [in_process.VllmPlain, in_process.VllmInt4, in_process.VllmMxfp4])
def test_vllms_experts_as_rivals(kind: type[in_process.Vllm]):
    platforms = pytest.importorskip("vllm.platforms")
    platforms.current_platform.import_kernels()
    if not kind.able():
        pytest.skip("vLLM has none of this kind for this processor")
    shape = Shape("tiny", 256, 256, 4, 2, "made up")
    rival = kind(shape, working_set=1 << 20)
    assert rival.check() < kind.limit
    x = in_process.made_up_tokens(5, shape)
    (call,) = calls_for(shape, 5, 0)
    # Experts 2 and 3 repeat 0 and 1, in every copy.
    same = Call(call.weights, call.ids % 2)
    assert torch.equal(rival.forward(0, x, call), rival.forward(rival.copies - 1, x, same))
    assert rival.bits > 4
    # Packing keeps experts apart: packed two by two they are what they are packed together.
    together = rival.packed([in_process.repeated(t, 4) for t in rival.plain])
    for packed, both in zip(rival._small, together, strict=True):
        assert torch.equal(in_process.repeated(packed, 4), both)


def machine() -> dict[str, object]:
    return {"processor": "P", "threads": 2, "versions": {"torch": "1"}, "commit": "c"}


@pytest.mark.slow
def test_tables_of_a_layer(tmp_path: Path):
    rival = Fake("bitsmoe natural, 2 bits", 1, 0, [])
    rows = [layer.row("M", t, rival, Measured([1e-3] * 3, 1, 2e6), 4e9) for t in (1, 4)]
    rows.append(layer.row("M", 4, Fake("slow", 1, 0, []), Measured([9.0], 1, 2e6), 4e9))
    data = {"machine": machine(), "rows": layer.compared(rows), "not_measured": {"llama.cpp Q2_K": "no compiler"}}
    text = report.layer_tables(data)
    assert "### M, one token at a time" in text
    assert "| bitsmoe natural, 2 bits | 2.000 | 1,000.0 | 1,000.0 | 2.00 | 50% |  |  |" in text
    first, second = text.split("### M, 4 tokens at once")
    assert "Medians of 3 rounds. Read bandwidth: 4.0 GB/s." in first
    assert "Medians of 3 rounds, but one only of slow. Read bandwidth" in second
    assert "Not measured: llama.cpp Q2_K: no compiler." in text
    report.draw_layer(data, tmp_path / "layer.png")
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")


def test_table_of_serving():
    def rates(value: float) -> dict[str, object]:
        return {"1": {"median": value}}

    rows = [
        {
            "model": "m",
            "method": "vLLM, 16-bit",
            "tokens_per_second": rates(10),
            "bits_per_weight": None,
            "resident_bytes": 11_000_000_000,
            "expert_bytes": 8_000_000_000,
            "dense_bits": 16,
        },
        {
            "model": "m",
            "method": "bitsmoe natural",
            "tokens_per_second": rates(25),
            "bits_per_weight": 2.125,
            "resident_bytes": 4_100_000_000,
            "expert_bytes": 1_000_000_000,
            "dense_bits": 16,
        },
        {
            "model": "m",
            "method": "bitsmoe natural, dense 4 bits",
            "tokens_per_second": rates(20),
            "resident_bytes": 3_000_000_000,
            "expert_bytes": 1_000_000_000,
            "dense_bits": 4,
        },
        {"model": "m", "method": "bitsmoe 8-bit basis", "failed": "RuntimeError:\nno memory"},
    ]
    text = report.serving_table({"machine": machine(), "layers": {"m": 12}, "vocabulary": 4096, "rows": rows})
    assert "### m, 12 layers, 4096 words" in text
    assert "| vLLM, 16-bit |  | 10.0 | 1.00 | 11.00 | 1.000 |" in text
    assert "| bitsmoe natural | 2.125 | 25.0 | 2.50 | 4.10 | 1.100 |" in text
    assert "| bitsmoe natural, dense 4 bits |  | 20.0 | 2.00 | 3.00 |  |" in text
    assert "| bitsmoe 8-bit basis |  |  |  |  |  |" in text
    assert "Failed: m, bitsmoe 8-bit basis: no memory" in text


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "mixtral-8x7b", "rehearsal"])
def test_models_that_vllm_makes_up(tmp_path: Path, model: str):
    from benchmarks.cpu import serving

    for number, method in enumerate(serving.METHODS):
        directory = tmp_path / str(number)
        directory.mkdir()
        bits = serving.write_model(model, 2, method, directory)
        config = json.loads((directory / "config.json").read_text())
        assert (config["num_hidden_layers"], config["vocab_size"]) == (2, 4096)
        assert (directory / "tokenizer.json").is_file()
        if method.name != serving.BITSMOE:
            assert bits is None
            continue
        parsed = CheckpointConfig.parse(config["quantization_config"])
        assert bits == parsed.bpw == pytest.approx(parsed.all_in_bpw())
        assert bits == pytest.approx(2.125, abs=2e-3)  # a whole number of rows of codes
        assert (parsed.linear_quantization is None) == (method.dense_bits == 16)
        (some, *_) = parsed.layers.values()
        assert (some.projections["gate_up"].basis is not None) == method.basis


@pytest.mark.slow
def test_requests_of_a_batch_differ_and_come_again():
    from benchmarks.cpu import serving

    first = serving.requests(4, 16, 8, number=1)
    assert len({tuple(body["prompt"]) for body in first}) == 4
    assert all(len(body["prompt"]) == 16 and max(body["prompt"]) < 4096 for body in first)
    assert all(body["max_tokens"] == body["min_tokens"] == 8 for body in first)
    assert first == serving.requests(4, 16, 8, number=1) != serving.requests(4, 16, 8, number=2)


def command(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.cpu", *args])
    main()


@pytest.mark.slow
@pytest.mark.skipif(library.why_not() is not None, reason="no CPU kernels here")
def test_the_command_with_a_tiny_layer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bandwidth, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth, "last_level_bytes", lambda: 0)
    command(
        monkeypatch, "layer", "--rehearse", "--only", "bitsmoe", "reference", "--tokens", "1", "3", "--threads", "1",
        "--out", str(tmp_path), "--json",
    )  # fmt: skip
    data = json.loads((tmp_path / report.LAYER_FILE).read_text())
    assert json.loads(capsys.readouterr().out) == data
    assert {r["tokens"] for r in data["rows"]} == {1, 3}
    assert len(data["rows"]) == 2 * len(data["rivals"]) == 6
    assert data["machine"]["threads"] == 1
    assert data["machine"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert all(r["relative_error"] < in_process.ROUNDED for r in data["rivals"])
    assert {f.name for f in tmp_path.iterdir()} == {"cpu-layer.json", "cpu-layer.md", "cpu-layer.png"}
    command(monkeypatch, "tables", "--results", str(tmp_path))
    assert capsys.readouterr().out.strip() == (tmp_path / "cpu-layer.md").read_text().strip()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["layer", "--models", "llama"], "no model llama; there are Qwen3-30B-A3B, Mixtral-8x7B"),
        (["layer", "--rehearse", "--only", "xyz"], "no rival's name holds xyz"),
        (["layer", "--isa", "sse2"], "sse2 cannot run here"),
    ],
)
def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str):
    monkeypatch.setattr(bandwidth, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth, "last_level_bytes", lambda: 0)
    with pytest.raises(SystemExit, match=said):
        command(monkeypatch, *arguments)
