"""Mixed-bit matrices of Mixture-of-Experts layers: checkpoint format, torch reference, kernels.

The leaf package: it imports neither `offline_quant` nor `bitsmoe_vllm`.
"""
