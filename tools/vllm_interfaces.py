"""Whether a vLLM has the interfaces that the plugin uses, from an unpacked wheel and without a GPU.

    pip download --no-deps -d wheels vllm==0.33.0 && unzip -q wheels/vllm-0.33.0-*.whl -d unpacked
    python -m tools.vllm_interfaces unpacked

Needs what vLLM imports (an environment with another vLLM has it), not its compiled parts. Exit status 1 where
something does not match.
"""

import argparse
import importlib
import sys
from pathlib import Path


def main() -> int:
    """Print the version, and each interface that does not match."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="unpacked wheel, which holds a folder vllm")
    directory = parser.parse_args().directory.resolve()
    if not (directory / "vllm").is_dir():
        parser.error(f"{directory} holds no folder vllm")
    sys.path.insert(0, str(directory))
    vllm = importlib.import_module("vllm")
    # Only now, as the plugin imports vLLM.
    import bitsmoe_vllm
    from bitsmoe_vllm import _compat

    def own_classes() -> tuple[type, ...]:
        from bitsmoe_vllm import config

        return config.own_classes()

    bitsmoe_vllm.register()
    faults = _compat.interface_faults(own_classes)
    print(f"vLLM {vllm.__version__} of {vllm.__file__}: {'all interfaces match' if not faults else ''}")
    print(*faults, sep="\n", end="\n" if faults else "")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
