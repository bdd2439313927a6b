"""The state of a run, on disk beside its output: a run that dies goes on after its last finished layer.

    .NAME.partial/
        state.json          version, what the run was started with, and whether its result is complete
        lock                held by the run that works here
        windows.safetensors calibration tokens
        calibration.json    their origin
        tokens.safetensors  how much they count, where that was measured
        picked.json         the bits that were picked for a divergence, where they were
        shared.json         one budget for the model, divided among its layers, where there is one
        layer-00003/        a finished layer: its tensors, schema, report and the hidden states that leave it; its tuned
                            tensors, where the whole model is tuned
        tuned.json          how the whole model was tuned, once that is done
        result/             the checkpoint, put together at the end and renamed to its place

A layer's directory appears by renaming, after all its files have reached the disk. Hidden states of earlier layers are
removed once a later one is complete.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.safetensors_io import read_json
from offline_quant.calibration.sources.base import CalibrationText, CalibrationWindows
from offline_quant.checkpoint.directory import (
    REPORT_FILE,
    check_output,
    missing_parents,
    move_into_place,
    remove_empty,
    unwritable,
)
from offline_quant.pipeline.records import DividedBudget, LayerRecord, PickedBits
from offline_quant.report.schema import ModelTuning
from offline_quant.runtime.distributed import Workers

STATE_VERSION = 2
RESULT = "result"
_STATE, _LOCK = "state.json", "lock"
_WINDOWS, _POWERS = "windows.safetensors", "tokens.safetensors"
_TEXT, _BUDGET, _PICKED = "calibration.json", "shared.json", "picked.json"
_TENSORS, _LAYER = "tensors.safetensors", "layer.json"
_TUNED, _CHANGED = "tuned.json", "tuned.safetensors"


def state_directory(out: Path) -> Path:
    """The state directory of a run that writes `out`: beside it, or in it where it exists (a mount point, say)."""
    out = out.absolute()
    beside = out.with_name(f".{out.name}.partial")
    return out / beside.name if out.exists() and not beside.exists() else beside


def is_complete(out: Path) -> bool:
    """Whether a run that wrote `out` died after all of its work, while it put the result into its place."""
    directory = state_directory(out)
    state = read_json(directory / _STATE) if (directory / _STATE).exists() else {}
    return "complete" in state and ((directory / RESULT).exists() or (out / REPORT_FILE).exists())


@dataclass(frozen=True)
class EarlierRun:
    """What an earlier run has left that a run resumes.

    Attributes:
        complete: it died after all of its work, while it put the result into its place.
        has_tokens: its calibration tokens are there, or are not needed any more.
    """

    complete: bool
    has_tokens: bool

    @classmethod
    def of(cls, out: Path, resume: bool) -> "EarlierRun":
        """What is left of the run that wrote `out`; nothing without `resume`."""
        complete = resume and is_complete(out)
        return cls(complete, complete or (resume and (state_directory(out) / _WINDOWS).exists()))


def held_bytes(out: Path) -> int:
    """Bytes an earlier run that wrote `out` has left on the disk."""
    return sum(path.stat().st_size for path in state_directory(out).rglob("*") if path.is_file())


class RunState:
    """The state of one run.

    Attributes:
        concluded: an earlier run had made everything; the result is in its place now, and nothing is left to do.

    Args:
        out: the directory the run writes.
        started: options and inputs of the run, as JSON data.
        resume: go on where an earlier run stopped; there may be none.

    Raises:
        BitsmoeError: another run works here; without `resume`, an earlier one left finished layers; with it, that one
            was started otherwise (names every difference), or by another version.
    """

    def __init__(self, out: Path, started: dict[str, Any], resume: bool):
        self.out, self.started = out.absolute(), started
        self.directory = state_directory(out)
        self._made = missing_parents(self.directory)
        self._lock: IO[str] | None = None
        self.concluded = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._take()
            self._begin(resume)
        except BaseException:
            if self._lock is not None:
                self.close(keep=self.finished() > 0)
            raise

    def _take(self) -> None:
        lock = (self.directory / _LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise BitsmoeError(
                f"--out {self.out}: another run is writing it; wait for it or choose another name"
            ) from None
        self._lock = lock

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}  # the lock stays with the process that took it

    def _begin(self, resume: bool) -> None:
        earlier = read_json(self.directory / _STATE) if (self.directory / _STATE).exists() else None
        complete = is_complete(self.out)
        if earlier is None or not (complete or self.finished()):
            self._start_anew()
            return
        if not resume:
            raise BitsmoeError(
                f"--out {self.out}: an earlier run stopped after {self.finished()} layer(s), kept in {self.directory}; "
                "add --resume to go on, or remove that directory to start anew"
            )
        if earlier.get("version") != STATE_VERSION:
            raise BitsmoeError(
                f"--resume: {self.directory} was left by another version of bitsmoe (state {earlier.get('version')}, "
                f"this one has {STATE_VERSION}); go on with that version, or remove the directory to start anew"
            )
        if faults := _differences(earlier.get("started", {}), self.started):
            raise BitsmoeError(
                fault_list(
                    f"--resume: the run in {self.directory} was started otherwise; go on with the same options and "
                    "inputs, or remove that directory to start anew",
                    faults,
                )
            )
        if complete:
            self._leave()
            self.concluded = True
            return
        for path in self.directory.iterdir():
            if path.name.startswith("spool-") or path.suffix == ".tmp" or path.name == RESULT:
                remove(path)

    def _start_anew(self) -> None:
        for path in self.directory.iterdir():
            if path.name != _LOCK:
                remove(path)
        self._note()

    def _note(self, **more: bool) -> None:
        data = {"version": STATE_VERSION, "started": self.started, **more}
        _write(self.directory / _STATE, json.dumps(data, indent=1))

    def finished(self) -> int:
        """The number of finished layers."""
        count = 0
        while (self._layer(count) / _LAYER).exists():
            count += 1
        return count

    def _layer(self, index: int) -> Path:
        return self.directory / f"layer-{index:05d}"

    def hidden_file(self, index: int, name: str) -> Path:
        """The file of hidden states that leave a layer, finished or not; -1: that enter the first layer."""
        done = self._layer(index) if index >= 0 else self.directory / "embedded"
        return (done if done.exists() else done.with_suffix(".tmp")) / f"{name}.f32"

    def open_layer(self, index: int) -> None:
        """Make the directory for the hidden states that leave a layer."""
        self.hidden_file(index, "").parent.mkdir(exist_ok=True)

    def put_hidden(self, index: int, name: str, hidden: Tensor) -> None:
        """Write hidden states, float32, and wait until they are on the disk."""
        with self.hidden_file(index, name).open("wb") as file:
            hidden.cpu().contiguous().numpy().tofile(file)
            file.flush()
            os.fsync(file.fileno())

    def hidden(self, index: int, name: str, shape: tuple[int, ...]) -> Tensor:
        """Hidden states that `put_hidden` wrote, float32, in the given shape."""
        return torch.from_numpy(np.fromfile(self.hidden_file(index, name), np.float32)).view(shape)

    def drop_hidden(self, index: int) -> None:
        """Remove the hidden states that left a layer."""
        for path in self.hidden_file(index, "").parent.glob("*.f32"):
            path.unlink()

    def close_layer(self, index: int, tensors: dict[str, Tensor], record: LayerRecord) -> None:
        """Keep the tensors and the record of a finished layer, and drop the hidden states that entered it."""
        work = self._layer(index).with_suffix(".tmp")
        if tensors:
            save_file(tensors, work / _TENSORS, metadata={"format": "pt"})
            _sync(work / _TENSORS)
        _write(work / _LAYER, json.dumps(record.dump()))
        os.replace(work, self._layer(index))
        _sync(self.directory)
        self.drop_hidden(index - 1)

    def layer_record(self, index: int) -> LayerRecord:
        """The record a finished layer was closed with."""
        return LayerRecord.load(_read_own(self._layer(index) / _LAYER))

    def layer_tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors a finished layer was closed with, or those that the tuning of the whole model left."""
        tuned: dict[str, Tensor] = {}
        if (tuning := self.tuning) is not None and tuning.kept and (self._layer(index) / _CHANGED).exists():
            tuned = load_file(self._layer(index) / _CHANGED)
        if (self._layer(index) / _TENSORS).exists():
            with safe_open(str(self._layer(index) / _TENSORS), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, tuned[name] if name in tuned else file.get_tensor(name)

    @property
    def tuning(self) -> ModelTuning | None:
        """What `keep_tuning` kept; None: the whole model is not tuned yet."""
        data = self._kept(_TUNED)
        return None if data is None else ModelTuning.model_validate(data)

    def keep_tuning(self, changed: dict[int, dict[str, Tensor]], report: ModelTuning) -> None:
        """Keep new tensors of finished layers, by index and name, and how they came about."""
        for index, tensors in changed.items():
            save_file(tensors, self._layer(index) / _CHANGED, metadata={"format": "pt"})
            _sync(self._layer(index) / _CHANGED)
        self._keep(_TUNED, report.model_dump())

    @property
    def windows(self) -> CalibrationWindows | None:
        """The calibration tokens that `keep_windows` kept; None: there are none yet."""
        path, text = self.directory / _WINDOWS, self._kept(_TEXT)
        if text is None or not path.exists():
            return None
        with safe_open(str(path), framework="pt") as file:
            return CalibrationWindows(file.get_tensor("windows"), CalibrationText(**text))

    def keep_windows(self, windows: CalibrationWindows) -> None:
        """Keep the calibration tokens."""
        self._keep(_TEXT, asdict(windows.text))
        self._save(_WINDOWS, {"windows": windows.tokens.contiguous()})

    @property
    def token_powers(self) -> dict[int, Tensor] | None:
        """What `keep_token_powers` kept; None: there is nothing yet."""
        path = self.directory / _POWERS
        return {int(index): power for index, power in load_file(path).items()} if path.exists() else None

    def keep_token_powers(self, powers: Mapping[int, Tensor]) -> None:
        """Keep squared gradients at every calibration token, by layer index."""
        self._save(_POWERS, {str(index): power for index, power in powers.items()})

    @property
    def model_budget(self) -> DividedBudget | None:
        """The budget that `keep_model_budget` kept; None: there is none yet."""
        data = self._kept(_BUDGET)
        return None if data is None else DividedBudget.load(data)

    def keep_model_budget(self, budget: DividedBudget) -> None:
        """Keep one budget for the model, divided among its layers."""
        self._keep(_BUDGET, budget.dump())

    @property
    def picked_bits(self) -> PickedBits | None:
        """The bits that `keep_picked_bits` kept; None: there are none yet."""
        data = self._kept(_PICKED)
        return None if data is None else PickedBits.load(data)

    def keep_picked_bits(self, picked: PickedBits) -> None:
        """Keep the bits that were picked for `--target-kl`."""
        self._keep(_PICKED, picked.dump())

    def _keep(self, name: str, data: dict[str, Any]) -> None:
        _write(self.directory / name, json.dumps(data))

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self.directory / name
        save_file(tensors, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def _kept(self, name: str) -> dict[str, Any] | None:
        return _read_own(self.directory / name) if (self.directory / name).exists() else None

    def publish(self) -> None:
        """Move the checkpoint in `result` to its place and remove the state."""
        result = self.directory / RESULT
        for path in (*result.iterdir(), result):
            _sync(path)
        self._note(complete=True)
        self._leave()

    def _leave(self) -> None:
        if (self.directory / RESULT).exists():
            if self.out not in self.directory.parents:
                check_output(self.out)
                if self.out.exists():
                    self.out.rmdir()
            move_into_place(self.directory / RESULT, self.out)
        for path in self.directory.iterdir():
            if path.name not in (_STATE, _LOCK):
                remove(path)
        self.close(keep=False)

    def close(self, keep: bool) -> None:
        """Release the lock; without `keep` remove the state too."""
        if not keep:
            shutil.rmtree(self.directory, ignore_errors=True)
            remove_empty(self._made)
        if self._lock is not None:
            self._lock.close()


@contextmanager
def run_state(out: Path, started: dict[str, Any], resume: bool, workers: Workers) -> Iterator[RunState]:
    """The state of a run. A run that stops keeps it if a layer was finished, and leaves nothing otherwise.

    Args:
        out, started, resume: see `RunState`.
        workers: processes of the run; the first of them owns the state.
    """
    state: RunState | None = None

    def begin() -> RunState:
        nonlocal state
        state = RunState(out, started, resume)
        return state

    try:
        # `begin` sets the state too: the broadcast fails where another process has died.
        state = workers.broadcast_from_first(begin)
        yield state
    except BaseException as e:
        if isinstance(e, (OSError, SafetensorError)):
            problem: BaseException = unwritable(out, e)
        else:
            problem = e
        if workers.rank == 0 and state is not None:
            # An input at fault will be at fault again.
            kept = 0 if isinstance(e, BitsmoeError) else state.finished()
            complete = is_complete(state.out)
            state.close(keep=complete or kept > 0)
            if complete:
                problem.add_note("everything was made: the same command with --resume puts it in its place")
            elif kept:
                problem.add_note(
                    f"{kept} finished layer(s) are kept in {state.directory}: the same command with --resume goes on"
                )
        raise problem from None


def _read_own(path: Path) -> dict[str, Any]:
    """JSON data that this program wrote. A disk that fails is an OSError: not a fault of the input; layers stay."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def remove(path: Path) -> None:
    """Remove a file or a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all; it is on the disk when this returns."""
    part = path.with_name(f"{path.name}.tmp")
    part.write_text(text + "\n", encoding="utf-8")
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)
