"""What rounds rows: torch, the compiled CPU kernels, the Triton kernels."""
