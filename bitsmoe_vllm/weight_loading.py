"""From a checkpoint's tensors, as vLLM hands them over one by one, to the parameters of one rank's shard."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, FormatError
from bitsmoe_kernels.format.schema import MAX_BITS, Layer, TensorSpec, num_blocks
from bitsmoe_kernels.format.validate import check_values
from bitsmoe_kernels.sharding import shard_layer
from bitsmoe_vllm import _compat

_RUNNER_PREFIX = "routed_experts."


class LayerLoader:
    """Collects the tensors of one layer; once all are there, checks them and keeps this rank's part.

    vLLM gives every rank the full tensors. They stay on the CPU, as views of the mapped file, until the layer is
    complete, so at most one layer is held in full. Once `reload_into` was called, every further complete set of
    tensors replaces the layer's weights.

    Args:
        prefix: the layer's name, for messages.
        layer: schema of the whole layer.
        block_size: G.
        tp_rank: rank within tensor parallelism of the experts.
        tp_size: number of such ranks.
        experts: experts of this rank in local order; None: all.
    """

    def __init__(
        self,
        prefix: str,
        layer: Layer,
        block_size: int,
        tp_rank: int = 0,
        tp_size: int = 1,
        experts: Sequence[int] | None = None,
    ):
        self.prefix = prefix
        self.layer = layer
        self.block_size = block_size
        self.tp_rank = tp_rank
        self.tp_size = tp_size
        self.experts = experts
        self.specs = layer.tensor_specs(block_size)
        self.shard: Layer | None = None
        self._arrived: dict[str, Tensor] = {}
        self._replace: Callable[[Layer, dict[str, Tensor]], None] | None = None
        self._module: Callable[[], torch.nn.Module | None] = lambda: None

    def register(self, module: torch.nn.Module) -> None:
        """Give `module` an empty parameter for each tensor, with the `weight_loader` that vLLM's models call."""
        # vLLM keeps the parameters' loaders beyond the model's life, which must not lengthen it.
        self._module = weakref.ref(module)
        for name, spec in self.specs.items():
            parameter = torch.nn.Parameter(torch.empty(0, dtype=spec.dtype), requires_grad=False)

            def receive(_: Tensor, tensor: Tensor, name: str = name) -> None:
                self.receive(name, tensor)

            parameter.weight_loader = _compat.kept_on_reload(receive)  # type: ignore[attr-defined]
            module.register_parameter(name, parameter)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Take tensors by name; stands in for the `load_weights` of vLLM's RoutedExperts.

        Args:
            weights: (name relative to the experts, full tensor).

        Yields:
            The names taken.

        Raises:
            BitsmoeError: a tensor that neither the schema nor vLLM's module knows.
        """
        module = self._module()
        for name, tensor in weights:
            name = name.removeprefix(_RUNNER_PREFIX)
            if name in self.specs:
                self.receive(name, tensor)
            elif isinstance(own := getattr(module, name, None), torch.nn.Parameter):
                own.data.copy_(tensor)  # of the router, stored beside the experts (Laguna)
            else:
                raise BitsmoeError(
                    f"the checkpoint holds {self.prefix}.{name}, which its quantization_config does not describe: "
                    "quantize the model again"
                )
            yield name

    def receive(self, name: str, tensor: Tensor) -> None:
        """Take one full tensor; the last one completes the layer.

        Raises:
            FormatError: the layer is complete, and its tensors do not fit the schema or each other.
        """
        # Some of vLLM's load formats hand over tensors on the GPU, in memory that they use again.
        self._arrived[name] = tensor.cpu()
        if len(self._arrived) == len(self.specs):
            self._complete(self._arrived)

    def reload_into(self, replace: Callable[[Layer, dict[str, Tensor]], None]) -> None:
        """Hand weights that arrive from now on to `replace`, each time that all of a layer are there.

        Args:
            replace: takes the schema and the CPU tensors of this rank's part.
        """
        self._replace = replace

    def missing(self) -> list[str]:
        """Tensors that have not arrived, as sentences; none once the layer is complete, until a reload begins."""
        if self.shard is not None and not self._arrived:
            return []
        names = self.specs.keys() - self._arrived.keys()
        return [f"tensor {self.prefix}.{n} is missing (expected {self.specs[n]})" for n in self.specs if n in names]

    def fill_dummy(self) -> None:
        """Complete the layer with made-up tensors (`--load-format dummy`)."""
        self._complete(dummy_tensors(self.layer, self.block_size))

    def _complete(self, tensors: dict[str, Tensor]) -> None:
        faults = [
            f"tensor {self.prefix}.{name} is {found}, but the schema says {spec}"
            for name, spec in self.specs.items()
            if (found := TensorSpec(tensors[name].dtype, tuple(tensors[name].shape))) != spec
        ]
        faults = faults or check_values(self.prefix, self.layer, self.block_size, tensors)
        if faults:
            raise FormatError(self.prefix, faults)
        schema, shard = shard_layer(self.layer, tensors, self.block_size, self.tp_rank, self.tp_size, self.experts)
        self._arrived = {}
        if self._replace is not None:
            self._replace(schema, shard)
            return
        self.shard = schema
        module = self._module()
        assert module is not None
        for name in self.specs:
            if name in shard:
                parameter = module.get_parameter(name)
                # A shard of one rank is the tensor itself: a copy, for the file's mapping must not outlive loading.
                parameter.data = shard[name].to(parameter.device, copy=True)
            else:  # an optional part none of this rank's experts has
                delattr(module, name)


DUMMY_SPREAD = (0, 0, 0, 0, 1, -1, 1, -1, 2, -2)
"""What the widths of ten blocks differ by from their mean."""


def dummy_tensors(layer: Layer, block_size: int) -> dict[str, Tensor]:
    """Made-up tensors that satisfy a schema: codes and scales constant, widths mixed about as quantizing mixes them.

    Args:
        layer: the schema.
        block_size: G.

    Returns:
        `{projection}_{part}` -> tensor, on the CPU.
    """
    tensors = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in layer.tensor_specs(block_size).items()}
    for name, p in layer.projections.items():
        C = layer.components(name)
        blocks = num_blocks(C, block_size)
        coded = torch.tensor([e for e in range(layer.num_experts) if e not in p.kept_experts], dtype=torch.int64)
        share, rest = divmod(p.code_rows, max(1, len(coded) * blocks))
        if share + (rest > 0) > MAX_BITS:
            raise BitsmoeError(f"{name}: code_rows {p.code_rows} do not fit {len(coded)} experts of {blocks} blocks")
        widths = torch.full((len(coded) * blocks,), share, dtype=torch.uint8)
        widths[:rest] += 1
        if max(DUMMY_SPREAD) <= share < MAX_BITS - max(DUMMY_SPREAD):
            spread = torch.tensor(DUMMY_SPREAD, dtype=torch.int8).repeat(len(widths) // len(DUMMY_SPREAD))
            widths[: len(spread)] = (widths[: len(spread)].to(torch.int8) + spread).to(torch.uint8)
        tensors[f"{name}_bits"][coded] = widths.view(len(coded), blocks)
        tensors[f"{name}_component_scale"].fill_(1 / 64)
        tensors[f"{name}_feature_scale"].fill_(1 / 64)
        if p.order != "none":
            tensors[f"{name}_order"].copy_(torch.arange(C).to(tensors[f"{name}_order"].dtype))
        if p.basis:
            tensors[f"{name}_basis"].fill_diagonal_(1)
        if p.basis and p.basis.bits == 8:
            tensors[f"{name}_basis_scale"].fill_(1)
        if p.lowrank_total:
            # Kept experts have no compensator.
            tensors[f"{name}_lowrank_rank"][coded[0]] = p.lowrank_total
    return tensors
