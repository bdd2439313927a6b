"""Tensors put aside between the passes over a layer's experts: on a GPU, in memory or on disk, whichever has room."""

import math
import secrets
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEMORY_BYTES = 1 << 29
"""How much is kept in memory; what comes later goes to files."""
DISK_SHARE = 0.5
"""Of the free disk, for what may also be computed again."""


class OffloadCache:
    """Float32 tensors by name.

    Args:
        directory: for files, made when the first is needed; None: everything stays in memory.
        memory_bytes: kept in memory before files are used.
        device_bytes: of tensors on a GPU, kept there before memory is used.
    """

    def __init__(self, directory: Path | None = None, memory_bytes: int = MEMORY_BYTES, device_bytes: int = 0):
        # A name of its own: processes may share the place.
        self.directory = directory and directory / f"spool-{secrets.token_hex(4)}"
        self.memory_bytes, self.device_bytes = memory_bytes, device_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = self._filed = self._on_device = 0
        self._shapes: dict[str, tuple[int, ...]] = {}

    def put(self, name: str, tensor: Tensor, if_room: bool = False) -> None:
        """Keep a float32 tensor; one of the same name is replaced.

        Args:
            name: a file name.
            tensor: what to keep.
            if_room: rather not keep it than fill the disk.
        """
        self.drop(name)
        if tensor.is_cuda and self._on_device + tensor.nbytes <= self.device_bytes:
            self._held[name] = tensor.detach()
            self._on_device += tensor.nbytes
            return
        if self.directory is None or self._held_bytes + tensor.nbytes <= self.memory_bytes:
            self._held[name] = tensor.cpu()
            self._held_bytes += tensor.nbytes
            return
        self.directory.mkdir(exist_ok=True)  # not its parents: a run that ended may have removed them
        if if_room and self._filed + tensor.nbytes > DISK_SHARE * (
            self._filed + shutil.disk_usage(self.directory).free
        ):
            return
        self._filed += tensor.nbytes
        self._shapes[name] = tuple(tensor.shape)
        tensor.detach().cpu().contiguous().numpy().tofile(self.directory / name)

    def get(self, name: str) -> Tensor:
        """The tensor kept under a name, on the CPU or where it was."""
        if name in self._held:
            return self._held[name]
        assert self.directory is not None
        return torch.from_numpy(np.fromfile(self.directory / name, np.float32)).view(self._shapes[name])

    def __contains__(self, name: str) -> bool:
        return name in self._held or name in self._shapes

    def drop(self, *names: str) -> None:
        """Forget tensors, known or not."""
        for name in names:
            if name in self._held:
                held = self._held.pop(name)
                if held.is_cuda:
                    self._on_device -= held.nbytes
                else:
                    self._held_bytes -= held.nbytes
            if (shape := self._shapes.pop(name, None)) is not None:
                assert self.directory is not None
                self._filed -= 4 * math.prod(shape)
                (self.directory / name).unlink()

    def clear(self) -> None:
        """Forget all."""
        self.drop(*self._held, *self._shapes)
        if self.directory is not None and self.directory.exists():
            self.directory.rmdir()
