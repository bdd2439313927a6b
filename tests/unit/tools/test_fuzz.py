"""A short run of `python -m tools.fuzz`, and whether it notices what it is there to notice."""

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitsmoe_kernels import reference
from bitsmoe_kernels.format import checkpoint
from bitsmoe_kernels.format import safetensors_io as shards
from bitsmoe_kernels.format.safetensors_io import ShardReader
from tools.fuzz import __main__ as command
from tools.fuzz import mutations, targets, worker
from tools.fuzz.bases import Base, all_bases


@pytest.fixture(scope="module")
def bases() -> list[Base]:
    return all_bases()


@pytest.fixture
def sound(bases: list[Base], tmp_path: Path) -> Path:
    """A sound checkpoint with an order."""
    base = next(b for b in bases if b.name.startswith("ordered"))
    return put(base.files, tmp_path)


def put(files: dict[str, bytes], tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    mutations.write(dict(files), directory)
    return directory


def examine(directory: Path) -> dict[str, str]:
    scratch = directory.parent / "scratch"
    scratch.mkdir()
    return targets.examine(directory, scratch)


@pytest.mark.slow
def test_damaged_checkpoints() -> None:
    results = worker.fuzz(200, seed=1)
    assert [(r.case, r.done, r.finding) for r in results if r.finding] == []
    ends = Counter(r.end for r in results)
    assert ends["refused"] > 100
    assert ends["accepted"] > 10
    assert {name for r in results for name, _ in r.done} == set(mutations.MUTATIONS)


@pytest.mark.slow
def test_sound_checkpoints_are_accepted(bases: list[Base], tmp_path: Path) -> None:
    for i, base in enumerate(bases[::2]):  # every form
        (tmp_path / str(i)).mkdir()
        outcome = examine(put(base.files, tmp_path / str(i)))
        good = {"shards", "any model"} | (
            {"checkpoint", "startup", "quantized model"} if base.quantized else {"source model"}
        )
        assert {name for name, end in outcome.items() if end == "accepted"} == good, (base.name, outcome)


def test_a_case_is_its_seed_and_number(bases: list[Base]) -> None:
    for case in range(20):
        assert worker.make_case(bases, 3, case) == worker.make_case(bases, 3, case)
    assert worker.make_case(bases, 3, 0)[1:] != worker.make_case(bases, 4, 0)[1:]


def test_tensors_that_are_not_the_file_are_found(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ShardReader.get
    monkeypatch.setattr(ShardReader, "get", lambda self, name: read(self, name).clone())
    with pytest.raises(targets.FindingError, match="its memory is not within the mapping of"):
        examine(sound)


def test_tensors_from_elsewhere_in_the_file_are_found(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ShardReader.get

    def swapped(self: ShardReader, name: str) -> Tensor:
        return read(self, name.replace(".0.mlp", ".1.mlp"))

    monkeypatch.setattr(ShardReader, "get", swapped)
    with pytest.raises(targets.FindingError, match=r"begins at byte \d+ of model|is not within the mapping|in memory"):
        examine(sound)


def test_files_outside_are_found(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = next(sound.glob("*.safetensors"))
    outside = sound.parent / "outside.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    assert all(end != "accepted" for end in examine(sound).values())
    monkeypatch.setattr(shards, "file_fault", lambda *_: None)
    with pytest.raises(targets.FindingError, match=r"leads to .*outside\.safetensors, outside"):
        targets.examine(sound, sound.parent / "scratch")


def test_a_missing_check_is_found(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An order with a component twice, and nobody who looks: what is dequantized is no longer what was stored."""
    reader = ShardReader(sound)
    name = next(n for n in reader if n.endswith("_order"))
    path = sound / reader._file_of[name]
    begin, end = targets.expected_bytes(path)[name]
    raw = bytearray(path.read_bytes())
    raw[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(bytes(raw))
    assert "order: not a permutation" in examine(sound)["checkpoint"]
    monkeypatch.setattr(checkpoint, "check_values", lambda *_: [])
    with pytest.raises(targets.FindingError, match=r"checkpoint: (IndexError|RuntimeError)"):
        targets.examine(sound, sound.parent / "scratch")


def test_other_exceptions_are_found(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.ProjectionWeights, "levels", lambda *_: torch.zeros(1)[5])
    with pytest.raises(targets.FindingError, match="checkpoint: IndexError"):
        examine(sound)


@pytest.mark.slow
def test_a_process_that_dies_or_hangs_is_found(
    bases: list[Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "misbehaving.py").write_text(
        "import os, time\n"
        "def run(bases, seed, case):\n"
        "    if case == 0: os.abort()\n"
        "    if case == 1: bytearray(2**30)\n"
        "    if case == 2: time.sleep(600)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from misbehaving import run

    one = worker.Worker(bases, 0, run)
    assert one.run(0).finding == "the process died of SIGABRT"
    assert one.run(1).finding == "the process died of status 1"
    assert one.run(3) is None
    monkeypatch.setattr(worker, "HANG_SECONDS", 0.5)
    assert one.run(2).finding == "no end within 0 seconds"
    one.stop()


def test_a_finding_is_kept(bases: list[Base], tmp_path: Path) -> None:
    base, files, done = worker.make_case(bases, 0, 3)
    path = command.save_finding(worker.Result(3, base.name, done, finding="boom"), 0, tmp_path / "out")
    assert path.name == "finding-0-3.tar"
    with tarfile.open(path) as tar:
        names = {n.removeprefix("checkpoint/") for n in tar.getnames()} - {"checkpoint"}
        assert names == files.keys() | {"finding.json"}
        note = tar.extractfile("finding.json")
        assert note is not None
        assert json.load(note)["finding"] == "boom"
