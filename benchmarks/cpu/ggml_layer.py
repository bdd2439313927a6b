"""The routed experts of llama.cpp, by ggml from llama-cpp-python; runs in the environment `gguf` of `baselines`.

Reads one JSON object a line, answers with one (`llama` is the other end). A graph holds what llama.cpp builds for a
layer between router and residual sum (`build_moe_ffn` of its llama-graph.cpp): up and gate by `ggml_mul_mat_id`,
`ggml_swiglu_split`, down, the weighted sum over a token's experts. Attention, norms and router are not part of it.
Weights lie in the buffer that llama.cpp chooses (`select_weight_buft` of its llama-model-loader.cpp), in which ggml
rearranges the types that it has other code for.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.gguf import Ggml
from benchmarks.cpu.rounds import CHECKED_TOKENS, SMALL_EXPERTS, Call, small_shape
from benchmarks.kernels.experts import reference, relative_error
from benchmarks.kernels.routing import UNIFORM, route
from benchmarks.kernels.shapes import Shape

SCALES = {"Q2_K": (80, 82), "Q4_K": (0, 2), "IQ2_XXS": (0,), "IQ2_S": (0,)}
"""Types, and where the float16 numbers are in a block of 256 weights; any other bytes of it are valid."""
LIMIT = 5e-2
"""Relative error allowed: ggml rounds activations to 8 bits with one scale for 256."""
CPU_DEVICE, F32, I32 = 0, 0, 26
BUFFER_AT = 8
"""Where `struct ggml_tensor` points to its buffer."""


class _InitParams(Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def _library() -> ctypes.CDLL:
    """ggml, with the signatures of ggml.h, ggml-backend.h and ggml-alloc.h."""
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml.so"))
    pointers = {
        "ggml_init": [_InitParams],
        "ggml_new_tensor_2d": [c_void_p, c_int, c_int64, c_int64],
        "ggml_new_tensor_3d": [c_void_p, c_int, c_int64, c_int64, c_int64],
        "ggml_mul_mat_id": [c_void_p] * 4,
        "ggml_swiglu_split": [c_void_p] * 3,
        "ggml_mul": [c_void_p] * 3,
        "ggml_add": [c_void_p] * 3,
        "ggml_view_2d": [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t],
        "ggml_new_graph_custom": [c_void_p, c_size_t, c_bool],
        "ggml_gallocr_new": [c_void_p],
        "ggml_backend_dev_by_type": [c_int],
        "ggml_backend_dev_init": [c_void_p, c_char_p],
        "ggml_backend_dev_backend_reg": [c_void_p],
        "ggml_backend_dev_buffer_type": [c_void_p],
        "ggml_backend_reg_get_proc_address": [c_void_p, c_char_p],
        "ggml_backend_buft_alloc_buffer": [c_void_p, c_size_t],
        "ggml_backend_alloc_ctx_tensors_from_buft": [c_void_p, c_void_p],
    }
    for name, arguments in pointers.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_void_p
    others: dict[str, tuple[list[Any], Any]] = {
        "ggml_tensor_overhead": ([], c_size_t),
        "ggml_graph_overhead_custom": ([c_size_t, c_bool], c_size_t),
        "ggml_nbytes": ([c_void_p], c_size_t),
        "ggml_set_output": ([c_void_p], None),
        "ggml_build_forward_expand": ([c_void_p, c_void_p], None),
        "ggml_gallocr_alloc_graph": ([c_void_p, c_void_p], c_bool),
        "ggml_backend_dev_supports_op": ([c_void_p, c_void_p], c_bool),
        "ggml_backend_buft_name": ([c_void_p], c_char_p),
        "ggml_backend_buffer_free": ([c_void_p], None),
        "ggml_backend_tensor_set": ([c_void_p, c_void_p, c_size_t, c_size_t], None),
        "ggml_backend_tensor_get": ([c_void_p, c_void_p, c_size_t, c_size_t], None),
        "ggml_backend_graph_compute": ([c_void_p, c_void_p], c_int),
    }
    for name, (arguments, result) in others.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def made_up_blocks(ggml: Ggml, kind: str, rows: int, columns: int, gen: torch.Generator) -> Tensor:
    """Random blocks of two experts whose weights are about 1 / sqrt(inputs): uint8 [2, bytes of a matrix]."""
    size = ggml.row_bytes(kind, columns) // (columns // 256)
    blocks = torch.randint(256, (SMALL_EXPERTS, rows * columns // 256, size), generator=gen, dtype=torch.uint8)
    _scale(blocks, kind, 1.0)
    some = ggml.dequantize(kind, blocks[0, :1024].contiguous())
    _scale(blocks, kind, float(some.square().mean() * columns) ** -0.5)
    return blocks.flatten(1)


def _scale(blocks: Tensor, kind: str, value: float) -> None:
    for at in SCALES[kind]:
        blocks[..., at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)


def sides(shape: Shape) -> list[tuple[int, int]]:
    """Outputs and inputs of up, gate and down."""
    H, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
    return [(I, H), (I, H), (H, I)]


class Machine:
    """ggml's CPU backend.

    Args:
        threads: of a computation.
    """

    def __init__(self, threads: int):
        self.ggml, self.c = Ggml(), _library()
        self.device = self.c.ggml_backend_dev_by_type(CPU_DEVICE)
        self.backend = self.c.ggml_backend_dev_init(self.device, None)
        self.plain_buffer = self.c.ggml_backend_dev_buffer_type(self.device)
        self._procedure("ggml_backend_set_n_threads", CFUNCTYPE(None, c_void_p, c_int))(self.backend, threads)

    def _procedure(self, name: str, kind: Any) -> Any:
        registry = self.c.ggml_backend_dev_backend_reg(self.device)
        return kind(self.c.ggml_backend_reg_get_proc_address(registry, name.encode()))

    def context(self, tensors: int, graph: int = 0) -> int:
        """A context for so many tensors, and a graph of so many nodes."""
        size = tensors * self.c.ggml_tensor_overhead() + self.c.ggml_graph_overhead_custom(graph, False)
        found: int = self.c.ggml_init(_InitParams(size, None, True))
        return found

    def buffer_for(self, kind: int, columns: int, rows: int, experts: int) -> int:
        """The kind of buffer that llama.cpp would put such weights into: the first that can multiply them."""
        extra = self._procedure("ggml_backend_dev_get_extra_bufts", CFUNCTYPE(POINTER(c_void_p), c_void_p))
        candidates = extra(self.device)
        i = 0
        while candidates and candidates[i]:
            context = self.context(4)
            weight = self.c.ggml_new_tensor_3d(context, kind, columns, rows, experts)
            x = self.c.ggml_new_tensor_3d(context, F32, columns, 1, 512)
            ids = self.c.ggml_new_tensor_2d(context, I32, 1, 512)
            product = self.c.ggml_mul_mat_id(context, weight, x, ids)
            buffer = self.c.ggml_backend_buft_alloc_buffer(candidates[i], 0)
            c_void_p.from_address(weight + BUFFER_AT).value = buffer
            able = self.c.ggml_backend_dev_supports_op(self.device, product)
            self.c.ggml_backend_buffer_free(buffer)
            if able:
                return int(candidates[i])
            i += 1
        return int(self.plain_buffer)

    def weight(self, kind: int, blocks: Tensor, columns: int, rows: int) -> tuple[int, str]:
        """Weights [E, N, K] of uint8 [E, bytes] in memory, and the name of the kind of buffer they are in."""
        buffer_type = self.buffer_for(kind, columns, rows, len(blocks))
        context = self.context(1)
        tensor = self.c.ggml_new_tensor_3d(context, kind, columns, rows, len(blocks))
        assert self.c.ggml_nbytes(tensor) == blocks.nbytes
        if not self.c.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type):
            raise MemoryError(f"{blocks.nbytes} bytes of weights")
        self.c.ggml_backend_tensor_set(tensor, blocks.data_ptr(), 0, blocks.nbytes)
        return tensor, self.c.ggml_backend_buft_name(buffer_type).decode()


class Graph:
    """Calls, one after another, on the same tokens.

    Args:
        machine: that computes.
        shape: of the layer.
        layers: up, gate and down of the layer that each call takes.
        tokens: T.
    """

    def __init__(self, machine: Machine, shape: Shape, layers: Sequence[Sequence[int]], tokens: int):
        c, self._machine = machine.c, machine
        H, top_k, n = shape.hidden_size, shape.top_k, len(layers)
        inputs = machine.context(1 + 2 * n)
        self.x = c.ggml_new_tensor_3d(inputs, F32, H, 1, tokens)
        self.ids = [c.ggml_new_tensor_2d(inputs, I32, top_k, tokens) for _ in layers]
        self.weights = [c.ggml_new_tensor_3d(inputs, F32, 1, top_k, tokens) for _ in layers]
        self._owned = [c.ggml_backend_alloc_ctx_tensors_from_buft(inputs, machine.plain_buffer)]
        nodes = n * (5 + 2 * top_k)
        context = machine.context(nodes, 2 * nodes + 4 * n)
        self.graph = c.ggml_new_graph_custom(context, 2 * nodes + 4 * n, False)
        for (up, gate, down), ids, weights in zip(layers, self.ids, self.weights, strict=True):
            above = c.ggml_mul_mat_id(context, up, self.x, ids)
            below = c.ggml_mul_mat_id(context, gate, self.x, ids)
            h = c.ggml_swiglu_split(context, below, above)
            experts = c.ggml_mul(context, c.ggml_mul_mat_id(context, down, h, ids), weights)
            c.ggml_build_forward_expand(self.graph, experts)
            views = [c.ggml_view_2d(context, experts, H, tokens, 4 * H * top_k, 4 * H * i) for i in range(top_k)]
            for view in views:
                c.ggml_build_forward_expand(self.graph, view)
            self.out = views[0]
            for view in views[1:]:
                self.out = c.ggml_add(context, self.out, view)
                c.ggml_build_forward_expand(self.graph, self.out)
        c.ggml_set_output(self.out)
        allocator = c.ggml_gallocr_new(machine.plain_buffer)
        if not c.ggml_gallocr_alloc_graph(allocator, self.graph):
            raise MemoryError(f"graph of {n} calls on {tokens} tokens")

    def compute(self, x: Tensor, calls: Sequence[Call]) -> float:
        """Seconds of all calls; x [T, H]."""
        self._set(self.x, x.float())
        for call, ids, weights in zip(calls, self.ids, self.weights, strict=True):
            self._set(ids, call.ids.int())
            self._set(weights, call.weights.float())
        before = time.perf_counter()
        status = self._machine.c.ggml_backend_graph_compute(self._machine.backend, self.graph)
        seconds = time.perf_counter() - before
        assert status == 0
        return seconds

    def result(self, x: Tensor) -> Tensor:
        """What the last call gave, in the shape of x."""
        out = torch.empty(x.shape)
        self._machine.c.ggml_backend_tensor_get(self.out, out.data_ptr(), 0, out.nbytes)
        return out

    def _set(self, tensor: int, value: Tensor) -> None:
        value = value.contiguous()
        self._machine.c.ggml_backend_tensor_set(tensor, value.data_ptr(), 0, value.nbytes)


class Experts:
    """A layer in one of ggml's types, several times over, and a small one with two experts.

    Args:
        machine: that computes.
        shape: of the layer.
        kind: of `SCALES`.
        working_set: bytes that the copies hold at least.
    """

    def __init__(self, machine: Machine, shape: Shape, kind: str, working_set: int):
        self.machine, self.shape, self.kind = machine, shape, kind
        self.small_shape = small_shape(shape)
        gen = torch.Generator().manual_seed(0)
        number, ggml = machine.ggml.number(kind), machine.ggml
        self._blocks = [made_up_blocks(ggml, kind, n, k, gen) for n, k in sides(self.small_shape)]
        self._small = [
            machine.weight(number, b, k, n)[0] for b, (n, k) in zip(self._blocks, sides(self.small_shape), strict=True)
        ]
        some = [made_up_blocks(ggml, kind, n, k, gen) for n, k in sides(shape)]
        self.expert_bytes = sum(b[0].nbytes for b in some)
        self.copies = max(1, -(-working_set // (self.expert_bytes * shape.num_experts)))
        self.buffer = ""
        self._layers: list[list[int]] = [[] for _ in range(self.copies)]
        for two, (n, k) in zip(some, sides(shape), strict=True):
            blocks = two.repeat(-(-shape.num_experts // len(two)), 1)[: shape.num_experts].contiguous()
            for layer in self._layers:
                tensor, self.buffer = machine.weight(number, blocks, k, n)
                layer.append(tensor)
        self._graphs: dict[tuple[int, ...], Graph] = {}

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gate over up and down of the small layer, see `kernels.experts.Dense`."""
        H, I = self.small_shape.hidden_size, self.small_shape.intermediate_size  # noqa: E741
        up, gate, down = (self.machine.ggml.dequantize(self.kind, b[expert]) for b in self._blocks)
        return torch.cat([gate, up]).view(2 * I, H).double(), down.view(H, I).double()

    def _graph(self, tokens: int, copies: Sequence[int]) -> Graph:
        key = (tokens, *copies)
        if key not in self._graphs:
            self._graphs[key] = Graph(self.machine, self.shape, [self._layers[c] for c in copies], tokens)
        return self._graphs[key]

    def _small_call(self, tokens: int) -> Call:
        return Call(*route(UNIFORM, tokens, SMALL_EXPERTS, self.small_shape.top_k, tokens, "cpu"))

    def _small_graph(self, tokens: int) -> Graph:
        key = (tokens,)
        if key not in self._graphs:
            self._graphs[key] = Graph(self.machine, self.small_shape, [self._small], tokens)
        return self._graphs[key]

    def check(self) -> float:
        """Largest relative error of the small layer against float64.

        Raises:
            ValueError: it is above `LIMIT`, or not a number.
        """
        worst = 0.0
        for count in CHECKED_TOKENS:
            x, call, graph = made_up_tokens(count, self.shape), self._small_call(count), self._small_graph(count)
            graph.compute(x, [call])
            error = relative_error(graph.result(x), reference(self, x, call.weights, call.ids))
            if not error <= LIMIT:
                raise ValueError(f"{self.kind}: wrong result: relative error {error:.2e}, above {LIMIT:.0e}")
            worst = max(worst, error)
        return worst

    def turn(self, tokens: int, calls: Sequence[tuple[int, Call]]) -> float:
        """See `rounds.Rival`."""
        x, graph = made_up_tokens(tokens, self.shape), self._graph(tokens, [copy for copy, _ in calls])
        self._small_graph(tokens).compute(x, [self._small_call(tokens)])
        return graph.compute(x, [call for _, call in calls])


def made_up_tokens(count: int, shape: Shape) -> Tensor:
    """Activations, float32 [T, H]."""
    return torch.randn(count, shape.hidden_size, generator=torch.Generator().manual_seed(count))


def main() -> None:
    """Answer requests until standard input ends."""
    import llama_cpp

    # ggml writes to both; answers go where standard output was.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.readline())
    shape, machine = Shape(**first["shape"]), Machine(first["threads"])
    experts: dict[str, Experts] = {}
    features = llama_cpp.llama_print_system_info().decode()

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"version": version("llama_cpp_python"), "features": features})
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            one = experts[request["make"]] = Experts(machine, shape, request["make"], request["working_set"])
            answer(
                {"relative_error": one.check(), "copies": one.copies, "expert_bytes": one.expert_bytes,
                 "buffer": one.buffer}
            )  # fmt: skip
        else:
            calls = [(copy, Call(torch.tensor(w), torch.tensor(ids))) for copy, w, ids in request["calls"]]
            answer({"seconds": experts[request["turn"]].turn(request["tokens"], calls)})


if __name__ == "__main__":
    main()
