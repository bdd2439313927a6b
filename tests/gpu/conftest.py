import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cuda() -> None:
    """A run without a GPU must not look like one that passed."""
    if not torch.cuda.is_available():
        pytest.fail("tests/gpu need a CUDA device and torch built for it; `make test` runs what needs none")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1 is set: kernels would be interpreted; unset it to run tests/gpu")
