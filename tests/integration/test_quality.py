"""The quality the project promises at the least: 2.5 all-in bits beat round-to-nearest at 3.15."""

import pytest

from benchmarks.rtn import write_rounded
from builders import TINY_MOE
from offline_quant.calibration import load_tokenizer, sample_windows
from offline_quant.config import QuantizeConfig
from offline_quant.evaluate import evaluate
from offline_quant.model_adapter import SourceModel
from offline_quant.pipeline import quantize_model
from offline_quant.streaming import StreamedModel

CALIBRATION_SEED, HELD_OUT_SEED = 0, 1


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory):
    """Text the model wrote, not used for calibration."""
    tokenizer = load_tokenizer(TINY_MOE)
    windows = sample_windows(StreamedModel(SourceModel(TINY_MOE)), tokenizer, 64, 512, HELD_OUT_SEED)
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text("".join(tokenizer.batch_decode(windows, skip_special_tokens=True)), encoding="utf-8")
    return path


def test_two_and_a_half_bits_beat_round_to_nearest_at_three(tmp_path, held_out):
    config = QuantizeConfig(bits=2.5, calib="self", calib_samples=64, seed=CALIBRATION_SEED)
    quantize_model(str(TINY_MOE), tmp_path / "ours", config)
    rounded_bpw = write_rounded(TINY_MOE, tmp_path / "rounded", bits=3)
    ours, rounded = (evaluate(tmp_path / name, held_out, TINY_MOE) for name in ("ours", "rounded"))
    base = ours.perplexity_reference
    print(f"base {base:.3f}; ours {ours.bpw:.3f} bpw {ours}; round-to-nearest {rounded_bpw:.3f} bpw {rounded}")
    assert ours.bpw <= 2.5 < rounded_bpw
    assert ours.perplexity - base < rounded.perplexity - base
    assert ours.kl < 0.8 * rounded.kl
    assert ours.top1_agreement > rounded.top1_agreement
