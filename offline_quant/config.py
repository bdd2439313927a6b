"""Options of `bitsmoe quantize`, checked together before any work."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SELF, HUB = "self", "hf:"
"""Source that is the model itself, and what begins the name of a dataset."""


def recorded_name(spec: str) -> str:
    """A source as a checkpoint records it: of a file or a local dataset the last part of its path."""
    if spec == SELF or (spec.startswith(HUB) and not _is_path(spec.removeprefix(HUB))):
        return spec
    return (HUB if spec.startswith(HUB) else "") + Path(spec.removeprefix(HUB)).name


def _is_path(name: str) -> bool:
    """Whether a dataset's name can be no Hub name."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


BasisForm = Literal["auto", "natural", "whitened", "paper"]
ObjectiveName = Literal["bitsmoe", "alphaq", "bt-moe", "frequency", "uniform"]
Scope = Literal["layer", "model"]
_PARTS = ("calib_config", "calib_split", "calib_column")


class QuantizeConfig(BaseModel):
    """Everything that decides the bytes of a checkpoint, besides the model and the calibration text."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    bits: float = Field(gt=0, le=16, allow_inf_nan=False)
    """All-in bits per weight of the routed experts: codes, scales, metadata and basis."""
    objective: ObjectiveName = "bitsmoe"
    """What the bits are spent for; see `objectives`."""
    budget: Scope | None = None
    """One budget for each layer, or one for the model; None: as the objective's authors have it."""
    gamma: float = Field(default=1.0, ge=0, le=10, allow_inf_nan=False)
    """How much AlphaQ's exponents count."""
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = (0, 8, 16, 32, 64, 128)
    """Ranks of BT-MoE's compensators to choose from."""
    basis: BasisForm = "auto"
    basis_bits: Literal[8, 16] = 8
    block_size: Literal[16, 32] = 16
    dense_bits: Literal[4, 8, 16] = 16
    """Bits of the linear layers outside the routed experts; 16: they stay as they are."""
    widths: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 8)
    """Bit-widths the allocation may choose from."""
    feedback: bool = True
    """Hand rounding errors on to components not yet rounded; without, rounding takes a fraction of the time."""
    refine: int = Field(default=2, ge=0, le=20)
    """Rounds of scale refit and coordinate descent after the feedback."""
    tune: bool = False
    """Aim every layer at the original model's hidden states: down matrices of its experts are fitted together (see
    `joint`), then scales and codes tuned by gradients (see `tune`). Several times as slow."""
    ablations: tuple[Literal["output-weights", "correction", "trial", "trim"], ...] = Field(default=(), alias="without")
    """Parts left out, to measure what they bring: weights of gate and up outputs and of tokens; the correction of
    down; the first pass that measures row norms and chooses the form; leaving out basis rows no expert uses."""
    calib: str | None = None
    """`self`, a file of text or of rows, or `hf:DATASET`; None: the default dataset, else `self`."""
    calib_config: str | None = None
    """Configuration of the dataset."""
    calib_split: str | None = None
    """Split of the dataset; None: `train`, or the only one."""
    calib_column: str | None = None
    """Column or key of a row's text, or of its messages; None: the first usual one."""
    calib_samples: int = Field(default=128, ge=1)
    calib_length: int = Field(default=2048, ge=8)
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "cpu"

    @model_validator(mode="after")
    def _fit(self) -> Self:
        allowed = {"alphaq": ("auto",), "bt-moe": ("auto", "natural")}.get(self.objective)
        if allowed and self.basis not in allowed:
            raise ValueError(
                f"--objective {self.objective} works on whole matrices without a basis, not with --basis {self.basis}; "
                "leave --basis out"
            )
        if 0 not in self.ranks or list(self.ranks) != sorted(set(self.ranks)):
            raise ValueError(f"--ranks {','.join(map(str, self.ranks))}: must begin with 0 and ascend")
        named = [f"--{name.replace('_', '-')}" for name in self._given_parts()]
        if named and self.calib in (None, SELF):
            raise ValueError(f"{', '.join(named)}: for --calib FILE or hf:DATASET only")
        if (self.calib_config or self.calib_split) and not str(self.calib).startswith(HUB):
            raise ValueError(
                f"--calib {self.calib}: only hf:DATASET has configurations and splits; leave out --calib-config and "
                "--calib-split"
            )
        return self

    def _given_parts(self) -> list[str]:
        return [name for name in _PARTS if getattr(self, name) is not None]

    def record(self) -> dict[str, object]:
        """What the checkpoint's config.json keeps: no paths, so that equal inputs give equal bytes anywhere."""
        data = self.model_dump(mode="json", by_alias=True, exclude={"device", *_PARTS} - {*self._given_parts()})
        if self.calib:
            data["calib"] = recorded_name(self.calib)
        return data
