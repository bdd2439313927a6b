"""vLLM in processes that live as long as a test module or session: its import costs more than most tests."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GENERATE = """
import json, os, signal, sys, traceback
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # vLLM writes to standard output
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.platforms import current_platform

class OneGroup:
    # vLLM's router for CPUs refuses sigmoid scores without groups, and leaves out the bias of softmax. One group of all
    # experts is the same function. Only models that are not quantized need it: the plugin routes for the others.
    compute, quantized = CPURouter._compute_routing, False

    def routing(self, *args, **kwargs):
        biased = self.e_score_correction_bias is not None
        if not self.use_grouped_topk and self.custom_routing_function is None and not OneGroup.quantized and (
            self.scoring_func == "sigmoid" or (self.scoring_func == "softmax" and biased)
        ):
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1
            self.routed_scaling_factor = self.routed_scaling_factor if biased else 1.0
        return OneGroup.compute(self, *args, **kwargs)

CPURouter._compute_routing = OneGroup.routing

# vLLM refuses experts without a gate on CPUs for every method, whatever computes them.
refusing = FusedMoEConfig.__post_init__

def checked(self):
    try:
        refusing(self)
    except NotImplementedError as e:
        assert "is_act_and_mul=False" in str(e)

FusedMoEConfig.__post_init__ = checked

# vLLM registers its kernels for CPUs with every engine, and looks for their names in all modules. It fails over those
# of numba, which models with images import. Once is enough, before they do.
current_platform.register_triton_kernel_overrides()
type(current_platform).register_triton_kernel_overrides = lambda *_: None

def generate(model, dtype, prompts, tokens, architectures, reload, options):
    # As it is, vLLM looks at a model's class in one more process, which imports everything again.
    config = json.load(open(model + "/config.json"))
    OneGroup.quantized = "quantization_config" in config
    for name in [*config["architectures"], *architectures]:
        if name in ModelRegistry.models:  # others run on its Transformers backend
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=1, enable_prefix_caching=False,
              disable_log_stats=False, **options)
    if reload:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": reload})
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=2, detokenize=False)
    steps = []
    for prompt in prompts:  # one after another: batched together they are summed in another order
        prompt = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        found = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
        steps.append([[token, top[token].logprob, *sorted((v.logprob for v in top.values()), reverse=True)[:2]]
                      for token, top in zip(found.token_ids, found.logprobs)])
    counts = {metric.name: metric.value for metric in llm.get_metrics() if "spec_decode" in metric.name
              and hasattr(metric, "value")}
    return {"steps": steps, "counts": counts}

for line in sys.stdin:
    signal.alarm(600)
    try:
        answer = generate(**json.loads(line))
    except Exception:
        answer = {"error": traceback.format_exc()}
    print(json.dumps(answer), file=answers)
"""


@dataclass(frozen=True)
class Step:
    """One greedily generated token, its log-probability, and how far the second best lies below the best."""

    token: int
    logprob: float
    margin: float


Completions = list[list[Step]]


class Generator:
    """Greedy completions by vLLM's own LLM class on one rank, eager: one model after another in one process.

    Args:
        log: file for what vLLM writes.
        cache: where vLLM keeps what it finds out about models.
    """

    def __init__(self, log: Path, cache: Path):
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CACHE_ROOT": str(cache),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        self.log = log
        self.counts: dict[str, float] = {}
        """vLLM's counts about drafted tokens, of the last call."""
        self._start = [sys.executable, "-c", _GENERATE], os.environ | environment
        self._process: subprocess.Popen[str] | None = None

    def __call__(
        self,
        model: Path,
        prompts: Sequence[str | list[int]],
        tokens: int,
        dtype: str = "float32",
        *,
        architectures: Sequence[str] = (),
        reload: Path | None = None,
        **options: Any,
    ) -> Completions:
        """Completions of all prompts, `tokens` long; RuntimeError if vLLM fails.

        Args:
            model: a checkpoint.
            prompts: texts, or token ids.
            tokens: to generate for each.
            dtype: of the computation.
            architectures: that vLLM needs beside those of config.json.
            reload: checkpoint from which the loaded model takes new weights first.
            options: of the LLM class.
        """
        if self._process is None or self._process.poll() is not None:
            command, environment = self._start
            with self.log.open("ab") as output:
                self._process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True
                )
        assert self._process.stdin
        assert self._process.stdout
        job = {
            "model": str(model), "dtype": dtype, "prompts": list(prompts), "tokens": tokens, "options": options,
            "architectures": list(architectures), "reload": str(reload) if reload else None,
        }  # fmt: skip
        print(json.dumps(job), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"vLLM died over {model}:\n{self.log.read_text(errors='replace')[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"vLLM failed on {model}:\n{answer['error']}")
        self.counts = answer["counts"]
        completions = [[Step(t, own, best - second) for t, own, best, second in made] for made in answer["steps"]]
        assert [len(made) for made in completions] == [tokens] * len(prompts)
        return completions

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


_FORK = """
import json, os, signal, sys
import {module}
answers = os.fdopen(os.dup(1), "w", buffering=1)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)
else:
    sys.exit()
signal.alarm(300)
answers.close()
for number, file in enumerate((os.devnull, job["stdout"], job["stderr"])):
    os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
os.environ |= job["environment"]
sys.argv = job["argv"]
exec(job["code"], {{"__name__": "__main__"}})
"""


class Forks:
    """Runs programs in forks of one process that has imported a module: fresh interpreters, but for that import."""

    def __init__(self, module: str):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORK.format(module=module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, code: str, argv: Sequence[str] = ("-c",), environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `code` as the main program; its output and exit status, negative for a signal."""
        assert self._process.stdin
        assert self._process.stdout
        with tempfile.TemporaryDirectory() as directory:
            files = {name: str(Path(directory) / name) for name in ("stdout", "stderr")}
            job: dict[str, Any] = {"code": code, "argv": list(argv), "environment": environment or {}, **files}
            print(json.dumps(job), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            out, err = (Path(file).read_text(encoding="utf-8") for file in files.values())
        return subprocess.CompletedProcess(argv, status, out, err)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@contextlib.contextmanager
def forks(module: str) -> Iterator[Forks]:
    """A `Forks` that is closed at the end."""
    made = Forks(module)
    try:
        yield made
    finally:
        made.close()
