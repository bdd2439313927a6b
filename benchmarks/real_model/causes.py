"""Where the error of a quantized first cut comes from, layer by layer.

    python -m benchmarks.real_model.causes CHECKPOINT [--folder DIR] [--out DIR]

CHECKPOINT is a bitsmoe checkpoint of the first cut, untuned by `--tune-model`. The text is the test text. Per layer:

    own          relative error of the MLP's output on the original's inputs; of gate and up, or of down, alone
    drift        the same of the original's MLP on the quantized model's inputs
    least        the least relative error of a linear layer at as many bits, by the rate-distortion bound of Gaussian
                 weights, on inputs of the original's second moments
    KL alone     of the original with only this layer quantized
    KL without   of the quantized model with only this layer's original

Writes causes-NAME.json, .md and .png.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, silu

import bitsmoe
from benchmarks.quality import environment
from benchmarks.real_model import all_active
from benchmarks.real_model.routed import dense_model
from benchmarks.record import ROOT, write_json
from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.calibration.sources.registry import open_text
from offline_quant.calibration.windows import load_tokenizer, text_windows

WINDOWS, LENGTH = 8, 512
"""Of the test text."""


@dataclass
class Layer:
    """Figures of one layer. Errors are relative to the energy of what is compared, and of MLPs in the median token.

    Attributes:
        own, own_gate_up, own_down: of the MLP's output, inputs of the original.
        drift: of the original's MLP on the inputs of the quantized model.
        total: of the quantized model's MLP on its own inputs.
        state: of the hidden states that leave the layer.
        gate_up, down: of the projections' outputs over all tokens, inputs of the original.
        least_gate_up, least_down: the bound on these.
        kl_alone, kl_without: nats per token.
        largest_token: energy of the largest token of the MLP's output, times that of the median one.
        largest_channel: share of the largest channel in the energy of the MLP's inputs.
    """

    own: float
    own_gate_up: float
    own_down: float
    drift: float
    total: float
    state: float
    gate_up: float
    down: float
    least_gate_up: float
    least_down: float
    kl_alone: float
    kl_without: float
    largest_token: float
    largest_channel: float


def least_error(variances: Tensor, bits: float) -> float:
    """Rate-distortion bound of independent Gaussian components under squared error (reverse water-filling).

    Args:
        variances: [n], of the components.
        bits: for a component, on average.

    Returns:
        The least error, relative to the sum of the variances.
    """
    v = variances.double().clamp(min=0).sort(descending=True).values
    v = v[v > 0]
    logs = v.log2().cumsum(0)
    counts = torch.arange(1, len(v) + 1, dtype=v.dtype)
    # The water level if the n largest components get bits; right where it lies below the n-th and not the next.
    level = ((logs - 2 * bits * len(variances)) / counts).exp2()
    water = level[(level < v).nonzero()[-1]]
    return float(v.minimum(water).sum() / v.sum())


def least_linear_error(weight: Tensor, moments: Tensor, bits: float) -> float:
    """`least_error` of a linear layer in the principal directions of its inputs.

    Args:
        weight: [N, K].
        moments: [K, K], of the inputs.
        bits: for a weight.
    """
    energies, directions = torch.linalg.eigh(moments.double())
    return least_error(energies.clamp(min=0) * (weight.double() @ directions).square().mean(0), bits)


def channel_order(original: Any, quantized: Any, experts: int) -> Tensor:
    """Which channel of the original each channel of a quantized MLP is: a checkpoint orders them anew in each expert.

    Args:
        original, quantized: MLPs of Llama with `experts` parts of equally many channels.
        experts: how many.

    Returns:
        int64 [I].
    """

    def channels(mlp: Any) -> Tensor:
        rows = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], 1)
        return torch.nn.functional.normalize(rows.detach()).view(experts, -1, rows.shape[1])

    alike = (channels(quantized) @ channels(original).mT).argmax(-1)  # [experts, channels of one]
    order = (alike + alike.shape[1] * torch.arange(experts)[:, None]).flatten()
    if len(order.unique()) < len(order):
        raise BitsmoeError("channels of the quantized experts cannot be told apart: is it a checkpoint of this model?")
    return order


def reorder(mlp: Any, order: Tensor) -> None:
    """Put channel i of an MLP to place order[i]."""
    back = order.argsort()
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = getattr(mlp, name).weight
        weight.data = weight.data.index_select(dim, back)


@dataclass
class Trace:
    """What passes through a model, over all windows.

    Attributes:
        entering: [n, L, H] of each layer, and the last one's result.
        inputs: [n * L, H] of each MLP.
    """

    entering: list[Tensor]
    inputs: list[Tensor]


def trace(model: Any, windows: Tensor) -> Trace:
    """Run a Llama and keep what passes.

    Args:
        model: of transformers.
        windows: int64 [n, L].
    """
    kept = Trace([], [])
    hooks = []
    for layer in model.model.layers:
        hooks += [
            layer.register_forward_pre_hook(lambda _, args: kept.entering.append(args[0])),
            layer.mlp.register_forward_pre_hook(lambda _, args: kept.inputs.append(args[0].flatten(0, 1))),
        ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: kept.entering.append(args[0])))
    model.model(windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


def activations(mlp: Any, x: Tensor) -> Tensor:
    """What enters the down projection of a Llama's MLP."""
    return silu(mlp.gate_proj(x)) * mlp.up_proj(x)


def relative(error: Tensor, value: Tensor) -> float:
    """Energy of an error beside that of a value, [tokens, H]: of the median token."""
    return (error.square().sum(-1) / value.square().sum(-1)).median().item()


def of_all(error: Tensor, value: Tensor) -> float:
    """Energy of an error beside that of a value, over all tokens."""
    return (error.square().sum() / value.square().sum()).item()


@contextmanager
def replaced(layer: Any, mlp: Any) -> Iterator[None]:
    """Another MLP in a layer."""
    mine, layer.mlp = layer.mlp, mlp
    try:
        yield
    finally:
        layer.mlp = mine


def divergence(model: Any, first: int, entering: Tensor, logs: list[Tensor]) -> float:
    """KL to a model whose predictions are known, nats per token.

    Args:
        model: a Llama.
        first: layer to begin with; the number of layers: none is run.
        entering: [n, L, H], what enters it.
        logs: log probabilities [L, V] of each window.
    """
    layers = model.model.layers
    model.model.layers = layers[first:]
    try:
        total = sum(
            (p.exp() * (p - log_softmax(model(inputs_embeds=x[None], use_cache=False).logits[0], -1))).sum(-1).mean()
            for x, p in zip(entering, logs, strict=True)
        )
    finally:
        model.model.layers = layers
    return float(total) / len(logs)


@torch.no_grad()
def causes(original: Any, quantized: Any, windows: Tensor, experts: int, bits: float) -> tuple[list[Layer], float]:
    """Figures of every layer, and the KL divergence of the whole quantized model in nats per token.

    Args:
        original, quantized: Llamas of transformers, alike but for their MLPs.
        windows: int64 [n, L].
        experts: parts of an MLP whose channels are ordered by themselves.
        bits: all-in bits per weight of `quantized`.
    """
    for a, b in zip(original.model.layers, quantized.model.layers, strict=True):
        reorder(b.mlp, channel_order(a.mlp, b.mlp, experts))
    before, after = trace(original, windows), trace(quantized, windows)
    logs = [log_softmax(original.lm_head(original.model.norm(x)), -1) for x in before.entering[-1]]
    found = []
    for index, (a, b) in enumerate(zip(original.model.layers, quantized.model.layers, strict=True)):
        x = before.inputs[index]
        h, other = activations(a.mlp, x), activations(b.mlp, x)
        y, other_down = a.mlp.down_proj(h), b.mlp.down_proj(h)
        inner = torch.cat([a.mlp.gate_proj.weight, a.mlp.up_proj.weight])
        outer = torch.cat([b.mlp.gate_proj.weight, b.mlp.up_proj.weight])
        energy, size = y.square().sum(-1), x.square().sum(0)
        with replaced(a, b.mlp):
            alone = divergence(original, index, before.entering[index], logs)
        with replaced(b, a.mlp):
            without = divergence(quantized, index, after.entering[index], logs)
        found.append(
            Layer(
                own=relative(b.mlp.down_proj(other) - y, y),
                own_gate_up=relative(a.mlp.down_proj(other) - y, y),
                own_down=relative(other_down - y, y),
                drift=relative(a.mlp(after.inputs[index]) - y, y),
                total=relative(b.mlp(after.inputs[index]) - y, y),
                state=relative((after.entering[index + 1] - before.entering[index + 1]).flatten(0, 1),
                               before.entering[index + 1].flatten(0, 1)),
                gate_up=of_all(x @ (outer - inner).T, x @ inner.T),
                down=of_all(other_down - y, y),
                least_gate_up=least_linear_error(inner, x.T @ x, bits),
                least_down=least_linear_error(a.mlp.down_proj.weight, h.T @ h, bits),
                kl_alone=alone,
                kl_without=without,
                largest_token=(energy.max() / energy.median()).item(),
                largest_channel=(size.max() / size.sum()).item(),
            )
        )  # fmt: skip
        print(f"layer {index}: KL alone {alone:.4f}, without {without:.4f}", flush=True)
    return found, divergence(quantized, len(found), after.entering[-1], logs)


def as_markdown(name: str, result: dict[str, Any]) -> str:
    """The figures as a page."""
    columns = (
        ("own", "own"), ("gate and up", "own_gate_up"), ("down", "own_down"), ("drift", "drift"), ("total", "total"),
        ("hidden state", "state"), ("gate and up, linear", "gate_up"), ("least", "least_gate_up"),
        ("down, linear", "down"), ("least", "least_down"), ("KL alone", "kl_alone"), ("KL without", "kl_without"),
        ("largest token", "largest_token"), ("largest channel", "largest_channel"),
    )  # fmt: skip
    lines = ["| layer | " + " | ".join(c for c, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for index, layer in enumerate(result["layers"]):
        lines.append(f"| {index} | " + " | ".join(f"{layer[key]:.3g}" for _, key in columns) + " |")
    alone = sum(layer["kl_alone"] for layer in result["layers"])
    kl, where = result["kl"], result["environment"]
    what = (
        f"KL {kl:.3f} at {result['bpw']:.3f} bits; the sum of single layers is {alone:.3f}.",
        f"{result['windows']} windows of {result['length']} tokens of {result['text']}.",
        "Errors are relative energies: of the median token for outputs and hidden states, of all tokens where linear.",
        "Largest token: energy of an MLP's output, times the median one's.",
        "Largest channel: share of the energy of an MLP's inputs.",
        "What the columns are: `benchmarks/real_model/causes.py`.",
        f"{where['cpu']}, torch {where['torch']}, commit {where['commit']}.",
    )
    table, picture = "\n".join(lines), f"![Errors of every layer](causes-{name}.png)"
    return f"# Causes: {name}\n\n{picture}\n\n{table}\n\n" + "\n".join(what) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Errors, bounds and divergences over the layers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (
        ("MLP output, median token", "relative error", {
            "own": "own", "gate and up alone": "own_gate_up", "down alone": "own_down", "drift": "drift"}),
        ("Linear layers, all tokens", "relative error", {
            "gate and up": "gate_up", "least, gate and up": "least_gate_up",
            "down": "down", "least, down": "least_down"}),
        ("Hidden states, median token", "relative error", {"leaving the layer": "state"}),
        ("KL to the original", "nats per token", {"only this layer quantized": "kl_alone",
                                                  "gained by this layer's original": "gained"}),
    )  # fmt: skip
    layers = [layer | {"gained": max(result["kl"] - layer["kl_without"], 0.0)} for layer in result["layers"]]
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, unit, lines) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for label, key in lines.items():
            least = key.startswith("least")
            axes.plot([layer[key] for layer in layers], marker=None if least else "o", ms=3, ls="--" if least else "-",
                      color={"least_gate_up": "C0", "least_down": "C1"}.get(key), label=label)  # fmt: skip
        axes.set(title=title, xlabel="layer", ylabel=unit, yscale="log")
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Analyse one checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_model.causes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / ".real_model", help="of the models and the texts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    all_active.make(args.folder)
    first, bits = args.folder / all_active.MODEL, bitsmoe.inspect(args.checkpoint).bpw
    with tempfile.TemporaryDirectory() as scratch:
        bitsmoe.dequantize(args.checkpoint, Path(scratch) / "plain", dtype="float32")
        quantized = dense_model(Path(scratch) / "plain")
    windows = text_windows(load_tokenizer(first), open_text(str(args.folder / all_active.TEST)), LENGTH, WINDOWS)
    layers, kl = causes(dense_model(first), quantized, windows, all_active.EXPERTS, bits)
    result = {
        "environment": environment(), "text": all_active.TEST, "windows": WINDOWS, "length": LENGTH, "bpw": bits,
        "kl": kl, "layers": [asdict(layer) for layer in layers],
    }  # fmt: skip
    name = args.checkpoint.resolve().name
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"causes-{name}.json", result)
    (args.out / f"causes-{name}.md").write_text(as_markdown(name, result), encoding="utf-8")
    draw(result, args.out / f"causes-{name}.png")


if __name__ == "__main__":
    main()
