"""The table of docs/results.md, and the README's short one, from the committed results of both models.

python -m benchmarks.quality_summary [--short]
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.baselines.gguf import bits_of
from benchmarks.quality import GGUF_TYPES, GROUPS, OURS, STRONG, Row, figure_text, table_head
from benchmarks.record import ROOT

RESULTS = ROOT / "benchmarks" / "results"
MODELS = ("tiny_moe", "wide_moe")
LIBRARIES = ("llmcompressor", "auto-round", "llama_cpp_python", "hqq")
"""Whose version is named."""
SHORT = {OURS: 2.125, "autoround": 2, "gptq": 2, "gguf": 2, "hqq": 2, "rtn": 2}
"""Method -> the budget or code width that the short table shows."""


def _picked() -> list[tuple[str, Row]]:
    """Rows shown and what they are called, the best methods first."""
    rows = [r for name in ("main", "objectives", "ablation") for r in GROUPS[name]]

    def take(name: str, method: str, bits: float, **options: Any) -> tuple[str, Row]:
        return name, next(r for r in rows if (r.method, r.bits, r.options) == (method, bits, options))

    def gguf(kind: str) -> tuple[str, Row]:
        return take(f"GGUF {kind}, importance matrix", "gguf", bits_of(kind), type=kind)

    return [
        *(take("**bitsmoe**", OURS, bits) for bits in (1.75, 2.0, 2.125, 2.5, 3.125)),
        take("**bitsmoe `--budget model`**", OURS, 2.125, budget="model"),
        take("**bitsmoe `--fit layer`**", OURS, 2.125, fit="layer"),
        *(take("**bitsmoe `--tune`**", OURS, bits, tune=True) for bits in (2.125, 3.125)),
        take("**bitsmoe `--tune --tune-codes`**", OURS, 2.125, tune=True, tune_codes=True),
        take("bitsmoe `--objective alphaq` (AlphaQ's allocation)", OURS, 2.5, objective="alphaq"),
        take("bitsmoe `--objective bt-moe` (BT-MoE's)", OURS, 2.5, objective="bt-moe"),
        *(take("AutoRound g128, 200 iterations", "autoround", bits) for bits in (2, 3)),
        *(take("GPTQ g128", "gptq", bits) for bits in (2, 3)),
        take("GPTQ g128, its strongest settings", "gptq", 2, **STRONG),
        *(gguf(kind) for kind in GGUF_TYPES if kind not in ("IQ1_M", "IQ3_S")),
        take("HQQ g64", "hqq", 2),
        take("round-to-nearest g128", "rtn", 2),
    ]


def table(results: Path = RESULTS, short: bool = False) -> str:
    """Bits per weight, KL divergence and excess perplexity on every model, with standard errors where measured.

    The short table has the rows near 2 bits, without the other objectives.
    """
    found = {}
    for model in MODELS:
        data = json.loads((results / f"quality-{model}.json").read_text(encoding="utf-8"))
        found[model] = {row["key"]: row for row in data["rows"]}
    head = ["method"] + [f"{model}: {figure}" for model in MODELS for figure in ("bpw", "KL", "excess")]
    lines = table_head(head)
    for name, row in _picked():
        if short and row.bits != SHORT[row.method]:
            continue
        cells = []
        for model in MODELS:
            r = found[model][row.key]
            versions = r["run"].get("versions", {})
            library = next((f" ({k} {versions[k]})" for k in LIBRARIES if k in versions), "")
            cells += [f"{r['bpw']:.3f}", f"{r['kl']:.4f}", figure_text(r, "excess", 2)]
        lines.append(f"| {name}{library} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the README's table")
    print(table(short=parser.parse_args().short))
