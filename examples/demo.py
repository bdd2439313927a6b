"""The main job on the demo model: quantize it, serve it with vLLM, ask both models to go on with a sentence.

    make demo

Everything is written below build/demo; report.json there holds the figures. No text is needed: the model writes its own
calibration text, and, from another seed, the text its perplexity is measured on.
"""

import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from rich.console import Console
from rich.table import Table

import bitsmoe
from offline_quant.calibration.sources.self_written import write_sampled_text
from offline_quant.calibration.windows import load_tokenizer
from offline_quant.model.source import SourceModel
from offline_quant.model.streaming import StreamedModel
from vllm_server import serve

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny_moe"
OUT = ROOT / "build" / "demo"
BITS, CALIB_SAMPLES = 2.25, 64
PROMPT = "The old man looked at the sea, and"
MAX_TOKENS = 40
HELD_OUT_WINDOWS, HELD_OUT_SEED = 32, 1

console = Console(highlight=False)


def step(title: str) -> None:
    """Announce a step."""
    console.rule(f"[bold]{title}", align="left")


def completion(model: Path, name: str) -> str:
    """What a server of this checkpoint answers over HTTP."""
    with (
        console.status(f"vllm serve ({name})"),
        serve(model, "--enforce-eager", "--max-model-len", "512", log=OUT / f"serve_{name}.log") as server,
    ):
        text: str = server.complete(PROMPT, MAX_TOKENS)["text"]
    return text


def size(model: Path) -> int:
    """Bytes of all weights."""
    return sum(p.stat().st_size for p in model.glob("*.safetensors"))


def main() -> None:
    """Run the demo."""
    start = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    quantized = OUT / "tiny_moe-bitsmoe"

    step(f"bitsmoe quantize examples/tiny_moe --bits {BITS} --calib self --calib-samples {CALIB_SAMPLES}")
    result = bitsmoe.quantize(MODEL, quantized, bits=BITS, calib="self", calib_samples=CALIB_SAMPLES)

    step("bitsmoe eval, on text the model wrote with another seed")
    held_out = OUT / "held_out.txt"
    original = StreamedModel(SourceModel(MODEL))
    write_sampled_text(original, load_tokenizer(MODEL), held_out, HELD_OUT_WINDOWS, 512, HELD_OUT_SEED)
    figures = bitsmoe.evaluate(quantized, held_out, MODEL)

    step("vllm serve, both models")
    answers = {name: completion(path, name) for name, path in (("original", MODEL), ("quantized", quantized))}

    report = {
        "bpw": result.report.bpw,
        "size_original": size(MODEL),
        "size_quantized": size(quantized),
        "perplexity_original": figures.perplexity_reference,
        "perplexity_quantized": figures.perplexity,
        "kl": figures.kl,
        "top1_agreement": figures.top1_agreement,
        "prompt": PROMPT,
        "completion_original": answers["original"],
        "completion_quantized": answers["quantized"],
        "seconds": round(time.monotonic() - start, 1),
    }
    (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    table = Table(title="Result", title_justify="left")
    for column in ("", "original", "quantized"):
        table.add_column(column)
    table.add_row("bits per expert weight, all-in", "16", f"{report['bpw']:.4f}")
    table.add_row("size on disk", f"{size(MODEL) / 1e6:.2f} MB", f"{size(quantized) / 1e6:.2f} MB")
    table.add_row("perplexity", f"{figures.perplexity_reference:.3f}", f"{figures.perplexity:.3f}")
    table.add_row("KL divergence, nats per token", "", f"{figures.kl:.4f}")
    table.add_row("prompt", PROMPT, PROMPT)
    table.add_row("completion over HTTP", answers["original"].strip(), answers["quantized"].strip())
    console.print(table)
    console.print(f"{report['seconds']:.0f} s; figures in {(OUT / 'report.json').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
