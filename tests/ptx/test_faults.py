"""Faults planted in what is compiled, or in how: the machine finds each of them."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bitsmoe_kernels._triton import codes, gemm, prepare
from bitsmoe_kernels.backends import triton_launch
from bitsmoe_kernels.backends.launch_config import FEW, Tile, kwidth_of
from kernel_cases import with_fault
from ptx_cases import check_on_machine, compiler, pipelined
from ptx_machine.faults import PtxError
from ptx_machine.launch import Machine, substituted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

both = pytest.mark.parametrize("capability", [80, 90])
both_kinds = pytest.mark.parametrize("direct", [True, False], ids=["direct", "pipelined"])


def tile_of(direct: bool, capability: int) -> Tile:
    return FEW[0] if direct else pipelined(capability)


def replaced(
    kernel: str, pattern: str, new: str | Callable[[re.Match[str]], str], which: slice
) -> Callable[[str, str], str]:
    """An edit of some matches of a pattern in a kernel's PTX."""

    def edit(name: str, text: str) -> str:
        if name != kernel:
            return text
        chosen = list(re.finditer(pattern, text))[which]
        assert chosen, f"{pattern} is not in {kernel}"
        for found in reversed(chosen):
            text = text[: found.start()] + (new if isinstance(new, str) else new(found)) + text[found.end() :]
        return text

    return edit


def one_more(found: re.Match[str]) -> str:
    return f"{found[1]}{int(found[2]) + 1};"


@both
def test_a_wait_for_one_copy_less(capability: int) -> None:
    edit = replaced("gate_up", r"(cp\.async\.wait_group\s+)(\d+);", one_more, slice(None))
    with pytest.raises(PtxError, match="was not waited for"):
        check_on_machine("five tiles", capability, torch.float16, edit, tile=pipelined(capability))


@both
def test_a_barrier_less(capability: int) -> None:
    """Those behind the waits, without which a thread reads what another one copied, and at the loop's end."""
    barrier = r"(?<=wait_group)(\s+\d+;\s+)bar\.sync\s+0;"
    edit = replaced("gate_up", barrier, r" 0;", slice(None))
    with pytest.raises(PtxError, match="no barrier between"):
        check_on_machine("five tiles", capability, torch.float16, edit, tile=pipelined(capability))
    for kernel in ("begin", "down"):
        edit = replaced(kernel, r"bar\.sync\s+0;", "", slice(None))
        with pytest.raises(PtxError, match=r"no barrier between|nothing that orders"):
            check_on_machine("five tiles", capability, torch.float16, edit, tile=pipelined(capability))


def test_a_wait_for_one_product_less() -> None:
    edit = replaced("gate_up", r"(wgmma\.wait_group\.sync\.aligned )(\d+);", one_more, slice(None))
    with pytest.raises(AssertionError):
        check_on_machine("five tiles", 90, torch.float16, edit, tile=pipelined(90))


def test_registers_that_a_product_still_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What Triton 3.6 makes of a loop without the use of the sums in `codes.product`."""
    ours = inspect.getsource(codes.product.fn)
    waits, inner = re.search(r"return tl\.inline_asm.*?\[(tl\.dot\(.*?\))\].*", ours).group(0, 1)  # type: ignore[union-attr]
    without = with_fault(codes, waits, f"return {inner}", tmp_path).product
    faulty = with_fault(gemm, "    return product(numbers(", "    return bare(numbers(", tmp_path, bare=without)
    monkeypatch.setattr(gemm, "gate_up_kernel", faulty.gate_up_kernel)
    with pytest.raises(PtxError, match="of A changed while its product was in flight"):
        check_on_machine("2 bits, kwidth 2", 90, torch.float16, tile=Tile(128, 16, 4, 4, 3))


@both
def test_another_swizzle(capability: int) -> None:
    """Addresses of activations: exchanged by one bit less, or a descriptor of another pattern."""
    if capability == 80:
        edit = replaced(
            "gate_up",
            r"(ldmatrix\S+ \{[^}]*\}, \[%r\d+)(\+\d+)?\]",
            lambda m: f"{m[1]}+{int(m[2] or 0) ^ 16}]",
            slice(None),
        )
    else:
        edit = replaced("gate_up", r"\b46116862932\d+;", lambda m: f"{int(m[0][:-1]) + (1 << 62)};", slice(None))
    with pytest.raises(AssertionError):
        check_on_machine("five tiles", capability, torch.float16, edit, tile=pipelined(capability))


@both
def test_a_size_that_is_no_multiple_of_16(capability: int) -> None:
    """H is 141; said to be a multiple of 16 it makes stores of 16 bytes that are not aligned."""
    with pytest.raises(PtxError, match="not aligned"):
        check_on_machine(
            "sizes of no round number", capability, torch.float16, claimed={"down": ("H",)}, tile=pipelined(capability)
        )


def test_a_pointer_that_is_no_multiple_of_16() -> None:
    x, basis, scale, z = torch.ones(4, 64).half(), torch.ones(8, 64).half(), torch.ones(8), torch.zeros(4, 8, 4)
    ids = torch.zeros(4, 1, dtype=torch.int32)
    machine = Machine(compiler(80), np.random.default_rng(0))

    def run(x: torch.Tensor) -> None:
        with substituted(machine):
            triton_launch._route(ids, None, 1, 16, 1, torch.empty_like(x), (x, basis, scale, z), asm=True)

    run(x)
    assert (z.sum(2) == 64).all()
    elsewhere = torch.ones(4 * 64 + 1).half()[1:].view(4, 64)
    run(elsewhere)
    machine.claimed = {"begin": ("x",)}
    with pytest.raises(PtxError, match="not aligned"):
        run(elsewhere)


def test_an_expert_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right, wrong = "(expert >= 0) & (expert < EXPERTS)", "expert >= 0"
    monkeypatch.setattr(prepare, "begin_kernel", with_fault(prepare, right, wrong, tmp_path).begin_kernel)
    check_on_machine("2 bits, kwidth 4", 80, torch.float16, tile=pipelined(80))
    with pytest.raises(AssertionError):
        check_on_machine("ids of no expert", 80, torch.float16, tile=pipelined(80))
    with pytest.raises(PtxError, match="bytes at"):
        check_on_machine("ids of no expert in a map", 80, torch.float16, tile=pipelined(80))


@both
@both_kinds
def test_two_bytes_exchanged(direct: bool, capability: int) -> None:
    tile = tile_of(direct, capability)
    for byte_order, wrong in ((0x4140, 0x4041), (0x4342, 0x4243)):
        edit = replaced(
            "gate_up", rf"(prmt\.b32 %r\d+, %r\d+, 0, ){byte_order};", lambda m, w=wrong: f"{m[1]}{w};", slice(None)
        )
        with pytest.raises(AssertionError):
            check_on_machine(f"3 bits, kwidth {kwidth_of(capability)}", capability, torch.float16, edit, tile=tile)


@both
@both_kinds
@pytest.mark.parametrize("order", ["relaxed", "release", "acquire"])
def test_a_count_that_orders_nothing(order: str, direct: bool, capability: int) -> None:
    edit = replaced("down", r"gpu\.acq_rel", f"gpu.{order}", slice(None))
    with pytest.raises(PtxError, match="nothing that orders"):
        check_on_machine(
            "five tiles", capability, torch.float16, edit, tile=FEW[0] if direct else pipelined(capability)
        )


@both
@both_kinds
def test_a_release_without_its_barrier(direct: bool, capability: int) -> None:
    """The stores come behind the barrier, right before the count."""

    def edit(name: str, text: str) -> str:
        if name != "down":
            return text
        before, count, after = re.split(r"(.*atom\.global)", text, maxsplit=1)
        stores = re.findall(r"@%p\d+ st\.global\S+ [^;]*;", before)
        assert stores
        return re.sub(r"@%p\d+ st\.global\S+ [^;]*;", "", before) + "\n".join([*stores, count]) + after

    with pytest.raises(PtxError, match="nothing that orders"):
        check_on_machine(
            "five tiles", capability, torch.float16, edit, tile=FEW[0] if direct else pipelined(capability)
        )
