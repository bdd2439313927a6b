"""Triton kernels. Only `backends/triton_launch.py` and the benchmarks import them: triton may be absent."""
