"""The quality the project promises at the least: 2.5 all-in bits beat round-to-nearest at 3.15."""

from benchmarks.quality import measure, write_held_out_text
from builders import TINY_MOE


def test_two_and_a_half_bits_beat_round_to_nearest_at_three(tmp_path):
    text = tmp_path / "held_out.txt"
    write_held_out_text(TINY_MOE, text)
    ours, rounded = measure(TINY_MOE, "self", text, bits=[2.5], rtn=[3])
    print(ours, rounded)
    assert ours["bpw"] <= 2.5 < 3.1 < rounded["bpw"]
    assert ours["excess"] < rounded["excess"]
    assert ours["kl"] < 0.8 * rounded["kl"]
    assert ours["top1_agreement"] > rounded["top1_agreement"]
