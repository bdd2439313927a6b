"""Options of `bitsmoe quantize`: types, defaults, choices and texts. The help and the docs are made from here."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitsmoe_kernels.errors import BitsmoeError

SELF, HUB = "self", "hf:"
"""Calibration text that the model writes itself, and the prefix of a dataset's name."""


def recorded_name(spec: str) -> str:
    """A calibration source as a checkpoint records it: only the last part of a path."""
    if spec == SELF or (spec.startswith(HUB) and not _is_path(spec.removeprefix(HUB))):
        return spec
    return (HUB if spec.startswith(HUB) else "") + Path(spec.removeprefix(HUB)).name


def _is_path(name: str) -> bool:
    """Whether a dataset's name is a local path: no name on the Hub looks like one."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


BasisForm = Literal["auto", "natural", "whitened", "paper"]
ObjectiveName = Literal["bitsmoe", "alphaq", "bt-moe", "frequency", "uniform"]
Scope = Literal["layer", "model"]
Ablation = Literal["output-weights", "correction", "trial", "trim"]
_DATASET_OPTIONS = ("calib_config", "calib_split", "calib_column")
_BASES: dict[ObjectiveName, tuple[BasisForm, ...]] = {"alphaq": ("auto",), "bt-moe": ("auto", "natural")}
"""Values of `basis` for objectives that work on whole matrices. The other objectives take all."""


class Panel(StrEnum):
    """Groups of options in the help and in the docs. A field without a panel is not on the command line."""

    FIRST = "Options"
    """Ten options that people use first, counting `--out` and `--workers`. The help shows this panel on top."""
    ALLOCATION = "Allocation of bits"
    DECOMPOSITION = "Decomposition and storage"
    ROUNDING = "Rounding"
    CALIBRATION = "Calibration text"
    RUN = "Running"


class QuantizeConfig(BaseModel):
    """Options that decide the bytes of a checkpoint, besides the model and the calibration text.

    Raises:
        pydantic.ValidationError: a value that is not allowed, or options that contradict each other.
    """

    # The order of fields is the order in config.json.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    bits: Annotated[float | None, Panel.FIRST] = Field(
        default=None,
        gt=0,
        le=16,
        allow_inf_nan=False,
        description="All-in bits per weight of the routed experts: codes, scales, metadata and basis. Required without "
        "--target-kl.",
    )
    target_kl: Annotated[float | None, Panel.ALLOCATION] = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="In place of --bits: KL divergence from the original that is acceptable, nats a token. The fewest "
        "bits are taken whose forecast is at most this.",
    )
    objective: Annotated[ObjectiveName, Panel.ALLOCATION] = Field(
        default="bitsmoe", description="What bits are spent for."
    )
    budget: Annotated[Scope | None, Panel.ALLOCATION] = Field(
        default=None,
        description="One budget for each layer, or one for the whole model. Default: model for alphaq and bt-moe, else "
        "layer. With one for the model, the other objectives weigh layers by what quantizing each alone "
        "does to the model; that is tried first.",
    )
    gamma: Annotated[float, Panel.ALLOCATION] = Field(
        default=1.0, ge=0, le=10, allow_inf_nan=False, description="alphaq: power of the heavy-tail exponents."
    )
    ranks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Panel.ALLOCATION] = Field(
        default=(0, 8, 16, 32, 64, 128),
        description="bt-moe: ranks of compensators to choose from, separated by commas.",
    )
    basis: Annotated[BasisForm, Panel.DECOMPOSITION] = Field(
        default="auto",
        description="Shared basis; auto takes whitened where a pilot finds it clearly better than natural.",
    )
    basis_bits: Annotated[Literal[8, 16], Panel.DECOMPOSITION] = Field(default=8, description="Bits of the basis.")
    block_size: Annotated[Literal[16, 32], Panel.DECOMPOSITION] = Field(
        default=16, description="Components that share a bit-width."
    )
    dense_bits: Annotated[Literal[4, 8, 16], Panel.FIRST] = Field(
        default=16,
        description="Bits of attention, shared experts, dense layers and lm_head; 16 leaves them unchanged. vLLM "
        "serves 8 bits on GPUs; on a CPU it takes the memory of 16 bits.",
    )
    widths: tuple[int, ...] = Field(
        default=(0, 1, 2, 3, 4, 5, 6, 8), description="Bit-widths the allocation may choose from."
    )
    feedback: Annotated[bool, Panel.ROUNDING] = Field(
        default=True,
        description="Pass rounding errors on to components that are not rounded yet. Takes most of the rounding time.",
    )
    refine: Annotated[int, Panel.ROUNDING] = Field(
        default=2, ge=0, le=20, description="Rounds of scale refit and re-rounding after the feedback."
    )
    tune: Annotated[bool, Panel.FIRST] = Field(
        default=False,
        description="As --fit layer, and tune scales and codes by gradients: a clearly lower divergence, and several "
        "times as slow. In one process only.",
    )
    fit: Annotated[Literal["expert", "layer"], Panel.ROUNDING] = Field(
        default="expert",
        description="What down matrices make up for: errors of their own expert, or of the whole layer and those "
        "before it, against the original model's hidden states. The latter is better, and about twice as slow.",
    )
    tune_model: Annotated[bool, Panel.ROUNDING] = Field(
        default=False,
        description="After all layers, tune the scales of the whole model by gradients, against the original model's "
        "predictions. In one process only.",
    )
    tune_codes: Annotated[bool, Panel.ROUNDING] = Field(
        default=False,
        description="As --tune-model, and codes change as well. It takes 12 bytes of memory for each weight of the "
        "experts.",
    )
    ablations: tuple[Ablation, ...] = Field(
        default=(),
        alias="without",
        description="Parts to leave out, to measure their effect. output-weights: weights of gate and up outputs and "
        "of tokens. correction: correction of the down projection. trial: pilot that measures row norms and "
        "chooses the basis. trim: removal of basis rows that no expert uses.",
    )
    calib: Annotated[str | None, Panel.FIRST] = Field(
        default=None,
        description="Calibration text: self (sampled from the model), FILE (text, JSON lines or array, parquet, also "
        "in gzip) or hf:DATASET. Default: hf:allenai/c4, or self where it cannot be reached.",
    )
    calib_config: Annotated[str | None, Panel.CALIBRATION] = Field(
        default=None, description="Configuration of the dataset, where it has several."
    )
    calib_split: Annotated[str | None, Panel.CALIBRATION] = Field(
        default=None, description="Split of the dataset. Default: train, or the only one."
    )
    calib_column: Annotated[str | None, Panel.CALIBRATION] = Field(
        default=None,
        description="Column, or key of JSON rows, that holds the text, or messages for the model's chat template. "
        "Default: the first of text, content, messages, conversations, prompt.",
    )
    calib_samples: Annotated[int, Panel.FIRST] = Field(default=128, ge=1, description="Windows of calibration text.")
    calib_length: Annotated[int, Panel.CALIBRATION] = Field(
        default=2048, ge=8, description="Tokens in a window; at most the model's maximum is used."
    )
    token_weights: Annotated[Scope, Panel.CALIBRATION] = Field(
        default="layer",
        description="What a calibration token counts by: what errors at it do to its layer's output, or to the model's "
        "predictions, by gradients. The latter takes four more passes through the original.",
    )
    seed: Annotated[int, Panel.RUN] = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Selects the windows of a longer text, and random draws. Equal inputs and seed give equal bytes.",
    )
    device: Annotated[str, Panel.FIRST] = Field(default="cpu", description="cpu or cuda.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.bits is not None and self.target_kl is not None:
            raise ValueError(
                f"--bits {self.bits} and --target-kl {self.target_kl}: give one of them; --target-kl picks the bits"
            )
        if self.bits is None and self.target_kl is None:
            raise ValueError("--bits: missing; give bits per weight, or the acceptable divergence as --target-kl")
        if self.basis not in _BASES.get(self.objective, (self.basis,)):
            raise ValueError(
                f"--objective {self.objective} works on whole matrices without a basis, not with --basis {self.basis}; "
                "leave --basis out"
            )
        if 0 not in self.ranks or list(self.ranks) != sorted(set(self.ranks)):
            raise ValueError(f"--ranks {','.join(map(str, self.ranks))}: must begin with 0 and ascend")
        given = [f"--{name.replace('_', '-')}" for name in self._given(_DATASET_OPTIONS)]
        if given and self.calib in (None, SELF):
            raise ValueError(f"{', '.join(given)}: for --calib FILE or hf:DATASET only")
        if (self.calib_config or self.calib_split) and not str(self.calib).startswith(HUB):
            raise ValueError(
                f"--calib {self.calib}: only hf:DATASET has configurations and splits; leave out --calib-config and "
                "--calib-split"
            )
        return self

    @property
    def fits_layer(self) -> bool:
        """Whether the experts of a layer are fitted together."""
        return self.tune or self.fit == "layer"

    @property
    def tunes_model(self) -> bool:
        """Whether the whole model is tuned."""
        return self.tune_model or self.tune_codes

    @property
    def known_bits(self) -> float:
        """`bits`, given or picked.

        Raises:
            RuntimeError: they are not picked yet.
        """
        if self.bits is None:
            raise RuntimeError("the bits of --target-kl are not picked yet")
        return self.bits

    def with_bits(self, bits: float) -> Self:
        """These options with other bits, picked for `target_kl` or on trial."""
        return self.model_copy(update={"bits": bits})

    def _given(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(self, name) is not None]

    def record(self) -> dict[str, object]:
        """Options as config.json keeps them. Without paths, so that equal inputs give equal bytes anywhere."""
        optional = ("target_kl", *_DATASET_OPTIONS)
        left_out = {"device", *optional} - {*self._given(optional)}
        data = self.model_dump(mode="json", by_alias=True, exclude=left_out)
        if self.calib:
            data["calib"] = recorded_name(self.calib)
        return data


class RunOptions(QuantizeConfig):
    """All options of one run: those of the checkpoint, and those that do not change its bytes."""

    revision: Annotated[str | None, Panel.RUN] = Field(
        default=None, description="Branch, tag or commit of the model on the Hub. Default: its main branch."
    )
    resume: Annotated[bool, Panel.FIRST] = Field(
        default=False, description="Go on after the last finished layer of a run of the same options that stopped."
    )
    max_memory: Annotated[str | int | None, Panel.RUN] = Field(
        default=None, description="Refuse to begin if a process would take more, such as 24GB."
    )
    plan: Annotated[bool, Panel.FIRST] = Field(
        default=False, description="Stop after the allocation and write the report only."
    )

    def config(self) -> QuantizeConfig:
        """The options of the checkpoint alone."""
        return QuantizeConfig(**self.model_dump(include=set(QuantizeConfig.model_fields)))


@contextmanager
def named_options() -> Iterator[None]:
    """Options are checked inside the block.

    Raises:
        BitsmoeError: instead of pydantic's error; one line for each option at fault, named as on the command line.
    """
    try:
        yield
    except ValidationError as e:
        faults = [
            f"--{str(fault['loc'][0]).replace('_', '-')} {fault['input']!r}: {fault['msg']}"
            if fault["loc"]
            else fault["msg"].removeprefix("Value error, ")
            for fault in e.errors()
        ]
        raise BitsmoeError("\n".join(faults)) from None
