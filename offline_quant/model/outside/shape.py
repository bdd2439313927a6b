"""A model's experts: from the table of families, or derived and verified where that does not know the architecture.

Nothing is guessed. transformers' model says where the experts are and what they compute, its conversion of names says
how files hold them, and its forward pass is compared with the streamed one. What fails a check is refused with it.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bitsmoe_kernels.models.families import Family, MoEShape, in_table, moe_shape
from offline_quant.model.outside.skeleton import OUTSIDE, Skeleton, sizes
from offline_quant.model.outside.stored import StoredNames
from offline_quant.model.outside.trial import Trial, tried_activation


def model_shape(
    config: dict[str, Any], directory: Path, names: Callable[[], Collection[str]], prefixes: Collection[str] = ()
) -> MoEShape:
    """A model's experts.

    Args:
        config: config.json.
        directory: of the model.
        names: of the stored tensors; called for a model outside the table.
        prefixes: of the experts that a bitsmoe checkpoint holds quantized.

    Raises:
        BitsmoeError: not a MoE model, one that is known not to work, or the check that it failed.
    """
    if in_table(config, str(directory)):
        return moe_shape(config, str(directory))
    skeleton = Skeleton(config, directory)
    stored = StoredNames(skeleton, names())
    layout, others = stored.layout(prefixes), stored.others()
    skeleton.passed.append("names")
    first, layers = skeleton.sites[0], tuple(site.layer for site in skeleton.sites)
    within = skeleton.within_layer(first)
    family = Family(
        skeleton.architecture,
        config["model_type"],
        OUTSIDE,
        num_experts_key="num_experts",
        intermediate_size_key="moe_intermediate_size",
        moe_layers=partial(_these, layers),
        experts=layout.experts,
        projections=layout.projections,
        stacked=layout.stacked,
        transposed=layout.transposed,
        interleaved=first.module.is_transposed,
        bias=first.module.has_bias,
        module_names=((f".{layout.experts}.", f".{within}."),),
        module_experts=within,
        module_embedding=skeleton.embedding,
        module_tail=skeleton.weighted,
        text=replace(skeleton.text, prefix=skeleton.base) if skeleton.text else None,
        stored_base=layout.base,
        stored_as=others,
        built_by=skeleton.auto_class,
        tested="derived",
    )
    experts = tuple(sizes(site.module)[0] for site in skeleton.sites)
    shape = MoEShape(
        family,
        layers,
        max(experts),
        *sizes(first.module)[1:],
        layer_experts=experts if len(set(experts)) > 1 else None,
    )
    shape = replace(shape, hidden_act=tried_activation(skeleton, shape))
    skeleton.passed.append("formula")
    return Trial(skeleton, shape).compared()


def described(shape: MoEShape) -> str | None:
    """What was derived of a model outside the table; None for one of the table."""
    family = shape.family
    if family.tested != "derived":
        return None
    held = " and ".join(family.stacked) if family.stacked else f"{', '.join(family.projections)} of each expert"
    where = f"{family.decoder(shape.layers[0])}.{family.experts}"
    return (
        f"experts at {where}, stored as {held}; activation {shape.hidden_act}; {family.top_k_key} of config.json; "
        "names, the formula of the experts and a forward pass of the whole model with weights of chance"
    )


def _these(layers: tuple[int, ...], config: dict[str, Any]) -> list[int]:
    return list(layers)


def untested(shape: MoEShape, subject: str) -> str | None:
    """What to say of a model outside the table, in one sentence; None for one of the table."""
    if shape.family.tested != "derived":
        return None
    return (
        f"{subject}: nobody has tested {shape.family.architecture}; what is known of it was derived from transformers "
        "and checked, and it is quantized, but not known to serve"
    )
