"""What a backend is: one way to compute the routed experts of a layer.

`select.py` lists the backends and chooses one for each layer. `docs/developing/backend.md` tells how to add one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitsmoe_kernels.format.schema import Layer
from bitsmoe_kernels.reference import LayerWeights

Compute = Callable[[Tensor, Tensor, Tensor, Tensor | None, Sequence[Tensor], str], Tensor]
"""The signature of `Backend.compute`."""


@dataclass(frozen=True)
class Target:
    """What a layer is to be computed on.

    Attributes:
        device_type: torch's name for the kind of device, such as "cpu" or "cuda".
        capability: compute capability of an NVIDIA GPU, such as 90; None for any other device.
        dtype: of activations.
    """

    device_type: str
    capability: int | None
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype without torch's prefix, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Prepared:
    """A layer's weights in the form that `Backend.compute` takes.

    Attributes:
        tensors: by name, in the order in which `compute` takes them. They become parameters of vLLM's module, so
            names begin with a word of the backend's own. A tensor of the file that stays keeps its name.
        key: all that `compute` must know besides the tensors. Layers with equal keys and equal shapes are
            interchangeable: new weights are written into the memory of the old ones.
    """

    tensors: dict[str, Tensor]
    key: str


class Backend(ABC):
    """One way to compute the routed experts of a layer.

    Instances hold no state: what a layer needs is in its `Prepared`.

    Attributes:
        name: for messages, as in "NAME cannot be used: ...".
        device_type: the kind of device that it is made for, by torch's name; None: any.
        cuda_graphs: whether a CUDA graph can capture `compute`: no synchronization, shapes that follow from shapes.
        slow: whether it is only for layers that no other backend can compute.
    """

    name: ClassVar[str]
    device_type: ClassVar[str | None]
    cuda_graphs: ClassVar[bool]
    slow: ClassVar[bool] = False

    @abstractmethod
    def why_not(self, layer: Layer, target: Target) -> str | None:
        """Why this backend cannot compute a layer there, as a sentence without a full stop; None where it can.

        Args:
            layer: schema of the layer, or of one rank's shard of it.
            target: where.
        """

    @abstractmethod
    def describe(self, target: Target) -> str:
        """How the log names the computation, after "routed experts are computed by"."""

    @abstractmethod
    def prepare(self, weights: LayerWeights, target: Target) -> Prepared:
        """Bring a layer's weights, as the file stores them, into the form that `compute` takes.

        Called once for each layer after loading, and again when a server reloads weights. The file's tensors are
        left unchanged.

        Args:
            weights: schema and tensors of the layer, or of one rank's shard of it, on the device that computes.
            target: one for which `why_not` gave None.
        """

    @abstractmethod
    def compute(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        tensors: Sequence[Tensor],
        key: str,
        /,
    ) -> Tensor:
        """The routed experts' output, as `reference.moe_forward` defines it.

        torch.compile traces this call. A function that it cannot trace becomes an op by `moe_op`; then
        `compute = staticmethod(the_op)` is all that a backend says.

        Args:
            x: [T, H].
            topk_weights: routing weights, [T, top_k].
            topk_ids: expert ids, [T, top_k]; global ids where `expert_map` is given. Ids of no expert are skipped.
            expert_map: int32 [global experts] -> local index, or -1 for experts of other ranks; None: ids are local.
            tensors: the values of `Prepared.tensors`, in order.
            key: `Prepared.key`.

        Returns:
            [T, H] in x's dtype, contiguous.
        """


def moe_op(name: str) -> Callable[[Compute], Compute]:
    """Register a function with the signature of `Backend.compute` as a torch op that torch.compile does not look into.

    Args:
        name: of the op, such as "bitsmoe::moe_forward".
    """

    def register(function: Compute) -> Compute:
        # Not `torch.library.custom_op`: its wrappers take 25 us a call, a tenth of a layer's time on a CPU.
        namespace, _, short = name.partition("::")
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(short + torch.library.infer_schema(function, mutates_args=()))
        library.impl(short, function, "CompositeExplicitAutograd")
        torch.library.register_fake(name, _fake, lib=library)
        _LIBRARIES.append(library)
        return getattr(getattr(torch.ops, namespace), short).default

    return register


_LIBRARIES: list[torch.library.Library] = []
"""Registrations end with these objects."""


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, as the ops' results are, whatever the strides of x
