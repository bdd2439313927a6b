"""The kernels compiled ahead of time for GPUs nobody needs to have: what their main loops cost, held to exact limits.

In a process of its own, with Triton's interpreter off.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import triton

from benchmarks.kernels.machine_code import overwritten
from bitsmoe_kernels.backends.launch_config import DECODE, PREFILL, TILES
from builders import REPO

pytestmark = pytest.mark.slow

_MEASURED = {
    ("float16", 1): (0.83, 1.08),
    ("float16", 2): (0.85, 1.13),
    ("float16", 3): (1.08, 1.43),
    ("float16", 4): (0.99, 1.26),
    ("bfloat16", 1): (0.72, 0.97),
    ("bfloat16", 2): (0.74, 1.03),
    ("bfloat16", 3): (1.08, 1.43),
    ("bfloat16", 4): (0.99, 1.26),
}
LIMITS = {"3.6.0": _MEASURED, "3.7.1": _MEASURED}
"""By Triton's version, which brings its assembler, and (activations, bits): most instructions per weight on sm_90 at
the smallest tile that fills a GPU, arithmetic ones and all; what was measured, rounded up. Both versions give the same.
Issue 4 asks for 1.0 and 1.4 at 2 bits, 1.7 and 2.2 at 3, 1.2 and 1.8 at 4."""


def limits_of(version: str) -> dict[tuple[str, int], tuple[float, float]]:
    if version not in LIMITS:
        pytest.fail(
            f"no limits of machine code for Triton {version}, but for {' and '.join(LIMITS)}: "
            "measure them with `python -m benchmarks.kernels --machine-code` and add them to LIMITS"
        )
    return LIMITS[version]


def measured(code: str) -> Any:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, env=env, timeout=1200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def hopper() -> list[dict[str, Any]]:
    """Rows of the smallest tile that fills a GPU, on sm_90."""
    return measured(
        "import json; from benchmarks.kernels.machine_code import TILES, tile_rows\n"
        f"tile = TILES[90][{DECODE!r}][1]\n"
        f"found = [r.as_dict() for fp16 in (True, False) for r in tile_rows(90, fp16, {DECODE!r}, tile)]\n"
        "print(json.dumps(found))"
    )


def test_a_version_without_limits_says_so() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"no limits of machine code for Triton 9\.9\.9, but for 3\.6\.0"):
        limits_of("9.9.9")


@pytest.mark.parametrize(("dtype", "bits"), LIMITS["3.6.0"])
def test_instructions_per_weight(dtype: str, bits: int, hopper: list[dict[str, Any]]) -> None:
    tile = TILES[90][DECODE][1]
    at = {"gate_up": tile.gate_up, "down": tile.outputs}
    found = [r for r in hopper if (r["dtype"], r["bits"]) == (dtype, bits)]
    assert [(r["kernel"], r["outputs"]) for r in found] == list(at.items())
    alu, everything = limits_of(triton.__version__)[dtype, bits]
    for row in found:
        # At least two codes come out of one instruction, and there are 16 weights for each matrix instruction.
        assert 0.5 <= row["alu_per_weight"] <= alu, row
        assert row["alu_per_weight"] < row["instructions_per_weight"] <= everything, row
        assert row["i2f"] == 0
        assert row["spill_bytes"] == 0


def test_registers_written_before_their_product_ends_are_found() -> None:
    """A loop with two groups of products, each waited for once the next one has begun."""
    loop = [".L_x_1:", "LDSM.16.M88.4 R4, [R2] ;", "HGMMA.64x16x16.F32 R32, R4, gdesc[UR8], R32, gsb0 ;",
            "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;", "LOP3.LUT R{}, R1, 0x3, R2, 0xea, !PT ;",
            "HGMMA.64x16x16.F32 R32, R8, gdesc[UR8], R32, gsb0 ;", "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
            "@P1 BRA `(.L_x_1) ;"]  # fmt: skip

    def faults(register: int) -> list[str]:
        code = [line if line.startswith(".") else f"        /*{i:04x}*/  {line}" for i, line in enumerate(loop)]
        return overwritten([line.format(register) for line in code])

    assert faults(8) == faults(3) == []
    assert [text[:12] for text in faults(7)] == ["LOP3.LUT R7,"] * 2
    loop[-2] = loop[-2].replace("0x1", "0x2")
    assert [text[:8] for text in faults(3)] == ["LDSM.16."]
    loop[3] = loop[3].replace("0x1", "0x2")
    assert any(text.startswith("LOP3") for text in faults(8))


@pytest.mark.parametrize("capability", [pytest.param(c, marks=[] if c == 90 else [pytest.mark.nightly]) for c in TILES])
def test_every_tile_compiles_without_spills(capability: int) -> None:
    """All widths in one kernel, as layers have them, and the kernels around it; both types of activations.

    Each of the two types with one of the rarer functions, the last of which has biases, and without a gate.
    """
    found = measured(
        "import json; from benchmarks.kernels.machine_code import *\n"
        "from bitsmoe_kernels.expert_mlp import ACTIVATION_NUMBERS\n"
        "out = []\n"
        "for fp16 in (True, False):\n"
        f"    for regime, tiles in TILES[{capability}].items():\n"
        "        for tile in tiles:\n"
        "            for act in (0, 1 if fp16 else 2, ACTIVATION_NUMBERS['relu2']) if tile is tiles[0] else (0,):\n"
        f"                for name, kernel in gemm_kernels({capability}, tile, fp16, 15, act, bias=act == 2):\n"
        "                    early = overwritten(machine_code(kernel))\n"
        "                    out.append([name, regime, tile.tokens, resources(kernel), early])\n"
        f"    for name, kernel in other_kernels({capability}, fp16):\n"
        "        out.append([name, '', 0, resources(kernel), overwritten(machine_code(kernel))])\n"
        "print(json.dumps(out))"
    )
    regimes = {(name, regime, tokens) for name, regime, tokens, *_ in found}
    for regime in (DECODE, PREFILL):
        for tile in TILES[capability][regime]:
            assert {("gate_up", regime, tile.tokens), ("down", regime, tile.tokens)} <= regimes
    for name, regime, tokens, used, early in found:
        assert early == [], (name, regime, tokens)
        assert used["spill_bytes"] == 0, (name, regime, tokens, used)
        assert used["shared_bytes"] <= 99 * 1024  # what a program may have on the smallest of them, sm_86 and sm_120


@pytest.mark.parametrize(
    ("sizes", "act"),
    [
        ((2880, 2880, 32, 4), "swigluoai"),  # gpt-oss-20b
        ((2816, 704, 128, 8), "gelu_pytorch_tanh"),  # Gemma 4
        pytest.param((2688, 1856, 128, 6), "relu2", marks=pytest.mark.nightly),  # Nemotron-3 Nano
        ((2560, 640, 512, 22), "relu2"),  # the expert counts of Nemotron-3 Super
        pytest.param((3584, 640, 896, 16), "silu", marks=pytest.mark.nightly),  # those of Kimi-K3
    ],
    ids=str,
)
def test_layers_of_other_sizes_compile_without_spills(sizes: tuple[int, ...], act: str) -> None:
    """Rows that no tile divides, more experts, more of them for a token: what the kernels are specialized for."""
    found = measured(
        "import json; from benchmarks.kernels.machine_code import *\n"
        "from bitsmoe_kernels.expert_mlp import ACTIVATION_NUMBERS\n"
        f"sizes, act = LayerSizes(*{sizes}), ACTIVATION_NUMBERS[{act!r}]\n"
        "tiles = TILES[90][DECODE][:2]\n"
        "made = [k for tile in tiles for k in gemm_kernels(90, tile, False, 15, act, act == 2, sizes)]\n"
        "made += [k for k in other_kernels(90, False, sizes) if k[0].startswith('begin for 16 tokens')]\n"
        "print(json.dumps([[name, resources(k), overwritten(machine_code(k))] for name, k in made]))"
    )
    assert [name.split(",")[0] for name, *_ in found].count("down") == 2
    for name, used, early in found:
        assert early == [], name
        assert used["spill_bytes"] == 0, (name, used)


@pytest.mark.parametrize("capability", [80, 90])
def test_rows_of_the_quantizer_stay_in_registers(capability: int) -> None:
    """A row is searched for its scale where it lies. Rows of 7,168 values in four starts are too many for registers."""
    found = measured(
        "import json; from benchmarks.kernels.machine_code import *\n"
        f"print(json.dumps([[name, resources(kernel)] for name, kernel in rounding_kernels({capability})]))"
    )
    assert len(found) == 2 * 2 * 3
    for name, used in found:
        assert used["spill_bytes"] <= (600 if "rows of 7168" in name else 8), (name, used)
        assert used["shared_bytes"] <= 256, (name, used)  # sums over columns
