"""Files of a model directory besides config.json and weights: tokenizer, templates, licenses, code."""

import re
import shutil
from pathlib import Path

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.safetensors_io import file_fault, read_json

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
CARD_FILE = "README.md"
"""The Hub's model card: every checkpoint has its own, so none is carried over."""


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
