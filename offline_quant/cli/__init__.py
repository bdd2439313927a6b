"""Entry point of the `bitsmoe` command. A fault that the user can correct ends with one message and status 2."""

import errno
import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from bitsmoe_kernels.errors import USAGE_STATUS


def main() -> None:
    """Run `bitsmoe`."""
    # OpenMP reads it once, when torch loads. Otherwise torch's threads spin while they wait, and a run on a busy
    # machine takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch reads it before its first tensor. Large models take a twentieth less time with huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        # An exception, so that half-written output is removed.
        received.append(number)
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for a terminal without the bars of the histogram
    try:
        _run()
    except BaseException as e:
        # Any error: the import of a compiled module turns SystemExit into an ImportError.
        if not received:
            raise
        left = "; ".join(getattr(e, "__notes__", ())) or "nothing is left behind"
        sys.stderr.write(f"\nStopped by {signal.Signals(received[0]).name}; {left}\n")
        raise SystemExit(128 + received[0]) from None


def _run() -> None:
    try:
        import torch
        from rich.text import Text

        from bitsmoe_kernels.errors import BitsmoeError
        from offline_quant.cli.commands import app
        from offline_quant.runtime.progress import console
    except ModuleNotFoundError as e:
        if e.name and e.name.partition(".")[0] in ("offline_quant", "bitsmoe_kernels"):
            raise
        sys.stderr.write(f"Error: {e.name} is not installed; run: pip install 'bitsmoe-vllm[quantize]'\n")
        raise SystemExit(USAGE_STATUS) from None
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as e:
        # Commands handle faults of the files they write; this one is of standard output.
        if e.errno != errno.ENOSPC or e.filename:
            raise
        with open(os.devnull, "w") as nowhere:  # takes the rest of the output at exit
            os.dup2(nowhere.fileno(), 1)
        console.print(Text("Error:", "bold red"), f"standard output cannot be written ({e.strerror})")
        raise SystemExit(USAGE_STATUS) from None
    except torch.OutOfMemoryError as e:
        _refuse(
            f"{str(e).partition('. ')[0]}: the GPU is too small; give less calibration text (--calib-samples, "
            "--calib-length), or --device cpu",
            e,
        )
    except BitsmoeError as e:
        _refuse(str(e), e)


def _refuse(fault: str, error: Exception) -> NoReturn:
    from rich.text import Text

    from offline_quant.runtime.progress import console

    console.print(Text("Error:", "bold red"), "\n".join((fault, *getattr(error, "__notes__", ()))), soft_wrap=True)
    raise SystemExit(USAGE_STATUS) from None
