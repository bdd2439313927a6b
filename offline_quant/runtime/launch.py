"""Starts the processes that share a quantization, or joins those that `torchrun` has started."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from bitsmoe_kernels.errors import USAGE_STATUS, BitsmoeError
from offline_quant.runtime.distributed import TorchWorkers, Workers, started_as_worker

LEAST_MOST = 2
"""Processes that may always be asked for; more than there are processors only take memory."""
_ADDRESS = "127.0.0.1"
_READY = "BITSMOE_READY"
"""Environment variable: folder where every process says that it is there."""
_PATIENCE = 5.0
"""Seconds that processes get to end by themselves."""


@contextmanager
def launch_workers(count: int) -> Iterator[Workers]:
    """The workers this process belongs to.

    Under `torchrun` (several hosts, say) every process runs the same command and finds the others through the
    environment. Otherwise the command is run `count` - 1 times more on this machine; this process is the first.

    Args:
        count: how many processes; 1 under `torchrun`.

    Raises:
        BitsmoeError: another process ended; says what it said. Or `count` under `torchrun`.
    """
    if started_as_worker():
        if folder := os.environ.get(_READY):
            Path(folder, os.environ["RANK"]).touch()
        elif count > 1:
            raise BitsmoeError(
                f"--workers {count}: this is one of {os.environ['WORLD_SIZE']} processes that torchrun has started; "
                "leave --workers out"
            )
        yield TorchWorkers()
        return
    if count == 1:
        yield Workers()
        return
    if count > (most := max(LEAST_MOST, os.cpu_count() or 1)):
        raise BitsmoeError(f"--workers {count}: this machine has {os.cpu_count()} processors; use at most {most}")
    with socket.socket() as probe:
        probe.bind((_ADDRESS, 0))
        port = probe.getsockname()[1]
    # On one machine they talk over the loopback interface, whatever the host's name resolves to.
    common = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": _ADDRESS, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "RANK": "0", "LOCAL_RANK": "0",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as ready, ExitStack() as files:
        said = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(1, count)]
        others = [_start(rank, {**common, _READY: ready}, file) for rank, file in enumerate(said, 1)]
        before = {name: os.environ.get(name) for name in common}
        os.environ.update(common)
        try:
            # torch.distributed would wait for hours for one that never comes.
            while len(os.listdir(ready)) < len(others):
                if any(process.poll() for process in others):
                    raise RuntimeError("a worker ended before it began")
                time.sleep(0.05)
            yield TorchWorkers()
        except RuntimeError as e:  # what torch.distributed raises when the other end is gone
            raise _explained(e, others, said) from None
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            _end(others)


def _start(rank: int, common: dict[str, str], said: IO[str]) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    command = [sys.executable, "-m", "offline_quant.cli", *sys.argv[1:]]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)


def _wait(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Wait until all have ended, but not for long."""
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, deadline - time.monotonic()))


def _end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """End processes that still run. One that waits for the others hears no signal but SIGKILL."""
    for process in processes:
        process.terminate()
    _wait(processes)
    for process in processes:
        process.kill()
        process.wait()


def _explained(error: RuntimeError, others: "Sequence[subprocess.Popen[bytes]]", said: Sequence[IO[str]]) -> Exception:
    """The error of a process that ended, where one did: of several that of the one that ended first, probably.

    One that was killed, or refused something, did not end because another one was gone.
    """
    _wait(others)
    ended = [(rank, process.returncode) for rank, process in enumerate(others, 1) if process.returncode]
    if not ended:
        return error
    rank, status = min(ended, key=lambda end: (end[1] > 0, end[1] != USAGE_STATUS))
    said[rank - 1].seek(0)
    lines = [line for line in said[rank - 1].read().splitlines() if line.strip()]
    found = BitsmoeError(f"worker {rank} ended with status {status}: " + "\n".join(lines[-5:]))
    for note in getattr(error, "__notes__", ()):
        found.add_note(note)
    return found
