"""How files hold a model outside the table: what transformers makes of the stored names, reversed."""

import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import transformers

from bitsmoe_kernels.errors import one_line
from bitsmoe_kernels.models.families import bias_name
from offline_quant.model.outside.skeleton import Site, Skeleton, fused_names, sizes

_FIRST_EXPERT = re.compile(r"(?P<prefix>.+)\.0\.(?P<projection>[^.]+)\.weight")
_LATER_EXPERT = re.compile(r"\.experts\.[1-9]\d*\.")
_USUAL = {True: ("gate_proj", "up_proj", "down_proj"), False: ("up_proj", "down_proj")}
"""Names of matrices of experts with a gate, and without one."""
Source = tuple[str, str | None]
"""A stored name, and the pattern of the converter that takes it; None: it is only renamed."""


class Layout(NamedTuple):
    """How files hold the experts, as `Family` says it.

    Attributes:
        base: how names begin before `layers.`.
        experts: within a decoder layer.
        projections: of one expert.
        stacked: names within a decoder layer of the matrices of all experts; None: each has matrices of its own.
        transposed: whether stacked matrices may be transposed.
    """

    base: str
    experts: str
    projections: tuple[str, ...]
    stacked: tuple[str, str] | None
    transposed: bool


class StoredNames:
    """What transformers makes of the stored names.

    Args:
        skeleton: the model.
        names: of the stored tensors.

    Raises:
        BitsmoeError: this version of transformers does not say it.
    """

    def __init__(self, skeleton: Skeleton, names: Collection[str]):
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                dot_natural_key,
                rename_source_key,
            )

            self._skeleton, self._rename = skeleton, rename_source_key
            self._own = skeleton.model.state_dict()
            mapping = get_model_conversion_mapping(skeleton.model)
            self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
            self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
            self._sources: dict[str, list[Source]] = {}
            # Some renamings depend on the order, which is transformers'.
            for name in sorted((n for n in names if not _LATER_EXPERT.search(n)), key=dot_natural_key):
                target, pattern = self._target(name)
                if target in self._own:
                    self._sources.setdefault(target, []).append((name, pattern))
        except (ImportError, AttributeError, TypeError) as e:  # of another version
            said = f"transformers {transformers.__version__} does not say how it converts them ({one_line(e)[:200]})"
            skeleton.fail("names", said)

    def _target(self, name: str) -> tuple[str, str | None]:
        """The parameter that transformers fills from a stored tensor, and the pattern of the converter between."""
        base = self._skeleton.model.base_model_prefix
        target, pattern = self._rename(name, self._renamings, self._converters, base, self._own)
        if target not in self._own and name in self._own:
            target, pattern = self._rename(name, [], [], base, self._own)
        return target, pattern

    def _converter(self, pattern: str | None) -> Any:
        return next(entry for entry in self._converters if pattern in entry.source_patterns)

    def layout(self, prefixes: Collection[str]) -> Layout:
        """How files hold the experts, the same way in every layer.

        Args:
            prefixes: of the experts that a bitsmoe checkpoint holds quantized.

        Raises:
            BitsmoeError: in a way that is not read, or the names do not say it.
        """
        found: list[Layout] = []
        faults = []
        for site in self._skeleton.sites:
            try:
                found.append(self._quantized(site, prefixes) if prefixes else self._experts(site))
            except ValueError as e:
                faults.append(f"{site.name}: {e}")
        if not faults and len(different := sorted(set(map(str, found)))) > 1:
            faults.append(f"layers hold experts in different ways: {'; '.join(different[:2])}")
        if faults:
            self._skeleton.fail("names", *faults)
        return found[0]

    def _quantized(self, site: Site, prefixes: Collection[str]) -> Layout:
        """Experts of a bitsmoe checkpoint, which are stacked once they are ordinary matrices again."""
        prefix = next((prefix for prefix in prefixes if self._finds(prefix, site)), None)
        if prefix is None:
            raise ValueError(f"quantization_config has no such layer, but {', '.join(sorted(prefixes)[:3])}")
        base, experts = _parts(prefix, site)
        gate_up, down = (f"{experts}.{name}" for name in fused_names(site.module))
        return Layout(base, experts, _USUAL[site.module.has_gate], (gate_up, down), False)

    def _experts(self, site: Site) -> Layout:
        names = fused_names(site.module)
        both, down = (self._sources.get(f"{site.name}.{name}", []) for name in names)
        if not both or not down:
            lacking = (name for name, found in zip(names, (both, down), strict=True) if not found)
            raise ValueError(f"no stored tensor becomes {' or '.join(lacking)}")
        if len(both) == len(down) == 1 and not _FIRST_EXPERT.fullmatch(both[0][0]):
            return self._stacked(site, both[0], down[0])
        return self._one_by_one(site, both, down)

    def _stacked(self, site: Site, both: Source, down: Source) -> Layout:
        converters = [self._converter(pattern) for _, pattern in (both, down) if pattern is not None]
        operations = [type(operation).__name__ for entry in converters for operation in entry.operations]
        transposed = operations == ["Transpose", "Transpose"]
        _, H, I = sizes(site.module)  # noqa: E741
        # The shape of down tells which way matrices are stored, if it can.
        if operations and (not transposed or site.module.is_transposed or H == I):
            raise ValueError(f"{both[0]} is converted by {', '.join(operations)}, which is not read here")
        if site.module.has_bias:
            for name, (stored, _) in zip(fused_names(site.module), (both, down), strict=True):
                if self._sources.get(f"{site.name}.{bias_name(name)}") != [(bias_name(stored), None)]:
                    raise ValueError(f"its biases are not stored as {bias_name(stored)}")
        prefix = self._prefix(site, both[0].removesuffix(f".{fused_names(site.module)[0]}"))
        base, experts = _parts(prefix, site)
        places = [_parts(name, site) for name, _ in (both, down)]
        if {place for place, _ in places} != {base}:
            raise ValueError(f"{both[0]} and {down[0]} do not begin alike")
        return Layout(base, experts, _USUAL[site.module.has_gate], (places[0][1], places[1][1]), transposed)

    def _finds(self, prefix: str, site: Site) -> bool:
        """Whether transformers reads stacked matrices of this prefix as the site's, as they are."""
        for name in fused_names(site.module):
            target, pattern = self._target(f"{prefix}.{name}")
            operations = self._converter(pattern).operations if pattern is not None else []
            if target != f"{site.name}.{name}" or not all(getattr(o, "check_dims", False) for o in operations):
                return False
        return True

    def _prefix(self, site: Site, candidate: str) -> str:
        """What a bitsmoe checkpoint calls these experts: a name from which they are found again."""
        for prefix in (candidate, site.name):
            if self._finds(prefix, site):
                return prefix
        raise ValueError(f"{candidate} is no name from which transformers finds these experts")

    def _one_by_one(self, site: Site, both: list[Source], down: list[Source]) -> Layout:
        if site.module.is_transposed or site.module.has_bias:
            raise ValueError("matrices of one expert each become transposed ones, or have biases")
        named: dict[str, tuple[str, str]] = {}
        for name, pattern in (*both, *down):
            match = _FIRST_EXPERT.fullmatch(name)
            if match is None or pattern is None:
                raise ValueError(f"{name} is not named after one expert")
            named[pattern] = (match["prefix"], match["projection"])
        order = [p for sources in (both, down) for p in self._converter(sources[0][1]).source_patterns if p in named]
        prefixes = {prefix for prefix, _ in named.values()}
        inputs = 2 if site.module.has_gate else 1
        if (len(both), len(down), len(order), len(prefixes)) != (inputs, 1, inputs + 1, 1):
            given = ", ".join(name for name, _ in (*both, *down))
            raise ValueError(f"{given} are not {_matrices(site)} of one expert")
        self._check_conversion(site, order)
        base, experts = _parts(self._prefix(site, prefixes.pop()), site)
        return Layout(base, experts, tuple(named[pattern][1] for pattern in order), None, False)

    def _check_conversion(self, site: Site, order: list[str]) -> None:
        """Let transformers convert two small experts, and compare with what is read here.

        Args:
            site: of the experts.
            order: patterns of gate, up and down, or of up and down.
        """
        generator = torch.Generator().manual_seed(0)
        each = {
            pattern: [torch.randn(size, generator=generator) for _ in range(2)]
            for pattern, size in zip(order, [(3, 5)] * (len(order) - 1) + [(5, 3)], strict=True)
        }
        *inputs, down = (torch.stack(each[pattern]) for pattern in order)
        expected = (order[:-1], torch.cat(inputs, 1)), (order[-1:], down)
        for name, (patterns, want) in zip(fused_names(site.module), expected, strict=True):
            target, converter = f"{site.name}.{name}", deepcopy(self._converter(patterns[0]))
            for pattern in patterns:
                for e, matrix in enumerate(each[pattern]):
                    converter.add_tensor(target, f"{pattern}.{e}", pattern, matrix)
            found = converter.convert(target, model=self._skeleton.model, config=self._skeleton.model.config)
            value = found.get(target)
            if not torch.equal(value[0] if isinstance(value, list) else value, want):
                raise ValueError(f"transformers does not make {name} of {_matrices(site)} one behind the other")

    def others(self) -> Mapping[str, tuple[str, ...]]:
        """Names in files of the tensors outside the experts, by transformers' own.

        Raises:
            BitsmoeError: some are converted in a way that is not read.
        """
        skeleton = self._skeleton
        experts = {f"{site.name}.{part}" for site in skeleton.sites for part, _ in site.module.named_parameters()}
        found, faults = {}, []
        for target, sources in self._sources.items():
            names, patterns = [name for name, _ in sources], [pattern for _, pattern in sources]
            if target in experts:
                continue
            if any(pattern is not None for pattern in patterns):
                converter = self._converter(next(pattern for pattern in patterns if pattern is not None))
                joined = [(type(o).__name__, getattr(o, "dim", None)) for o in converter.operations]
                if joined != [("Concatenate", 0)] or sorted(map(str, patterns)) != sorted(converter.source_patterns):
                    if target.startswith((skeleton.base, "lm_head.")):  # other parts are only copied
                        operations = ", ".join(name for name, _ in joined)
                        faults.append(f"{names[0]} becomes {target} by {operations}, which is not read here")
                    continue
                names = [name for _, name in sorted((converter.source_patterns.index(p), n) for n, p in sources)]
            elif len(names) > 1:
                faults.append(f"{', '.join(names)} all become {target}")
            found[target] = tuple(names)
        if faults:
            skeleton.fail("names", *faults)
        return found


def _matrices(site: Site) -> str:
    """What the matrices of an expert are called, for people."""
    return "gate, up and down" if site.module.has_gate else "up and down"


def _parts(name: str, site: Site) -> tuple[str, str]:
    """What precedes `layers.` in a stored name, and what follows the layer's index."""
    before, found, after = name.partition(f"layers.{site.layer}.")
    if not found:
        raise ValueError(f"{name} is not named after decoder layer {site.layer}")
    return before, after
