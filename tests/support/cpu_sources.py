"""Copies of the CPU kernels' sources with pieces of their text replaced, compiled."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from bitsmoe_kernels._cpu import build

Change = tuple[str, str, str]
"""A file, a text that stands in it once, and what replaces it."""

RED_ZONES: tuple[Change, ...] = (
    ("engine.h", '#include "layout.h"', '#include <sanitizer/asan_interface.h>\n#include "layout.h"'),
    (
        "engine.h",
        "        at += up_to(n * (int64_t)sizeof(T), 64);\n",
        """        const int64_t used = n * (int64_t)sizeof(T), all = up_to(used, 64) + 64;
        if (real) ASAN_POISON_MEMORY_REGION(at + used, all - used);
        at += all;
""",
    ),
    ("engine.h", "    uint8_t* at;\n", "    uint8_t* at;\n    const bool real = at != nullptr;\n"),
    (
        "engine.h",
        "        lay_out<ROWS>(p, *memory);\n",
        "        ASAN_UNPOISON_MEMORY_REGION(*memory, *memory_bytes);\n        lay_out<ROWS>(p, *memory);\n",
    ),
)
"""Bytes behind each array of a call's buffers that AddressSanitizer watches: they all lie in one allocation."""

PLANTED: Change = (
    "layout.h",
    "#include <stdint.h>\n",
    '#include <stdint.h>\n#include <stdlib.h>\nstatic const int PLANTED = atoi(getenv("PLANTED") ?: "0");\n',
)
"""The number of a fault to make, from the environment: one library has all of them, and none unless it is asked to."""

SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compile_changed(folder: Path, changes: Sequence[Change], flags: Sequence[str]) -> Path:
    """Compile a changed copy of the sources; the library.

    Args:
        folder: for the copy and the library, made anew.
        changes: in order.
        flags: more flags of the compiler.

    Raises:
        AssertionError: a text to be replaced is not in its file, or more than once.
    """
    shutil.copytree(build.SOURCES, folder, ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    for name, right, wrong in changes:
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(right) == 1, f"{text.count(right)} times in {name}: {right!r}"
        (folder / name).write_text(text.replace(right, wrong), encoding="utf-8")
    with patch.object(build, "SOURCES", folder):
        build.compile_library(folder / build.LIBRARY, flags)
    return folder / build.LIBRARY
