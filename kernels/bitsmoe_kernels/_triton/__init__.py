"""Triton kernels. Triton may be absent: who imports a module of this package asks `why_not` first."""

import importlib.util


def why_not() -> str | None:
    """Why they cannot run here, whatever the device."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"
