"""Run a causal language model decoder layer by decoder layer, with one layer's weights in memory at a time.

The modules are transformers' own, built without memory ("meta") and filled from a checkpoint when their turn comes, in
float32. Calibration and evaluation both run on this, for ordinary and for quantized checkpoints.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_outputs import MoeModelOutputWithPast

from bitsmoe_kernels.errors import BitsmoeError, fault_list, one_line
from bitsmoe_kernels.format.checkpoint import plain_config
from bitsmoe_kernels.models.families import MoEShape, built_config, decoder_of, kept_tensors
from offline_quant.model.expert_files import module_tensors
from offline_quant.model.expert_inputs import ExpertInputs, called_for_all
from offline_quant.model.sizes import FLOAT, RunSizes
from offline_quant.model.tensors import WeightSource
from offline_quant.runtime.chunks import chunks_of, gpu_share, matrix_bytes
from offline_quant.runtime.malloc import trim
from offline_quant.runtime.progress import console

Arguments = list[dict[str, Any]]
"""Arguments of every decoder layer besides hidden states; layers of one kind share tensors."""
Batches = list[tuple[Tensor, Arguments]]
"""Hidden states [n, L, H] and the layers' arguments."""
COMPUTING_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""Errors of a model whose config.json describes what cannot be computed."""
TRIED_TOKENS = 4
"""Tokens that `StreamedModel.try_out` runs, and those that `StreamedModel.expert_factor` is measured with."""
IDS_ARGUMENT = "input_ids"
"""Name of a layer's argument that holds the windows' token ids, where a layer takes them (GLM-5.3-Flash)."""
LINEAR = 1e-4
"""Relative deviation below which a layer's output is linear in that of its experts, and below which a factor is 1."""
TOGETHER = 8
"""Batches for which a layer's experts are read once."""
SCORE_COPIES = 2.5
"""Copies of attention scores where they are computed as a whole: measured on DeepSeek-V3's shapes."""


@contextmanager
def _building(directory: Path) -> Iterator[None]:
    try:
        yield
    except (*COMPUTING_ERRORS, ImportError, StrictDataclassError) as e:
        raise BitsmoeError(
            f"{directory}: transformers cannot build the model from config.json ({one_line(e)[:300]})"
        ) from None


def transformers_config(config: Mapping[str, Any], directory: Path) -> Any:
    """transformers' config of what it builds of a config.json, without the keys on how weights are stored.

    Raises:
        BitsmoeError: transformers refuses it.
    """
    found = _with_special_floats(plain_config(built_config(config)))
    named = found.get("model_type")
    if isinstance(named, str) and named not in transformers.CONFIG_MAPPING:
        raise BitsmoeError(
            f"{directory}: transformers {transformers.__version__} has no class for model_type {named!r:.80}, and code "
            "of a model's repository is not run"
        )
    with _building(directory):
        return transformers.AutoConfig.for_model(**found)


def _with_special_floats(value: Any) -> Any:
    """A value of config.json with infinities and NaN for what transformers writes in their place."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_special_floats(inner) for key, inner in value.items()}
    return [_with_special_floats(inner) for inner in value] if isinstance(value, list) else value


class _WithoutMemory(TorchFunctionMode):
    """Puts what modules allocate and do not fill on "meta"; what they compute, such as rotary tables, is real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty and (kwargs or {}).get("device") is None:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


def empty_model(config: Mapping[str, Any], auto_class: str, directory: Path) -> Any:
    """transformers' model of a config.json, stored tensors on "meta".

    Args:
        config: config.json.
        auto_class: the class of transformers that builds it, see `Family.auto_class`.
        directory: of the model.

    Raises:
        BitsmoeError: transformers refuses the config.
    """
    known, auto = transformers_config(config, directory), getattr(transformers, auto_class)
    with _building(directory), _WithoutMemory():
        model = auto.from_config(known, dtype=torch.float32).eval()
    for name, value in kept_tensors(model):  # norms are filled when they are made
        if not value.is_meta:
            assign(model, name, torch.empty_like(value, device="meta"))
    return model


def model_without_memory(config: Mapping[str, Any], shape: MoEShape, directory: Path) -> Any:
    """`empty_model`, with the routed experts that were read from config.json.

    Raises:
        BitsmoeError: transformers refuses the config, or builds other experts.
    """
    model = empty_model(config, shape.family.auto_class, directory)
    if faults := shape.expert_faults(model):
        raise BitsmoeError(
            fault_list(f"{directory}: transformers builds other experts; is a key of their layers missing?", faults)
        )
    return model


@dataclass(frozen=True)
class Head:
    """What makes logits of normed hidden states: the output embedding, or some rows of it.

    Attributes:
        weight: float32 [V, H].
        bias: float32 [V], where the model has one.
        finish: what the model does to the products, such as scaling (Granite) or capping (Gemma); None: nothing.
    """

    weight: Tensor
    bias: Tensor | None
    finish: Callable[[Tensor], Tensor] | None

    def __call__(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., H], with gradients where they are enabled."""
        logits = states @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        return logits if self.finish is None else self.finish(logits)


class _Given(MoeModelOutputWithPast):
    """States in the place of a decoder's output; all else that a model reads of it is None."""

    def __getattr__(self, name: str) -> None:
        return None


class StreamedModel:
    """A model whose layers are filled on demand.

    Args:
        source: the weights.
        device: where layers run.
    """

    def __init__(self, source: WeightSource, device: str = "cpu"):
        self.source = source
        self.shape = source.shape
        self.device = torch.device(device)
        self.model = model_without_memory(source.config, self.shape, source.directory)
        self.decoder = decoder_of(self.model)
        self.num_layers = len(self.decoder.layers)
        self._place = {module: index for index, module in enumerate(self.decoder.layers)}
        self._arguments: dict[torch.Size, Arguments] = {}
        self._factors: dict[int, float | None] = {}
        self.embedding = self.decoder.get_submodule(self.shape.family.module_embedding)
        self.vocabulary: int = self.embedding.num_embeddings
        self._check_tensors()
        self.embedding.forward = self._embedding
        self.embedding.padding_idx = None  # of rows that are not all there
        # Some models bring ids to the device of these weights (Llama 4).
        self.embedding.weight = nn.Parameter(torch.empty(0, device=self.device), requires_grad=False)
        for name in self.shape.family.module_tail:
            self._fill(self.decoder.get_submodule(name), f"{self._base}{name}")
        for module in self.decoder.modules():
            for name, table in module._buffers.items():
                module._buffers[name] = table if table is None or table.is_meta else table.to(self.device)

    @property
    def experts_name(self) -> str:
        """The experts within a decoder layer that has some."""
        return self.shape.family.module_experts

    @property
    def _base(self) -> str:
        return self.shape.family.module_base

    @cached_property
    def state_shape(self) -> torch.Size:
        """Shape of a token's hidden state between layers: (H,), or (streams, H) with hyper-connections."""
        return self.embed(torch.zeros(1, 1, dtype=torch.int64))[0].shape[2:]

    def _check_tensors(self) -> None:
        """Compare all tensors outside the routed experts with the modules they go to. Tied ones count once."""
        if faults := self.shape.other_faults(self.model, self.source.tensors.specs):
            raise BitsmoeError(fault_list(f"{self.source.directory}: tensors do not fit config.json", faults))

    def warn_of_ignored(self) -> None:
        """Say which stored tensors the model's own modules do not read."""
        if names := self.shape.ignored(self.model, self.source.tensors.specs):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            console.print(
                f"{self.source.directory}: stored, but not part of the model that config.json describes: {shown}; "
                "passed over, as transformers and vLLM do"
            )

    def try_out(self) -> None:
        """Run a few tokens through one layer of each kind, without its experts.

        Raises:
            BitsmoeError: config.json describes a model that cannot be computed.
        """
        kinds = getattr(self.decoder.config, "layer_types", None) or [""] * self.num_layers
        firsts = {(index in self.shape.layers, kind): index for index, kind in reversed(list(enumerate(kinds)))}
        try:
            hidden, arguments = self.embed(torch.zeros(1, TRIED_TOKENS, dtype=torch.int64))
            for (moe, _), index in firsts.items():
                with self.layer(index) as module:
                    out = (
                        self.expert_inputs(module, hidden, arguments)[1] if moe else self.run(module, hidden, arguments)
                    )
                    whole = all(bool(t.isfinite().all()) for _, t in kept_tensors(module) if not t.is_meta)
                    if whole and not bool(out.isfinite().all()):  # weights that are not finite are named later
                        raise ArithmeticError(
                            f"decoder layer {index} computes NaN or infinity from finite weights; look at its rope and "
                            "scaling options"
                        )
        except torch.OutOfMemoryError:
            raise
        except COMPUTING_ERRORS as e:
            raise BitsmoeError(
                f"{self.source.directory}: the model that config.json describes cannot be computed "
                f"({type(e).__name__}: {one_line(e)[:300]})"
            ) from None

    def _embedding(self, ids: Tensor) -> Tensor:
        """Embedded tokens, float32, as the model's own module makes them of these rows; the others are not read."""
        module = self.embedding
        needed, place = ids.cpu().unique(return_inverse=True)
        rows = self.source.tensors.get(self._embedding_name)[needed].to(self.device, torch.float32)
        usual, module.weight = module.weight, nn.Parameter(rows, requires_grad=False)
        try:
            return type(module).forward(module, place.to(self.device))
        finally:
            module.weight = usual

    def check_ids(self, ids: Tensor) -> None:
        """Refuse token ids beyond the vocabulary.

        Raises:
            BitsmoeError: names the id and vocab_size.
        """
        if int(ids.max()) >= self.vocabulary:
            raise BitsmoeError(
                f"{self.source.directory}: the tokenizer gives token id {int(ids.max())}, but the model's vocab_size "
                f"is {self.vocabulary}; tokenizer and weights are not of one model"
            )

    def _fill(self, module: nn.Module, prefix: str, but: str | None = None) -> None:
        """Read a module's parameters and kept buffers from the checkpoint, but for those of one submodule."""
        for name, _ in kept_tensors(module):
            if but is None or not name.startswith(f"{but}."):
                stored = self.shape.family.stored_names(f"{prefix}.{name}")
                parts = [self._as_computed(self.source.tensors.get(part)) for part in stored]
                assign(module, name, parts[0] if len(parts) == 1 else torch.cat(parts))

    def _as_computed(self, stored: Tensor) -> Tensor:
        """A stored tensor where layers run: float32, but for whole numbers (experts of token ids)."""
        return stored.to(self.device, torch.float32 if stored.is_floating_point() else None)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights, released afterwards.

        Its routed experts stay in the checkpoint: they are read chunk by chunk whenever the layer runs.
        """
        module = self.decoder.layers[index]
        moe = index in self.shape.layers
        self._fill(module, self.shape.family.module_decoder(index), self.experts_name if moe else None)
        experts: Any = module.get_submodule(self.experts_name) if moe else None
        if moe:
            experts.forward = self.as_called(index, partial(self.routed, index))
        try:
            if moe and index not in self._factors:
                self._factors[index] = self._measured_factor(module)
            yield module
        finally:
            if moe:
                del experts.forward
            for name, value in kept_tensors(module):
                assign(module, name, torch.empty_like(value, device="meta"))

    def as_called(self, index: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function of tokens, ids and weights in the form in which a layer calls its experts."""
        shape = self.shape.of_layer(index)
        return called_for_all(forward, shape.num_experts) if shape.family.weighs_inputs else forward

    def routed(self, index: int, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Output of a layer's routed experts, [T, H], with gradients where they are enabled.

        Args:
            index: of the decoder layer.
            x: [T, H].
            topk_ids: [T, top_k].
            topk_weights: [T, top_k].
        """
        y, s = torch.zeros_like(x), self.shape.of_layer(index)
        for chunk in chunks_of(s.num_experts, s.hidden_size, s.intermediate_size, gpu_share(self.device)):
            called = [(topk_ids == e).nonzero(as_tuple=True) for e in chunk]
            if not any(len(token) for token, _ in called):
                continue
            trim(matrix_bytes(s.hidden_size, s.intermediate_size))  # memory of earlier experts and of attention
            experts = self.source.experts(index, chunk).to(self.device)
            for i, (token, slot) in enumerate(called):
                one = experts.one(i)
                # Of `x[token]` the gradient takes far longer on a CPU.
                out = one.forward(x.index_select(0, token), s.hidden_act)
                # Under autocast products may be bfloat16; their sum is not.
                y.index_add_(0, token, (out * topk_weights[token, slot, None]).to(y.dtype))
        return y

    @torch.no_grad()
    def embed(self, ids: Tensor) -> tuple[Tensor, Arguments]:
        """Hidden states [n, L, H] that enter the first layer, and the arguments every layer takes besides them.

        Raises:
            BitsmoeError: token ids beyond the model's vocabulary.
        """
        self.check_ids(ids)
        self.check_length(ids.shape[1])
        entered: list[Tensor] = []
        arguments: Arguments = []

        handed_on = self._handed_on(*ids.shape)

        def catch(names: Sequence[str], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            entered.append(hidden_states)
            arguments.append(dict(zip(names, args, strict=False)) | kwargs)
            return (hidden_states, *handed_on) if handed_on else hidden_states

        for module in self.decoder.layers:
            names = list(inspect.signature(type(module).forward).parameters)[2:]
            module.forward = partial(catch, names)
        try:
            self.decoder(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for module in self.decoder.layers:
                del module.forward
        return entered[0], arguments

    @cached_property
    def _most_tokens(self) -> int | None:
        """Most tokens of a window that can be streamed: as many as indexers choose, where layers share them."""
        config = self.decoder.config
        return config.index_topk if "shared" in (getattr(config, "indexer_types", None) or ()) else None

    def check_length(self, tokens: int) -> None:
        """Refuse windows of which a shared indexer would choose a part: what it chose is not streamed.

        Raises:
            BitsmoeError: names index_topk.
        """
        if self._most_tokens is not None and tokens > self._most_tokens:
            raise BitsmoeError(
                f"{self.source.directory}: layers share an indexer, so windows may have at most index_topk tokens, "
                f"{self._most_tokens}, not {tokens}; choose shorter ones (--calib-length)"
            )

    def _handed_on(self, windows: int, tokens: int) -> tuple[Any, ...]:
        """What layers return besides hidden states: nothing, or all tokens, where an indexer is shared."""
        if self._most_tokens is None:
            return (None,) * (self.shape.family.layer_outputs - 1)
        return (torch.arange(tokens, device=self.device).expand(windows, tokens, tokens),)

    def arguments(self, ids: Tensor) -> Arguments:
        """The layers' arguments for windows [n, L]. Their shape decides all of them but the ids themselves."""
        if ids.shape not in self._arguments:
            self._arguments[ids.shape] = self.embed(ids)[1]
        own = {IDS_ARGUMENT: ids.to(self.device)}
        return [a | own if IDS_ARGUMENT in a else a for a in self._arguments[ids.shape]]

    def embed_windows(self, windows: Tensor, batch_tokens: int) -> Batches:
        """`embed` of windows [n, L] in batches of about `batch_tokens`, hidden states on the CPU."""
        batches = []
        for ids in windows.split(max(1, batch_tokens // windows.shape[1])):
            hidden, arguments = self.embed(ids)
            batches.append((hidden.cpu(), arguments))
        return batches

    def run(self, module: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        """One decoder layer on [n, L, H], with gradients where they are enabled."""
        out = module(hidden.to(self.device), **arguments[self._place[module]])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def expert_inputs(self, module: nn.Module, hidden: Tensor, arguments: Arguments) -> tuple[ExpertInputs, Tensor]:
        """Inputs of the routed experts of a decoder layer, and its output without them.

        The experts do not run. Their output is added later, which saves a second attention.

        Args:
            module: from `layer`.
            hidden: [n, L, H].
            arguments: of the layers.

        Returns:
            The experts' inputs, and the layer's output [n, L, H] with zeros from the experts, on the CPU.
        """
        seen: list[ExpertInputs] = []

        def catch(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            seen.append(ExpertInputs(x.reshape(-1, x.shape[-1]).float(), ids.long(), weights.float()))
            return torch.zeros_like(x)

        with self._experts_as(module, catch):
            rest = self.run(module, hidden, arguments).cpu()
        return seen[0], rest

    @contextmanager
    def _experts_as(self, module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Another function in the place of a layer's routed experts."""
        experts: Any = module.get_submodule(self.experts_name)
        usual, experts.forward = experts.forward, self.as_called(self._place[module], forward)
        try:
            yield
        finally:
            experts.forward = usual

    @contextmanager
    def watching(self, module: nn.Module, seen: Callable[[Tensor], None]) -> Iterator[None]:
        """Within this, the output of a layer's routed experts is shown, [T, H], with gradients where enabled.

        Args:
            module: from `layer`.
            seen: called with it.
        """
        index = self._place[module]

        def watched(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            y = self.routed(index, x, ids, weights)
            seen(y)
            return y

        with self._experts_as(module, watched):
            yield

    def expert_factor(self, index: int) -> float | None:
        """Factor with which the output of a layer's routed experts enters the layer's own; 1 in most models.

        None where that is not linear, because a norm follows, say (Trinity), where it enters several streams
        (GLM-5.3-Flash), or where experts see another width than the model's. Known once the layer was open.
        """
        return self._factors[index]

    @torch.no_grad()
    def _measured_factor(self, module: nn.Module) -> float | None:
        arguments = self.arguments(torch.zeros(1, TRIED_TOKENS, dtype=torch.int64))
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, TRIED_TOKENS, *self.state_shape, generator=generator)
        rest = self.expert_inputs(module, hidden, arguments)[1]
        if self.state_shape != (self.shape.hidden_size,):
            return None
        output = torch.randn(hidden.shape, generator=generator) * rest.square().mean().sqrt()
        share = (self.with_output(module, hidden, arguments, output) - rest).double()
        factor = float((share * output).sum() / output.double().square().sum())
        if not float((share - factor * output).norm()) <= LINEAR * float(share.norm()):
            return None
        return 1.0 if abs(factor - 1) < LINEAR else factor

    @torch.no_grad()
    def with_output(self, module: nn.Module, hidden: Tensor, arguments: Arguments, output: Tensor) -> Tensor:
        """Output of a decoder layer, [n, L, H] on the CPU, whose routed experts put out `output`, [T, H of experts]."""
        with self._experts_as(module, lambda x, *_: output.to(x).view_as(x)):
            return self.run(module, hidden, arguments).cpu()

    @torch.no_grad()
    def through(
        self,
        module: nn.Module,
        batches: Iterable[tuple[Tensor, Arguments]],
        change: Callable[[Tensor], Tensor] = lambda output: output,
    ) -> Iterator[Tensor]:
        """`run` of every batch, results on the CPU one after another. Experts are read once for several batches.

        A layer that is not linear in their output (`expert_factor`) runs twice.

        Args:
            module: from `layer`.
            batches: hidden states and arguments.
            change: what is done to the routed experts' output, [T, H].
        """
        index, waiting = self._place[module], iter(batches)
        while group := list(itertools.islice(waiting, TOGETHER)):
            if index not in self.shape.layers:
                yield from (self.run(module, *batch).cpu() for batch in group)
                continue
            entering, rests = map(list, zip(*(self.expert_inputs(module, *batch) for batch in group), strict=True))
            lengths = [len(x.x) for x in entering]
            # Each is freed once it is copied.
            inputs = ExpertInputs.gathered((entering.pop(0) for _ in lengths), sum(lengths), self.device)
            output = change(self.routed(index, inputs.x, inputs.topk_ids, inputs.topk_weights).cpu())
            factor = self.expert_factor(index)
            for batch, rest, own in zip(group, rests, output.split(lengths), strict=True):
                if factor is None:
                    yield self.with_output(module, *batch, own)
                else:
                    yield rest.add(own.view_as(rest), alpha=factor)

    @property
    def _stored_head(self) -> Tensor:
        # A stored head is used whatever config.json says of tying, as in transformers and vLLM.
        own = self.shape.family.stored_name("lm_head.weight")
        return self.source.tensors.get(own if own in self.source.tensors else self._embedding_name)

    @property
    def _embedding_name(self) -> str:
        return self.shape.family.stored_name(f"{self._base}{self.shape.family.module_embedding}.weight")

    def head_parts(self, count: int) -> Iterator[Head]:
        """`head`, `count` rows at a time; the matrix itself stays in the checkpoint."""
        weights, biases = self._stored_head.split(count), itertools.repeat(None)
        if (name := "lm_head.bias") in self.model.state_dict():
            biases = self.source.tensors.get(self.shape.family.stored_name(name)).split(count)
        for weight, bias in zip(weights, biases, strict=False):
            yield Head(
                weight.to(self.device, torch.float32),
                None if bias is None else bias.to(self.device, torch.float32),
                self._finish,
            )

    @property
    def head(self) -> Head:
        """All of the head in memory."""
        return next(self.head_parts(self.vocabulary))

    @cached_property
    def _finish(self) -> Callable[[Tensor], Tensor] | None:
        """What transformers' model does to the products of its head; None: nothing."""

        def finish(products: Tensor) -> Tensor:
            # A model of several parts may hold its decoder without a model of all parts in between (Qwen3-Omni).
            whole = self.model.base_model is self.model
            parts = (self.decoder if whole else self.model.base_model, self.model.get_output_embeddings())
            states = products.view(1, -1, products.shape[-1])
            given, entering = _Given(last_hidden_state=states), {"inputs_embeds": states} if whole else {}
            parts[0].forward, parts[1].forward = (lambda **_: given), (lambda states: states)
            try:
                return self.model(input_ids=None, **entering).logits.view_as(products)
            finally:
                for part in parts:
                    del part.forward

        tried = torch.linspace(-100, 100, 64, device=self.device)[None]
        return None if torch.equal(finish(tried), tried) else finish

    def tail(self, hidden: Tensor) -> Tensor:
        """Inputs [..., H] of the head, from hidden states that leave the last layer; with gradients where enabled."""
        leading = hidden.shape[: hidden.ndim - len(self.state_shape)]
        states = hidden.to(self.device).reshape(1, -1, *self.state_shape)
        for name in self.shape.family.module_tail:
            states = self.decoder.get_submodule(name)(states)
        return states.view(*leading, states.shape[-1])

    @torch.no_grad()
    def normed(self, hidden: Tensor) -> Tensor:
        """As `tail`, without gradients."""
        return self.tail(hidden)

    @torch.no_grad()
    def logits(self, hidden: Tensor, head: Head) -> Tensor:
        """Logits [..., V] of hidden states that leave the last layer."""
        return head(self.normed(hidden))

    def materialize(self) -> nn.Module:
        """The whole model in memory, for generation."""
        for index in range(self.num_layers):
            module, prefix = self.decoder.layers[index], self.shape.family.module_decoder(index)
            if index not in self.shape.layers:
                self._fill(module, prefix)
                continue
            self._fill(module, prefix, self.experts_name)
            for name, weights in module_tensors(self.shape.family, self.source.experts(index)).items():
                assign(module.get_submodule(self.experts_name), name, weights.to(self.device))
        del self.embedding.forward
        self._fill(self.embedding, f"{self._base}{self.shape.family.module_embedding}")
        head = self.head
        assign(self.model, "lm_head.weight", head.weight)
        if head.bias is not None:
            assign(self.model, "lm_head.bias", head.bias)
        return self.model


def forward_bytes(sizes: RunSizes, tokens: int) -> int:
    """Bytes of memory that `StreamedModel.through` takes for one layer.

    Args:
        sizes: of the run.
        tokens: tokens that pass through the layer, in batches of `sizes.batch_tokens`.
    """
    # Of several batches at once: hidden states, inputs and outputs of the experts, and the layer's output without them.
    together = (
        FLOAT * (2 * sizes.shape.hidden_size + 2 * sizes.state_values) * min(TOGETHER * sizes.batch_tokens, tokens)
    )
    # Where queries and values differ in size (DeepSeek), torch computes attention scores as a whole.
    whole = sizes.query_size != sizes.value_size
    scores = int(SCORE_COPIES * sizes.heads * sizes.batch_tokens * sizes.length) if whole else 0
    attention = FLOAT * (sizes.batch_tokens * sizes.attention_values + scores)
    if sizes.shape.family.weighs_inputs:  # inputs and outputs of all tokens for all experts, and what they are made of
        attention += 4 * FLOAT * sizes.shape.num_experts * sizes.batch_tokens * sizes.hidden_size
    # On a CPU, results of a chunk take as much again.
    experts = sizes.chunk_bytes * (1 if sizes.device.type == "cuda" else 2)
    return sizes.mapped_bytes + sizes.decoder_bytes + together + max(attention, experts)


def assign(root: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, by its name within a module."""
    path, _, leaf = name.rpartition(".")
    parent = root.get_submodule(path)
    if leaf in parent._buffers:
        parent._buffers[leaf] = value
    else:
        setattr(parent, leaf, nn.Parameter(value, requires_grad=False))
