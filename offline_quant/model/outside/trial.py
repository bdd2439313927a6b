"""A model outside the table with weights of chance: what it computes here, against transformers."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitsmoe_kernels.errors import one_line
from bitsmoe_kernels.expert_mlp import ACTIVATIONS, OWN_NAMES, HiddenAct, activated, input_matrices
from bitsmoe_kernels.models.families import MoEShape, bias_name, language_config
from offline_quant.model.expert_files import module_experts
from offline_quant.model.expert_weights import ExpertWeights
from offline_quant.model.outside.chance import Chance, HeldTensors
from offline_quant.model.outside.skeleton import Site, Skeleton
from offline_quant.model.streaming import COMPUTING_ERRORS, StreamedModel, assign, empty_model

ROWS, WINDOWS, LENGTH = 512, 2, 8
"""Of the forward pass: rows of the embedding at most, and windows of so many tokens."""
NEAR = 1e-4
"""Largest difference in the forward pass, float32, in standard deviations of what transformers computes."""
SAME = 1e-5
"""Largest relative difference of what experts put out, float64. Any two activations differ by far more."""
SCALES = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Spread of gates and ups of each token when experts are tried: far on both sides of every clamp."""
_CHOSEN = 2
"""Experts of a token when experts are tried."""
_TOP_K = re.compile(r"experts_per_tok|top_?k_expert|experts?_top_?k|moe_(top_?)?k|^top_?k$")
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act")


def tried_activation(skeleton: Skeleton, shape: MoEShape) -> HiddenAct:
    """The activation with which the experts of every layer compute what transformers' own module computes.

    Raises:
        BitsmoeError: there is none, or config.json names another.
    """
    said = next((act for key in _ACTIVATION_KEYS if (act := skeleton.language.get(key)) is not None), None)
    known = [act for act in ACTIVATIONS if input_matrices(act) == len(shape.family.projections) - 1]
    fitting = set(known)
    for site in skeleton.sites:
        try:
            fitting &= set(_fitting(site, shape, known))
        except COMPUTING_ERRORS as e:
            skeleton.fail("formula", f"{site.name} cannot be computed ({type(e).__name__}: {one_line(e)[:200]})")
        if len(fitting) != 1:
            skeleton.fail(
                "formula",
                f"{site.name} does not compute down(act({'gate, ' if shape.family.gated else ''}up)) times a token's "
                f"weights with any of {', '.join(known)} (config.json says {said!r:.80})",
            )
    found = fitting.pop()
    if found not in OWN_NAMES and said is not None and said != found:
        skeleton.fail("formula", f"{skeleton.sites[0].name} computes {found}, config.json says {said!r:.80}")
    return found


def _fitting(site: Site, shape: MoEShape, known: Sequence[HiddenAct]) -> Iterator[HiddenAct]:
    """Activations with which a layer's experts, of weights of chance, put out what transformers' module does."""
    parameters = dict(site.module.named_parameters())
    chance = Chance(parameters, shape.hidden_size, torch.float64)
    held = {name: chance[name] for name in parameters}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(SCALES), shape.hidden_size, generator=generator, dtype=torch.float64)
    x *= torch.tensor(SCALES)[:, None]
    experts = shape.of_layer(site.layer).num_experts
    chosen = min(_CHOSEN, experts)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in SCALES])
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64) + 0.3
    with _filled(site.module, held), torch.no_grad():
        put_out = site.module(x, ids, weights)
        slots = [(token, slot) for token in range(len(x)) for slot in range(chosen)]
        one = {e: module_experts(shape.family, held, range(e, e + 1)).one(0) for e in set(ids.flatten().tolist())}
        inner = {(t, s): one[int(ids[t, s])].preactivations(x[t, None]) for t, s in slots}
        # Faster code of transformers goes through this method of the module in the place of its `forward`.
        joined = [
            torch.stack(both, -1) if shape.family.interleaved else torch.stack(both, 1) for both in inner.values()
        ]
        faster = site.module._apply_gate if shape.family.gated else site.module.act_fn
        gates = faster(torch.cat(joined).flatten(1))
    for act in known:
        hidden = {place: activated(both, act) for place, both in inner.items()}
        want = torch.zeros_like(x)
        for (t, s), h in hidden.items():
            want[t] += one[int(ids[t, s])].output(h)[0] * weights[t, s]
        if _same(put_out, want) and _same(gates, torch.cat(list(hidden.values()))):
            yield act


def _same(found: Tensor, want: Tensor) -> bool:
    """Whether every row agrees."""
    near = found.shape == want.shape and (found - want).norm(dim=1) <= SAME * want.norm(dim=1)
    return isinstance(near, Tensor) and bool(near.all())


@contextmanager
def _filled(module: Any, held: dict[str, Tensor]) -> Iterator[None]:
    """An experts module with weights, computed by its own plain code."""
    usual, config = dict(module.named_parameters()), module.config
    implementation = getattr(config, "_experts_implementation", None)
    config._experts_implementation = "eager"
    for name, tensor in held.items():
        assign(module, name, tensor)
    try:
        yield
    finally:
        config._experts_implementation = implementation
        for name, tensor in usual.items():
            assign(module, name, tensor.data)


@dataclass
class _Seen:
    """What a forward pass of transformers shows.

    Attributes:
        entered, left: hidden states before and after every decoder layer.
        outputs: how many values layers return.
        top_k: how many experts tokens are routed to.
        called: layers whose experts are called.
        tail: the decoder's modules after the last layer, in turn.
    """

    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)
    top_k: set[int] = field(default_factory=set)
    called: set[int] = field(default_factory=set)
    tail: list[str] = field(default_factory=list)


class Trial:
    """A model with weights of chance, of its own sizes but for the embedding's; a `WeightSource`.

    Args:
        skeleton: the model.
        shape: its experts, as derived.
    """

    def __init__(self, skeleton: Skeleton, shape: MoEShape):
        self._skeleton, self.directory = skeleton, skeleton.directory
        self.config, self.shape = _with_few_rows(skeleton.config, skeleton), shape
        self._model = empty_model(self.config, skeleton.auto_class, self.directory)
        own = self._model.state_dict(keep_vars=True)
        part = {name: tensor for name, tensor in own.items() if name.startswith((skeleton.base, "lm_head."))}
        first = {id(tensor): name for name, tensor in reversed(part.items())}  # of tied ones
        chance = Chance({n: part[n] for n in first.values()}, shape.hidden_size, torch.float32, shape.num_experts)
        made = {name: chance[name] for name in first.values()}
        # Other parts of the model do not run, and stay without memory.
        self._held = own | {name: made[first[id(tensor)]] for name, tensor in part.items()}
        experts = {f"{site.name}.{name}" for site in skeleton.sites for name in self._expert_parameters}
        stored: dict[str, Tensor] = {}
        for name, tensor in self._held.items():
            if name not in experts:
                names = shape.family.stored_names(name)
                stored |= zip(names, tensor.chunk(len(names)), strict=True)
        self.tensors = HeldTensors(stored)

    @property
    def _expert_parameters(self) -> tuple[str, ...]:
        names = self.shape.family.fused_names
        return (*names, *(map(bias_name, names) if self.shape.family.bias else ()))

    def experts(self, layer: int, chunk: range | None = None) -> ExpertWeights:
        """Routed experts of a layer, see `WeightSource`."""
        prefix = f"{self.shape.family.module_decoder(layer)}.{self.shape.family.module_experts}"
        held = {name: self._held[f"{prefix}.{name}"] for name in self._expert_parameters}
        return module_experts(
            self.shape.family, held, range(self.shape.of_layer(layer).num_experts) if chunk is None else chunk
        )

    def compared(self) -> MoEShape:
        """The shape, with what only a forward pass shows, once every step of it gave what transformers computes.

        Raises:
            BitsmoeError: names the first step that did not.
        """
        rows, generator = language_config(self.config)["vocab_size"], torch.Generator().manual_seed(2)
        ids = torch.randint(0, rows, (WINDOWS, LENGTH), generator=generator)
        try:
            with torch.no_grad():
                logits, seen = self._passed_through(ids)
                self.shape = replace(self.shape, family=self._with(seen))
                for step, found, want in self._steps(ids, logits, seen):
                    difference = float((found - want).abs().max() / want.std()) if found.shape == want.shape else 1.0
                    if not difference <= NEAR:
                        raise ArithmeticError(f"{step} differs from transformers' by {difference:.2g} of its deviation")
        except COMPUTING_ERRORS as e:
            self._skeleton.fail("forward pass", f"{type(e).__name__}: {one_line(e)[:300]}")
        return self.shape

    def _steps(self, ids: Tensor, logits: Tensor, seen: _Seen) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each step of a forward pass: its name, what it gives here, and what it gives in transformers."""
        streamed = StreamedModel(self)
        hidden, arguments = streamed.embed(ids)
        yield "what enters the first layer", hidden, seen.entered[0]
        # Other tokens, and layers from the last to the first: nothing that one keeps to itself may matter to another.
        streamed.embed(ids.flip(1)[:, 1:])
        for index, (entering, leaving) in reversed(list(enumerate(zip(seen.entered, seen.left, strict=True)))):
            if index:
                yield f"what enters decoder layer {index}", seen.left[index - 1], entering
            with streamed.layer(index) as module:
                yield f"decoder layer {index}", next(streamed.through(module, [(entering, arguments)])), leaving
        yield "the logits", streamed.logits(seen.left[-1], streamed.head), logits

    def _passed_through(self, ids: Tensor) -> tuple[Tensor, _Seen]:
        """transformers' logits [n, L, V] of windows, and what was seen on the way."""
        seen, decoder = _Seen(), self._model.get_decoder()
        for name, tensor in self._held.items():
            assign(self._model, name, tensor)

        def enters(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.entered.append((args[0] if args else kwargs["hidden_states"]).clone())

        def leaves(_: Any, args: Any, out: Any) -> None:
            seen.outputs.add(len(out) if isinstance(out, tuple) else 1)
            seen.left.append((out[0] if isinstance(out, tuple) else out).clone())

        def follows(name: str, *_: Any) -> None:
            if len(seen.left) == len(decoder.layers):
                seen.tail.append(name)

        def calls(index: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) != 3 or kwargs or args[1].dim() != 2 or args[1].shape != args[2].shape:
                raise TypeError("experts are not called with hidden states, indices and weights of tokens")
            if not 0 <= int(args[1].min()) <= int(args[1].max()) < self.shape.of_layer(index).num_experts:
                raise ValueError("tokens are routed to experts that are not there")
            seen.called.add(index)
            seen.top_k.add(args[1].shape[1])

        with ExitStack() as stack:
            for index, layer in enumerate(decoder.layers):
                stack.enter_context(_removed(layer.register_forward_pre_hook(enters, with_kwargs=True)))
                stack.enter_context(_removed(layer.register_forward_hook(leaves)))
                if index in self.shape.layers:
                    experts: Any = layer.get_submodule(self.shape.family.module_experts)
                    experts.config._experts_implementation = "eager"
                    hook: Callable[..., None] = partial(calls, index)
                    stack.enter_context(_removed(experts.register_forward_pre_hook(hook, with_kwargs=True)))
            for name, part in decoder.named_children():
                if part not in (decoder.layers, getattr(decoder, self._skeleton.embedding)):
                    stack.enter_context(_removed(part.register_forward_hook(partial(follows, name))))
            return self._model(input_ids=ids, use_cache=False).logits, seen

    def _with(self, seen: _Seen) -> Any:
        """The family, with what was seen."""
        if silent := sorted(set(self.shape.layers) - seen.called):
            raise ValueError(f"experts of layers {silent} are not called")
        if len(seen.outputs) != 1 or len(seen.top_k) != 1:
            raise ValueError(f"layers return {sorted(seen.outputs)} values, tokens have {sorted(seen.top_k)} experts")
        if apart := sorted(set(self._skeleton.weighted) - set(seen.tail)):
            raise ValueError(f"{', '.join(apart)}, with weights, is not called after the last layer")
        (outputs,), (top_k,) = seen.outputs, seen.top_k
        keys = [k for k, v in self._skeleton.language.items() if _TOP_K.search(k) and _are_all(v, top_k)]
        if not keys:
            raise ValueError(f"no key of config.json says that tokens have {top_k} experts")
        return replace(self.shape.family, layer_outputs=outputs, top_k_key=keys[0], module_tail=tuple(seen.tail))


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    """A hook that is there for a while."""
    try:
        yield
    finally:
        handle.remove()


def _are_all(value: Any, number: int) -> bool:
    return value == number if not isinstance(value, list) else set(map(str, value)) == {str(number)}


def _with_few_rows(config: dict[str, Any], skeleton: Skeleton) -> dict[str, Any]:
    """config.json of the same model with a small vocabulary."""
    found = deepcopy(config)
    for part in (found, found[skeleton.text.config] if skeleton.text else found):
        if isinstance(part.get("vocab_size"), int):
            part["vocab_size"] = min(part["vocab_size"], ROWS)
        if part.get("pad_token_id") is not None:
            part["pad_token_id"] = 0
    return found
