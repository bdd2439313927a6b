"""llama.cpp's types as rivals: this end of the process that `ggml_layer` is."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.baselines.environments import interpreter, packages
from benchmarks.cpu.rounds import Call
from benchmarks.kernels.shapes import Shape
from benchmarks.record import ROOT, child_environment
from bitsmoe_kernels.errors import BitsmoeError

KINDS = ("Q2_K", "IQ2_XXS", "IQ2_S", "Q4_K")


def title(kind: str) -> str:
    """Name of a type as a rival."""
    return f"llama.cpp {kind}"


class Llama:
    """A process with llama.cpp's library.

    Args:
        shape: of the layer.
        threads: of its computations.
        log: file for what it says.

    Raises:
        BitsmoeError: its environment cannot be made.
    """

    def __init__(self, shape: Shape, threads: int, log: Path):
        python = interpreter("gguf")
        found = packages("gguf")
        env = child_environment() | {"OMP_NUM_THREADS": str(threads)}
        if found:
            env["PYTHONPATH"] = os.pathsep.join([str(found), env["PYTHONPATH"]])
        self._log = log
        with log.open("w", encoding="utf-8") as said:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.cpu.ggml_layer"], cwd=ROOT, env=env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            )  # fmt: skip
        self.about = self.ask({"shape": asdict(shape), "threads": threads})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer.

        Raises:
            BitsmoeError: it ended; holds its last words.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise BitsmoeError("\n  ".join([f"llama.cpp's process ended with {self._process.wait()}:", *last]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class LlamaRival:
    """One of llama.cpp's types, see `rounds.Rival`.

    Args:
        process: that computes.
        shape: of the layer.
        kind: of `KINDS`.
        working_set: bytes that the copies hold at least.
    """

    shared_bytes = 0.0

    def __init__(self, process: Llama, shape: Shape, kind: str, working_set: int):
        self.name, self._kind, self._process = title(kind), kind, process
        made = process.ask({"make": kind, "working_set": working_set})
        self.copies: int = made["copies"]
        self.expert_bytes: float = made["expert_bytes"]
        self.bits = 8 * self.expert_bytes / shape.expert_weights
        self.detail: str = made["buffer"]
        self._error: float = made["relative_error"]

    def check(self) -> float:
        """See `rounds.Rival`; the process has checked it when it made the layer."""
        return self._error

    def turn(self, x: Tensor, calls: Sequence[tuple[int, Call]]) -> float:
        """See `rounds.Rival`. The process makes its tokens itself: as many as x has."""
        sent = [(copy, call.weights.tolist(), call.ids.tolist()) for copy, call in calls]
        seconds: float = self._process.ask({"turn": self._kind, "tokens": len(x), "calls": sent})["seconds"]
        return seconds
