"""Try versions of transformers on bitsmoe checkpoints: without this package, and with it.

    PYTHONPATH=tests/support python -m tools.transformers_versions 5.16.1 5.19.0 5.24.0

Each version is installed by pip into a folder of its own, with what it requires; torch comes from this environment. In
each, `tests/support/transformers_alone.py` must fail to load a checkpoint in every way it knows, with an error that
names bitsmoe. Then, with `import bitsmoe`, a random model of every family must have the logits of the dequantized
checkpoint: stored in one file, in shards, and with its linear layers at 4 bits. What `model.dequantize()` makes and
saves must have them too. Prints the table of docs/transformers.md and exits with 1 where something failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
BOUND = 1e-4
"""Largest difference of a logit, float32. The logits are about 4."""


def make_checkpoints(root: Path) -> None:
    """Quantized checkpoints, and the dequantized one of each beside it, named `...-plain`."""
    import torch

    from bitsmoe_kernels.models.families import FAMILIES
    from builders import FORMS, store_dense
    from families import make_quantized
    from offline_quant.checkpoint.dequantize import dequantize_checkpoint

    for i, architecture in enumerate(FAMILIES):
        form = FORMS[i % len(FORMS)]
        make_quantized(architecture, root / architecture, form)
        make_quantized(architecture, root / f"{architecture}-shards", form, max_shard_bytes=300_000)
        make_quantized(architecture, root / f"{architecture}-dense", form)
        store_dense(root / f"{architecture}-dense", 4)
    for directory in sorted(root.iterdir()):
        dequantize_checkpoint(directory, directory.with_name(f"{directory.name}-plain"), torch.float32)


def differences(root: Path) -> Iterator[tuple[str, float]]:
    """Largest difference of a logit, for every checkpoint and every way to load it with this package.

    A model that this transformers cannot compute from its ordinary checkpoint is left out, and named.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import bitsmoe  # noqa: F401
    from families import IDS, whole_logits

    for plain in sorted(root.glob("*-plain")):
        directory = plain.with_name(plain.name.removesuffix("-plain"))
        try:
            want = whole_logits(plain)
        except Exception as e:  # whatever is wrong with it, it is not this package
            print(f"left out: {directory.name}: {e}", file=sys.stderr)
            continue
        yield directory.name, float((whole_logits(directory) - want).abs().max())
        with tempfile.TemporaryDirectory() as saved, torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).dequantize().eval()
            yield f"{directory.name}, dequantize()", float((model(IDS).logits - want).abs().max())
            model.save_pretrained(saved)
            yield f"{directory.name}, saved", float((whole_logits(Path(saved)) - want).abs().max())


def run(folder: Path, *command: str) -> tuple[str, str]:
    """Run Python with a folder's packages first; returns the last line it prints, and what it says on stderr."""
    path = os.pathsep.join(map(str, (folder, REPO, REPO / "kernels", REPO / "tests" / "support")))
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, cwd=folder
    )
    return (done.stdout.strip().splitlines() or [""])[-1], done.stderr


def try_version(version: str, folder: Path, root: Path) -> tuple[str, bool]:
    """A row of the table, and whether all went well."""
    if not (folder / "transformers").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        subprocess.run([*pip, f"transformers=={version}"], check=True)
    example = root / "Qwen3MoeForCausalLM-shards"
    out, err = run(folder, str(REPO / "tests" / "support" / "transformers_alone.py"), str(example))
    refused: dict[str, str | None] = json.loads(out)[0] if out.startswith("[") else {"start": err[-500:]}
    loaded = [name for name, error in refused.items() if error is None or "bitsmoe" not in error.replace(str(root), "")]
    out, err = run(folder, "-m", "tools.transformers_versions", "--differences", str(root))
    found: dict[str, float] = json.loads(out) if out.startswith("{") else {}
    wrong = {name: value for name, value in found.items() if not value < BOUND}
    for name in loaded:
        print(f"{version}: {name}: {refused[name]}", file=sys.stderr)
    for name, value in wrong.items():
        print(f"{version}: {name}: logits differ by {value}", file=sys.stderr)
    for line in err.splitlines() if found else [err[-2000:]]:
        if not found or line.startswith("left out: "):
            print(f"{version}: {line}", file=sys.stderr)
    alone = f"{len(refused) - len(loaded)} of {len(refused)} ways refused"
    worst = f"{max(found.values()):.1e}" if found else "fails"
    row = f"| {version} | {alone} | {len(found) - len(wrong)} of {len(found)} right | {worst} |"
    return row, bool(found) and not loaded and not wrong


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    parser.add_argument("--folder", type=Path, default=REPO / "build" / "transformers", help="where they are installed")
    parser.add_argument("--differences", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.differences:
        print(json.dumps(dict(differences(options.differences))))
        return 0
    well = True
    with tempfile.TemporaryDirectory() as root:
        make_checkpoints(Path(root))
        print("| transformers | without bitsmoe | with bitsmoe | largest difference of a logit |\n|---|---|---|---|")
        for version in options.versions:
            row, good = try_version(version, (options.folder / version).resolve(), Path(root))
            print(row, flush=True)
            well &= good
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
