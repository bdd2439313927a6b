"""Triton kernels. Only `moe.py` and the benchmarks import them: triton may be absent."""
