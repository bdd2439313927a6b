"""The quality the project promises at the least: 2.5 all-in bits beat round-to-nearest at 3.15."""

from benchmarks import quality
from benchmarks.quality import Row, measure, write_held_out_text
from builders import TINY_MOE
from offline_quant.evaluation.evaluate import Reference


def test_two_and_a_half_bits_beat_round_to_nearest_at_three(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "HELD_OUT_WINDOWS", 12)
    text, calib = tmp_path / "held_out.txt", tmp_path / "calib.txt"
    write_held_out_text(TINY_MOE, text)
    write_held_out_text(TINY_MOE, calib, seed=0)
    references = [Reference(TINY_MOE, text), Reference(TINY_MOE, calib)]
    ours = measure(TINY_MOE, str(calib), references, Row("bitsmoe", "bitsmoe", 2.5))
    rounded = measure(TINY_MOE, str(calib), references, Row("round-to-nearest", "rtn", 3))
    print(ours, rounded)
    assert ours["bpw"] <= 2.5 < 3.1 < rounded["bpw"]
    assert ours["excess"] < rounded["excess"]
    assert ours["kl"] < 0.8 * rounded["kl"]
    assert ours["top1_agreement"] > rounded["top1_agreement"]
    assert ours["second"]["kl"] < 0.8 * rounded["second"]["kl"]
    assert ours["second"]["kl"] != ours["kl"]
