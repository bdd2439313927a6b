"""transformers' model of a config.json without memory: where its routed experts are."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import transformers
from torch import Tensor, nn

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.models.families import (
    EXPERT_COUNT_KEYS,
    FUSED_NAMES,
    FUSED_WITHOUT_GATE,
    MAX_LAYERS,
    MAX_SIZE,
    bias_name,
    language_config,
    named_architectures,
    text_part,
)
from offline_quant.model.streaming import empty_model, transformers_config

OUTSIDE = "outside the table"
"""In the place of the names of a family's models."""
_FUSED = {*FUSED_NAMES, *FUSED_WITHOUT_GATE}
MAX_EXPERTS, MAX_VALUES = 1 << 16, 1 << 29
"""Beyond any model: experts of a layer, and values of a tensor, for which memory is taken when a model is tried."""
_OTHER_SIZES = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "max_position_embeddings",
)  # fmt: skip
"""Keys of config.json by which memory is foreseen and windows are cut, where they are present."""
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText")


@dataclass(frozen=True)
class Site:
    """The routed experts of one decoder layer in transformers' model.

    Attributes:
        layer: index of the decoder layer.
        name: of the experts' module in the model.
        module: the experts; their parameters are without memory.
    """

    layer: int
    name: str
    module: Any


class Skeleton:
    """A model outside the table, built without memory.

    Args:
        config: config.json.
        directory: of the model.

    Raises:
        BitsmoeError: names the check that failed.
    """

    def __init__(self, config: dict[str, Any], directory: Path):
        self.config = config
        self.directory = directory
        self.passed: list[str] = []
        named = named_architectures(config)
        self.architecture = named[0] if named else ""
        self.language = language_config(config)
        self.text = text_part(config)
        self._check_sizes()
        try:
            self.auto_class = self._auto_class()
            self.model = empty_model(config, self.auto_class, directory)
        except BitsmoeError as e:
            self.fail("class", str(e).removeprefix(f"{directory}: "))
        if (built := type(self.model).__name__) != self.architecture:
            names = f"names {self.architecture!r:.80}" if named else "has no architectures"
            self.fail("class", f"transformers builds {built} from config.json, which {names}")
        self.passed.append("class")
        self.base = self._base()
        self.weighted = self._weighted()
        self._check_values()
        self.passed.append("decoder")
        self.sites = self._sites()
        self.passed.append("experts")

    def fail(self, check: str, *faults: str) -> NoReturn:
        """Refuse the model.

        Raises:
            BitsmoeError: names the check, and every fault that it found.
        """
        passed = f" (passed before it: {', '.join(self.passed)})" if self.passed else ""
        shown = f"{self.directory}: architecture {named_architectures(self.config)!s:.200} is not supported"
        raise BitsmoeError(
            fault_list(f"{shown}: it is {OUTSIDE}, and fails the check of its {check}{passed}", list(faults))
        )

    def _check_sizes(self) -> None:
        own = self.language
        counts = [key for key in EXPERT_COUNT_KEYS if own.get(key) is not None]
        most = {"num_hidden_layers": MAX_LAYERS} | dict.fromkeys(counts, MAX_EXPERTS)
        faults = [
            f"{key} is {own.get(key)!r:.80}, but must be a whole number above 0, at most {most.get(key, MAX_SIZE)}"
            for key in ("num_hidden_layers", "hidden_size", "vocab_size", *counts)
            if type(own.get(key)) is not int or not 1 <= own[key] <= most.get(key, MAX_SIZE)
        ]
        faults += [
            f"{key} is {own[key]!r:.80}, but must be a whole number, at most {MAX_SIZE}"
            for key in _OTHER_SIZES
            if own.get(key) is not None and (type(own[key]) is not int or not 0 <= own[key] <= MAX_SIZE)
        ]
        if not isinstance(self.config.get("model_type"), str):
            faults.append("model_type is missing")
        if faults:
            self.fail("config.json", *faults)
        self.passed.append("config.json")

    def _auto_class(self) -> str:
        known = transformers_config(self.config, self.directory)
        for name in _AUTO_CLASSES[::-1] if self.text else _AUTO_CLASSES:
            if type(known) in getattr(transformers, name)._model_mapping:
                return name
        raise BitsmoeError(f"transformers has no language model of model_type {self.config['model_type']!r:.80}")

    def _base(self) -> str:
        """How names of the decoder's parameters begin in the model."""
        decoder = self.model.get_decoder()
        path = next((name for name, module in self.model.named_modules() if module is decoder), None)
        layers, embedding = getattr(decoder, "layers", None), self.model.get_input_embeddings()
        name = next((name for name, module in decoder.named_children() if module is embedding), None)
        if path is None or name is None or not isinstance(layers, nn.ModuleList):
            self.fail("decoder", f"{type(decoder).__name__} does not hold the embedding and layers")
        if not isinstance(embedding, nn.Embedding):
            self.fail("decoder", f"{name} is {type(embedding).__name__}, and no embedding")
        self.embedding = name
        if len(layers) != (said := self.language["num_hidden_layers"]):
            self.fail("decoder", f"transformers builds {len(layers)} layers, num_hidden_layers is {said}")
        if self.text is None and path != "model":
            self.fail("decoder", f"transformers calls it {path!r}, where only 'model' is read")
        return f"{path}."

    def _weighted(self) -> tuple[str, ...]:
        """The decoder's modules with weights, besides embedding and layers."""
        decoder = self.model.get_decoder()
        beside = {name.partition(".")[0] for name in decoder.state_dict()} - {"layers", self.embedding}
        modules = tuple(name for name, _ in decoder.named_children() if name in beside)
        if loose := sorted(beside - set(modules)):
            self.fail("decoder", f"it holds weights outside its modules: {', '.join(loose)}")
        return modules

    def _check_values(self) -> None:
        """Refuse tensors that no memory can be taken for."""
        embedding = f"{self.base}{self.embedding}."
        faults = [
            f"{name} is {list(tensor.shape)}, larger than any that is tried"
            for name, tensor in self.model.state_dict().items()
            if name.startswith(self.base) and not name.startswith(embedding) and covered(tensor) > MAX_VALUES
        ]
        if faults:
            self.fail("sizes", *faults[:10])

    def _sites(self) -> list[Site]:
        found: list[Site] = []
        faults: list[str] = []
        for index, layer in enumerate(self.model.get_decoder().layers):
            for name, module in layer.named_modules():
                own = dict(module.named_parameters(recurse=False))
                if hasattr(module, "has_gate") or any(own[part].dim() == 3 for part in own.keys() & _FUSED):
                    found.append(Site(index, f"{self.base}layers.{index}.{name}", module))
                    faults += [f"{found[-1].name}: {fault}" for fault in _module_faults(module)]
        if not found:
            faults = ["transformers builds no module with gate_up_proj or up_proj, and down_proj, of all experts"]
        layers = [site.layer for site in found]
        if double := sorted({layer for layer in layers if layers.count(layer) > 1}):
            faults.append(f"decoder layers {double} have several groups of experts")
        if not faults:
            unequal: dict[str, set[Any]] = {
                "names": {self.within_layer(site) for site in found},
                "sizes": {sizes(site.module)[1:] for site in found},
                "kinds": {(type(s.module).__name__, s.module.has_bias, s.module.has_gate) for s in found},
            }
            faults = [f"layers have experts of unequal {k}: {sorted(v)}" for k, v in unequal.items() if len(v) > 1]
        if faults:
            self.fail("experts", *faults)
        return found

    def within_layer(self, site: Site) -> str:
        """Name of a site's module within its decoder layer."""
        return site.name.removeprefix(f"{self.base}layers.{site.layer}.")


def covered(tensor: Tensor) -> int:
    """Values that weights of chance for a tensor take: a matrix's, or those of one expert."""
    return tensor.numel() if tensor.dim() <= 2 else tensor[0].numel() + len(tensor)


def fused_names(module: Any) -> tuple[str, str]:
    """Names of the stacked matrices of an experts module."""
    return FUSED_NAMES if module.has_gate else FUSED_WITHOUT_GATE


def sizes(module: Any) -> tuple[int, int, int]:
    """E, H and I of an experts module."""
    E, first, second = module.down_proj.shape
    return (E, second, first) if module.is_transposed else (E, first, second)


def _module_faults(module: Any) -> Iterator[str]:
    """Why a module that holds matrices of all experts cannot be quantized."""
    flags = [getattr(module, name, None) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")]
    if None in flags:
        yield "it is not of the common kind of transformers' experts, and may be called otherwise"
        return
    gate, bias, transposed, concatenated = flags
    # Without a gate there is nothing to be concatenated.
    if (transposed == concatenated) if gate else transposed:
        yield f"is_transposed is {transposed} and is_concatenated {concatenated}, which is not read here"
        return
    names = fused_names(module)
    wanted = {*names, *(map(bias_name, names) if bias else ())}
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    if own.keys() != wanted:
        yield f"it holds {', '.join(sorted(own))}, where {', '.join(sorted(wanted))} are known"
        return
    both, down = (tuple(own[name].shape) for name in names)
    E, H, I = sizes(module) if len(both) == len(down) == 3 else (0, 0, 0)  # noqa: E741
    N = 2 * I if gate else I
    if [both, down] != ([(E, H, N), (E, I, H)] if transposed else [(E, N, H), (E, H, I)]):
        yield f"matrices are {list(both)} and {list(down)}, which are no {'gate, ' if gate else ''}up and down"
