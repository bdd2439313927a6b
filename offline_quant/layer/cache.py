"""What is kept of a layer's experts between passes, one property for each kind of tensor."""

from collections.abc import Iterable

import torch
from torch import Tensor

from offline_quant.runtime.offload import OffloadCache


class KeptTensors:
    """One tensor of every expert.

    Args:
        offload: where they are kept.
        kind: names them there.
        if_room: rather not keep one than fill the disk: it can be computed again.
    """

    def __init__(self, offload: OffloadCache, kind: str, if_room: bool = False):
        self._offload, self._kind, self._if_room = offload, kind, if_room

    def _name(self, expert: int) -> str:
        return f"{self._kind}-{expert}"

    def put(self, expert: int, tensor: Tensor) -> None:
        """Keep an expert's tensor; an earlier one is replaced."""
        self._offload.put(self._name(expert), tensor, if_room=self._if_room)

    def put_all(self, chunk: range, tensors: Tensor) -> None:
        """Keep those of a chunk of experts, stacked."""
        for expert, tensor in zip(chunk, tensors, strict=True):
            self.put(expert, tensor)

    def get(self, expert: int) -> Tensor:
        """An expert's tensor, on the CPU or on the device it was kept on."""
        return self._offload.get(self._name(expert))

    def stacked(self, chunk: range, device: torch.device) -> Tensor | None:
        """Those of a chunk on a device; None where there was no room for one."""
        if not all(self._name(expert) in self._offload for expert in chunk):
            return None
        return torch.stack([self.get(expert).to(device) for expert in chunk])

    def drop(self, experts: Iterable[int]) -> None:
        """Forget those of some experts, kept or not."""
        self._offload.drop(*map(self._name, experts))


class KeptActivations:
    """Activations of every expert: of the original gate and up until those of the quantized ones replace them."""

    def __init__(self, offload: OffloadCache):
        self._kept = KeptTensors(offload, "activations")
        self._quantized: set[int] = set()

    def put_original(self, expert: int, activations: Tensor) -> None:
        """Keep activations of the original gate and up."""
        self._kept.put(expert, activations)
        self._quantized.discard(expert)

    def put_quantized(self, expert: int, activations: Tensor) -> None:
        """Keep activations of the quantized gate and up in place of the original ones."""
        self._kept.put(expert, activations)
        self._quantized.add(expert)

    def original(self, expert: int) -> Tensor:
        """Activations of the original gate and up.

        Raises:
            RuntimeError: those of the quantized ones have replaced them.
        """
        if expert in self._quantized:
            raise RuntimeError(f"expert {expert}: its activations are those of the quantized gate and up by now")
        return self._kept.get(expert)

    def quantized(self, expert: int) -> Tensor:
        """Activations of the quantized gate and up.

        Raises:
            RuntimeError: gate and up have not been quantized yet.
        """
        if expert not in self._quantized:
            raise RuntimeError(f"expert {expert}: its gate and up have not been quantized yet")
        return self._kept.get(expert)


class LayerCache:
    """Tensors kept between the passes over a layer's experts."""

    def __init__(self, offload: OffloadCache | None = None):
        self._offload = offload or OffloadCache()
        self.input_moments = KeptTensors(self._offload, "inputs", if_room=True)
        """Second moments of what enters gate and up, [H, H]."""
        self.activations = KeptActivations(self._offload)
        """What enters down, [n, I]."""
        self.down_targets = KeptTensors(self._offload, "down-target")
        """Down matrices fitted to one target, before they are quantized, [H, I]."""
        self.down_target_moments = KeptTensors(self._offload, "down-target-moments")
        """Second moments of what enters them, [I, I]."""
        self.quantized_down = KeptTensors(self._offload, "quantized-down")
        """Down matrices as a reader of the file sees them, [H, I]."""

    def moments(self, key: str) -> KeptTensors:
        """Second moments of a ranked projection, in stored order."""
        return KeptTensors(self._offload, f"{key}-moments", if_room=True)

    def factors(self, key: str) -> KeptTensors:
        """Cholesky factors of those moments."""
        return KeptTensors(self._offload, f"{key}-factor", if_room=True)

    def clear(self) -> None:
        """Forget everything."""
        self._offload.clear()
