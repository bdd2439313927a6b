"""Run cases in a process of their own, with a limit on memory and time."""

import random
import resource
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import save

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.model.outside.shape import model_shape
from offline_quant.runtime import progress
from tools.fuzz import mutations, targets
from tools.fuzz.bases import Base, all_bases

SPARE_BYTES = 256 * 2**20
"""What a case may take on top of what the process holds; the checkpoints are below 200 kB."""
HANG_SECONDS = 60.0
"""A new process may have imports to do as well."""


@dataclass
class Result:
    """How a case ended.

    Attributes:
        case: its number.
        base: the checkpoint it was made from.
        done: (mutation, what it did).
        outcome: reader -> "accepted" or the error.
        finding: what must not be; None where nothing was found.
    """

    case: int
    base: str
    done: list[tuple[str, str]]
    outcome: dict[str, str] = field(default_factory=dict)
    finding: str | None = None

    @property
    def end(self) -> str:
        """In one word: "accepted" if the checkpoint is still good for its purpose."""
        if self.finding is not None:
            return "finding"
        purpose = "source model" if self.base[0].isupper() else "quantized model"
        return "accepted" if self.outcome[purpose] == "accepted" else "refused"


def make_case(bases: list[Base], seed: int, case: int) -> tuple[Base, mutations.Files, list[tuple[str, str]]]:
    """The files of one case, and how they were damaged."""
    rng = random.Random(f"{seed}:{case}")
    base = rng.choice(bases)
    files: mutations.Files = dict(base.files)
    return base, files, mutations.mutate(rng, files)


def run_case(bases: list[Base], seed: int, case: int) -> Result:
    """Make one case and read it."""
    base, files, done = make_case(bases, seed, case)
    result = Result(case, base.name, done)
    with tempfile.TemporaryDirectory(prefix="bitsmoe-fuzz-") as name:
        place = Path(name).resolve()
        directory, scratch = place / "checkpoint", place / "scratch"
        directory.mkdir()
        scratch.mkdir()
        # What links and file names try to reach; both would be accepted inside.
        (place / "outside.safetensors").write_bytes(save({"model.norm.weight": torch.ones(40)}))
        (place / "outside.json").write_bytes(base.files["config.json"])
        mutations.write(files, directory)
        try:
            result.outcome = targets.examine(directory, scratch)
        except targets.FindingError as e:
            result.finding = str(e)
    return result


Run = Callable[[list[Base], int, int], Result]


def _set_up(bases: list[Base], seed: int) -> None:
    """Load whatever is loaded on first use, before memory is limited."""
    run_case(bases, seed, 0)
    sizes = dict.fromkeys(("num_hidden_layers", "hidden_size", "vocab_size", "num_experts"), 1)
    with suppress(BitsmoeError):  # transformers builds a model, of another name
        model_shape({"architectures": ["Unknown"], "model_type": "qwen3_moe"} | sizes, Path(), list)


def _serve(connection: Connection, bases: list[Base], seed: int, run: Run) -> None:
    """The worker: take numbers, send results."""
    torch.set_num_threads(1)
    progress.console.quiet = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _set_up(bases, seed)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + SPARE_BYTES, held + SPARE_BYTES))
    while (case := connection.recv()) is not None:
        connection.send(run(bases, seed, case))


class Worker:
    """A process for cases, which may die of them: the next case gets a new one.

    Args:
        bases: what `make_case` chooses from.
        seed: of all cases.
        run: makes and reads one case.
    """

    def __init__(self, bases: list[Base], seed: int, run: Run = run_case):
        self.bases, self.seed, self.run_one = bases, seed, run
        self.process: BaseProcess | None = None
        # New processes are forked from one that has imported everything and holds no thread.
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload([__name__])

    def run(self, case: int) -> Result:
        """One case; a process that dies or hangs is a finding."""
        if self.process is None:
            self.connection, other = self.context.Pipe()
            arguments = (other, self.bases, self.seed, self.run_one)
            self.process = self.context.Process(target=_serve, args=arguments, daemon=True)
            self.process.start()
            other.close()
        try:
            self.connection.send(case)
            # In two halves: a machine that sleeps, or stops its processes for a while, spoils one only.
            if self.connection.poll(HANG_SECONDS / 2) or self.connection.poll(HANG_SECONDS / 2):
                return self.connection.recv()
            trouble = f"no end within {HANG_SECONDS:.0f} seconds"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            trouble = f"the process died of {signal.Signals(-code).name if code < 0 else f'status {code}'}"
        self.process.kill()
        self.process.join()
        self.process = None
        base, _, done = make_case(self.bases, self.seed, case)
        return Result(case, base.name, done, finding=trouble)

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.connection.send(None)
            self.process.join()


def fuzz(count: int, seed: int, tick: Callable[[], object] = lambda: None) -> list[Result]:
    """Run cases 0 to count - 1."""
    worker = Worker(all_bases(), seed)
    results = []
    for case in range(count):
        results.append(worker.run(case))
        tick()
    worker.stop()
    return results
