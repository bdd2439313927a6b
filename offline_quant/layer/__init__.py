"""One MoE layer, from weights and moments to the tensors of the format."""
