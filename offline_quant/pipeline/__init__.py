"""`bitsmoe quantize` from options to checkpoint."""
