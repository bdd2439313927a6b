"""Perplexity, KL divergence and the sanity check of a quantized model."""
