"""llama.cpp's GGUF types with an importance matrix, on every routed expert, by ggml's own quantizer.

What llama-quantize does to the experts, without a GGUF file: it calls the same function for every expert's rows.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.job import Job, Outcome, expert_matrices, main

BITS = (1, 2, 3, 4)
SMALLEST = {1: "IQ1_S", 2: "IQ2_XXS", 3: "IQ3_XXS", 4: "IQ4_XS"}
"""The type taken for each number of bits when none is named."""
SETTINGS: dict[str, Any] = {"type": None, "down_type": None, "batch_size": 8}
"""`type`: of gate and up, and of down where no `down_type` is named; llama.cpp's files of one name mix types."""
SMALL_BLOCKS = {"IQ": "IQ4_NL", "Q2": "Q4_0", "Q3": "Q4_0", "Q4": "Q5_0"}
"""What llama.cpp takes instead where rows do not divide into a type's blocks of 256."""


def bits_of(kind: str) -> int:
    """Bits in a type's name."""
    return int(kind.lstrip("IQ")[0])


class _Traits(ctypes.Structure):
    """The fields of `ggml_type_traits` up to the function that gives weights back."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


class Ggml:
    """The functions used of ggml's library, by their documentation in ggml.h."""

    def __init__(self) -> None:
        import llama_cpp

        self._library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
        self._library.ggml_row_size.restype = ctypes.c_size_t
        self._library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_void_p,
        ]  # fmt: skip
        self._library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
        prefix = "GGML_TYPE_"
        self._types = {k.removeprefix(prefix): v for k, v in vars(llama_cpp).items() if k.startswith(prefix)}

    def type_for(self, name: str, columns: int) -> str:
        """The type llama.cpp takes where one is asked for, for rows of this length.

        Raises:
            ValueError: there is no such type, or none for rows of this length.
        """
        for candidate in (name, SMALL_BLOCKS.get(name[:2])):
            if candidate is None or candidate not in self._types:
                raise ValueError(f"ggml has no type {name!r} for rows of {columns}; there are {', '.join(self._types)}")
            if columns % self._traits(candidate).blck_size == 0:
                return candidate
        raise ValueError(f"rows of {columns} do not divide into the blocks of {name} or of {SMALL_BLOCKS[name[:2]]}")

    def number(self, name: str) -> int:
        """ggml's number for a type."""
        return int(self._types[name])

    def row_bytes(self, name: str, columns: int) -> int:
        """Bytes of a row."""
        return int(self._library.ggml_row_size(self._types[name], columns))

    def round_trip(self, name: str, weight: Tensor, importance: Tensor) -> Tensor:
        """Quantize and give back weights [N, K]; importance [K] of the columns. All float32."""
        rows, columns = weight.shape
        weight, importance = weight.float().contiguous(), importance.float().contiguous()
        packed = ctypes.create_string_buffer(rows * self.row_bytes(name, columns))
        written = self._library.ggml_quantize_chunk(
            self._types[name], weight.data_ptr(), packed, 0, rows, columns, importance.data_ptr()
        )
        assert written == len(packed)
        return self.dequantize(name, torch.frombuffer(packed, dtype=torch.uint8)).view(rows, columns)

    def dequantize(self, name: str, blocks: Tensor) -> Tensor:
        """Weights, float32 [n], of a type's blocks, uint8."""
        traits = self._traits(name)
        back = torch.empty(blocks.nbytes // traits.type_size * traits.blck_size)
        traits.to_float(blocks.data_ptr(), back.data_ptr(), back.numel())
        return back

    def _traits(self, name: str) -> _Traits:
        return self._library.ggml_get_type_traits(self._types[name]).contents


def importance_matrix(model: torch.nn.Module, windows: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Mean squares of what enters every expert's matrices, as llama-imatrix takes them.

    Args:
        model: a transformers model whose experts are one module with tensors of three dimensions.
        windows: token ids, int64 [windows, length].
        batch_size: windows at a time.

    Returns:
        float32 [K] by the name of the matrix [N, K]; ones for an expert that no token called.
    """
    names = {module: name for name, module in model.named_modules() if name.endswith(".mlp.experts")}
    squares: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def add(module: Any, args: tuple[Tensor, ...]) -> None:
        hidden, chosen = args[0].flatten(0, -2), args[1].flatten(0, -2)
        for e in range(len(module.down_proj)):
            x = hidden[(chosen == e).any(-1)]
            gate, up = torch.nn.functional.linear(x, module.gate_up_proj[e]).chunk(2, -1)
            for projections, entering in ((("gate", "up"), x), (("down",), module.act_fn(gate) * up)):
                total = entering.double().square().sum(0)
                for projection in projections:
                    matrix = f"{names[module]}.{e}.{projection}_proj.weight"
                    squares[matrix] = squares.get(matrix, 0) + total
                    calls[matrix] = calls.get(matrix, 0) + len(entering)

    handles = [module.register_forward_pre_hook(add) for module in names]
    with torch.no_grad():
        for batch in windows.split(batch_size):
            model.get_submodule("model")(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {k: (total / calls[k] if calls[k] else torch.ones_like(total)).float() for k, total in squares.items()}


def quantize(job: Job) -> Outcome:
    """Quantize each expert matrix with the importance of its columns."""
    from transformers import AutoModelForCausalLM

    s, ggml = job.settings, Ggml()
    wanted = s["type"] or SMALLEST[job.bits]
    if job.bits != bits_of(wanted):
        raise ValueError(f"type {wanted!r} is not of {job.bits} bits")
    with job.stage("load"):
        weights = expert_matrices(job.model, job.names)
        model = AutoModelForCausalLM.from_pretrained(str(job.model), dtype=torch.float32)
    experts: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    with job.stage("quantize"):
        importance = importance_matrix(model, job.windows, s["batch_size"])
        for name, weight in weights.items():
            asked = s["down_type"] if s["down_type"] and ".down_proj." in name else wanted
            taken = ggml.type_for(asked, weight.shape[1])
            experts[name] = ggml.round_trip(taken, weight, importance[name])
            sizes[taken] = sizes.get(taken, 0) + weight.shape[0] * ggml.row_bytes(taken, weight.shape[1])
    count = sum(w.numel() for w in weights.values())
    parts = " + ".join(f"{size} bytes of {name}" for name, size in sizes.items())
    return Outcome(experts, 8 * sum(sizes.values()) / count, f"8 * ({parts}) / {count}")


if __name__ == "__main__":
    main(quantize, ["llama_cpp_python", "transformers", "torch"])
