"""Which tensors of a model are routed experts: one table. What is outside it is derived elsewhere, or refused.

Names are those of checkpoint files, which vLLM follows. transformers' modules differ in a few; `module_names` says how.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.expert_mlp import (
    ACTIVATIONS,
    HIDDEN_ACT,
    OWN_NAMES,
    SILU_LIMIT,
    SWIGLU_ALPHA,
    SWIGLU_LIMIT,
    HiddenAct,
    input_matrices,
)
from bitsmoe_kernels.format.schema import TensorSpec

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What a weight may be stored in."""
_CODE_DTYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
_CODE_PARTS = (
    "weight_scale", "weight_zero_point", "weight_packed", "weight_shape", "weight_global_scale", "weight_bitmask",
    "qweight", "qzeros", "scales", "g_idx", "absmax", "quant_map", "quant_state", "SCB", "bitmask",
)  # fmt: skip
"""How tensors begin that lie beside codes, in the forms other quantizers write."""
_LAYER_NUMBER = re.compile(r"model\.layers\.(\d+)\.")
_CODES = "codes of some quantization, not weights; quantize the 16-bit model instead"
_MODULE_BASE = "model."
"""How names of transformers' language models begin, but for the head's."""
FUSED_NAMES = ("gate_up_proj", "down_proj")
"""Stacked matrices of all experts, [E, 2 I, H] and [E, H, I]: as transformers' experts modules name them, and files."""
FUSED_WITHOUT_GATE = ("up_proj", "down_proj")
"""The same of experts without a gate, [E, I, H] and [E, H, I]."""
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of routed experts in config.json; a config without any is no MoE model."""
LATENT_SIZE_KEYS = ("moe_latent_size",)
"""Names in config.json of the width that experts see, where it is not the model's."""
LAYER_KINDS_KEY = "mlp_layer_types"
"""The kind of every decoder layer's MLP, see `Family.layer_kinds`. Where it is, transformers reads nothing else."""
LAYER_KINDS = ("dense", "sparse")
MODEL_TYPES = {"kimi_k2": "deepseek_v3", "AXK1": "axk1"}
"""Model types that published files give where transformers has the model under another one."""
Tested = Literal["tokens", "bfloat16", "transformers", "derived"]
"""How far a family is tested, on small random models. In each case streaming equals transformers' own forward pass.

    tokens          vLLM on a CPU generates the tokens of the dequantized checkpoint
    bfloat16        vLLM on a CPU has nothing but bfloat16, and is as close to exact logits as with that checkpoint
    transformers    vLLM cannot run the architecture on a CPU
    derived         nobody tested it: it is outside the table, and was checked when the model was opened
"""


MAX_LAYERS, MAX_SIZE, MAX_SCALING = 10_000, 2**31 - 1, 1000
"""Beyond any model. Sizes are met by tensors or refused, but layers and experts are counted through before that."""


def _qwen_layers(config: dict[str, Any]) -> list[int]:
    step = config.get("decoder_sparse_step") or 1
    dense = config.get("mlp_only_layers") or []
    return [i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0]


def _all_layers(config: dict[str, Any]) -> list[int]:
    return list(range(config["num_hidden_layers"]))


def _sparse_layers(config: dict[str, Any]) -> list[int]:
    layers = range(config["num_hidden_layers"])
    if (kinds := config.get(LAYER_KINDS_KEY)) is not None:
        return [i for i in layers if kinds[i] == "sparse"]
    return list(layers[config.get("first_k_dense_replace") or 0 :])


def _listed_layers(config: dict[str, Any]) -> list[int]:
    """Those that a list of 0 and 1 marks, where there is no list of kinds."""
    listed = config.get("moe_layer_freq")
    if isinstance(listed, list) and config.get(LAYER_KINDS_KEY) is None:
        return [i for i, sparse in enumerate(listed[: config["num_hidden_layers"]]) if sparse]
    return _sparse_layers(config)


def _all_but_the_first(config: dict[str, Any]) -> list[int]:
    """Where config.json lists no kinds, of models whose only dense layer is the first."""
    first = config.get("first_k_dense_replace")
    return _sparse_layers(config | {"first_k_dense_replace": 1 if first is None else first})


def _after_the_dense(config: dict[str, Any]) -> list[int]:
    return list(range(config["num_dense_layers"], config["num_hidden_layers"]))


def _every_so_many(config: dict[str, Any]) -> list[int]:
    period, offset = (
        default if (given := config.get(f"expert_layer_{key}")) is None else given
        for key, default in (("period", 2), ("offset", 1))
    )
    return [i for i in range(config["num_hidden_layers"]) if i % period == offset]


_LISTED_KINDS = ("layers_block_type", "hybrid_override_pattern")
"""Keys that list what each layer is, a word or a letter for each (Nemotron-3). Their number may then be left out."""


def _kinds_listed(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The key that lists the kinds of layers, and the list or the text; None where there is none."""
    return next(((key, config[key]) for key in _LISTED_KINDS if config.get(key) is not None), None)


def _layers_of_kind(config: dict[str, Any]) -> list[int]:
    kinds = _kinds_listed(config)
    return [] if kinds is None else [i for i, kind in enumerate(kinds[1]) if kind in ("moe", "E")]


def _llama_layers(config: dict[str, Any]) -> list[int]:
    layers, step = config["num_hidden_layers"], config.get("interleave_moe_layer_step") or 1
    listed = config.get("moe_layers")
    return [i for i in range(layers) if (i in listed if isinstance(listed, list) else (i + 1) % step == 0)]


def _ernie_layers(config: dict[str, Any]) -> list[int]:
    first, last, step = (
        default if (given := config.get(f"moe_layer_{key}")) is None else given
        for key, default in (("start_index", 1), ("end_index", -1), ("interval", 1))
    )
    layers = config["num_hidden_layers"]
    last = layers - 1 if last == -1 else last
    return [i for i in range(layers) if (i + 1) % step == 0 and first <= i <= last]


_SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class LanguagePart:
    """The language model of a model of several parts.

    Attributes:
        config: the entry of config.json that describes it.
        prefix: of its tensors in files, in the place of `model.`; the embedding's and the layers', not the head's.
        head: the head's name in files.
        whole: transformers has no class for the language model alone, so that all parts are built; names in files are
            then those of transformers' modules.
        model_type: transformers' own, where files may give another.
    """

    config: str = "text_config"
    prefix: str = "model.language_model."
    head: str = "lm_head"
    whole: bool = False
    model_type: str | None = None


@dataclass(frozen=True)
class Family:
    """Tensor and configuration names of one architecture.

    Attributes:
        architecture: as config.json names it.
        model_type: as config.json names it.
        title: of the models, for people.
        aliases: other names of the architecture.
        num_experts_key: E in config.json.
        intermediate_size_key: I of a routed expert in config.json.
        latent_size_key: H of a routed expert in config.json, where layers project states to another width for their
            experts; without the key, or where it is null, experts see states as they are.
        moe_layers: indices of the decoder layers that have routed experts, from config.json.
        layer_kinds: what `LAYER_KINDS_KEY` may call a layer.
        lists_layers: whether one of `_LISTED_KINDS` must be in config.json.
        experts: the experts within a decoder layer.
        served_experts: what vLLM calls them, where that is another name.
        projections: names of gate, up and down of one expert, or of up and down where it has no gate.
        stacked: names within a decoder layer of the matrices of all experts together, where files have no other form.
            Other files may have these too, with names after `fused_names`.
        transposed: whether stacked matrices may be [E, H, 2 I] and [E, I, H], as published files have them.
        interleaved: whether stacked matrices are [E, H, 2 I], columns of gate and up in turn, and [E, I, H], in files
            and in transformers' modules.
        module_transposed: whether transformers' modules hold stacked matrices as [E, H, 2 I] and [E, I, H], gate and up
            one behind the other.
        weighs_inputs: whether transformers calls the experts with the inputs of all tokens for every one of them, times
            the routing weights: zeros but for the one expert that a token has.
        bias: whether the experts have biases, beside stacked matrices and named after them.
        module_names: (in files, in transformers' modules) parts of names that differ.
        joined: (transformers' part of a name, parts in files): tensors of equal shapes, in one behind each other.
        module_experts: transformers' experts within a decoder layer.
        module_embedding: transformers' module of the embedding, within the decoder.
        module_tail: transformers' modules between the last layer and the head, in turn.
        hidden_act_key: the experts' activation in config.json; None: it is `hidden_act`.
        hidden_act: the experts' activation, of families whose config.json does not say it.
        optional_sizes: further keys of config.json that must be whole numbers above 0 where present.
        fixed: keys of config.json that must have this value where present; a tuple: one of several.
        required: further keys of config.json that must be there, since transformers' defaults are of another model.
        text: where a model of several parts keeps its language model.
        top_k_key: how many experts a token is routed to; transformers knows the family's own number without it.
        layer_outputs: values that transformers' decoder layers return; nothing but the first, hidden states, is used.
        shared_indexers: whether layers may use the tokens that the indexer of an earlier one chose.
        stored_base: how names of tensors in files begin, but for the head's, where `text` does not say it.
        stored_as: names in files of transformers' tensors, one by one, where no rule above gives them.
        unserved: why vLLM cannot serve it; None: nothing is known against it.
        built_by: the class of transformers that builds the model, where it is not the usual one.
        tested: how far, see `Tested`.
    """

    architecture: str
    model_type: str
    title: str
    num_experts_key: str
    intermediate_size_key: str
    moe_layers: Callable[[dict[str, Any]], list[int]]
    latent_size_key: str | None = None
    layer_kinds: tuple[str, ...] = LAYER_KINDS
    lists_layers: bool = False
    experts: str = "mlp.experts"
    served_experts: str | None = None
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    stacked: tuple[str, str] | None = None
    transposed: bool = False
    interleaved: bool = False
    module_transposed: bool = False
    weighs_inputs: bool = False
    bias: bool = False
    module_names: tuple[tuple[str, str], ...] = ()
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()
    module_experts: str = "mlp.experts"
    module_embedding: str = "embed_tokens"
    module_tail: tuple[str, ...] = ("norm",)
    hidden_act_key: str | None = "hidden_act"
    hidden_act: HiddenAct = HIDDEN_ACT
    optional_sizes: tuple[str, ...] = _SIZES
    fixed: tuple[tuple[str, Any], ...] = ()
    required: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    text: LanguagePart | None = None
    top_k_key: str = "num_experts_per_tok"
    layer_outputs: int = 1
    shared_indexers: bool = False
    stored_base: str | None = None
    stored_as: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    built_by: str | None = None
    unserved: str | None = None
    tested: Tested = "tokens"

    def top_k(self, config: Mapping[str, Any]) -> Any:
        """How many experts a token is routed to, as config.json says; one of them where it lists one for each layer."""
        found = config.get(self.top_k_key, 1)
        each = isinstance(found, list) and len(found) == config.get("num_hidden_layers")
        return found[0] if each and found.count(found[0]) == len(found) else found

    @property
    def gated(self) -> bool:
        """Whether experts have a gate."""
        return len(self.projections) == 3

    @property
    def fused_names(self) -> tuple[str, str]:
        """Names of the stacked matrices in transformers' experts module."""
        return FUSED_NAMES if self.gated else FUSED_WITHOUT_GATE

    @property
    def auto_class(self) -> str:
        """The class of transformers that builds the model, or its language model alone where it can."""
        usual = "AutoModelForImageTextToText" if self.text and self.text.whole else "AutoModelForCausalLM"
        return self.built_by or usual

    def built_part(self, config: Any) -> Any:
        """Of transformers' config of a whole model, or of its language model: the part for `auto_class`."""
        return config if self.text and self.text.whole else config.get_text_config()

    def decoder(self, layer: int) -> str:
        """Tensor prefix of a decoder layer."""
        return f"{self._base}layers.{layer}"

    def module_decoder(self, layer: int) -> str:
        """Name of a decoder layer in the model that transformers builds."""
        return f"{self.module_base}layers.{layer}"

    @property
    def module_base(self) -> str:
        """How the names of the language model begin in the model that transformers builds, but for the head's."""
        return self.text.prefix if self.text and self.text.whole else _MODULE_BASE

    @property
    def _base(self) -> str:
        """Prefix of the tensors of the language model, but for its head."""
        if self.stored_base is not None:
            return self.stored_base
        return self.text.prefix if self.text else _MODULE_BASE

    def stored_name(self, name: str) -> str:
        """The name in files of a parameter, or of a module, of the model that transformers builds."""
        if name in self.stored_as:
            return self.stored_as[name][0]
        for stored, module in self.module_names:
            name = name.replace(module, stored)
        if self.text is None or self.text.whole:
            return self._base + name.removeprefix(self.module_base) if name.startswith(self.module_base) else name
        if name.partition(".")[0] == "lm_head":
            return self.text.head + name.removeprefix("lm_head")
        return self._base + name.removeprefix(_MODULE_BASE)

    def stored_names(self, name: str) -> list[str]:
        """`stored_name`; several where files hold in parts what transformers joins (Kimi-Linear)."""
        if name in self.stored_as:
            return list(self.stored_as[name])
        name = self.stored_name(name)
        return next(
            ([name.replace(whole, part) for part in parts] for whole, parts in self.joined if whole in name), [name]
        )

    def describes(self, name: str) -> bool:
        """Whether a stored tensor should be one of transformers' language model; others are of other parts."""
        return self.text is None or name.startswith((self._base, f"{self.text.head}."))


_QWEN: dict[str, Any] = {
    "num_experts_key": "num_experts",
    "intermediate_size_key": "moe_intermediate_size",
    "moe_layers": _qwen_layers,
    "optional_sizes": (*_SIZES, "decoder_sparse_step"),
}
_DEEPSEEK: dict[str, Any] = {
    "num_experts_key": "n_routed_experts",
    "intermediate_size_key": "moe_intermediate_size",
    "moe_layers": _sparse_layers,
    "optional_sizes": (*(key for key in _SIZES if key != "head_dim"), "n_group", "topk_group"),
    "fixed": (("moe_layer_freq", 1),),
}
_SPARSE: dict[str, Any] = {
    "num_experts_key": "num_experts",
    "intermediate_size_key": "moe_intermediate_size",
    "moe_layers": _sparse_layers,
}
_ALL_SPARSE: dict[str, Any] = {
    "num_experts_key": "num_experts",
    "intermediate_size_key": "intermediate_size",
    "moe_layers": _all_layers,
}
_FIRST_DENSE: dict[str, Any] = _SPARSE | {"moe_layers": _all_but_the_first}
_BLOCK_SPARSE: dict[str, Any] = {
    "num_experts_key": "num_local_experts",
    "intermediate_size_key": "intermediate_size",
    "moe_layers": _all_layers,
    "experts": "block_sparse_moe.experts",
    "projections": ("w1", "w3", "w2"),
    "module_names": ((".block_sparse_moe.", ".mlp."),),
}
_GRANITE: dict[str, Any] = {
    "num_experts_key": "num_local_experts",
    "intermediate_size_key": "intermediate_size",
    "moe_layers": _all_layers,
    "experts": "block_sparse_moe.experts",
    "stacked": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "module_names": ((".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),),
    "module_experts": "block_sparse_moe.experts",
}
_GEMMA: dict[str, Any] = {
    "num_experts_key": "num_experts",
    "intermediate_size_key": "moe_intermediate_size",
    "moe_layers": _all_layers,
    "experts": "experts",
    "module_experts": "experts",
    "hidden_act_key": "hidden_activation",
    "top_k_key": "top_k_experts",
    "stacked": ("experts.gate_up_proj", "experts.down_proj"),
    # Layers that take keys and values, or inputs, of elsewhere are not streamed; the models with experts have none.
    "fixed": (
        ("enable_moe_block", True),
        ("num_kv_shared_layers", 0),
        ("hidden_size_per_layer_input", 0),
        ("use_bidirectional_attention", (None, "vision")),
    ),
    "required": ("top_k_experts", "enable_moe_block", "hidden_size_per_layer_input"),
}
_LLAMA4: dict[str, Any] = {
    "num_experts_key": "num_local_experts",
    "intermediate_size_key": "intermediate_size",
    "moe_layers": _llama_layers,
    "experts": "feed_forward.experts",
    "stacked": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    "transposed": True,
    "module_transposed": True,
    "weighs_inputs": True,
    "module_experts": "feed_forward.experts",
    "optional_sizes": (*_SIZES, "interleave_moe_layer_step", "intermediate_size_mlp"),
    # Of several experts a token would enter each with another weight.
    "fixed": (("num_experts_per_tok", 1),),
}
_FORGET_GATE = tuple(
    (f".self_attn.{part}", f".self_attn.forget_gate.{part}") for part in ("f_a_proj", "f_b_proj", "dt_bias", "A_log")
)
_JOINED_CONVOLUTION = ((".self_attn.conv1d.", tuple(f".self_attn.{part}_conv1d." for part in "qkv")),)
"""Names of linear attention in Kimi-Linear and GLM-5.3-Flash."""
_OWN_INDEXERS: tuple[tuple[str, Any], ...] = (("index_topk_freq", 1), ("index_topk_pattern", None))
"""Keys by which layers may share an indexer, which is not streamed."""
_STREAMS: dict[str, Any] = {
    "module_tail": ("hc_head", "norm"),
    "hidden_act_key": None,
    "hidden_act": "silu_clamp10",
    "tested": "transformers",
}
"""Of models with hyper-connections: a layer passes several hidden states of a token on."""
_CLAMPED_SILU = (("swiglu_limit", SILU_LIMIT), ("hidden_act", HIDDEN_ACT))
_SWIGLUOAI = (("swiglu_alpha", SWIGLU_ALPHA), ("swiglu_limit", SWIGLU_LIMIT))
"""Keys of models whose experts have that activation: the format knows no other constants."""

_DEEPSEEK_V4_NAMES = (
    ("embed.", "embed_tokens."),
    ("head.", "lm_head."),
    ("hc_head_", "hc_head.hc_"),
    (".attn.indexer.weights_proj.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (".attn.indexer.wq_b.", ".self_attn.compressor.indexer.q_b_proj."),
    (".attn.indexer.compressor.", ".self_attn.compressor.indexer."),
    (".attn.", ".self_attn."),
    (".wkv.", ".kv_proj."),
    (".wgate.", ".gate_proj."),
    ("compressor.norm.", "compressor.kv_norm."),
    ("compressor.ape", "compressor.position_bias"),
    (".wq_a.", ".q_a_proj."),
    (".wq_b.", ".q_b_proj."),
    (".q_norm.", ".q_a_norm."),
    (".wo_a.", ".o_a_proj."),
    (".wo_b.", ".o_b_proj."),
    (".attn_sink", ".sinks"),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".hc_attn_", ".attn_hc."),
    (".hc_ffn_", ".ffn_hc."),
    (".gate.bias", ".gate.e_score_correction_bias"),
    (".shared_experts.w1.", ".shared_experts.wgate."),
    (".shared_experts.w3.", ".shared_experts.up_proj."),
    (".shared_experts.w2.", ".shared_experts.down_proj."),
    (".ffn.", ".mlp."),
)
"""Names that DeepSeek-V4's files have in the place of transformers'. The gate of its shared experts becomes `.wgate.`
before it becomes theirs."""

FAMILIES: dict[str, Family] = {
    f.architecture: f
    for f in (
        Family("Qwen3MoeForCausalLM", "qwen3_moe", "Qwen3-MoE", **_QWEN),
        Family("Qwen2MoeForCausalLM", "qwen2_moe", "Qwen1.5-MoE, Qwen2-MoE", **_QWEN),
        Family("Qwen3NextForCausalLM", "qwen3_next", "Qwen3-Next", tested="bfloat16", **_QWEN),
        Family("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", "Qwen3.5, Qwen3.6 (text only)", tested="bfloat16", **_QWEN),
        Family(
            "Qwen3_5MoeForConditionalGeneration",
            "qwen3_5_moe",
            "Qwen3.5, Qwen3.6, Qwen3.8",
            text=LanguagePart(),
            tested="bfloat16",
            **_QWEN,
        ),
        Family("MixtralForCausalLM", "mixtral", "Mixtral", **_BLOCK_SPARSE),
        Family(
            "OlmoeForCausalLM",
            "olmoe",
            "OLMoE",
            **_ALL_SPARSE,
        ),
        Family("DeepseekV2ForCausalLM", "deepseek_v2", "DeepSeek-V2, V2-Lite", **_DEEPSEEK),
        Family("DeepseekV3ForCausalLM", "deepseek_v3", "DeepSeek-V3, R1, Kimi-K2", **_DEEPSEEK),
        Family("DeepseekV32ForCausalLM", "deepseek_v32", "DeepSeek-V3.2", tested="transformers", **_DEEPSEEK),
        Family(
            "DeepseekV4ForCausalLM",
            "deepseek_v4",
            "DeepSeek-V4-Flash, V4-Pro",
            num_experts_key="n_routed_experts",
            intermediate_size_key="moe_intermediate_size",
            moe_layers=_all_layers,
            layer_kinds=("hash_moe", "moe"),
            experts="ffn.experts",
            projections=("w1", "w3", "w2"),
            stored_base="",
            module_names=_DEEPSEEK_V4_NAMES,
            fixed=_CLAMPED_SILU,
            unserved="vLLM's loader of it takes no expert tensors but those of its own names",
            **_STREAMS,
        ),
        Family("Glm4MoeForCausalLM", "glm4_moe", "GLM-4.5 to GLM-4.7", **_DEEPSEEK),
        Family(
            "Glm4MoeLiteForCausalLM",
            "glm4_moe_lite",
            "GLM-4.7-Flash",
            **_DEEPSEEK | {"moe_layers": _all_but_the_first},
        ),
        Family(
            "GlmMoeDsaForCausalLM",
            "glm_moe_dsa",
            "GLM-5 to GLM-5.3",
            **_DEEPSEEK,
            layer_outputs=2,
            shared_indexers=True,
            tested="transformers",
        ),
        Family("SolarOpenForCausalLM", "solar_open", "Solar-Open", **_DEEPSEEK),
        Family(
            "MiniMaxM2ForCausalLM", "minimax_m2", "MiniMax-M2 to M2.7", **_BLOCK_SPARSE, served_experts="mlp.experts"
        ),
        Family(
            "HYV3ForCausalLM",
            "hy_v3",
            "Hy3",
            **_FIRST_DENSE,
            module_names=(
                (".mlp.router.gate.", ".mlp.gate."),
                (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
                (".mlp.shared_mlp.", ".mlp.shared_experts."),
            ),
        ),
        Family(
            "MiMoV2FlashForCausalLM",
            "mimo_v2_flash",
            "MiMo-V2-Flash",
            **_FIRST_DENSE | {"num_experts_key": "n_routed_experts"},
            module_names=((".self_attn.attention_sink_bias", ".self_attn.sinks"),),
        ),
        Family(
            "LagunaForCausalLM",
            "laguna",
            "Laguna",
            **_FIRST_DENSE,
            module_names=(
                (".mlp.experts.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
                (".mlp.shared_expert.", ".mlp.shared_experts."),
            ),
            fixed=(("moe_apply_router_weight_on_input", False),),
        ),
        Family(
            "ExaoneMoeForCausalLM",
            "exaone_moe",
            "K-EXAONE",
            **_FIRST_DENSE,
            aliases=("ExaoneMoEForCausalLM",),
            module_names=((".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
            fixed=(("swiglu_limits", None),),
        ),
        Family(
            "Lfm2MoeForCausalLM",
            "lfm2_moe",
            "LFM2-8B-A1B, LFM2.5-8B-A1B",
            **_SPARSE | {"moe_layers": _after_the_dense},
            required=("num_dense_layers",),
            experts="feed_forward.experts",
            projections=("w1", "w3", "w2"),
            module_experts="feed_forward.experts",
            module_tail=("embedding_norm",),
            hidden_act_key=None,
        ),
        Family(
            "JambaForCausalLM",
            "jamba",
            "Jamba 1.5 to 1.7",
            num_experts_key="num_experts",
            intermediate_size_key="intermediate_size",
            moe_layers=_every_so_many,
            experts="feed_forward.experts",
            module_experts="feed_forward.experts",
            module_tail=("final_layernorm",),
            optional_sizes=(*_SIZES, "expert_layer_period"),
            tested="transformers",
        ),
        Family("MellumForCausalLM", "mellum", "Mellum2", **_SPARSE),
        Family(
            "HunYuanMoEV1ForCausalLM",
            "hunyuan_v1_moe",
            "Hunyuan-A13B",
            **_ALL_SPARSE,
            top_k_key="moe_topk",
        ),
        Family(
            "Ernie4_5_MoeForCausalLM",
            "ernie4_5_moe",
            "ERNIE-4.5",
            num_experts_key="moe_num_experts",
            intermediate_size_key="moe_intermediate_size",
            moe_layers=_ernie_layers,
            module_names=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
            optional_sizes=(*_SIZES, "moe_layer_interval"),
            top_k_key="moe_k",
        ),
        Family("GraniteMoeForCausalLM", "granitemoe", "Granite 3, PowerMoE", **_GRANITE),
        Family("GraniteMoeSharedForCausalLM", "granitemoeshared", "Granite 3 with shared experts", **_GRANITE),
        Family(
            "GraniteMoeSWAForCausalLM",
            "granitemoe_swa",
            "Granite Swash",
            **_GRANITE
            | {
                "stacked": ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
                "module_names": (),
            },
        ),
        Family("GraniteMoeHybridForCausalLM", "granitemoehybrid", "Granite 4 H", **_GRANITE),
        Family(
            "AfmoeForCausalLM",
            "afmoe",
            "Trinity",
            **_SPARSE | {"moe_layers": _after_the_dense},
            required=("num_dense_layers",),
            fixed=(("score_func", "sigmoid"), ("route_norm", True)),
        ),
        Family(
            "Cohere2MoeForCausalLM",
            "cohere2_moe",
            "Command A+, North-Mini-Code",
            num_experts_key="num_experts",
            intermediate_size_key="intermediate_size",
            moe_layers=_sparse_layers,
        ),
        Family(
            "AXK1ForCausalLM",
            "axk1",
            "A.X-K1",
            **_DEEPSEEK,
            module_names=((".post_mlp_layernorm.", ".mlp.post_mlp_layernorm."),),
        ),
        Family(
            "FlexOlmoForCausalLM",
            "flex_olmo",
            "FlexOlmo",
            **_ALL_SPARSE,
        ),
        Family(
            "PhiMoEForCausalLM",
            "phimoe",
            "Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE",
            **_BLOCK_SPARSE
            | {"module_names": ((".block_sparse_moe.gate.", ".mlp.router."), (".block_sparse_moe.", ".mlp."))},
            aliases=("PhimoeForCausalLM",),
        ),
        Family("Dots1ForCausalLM", "dots1", "dots.llm1", **_DEEPSEEK),
        Family(
            "NemotronHForCausalLM",
            "nemotron_h",
            "Nemotron-3 Nano, Super, Ultra",
            num_experts_key="n_routed_experts",
            intermediate_size_key="moe_intermediate_size",
            latent_size_key=LATENT_SIZE_KEYS[0],
            moe_layers=_layers_of_kind,
            lists_layers=True,
            stored_base="backbone.",
            experts="mixer.experts",
            projections=("up_proj", "down_proj"),
            module_experts="mixer.experts",
            module_embedding="embeddings",
            module_tail=("norm_f",),
            hidden_act_key="mlp_hidden_act",
            optional_sizes=(*_SIZES, *LATENT_SIZE_KEYS, "n_group", "topk_group"),
            tested="transformers",
        ),
        Family(
            "KimiLinearForCausalLM",
            "kimi_linear",
            "Kimi-Linear",
            **_BLOCK_SPARSE
            | {
                "intermediate_size_key": "moe_intermediate_size",
                "moe_layers": _all_but_the_first,
                "module_names": (
                    # The dense first layer is called .mlp. in files too.
                    *(
                        (f".block_sparse_moe.{part}.", f".mlp.{part}.")
                        for part in ("gate", "experts", "shared_experts")
                    ),
                    *_FORGET_GATE,
                ),
            },
            top_k_key="num_experts_per_token",
            fixed=(("moe_layer_freq", 1), ("moe_router_activation_func", "sigmoid")),
            joined=_JOINED_CONVOLUTION,
            tested="transformers",
        ),
        Family(
            "AXK2ForCausalLM",
            "axk2",
            "A.X-K2",
            **_DEEPSEEK,
            module_names=(
                (".self_attn.q_b_proj", ".self_attn.q_gate_proj"),
                (".W_down", ".mlp.fc1"),
                (".W_up", ".mlp.fc2"),
            ),
            tested="transformers",
        ),
        Family(
            "KimiK25ForConditionalGeneration",
            "kimi_k25",
            "Kimi-K2.5 to K2.7",
            **_DEEPSEEK,
            aliases=("Kimi_K25ForConditionalGeneration",),
            text=LanguagePart(prefix="language_model.model.", head="language_model.lm_head"),
            tested="tokens",
        ),
        Family(
            "MiniMaxForCausalLM", "minimax", "MiniMax-Text-01-hf, MiniMax-M1-hf", **_BLOCK_SPARSE, tested="transformers"
        ),
        Family("Gemma4ForCausalLM", "gemma4_text", "Gemma 4 (text only)", **_GEMMA),
        Family("Gemma4ForConditionalGeneration", "gemma4", "Gemma 4", **_GEMMA, text=LanguagePart()),
        Family(
            "Qwen3VLMoeForConditionalGeneration",
            "qwen3_vl_moe",
            "Qwen3-VL",
            **_QWEN,
            text=LanguagePart(whole=True),
            stacked=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            transposed=True,
            tested="tokens",
        ),
        Family(
            "GptOssForCausalLM",
            "gpt_oss",
            "gpt-oss",
            num_experts_key="num_local_experts",
            intermediate_size_key="intermediate_size",
            moe_layers=_all_layers,
            stacked=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            interleaved=True,
            bias=True,
            hidden_act_key=None,
            hidden_act="swigluoai",
            fixed=_SWIGLUOAI,
        ),
        Family(
            "MiniMaxM3SparseForConditionalGeneration",
            "minimax_m3_vl",
            "MiniMax-M3",
            **_BLOCK_SPARSE
            | {
                "moe_layers": _listed_layers,
                "module_names": (
                    (".block_sparse_moe.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
                    # A dense layer's MLP is called .mlp. in files too.
                    *(
                        (f".block_sparse_moe.{part}.", f".mlp.{part}.")
                        for part in ("gate", "experts", "shared_experts")
                    ),
                    *(
                        (f".self_attn.index_{part}.", f".self_attn.indexer.{part}.")
                        for part in ("q_proj", "k_proj", "q_norm", "k_norm")
                    ),
                ),
            },
            joined=((".gate_up_proj.", (".gate_proj.", ".up_proj.")),),
            hidden_act_key=None,
            hidden_act="swigluoai",
            fixed=(
                *_SWIGLUOAI,
                ("swiglu_beta", 1.0),
                ("hidden_act", ("swigluoai", "silu")),
                ("n_shared_experts", 1),
                ("scoring_func", "sigmoid"),
                ("use_gemma_norm", True),
                ("qk_norm_type", "per_head"),
                ("attention_output_gate", False),
            ),
            text=LanguagePart(
                prefix="language_model.model.", head="language_model.lm_head", model_type="minimax_m3_vl_text"
            ),
            tested="transformers",
        ),
        Family(
            "Glm5NextForConditionalGeneration",
            "glm5_next",
            "GLM-5.3-Flash",
            **_DEEPSEEK | _STREAMS | {"fixed": (*_DEEPSEEK["fixed"], *_CLAMPED_SILU, *_OWN_INDEXERS)},
            text=LanguagePart(whole=True),
            module_names=(
                (".hc_attn_", ".attn_hc."),
                (".hc_ffn_", ".ffn_hc."),
                *_FORGET_GATE,
            ),
            joined=_JOINED_CONVOLUTION,
            layer_outputs=2,
        ),
        Family("Llama4ForCausalLM", "llama4_text", "Llama 4 (text only)", **_LLAMA4),
        Family(
            "Llama4ForConditionalGeneration",
            "llama4",
            "Llama 4 Scout, Maverick",
            **_LLAMA4,
            text=LanguagePart(prefix="language_model.model.", head="language_model.lm_head"),
        ),
        Family(
            "Glm4vMoeForConditionalGeneration",
            "glm4v_moe",
            "GLM-4.5V, GLM-4.6V",
            **_DEEPSEEK,
            text=LanguagePart(whole=True),
            tested="tokens",
        ),
    )
}

_BY_NAME = FAMILIES | {alias: f for f in FAMILIES.values() for alias in f.aliases}

_TABLES = "tables of n-grams in its layers are larger than memory, and are not streamed here"
_CLAMPED = "its layers clamp what their experts multiply at different limits, which the checkpoint format does not hold"
_NO_CLASS = "transformers has no class of its own for it, and its remote code is not run"
_PARTS = "it is a model of several parts that nobody has described here yet"

REFUSED = {
    **dict.fromkeys(("NemotronH_Omni_Reasoning_V3", "NemotronH_Nano_Omni_Reasoning_V3"), _PARTS),
    **dict.fromkeys(("NemotronH_Super_Omni_Reasoning_V3", "NemotronH_Nano_VL_V2"), _PARTS),
    **dict.fromkeys(("DeepseekV4ForConditionalGeneration", "DeepseekV41ForCausalLM"), _NO_CLASS),
    **dict.fromkeys(("Qwen4ExpForConditionalGeneration", "Qwen4ExpForCausalLM"), _TABLES),
    "MiniMaxM3SparseForCausalLM": "it is published as MiniMaxM3SparseForConditionalGeneration",
    **dict.fromkeys(("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"), _CLAMPED),
    "LongcatFlashForCausalLM": (
        "some of its experts are the identity, and transformers holds a gate and an up for these too, but no down: no "
        "files of such a form were at hand"
    ),
    "Ernie4_5_VLMoeForConditionalGeneration": "its layers have two groups of experts of different sizes",
    "Qwen3OmniMoeForConditionalGeneration": (
        "its language model lies two parts deep; the thinker alone, as transformers' "
        "Qwen3OmniMoeThinkerForConditionalGeneration saves it, was tried and is quantized"
    ),
    "AriaForConditionalGeneration": _PARTS,
    "InklingForConditionalGeneration": _PARTS,
    **dict.fromkeys(("BailingMoeForCausalLM", "BailingMoeV2ForCausalLM", "BailingMoeV2_5ForCausalLM"), _NO_CLASS),
    **dict.fromkeys(("BailingMoeV3ForCausalLM", "KimiK3ForConditionalGeneration", "SarvamMoEForCausalLM"), _NO_CLASS),
    **dict.fromkeys(("PanguProMoEV2ForCausalLM", "PanguUltraMoEForCausalLM", "Param2MoEForCausalLM"), _NO_CLASS),
    **dict.fromkeys(("MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM"), "use its repository that ends in -hf"),
    **dict.fromkeys(("Step3TextForCausalLM", "MiMoV2ForCausalLM", "DeepseekForCausalLM"), _NO_CLASS),
}
"""MoE architectures that were looked at, and why they cannot be quantized."""


@dataclass(frozen=True)
class MoEShape:
    """Where a model's routed experts are and how large: E experts of gate, up [I, H] and down [H, I], or of no gate.

    H, `hidden_size`, is the width that experts see. It is the model's own where `Family.latent_size_key` names none. E,
    `num_experts`, is the most of any layer; `layer_experts` is that of each of the layers, where they differ.
    """

    family: Family
    layers: tuple[int, ...]
    num_experts: int
    hidden_size: int
    intermediate_size: int
    hidden_act: HiddenAct = HIDDEN_ACT
    layer_experts: tuple[int, ...] | None = None

    def of_layer(self, layer: int) -> "MoEShape":
        """The experts of one decoder layer alone."""
        each = self.layer_experts
        experts = self.num_experts if each is None else each[self.layers.index(layer)]
        return replace(self, layers=(layer,), num_experts=experts, layer_experts=None)

    @property
    def total_experts(self) -> int:
        """Routed experts of all layers."""
        return len(self.layers) * self.num_experts if self.layer_experts is None else sum(self.layer_experts)

    def prefix(self, layer: int) -> str:
        """Tensor prefix of the experts of one decoder layer."""
        return f"{self.family.decoder(layer)}.{self.family.experts}"

    @property
    def input_matrices(self) -> int:
        """How many matrices of an expert read its input: 2, gate and up, or 1, up alone."""
        return input_matrices(self.hidden_act)

    @property
    def matrix_sizes(self) -> list[tuple[int, int]]:
        """[N, K] of the matrices of one expert, in the order of `expert_names`."""
        inner, hidden = self.intermediate_size, self.hidden_size
        return [(inner, hidden)] * self.input_matrices + [(hidden, inner)]

    def expert_names(self, layer: int, expert: int) -> tuple[str, ...]:
        """Names of gate, up and down of one expert, or of up and down, per-expert form."""
        return tuple(f"{self.prefix(layer)}.{expert}.{n}.weight" for n in self.family.projections)

    def fused_names(self, layer: int) -> tuple[str, str]:
        """Names of the stacked matrices of a layer's experts."""
        names = self.family.stacked or tuple(f"{self.family.experts}.{name}" for name in self.family.fused_names)
        gate_up, down = (f"{self.family.decoder(layer)}.{name}" for name in names)
        return gate_up, down

    def is_expert_tensor(self, name: str) -> bool:
        """Whether a stored tensor belongs to routed experts."""
        start = name.find(f".{self.family.experts}.")
        own = start >= 0 and name[: start + 1 + len(self.family.experts)] in self._prefixes
        beside = name.endswith(self._beside_experts) or name in self._named_apart
        return (own and not beside) or name in self._stacked

    @cached_property
    def _named_apart(self) -> frozenset[str]:
        return frozenset(name for names in self.family.stored_as.values() for name in names)

    @cached_property
    def _beside_experts(self) -> tuple[str, ...]:
        """Ends of names that begin like those of experts, but are of the router (Laguna)."""
        return tuple(stored for stored, _ in self.family.module_names if stored.startswith(f".{self.family.experts}."))

    @cached_property
    def _prefixes(self) -> frozenset[str]:
        return frozenset(map(self.prefix, self.layers))

    @cached_property
    def _stacked(self) -> frozenset[str]:
        """Names of stacked matrices of experts that do not begin like those of experts (Granite)."""
        return (
            frozenset(name for i in self.layers for name in self.fused_names(i)) if self.family.stacked else frozenset()
        )

    @property
    def weights_per_expert(self) -> int:
        """Weights of one expert: 3 H I, or 2 H I without a gate."""
        return (1 + self.input_matrices) * self.hidden_size * self.intermediate_size

    @property
    def num_weights(self) -> int:
        """Weights in all routed experts."""
        return self.total_experts * self.weights_per_expert

    def expert_faults(self, model: Any) -> list[str]:
        """Routed experts of transformers' model that are not those of this shape.

        Args:
            model: transformers' language model; its tensors may be without memory.
        """
        H, I = self.hidden_size, self.intermediate_size  # noqa: E741
        N, names = self.input_matrices * I, self.family.fused_names
        turned = self.family.interleaved or self.family.module_transposed
        sizes = [(H, N), (I, H)] if turned else [(N, H), (H, I)]
        every = [*sizes, *([(N,), (H,)] if self.family.bias else [])]
        expected = {
            f"{i}.{self.family.module_experts}": [(self.of_layer(i).num_experts, *size) for size in every]
            for i in self.layers
        }
        found = {
            name: [tuple(own[part].shape) for part in (*names, *map(bias_name, names)) if part in own]
            for name, module in decoder_of(model).layers.named_modules()
            if (own := dict(module.named_parameters(recurse=False))).keys() >= set(names)
        }
        return [
            f"decoder layer {name}: matrices of {found.get(name, 'no experts')}, where "
            f"{expected.get(name, 'no experts')} was read from config.json"
            for name in sorted(found.keys() | expected.keys(), key=lambda name: int(name.partition(".")[0]))
            if found.get(name) != expected.get(name)
        ]

    def needed_tensors(self, model: Any) -> set[str]:
        """Names in files of the tensors outside the routed experts that must be there: of tied ones, the first.

        Args:
            model: transformers' model; its tensors may be without memory.
        """
        kept = (stored for name, _ in kept_tensors(model) for stored in self.family.stored_names(name))
        return {name for name in kept if not self.is_expert_tensor(name)}

    def other_faults(self, model: Any, specs: Mapping[str, TensorSpec]) -> list[str]:
        """Faults of the tensors outside the routed experts: missing, misshapen, or codes in the place of weights.

        Args:
            model: transformers' model; its tensors may be without memory.
            specs: the file's tensors.
        """
        faults = []
        needed, known = self.needed_tensors(model), self._model_tensors(model)
        for name, tensor in known.items():
            shape = tuple(tensor.shape)
            if self.is_expert_tensor(name):
                continue
            if (found := specs.get(name)) is None:
                if name in needed:  # a tied one need not be there, but counts if it is
                    faults.append(f"tensor {name} is missing (expected shape {list(shape)})")
            elif found.shape != shape:
                faults.append(f"tensor {name} is {found}, but the model needs shape {list(shape)}")
            elif tensor.is_floating_point() and found.dtype not in WEIGHT_DTYPES:
                faults.append(f"tensor {name} is {found}: {_CODES}")
        modules = {name.rpartition(".")[0] for name in known}
        for name in self._unread(known, specs):
            module, _, part = name.rpartition(".")
            if "lora_A" in name.split(".") or "base_layer" in name.split("."):
                faults.append(f"tensor {name} belongs to a LoRA adapter: merge it into the model first")
            elif module in modules and part.startswith(_CODE_PARTS):
                faults.append(f"tensor {name} lies beside {module}: {_CODES}")
            elif len(specs[name].shape) > 1 and specs[name].dtype in _CODE_DTYPES:  # of a part that is only copied, say
                faults.append(f"tensor {name} is {specs[name]}: {_CODES}")
        return faults

    def ignored(self, model: Any, specs: Mapping[str, TensorSpec]) -> list[str]:
        """Tensors that the model does not read, such as a bias that config.json rules out.

        Layers for multi-token prediction are left out: they are known to be there for others.
        """
        layers = decoder_of(model).config.num_hidden_layers
        return [
            name
            for name in self._unread(self._model_tensors(model), specs)
            if self.family.describes(name)
            and not name.startswith("mtp.")
            and not ((number := _LAYER_NUMBER.match(name)) and int(number[1]) >= layers)
        ]

    def _model_tensors(self, model: Any) -> dict[str, Any]:
        """All tensors of transformers' model, tied ones too, by their names in files."""
        found = ((self.family.stored_names(name), whole) for name, whole in model.state_dict(keep_vars=True).items())
        return {name: part for names, whole in found for name, part in zip(names, whole.chunk(len(names)), strict=True)}

    def _unread(self, known: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> list[str]:
        """Stored tensors outside the routed experts that the model does not have, in order of names."""
        return sorted(name for name in specs.keys() - known.keys() if not self.is_expert_tensor(name))


def stored_prefix(served: str, stored: Collection[str]) -> str:
    """The prefix in files of the experts that vLLM calls `served`, of those stored; `served` itself where none is."""
    if served in stored:
        return served
    for family in FAMILIES.values():
        if family.served_experts and served.endswith(end := f".{family.served_experts}"):
            candidate = f"{served.removesuffix(end)}.{family.experts}"
            if candidate in stored:
                return candidate
    return served


def bias_name(stacked: str) -> str:
    """Name of the biases that lie beside stacked matrices."""
    return f"{stacked}_bias"


def decoder_of(model: Any) -> Any:
    """The decoder of transformers' model, which some take for the model itself (Llama 4)."""
    found = model.get_decoder()
    return found if hasattr(found, "layers") else getattr(found, "model", found)


def kept_tensors(module: Any) -> list[tuple[str, Any]]:
    """Parameters and those buffers that belong in files, of a torch module; tied ones once, under the first name."""
    own = module.state_dict(keep_vars=True)
    return list({id(tensor): (name, tensor) for name, tensor in reversed(own.items())}.values())[::-1]


def named_architectures(config: Mapping[str, Any]) -> list[str]:
    """The architectures that config.json names."""
    architectures = config.get("architectures")
    return [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []


def _family(config: Mapping[str, Any]) -> Family | None:
    return next((_BY_NAME[a] for a in named_architectures(config) if a in _BY_NAME), None)


def text_part(config: Mapping[str, Any]) -> LanguagePart | None:
    """Where a model of several parts keeps its language model; outside the table, in `text_config` if anywhere."""
    if family := _family(config):
        return family.text
    usual = LanguagePart(whole=True)
    return usual if isinstance(config.get(usual.config), Mapping) else None


def why_not_served(config: Mapping[str, Any]) -> str | None:
    """Why vLLM is not known to serve a model; None where nothing is known against it."""
    family = _family(config)
    return "nobody has tested this architecture" if family is None else family.unserved


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the language model: all of it, or the entry of a model of several parts."""
    text = text_part(config)
    part = config.get(text.config) if text else config
    if not isinstance(part, Mapping):
        return {}
    found = {**part, "model_type": text.model_type} if text and text.model_type else dict(part)
    if (kinds := _kinds_listed(found)) and isinstance(kinds[1], (list, str)):
        found.setdefault("num_hidden_layers", len(kinds[1]))
    return found


def built_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the part that transformers builds: the language model, or what it cannot be parted from.

    Most keys of the language model are in `language_config`.
    """
    text = text_part(config)
    found = dict(config) if text and text.whole else language_config(config)
    named = found.get("model_type")
    return found | {"model_type": MODEL_TYPES[named]} if isinstance(named, str) and named in MODEL_TYPES else found


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model in 16 bits, for one that is published otherwise."""
    key, text = "quantization_config", text_part(config)
    kept = {name: value for name, value in config.items() if name not in (key, "expert_dtype")}
    if text and key in (part := language_config(config)):
        kept[text.config] = {name: value for name, value in part.items() if name != key}
    return kept


def _names_experts(config: Mapping[str, Any]) -> bool:
    """Whether config.json, or an entry of it, has keys of experts."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return any("expert" in key for part in parts for key in part)


def in_table(config: Mapping[str, Any], subject: str) -> bool:
    """Whether the table knows the architecture of a MoE model.

    Raises:
        BitsmoeError: not a MoE model, or an architecture of `REFUSED`.
    """
    named = named_architectures(config)
    if _family(config) is not None:
        return True
    shown = f"{named!s:.200}"
    if not (REFUSED.keys() & named or _names_experts(config)):
        raise BitsmoeError(
            f"{subject}: {shown if named else 'a config without architectures'} is not a Mixture-of-Experts model "
            f"(its config names no experts); bitsmoe quantizes routed experts only. Supported: {_known()}"
        )
    if why := next((REFUSED[a] for a in named if a in REFUSED), None):
        raise BitsmoeError(f"{subject}: architecture {shown} is not supported: {why}")
    return False


def _known() -> str:
    return ", ".join(sorted(FAMILIES))


def moe_shape(config: dict[str, Any], subject: str) -> MoEShape:
    """Find a model's experts from its config.json and the table.

    Raises:
        BitsmoeError: not a MoE model, or an architecture outside the table.
    """
    family = _family(config) if in_table(config, subject) else None
    if family is None:
        shown = f"{named_architectures(config)!s:.200}"
        raise BitsmoeError(f"{subject}: architecture {shown} is not supported. Supported: {_known()}")
    if family.text and not language_config(config):
        raise BitsmoeError(f"{subject}: config.json lacks {family.text.config}, which describes the language model")
    model_type, config = config.get("model_type", family.model_type), language_config(config)
    # transformers 5 may save the number of experts under another family's name.
    counts = [k for k in EXPERT_COUNT_KEYS if k in config] or [family.num_experts_key]
    sizes = (*counts, family.intermediate_size_key, "hidden_size", "num_hidden_layers", "vocab_size")
    if all(key in config and config[key] in (None, 0) for key in counts):
        raise BitsmoeError(
            f"{subject}: is not a Mixture-of-Experts model ({counts[0]} is {config[counts[0]]!r}); bitsmoe quantizes "
            "routed experts only"
        )
    named_too = (*([family.hidden_act_key] if family.hidden_act_key else []), *family.required, "model_type")
    sizes_and_kinds = (*sizes, *named_too)
    if missing := [k for k in sizes_and_kinds if k not in config]:
        where = f"{family.text.config} of config.json" if family.text else "config.json"
        raise BitsmoeError(f"{subject}: {where} lacks {missing}")
    most = {"num_hidden_layers": MAX_LAYERS}
    faults = [
        f"{key} is {config[key]!r:.80}, but must be a whole number above 0, at most {most.get(key, MAX_SIZE)}"
        for key in (*sizes, *(k for k in family.optional_sizes if config.get(k) is not None))
        if type(config[key]) is not int or not 1 <= config[key] <= most.get(key, MAX_SIZE)
    ]
    dense = config.get("mlp_only_layers")
    if dense is not None and not (isinstance(dense, list) and all(type(i) is int for i in dense)):
        faults.append(f"mlp_only_layers is {dense!r:.80}, but must be a list of layer numbers")
    faults += [
        f"{key} is {found!r:.80}, but must be a whole number, {least} or more"
        for key, least in _LAYER_BOUNDS.items()
        if (found := config.get(key)) is not None and (type(found) is not int or found < least)
    ]
    faults += _layer_kind_faults(config, family.layer_kinds)
    faults += _listed_layer_faults(config) if family.lists_layers else []
    faults += [
        f"{key} is {config[key]!r}, but {counts[0]} {config[counts[0]]!r}"
        for key in counts[1:]
        if config[key] != config[counts[0]]
    ]
    if (key := family.top_k_key) in config:
        top_k, most_experts = family.top_k(config), config[counts[0]]
        if type(top_k) is not int or top_k < 1 or (type(most_experts) is int and top_k > most_experts):
            faults.append(
                f"{key} is {top_k!r:.80}, but must be a whole number from 1 to {counts[0]}, "
                f"which is {most_experts!r:.80}"
            )
    scaling = config.get("routed_scaling_factor")
    if (
        scaling is not None
        and scaling is not False
        and not (type(scaling) in (int, float) and 0 < scaling <= MAX_SCALING)
    ):
        faults.append(f"routed_scaling_factor is {scaling!r:.80}, but must be a number above 0, at most {MAX_SCALING}")
    groups, chosen = config.get("n_group"), config.get("topk_group")
    if type(groups) is int and type(config[counts[0]]) is int and groups > 0:
        if config[counts[0]] % groups:
            faults.append(f"n_group is {groups}, which does not divide {counts[0]}, {config[counts[0]]}")
        if type(chosen) is int and chosen > groups:
            faults.append(f"topk_group is {chosen}, more than n_group, {groups}")
    unsupported = [
        f"{key} is {config[key]!r:.80}, but only {' or '.join(map(repr, allowed))} is supported"
        for key, value in family.fixed
        if key in config and config[key] not in (allowed := value if isinstance(value, tuple) else (value,))
    ]
    hidden_act = config[family.hidden_act_key] if family.hidden_act_key else family.hidden_act
    named = [
        act
        for act in ACTIVATIONS
        if (act not in OWN_NAMES or act == family.hidden_act) and family.gated == (input_matrices(act) == 2)
    ]
    if hidden_act not in named:
        known = " or ".join(map(repr, named))
        unsupported.append(f"{family.hidden_act_key} is {hidden_act!r:.80}, but only {known} is supported")
    indexers = config.get("indexer_types")
    if family.shared_indexers:
        faults += _indexer_faults(config)
    elif isinstance(indexers, list) and any(kind != "full" for kind in indexers):
        unsupported.append("indexer_types lists layers that share the indexer of an earlier one")
    if model_type != family.model_type and MODEL_TYPES.get(str(model_type)) != family.model_type:
        unsupported.append(
            f"model_type is {model_type!r:.80}, but {family.architecture} is supported with {family.model_type!r}"
        )
    if faults:
        raise BitsmoeError(fault_list(f"{subject}: config.json cannot be right", faults + unsupported))
    if unsupported:
        raise BitsmoeError(fault_list(f"{subject}: this model is not supported", unsupported))
    layers = tuple(family.moe_layers(config))
    listed = config.get("moe_layer_freq")
    if isinstance(listed, list) and tuple(i for i, sparse in enumerate(listed) if sparse) != layers:
        raise BitsmoeError(f"{subject}: config.json cannot be right: moe_layer_freq lists other layers than {layers}")
    if not layers:
        raise BitsmoeError(f"{subject}: the model has no Mixture-of-Experts layers (config.json)")
    latent = config.get(family.latent_size_key) if family.latent_size_key else None
    seen = config["hidden_size"] if latent is None else latent
    return MoEShape(family, layers, config[counts[0]], seen, config[family.intermediate_size_key], hidden_act)


_LAYER_BOUNDS = {
    "first_k_dense_replace": 0, "num_dense_layers": 0, "expert_layer_offset": 0, "moe_layer_start_index": 0,
    "moe_layer_end_index": -1,
}  # fmt: skip
"""Keys of config.json that say which layers have experts, and their least values."""


def _layer_kind_faults(config: dict[str, Any], known: tuple[str, ...]) -> list[str]:
    """Faults of the listed kinds of layers. transformers and vLLM may read different keys, so these must agree."""
    kinds, layers, first = (config.get(k) for k in (LAYER_KINDS_KEY, "num_hidden_layers", "first_k_dense_replace"))
    if kinds is None or type(layers) is not int or layers > MAX_LAYERS:
        return []
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        named = " or ".join(map(repr, known))
        return [f"{LAYER_KINDS_KEY} is {kinds!r:.80}, but must list {named} for each of {layers} layers"]
    if type(first) is int and first >= 0 and kinds != ["dense"] * min(first, layers) + ["sparse"] * (layers - first):
        return [f"first_k_dense_replace is {first}, but {LAYER_KINDS_KEY} lists other layers"]
    return []


def _indexer_faults(config: dict[str, Any]) -> list[str]:
    """Faults of the keys that say which layers share an indexer. transformers reads the list first, vLLM never."""
    listed, pattern, layers = (config.get(k) for k in ("indexer_types", "index_topk_pattern", "num_hidden_layers"))
    period, offset = (
        default if (given := config.get(key)) is None else given
        for key, default in (("index_topk_freq", 1), ("index_skip_topk_offset", 2))
    )
    if type(layers) is not int or layers > MAX_LAYERS:
        return []
    if type(period) is not int or type(offset) is not int or period < 1:
        return [f"index_topk_freq and index_skip_topk_offset are {period!r:.80} and {offset!r:.80}: no whole numbers"]
    kinds = ["full" if max(i - offset + 1, 0) % period == 0 else "shared" for i in range(layers)]
    if pattern is not None:
        kinds = [{"F": "full", "S": "shared"}.get(kind, "") for kind in pattern] if isinstance(pattern, str) else []
        if len(kinds) != layers or not all(kinds):
            return [f"index_topk_pattern is {pattern!r:.80}, but must be a letter F or S for each of {layers} layers"]
    if listed is not None and listed != kinds:
        named = "index_topk_freq and index_skip_topk_offset" if pattern is None else "index_topk_pattern"
        return [f"indexer_types is {listed!r:.80}, but {named}, which vLLM reads, say {kinds!r:.80}"]
    if kinds[:1] == ["shared"]:
        return ["the first layer has no indexer to share (index_topk_pattern or index_skip_topk_offset)"]
    return []


def _listed_layer_faults(config: dict[str, Any]) -> list[str]:
    """Faults of the list of kinds of layers. transformers takes its length, whatever else says their number."""
    found, layers = _kinds_listed(config), config.get("num_hidden_layers")
    if found is None or type(layers) is not int:
        return [] if found else [f"{' and '.join(_LISTED_KINDS)} are missing: nothing says which layers have experts"]
    key, kinds = found
    if not isinstance(kinds, (list, str)) or len(kinds) != layers or not all(isinstance(kind, str) for kind in kinds):
        return [f"{key} is {kinds!r:.80}, but must list a kind for each of {layers} layers"]
    return []


def models_table() -> str:
    """The table as docs/quantizing.md shows it."""
    lines = ["| models | architecture | sizes of experts in config.json | tested |", "|---|---|---|---|"]
    for f in FAMILIES.values():
        sizes = f"`{f.num_experts_key}`, `{f.intermediate_size_key}`"
        lines.append(f"| {f.title} | `{f.architecture}` | {sizes} | {f.tested} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(models_table())
