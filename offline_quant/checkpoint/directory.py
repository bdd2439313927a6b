"""Writing a checkpoint directory: all or nothing."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bitsmoe_kernels.errors import BitsmoeError

REPORT_FILE = "bitsmoe_report.json"
PAGE_FILE = "report.html"
"""Both are written beside the checkpoint, or alone by `--plan`. The page holds times and memory too."""
MAX_NAME = 230
"""Bytes of a directory's name: file systems take 255, and scratch directories have longer names than the result."""


def existing_directory(directory: Path) -> Path:
    """The directory, unchanged.

    Raises:
        BitsmoeError: it does not exist.
    """
    if not directory.is_dir():
        raise BitsmoeError(f"{directory}: no such directory")
    return directory


def check_output(out: Path, but: str = "") -> None:
    """Refuse an output directory that holds something, the report of an earlier `--plan` excepted.

    Args:
        out: the directory.
        but: name of an entry that may be there.

    Raises:
        BitsmoeError: names it.
    """
    if (size := len(os.fsencode(out.name))) > MAX_NAME:
        raise BitsmoeError(f"--out {out}: its last part has {size} bytes; use at most {MAX_NAME}")
    if out.is_symlink() and not out.exists():
        raise BitsmoeError(f"--out {out}: is a dangling symbolic link; remove it or choose another name")
    if out.exists() and (not out.is_dir() or any(p.name not in (REPORT_FILE, PAGE_FILE, but) for p in out.iterdir())):
        raise BitsmoeError(f"--out {out}: exists and is not an empty directory; choose another name or remove it")


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin where the disk cannot hold the result.

    Raises:
        BitsmoeError: names needed and free bytes.
    """
    existing = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise BitsmoeError(
            f"{out}: needs {needed / 1e6:.1f} MB, but {free / 1e6:.1f} MB are free on that disk; free some space or "
            "choose another place"
        )


def unwritable(out: Path, reason: Exception) -> BitsmoeError:
    """What to say when writing failed midway."""
    free = shutil.disk_usage(next(p for p in out.absolute().parents if p.exists())).free
    return BitsmoeError(f"{out}: cannot be written ({reason}); {free / 1e6:.1f} MB are free there")


def missing_parents(path: Path) -> list[Path]:
    """Directories that making a path would make besides, the innermost first."""
    return [p for p in path.parents if not p.exists()]


def remove_empty(directories: list[Path]) -> None:
    """Remove those of some directories that are there and empty, in order."""
    for directory in directories:
        if directory.exists() and not any(directory.iterdir()):
            directory.rmdir()


def move_into_place(made: Path, out: Path) -> None:
    """Give a finished directory its place: renamed whole, or, where it was made inside `out`, file by file.

    config.json comes last: with it a checkpoint is one.
    """
    if out in made.parents:
        for path in sorted(made.iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(path, out / path.name)
        made.rmdir()
    else:
        os.replace(made, out)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A scratch directory whose files appear in `out` if the block succeeds, and which vanishes if it does not.

    An `out` that does not exist is renamed into place whole. An empty one (it may be a mount point, which cannot be
    replaced) holds the scratch directory, and receives its files at the end, config.json last.

    Raises:
        BitsmoeError: `out` exists and is not empty, cannot be made, or the disk fills up.
    """
    check_output(out)
    out = out.absolute()
    made = missing_parents(out)
    # Named before it is made, so that a signal in between leaves nothing.
    scratch = (out if out.exists() else out.parent) / f".{out.name}.partial-{secrets.token_hex(4)}"
    done = False
    try:
        scratch.mkdir(parents=True)
        yield scratch
        move_into_place(scratch, out)
        done = True
    except (OSError, SafetensorError) as e:
        raise unwritable(out, e) from None
    finally:
        if not done:
            shutil.rmtree(scratch, ignore_errors=True)
            remove_empty(made)
