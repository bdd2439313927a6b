"""Writing a checkpoint directory: all or nothing."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.shards import file_fault, read_json

REPORT_FILE = "bitsmoe_report.json"
PAGE_FILE = "report.html"
"""Both are written beside the checkpoint, or alone by `--plan`. The page holds times and memory too."""
SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.tiktoken", "*.model",
    "generation_config.json", "chat_template*", "*.jinja", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "tekken.json", "additional_chat_templates/*.jinja", "custom_generate/*",
    "*LICENSE*", "*License*", "*license*", "COPYING*", "*NOTICE*", "*Notice*", "*USE_POLICY*",
)  # fmt: skip
"""What a checkpoint holds besides config.json and weights, as the original has it. Code comes along if it is named."""
CODE_FILES = "*.py"
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)
_NAMING_CODE = (
    "config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
"""Files whose `auto_map` names classes of the model's own code, as `module.Class`."""
MAX_NAME = 230
"""Bytes of a directory's name: file systems take 255, and scratch directories have longer names than the result."""
CARD_FILE = "README.md"
"""The Hub's model card: every checkpoint has its own, so none is carried over."""


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


def side_files(source: Path) -> list[Path]:
    """Tokenizer, chat templates, license and code of a model, in order of names."""
    found = {p for pattern in SIDE_FILES for p in source.glob(pattern)} | _code_files(source)
    return sorted(p for p in found if p.is_file() or p.is_symlink())  # one that leads nowhere is refused


def missing_code(source: Path) -> list[str]:
    """Files of code that config.json names, and that are not there."""
    return [name for name in _named_code(source / "config.json") if not (source / name).is_file()]


def _named_code(path: Path) -> list[str]:
    """Names of the files of code that a JSON file's `auto_map` names; those of other repositories are not ours."""
    if file_fault(path.parent, path.name):
        return []
    named = read_json(path).get("auto_map")
    values = list(named.values()) if isinstance(named, dict) else []
    classes = [c for v in values for c in (v if isinstance(v, list) else [v]) if isinstance(c, str) and "--" not in c]
    modules = {c.rpartition(".")[0] for c in classes}
    return sorted(f"{module}.py" for module in modules if module.isidentifier())


def _code_files(source: Path) -> set[Path]:
    """Code that the model's JSON files name, and what that imports from beside itself."""
    found: set[Path] = set()
    waiting = [source / name for file in _NAMING_CODE for name in _named_code(source / file)]
    while waiting:
        path = waiting.pop()
        if path in found or file_fault(source, path.name):
            found.add(path)  # a link out of the directory is refused with all others
            continue
        found.add(path)
        for name in _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace")):
            waiting.append(source / f"{name}.py")
    return found


def check_side_files(source: Path) -> None:
    """Refuse side files that are links out of the model's directory: they would be copied, and perhaps published.

    Raises:
        BitsmoeError: names all of them.
    """
    names = (path.relative_to(source).as_posix() for path in side_files(source))
    if faults := [fault for name in names if (fault := file_fault(source, name))]:
        raise BitsmoeError(fault_list(f"{source}: files that must not be copied", faults))


def copy_side_files(source: Path, out: Path) -> None:
    """Carry over what belongs to the model whatever its weights are."""
    for path in side_files(source):
        to = out / path.relative_to(source)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, to)
