"""Weights as the Triton kernels read them."""
