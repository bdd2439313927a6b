"""Everything that only a GPU can show, one command each, on a machine that need not reach a network.

    python -m benchmarks.gpu fetch                     with a network: what such a machine lacks, in parts
    python -m benchmarks.gpu run --steps tests kernels  on the GPU: one step after another, results after each
    python -m benchmarks.gpu run --rehearse --corpus DIR   every step, tiny, on a CPU

The machine is expected to have CUDA, its compute-sanitizer, and a Python with torch, Triton and transformers
(`present.txt`). docs/gpu.md says which step answers which question.
"""

import importlib.util
import sys

from benchmarks.record import ROOT

if importlib.util.find_spec("bitsmoe_kernels") is None:  # a bare copy of the sources
    sys.path.append(str(ROOT / "kernels"))
