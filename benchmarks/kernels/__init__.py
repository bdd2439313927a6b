"""Time of one MoE layer by our kernels and by others, and what our kernels' machine code looks like."""
