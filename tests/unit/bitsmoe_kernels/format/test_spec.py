"""SPEC.md against the code: the worked example, the tables, the reserved names, all parsed from the file."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from bitsmoe_kernels import format as format_package
from bitsmoe_kernels.format.checkpoint import WEIGHTS_KEY, WEIGHTS_NOTE
from bitsmoe_kernels.format.packing import pack_codes, unpack_codes
from bitsmoe_kernels.format.schema import (
    FORMAT_VERSION,
    PARTS,
    PROJECTION_NAMES,
    Basis,
    CheckpointConfig,
    Layer,
    Projection,
)
from bitsmoe_kernels.reference import ProjectionWeights
from bruteforce import codes_and_bits, matrices
from builders import FORMS, build_form

SPEC = (Path(format_package.__file__).parent / "SPEC.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The one fenced block of this language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", SPEC, re.M | re.S)
    assert len(found) == 1, language
    return found[0]


def table(after: str) -> list[list[str]]:
    """Rows of the first table after a heading or sentence."""
    lines = SPEC[SPEC.index(after) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [C, F] and block bits of the worked example."""
    numbers = re.search(r"G = 16, C = (\d+), F = (\d+), block bits (\d+) and (\d+)", SPEC)
    assert numbers
    C, F, *bits = map(int, numbers.groups())
    columns = [re.findall(r"\d+", line.split(":")[1]) for line in block("codes").splitlines()]
    codes = torch.tensor([[int(q) for q in column] for column in columns], dtype=torch.uint8).T.contiguous()
    assert codes.shape == (C, F)
    return codes, torch.tensor(bits, dtype=torch.uint8)


def spec_words() -> list[list[int]]:
    return [[int(word, 16) for word in line.split()] for line in block("words").splitlines()]


def test_worked_words() -> None:
    codes, bits = example()
    words = pack_codes(codes, bits, 16)
    assert [[word % 2**16 for word in row] for row in words.tolist()] == spec_words()
    assert torch.equal(unpack_codes(words, bits, len(codes), 16), codes)


def test_worked_words_bit_by_bit() -> None:
    codes, bits = example()
    read, _ = codes_and_bits(spec_words(), [bits.tolist()], len(codes), 16)
    assert read[0].tolist() == codes.tolist()


def test_worked_bytes(tmp_path: Path) -> None:
    codes, bits = example()
    save_file({"codes": pack_codes(codes, bits, 16)}, tmp_path / "model.safetensors")
    raw = bytes.fromhex(block("bytes"))
    assert (tmp_path / "model.safetensors").read_bytes().endswith(raw)
    assert len(raw) == 2 * int(bits.sum()) * codes.shape[1]
    assert np.frombuffer(raw, "<u2").reshape(-1, codes.shape[1]).tolist() == spec_words()


def test_worked_values() -> None:
    codes, bits = example()
    C, F = codes.shape
    s, t = torch.zeros(1, C), torch.zeros(1, F)
    wanted = {}
    for line in block("values").splitlines():
        v = dict(re.findall(r"(\w)=(\S+)", line))
        f, i = int(v["f"]), int(v["i"])
        s[0, i], t[0, f], wanted[i, f] = float(v["s"]), float(v["t"]), float(v["M"])
    assert len(wanted) >= 5
    # The example as the down projection of a layer with C intermediate channels.
    nothing = Projection(code_rows=0)
    layer = Layer(
        num_experts=1,
        hidden_size=F,
        intermediate_size=C,
        projections={"gate_up": nothing, "down": Projection(code_rows=int(bits.sum()))},
    )
    tensors = {
        "down_codes": pack_codes(codes, bits, 16),
        "down_bits": bits[None],
        "down_component_scale": s.half(),
        "down_feature_scale": t.half(),
    }
    m = ProjectionWeights(layer, "down", 16, tensors).matrix(0)
    brute = matrices(layer.model_dump(mode="json"), "down", 16, tensors)[0]
    for at, value in wanted.items():
        assert m[at] == value
        assert brute[at] == value


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("## 3. `quantization_config`", CheckpointConfig),
        ("A *layer*:", Layer),
        ("A *projection*:", Projection),
        ("A *basis*:", Basis),
    ],
)
def test_key_tables(heading: str, model: type[BaseModel]) -> None:
    rows = table(heading)
    assert [row[0].strip("`") for row in rows] == list(model.model_fields)
    assert [row[3] == "" for row in rows] == [field.is_required() for field in model.model_fields.values()]


def test_tensor_table() -> None:
    assert tuple(row[0].strip("`") for row in table("## 4. Tensors")) == PARTS


def test_version() -> None:
    assert f"# The bitsmoe checkpoint format, version {FORMAT_VERSION}\n" in SPEC


def test_the_note_for_transformers() -> None:
    assert block("transformers-weights") == f"{WEIGHTS_NOTE}\n"
    assert f"`{WEIGHTS_KEY}`" in SPEC


def test_no_tensor_name_is_reserved() -> None:
    words, endings = block("reserved").split(), tuple(block("reserved-endings").split())
    prefix = "model.layers.0.mlp.experts"
    names = {f"{prefix}.{projection}_{part}" for projection in PROJECTION_NAMES for part in PARTS}
    for form in FORMS:
        # The loop above must not miss a name that the schema makes.
        assert {f"{prefix}.{name}" for name in build_form(form).tensors} <= names
    for name in names:
        assert not [word for word in words if word in name]
        assert not name.endswith(endings)
