import pytest
import torch
from triton.runtime.jit import JITFunction

from bitsmoe_kernels._triton import gemm

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Kernels that are interpreted cannot be compiled as well: Triton decides when it is imported."""
    if not isinstance(gemm.down_kernel, JITFunction):
        pytest.fail("Triton's interpreter is on: run tests/ptx in a process of its own, as `make test` does")
