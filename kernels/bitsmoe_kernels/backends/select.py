"""Which backend computes a layer, and why not another: the one place of this choice."""

from dataclasses import dataclass

from bitsmoe_kernels.backends.base import Backend, Target
from bitsmoe_kernels.backends.cpu_moe import CpuMoE
from bitsmoe_kernels.backends.torch_reference import TorchReference
from bitsmoe_kernels.backends.triton_moe import TritonMoE
from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.schema import Layer

BACKENDS: tuple[Backend, ...] = (TritonMoE(), CpuMoE(), TorchReference())
"""All backends. The first that can compute a layer does."""


@dataclass(frozen=True)
class Choice:
    """The backend that computes a layer.

    Attributes:
        backend: the first that can.
        target: what it computes on.
        refusals: one sentence for each backend before it, without a full stop. A CPU has none from backends for other
            devices, and other devices have none from those for CPUs.
    """

    backend: Backend
    target: Target
    refusals: tuple[str, ...]

    @property
    def loud(self) -> bool:
        """Whether users must be warned: a slow backend has to do what a faster one refused."""
        return self.backend.slow and bool(self.refusals)

    @property
    def message(self) -> str:
        """What the log says of the choice."""
        said = [f"bitsmoe: routed experts are computed by {self.backend.describe(self.target)}", *self.refusals]
        return ". ".join([*said, "Do not judge speed by this."] if self.loud else said)


def select(layer: Layer, target: Target) -> Choice:
    """Choose the backend of a layer.

    Args:
        layer: schema of the layer, or of one rank's shard of it.
        target: what it is to be computed on.

    Raises:
        BitsmoeError: no backend can compute it; lists all reasons.
    """
    reasons: dict[Backend, str] = {}
    for backend in BACKENDS:
        reason = backend.why_not(layer, target)
        if reason is None:
            # That a CPU is no GPU is expected, and that a GPU is no CPU; every other reason counts.
            on_cpu = target.device_type == "cpu"
            told = (b for b in reasons if b.device_type is None or (b.device_type == "cpu") == on_cpu)
            return Choice(backend, target, tuple(f"{b.name} cannot be used: {reasons[b]}" for b in told))
        reasons[backend] = reason
    faults = [f"{backend.name} cannot be used: {reason}" for backend, reason in reasons.items()]
    raise BitsmoeError(fault_list("no backend can compute the routed experts", faults))
