"""Load a bitsmoe checkpoint in a process that has transformers and nothing of this project, in every usual way.

    python tests/transformers_alone.py DIRECTORY...

Prints a JSON list with an object for each directory: a way to load it -> the error's message, or null where something
was loaded. Imports no module of this project, and sees to it that transformers cannot either.
"""

import importlib.abc
import json
import sys
from typing import Any

OURS = {"bitsmoe", "bitsmoe_kernels", "bitsmoe_vllm", "offline_quant"}


class _NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"{fullname} is not to be imported here")


def attempts(directory: str) -> dict[str, str | None]:
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        pipeline,
    )
    from transformers.utils import is_accelerate_available

    # What only reads config.json and the tokenizer goes on working.
    assert AutoConfig.from_pretrained(directory).quantization_config["quant_method"] == "bitsmoe"
    assert AutoTokenizer.from_pretrained(directory)("The sea")["input_ids"]

    def causal(**options: Any) -> Any:
        return lambda: AutoModelForCausalLM.from_pretrained(directory, **options)

    def without_quantization_config() -> Any:  # as transformers' warning advises
        config = AutoConfig.from_pretrained(directory)
        del config.quantization_config
        return AutoModelForCausalLM.from_pretrained(directory, config=config)

    ways = {
        "AutoModelForCausalLM": causal(),
        "AutoModel": lambda: AutoModel.from_pretrained(directory),
        "AutoModelForSequenceClassification": lambda: AutoModelForSequenceClassification.from_pretrained(directory),
        "pipeline": lambda: pipeline("text-generation", model=directory),
        "dtype": causal(dtype=torch.float32),
        "use_safetensors": causal(use_safetensors=True),
        "no use_safetensors": causal(use_safetensors=False),
        "ignore_mismatched_sizes": causal(ignore_mismatched_sizes=True),
        "low_cpu_mem_usage": causal(low_cpu_mem_usage=True),
        "trust_remote_code": causal(trust_remote_code=True),
        "experts_implementation": causal(experts_implementation="eager"),
        "without quantization_config": without_quantization_config,
    }
    if is_accelerate_available():
        ways |= {"device_map": causal(device_map="auto"), "on the CPU": causal(device_map="cpu")}
    errors: dict[str, str | None] = {}
    for name, load in ways.items():
        try:
            load()
            errors[name] = None
        except Exception as e:
            errors[name] = f"{type(e).__name__}: {e}"
    return errors


if __name__ == "__main__":
    sys.meta_path.insert(0, _NotInstalled())
    found = [attempts(directory) for directory in sys.argv[1:]]
    assert not OURS & {name.partition(".")[0] for name in sys.modules}
    print(json.dumps(found))
