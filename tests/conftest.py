from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Threads that wait do not spin: on a busy machine they would take the core of those they wait for. OpenMP reads this
# when torch loads it. Processes that tests start do not inherit it.
with pytest.MonkeyPatch.context() as environment:
    environment.setenv("OMP_WAIT_POLICY", "passive")
    import torch

# The same examples on every run: a red gate can be reproduced, and a slow machine is no fault.
settings.register_profile(
    "gate", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("gate")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty and its kin return with NaN, or the largest integer, so that no test reads it by luck."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
