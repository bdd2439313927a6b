"""Checkpoint format v1, the single source of truth for quantizer, loader and kernels. `SPEC.md` is normative."""
