"""Run `vllm serve` as a subprocess on a loopback port: used by the demo and by the integration tests."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVED_NAME = "model"
_TAIL = 40


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    """http://127.0.0.1:PORT"""
    log: Path
    """What the server wrote to stdout and stderr."""
    session: int
    """That all of its processes belong to."""

    def resident_bytes(self) -> int:
        """Memory that its processes hold together; what they share counts once. Linux only."""
        found = 0
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # one that ends meanwhile
                if os.getsid(int(process.name)) == self.session:
                    rollup = (process / "smaps_rollup").read_text()
                    found += 1024 * int(rollup.split("\nPss:")[1].split()[0])
        return found

    def complete(self, prompt: str, max_tokens: int, **options: Any) -> dict[str, Any]:
        """One greedy completion by POST /v1/completions.

        Args:
            prompt: the text to continue.
            max_tokens: tokens to generate.
            **options: further fields of the request.

        Returns:
            The first choice of the answer: `text`, `logprobs`, ...
        """
        body = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            choice: dict[str, Any] = json.load(answer)["choices"][0]
        return choice


def command(model: Path, *options: str) -> list[str]:
    """The `vllm serve` command line, with the `vllm` of the running interpreter's environment."""
    return [str(Path(sys.executable).with_name("vllm")), "serve", str(model), *options]


def environment(ranks: int = 1) -> dict[str, str]:
    """Environment for vLLM on a CPU; what the caller has set already wins.

    Args:
        ranks: worker processes, which share the cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        # GiB; without it vLLM asks for 92% of the machine's memory.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # vLLM binds one worker to each NUMA node, and refuses two on a machine with one.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # One core is left to the processes that only schedule and answer, as vLLM itself does when it binds.
        "OMP_NUM_THREADS": str(max(1, (cores - 1) // ranks)),
        # Workers talk through the loopback device, whatever the machine's name resolves to.
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {**defaults, **os.environ}


@contextlib.contextmanager
def serve(
    model: Path, *options: str, log: Path, ranks: int = 1, cache: Path | None = None, timeout_s: float = 300
) -> Iterator[Server]:
    """Start a server, wait until it is healthy, and stop it and all its processes at the end.

    Args:
        model: a checkpoint directory.
        *options: of `vllm serve`, as on the command line.
        log: file for the server's output; its directory is made.
        ranks: worker processes the options ask for.
        cache: where vLLM keeps compiled code; None: its default.
        timeout_s: seconds it may take to become healthy.

    Raises:
        RuntimeError: it ended or did not become healthy; holds the log's last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    argv = command(model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME, *options)
    env = environment(ranks) | ({"VLLM_CACHE_ROOT": str(cache)} if cache else {})
    with log.open("wb") as output:
        # A session of its own, so that its workers can be found and ended with it.
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        server = Server(f"http://127.0.0.1:{port}", log, process.pid)
        _wait_until_healthy(server, process, timeout_s)
        yield server
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended with status {process.returncode}:\n{_tail(server.log)}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"vllm serve was not healthy after {timeout_s:.0f} s:\n{_tail(server.log)}")
        time.sleep(0.5)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"... {log}:", *lines[-_TAIL:]])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then end whatever is left of its session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
