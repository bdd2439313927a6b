"""Kill a quantization with SIGKILL at random moments, resume it, and compare with the run that nobody disturbed.

    python -m benchmarks.resume --kills 20

Every file of the checkpoint must be the same byte for byte, but for report.html, which holds times. Prints one line for
each kill and exits with 1 if any differs.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import child_environment
from offline_quant.checkpoint.directory import PAGE_FILE
from offline_quant.pipeline.resume import state_directory

ROOT = Path(__file__).resolve().parents[1]


def start(model: Path, out: Path, options: list[str], resume: bool) -> "subprocess.Popen[str]":
    """`bitsmoe quantize` in a session of its own, so that its workers can be killed with it."""
    command = [sys.executable, "-m", "offline_quant.cli", "quantize", str(model), "--out", str(out), *options]
    return subprocess.Popen(
        [*command, *(["--resume"] if resume else [])], cwd=ROOT, env=child_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> None:
    """Wait; a run that fails is an error."""
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"status {process.returncode}: {said[-2000:]}")


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to all its processes."""
    if process.poll() is None:
        subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=False)
    process.communicate()


def differences(a: Path, b: Path) -> list[str]:
    """Names of files that are not the same in both."""
    names = {p.name for p in (*a.iterdir(), *b.iterdir())} - {PAGE_FILE}
    return sorted(
        n for n in names
        if not ((a / n).is_file() and (b / n).is_file() and (a / n).read_bytes() == (b / n).read_bytes())
    )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_moe")
    parser.add_argument("--calib", default=str(ROOT / "LICENSE"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", default=[], help="of bitsmoe quantize, after --")
    args = parser.parse_args()
    options = ["--bits", "2.25", "--calib", args.calib, *(args.options or ["--refine", "0", "--calib-samples", "8"])]
    rng, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        began = time.monotonic()
        finish(start(args.model, whole, options, resume=False))
        length = time.monotonic() - began
        print(f"undisturbed: {length:.1f} s")
        for number in range(1, args.kills + 1):
            out = Path(folder) / "killed"
            process = start(args.model, out, options, resume=True)
            at = rng.uniform(0, length)
            try:
                process.wait(at)
            except subprocess.TimeoutExpired:
                kill(process)
            layers = sum(1 for _ in state_directory(out).glob("layer-?????"))
            gone = out.exists() and not state_directory(out).exists()  # killed after all of its work
            ended = process.returncode != -signal.SIGKILL or gone
            if not ended:
                finish(start(args.model, out, options, resume=True))
            wrong = differences(whole, out) + [p.name for p in out.parent.glob(".killed*")]
            failed += bool(wrong)
            when = "it had ended" if ended else f"{layers} layer(s) were finished"
            print(f"kill {number} at {at:.1f} s, {when}: {'differs: ' + ', '.join(wrong) if wrong else 'same bytes'}")
            shutil.rmtree(out)
    print(f"{args.kills - failed} of {args.kills} resumed runs gave the same bytes")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
