"""The offline quantizer and the `bitsmoe` command: decomposition, allocation, quantization, evaluation."""
