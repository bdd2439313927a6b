"""What a large calibration text takes: memory, predicted and measured, and the time to read and tokenize it.

    python -m benchmarks.calibration_text [--megabytes 100]

Each row is a process of its own that quantizes the demo model, on a file of this repository's documents, repeated in
random order.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import ROOT, child_environment, commit

ASKED = ((8, 64), (64, 64), (64, 512), (128, 512))
"""Windows, and tokens in each."""
_ONE = """
import json, sys
import bitsmoe
model, text, out, samples, length = sys.argv[1:]
result = bitsmoe.quantize(
    model, out, bits=2.25, calib=text, calib_samples=int(samples), calib_length=int(length), refine=0
)
print(json.dumps([result.memory.peak, max(result.peak_bytes.values()), result.seconds["calibration text"]]))
"""


def write_text(path: Path, size: int) -> None:
    """Paragraphs of the repository's documents with one word in eight replaced, up to `size` bytes."""
    draw = random.Random(0)
    paragraphs = [p for d in sorted(ROOT.glob("docs/**/*.md")) for p in d.read_text(encoding="utf-8").split("\n\n")]
    words = [word for p in paragraphs for word in p.split()]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            mixed = (draw.choice(words) if draw.random() < 0.125 else word for word in draw.choice(paragraphs).split())
            written += len(f"{(line := ' '.join(mixed))}\n\n".encode())
            file.write(f"{line}\n\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="size of the text")
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_moe")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, int(args.megabytes * 1e6))
        print(f"{args.model.name}, {text.stat().st_size / 1e6:.0f} MB of text, commit {commit()}\n")
        print("| tokens asked for | predicted, MB | peak, MB | peak over predicted | reading and tokenizing, s |")
        print("|---|---|---|---|---|")
        for samples, length in ASKED:
            out = str(Path(folder) / f"quantized-{samples}-{length}")
            done = subprocess.run(
                [sys.executable, "-c", _ONE, str(args.model), str(text), out, str(samples), str(length)],
                env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
            )  # fmt: skip
            predicted, peak, seconds = json.loads(done.stdout)
            print(
                f"| {samples * length:,} | {predicted / 1e6:.0f} | {peak / 1e6:.0f} | {peak / predicted - 1:+.1%} | "
                f"{seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
