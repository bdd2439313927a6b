import pytest
import torch

# Tiny tensors: a second thread only waits, and on a busy machine it waits for long.
torch.set_num_threads(1)

# Triton decides while a kernel is being defined whether it will be compiled or interpreted, its own library included:
# before anything else of this process imports it. Processes that tests start do not inherit the choice.
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("TRITON_INTERPRET", "1")
    import bitsmoe_kernels._triton.rounding
    import bitsmoe_kernels.backends.triton_launch  # noqa: F401


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter for the length of a test: parts of Triton are imported by the first call of a kernel."""
    from triton.runtime.interpreter import InterpretedFunction

    from bitsmoe_kernels._triton import gemm

    assert isinstance(gemm.down_kernel, InterpretedFunction), "triton was imported before tests/unit/conftest.py"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
