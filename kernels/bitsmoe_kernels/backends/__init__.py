"""Ways to compute a quantized MoE layer, and the choice among them."""
