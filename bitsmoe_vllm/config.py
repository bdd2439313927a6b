"""vLLM's view of a bitsmoe checkpoint: its quantization config, checked before the engine starts."""

import re
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.linear_layers import DenseConfig
from bitsmoe_kernels.format.schema import PARTS, PROJECTION_NAMES, QUANT_METHOD, CheckpointConfig, Layer
from bitsmoe_kernels.models.families import stored_prefix
from bitsmoe_vllm import _compat, startup
from bitsmoe_vllm.weight_loading import LayerLoader

_DRAFT_PREFIX = "draft_model."
"""What vLLM puts before the names of a draft model with a checkpoint of its own."""


class BitsmoeConfig(QuantizationConfig):
    """Built by vLLM from `quantization_config` of config.json; makes the method of every layer.

    Args:
        data: the `quantization_config`; None when the checkpoint has none.

    Raises:
        BitsmoeError: unsupported vLLM, no `quantization_config`, or one this version cannot serve.
    """

    def __init__(self, data: dict[str, Any] | None = None):
        super().__init__()
        _compat.check_vllm_version(own_classes)
        if data is None:
            raise BitsmoeError(
                "--quantization bitsmoe was given, but the model's config.json has no quantization_config: "
                "make a checkpoint with `bitsmoe quantize MODEL --out DIR` and serve DIR"
            )
        subject = "quantization_config of config.json"
        self.checkpoint = CheckpointConfig.parse(data, subject)
        self.dense: QuantizationConfig | None = None
        if (linear := self.checkpoint.linear_quantization) is not None:
            self.dense = _compat.linear_quantization(DenseConfig.parse(linear, subject))
        self.layers: dict[str, Layer] = dict(self.checkpoint.layers)
        self.loaders: list[LayerLoader] = []
        self.plain_experts: frozenset[str] | None = None
        """Experts that the checkpoint holds at 16 bits; None: not known, as it is not on this machine yet."""
        self._num_layers = 0
        self._options_checked = False

    @classmethod
    def get_name(cls) -> str:
        """Value of `--quantization`."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Values of `--dtype`."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BitsmoeConfig":
        """Build from `quantization_config`."""
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Called by vLLM for any quantized model, before it constructs its configuration: none is overridden."""
        if hf_quant_cfg.get("quant_method") == QUANT_METHOD:
            _compat.watch_configs(getattr(hf_config, "architectures", None) or ())

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called by vLLM once the model is known, before any worker starts: check all that can be checked by now.

        Raises:
            BitsmoeError: lists every fault of the checkpoint, or names the option that cannot work and the remedy.
        """
        pending = _compat.config_under_construction(hf_config)
        text_config = None if hf_config is None else hf_config.get_text_config()
        if text_config is not None:
            self._num_layers = getattr(text_config, "num_hidden_layers", 0)
            startup.check_model(self.checkpoint, text_config)
        weights = ""
        if pending is not None:
            startup.check_options(self.checkpoint, text_config, pending)
            self._options_checked = True
            if pending.load_config.load_format == "dummy":
                return
            weights = pending.model_config.model_weights
        if directory := startup.local_directory(model_name, revision, weights):
            self.plain_experts = startup.plain_experts(startup.check_checkpoint(directory, hf_config, pending))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Called by vLLM with the renaming from checkpoint to vLLM names."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        if self.plain_experts is not None:
            self.plain_experts = frozenset(hf_to_vllm_mapper.apply_list(sorted(self.plain_experts)))
        if self.dense is not None:
            self.dense.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Ours for routed experts; for linear layers what `linear_quantization` says; none (vLLM's default) for others.

        Raises:
            BitsmoeError: the checkpoint does not describe these experts, or an option cannot work with it.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if self.dense is not None and isinstance(layer, LinearBase | ParallelLMHead):
            # vLLM hands us the model's fused layers and what they are made of; its own method needs them as well.
            self.dense.packed_modules_mapping = self.packed_modules_mapping
            from bitsmoe_vllm import linear_kernel  # noqa: F401 - adds a kernel

            return self.dense.get_quant_method(layer, prefix)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        return None

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        from vllm.config import get_current_vllm_config

        from bitsmoe_vllm.moe_method import BitsmoeMoEMethod

        if not self._options_checked:  # the main process was not shown vLLM's configuration
            startup.check_options(self.checkpoint, None, get_current_vllm_config())
            self._options_checked = True
        name = stored_prefix(prefix.removeprefix(_DRAFT_PREFIX), self.layers)
        if name in self.layers:
            return BitsmoeMoEMethod(layer, name, self.layers[name], self.checkpoint.block_size, self.loaders)
        if self.plain_experts is None:
            plain = startup.is_draft_layer(name, self._num_layers)
        else:
            plain = name in self.plain_experts
        if plain:
            return None
        raise BitsmoeError(
            f"the model has routed experts at {prefix}, but quantization_config of config.json describes only "
            f"{', '.join(self.layers)}, and the checkpoint does not hold them at 16 bits either: "
            "quantize the whole model"
        )

    @staticmethod
    def get_cache_scale_mapper() -> Any:
        """Renaming vLLM applies to checkpoint names; carries our tensors to where vLLM keeps expert parameters."""
        from vllm.model_executor.models.utils import WeightsMapper

        ours = rf"\.experts\.((?:{'|'.join(PROJECTION_NAMES)})_(?:{'|'.join(PARTS)}))$"
        mapper = WeightsMapper(orig_to_new_regex={re.compile(ours): r".experts.routed_experts.\1"})
        return QuantizationConfig.get_cache_scale_mapper() | mapper

    def __getstate__(self) -> dict[str, Any]:
        # vLLM sends its configuration between processes; loaders belong to the process that loads.
        return {**self.__dict__, "loaders": []}


def own_classes() -> tuple[type, ...]:
    """The plugin's classes that vLLM calls."""
    from bitsmoe_vllm.linear_kernel import DequantizedLinearKernel
    from bitsmoe_vllm.moe_method import BitsmoeMoEMethod

    return BitsmoeConfig, BitsmoeMoEMethod, DequantizedLinearKernel
