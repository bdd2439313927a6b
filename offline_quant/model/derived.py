"""Models outside the table: what a row would say is derived from transformers and the names of files, and verified.

Nothing is guessed. transformers' own model says where the experts are and what they compute; its conversion of names
says how files hold them. Then its forward pass is compared with the streamed one, with weights of chance. A model that
fails one of these checks is refused with that check.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
import transformers
from torch import Tensor, nn

from bitsmoe_kernels.errors import BitsmoeError, fault_list, one_line
from bitsmoe_kernels.expert_mlp import ACTIVATIONS, OWN_NAMES, HiddenAct, gated
from bitsmoe_kernels.format.schema import TensorSpec
from bitsmoe_kernels.models.families import (
    EXPERT_COUNT_KEYS,
    FUSED_NAMES,
    MAX_LAYERS,
    MAX_SIZE,
    Family,
    MoEShape,
    bias_name,
    in_table,
    language_config,
    moe_shape,
    text_part,
)
from offline_quant.model.expert_files import module_experts
from offline_quant.model.expert_weights import ExpertWeights
from offline_quant.model.streaming import COMPUTING_ERRORS, StreamedModel, assign, empty_model, transformers_config

TITLE = "outside the table"
"""In the place of the names of a family's models."""
_VOCABULARY, _WINDOWS, _LENGTH = 512, 2, 12
"""Of the pass that is compared: rows of the embedding at most, and windows of so many tokens."""
_EQUAL = 1e-4
"""Largest difference of logits between transformers' pass and the streamed one, in their standard deviations."""
_FORMULA = 1e-5
"""Largest relative difference of what experts put out, in float64; the nearest two activations differ by 1e-3."""
_SCALES = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Spread of gates and ups when the formula is compared: far on both sides of every clamp."""
_CHOSEN = 2
"""Experts of a token when the formula is compared."""
_TOP_K_KEY = re.compile(r"experts_per_tok|top_?k_expert|experts?_top_?k|moe_(top_?)?k|^top_?k$")
_FIRST_EXPERT = re.compile(r"(?P<prefix>.+)\.0\.(?P<projection>[^.]+)\.weight")
_LATER_EXPERT = re.compile(r"\.experts\.[1-9]\d*\.")
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation")


def model_shape(
    config: dict[str, Any],
    directory: Path,
    names: Callable[[], Collection[str]],
    prefixes: Collection[str] = (),
) -> MoEShape:
    """A model's experts, from the table, or derived and verified where that does not know the architecture.

    Args:
        config: config.json.
        directory: of the model.
        names: of the stored tensors, asked for outside the table only.
        prefixes: of the experts that a bitsmoe checkpoint holds quantized.

    Raises:
        BitsmoeError: not a MoE model, one that is known not to work, or the check that failed.
    """
    if in_table(config, str(directory)):
        return moe_shape(config, str(directory))
    return _Derivation(config, directory).shape(names(), prefixes)


def untested(shape: MoEShape, subject: str) -> str | None:
    """What to say of a model outside the table, in one sentence; None for those of the table."""
    if shape.family.tested != "derived":
        return None
    return (
        f"{subject}: nobody has tested {shape.family.architecture}; what is known of it was derived from transformers "
        "and checked, and vLLM is not known to serve it"
    )


@dataclass(frozen=True)
class _Site:
    """Routed experts in transformers' model: of decoder layer `layer`, called `name` within the model."""

    layer: int
    name: str
    module: Any


@dataclass(frozen=True)
class _Stored:
    """How files hold experts: names as `Family` has them, and those of all other tensors."""

    base: str
    experts: str
    projections: tuple[str, str, str]
    stacked: tuple[str, str] | None
    transposed: bool
    others: Mapping[str, tuple[str, ...]]


class _Derivation:
    """One model outside the table.

    Args:
        config: config.json.
        directory: of the model.
    """

    def __init__(self, config: dict[str, Any], directory: Path):
        self.config = config
        self.directory = directory
        self.architecture = str((config.get("architectures") or [None])[0])
        self._check_sizes()
        known = transformers_config(config, directory)
        self.text = text_part(config)
        usual = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
        ways = usual[::-1] if self.text else usual
        auto = next((way for way in ways if type(known) in getattr(transformers, way)._model_mapping), None)
        if auto is None:
            self.fail("class", f"transformers has no language model of model_type {config.get('model_type')!r:.80}")
        self.built_by = auto
        self.model = empty_model(config, auto, directory)
        if (built := type(self.model).__name__) != self.architecture:
            self.fail("class", f"transformers builds {built} from config.json")
        self.module_base = self._module_base()
        self.sites = self._sites()
        self.tail = self._tail()

    def fail(self, check: str, *faults: str) -> NoReturn:
        """Refuse the model.

        Raises:
            BitsmoeError: names the check and every fault that it found.
        """
        raise BitsmoeError(
            fault_list(
                f"{self.directory}: architecture {self.architecture:.200} is not supported: it is {TITLE}, and fails "
                f"the check of its {check}",
                list(faults),
            )
        )

    def _check_sizes(self) -> None:
        own = language_config(self.config)
        counts = [key for key in EXPERT_COUNT_KEYS if own.get(key) is not None]
        most = {"num_hidden_layers": MAX_LAYERS}
        faults = [
            f"{key} is {own.get(key)!r:.80}, but must be a whole number above 0, at most {most.get(key, MAX_SIZE)}"
            for key in ("num_hidden_layers", "hidden_size", "vocab_size", *counts)
            if type(own.get(key)) is not int or not 1 <= own[key] <= most.get(key, MAX_SIZE)
        ]
        if faults:
            self.fail("config.json", *faults)

    def _module_base(self) -> str:
        decoder = self.model.get_decoder()
        path = next((name for name, module in self.model.named_modules() if module is decoder), None)
        layers, embedding = (getattr(decoder, part, None) for part in ("layers", "embed_tokens"))
        if path is None or not isinstance(layers, nn.ModuleList) or not isinstance(embedding, nn.Embedding):
            self.fail("decoder", f"{type(decoder).__name__} does not hold embed_tokens and layers")
        if len(layers) != (said := language_config(self.config)["num_hidden_layers"]):
            self.fail("decoder", f"transformers builds {len(layers)} layers, num_hidden_layers is {said}")
        if self.text is None and path != "model":
            self.fail("decoder", f"transformers calls it {path!r}, where only 'model' is read")
        return f"{path}."

    def _tail(self) -> tuple[str, ...]:
        """The decoder's modules with weights beside its layers, which must be between the last of them and the head."""
        decoder = self.model.get_decoder()
        beside = {name.partition(".")[0] for name in decoder.state_dict()} - {"layers", "embed_tokens"}
        modules = [name for name, _ in decoder.named_children() if name in beside]
        if loose := sorted(beside - set(modules)):
            self.fail("decoder", f"it holds weights outside its modules: {', '.join(loose)}")
        return tuple(modules)

    def _sites(self) -> list[_Site]:
        layers = self.model.get_decoder().layers
        found: list[_Site] = []
        faults: list[str] = []
        for index, layer in enumerate(layers):
            for name, module in layer.named_modules():
                own = dict(module.named_parameters(recurse=False))
                marked = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
                if marked or any(tensor.dim() == 3 and part in FUSED_NAMES for part, tensor in own.items()):
                    found.append(_Site(index, f"{self.module_base}layers.{index}.{name}", module))
                    faults += [f"{found[-1].name}: {fault}" for fault in _module_faults(module)]
        if not found:
            self.fail("experts", "transformers builds no module with gate_up_proj and down_proj of all experts")
        if faults:
            self.fail("experts", *faults)
        if double := sorted({site.layer for i, site in enumerate(found) if site.layer in [s.layer for s in found[:i]]}):
            self.fail("experts", f"decoder layers {double} have several groups of experts")
        first, hidden = found[0], language_config(self.config)["hidden_size"]
        ends = {site.name.removeprefix(f"{self.module_base}layers.{site.layer}.") for site in found}
        sizes = {_sizes(site.module) for site in found}
        forms = {(site.module.has_bias, site.module.is_transposed, type(site.module)) for site in found}
        if len(ends) > 1 or len(sizes) > 1 or len(forms) > 1:
            self.fail("experts", f"layers have experts of unequal names or sizes: {sorted(ends)}, {sorted(sizes)}")
        if _sizes(first.module)[1] != hidden:
            self.fail("experts", f"they see {_sizes(first.module)[1]} values of a token, hidden_size is {hidden}")
        return found

    def shape(self, names: Collection[str], prefixes: Collection[str]) -> MoEShape:
        """The experts, once every check has passed.

        Args:
            names: of the stored tensors.
            prefixes: see `model_shape`.
        """
        stored = _Names(self, names).stored(prefixes)
        first = self.sites[0]
        E, H, I = _sizes(first.module)  # noqa: E741
        text = None if self.text is None else replace(self.text, prefix=self.module_base, head="lm_head")
        in_module = first.name.removeprefix(f"{self.module_base}layers.{first.layer}.")
        layers = tuple(site.layer for site in self.sites)
        family = Family(
            self.architecture,
            str(self.config["model_type"]),
            TITLE,
            num_experts_key="num_experts",
            intermediate_size_key="moe_intermediate_size",
            moe_layers=partial(_these, layers),
            experts=stored.experts,
            projections=stored.projections,
            stacked=stored.stacked,
            transposed=stored.transposed,
            interleaved=first.module.is_transposed,
            bias=first.module.has_bias,
            module_names=((f".{stored.experts}.", f".{in_module}."),),
            module_experts=in_module,
            module_tail=self.tail,
            text=text,
            stored_base=stored.base,
            stored_as=stored.others,
            built_by=self.built_by,
            tested="derived",
        )
        found = MoEShape(family, layers, E, H, I)
        return self._compared(replace(found, hidden_act=self._activation(found)))

    def _activation(self, shape: MoEShape) -> HiddenAct:
        """The activation by which the experts of every layer compute what transformers' module computes."""
        fitting = [act for act in ACTIVATIONS if all(self._computes(site, shape, act) for site in self.sites)]
        own = language_config(self.config)
        said = next((own[key] for key in _ACTIVATION_KEYS if own.get(key) is not None), None)
        if len(fitting) != 1:
            self.fail(
                "formula",
                f"{self.sites[0].name} does not compute down(act(gate, up)) weighed for each token with one of "
                f"{', '.join(ACTIVATIONS)} (hidden_act is {said!r:.80})",
            )
        if fitting[0] not in OWN_NAMES and said is not None and said != fitting[0]:
            self.fail("formula", f"{self.sites[0].name} computes {fitting[0]}, config.json says {said!r:.80}")
        return fitting[0]

    def _computes(self, site: _Site, shape: MoEShape, act: HiddenAct) -> bool:
        """Whether a layer's experts, of weights of chance, put out what is computed here with an activation."""
        E, H = shape.num_experts, shape.hidden_size
        chance = _Chance(dict(site.module.named_parameters()), H, torch.float64)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(len(_SCALES), H, generator=generator, dtype=torch.float64) * torch.tensor(_SCALES)[:, None]
        chosen = min(_CHOSEN, E)
        ids = torch.stack([torch.randperm(E, generator=generator)[:chosen] for _ in _SCALES])
        ids[-1, -1] = E - 1 if E - 1 not in ids[-1] else ids[-1, -1]
        weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64) + 0.3
        held = {name: chance[name] for name, _ in site.module.named_parameters()}
        want = torch.zeros_like(x)
        both = torch.empty(0)
        for token, slot in [(t, s) for t in range(len(x)) for s in range(chosen)]:
            e = int(ids[token, slot])
            one = module_experts(shape.family, held, range(e, e + 1)).one(0)
            gate, up = one.gate_and_up(x[token, None])
            want[token] += one.output(gated(gate, up, act))[0] * weights[token, slot]
            both = torch.stack([gate, up], -1).flatten(1) if shape.family.interleaved else torch.cat([gate, up], -1)
        with _filled(site.module, held), _eager(site.module), torch.no_grad():
            try:
                found = site.module(x, ids, weights)
                h = site.module._apply_gate(both)
            except COMPUTING_ERRORS as e:
                self.fail("formula", f"{site.name} cannot be computed ({type(e).__name__}: {one_line(e)[:200]})")
        return _near(found, want) and _near(h, gated(gate, up, act))

    def _compared(self, shape: MoEShape) -> MoEShape:
        """The shape, once the streamed pass through layers of every kind gives transformers' own logits."""
        depth = self._depth()
        while True:
            try:
                return _Pass(self, shape, depth).compared()
            except _OtherLayersError as e:
                if depth == len(self.model.get_decoder().layers):
                    self.fail("forward pass", str(e))
                depth = len(self.model.get_decoder().layers)

    def _depth(self) -> int:
        """Layers that hold one of every kind, and one more, through which a layer could pass something on."""
        layers = self.model.get_decoder().layers
        kinds: dict[Any, int] = {}
        lists = [v for v in language_config(self.config).values() if isinstance(v, list) and len(v) == len(layers)]
        for index, layer in enumerate(layers):
            tensors = tuple((name, tuple(tensor.shape)) for name, tensor in layer.state_dict(keep_vars=True).items())
            plain = tuple(
                (name, key, value)
                for name, module in layer.named_modules()
                for key, value in vars(module).items()
                if isinstance(value, bool | str | float) or (isinstance(value, int) and "idx" not in key)
            )
            kinds.setdefault((tensors, plain, tuple(str(each[index]) for each in lists)), index)
        return min(len(layers), max(kinds.values()) + 2)


class _OtherLayersError(Exception):
    """A model of fewer layers is not the beginning of the whole one."""


class _Names:
    """What transformers makes of the stored names.

    Args:
        derivation: of the model.
        names: of the stored tensors.
    """

    def __init__(self, derivation: _Derivation, names: Collection[str]):
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key
        except ImportError:
            derivation.fail("names", f"transformers {transformers.__version__} does not say how it converts them")
        self._of = derivation
        self._model = derivation.model
        self._own = self._model.state_dict()
        mapping = get_model_conversion_mapping(self._model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted((n for n in names if not _LATER_EXPERT.search(n)), key=dot_natural_key):
            target, pattern = self._target(name)
            if target in self._own:
                self._sources.setdefault(target, []).append((name, pattern))

    def _target(self, name: str) -> tuple[str, str | None]:
        """The parameter that transformers fills from a stored tensor, and the converter's pattern that takes it."""
        from transformers.core_model_loading import rename_source_key

        base = self._model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, base, self._own)
        if target not in self._own and name in self._own:
            return rename_source_key(name, [], [], base, self._own)
        return target, pattern

    def _converter(self, pattern: str) -> Any:
        return next(entry for entry in self._converters if pattern in entry.source_patterns)

    def _operations(self, pattern: str) -> list[str]:
        return [type(operation).__name__ for operation in self._converter(pattern).operations]

    def stored(self, prefixes: Collection[str]) -> _Stored:
        """How files hold the experts, and the names of all other tensors."""
        of, faults = self._of, []
        found = []
        for site in of.sites:
            try:
                names = self._quantized(site, prefixes) if prefixes else self._experts(site)
                found.append((*_apart(names[0], site.layer), *names[1:]))
            except ValueError as e:
                faults.append(f"{site.name}: {e}")
        if faults:
            of.fail("names", *faults)
        if len(set(found)) > 1:
            of.fail("names", f"layers hold experts in different ways: {sorted(map(str, set(found)))[:2]}")
        base, experts, projections, stacked, transposed = found[0]
        return _Stored(base, experts, projections, stacked, transposed, self._others())

    def _quantized(self, site: _Site, prefixes: Collection[str]) -> tuple[str, Any, Any, bool]:
        """Experts of a bitsmoe checkpoint: by their prefix, and stacked when they are written as ordinary ones."""
        for prefix in prefixes:
            if self._finds(prefix, site):
                experts = _apart(prefix, site.layer)[1]
                return prefix, _USUAL, tuple(f"{experts}.{name}" for name in FUSED_NAMES), False
        raise ValueError(f"quantization_config has no layer of this name, but {', '.join(sorted(prefixes)[:3])}")

    def _experts(self, site: _Site) -> tuple[str, Any, Any, bool]:
        """Prefix of a layer's experts, projections, stacked names in the layer, and whether those are transposed."""
        both, down = (self._sources.get(f"{site.name}.{name}", []) for name in FUSED_NAMES)
        if not both or not down:
            lacking = " and ".join(n for n, found in zip(FUSED_NAMES, (both, down), strict=True) if not found)
            raise ValueError(f"no stored tensor becomes {lacking}")
        if len(both) == len(down) == 1:
            return self._stacked(site, both[0], down[0])
        return self._one_by_one(site, both, down)

    def _stacked(
        self, site: _Site, both: tuple[str, str | None], down: tuple[str, str | None]
    ) -> tuple[str, Any, Any, bool]:
        patterns = [pattern for _, pattern in (both, down) if pattern is not None]
        operations = [operation for pattern in patterns for operation in self._operations(pattern)]
        transposed = operations == ["Transpose", "Transpose"]
        _, H, I = _sizes(site.module)  # noqa: E741
        if operations and (not transposed or site.module.is_transposed or H in (I, 2 * I)):
            raise ValueError(f"{both[0]} is converted by {', '.join(operations)}, which is not read here")
        if site.module.has_bias:
            for name, (stored, _) in zip(FUSED_NAMES, (both, down), strict=True):
                if [n for n, _ in self._sources.get(f"{site.name}.{bias_name(name)}", [])] != [bias_name(stored)]:
                    raise ValueError(f"its biases are not stored as {bias_name(stored)}")
        prefix = self._prefix(site, both[0].removesuffix(f".{FUSED_NAMES[0]}"))
        base = prefix.removesuffix(_apart(prefix, site.layer)[1])
        if not all(name.startswith(base) for name, _ in (both, down)):
            raise ValueError(f"{both[0]} and {down[0]} are not of one decoder layer")
        return prefix, _USUAL, (both[0].removeprefix(base), down[0].removeprefix(base)), transposed

    def _prefix(self, site: _Site, candidate: str) -> str:
        """What a checkpoint calls these experts: a prefix from which transformers finds its own names again."""
        for prefix in (candidate, site.name):
            if self._finds(prefix, site):
                return prefix
        raise ValueError(f"{candidate} is no name from which transformers finds the experts")

    def _finds(self, prefix: str, site: _Site) -> bool:
        """Whether transformers reads stacked matrices of this prefix as they are."""
        for name in FUSED_NAMES:
            target, pattern = self._target(f"{prefix}.{name}")
            operations = self._converter(pattern).operations if pattern is not None else []
            if target != f"{site.name}.{name}" or not all(getattr(o, "check_dims", False) for o in operations):
                return False
        return True

    def _one_by_one(
        self, site: _Site, both: list[tuple[str, str | None]], down: list[tuple[str, str | None]]
    ) -> tuple[str, Any, Any, bool]:
        if site.module.is_transposed or site.module.has_bias:
            raise ValueError("matrices of one expert each become transposed ones, or have biases")
        named: dict[str, tuple[str, str]] = {}
        for name, pattern in (*both, *down):
            match = _FIRST_EXPERT.fullmatch(name)
            if match is None or pattern is None:
                raise ValueError(f"{name} is not named after expert 0")
            named[pattern] = (match["prefix"], match["projection"])
        order = [p for p in self._converter(cast(str, both[0][1])).source_patterns if p in named]
        order += [cast(str, pattern) for _, pattern in down]
        prefixes = {prefix for prefix, _ in named.values()}
        if len(both) != 2 or len(down) != 1 or len(named) != 3 or len(order) != 3 or len(prefixes) != 1:
            raise ValueError(f"{', '.join(name for name, _ in (*both, *down))} are no gate, up and down")
        self._check_conversion(site, order)
        prefix = self._prefix(site, prefixes.pop())
        return prefix, tuple(named[pattern][1] for pattern in order), None, False

    def _check_conversion(self, site: _Site, order: list[str]) -> None:
        """Let transformers convert two small experts, and compare with what is read here."""
        sizes = [(3, 5), (3, 5), (5, 3)]
        generator = torch.Generator().manual_seed(0)
        each = {p: [torch.randn(s, generator=generator) for _ in range(2)] for p, s in zip(order, sizes, strict=True)}
        gate, up, down = (torch.stack(each[pattern]) for pattern in order)
        for name, patterns, want in (
            (FUSED_NAMES[0], order[:2], torch.cat([gate, up], 1)),
            (FUSED_NAMES[1], order[2:], down),
        ):
            target = f"{site.name}.{name}"
            converter = deepcopy(self._converter(patterns[0]))
            for pattern in patterns:
                for e, tensor in enumerate(each[pattern]):
                    converter.add_tensor(target, f"{pattern}.{e}", pattern, tensor)
            found = converter.convert(target, model=self._model, config=self._model.config)
            if list(found) != [target] or not torch.equal(_tensor(found[target]), want):
                raise ValueError(f"transformers does not stack gate, up and down to {name}")

    def _others(self) -> dict[str, tuple[str, ...]]:
        """Names in files of the tensors outside the experts."""
        of = self._of
        experts = {f"{site.name}.{part}" for site in of.sites for part, _ in site.module.named_parameters()}
        found, faults = {}, []
        for target, sources in self._sources.items():
            if target in experts:
                continue
            names, patterns = [n for n, _ in sources], [p for _, p in sources]
            if all(pattern is None for pattern in patterns):
                if len(names) > 1:
                    faults.append(f"{', '.join(names)} all become {target}")
            else:
                converter = self._converter(next(p for p in patterns if p is not None))
                joined = [(type(o).__name__, getattr(o, "dim", None)) for o in converter.operations]
                if joined != [("Concatenate", 0)] or sorted(map(str, patterns)) != sorted(converter.source_patterns):
                    if not target.startswith((of.module_base, "lm_head.")):
                        continue  # of a part that is only copied
                    operations = ", ".join(type(o).__name__ for o in converter.operations)
                    faults.append(f"{names[0]} is converted by {operations} to {target}, which is not read here")
                names = [n for _, n in sorted(zip(map(converter.source_patterns.index, patterns), names, strict=True))]
            found[target] = tuple(names)
        if faults:
            of.fail("names", *faults)
        return found


class _Chance:
    """Weights of chance for tensors of any size, with the memory of the largest.

    Matrices are windows into one vector, each at a place of its own; so are the matrices of experts.

    Args:
        tensors: with their shapes.
        hidden_size: inverse of the weights' variance.
        dtype: of the weights.
        count: below which whole numbers are.
    """

    def __init__(self, tensors: Mapping[str, Tensor], hidden_size: int, dtype: torch.dtype, count: int = 1):
        self._tensors, self._count = tensors, count
        self._places = {name: _STEP * i for i, name in enumerate(tensors)}
        needed = max((_window(t) for t in tensors.values()), default=0) + _STEP * len(tensors)
        generator = torch.Generator().manual_seed(0)
        self._base = torch.randn(needed, generator=generator, dtype=dtype) * hidden_size**-0.5
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._kept:
            self._kept[name] = self._made(name)
        return self._kept[name]

    def _made(self, name: str) -> Tensor:
        like, place = self._tensors[name], self._places[name]
        if not like.is_floating_point():
            return (torch.arange(like.numel()) % self._count).to(like.dtype).view(like.shape)
        if like.dim() > 2:
            inner = torch.empty(like.shape[1:], device="meta").stride()
            return self._base[place:].as_strided(like.shape, (1, *inner))
        window = self._base[place : place + like.numel()].view(like.shape)
        return window if like.dim() == 2 else 1 + window


_STEP = 7
_USUAL = ("gate_proj", "up_proj", "down_proj")


def _window(tensor: Tensor) -> int:
    """Values of the vector that a window for a tensor covers."""
    return tensor.numel() if tensor.dim() <= 2 else tensor[0].numel() + len(tensor)


class _ChanceTensors:
    """Stored tensors of a model with weights of chance, see `Tensors`."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self.specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name]


class _Seen(NamedTuple):
    """What a pass of transformers shows: values that layers return, experts of a token, the tail's modules in turn."""

    outputs: int
    top_k: int
    tail: list[str]


class _Pass:
    """A model of the first layers with weights of chance; a `WeightSource`.

    Args:
        derivation: of the whole model.
        shape: of the whole model.
        depth: layers.
    """

    def __init__(self, derivation: _Derivation, shape: MoEShape, depth: int):
        self._of, self.directory = derivation, derivation.directory
        self.config = _shallow(derivation.config, depth)
        self.shape = replace(shape, layers=tuple(i for i in shape.layers if i < depth))
        try:
            self.model = empty_model(self.config, derivation.built_by, derivation.directory)
        except BitsmoeError as e:
            raise _OtherLayersError(str(e)) from None
        if faults := self.shape.expert_faults(self.model):
            raise _OtherLayersError(faults[0])
        own = self.model.state_dict(keep_vars=True)
        part = {n: t for n, t in own.items() if n.startswith((derivation.module_base, "lm_head."))}
        once = {id(tensor): name for name, tensor in reversed(part.items())}
        chance = _Chance({n: part[n] for n in once.values()}, shape.hidden_size, torch.float32, shape.num_experts)
        # Other parts of the model do not run.
        self._held = own | {name: chance[once[id(tensor)]] for name, tensor in part.items()}
        self.family = shape.family
        self.tensors = self._stored()

    def _stored(self) -> _ChanceTensors:
        experts = tuple(f"{self.family.module_decoder(i)}.{self.family.module_experts}." for i in self.shape.layers)
        found: dict[str, Tensor] = {}
        for name, tensor in self._held.items():
            names = self.family.stored_names(name)
            if not (name.startswith(experts) and name.rpartition(".")[2] in _expert_parameters(self.family)):
                found |= zip(names, tensor.chunk(len(names)), strict=True)
        return _ChanceTensors(found)

    def experts(self, layer: int, chunk: range | None = None) -> ExpertWeights:
        """Routed experts of a layer, see `WeightSource`."""
        prefix = f"{self.family.module_decoder(layer)}.{self.family.module_experts}"
        held = {name: self._held[f"{prefix}.{name}"] for name in _expert_parameters(self.family)}
        return module_experts(self.family, held, range(self.shape.num_experts) if chunk is None else chunk)

    def compared(self) -> MoEShape:
        """The whole model's shape, with what the pass shows: how many experts a token has, what layers return."""
        generator, of = torch.Generator().manual_seed(2), self._of
        rows = language_config(self.config)["vocab_size"]
        ids = torch.randint(0, rows, (_WINDOWS, _LENGTH), generator=generator)
        try:
            want, seen = self._own_logits(ids)
            if apart := sorted(set(self.family.module_tail) - set(seen.tail)):
                raise ValueError(f"modules of the decoder with weights do not follow its last layer: {apart}")
            key = self._top_k_key(seen.top_k)
            self.family = replace(self.family, layer_outputs=seen.outputs, top_k_key=key, module_tail=tuple(seen.tail))
            self.shape = replace(self.shape, family=self.family)
            found = _streamed_logits(StreamedModel(self), ids)
        except COMPUTING_ERRORS as e:
            of.fail("forward pass", f"it cannot be computed ({type(e).__name__}: {one_line(e)[:300]})")
        difference = float((found - want).abs().max() / want.std())
        if not difference <= _EQUAL:
            of.fail(
                "forward pass",
                f"streamed through its first {len(self.model.get_decoder().layers)} layers, logits differ from those "
                f"of transformers by {difference:.2g} of their standard deviation",
            )
        return replace(self.shape, layers=tuple(site.layer for site in of.sites))

    @torch.no_grad()
    def _own_logits(self, ids: Tensor) -> tuple[Tensor, "_Seen"]:
        """transformers' logits, and what was seen on the way."""
        outputs, chosen, called, ended = set(), set(), set(), set()
        decoder, tail = self.model.get_decoder(), []
        layers = decoder.layers
        for name, tensor in self._held.items():
            assign(self.model, name, tensor)
        handles = [
            layer.register_forward_hook(lambda _m, _i, out: outputs.add(len(out) if isinstance(out, tuple) else 1))
            for layer in layers
        ]

        handles.append(layers[-1].register_forward_hook(lambda *_: ended.add(True)))
        for name, part in decoder.named_children():
            if part not in (layers, decoder.embed_tokens):
                handles.append(part.register_forward_hook(lambda *_, name=name: tail.append(name) if ended else None))

        def watch(index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.add(index)
            if len(args) != 3 or kwargs or args[1].shape != args[2].shape or args[1].dim() != 2:
                raise TypeError("experts are not called with hidden states, indices and weights of the tokens")
            if not 0 <= int(args[1].min()) <= int(args[1].max()) < self.shape.num_experts:
                raise ValueError("tokens are routed to experts that are not there")
            chosen.add(args[1].shape[1])

        for index in self.shape.layers:
            experts: Any = layers[index].get_submodule(self.family.module_experts)
            experts.config._experts_implementation = "eager"
            handles.append(experts.register_forward_pre_hook(partial(watch, index), with_kwargs=True))
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        if called != set(self.shape.layers):
            raise ValueError(f"experts of layers {sorted(set(self.shape.layers) - called)} are not called")
        if len(outputs) != 1 or len(chosen) != 1:
            raise ValueError(f"layers return {sorted(outputs)} values, and route to {sorted(chosen)} experts")
        return logits, _Seen(outputs.pop(), chosen.pop(), tail)

    def _top_k_key(self, top_k: int) -> str:
        own = language_config(self.config)
        for key, value in own.items():
            if _TOP_K_KEY.search(key) and (value == top_k or (isinstance(value, list) and set(value) == {top_k})):
                return key
        self._of.fail("config.json", f"none of its keys says that a token is routed to {top_k} experts")


def _shallow(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """config.json of a model of the first layers, with few rows in its embedding."""
    found = deepcopy(config)
    text = text_part(config)
    part = found[text.config] if text else found
    layers = part["num_hidden_layers"]
    for key, value in part.items():
        if isinstance(value, list) and len(value) == layers:
            part[key] = value[:depth]
    for each in (part, found):
        each |= {"num_hidden_layers": depth} if "num_hidden_layers" in each else {}
        each |= {"vocab_size": min(each["vocab_size"], _VOCABULARY)} if "vocab_size" in each else {}
        each |= {"pad_token_id": 0} if each.get("pad_token_id") is not None else {}
    return found


@torch.no_grad()
def _streamed_logits(model: StreamedModel, ids: Tensor) -> Tensor:
    batches = [model.embed(ids)]
    for index in range(model.num_layers):
        with model.layer(index) as module:
            batches = [(h, batch[1]) for h, batch in zip(model.through(module, batches), batches, strict=True)]
    return model.logits(batches[0][0], model.head)


def _module_faults(module: Any) -> Iterator[str]:
    """Why a module that holds matrices of all experts cannot be quantized."""
    flags = [getattr(module, name, None) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")]
    if None in flags:
        yield "it is not of the common kind of transformers' experts, and may be called otherwise"
        return
    if not flags[0]:
        yield "its experts have two matrices and no gate, which the checkpoint format does not hold"
        return
    if flags[2] == flags[3]:
        yield f"is_transposed is {flags[2]} and is_concatenated {flags[3]}, which is not read here"
        return
    wanted = {*FUSED_NAMES, *(map(bias_name, FUSED_NAMES) if flags[1] else ())}
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    if own.keys() != wanted:
        yield f"it holds {', '.join(sorted(own))}, where {', '.join(sorted(wanted))} are known"
        return
    both, down = (tuple(own[name].shape) for name in FUSED_NAMES)
    E, H, I = _sizes(module) if len(both) == len(down) == 3 else (0, 0, 0)  # noqa: E741
    expected = [(E, H, 2 * I), (E, I, H)] if flags[2] else [(E, 2 * I, H), (E, H, I)]
    if [both, down] != expected:
        yield f"matrices are {list(both)} and {list(down)}, which are no gate, up and down"


def _sizes(module: Any) -> tuple[int, int, int]:
    """E, H and I of an experts module."""
    E, first, second = module.down_proj.shape
    return (E, second, first) if module.is_transposed else (E, first, second)


def _expert_parameters(family: Family) -> tuple[str, ...]:
    return (*FUSED_NAMES, *(map(bias_name, FUSED_NAMES) if family.bias else ()))


def _these(layers: tuple[int, ...], config: dict[str, Any]) -> list[int]:
    return list(layers)


def _apart(prefix: str, layer: int) -> tuple[str, str]:
    """What precedes `layers.` in the stored name of a decoder layer's experts, and what follows the layer."""
    before, found, after = prefix.partition(f"layers.{layer}.")
    if not found:
        raise ValueError(f"{prefix} is not named after decoder layer {layer}")
    return before, after


def _tensor(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _near(found: Tensor, want: Tensor) -> bool:
    """Whether every token's values agree."""
    if found.shape != want.shape:
        return False
    return bool(((found - want).norm(dim=-1) <= _FORMULA * want.norm(dim=-1)).all())


class _filled:  # noqa: N801 - used as a function
    """Weights in a module of parameters without memory, which it gets back."""

    def __init__(self, module: nn.Module, held: Mapping[str, Tensor]):
        self._module, self._held = module, held

    def __enter__(self) -> None:
        self._usual = dict(self._module.named_parameters())
        for name, tensor in self._held.items():
            assign(self._module, name, tensor)

    def __exit__(self, *_: object) -> None:
        for name, tensor in self._usual.items():
            assign(self._module, name, tensor.data)


class _eager:  # noqa: N801 - used as a function
    """transformers' plain code for a module's experts, which others must agree with."""

    def __init__(self, module: Any):
        self._config = module.config

    def __enter__(self) -> None:
        self._usual = getattr(self._config, "_experts_implementation", None)
        self._config._experts_implementation = "eager"

    def __exit__(self, *_: object) -> None:
        self._config._experts_implementation = self._usual
