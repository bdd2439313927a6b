"""Tile sizes of the kernels: a pure function of the architecture and of what the CPU knows about a call.

`python -m benchmarks.kernels --tune` measures candidates on a GPU. Until that has run on an architecture its rows are
chosen by the machine code alone (instructions per weight, registers, shared memory): see docs/kernels.md.
"""

from dataclasses import dataclass

from bitsmoe_kernels.layout.fields import TILE


@dataclass(frozen=True)
class Tile:
    """One configuration of the GEMM kernels.

    Attributes:
        outputs: of a program of down.
        tokens: slots of a block.
        warps: of a program.
        unroll: tiles of 64 components in one turn of the main loop.
        stages: of the pipeline that brings tiles to shared memory.
        direct: whether `_triton/direct.py` has the kernels, which have no use for `unroll` and `stages`. Triton's
            interpreter does not run them: there `_triton/gemm.py` stands in.
        gate_up: outputs of a program of gate and up, which count as two, where both lie in one matrix.
        registers: most of a thread of gate and up, and of down, so that more programs share a multiprocessor; None:
            what the assembler takes.
    """

    outputs: int
    tokens: int
    warps: int
    unroll: int
    stages: int
    direct: bool = False
    gate_up: int = 128
    registers: tuple[int | None, int | None] = (None, None)

    def input_outputs(self, in_turn: bool) -> int:
        """As `gate_up`, for matrices of their own as well, and for up without a gate: twice the outputs of one.

        Args:
            in_turn: whether outputs of gate and up lie in turn in one matrix.
        """
        return self.gate_up if in_turn else 2 * TILE


DECODE, PREFILL = "decode", "prefill"
HOPPER = 90

FEW = (
    Tile(64, 8, 4, 2, 3, direct=True, gate_up=64),
    Tile(256, 8, 4, 2, 3, direct=True),
    Tile(256, 16, 4, 2, 3, direct=True, registers=(96, 136)),
)
"""Blocks of few tokens, on every architecture. The first is for calls that fill no GPU with programs. Left alone, the
assembler takes fewer registers than the last one needs."""
FILLED = 128 * 128
"""Outputs of gate and up of all slots' experts: with fewer, programs of 128 leave multiprocessors idle."""

TILES: dict[int, dict[str, tuple[Tile, ...]]] = {
    80: {
        DECODE: FEW,
        PREFILL: (Tile(128, 32, 4, 2, 3), Tile(128, 64, 8, 1, 4, registers=(128, 128))),
    },
    90: {
        DECODE: FEW,
        PREFILL: (Tile(128, 32, 4, 2, 3), Tile(128, 64, 8, 1, 3, registers=(128, 128))),
    },
    # Triton takes the matrix unit of sm_100, which has no way in for weights from registers, and gives up. The older
    # instructions are slow for long prompts.
    100: {
        DECODE: FEW,
        PREFILL: FEW[-1:],
    },
    120: {
        DECODE: FEW,
        PREFILL: (Tile(128, 32, 4, 2, 2), Tile(128, 64, 8, 1, 3, registers=(128, 128))),
    },
}
"""By the oldest architecture they serve."""


@dataclass(frozen=True)
class BasisTile:
    """Tiles of what comes before the GEMM.

    Attributes:
        coordinates, tokens: of a program of the shared basis.
        warps: of a program.
        parts: in which the basis is summed up, by programs of their own; the next launch adds them up, in their order.
        inner: inputs that a program of the basis takes at a time.
    """

    coordinates: int
    tokens: int
    warps: int
    parts: int
    inner: int


BASIS_TILES = (BasisTile(32, 16, 4, 4, 128), BasisTile(64, 64, 4, 4, 64), BasisTile(128, 128, 8, 1, 64))


def basis_tile(tokens: int) -> BasisTile:
    """For a call with so many tokens."""
    few, some, many = BASIS_TILES
    return few if tokens <= 16 else some if tokens <= 512 else many


def why_no_table(capability: int) -> str | None:
    """Why there are no kernels for a compute capability such as 90; None where there are."""
    if capability < min(TILES):
        return f"compute capability {capability / 10} is below {min(TILES) / 10}"
    return None


def table_of(capability: int) -> dict[str, tuple[Tile, ...]]:
    """The rows for a compute capability such as 90; of the newest table not newer than it.

    Raises:
        ValueError: no kernels for it.
    """
    if reason := why_no_table(capability):
        raise ValueError(reason)
    known = [arch for arch in TILES if arch <= capability]
    return TILES[max(known)]


def pick_tile(capability: int, slots: int, experts: int, outputs: int) -> Tile:
    """The configuration for a call, from numbers that are known without asking the device.

    Args:
        capability: such as 90.
        slots: tokens times top_k.
        experts: over which the slots are spread, those of other ranks among them.
        outputs: of an expert's gate and up together.
    """
    table = table_of(capability)
    mean = slots / max(1, experts)
    small, *few = table[DECODE]
    # A factor of two between this tile and the next: powers of two meet both, so both are compiled at start-up.
    if 2 * mean <= small.tokens and slots * outputs <= FILLED:
        return small
    for tile in few:
        if mean <= tile.tokens:
            return tile
    prefill = table[PREFILL]
    return next((tile for tile in prefill if mean <= 2 * tile.tokens), prefill[-1])


def kwidth_of(capability: int) -> int:
    """Neighbouring components in one thread of the matrix unit: 2 where weights enter wgmma from registers, else 4."""
    return 2 if capability == HOPPER else 4
