"""Tuning of a quantized model as a whole: scales and codes of all layers, against the original model's predictions.

Layers are quantized and tuned for their own outputs. How much an error of a layer matters, only the layers after it
tell. Here gradients of the divergence from the original's predictions pass through all of them. Scales alone take
little memory (compare the end-to-end phase of EfficientQAT, arXiv 2407.11062). Codes do more (compare PV-Tuning, arXiv
2405.14852), but their latent values and moments stay in memory.

One layer is in memory at a time but for those: it runs forwards without gradients, and again when the gradient of its
output is known. Then it takes its step. Hidden states between layers are kept for the windows of one step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitsmoe_kernels.expert_mlp import activated, input_matrices
from bitsmoe_kernels.format.schema import Layer, ProjectionName
from bitsmoe_kernels.reference import LayerWeights
from offline_quant.model.sizes import FLOAT, RunSizes
from offline_quant.model.streaming import Head, StreamedModel
from offline_quant.rounding.tuned_projection import TunedProjection, adam, take_step, tuned_projections
from offline_quant.runtime.device import bfloat16_products

STEP_TOKENS = 2_048
"""Tokens of one step."""
PASSES, CODE_PASSES = 2, 8
"""How often all windows are gone through: for scales alone, and for codes, which take many steps to change."""
RATE = 0.005
"""Initial Adam rate of scales, relative, per step, for a divergence of 1; it decays linearly to 0. A smaller divergence
has smaller errors behind it, by the root: the rate goes with that. With a fixed one small errors are overfitted."""
CODE_RATE = 0.03
"""Initial Adam rate of codes, in levels per step; it decays linearly to 0."""
WARM_UP = 4
"""Steps in which the rate grows to its initial value."""
FORWARDS, HEADS = 6.0, 4.0
"""A token of a step takes as long as so many forwards through all layers, and through the head, of the original."""
HEAD_TOKENS = 1_024
"""Tokens whose logits are in memory together."""
LOGIT_COPIES = 5
"""Copies of logits while the divergence and its gradient are taken."""


@dataclass(frozen=True)
class StoredLayers:
    """The quantized layers of a model.

    Attributes:
        schemas: by the index of the decoder layer.
        block_size: components that share a bit-width.
        load: tensors of a layer, `{projection}_{part}`, on the CPU.
    """

    schemas: Mapping[int, Layer]
    block_size: int
    load: Callable[[int], dict[str, Tensor]]

    def weights(self, index: int, device: torch.device) -> LayerWeights:
        """A layer for the reference."""
        tensors = {name: tensor.to(device) for name, tensor in self.load(index).items()}
        return LayerWeights(self.schemas[index], self.block_size, tensors)


class TunedModel(NamedTuple):
    """The result.

    Attributes:
        tensors: new scales and codes of every layer, on the CPU; none where tuning did not lower the divergence.
        before, after: divergence from the original on the judged windows, nats per token.
        states: float32 [judged, L, H], hidden states of the judged windows that leave the tuned model's last layer.
    """

    tensors: dict[int, dict[str, Tensor]]
    before: float
    after: float
    states: Tensor


class _Tuner:
    """A model with quantized experts whose scales, and codes, are parameters.

    Args:
        model: the original, its layers outside the experts as in the result.
        stored: its quantized experts.
        codes: whether codes are parameters.
    """

    def __init__(self, model: StreamedModel, stored: StoredLayers, codes: bool = False):
        self.model, self.stored = model, stored
        self.changes = {
            index: tuned_projections(layer, model.device, stored.weights(index, model.device) if codes else None)
            for index, layer in stored.schemas.items()
        }

    def groups(self, index: int, divergence: float) -> list[dict[str, Any]]:
        """Parameters of a layer by their initial rates, for a model of some divergence from the original."""
        parts = self.changes[index].values()
        scales = [p for part in parts for p in part.scale_parameters()]
        codes = [p for part in parts for p in part.code_parameters()]
        rates = [RATE * min(1.0, max(0.0, divergence) ** 0.5), CODE_RATE]
        return [{"params": p, "rate": rate} for p, rate in zip((scales, codes), rates, strict=True) if p]

    @contextmanager
    def _layer(self, index: int) -> Iterator[nn.Module]:
        with self.model.layer(index) as module:
            if index in self.changes:
                experts: Any = module.get_submodule(self.model.experts_name)
                weights = self.stored.weights(index, self.model.device)
                tuned = partial(self._experts, weights, self.changes[index])
                experts.forward = self.model.as_called(index, tuned)
            yield module

    def _experts(
        self,
        weights: LayerWeights,
        changes: dict[ProjectionName, TunedProjection],
        x: Tensor,
        ids: Tensor,
        shares: Tensor,
    ) -> Tensor:
        """Output of the routed experts, [T, H]: in place of the module's own `forward`."""
        flat = x.reshape(-1, x.shape[-1])
        parts = weights.projections
        z = {name: part.project(flat) for name, part in parts.items() if name != "down"}
        y = torch.zeros_like(flat, dtype=torch.float32)
        for e in ids.unique().tolist():
            token, slot = (ids == e).nonzero(as_tuple=True)
            # Of `x[token]` the gradient takes far longer on a CPU.
            own = flat.index_select(0, token)
            outputs = [
                changes[name](parts[name], e, own, own if part is flat else part.index_select(0, token))
                for name, part in z.items()
            ]
            act = weights.layer.hidden_act
            pre = torch.cat(outputs, -1).float()  # products may be bfloat16
            h = activated(pre.chunk(input_matrices(act), -1), act)
            out = changes["down"](parts["down"], e, h, parts["down"].project(h))
            y = y.index_add(0, token, out.float() * shares[token, slot, None].float())
        return y.view_as(x)

    def forward(self, windows: Tensor, on_layer: Callable[[], None]) -> list[Tensor]:
        """Hidden states [n, L, H] that enter every layer, and that leave the last one."""
        hidden, arguments = self.model.embed(windows)
        entering = [hidden]
        for index in range(self.model.num_layers):
            with self._layer(index) as module, torch.no_grad():
                entering.append(self.model.run(module, entering[-1], arguments))
            on_layer()
        return entering

    def backward(self, windows: Tensor, entering: list[Tensor], gradient: Tensor) -> Iterator[int]:
        """Adds to the gradients of all parameters, layer by layer; yields the index of each layer that is done.

        Args:
            windows: token ids, int64 [n, L].
            entering: see `forward`, without what leaves the last layer; is emptied.
            gradient: at what leaves the last layer.
        """
        arguments = self.model.arguments(windows)
        for index in reversed(range(self.model.num_layers)):
            entered = entering.pop().detach().requires_grad_(True)
            if index >= min(self.changes):
                with self._layer(index) as module, torch.enable_grad():
                    self.model.run(module, entered, arguments).backward(gradient)
                assert entered.grad is not None
                gradient = entered.grad
            yield index


def _divergence(model: StreamedModel, head: Head, hidden: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """Sum over tokens of KL(original || model), and its gradient at the hidden states [n, L, H] of the last layer."""
    total, gradients = 0.0, []
    rows, others = hidden.flatten(0, 1).split(HEAD_TOKENS), wanted.flatten(0, 1).split(HEAD_TOKENS)
    for own, other in zip(rows, others, strict=True):
        logp = model.logits(other, head).log_softmax(-1)
        with torch.enable_grad():
            h = own.detach().requires_grad_(True)
            found = head(model.tail(h)).log_softmax(-1)
            loss = nn.functional.kl_div(found, logp, reduction="sum", log_target=True)
            gradients.append(torch.autograd.grad(loss, h)[0])
        total += float(loss.detach())
    return total, torch.cat(gradients).view_as(hidden)


def tune_model(
    model: StreamedModel,
    stored: StoredLayers,
    windows: Tensor,
    wanted: Callable[[int], Tensor],
    judged: int,
    seed: int = 0,
    on_layer: Callable[[], None] = lambda: None,
    codes: bool = False,
) -> TunedModel:
    """Tune the scales of all layers, and their codes.

    Args:
        model: the original, its layers outside the experts as in the result.
        stored: its quantized experts.
        windows: token ids, int64 [n, L].
        wanted: hidden states [L, H] of one window that leave the original model's last layer.
        judged: that many windows, the first, judge the result.
        seed: of the order of windows.
        on_layer: called after every layer, `layer_visits` times.
        codes: whether codes change, and not scales alone.
    """
    tuner, head = _Tuner(model, stored, codes), model.head

    def aim(rows: Sequence[int]) -> Tensor:
        return torch.stack([wanted(i) for i in rows]).to(model.device)

    def judge(judged_model: _Tuner) -> tuple[float, Tensor]:
        total, states = 0.0, []
        for rows in _batches(range(judged), windows):
            states.append(judged_model.forward(windows[rows], on_layer)[-1])
            total += _divergence(model, head, states[-1], aim(rows))[0]
        return total / windows[:judged].numel(), torch.cat(states).cpu()

    before, _ = judge(tuner)
    optimizers = {index: adam(tuner.groups(index, before)) for index in tuner.changes}
    steps = _steps(windows, seed, codes)
    for number, rows in enumerate(steps):
        share = min(1, (number + 1) / WARM_UP) * (1 - number / len(steps))
        batch = windows[rows]
        with bfloat16_products(model.device):
            entering = tuner.forward(batch, on_layer)
            gradient = _divergence(model, head, entering.pop(), aim(rows))[1]
            for index in tuner.backward(batch, entering, gradient / batch.numel()):
                if index in optimizers:
                    take_step(optimizers[index], share)
                on_layer()
    found: dict[int, dict[str, Tensor]] = {}
    for index, parts in tuner.changes.items():
        weights = stored.weights(index, model.device).projections
        found[index] = {k: v for name, part in parts.items() for k, v in part.tensors(weights[name]).items()}
    # Judged as the file has them: float16 may round away what little there was to gain.
    rounded = replace(stored, load=lambda index: stored.load(index) | found[index])
    after, states = judge(_Tuner(model, rounded))
    return TunedModel(found if after < before else {}, before, after, states)


def _batches(rows: Sequence[int], windows: Tensor) -> list[list[int]]:
    """Rows that pass through the layers together."""
    size = max(1, STEP_TOKENS // windows.shape[1])
    return [list(rows[at : at + size]) for at in range(0, len(rows), size)]


def _passes(codes: bool) -> int:
    return CODE_PASSES if codes else PASSES


def _steps(windows: Tensor, seed: int, codes: bool) -> list[list[int]]:
    """Windows of every step."""
    generator = torch.Generator().manual_seed(seed)
    passes = (torch.randperm(len(windows), generator=generator).tolist() for _ in range(_passes(codes)))
    return [rows for order in passes for rows in _batches(order, windows)]


def layer_visits(layers: int, windows: Tensor, judged: int, codes: bool = False) -> int:
    """How often `tune_model` calls `on_layer`."""
    steps = _passes(codes) * len(_batches(range(len(windows)), windows))
    return 2 * layers * (len(_batches(range(judged), windows)) + steps)


def passes(windows: Tensor, judged: int, codes: bool = False) -> tuple[float, float]:
    """How many passes of a token through each layer and through the head, forwards, `tune_model` takes as long as."""
    stepped, seen = _passes(codes) * windows.numel(), 2 * windows[:judged].numel()
    return FORWARDS * stepped + seen, HEADS * stepped + 2 * seen


def tuning_bytes(sizes: RunSizes, codes: bool = False) -> int:
    """Bytes of memory that `tune_model` takes: what is tuned, with moments; hidden states; logits or a layer."""
    s = sizes.shape
    H, I = s.hidden_size, s.intermediate_size  # noqa: E741
    matrices = 1 + s.input_matrices
    scales = s.total_experts * matrices * (H + I)
    step = max(STEP_TOKENS, sizes.length)
    logits = FLOAT * sizes.vocabulary * (sizes.hidden_size + LOGIT_COPIES * min(step, HEAD_TOKENS))
    gradients = sizes.length * (sizes.top_k * (4 * H + 8 * I) + sizes.attention_values)
    layer = sizes.decoder_bytes + sizes.coded_bytes + FLOAT * (matrices * H * I + gradients)
    latent = FLOAT * s.num_experts * matrices * H * I * (3 * len(s.layers) + 2) if codes else 0
    return (
        latent
        + FLOAT * (4 * scales + step * sizes.state_values * (sizes.num_layers + 4))
        + sizes.mapped_bytes
        + max(logits, layer)
    )
