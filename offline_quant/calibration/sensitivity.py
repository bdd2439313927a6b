"""Sensitivity of the model's predictions to errors of each layer's experts, measured with gradients.

To second order, an error d of a layer's output costs KL = E[(g . d)^2] / 2, with g the gradient of the log-likelihood
of a token drawn from the model's own prediction (the Fisher metric). With d spread evenly, an error of relative size r
costs r * E|g|^2 * E|y|^2 / (2 H), y being the routed experts' output: the factor of r is the layer's sensitivity.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offline_quant.model.sizes import FLOAT, RunSizes
from offline_quant.model.streaming import Arguments, StreamedModel

TOKENS = 8_192
"""Tokens of calibration text that are used: bounds the memory of all layers' hidden states."""
BATCH_TOKENS = 2_048
LOGIT_COPIES = 3.5
"""Copies of logits while gradients of drawn tokens are taken: measured with the vocabulary of Qwen3-30B-A3B, where they
are most of the memory of `--budget model`."""


def sensitivity_bytes(sizes: RunSizes) -> int:
    """Bytes of memory that `layer_sensitivities` takes: hidden states of all layers, and logits or a whole layer."""
    H, I = sizes.hidden_size, sizes.shape.intermediate_size  # noqa: E741
    measured = min(sizes.tokens, TOKENS)
    batch = min(measured, BATCH_TOKENS)
    logits = int(FLOAT * sizes.vocabulary * (H + LOGIT_COPIES * batch))
    gradients = batch * (sizes.top_k * (4 * H + 8 * I) + sizes.attention_values)
    layer = sizes.decoder_bytes + FLOAT * (sizes.layer_weights + gradients)
    return FLOAT * measured * sizes.state_values * (sizes.num_layers + 2) + sizes.mapped_bytes + max(logits, layer)


def layer_sensitivities(
    model: StreamedModel, windows: Tensor, seed: int, on_progress: Callable[[], None] = lambda: None
) -> dict[int, float]:
    """KL in nats per token for a relative error of one in the routed experts' output, by layer index.

    Args:
        model: the original model.
        windows: int64 [n, L]; the first TOKENS tokens are used.
        seed: for the drawn tokens.
        on_progress: called after every layer, forwards and backwards.
    """
    windows = windows[: max(1, TOKENS // windows.shape[1])]
    batches = model.embed_windows(windows, BATCH_TOKENS)
    entering = [[h for h, _ in batches]]
    energy: dict[int, float] = {}
    for index in range(model.num_layers):
        with model.layer(index) as module, torch.no_grad():
            outputs = _OutputEnergy(module, model.experts_name if index in model.shape.layers else None)
            entering.append(
                [model.run(module, h, args).cpu() for h, (_, args) in zip(entering[-1], batches, strict=True)]
            )
            energy[index] = outputs.close() / windows.numel()
        on_progress()
    gradients = _top_gradients(model, entering.pop(), seed)
    found = {}
    for index in reversed(range(model.num_layers)):
        hidden = entering.pop()
        moe = index in model.shape.layers
        if moe or index:
            with model.layer(index) as module:
                power = _GradientPower(module, model.experts_name if moe else None)
                gradients = [
                    _backward(model, module, h, args, g)
                    for h, (_, args), g in zip(hidden, batches, gradients, strict=True)
                ]
            if moe:
                found[index] = power.close() / windows.numel() * energy[index] / (2 * model.shape.hidden_size)
        on_progress()
    return found


class _OutputEnergy:
    """Sums the squared outputs of the routed experts while a layer runs."""

    def __init__(self, module: nn.Module, path: str | None):
        self.total = 0.0
        self._handle = module.get_submodule(path).register_forward_hook(self._hook) if path else None

    def _hook(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._add(output)

    def _add(self, values: Tensor) -> None:
        self.total += float(values.double().square().sum())

    def close(self) -> float:
        if self._handle:
            self._handle.remove()
        return self.total


class _GradientPower(_OutputEnergy):
    """Sums the squared gradients at the outputs of the routed experts, while a layer runs backwards."""

    def _hook(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        output.register_hook(self._add)


def _top_gradients(model: StreamedModel, hidden: list[Tensor], seed: int) -> list[Tensor]:
    """Gradient of -log p(token) at what leaves the last layer, tokens drawn from p."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    head, out = model.head, []
    for batch in hidden:
        with torch.enable_grad():
            h = batch.to(model.device).requires_grad_(True)
            logp = head(model.tail(h)).log_softmax(-1)
            drawn = torch.multinomial(logp.detach().exp().flatten(0, 1), 1, generator=generator)
            loss = -logp.flatten(0, 1).gather(1, drawn).sum()
            out.append(torch.autograd.grad(loss, h)[0].cpu())
    return out


def _backward(
    model: StreamedModel, module: nn.Module, hidden: Tensor, arguments: Arguments, gradient: Tensor
) -> Tensor:
    with torch.enable_grad():
        h = hidden.to(model.device).requires_grad_(True)
        return torch.autograd.grad(model.run(module, h, arguments), h, gradient.to(model.device))[0].cpu()
