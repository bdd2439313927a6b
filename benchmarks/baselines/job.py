"""What a baseline's module is given and gives back; runs in the baseline's own environment."""

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.record import gpu_peak

WINDOWS = "windows"
"""Name of the tensor in a file of calibration windows: token ids, int64 [windows, length]."""
JOB_FILE, RESULT_FILE, EXPERTS_FILE = "job.json", "result.json", "experts.safetensors"
SCALE_BITS = 16
EXPERT = r"\.(mlp|feed_forward)\.experts\.\d+\.(gate|up|down)_proj$"
"""The end of the name of a routed expert's matrix as a module."""


@dataclass(frozen=True)
class Names:
    """From the names of a checkpoint to those of transformers' modules, which the libraries see.

    Attributes:
        replaced: parts of names, and what stands for them in modules.
        projections: the checkpoint's names of an expert's gate, up and down.
    """

    replaced: Sequence[tuple[str, str]] = ()
    projections: Sequence[str] = ("gate_proj", "up_proj", "down_proj")

    def module(self, stored: str) -> str:
        """Name in the module; an expert's matrix is `...mlp.experts.N.gate_proj.weight` in every family."""
        for old, new in self.replaced:
            stored = stored.replace(old, new)
        for own, usual in zip(self.projections, Names.projections, strict=True):
            stored = re.sub(rf"(\.experts\.\d+\.){own}\b", rf"\g<1>{usual}", stored)
        return stored


@dataclass
class Job:
    """One quantization: what to do, and how long its stages took.

    Attributes:
        model: checkpoint directory.
        windows: token ids to calibrate on, int64 [windows, length]; none for methods that need none.
        bits: bits of a code.
        settings: the module's SETTINGS, with the caller's changes.
        names: of the model's checkpoint.
        wall: wall-clock seconds of each stage.
        cpu: processor seconds of each stage, all threads; unlike `wall` they bear other load on the machine.
    """

    model: Path
    windows: Tensor
    bits: int
    settings: dict[str, Any]
    names: Names = Names()
    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage: `load` or `quantize`."""
        wall, cpu = time.monotonic(), time.process_time()
        yield
        self.wall[name] = time.monotonic() - wall
        self.cpu[name] = time.process_time() - cpu


@dataclass
class Outcome:
    """What a library made of the experts.

    Attributes:
        experts: dequantized weights, float32 [N, K], by their names in modules, one by one.
        bpw: bits per weight of codes, scales and zero points, the codes packed without gaps.
        formula: how bpw comes about.
        bpw_stored: the same with the gaps the library leaves when it packs; None: it leaves none.
    """

    experts: dict[str, Tensor]
    bpw: float
    formula: str
    bpw_stored: float | None = None


def is_expert(module: str) -> bool:
    """Whether a module of this name is a matrix of a routed expert."""
    return re.search(EXPERT, module) is not None


def all_in_bpw(shapes: Sequence[Sequence[int]], bits: int, group_size: int, zero_bits: int) -> tuple[float, str]:
    """Bits per weight of matrices [N, K] with a 16-bit scale and a zero point for each group of a row, and the formula.

    A last group that is not full still has its scale and zero point.
    """
    weights = sum(n * k for n, k in shapes)
    groups = sum(n * math.ceil(k / group_size) for n, k in shapes)
    zero = f" + {zero_bits} zero point" if zero_bits else ""
    formula = f"{bits} + ({SCALE_BITS} scale{zero}) / {group_size}"
    return bits + groups * (SCALE_BITS + zero_bits) / weights, formula


def on_grid(weight: Tensor, scale: Tensor, zero: Tensor, codes: range) -> Tensor:
    """Weights as a packed checkpoint with float16 scales gives them back.

    A library's weights in memory carry its working precision (scales of 32 bits, products rounded to bfloat16). Here
    their codes are found again and multiplied by the scale as it is stored.

    Args:
        weight: [N, K], on the grid up to rounding.
        scale: [N, G], one for each group of K / G weights along a row.
        zero: [N, G], codes that stand for 0.
        codes: the codes there are.

    Returns:
        float32 [N, K].

    Raises:
        ValueError: the weights are not on the grid: they were not quantized, or not with this scale.
    """
    w, s, z = (x.float().cpu() for x in (weight, scale, zero))  # a library may leave them on a GPU, or some
    w = w.reshape(*s.shape, -1)
    exact = w / s[..., None] + z[..., None]
    found = exact.round()
    # bfloat16 holds 8 bits: a code up to 7 is off by at most 7 / 256.
    off, low, high = float((exact - found).abs().max()), float(found.min()), float(found.max())
    if off > 0.05 or low < codes[0] or high > codes[-1]:
        raise ValueError(f"weights are off the grid: codes {low} to {high} of {codes}, {off:.3f} from the nearest")
    return ((found - z[..., None]) * s.half().float()[..., None]).reshape(weight.shape)


def tensors(model: Path, names: Names = Names()) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint directory, by their names in modules."""
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield names.module(name), file.get_tensor(name)


def expert_matrices(model: Path, names: Names = Names()) -> dict[str, Tensor]:
    """Weights [N, K] of the routed experts by their per-expert names in modules, from either form of checkpoint."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors(model, names):
        if is_expert(name.removesuffix(".weight")):
            found[name] = tensor
        elif tensor.ndim == 3 and name.endswith(".mlp.experts.gate_up_proj"):
            prefix = name.removesuffix(".gate_up_proj")
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found |= {f"{prefix}.{e}.gate_proj.weight": gate, f"{prefix}.{e}.up_proj.weight": up}
        elif tensor.ndim == 3 and name.endswith(".mlp.experts.down_proj"):
            prefix = name.removesuffix(".down_proj")
            found |= {f"{prefix}.{e}.down_proj.weight": down for e, down in enumerate(tensor)}
    return found


def main(quantize: Callable[[Job], Outcome], libraries: Sequence[str]) -> None:
    """Do the job in the directory named on the command line; leave RESULT_FILE and EXPERTS_FILE there.

    Args:
        quantize: the baseline.
        libraries: distributions whose versions are reported.
    """
    directory = Path(sys.argv[1])
    given = json.loads((directory / JOB_FILE).read_text(encoding="utf-8"))
    windows = load_file(given["windows"])[WINDOWS] if given["windows"] else torch.empty(0, 0, dtype=torch.int64)
    job = Job(Path(given["model"]), windows, given["bits"], given["settings"], Names(**given["names"]))
    outcome = quantize(job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, before the results are copied
    save_file({name: w.float().contiguous() for name, w in outcome.experts.items()}, directory / EXPERTS_FILE)
    result = {
        "bits": job.bits,
        "bpw": outcome.bpw,
        "bpw_formula": outcome.formula,
        "bpw_stored": outcome.bpw if outcome.bpw_stored is None else outcome.bpw_stored,
        "seconds": job.wall["quantize"],
        "seconds_load": job.wall["load"],
        "cpu_seconds": job.cpu["quantize"],
        "peak_bytes": peak * 1024,
        **gpu_peak(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "windows": list(windows.shape),
        "settings": job.settings,
        "versions": {name: version(name) for name in libraries},
    }
    (directory / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
