"""Run a baseline as a process of its own and keep what it made."""

import importlib
import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.baselines.checkpoint import write_checkpoint
from benchmarks.baselines.environments import interpreter, packages
from benchmarks.baselines.job import EXPERTS_FILE, JOB_FILE, RESULT_FILE, WINDOWS, Names
from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.calibration.sources.registry import open_text
from offline_quant.calibration.windows import load_tokenizer, text_windows, window_length
from offline_quant.checkpoint.directory import check_output
from offline_quant.config import QuantizeConfig
from offline_quant.model.source import SourceModel

BASELINES = {"gptq": True, "autoround": True, "gguf": True, "hqq": False, "rtn": False}
"""Each baseline's module in this package, and whether it calibrates."""
_ROOT = Path(__file__).resolve().parents[2]
_LOG_LINES = 15


def write_windows(
    model: Path, calib: str, path: Path, count: int | None = None, length: int | None = None, seed: int = 0
) -> Tensor:
    """Write the token windows that `bitsmoe quantize --calib` takes from the same text, for all methods to share.

    Args:
        model: checkpoint directory with a tokenizer.
        calib: text file, JSON-lines file or dataset.
        path: file to write.
        count: windows at most; None: the quantizer's default.
        length: tokens in a window at most; None: the quantizer's default.
        seed: which of the evenly spread sets of windows.

    Returns:
        int64 [windows, length].
    """
    defaults = QuantizeConfig.model_fields
    length = window_length(SourceModel(model).config, length or defaults["calib_length"].default)
    windows = text_windows(
        load_tokenizer(model), open_text(calib), length, count or defaults["calib_samples"].default, seed
    )
    save_file({WINDOWS: windows.contiguous()}, path)
    return windows


def check_request(name: str, windows_file: Path | None, bits: int, settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run, the defaults where none is given.

    Raises:
        BitsmoeError: unknown baseline or settings, bits the library has no codes for, no windows.
    """
    if name not in BASELINES:
        raise BitsmoeError(f"unknown baseline {name!r}; there are {', '.join(BASELINES)}")
    module: ModuleType = importlib.import_module(f"benchmarks.baselines.{name}")
    faults = [f"no setting {k!r}; there are {', '.join(module.SETTINGS)}" for k in settings.keys() - module.SETTINGS]
    if type(bits) is not int or bits not in module.BITS:
        faults.append(f"bits is {bits!r}, must be one of {list(module.BITS)}")
    if windows_file is None:
        if BASELINES[name]:
            faults.append("calibrates, but no file of token windows is given")
    else:
        faults += _window_faults(windows_file)
    if faults:
        raise BitsmoeError(f"baseline {name}: " + "; ".join(sorted(faults)))
    return module.SETTINGS | settings


def _window_faults(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            shape = file.get_slice(WINDOWS).get_shape()
    except (OSError, SafetensorError) as e:
        return [f"{path} is not a safetensors file with a tensor {WINDOWS!r} ({e})"]
    return [] if len(shape) == 2 and 0 not in shape else [f"{path}: {WINDOWS!r} has shape {shape}, must be [n, length]"]


def run_baseline(
    name: str,
    model: Path,
    windows_file: Path | None,
    bits: int,
    out_dir: Path,
    device: str = "cpu",
    **settings: Any,
) -> dict[str, Any]:
    """Quantize the routed experts of a model with a baseline, in its own environment.

    Args:
        name: one of BASELINES.
        model: ordinary checkpoint directory.
        windows_file: safetensors file as `write_windows` writes it; may be None where the method needs none.
        bits: bits of a code.
        out_dir: for the checkpoint with dequantized weights; must not exist, or be empty.
        device: `cpu`, where a GPU is hidden from the library, or `cuda`.
        settings: changes to the module's SETTINGS.

    Returns:
        JSON data: `baseline`, `bits`; `bpw` of codes, scales and zero points with the codes packed without gaps, its
        `bpw_formula`, and `bpw_stored` with the gaps of the library's packing; `seconds` of the quantization call alone
        by the clock, `cpu_seconds` the same on all threads, `seconds_load` of loading the model; `peak_bytes` of the
        process, and `peak_device_bytes` if it saw a GPU; `threads`, `cores`, `windows`, `settings`, `versions`.

    Raises:
        BitsmoeError: a request that cannot be met, an environment that cannot be made, or a run that failed.
    """
    settings = check_request(name, windows_file, bits, settings)
    shape = SourceModel(model).shape
    names = Names(shape.family.module_names, shape.family.projections)
    check_output(out_dir)
    python = interpreter(name)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        windows = str(windows_file.resolve()) if windows_file else None
        job = {
            "model": str(model.resolve()), "windows": windows, "bits": bits, "settings": settings,
            "names": asdict(names),
        }  # fmt: skip
        (directory / JOB_FILE).write_text(json.dumps(job), encoding="utf-8")
        _start(name, python, directory, device)
        result = json.loads((directory / RESULT_FILE).read_text(encoding="utf-8"))
        stored = {names.module(own): own for layer in shape.layers for e in range(shape.num_experts)
                  for own in shape.expert_names(layer, e)}  # fmt: skip
        experts = load_file(directory / EXPERTS_FILE)
        write_checkpoint(model, out_dir, {stored.get(module, module): weight for module, weight in experts.items()})
    return {"baseline": name, **result}


def _start(name: str, python: Path, directory: Path, device: str) -> None:
    env = {
        **os.environ,
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        "PYTHONPATH": os.pathsep.join(str(path) for path in (packages(name), _ROOT) if path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",  # the model is a directory; nothing is to be fetched
        "TOKENIZERS_PARALLELISM": "false",
    }
    log = directory / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        # Libraries leave working files in the current directory.
        code = subprocess.run(
            [str(python), "-m", f"benchmarks.baselines.{name}", str(directory)],
            cwd=directory, env=env, stdout=file, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        raise BitsmoeError("\n".join([f"baseline {name}: ended with status {code}:", *(f"  {line}" for line in last)]))
