"""How transformers loads a bitsmoe checkpoint: its loader reads the tensors as they are stored, into modules of ours.

The routed experts stay as they are stored and are computed by the reference. Linear layers outside them that are stored
at 8 or 4 bits become ordinary ones.
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
from bitsmoe_kernels.models.families import MODULE_EXPERTS
from bitsmoe_kernels.reference import LayerWeights, moe_forward
from offline_quant.model.quantized import QuantizedModel

OLDEST = "5.5.3"
"""transformers from which on a layer's experts are one module."""
COMPARED_VALUES = 4096
"""Of every loaded tensor that are compared with the file."""

logger = logging.getLogger(f"transformers.{__name__}")  # shown as transformers' own messages are


def register() -> None:
    """Put the method `bitsmoe` into transformers' list. May be called any number of times.

    Raises:
        BitsmoeError: a transformers that has no such list.
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
    """`quantization_config` of a checkpoint's config.json, as transformers carries it about. Has no options.

    Args:
        data: its keys.
    """

    def __init__(self, **data: Any):
        self.quant_method = QUANT_METHOD
        self.data = data

    def to_dict(self) -> dict[str, Any]:
        """JSON data, as the checkpoint has it."""
        return copy.deepcopy({**self.data, "quant_method": QUANT_METHOD})


class _Stored(nn.Module):
    """A module whose tensors are those of the file, in the file's dtypes, under the file's names.

    Args:
        plain: the ordinary module whose place it takes, without memory.
        specs: its tensors.
    """

    def __init__(self, plain: nn.Module, specs: Mapping[str, TensorSpec]):
        super().__init__()
        self._plain = (plain,)  # in a tuple, since it is no submodule
        self.names = tuple(specs)
        for name, spec in specs.items():
            empty = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: self.get_parameter(name) for name in self.names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Stored":
        # `.to(dtype)` of the model must not round what is stored; `.to(device)` moves it.
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def ordinary_weights(self) -> dict[str, Tensor]:
        """Parameters of the ordinary module by name, float32."""
        raise NotImplementedError

    def to_plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The ordinary module with the weights that are stored.

        Args:
            dtype: of the weights; None: the model's.

        Raises:
            BitsmoeError: accelerate has moved the tensors to a disk or to the CPU.
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
    """The routed experts of one layer, computed by the reference; gradients pass to its inputs.

    Args:
        plain: transformers' module for them.
        layer: how they are stored.
        block_size: G.
    """

    def __init__(self, plain: nn.Module, layer: Layer, block_size: int):
        super().__init__(plain, layer.tensor_specs(block_size))
        self.layer, self.block_size = layer, block_size

    @property
    def weights(self) -> LayerWeights:
        """The experts as the reference takes them; made anew, for tensors may have moved."""
        return LayerWeights(self.layer, self.block_size, self.tensors)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Routed experts' output [..., H] for hidden states [..., H], expert ids and their weights [T, top_k]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return moe_forward(self.weights, flat, top_k_weights, top_k_index).view_as(hidden_states)

    def ordinary_weights(self) -> dict[str, Tensor]:
        """See `_Stored`."""
        gate_up, down = self.weights.experts(range(self.layer.num_experts))
        return {"gate_up_proj": gate_up, "down_proj": down}

    def extra_repr(self) -> str:
        """What `repr` shows."""
        E, H, I = self.layer.num_experts, self.layer.hidden_size, self.layer.intermediate_size  # noqa: E741
        return f"num_experts={E}, hidden_size={H}, intermediate_size={I}, projections={list(self.layer.projections)}"


class _StoredLinear(_Stored):
    """A linear layer stored at 8 or 4 bits, until transformers has loaded its tensors."""

    def __init__(self, plain: nn.Linear, form: DenseWeights):
        super().__init__(plain, form.tensor_specs(plain.out_features, plain.in_features))
        self.form = form
        self.bias = plain.bias

    def ordinary_weights(self) -> dict[str, Tensor]:
        """See `_Stored`."""
        words, scale = self.tensors["weight_packed"], self.tensors["weight_scale"]
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"weight": dequantize(words, scale, self.form), **bias}


class BitsmoeQuantizer(HfQuantizer):
    """transformers calls its methods in the course of `from_pretrained`."""

    requires_calibration = True

    def __init__(self, quantization_config: BitsmoeConfig, **kwargs: Any):
        if not kwargs.get("pre_quantized", True):
            raise BitsmoeError("from_pretrained cannot quantize to bitsmoe: make a checkpoint with `bitsmoe quantize`")
        super().__init__(quantization_config, **kwargs)
        self._source: QuantizedModel | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called first.

        Raises:
            BitsmoeError: transformers is too old.
        """
        if Version(transformers.__version__) < Version(OLDEST):
            raise _too_old()

    def _without_note(self, config: Any) -> Any:
        """The model's config without the entry that keeps a transformers that does not know bitsmoe from loading it."""
        if hasattr(config, WEIGHTS_KEY):
            delattr(config, WEIGHTS_KEY)
        return config

    # The methods that see the config before files are looked for: up to transformers 5.20, and from 5.18 on.
    update_tp_plan = update_attn_implementation = _without_note

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Check the checkpoint, and put modules of ours where its tensors are stored in another form.

        Raises:
            BitsmoeError: lists every fault of the checkpoint, or what the model asks for and the checkpoint has not.
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
        # While it loads: otherwise tensors whose names it changes would keep the file's dtype, and not get the model's.
        self.pre_quantized = False

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Make sure that transformers loaded what is stored, and make stored linear layers ordinary ones.

        Raises:
            BitsmoeError: lists tensors that are not as the file has them.
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
        """`model.dequantize()`: transformers' own experts, with the weights that are stored, one layer at a time."""
        for path, module in list(model.named_modules()):
            if isinstance(module, BitsmoeExperts):
                model.set_submodule(path, module.to_plain(dtype))
        # By these save_pretrained would give tensors the names they had in the file; without, those of any such model.
        vars(model).pop("_weight_conversions", None)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` can write the quantized model: no, for it would leave out what guards it."""
        logger.warning(
            "save_pretrained does not write bitsmoe checkpoints: copy the checkpoint's directory, or call "
            "model.dequantize() first and save an ordinary model"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model: gradients pass through the experts to what is before them."""
        return True


def _refuse_parallel(model: Any) -> None:
    if getattr(model.config, "distributed_config", None) is not None or getattr(model, "_tp_size", None) is not None:
        raise BitsmoeError(
            "transformers cannot divide bitsmoe experts among processes (tp_plan, tp_size, distributed_config): load "
            "without them, or serve with vLLM"
        )


def _places(model: Any, source: QuantizedModel) -> dict[str, str]:
    """Stored name -> path in the model, of the modules that are not stored as transformers has them."""
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    decoder = source.shape.family.decoder
    names = {source.shape.prefix(i): f"{decoder(i)}.{MODULE_EXPERTS}" for i in source.shape.layers}
    names |= {name: name for name in (source.dense.matrices if source.dense else ())}
    paths = {name: f"{base}{path.removeprefix('model.')}" if "." in path else path for name, path in names.items()}
    return {name: path for name, path in paths.items() if path != "lm_head" or hasattr(model, path)}


def _stored_module(source: QuantizedModel, stored: str, plain: nn.Module) -> _Stored:
    config = source.checkpoint.config
    if stored in config.layers:
        return BitsmoeExperts(plain, config.layers[stored], config.block_size)
    assert source.dense is not None
    assert isinstance(plain, nn.Linear)
    return _StoredLinear(plain, source.dense.matrices[stored])


def _missing_tensors(model: Any, source: QuantizedModel) -> list[str]:
    """Faults of the tensors that transformers would otherwise make up at random."""
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(model.config)
    for tied, kept in whole.all_tied_weights_keys.items():  # transformers ties them when all is loaded
        path, _, name = tied.rpartition(".")
        setattr(whole.get_submodule(path), name, whole.get_parameter(kept))
    return source.shape.other_faults(whole, source.tensors.specs)


def _faults(source: QuantizedModel, stored: str, module: _Stored) -> list[str]:
    """What of a module's tensors is not in memory as the file has it; those that accelerate moved away are left out."""
    faults = []
    for name, got in module.tensors.items():
        if got.is_meta:
            continue
        want = source.checkpoint.tensors.get(f"{stored}.{name}")
        is_, in_file = TensorSpec(got.dtype, tuple(got.shape)), TensorSpec(want.dtype, tuple(want.shape))
        if is_ != in_file:
            faults.append(f"tensor {stored}.{name} is {is_}, but {in_file} in the file")
        elif not torch.equal(*(t.flatten()[:COMPARED_VALUES].cpu() for t in (got, want))):
            faults.append(f"tensor {stored}.{name} has other values than in the file")
    return faults
