"""The steps of the campaign: what each runs, needs and leaves."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.baselines import environments
from benchmarks.gpu.parts import MARLIN, PARTS
from benchmarks.record import ROOT, child_environment, write_json

EXAMPLES = ROOT / "examples"
PIECE_BYTES = 15_000_000
"""Larger files are handed over in pieces of this size."""
CUDA_TOOLS = "/usr/local/cuda/bin"
PROCESSES = 8
ENDING_SECONDS = 60
LEAST_SECONDS = 20
"""A command is not begun with less time than this."""
TRAINED: dict[str, list[str]] = {
    "tiny_moe": ["--max-tokens", "90000000"],
    "larger_moe": ["--max-tokens", "90000000", "--hidden", "512", "--experts", "64", "--top-k", "8"],
}
"""Models to train on a GPU and what they differ in from train.py's defaults: 14 and 106 million parameters."""
Command = list[str]


@dataclass(frozen=True)
class Setting:
    """Of a run.

    Attributes:
        out: folder of results.
        scratch: folder of what is made on the way.
        site: folder with an installed folder of each part.
        corpus: folder with train.txt or train.txt.xz, valid.txt and calib.txt; None: none is there.
        rehearsal: tiny and on a CPU.
        deadline: `time.time()` at which everything ends; None: never.
    """

    out: Path
    scratch: Path
    site: Path
    corpus: Path | None
    rehearsal: bool
    deadline: float | None = None

    @property
    def left(self) -> float | None:
        """Seconds."""
        return None if self.deadline is None else self.deadline - time.time()

    @property
    def device(self) -> str:
        """What computes."""
        return "cpu" if self.rehearsal else "cuda"


@dataclass(frozen=True)
class Step:
    """One question.

    Attributes:
        shows: what it answers.
        commands: to run in turn; the next ones run even if one fails.
        parts: that it cannot do without.
        texts: whether it needs a corpus.
    """

    shows: str
    commands: Callable[[Setting], list[Command]]
    parts: tuple[str, ...] = ("base",)
    texts: bool = False


def _python(*arguments: str | Path) -> Command:
    return [sys.executable, *(str(a) for a in arguments)]


def _tests(s: Setting) -> list[Command]:
    command = _python("-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider")
    if s.rehearsal:
        return [[*command, "--collect-only"]]
    # What takes time is compiling, on processors.
    return [[*command, *(["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else [])]]


def _kernels(s: Setting) -> list[Command]:
    command = _python("-m", "benchmarks.kernels", "--out", s.out)
    if s.rehearsal:
        return [[*command, "--rehearse"]]
    if s.left is not None:  # time for the rows that have begun, the table and the picture
        command += ["--seconds", str(round(max(1.0, s.left - ENDING_SECONDS)))]
    return [[*command, "--marlin", str(s.site / "kernels" / MARLIN)]]


def _tune(s: Setting) -> list[Command]:
    return [_python("-m", "benchmarks.kernels", "--tune", "--out", s.out, *(["--rehearse"] if s.rehearsal else []))]


def _quantizer(s: Setting) -> list[Command]:
    sizes = ["--model", "qwen3-30b-a3b", "--layers", "2"]
    if s.rehearsal:
        sizes = ["--model", "rehearsal", "--layers", "1", "--calib-samples", "4", "--calib-length", "64"]
    common = ["-m", "benchmarks.scale", *sizes, "--device", s.device, "--scratch", str(s.scratch)]
    least = json.dumps({"feedback": False, "refine": 0, "without": ["trial"]})
    return [
        _python(*common, "--options", least, "--out", s.out / "scale-gpu-without-feedback.json"),
        _python(*common, "--gptq", "--out", s.out / "scale-gpu.json"),  # GPTQ takes longest
    ]


def _train(s: Setting) -> list[Command]:
    assert s.corpus is not None
    data, train = s.scratch / "data", EXAMPLES / "tiny_moe" / "train.py"
    commands = [_python(EXAMPLES / "tiny_moe" / "tok.py", s.corpus, data, EXAMPLES / "tiny_moe")]
    size = ["--device", "cuda", "--batch-tokens", "16384", "--lr", "2e-3", "--minutes", "3", "--eval-every", "500"]
    if s.rehearsal:
        size = ["--workers", "1", "--batch-tokens", "512", "--max-steps", "2", "--eval-windows", "2", "--minutes", "9"]
    for name, shape in TRAINED.items():
        run, model = s.scratch / f"run-{name}", s.scratch / name
        over: list[str | Path] = ["--out", s.out] if name == "tiny_moe" else []
        commands += [
            _python(train, "train", "--data", data, "--run", run, *size, *shape),
            _python(train, "export", "--run", run, "--out", model),
            _python("-m", "benchmarks.gpu", "complete", model, "--tokenizer", EXAMPLES / "tiny_moe", *over),
        ]
    return commands


def _quality(s: Setting) -> list[Command]:
    assert s.corpus is not None
    texts = ["--calib", str(s.corpus / "calib.txt"), "--text", str(s.corpus / "valid.txt")]
    rows = ["--rows", "main", "forms", "objectives", "--methods", "bitsmoe", "gptq", "autoround", "rtn"]
    if s.rehearsal:
        rows = ["--rows", "main", "--methods", "rtn", "--bits", "2"]
    return [
        _python(
            "-m", "benchmarks.quality", "--model", s.scratch / name, *texts, *rows, "--device", s.device, "--out", s.out
        )
        for name in TRAINED
    ]


def _serving(s: Setting) -> list[Command]:
    if s.rehearsal:
        tiny = ["--model", "rehearsal", "--methods", "bitsmoe", "16-bit", "--batches", "1", "--output", "4", "--eager"]
        return [_python("-m", "benchmarks.serving", *tiny, "--out", s.out / "serving-rehearsal.json")]
    return [_python("-m", "benchmarks.serving", "--model", "qwen3-30b-a3b", "--out", s.out / "serving-gpu.json")]


STEPS = {
    "tests": Step("that the kernels compute what they should, memory checker included", _tests),
    "kernels": Step("one layer's time beside 16 bits, 4 bits, GPTQ-Marlin and Humming", _kernels, ("base", "kernels")),
    "tune": Step("the table of tiles", _tune),
    "quantizer": Step("seconds for a layer of Qwen3-30B-A3B, beside GPTQ's library", _quantizer, ("base", "gptq")),
    "train": Step("demo models trained properly", _train, texts=True),
    "serving": Step(
        "tokens per second of Qwen3-30B-A3B in vLLM, beside GPTQ at 4 bits",
        _serving,
        ("base", "serving", "serving-core", "serving-experts", "serving-attention"),
    ),
    "quality": Step("quality tables of these models", _quality, ("base", "gptq", "autoround"), True),
}


def faults(names: Sequence[str], there: Sequence[str], s: Setting) -> list[str]:
    """Why the steps cannot all run; before any of them does."""
    found = []
    for name in names:
        step = STEPS[name]
        if not s.rehearsal and (missing := [part for part in step.parts if part not in there]):
            found.append(f"step {name} needs part {', '.join(missing)}: python -m benchmarks.gpu fetch, and --parts")
        if step.texts and s.corpus is None:
            found.append(f"step {name} needs --corpus: a folder with train.txt.xz, valid.txt and calib.txt")
    return found


def environment(s: Setting, step: Step) -> dict[str, str]:
    """Of a step's processes: its parts are importable; baselines find theirs by themselves."""
    found = child_environment()
    if (s.site / "base").is_dir():
        folders = dict.fromkeys(PARTS[name].site or name for name in step.parts)
        parts = [str(s.site / folder) for folder in folders if not environments.requirements_file(folder).exists()]
        found["PYTHONPATH"] = os.pathsep.join([found["PYTHONPATH"], *parts])
        found[environments.ROOT_VARIABLE] = str(s.site)
    tools = os.pathsep.join([found.get("PATH", ""), CUDA_TOOLS])  # the memory checker is there, if nowhere else
    return found | {"PYTHONUNBUFFERED": "1", "PATH": tools}


def run(names: Sequence[str], s: Setting) -> bool:
    """Run steps, each command's output in OUT/STEP.log; OUT/steps.json says after each how it went.

    Args:
        names: of STEPS.
        s: setting.

    Returns:
        Whether all commands ended well.
    """
    s.out.mkdir(parents=True, exist_ok=True)
    s.scratch.mkdir(parents=True, exist_ok=True)
    report = s.out / "steps.json"
    done: dict[str, Any] = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    for name in names:
        done[name] = []
        with (s.out / f"{name}.log").open("w", encoding="utf-8") as log:
            for command in STEPS[name].commands(s):
                shown = " ".join(_short(part) for part in command)
                print(f"[{name}] {shown}", flush=True)
                log.write(f"$ {shown}\n")
                log.flush()
                began = time.time()
                status = _command(command, s, environment(s, STEPS[name]), log)
                done[name].append({"command": shown, "seconds": round(time.time() - began, 1), "status": status})
                write_json(report, done)
        last = (s.out / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        print("\n".join(last), flush=True)
    return all(d["status"] == 0 for name in names for d in done[name])


def _short(part: str) -> str:
    return "python" if part == sys.executable else part.removeprefix(f"{ROOT}/")


def _command(command: Command, s: Setting, env: dict[str, str], log: Any) -> int | str:
    """Exit status, or why there is none."""
    left = s.left
    if left is not None and left < LEAST_SECONDS:
        return "not begun: the time was up"
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "stopped: the time was up"


def complete(model: Path, tokenizer: Path, out: Path | None) -> None:
    """Give a trained checkpoint its tokenizer, and copy what was trained to the results, large files in pieces.

    `cat NAME-model.safetensors.* > model.safetensors` puts them together again.
    """
    for file in tokenizer.glob("*token*.json"):
        (model / file.name).write_bytes(file.read_bytes())
    if out is None:
        return
    for file in (model / "config.json", model / "model.safetensors"):
        data = file.read_bytes()
        pieces = [data[i : i + PIECE_BYTES] for i in range(0, len(data), PIECE_BYTES)]
        for number, piece in enumerate(pieces):
            suffix = "" if len(pieces) == 1 else f".{number:03}"
            (out / f"{model.name}-{file.name}{suffix}").write_bytes(piece)
