"""Objectives by name, as `--objective` takes them: what the bits are spent for.

Every objective fills the same table of choices, and one knapsack solves them all. A new one is one file here and one
entry in `OBJECTIVES`.
"""

from offline_quant.allocation.objectives.alphaq import AlphaQ
from offline_quant.allocation.objectives.base import Objective
from offline_quant.allocation.objectives.bitsmoe import BitsMoE
from offline_quant.allocation.objectives.bt_moe import BTMoE
from offline_quant.allocation.objectives.frequency import Frequency
from offline_quant.allocation.objectives.uniform import Uniform
from offline_quant.config import QuantizeConfig, Scope
from offline_quant.decomposition.forms import FORMS, Form

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective for objective in (BitsMoE(), AlphaQ(), BTMoE(), Frequency(), Uniform())
}


def forms_of(config: QuantizeConfig) -> tuple[Form, ...]:
    """The forms that may be chosen from."""
    names = OBJECTIVES[config.objective].forms if config.basis == "auto" else (config.basis,)
    return tuple(FORMS[name] for name in names)


def budget_scope(config: QuantizeConfig) -> Scope:
    """Whether one budget holds for each layer or for the model."""
    return config.budget or OBJECTIVES[config.objective].scope


def measures_layers(config: QuantizeConfig) -> bool:
    """Whether losses of layers are weighed by what each does to the model, which is tried."""
    return OBJECTIVES[config.objective].sensitive and budget_scope(config) == "model"


def may_share_bases(config: QuantizeConfig) -> bool:
    """Whether a form with shared bases may be chosen."""
    return any(form.shares_bases for form in forms_of(config))


def runs_pilot(config: QuantizeConfig) -> bool:
    """Whether every form is quantized roughly once, before it is decided."""
    return OBJECTIVES[config.objective].pilots and "trial" not in config.ablations
