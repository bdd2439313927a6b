"""The tests that need no GPU, and the types, in groups with a process of their own. `make test` runs it.

    python -m tools.all_tests [--jobs N]

Some groups run side by side, with one thread each. A process that is done takes the next group, so all end at about the
same time. What a group prints is shown when it ends. Exits with 1 if anything fails, and names it at the end.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "tests/unit/bitsmoe_kernels"
FAMILIES = "tests/integration/test_families.py"
QUANTIZER = ("tests/unit/offline_quant",)
SLOW_KERNELS = (
    f"{KERNELS}/_triton",
    *(f"{KERNELS}/backends/test_{name}.py" for name in ("triton_moe", "machine_code", "cpu_sanitizers", "cpu_moe")),
)
PLUGIN = ("tests/unit/bitsmoe_vllm", "tests/unit/benchmarks")
GROUPS: Mapping[str, Sequence[str]] = {
    "quantizer": QUANTIZER,
    "serving": ("tests/integration", f"--ignore={FAMILIES}"),
    "kernels": SLOW_KERNELS,
    "families": (FAMILIES,),
    "all else": ("tests/unit", *(f"--ignore={path}" for path in (*QUANTIZER, *SLOW_KERNELS, *PLUGIN))),
    "plugin and benchmarks": PLUGIN,
    "machine code": ("tests/ptx",),  # compiles the kernels that others interpret, so it needs a process of its own
}
"""What pytest is given for each group: first those that take longest."""


def run_all(commands: Mapping[str, Sequence[str]], jobs: int) -> list[str]:
    """Run commands, some side by side, each with one thread; returns the names of those that failed.

    None of them needs the Hugging Face Hub, and waiting for one that is not there takes minutes.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(name: str) -> tuple[str, int, str, float]:
        started = time.monotonic()
        done = subprocess.run(
            commands[name],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        return name, done.returncode, done.stdout, time.monotonic() - started

    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(run, name) for name in commands]):
                name, status, printed, seconds = future.result()
                print(f"{printed}\n##### {name}: {'failed' if status else 'passed'} in {seconds:.0f} s", flush=True)
                if status:
                    failed.append(name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes side by side; 2 without it")
    jobs = parser.parse_args().jobs
    commands = {name: [sys.executable, "-m", "pytest", *given] for name, given in GROUPS.items()}
    print(f"{len(commands) + 1} groups of tests, {jobs} at a time; each is shown when it ends", flush=True)
    failed = run_all(commands | {"types": [sys.executable, "-m", "mypy"]}, jobs)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
