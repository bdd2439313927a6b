"""How much the model's predictions feel errors at each token, measured with gradients.

To second order, an error d of a layer's output costs KL = E[(g . d)^2] / 2, with g the gradient of the log-likelihood
of a token drawn from the model's own prediction (the Fisher metric).

Errors of some tokens cost far more than those of others. GuidedQuant (arXiv 2505.07004) weighs tokens by |g|^2. Few
tokens hold most of it, and what is measured by them alone fits no other text: its root serves better.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from offline_quant.model.sizes import FLOAT, RunSizes
from offline_quant.model.streaming import Arguments, StreamedModel

TOKENS = 8_192
"""Tokens of calibration text that pass together: bounds the memory of all layers' hidden states."""
BATCH_TOKENS = 2_048
LOGIT_COPIES = 3.5
"""Copies of logits while gradients of drawn tokens are taken: measured with the vocabulary of Qwen3-30B-A3B, where they
are most of the memory of `--token-weights model`."""


def gradient_bytes(sizes: RunSizes) -> int:
    """Bytes of memory that `token_powers` takes: hidden states of all layers, and logits or a whole layer."""
    H, I = sizes.hidden_size, sizes.shape.intermediate_size  # noqa: E741
    measured = min(sizes.tokens, TOKENS)
    batch = min(measured, BATCH_TOKENS)
    logits = int(FLOAT * sizes.vocabulary * (H + LOGIT_COPIES * batch))
    gradients = batch * (sizes.top_k * (4 * H + 8 * I) + sizes.attention_values)
    layer = sizes.decoder_bytes + FLOAT * (sizes.layer_weights + gradients)
    return FLOAT * measured * sizes.state_values * (sizes.num_layers + 2) + sizes.mapped_bytes + max(logits, layer)


def token_powers(
    model: StreamedModel, windows: Tensor, seed: int, on_progress: Callable[[], None] = lambda: None
) -> dict[int, Tensor]:
    """Squared norms of gradients of the log-likelihood of drawn tokens, at the output of a layer's routed experts.

    Args:
        model: the original model.
        windows: int64 [n, L], of about TOKENS tokens.
        seed: for the drawn tokens.
        on_progress: called after every layer, forwards and backwards.

    Returns:
        float64 [T], by the index of each layer with experts.
    """
    batches = model.embed_windows(windows, BATCH_TOKENS)
    entering = [[h for h, _ in batches]]
    for index in range(model.num_layers):
        with model.layer(index) as module, torch.no_grad():
            entering.append(
                [model.run(module, h, args).cpu() for h, (_, args) in zip(entering[-1], batches, strict=True)]
            )
        on_progress()
    gradients = _top_gradients(model, entering.pop(), seed)
    found = {}
    for index in reversed(range(model.num_layers)):
        hidden, powers = entering.pop(), list[Tensor]()
        if index >= min(model.shape.layers):
            with model.layer(index) as module:
                gradients = [
                    _backward(model, module, h, args, g, powers if index in model.shape.layers else None)
                    for h, (_, args), g in zip(hidden, batches, gradients, strict=True)
                ]
        if powers:
            found[index] = torch.cat(powers)
        on_progress()
    return found


def token_weights(power: Tensor) -> Tensor:
    """How much each token counts, float32 [T] of mean one: the root of the squared gradient.

    Args:
        power: float64 [T], of one layer.
    """
    root = power.sqrt()
    mean = root.mean()
    return (root / mean if mean > 0 else torch.ones_like(root)).float()  # or no error of this layer is felt


def windows_together(windows: Tensor) -> int:
    """How many windows [n, L] are about TOKENS tokens."""
    return max(1, TOKENS // windows.shape[1])


def _energy(rows: Tensor) -> Tensor:
    return rows.flatten(0, -2).double().square().sum(-1).cpu()


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
    model: StreamedModel,
    module: nn.Module,
    hidden: Tensor,
    arguments: Arguments,
    gradient: Tensor,
    powers: list[Tensor] | None,
) -> Tensor:
    """Gradient at what enters a layer; squared norms at the output of its routed experts are appended to `powers`."""
    seen: list[Tensor] = []
    with torch.enable_grad(), nullcontext() if powers is None else model.watching(module, seen.append):
        h = hidden.to(model.device).requires_grad_(True)
        out = model.run(module, h, arguments)
    entered, *felt = torch.autograd.grad(out, [h, *seen], gradient.to(model.device))
    if powers is not None:
        powers += [_energy(g) for g in felt]
    return entered.cpu()
