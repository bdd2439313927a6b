"""The quantization method `bitsmoe` for transformers.

The loader of transformers reads the stored tensors into modules of this file. Routed experts stay in their stored form;
the torch reference computes them. Linear layers that are stored at 8 or 4 bits become ordinary ones after loading.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.checkpoint import WEIGHTS_KEY
from bitsmoe_kernels.format.linear_layers import DenseWeights, dequantize
from bitsmoe_kernels.format.schema import QUANT_METHOD, Layer, TensorSpec
from bitsmoe_kernels.models.families import Family, decoder_of
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from offline_quant.model.expert_files import module_tensors
from offline_quant.model.expert_inputs import called_for_all
from offline_quant.model.quantized import QuantizedModel, as_read

OLDEST = "5.5.3"
"""The oldest transformers that is supported: the first where the experts of a layer are one module."""
COMPARED_VALUES = 4096
"""Values of every loaded tensor that are compared with the file."""

logger = logging.getLogger(f"transformers.{__name__}")  # the level and format of transformers' messages


def register() -> None:
    """Register the method `bitsmoe` with transformers. Repeated calls do nothing.

    Raises:
        BitsmoeError: transformers is too old for methods of other packages.
    """
    from transformers.quantizers import auto

    if not hasattr(auto, "register_quantizer"):
        raise _too_old()
    if auto.AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD) is not BitsmoeQuantizer:
        auto.register_quantization_config(QUANT_METHOD)(BitsmoeConfig)
        auto.register_quantizer(QUANT_METHOD)(BitsmoeQuantizer)


def _too_old() -> BitsmoeError:
    return BitsmoeError(
        f"transformers {transformers.__version__} is too old to load bitsmoe checkpoints: "
        f"pip install 'transformers>={OLDEST}'"
    )


class BitsmoeConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint's config.json. It has no options of its own.

    Args:
        data: keys of that object.
    """

    def __init__(self, **data: Any):
        self.quant_method = QUANT_METHOD
        self.data = data

    def to_dict(self) -> dict[str, Any]:
        """The object in the checkpoint's config.json."""
        return copy.deepcopy({**self.data, "quant_method": QUANT_METHOD})


class _Stored(nn.Module):
    """A module that holds tensors in their stored dtypes, under their stored names.

    Args:
        plain: the ordinary module that it replaces, on the meta device.
        specs: stored tensors by name.
    """

    def __init__(self, plain: nn.Module, specs: Mapping[str, TensorSpec]):
        super().__init__()
        self._plain = (plain,)  # a tuple, so that it does not become a submodule
        self.names = tuple(specs)
        for name, spec in specs.items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: self.get_parameter(name) for name in self.names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Stored":
        # `.to(device)` of the model moves stored tensors; `.to(dtype)` must not round them.
        def move(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(move, recurse)

    def ordinary_weights(self) -> dict[str, Tensor]:
        """Dequantized parameters of the ordinary module by name, float32."""
        raise NotImplementedError

    def to_plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Dequantize to the ordinary module.

        Args:
            dtype: of its weights; None: the dtype of the model.

        Raises:
            BitsmoeError: accelerate keeps the stored tensors on a disk or on the CPU.
        """
        if any(tensor.is_meta for tensor in self.tensors.values()):
            raise BitsmoeError(
                "weights that device_map keeps on the CPU or a disk cannot be dequantized by transformers: give the "
                "model more memory (max_memory), or make an ordinary checkpoint with `bitsmoe dequantize`"
            )
        (plain,) = self._plain
        for name, weight in self.ordinary_weights().items():
            setattr(plain, name, nn.Parameter(weight.to(dtype or plain.get_parameter(name).dtype)))
        return plain.train(self.training)


class BitsmoeExperts(_Stored):
    """The routed experts of one layer, computed by the torch reference. Gradients pass to the inputs.

    Args:
        plain: module of transformers that it replaces.
        layer: schema of the stored experts.
        block_size: components that share a bit-width.
        family: the model's.
    """

    def __init__(self, plain: nn.Module, layer: Layer, block_size: int, family: Family):
        super().__init__(plain, layer.tensor_specs(block_size))
        self.layer, self.block_size, self.family = layer, block_size, family

    @property
    def weights(self) -> LayerWeights:
        """Input of the reference. Made at every access, since tensors may move between devices."""
        return LayerWeights(self.layer, self.block_size, self.tensors)

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """Weighted sum of the routed experts' outputs [..., H].

        Args:
            hidden_states: [..., H], T tokens in all; of a family that weighs inputs see `called_for_all`.
            routing: expert ids and their weights, [T, top_k] each; nothing of a family that weighs inputs.
        """
        if self.family.weighs_inputs:
            return called_for_all(self._routed, self.layer.num_experts)(hidden_states)
        return self._routed(hidden_states, *routing)

    def _routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return moe_forward(self.weights, flat, top_k_weights, top_k_index).view_as(hidden_states)

    def ordinary_weights(self) -> dict[str, Tensor]:
        """Dequantized parameters of transformers' module, float32."""
        return module_tensors(self.family, as_read(self.weights, range(self.layer.num_experts)))

    def extra_repr(self) -> str:
        """Shape and projections for `repr`."""
        E, H, I = self.layer.num_experts, self.layer.hidden_size, self.layer.intermediate_size  # noqa: E741
        return f"num_experts={E}, hidden_size={H}, intermediate_size={I}, projections={list(self.layer.projections)}"


class _StoredLinear(_Stored):
    """A linear layer stored at 8 or 4 bits. An ordinary one replaces it after loading."""

    def __init__(self, plain: nn.Linear, form: DenseWeights):
        super().__init__(plain, form.tensor_specs(plain.out_features, plain.in_features))
        self.form = form
        self.bias = plain.bias

    def ordinary_weights(self) -> dict[str, Tensor]:
        """Dequantized `weight` [N, K], float32, and the bias where there is one."""
        words, scale = self.tensors["weight_packed"], self.tensors["weight_scale"]
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"weight": dequantize(words, scale, self.form.num_bits), **bias}


class BitsmoeQuantizer(HfQuantizer):
    """Hooks that transformers calls during `from_pretrained`."""

    requires_calibration = True

    def __init__(self, quantization_config: BitsmoeConfig, **kwargs: Any):
        if not kwargs.get("pre_quantized", True):
            raise BitsmoeError("from_pretrained cannot quantize to bitsmoe: make a checkpoint with `bitsmoe quantize`")
        super().__init__(quantization_config, **kwargs)
        self._source: QuantizedModel | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check the version of transformers; the first hook.

        Raises:
            BitsmoeError: transformers is too old.
        """
        if Version(transformers.__version__) < Version(OLDEST):
            raise _too_old()

    def _without_note(self, config: Any) -> Any:
        """Remove the entry that stops a transformers without bitsmoe from loading the model. Returns the config."""
        if hasattr(config, WEIGHTS_KEY):
            delattr(config, WEIGHTS_KEY)
        return config

    # Hooks that get the config before files are looked for: one up to transformers 5.20, the other from 5.18 on.
    update_tp_plan = update_attn_implementation = _without_note

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Check the checkpoint, and replace modules whose tensors are stored in another form.

        Raises:
            BitsmoeError: lists every fault of the checkpoint, and every tensor that the model needs and does not get.
        """
        _refuse_parallel(model)
        if not checkpoint_files:
            raise BitsmoeError("a bitsmoe checkpoint is loaded from its directory or Hub name, not from a state_dict")
        with torch.device("cpu"):  # transformers makes new tensors on "meta" here
            source = self._source = QuantizedModel(Path(checkpoint_files[0]).parent)
        faults = _missing_tensors(model, source)
        for stored, path in _places(model, source).items():
            try:
                plain = model.get_submodule(path)
            except AttributeError:
                faults.append(f"{stored} is in the checkpoint, but not in the model that config.json and options make")
                continue
            model.set_submodule(path, _stored_module(source, stored, plain))
        if faults:
            raise BitsmoeError(fault_list(f"{source.directory}: does not fit transformers' model", faults))
        # During loading only. If it were true, renamed tensors would keep the dtype of the file.
        self.pre_quantized = False

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Compare what transformers loaded with the file, and make stored linear layers ordinary ones.

        Raises:
            BitsmoeError: lists tensors that differ from the file.
        """
        _refuse_parallel(model)
        self.pre_quantized = True
        source, self._source = self._source, None
        assert source is not None
        places = _places(model, source)
        if faults := [f for stored, path in places.items() for f in _faults(source, stored, model.get_submodule(path))]:
            raise BitsmoeError(
                fault_list(f"{source.directory}: transformers {transformers.__version__} loaded it wrongly", faults)
            )
        for path in places.values():
            module = model.get_submodule(path)
            module.requires_grad_(False)  # transformers' loader makes every floating-point tensor trainable
            if isinstance(module, _StoredLinear):
                model.set_submodule(path, module.to_plain())

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model.dequantize()`: replace stored experts with transformers' modules, one layer at a time."""
        for path, module in list(model.named_modules()):
            if isinstance(module, BitsmoeExperts):
                model.set_submodule(path, module.to_plain(dtype))
        # With these, save_pretrained would use the tensor names of the file instead of the ordinary ones.
        vars(model).pop("_weight_conversions", None)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` can write the quantized model: no, it would drop the entry that guards it."""
        logger.warning(
            "save_pretrained does not write bitsmoe checkpoints: copy the checkpoint's directory, or call "
            "model.dequantize() first and save an ordinary model"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model: yes, gradients pass through the experts."""
        return True


def _refuse_parallel(model: Any) -> None:
    if getattr(model.config, "distributed_config", None) is not None or getattr(model, "_tp_size", None) is not None:
        raise BitsmoeError(
            "transformers cannot divide bitsmoe experts among processes (tp_plan, tp_size, distributed_config): load "
            "without them, or serve with vLLM"
        )


def _places(model: Any, source: QuantizedModel) -> dict[str, str]:
    """Modules that are stored in another form: stored name to path in the model."""
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    # Of a model of several parts transformers builds all, or the language model alone.
    decoder = next(path for path, module in model.named_modules() if module is decoder_of(model))
    layers = f"{decoder}.layers".removeprefix(".")
    paths = {source.shape.prefix(i): f"{layers}.{i}.{source.shape.family.module_experts}" for i in source.shape.layers}
    for name in source.dense.matrices if source.dense else ():
        paths[name] = f"{base}{name.removeprefix('model.')}" if "." in name else name
    return {name: path for name, path in paths.items() if path != "lm_head" or hasattr(model, path)}


def _stored_module(source: QuantizedModel, stored: str, plain: nn.Module) -> _Stored:
    config = source.checkpoint.config
    if stored in config.layers:
        return BitsmoeExperts(plain, config.layers[stored], config.block_size, source.shape.family)
    assert source.dense is not None
    assert isinstance(plain, nn.Linear)
    return _StoredLinear(plain, source.dense.matrices[stored])


def _missing_tensors(model: Any, source: QuantizedModel) -> list[str]:
    """Tensors that the file lacks. Without this check transformers would initialize them at random."""
    family = source.shape.family
    with torch.device("meta"):
        whole = getattr(transformers, family.auto_class).from_config(family.built_part(model.config))
    for tied, kept in whole.all_tied_weights_keys.items():  # transformers ties them after loading
        path, _, name = tied.rpartition(".")
        setattr(whole.get_submodule(path), name, whole.get_parameter(kept))
    return source.shape.other_faults(whole, source.tensors.specs)


def _faults(source: QuantizedModel, stored: str, module: _Stored) -> list[str]:
    """Tensors of a module that differ from the file. Those that accelerate moved away are not compared."""
    faults = []
    for name, got in module.tensors.items():
        if got.is_meta:
            continue
        want = source.checkpoint.tensors.get(f"{stored}.{name}")
        loaded, in_file = TensorSpec(got.dtype, tuple(got.shape)), TensorSpec(want.dtype, tuple(want.shape))
        if loaded != in_file:
            faults.append(f"tensor {stored}.{name} is {loaded}, but {in_file} in the file")
        elif not torch.equal(*(t.flatten()[:COMPARED_VALUES].cpu() for t in (got, want))):
            faults.append(f"tensor {stored}.{name} has other values than in the file")
    return faults
