"""A CUDA device for machines without one: tensors that say `cuda`, hold memory of the CPU and refuse the CPU's own.

    with pretended_cuda():
        x = torch.zeros(3, device="cuda")   # x.is_cuda
        x + torch.zeros(3)                  # raises, as on a real one

What a GPU computes, and how fast, it cannot show; that every operation finds its operands on one device, it does.
Gradients are ones: torch's engine wants a device that is really there.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # reads torch.Generator, which is replaced below
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

HERE = torch.device("cuda", 0)
aten = torch.ops.aten
_COPIES = (aten.copy_.default, aten._to_copy.default)
_INDICES = {aten.index.Tensor: 1, aten.index_put_.default: 1, aten.index_put.default: 1}
"""Arguments that may be tensors of the CPU."""
_launched = [0]
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""


class PretendedTensor(torch.Tensor):
    """Says that it lies on `cuda:0`; `held` is what it really is."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendedTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=HERE
        )

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.held})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})

    def tolist(self) -> Any:
        """torch does it for no subclass."""
        return self.held.tolist()

    def _set_data(self, other: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.held = other.held  # type: ignore[attr-defined]

    data = property(torch.Tensor.data.__get__, _set_data)  # type: ignore[attr-defined]

    def backward(self, *_: Any, **__: Any) -> None:
        """Ones for every leaf."""
        for leaf in _leaves(self):
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            leaf.grad += torch.ones_like(leaf)


def _leaves(y: torch.Tensor) -> list[torch.Tensor]:
    found, seen, left = [], set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        left += [following for following, _ in node.next_functions]
    return found


def _gradients(y: torch.Tensor, of: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones_like(x) for x in ([of] if isinstance(of, torch.Tensor) else of))


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU, its results on the pretended device where its operands or its caller say so."""
    mine: dict[int, PretendedTensor] = {}
    others: list[torch.Tensor] = []

    def really(x: Any) -> Any:
        kind = type(x)
        if kind is PretendedTensor:
            mine[id(x.held)] = x
            return x.held
        if kind in (tuple, list):
            return [really(part) for part in x]
        if isinstance(x, torch.Tensor):
            others.append(x)
        return torch.device("cpu") if kind is torch.device else x

    def placed(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(placed(part) for part in x)
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in mine:  # changed in place
            return mine[id(x)]
        return PretendedTensor(x) if here else x

    _launched[0] += not (function.is_view or "empty" in function.__name__)
    device = kwargs.get("device")
    held, options = [really(x) for x in args], {k: really(v) for k, v in kwargs.items()}
    here = bool(mine) if device is None else torch.device(device).type == HERE.type
    if mine and others and function not in _COPIES:
        indices = args[_INDICES[function]] if function in _INDICES else ()
        for t in others:
            # Tensors of no dimensions may come from the CPU.
            if t.ndim and not any(t is index for index in indices):
                raise RuntimeError(f"{function}: operands on {HERE} and cpu, there {list(t.shape)} of {t.dtype}")
    if function is aten.histc.default and not held[0].is_floating_point():  # which only CUDA does
        return placed(function(held[0].float(), *held[1:], **options).to(held[0].dtype))
    return placed(function(*held, **options))


class _Operations(TorchDispatchMode):
    """Sees operations that only make tensors. torch does not look for a real device under a mode of this key."""

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


@functools.cache
def _register_guard() -> None:
    """A build of torch for CPUs knows no way to make a CUDA device the current one: one that does nothing.

    Compiled with the C++ compiler that vLLM needs too; a build for CUDA has its own.
    """
    if torch.version.cuda is not None:
        return
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / f"guard{sysconfig.get_config_var('SHLIB_SUFFIX')}"
        source.write_text(_GUARD)
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        subprocess.run([compiler, str(source), *options, "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


@contextmanager
def _lifted() -> Iterator[None]:
    """Have torch.tensor(numbers, device=...) make a tensor first and move it then, where it is seen."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@contextmanager
def pretended_cuda(memory: int = 80_000_000_000) -> Iterator[Callable[[], int]]:
    """One CUDA device, as far as torch operations go; attention by plain products, as a test can have it on a CPU.

    Others may be made the current one, but hold no tensors.

    Args:
        memory: bytes it says it has.

    Yields:
        How many operations have computed something so far: about as many kernels a GPU would launch.
    """
    _launched[0] = 0
    _register_guard()
    generator = torch.Generator

    current = [HERE.index]

    def exchange(device: int) -> int:
        before = current[0]
        if device >= 0:
            current[0] = device
        return before

    class Generator(generator):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
            return generator("cpu")

    with (
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "current_device", side_effect=lambda: current[0]),
        mock.patch.object(torch.cuda, "_exchange_device", exchange),
        mock.patch.object(torch.cuda, "_maybe_exchange_device", exchange),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(total_memory=memory)),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=False),
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(torch.autograd, "grad", _gradients),
        sdpa_kernel(SDPBackend.MATH),
        _Operations(),
        _lifted(),
    ):
        yield lambda: _launched[0]
