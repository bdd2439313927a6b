"""The model to quantize: its files, weights, layers run one at a time."""
