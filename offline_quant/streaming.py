"""Run a causal language model decoder layer by decoder layer, with one layer's weights in memory at a time.

The modules are transformers' own, built without memory ("meta") and filled from a checkpoint when their turn comes, in
float32. Calibration and evaluation both run on this, for ordinary and for quantized checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitsmoe_kernels.errors import BitsmoeError, fault_list
from bitsmoe_kernels.format.families import MODULE_EXPERTS, kept_tensors
from offline_quant.model_adapter import WeightSource
from offline_quant.statistics import LayerInputs

Arguments = list[dict[str, Any]]
"""What each decoder layer takes besides hidden states; layers of one kind share tensors."""
Batches = list[tuple[Tensor, Arguments]]
"""Hidden states [n, L, H] and the layers' arguments."""


class StreamedModel:
    """A model whose layers are filled on demand.

    Args:
        source: the weights.
        device: where layers run.
    """

    def __init__(self, source: WeightSource, device: str = "cpu"):
        self.source = source
        self.shape = source.shape
        self.device = torch.device(device)
        plain = {k: v for k, v in source.config.items() if k not in ("quantization_config", "torch_dtype", "dtype")}
        try:
            config = AutoConfig.for_model(**plain)
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as e:
            raise BitsmoeError(
                f"{source.directory}: transformers cannot build the model from config.json ({e})"
            ) from None
        self.decoder = self.model.get_decoder()
        self.num_layers = len(self.decoder.layers)
        self._place = {module: index for index, module in enumerate(self.decoder.layers)}
        self.vocabulary: int = self.decoder.embed_tokens.num_embeddings
        self._check_tensors()
        self._fill(self.decoder.embed_tokens, "model.embed_tokens")
        self._fill(self.decoder.norm, "model.norm")
        # Rotary tables are buffers computed at construction; "meta" left them empty.
        self.decoder.rotary_emb = type(self.decoder.rotary_emb)(config=config).to(self.device)

    def _check_tensors(self) -> None:
        """All tensors outside the routed experts, against the modules they go to. Tied ones count once."""
        if faults := self.shape.other_faults(self.model, self.source.tensors.specs):
            raise BitsmoeError(fault_list(f"{self.source.directory}: tensors do not fit config.json", faults))

    def check_ids(self, ids: Tensor) -> None:
        """Refuse token ids beyond the vocabulary.

        Raises:
            BitsmoeError: names the id and vocab_size.
        """
        if int(ids.max()) >= self.vocabulary:
            raise BitsmoeError(
                f"{self.source.directory}: the tokenizer gives token id {int(ids.max())}, but the model's vocab_size "
                f"is {self.vocabulary}; tokenizer and weights are not of one model"
            )

    def _fill(self, module: nn.Module, prefix: str, but: str | None = None) -> None:
        """Give a module its parameters and kept buffers from the checkpoint, but for those of one submodule."""
        for name, _ in kept_tensors(module):
            if but is None or not name.startswith(f"{but}."):
                stored = self.shape.family.stored_name(f"{prefix}.{name}")
                _assign(module, name, self.source.tensors.get(stored).to(self.device, torch.float32))

    @contextmanager
    def layer(self, index: int, experts: tuple[Tensor, Tensor] | None = None) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights, released afterwards.

        Args:
            index: which.
            experts: gate and up [E, 2 I, H] and down [E, H, I] to use instead of the checkpoint's.
        """
        module = self.decoder.layers[index]
        moe = index in self.shape.layers
        if moe:
            gate_up, down = experts or self.source.experts(index)
            holder = module.get_submodule(MODULE_EXPERTS)
            _assign(holder, "gate_up_proj", gate_up.to(self.device))
            _assign(holder, "down_proj", down.to(self.device))
        self._fill(module, self.shape.family.decoder(index), MODULE_EXPERTS if moe else None)
        try:
            yield module
        finally:
            for name, value in kept_tensors(module):
                _assign(module, name, torch.empty_like(value, device="meta"))

    @torch.no_grad()
    def embed(self, ids: Tensor) -> tuple[Tensor, Arguments]:
        """Hidden states [n, L, H] that enter the first layer, and the arguments every layer takes besides them.

        Raises:
            BitsmoeError: token ids beyond the model's vocabulary.
        """
        self.check_ids(ids)
        entered: list[Tensor] = []
        arguments: Arguments = []

        def catch(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            entered.append(hidden_states)
            arguments.append(kwargs)
            return hidden_states

        for module in self.decoder.layers:
            module.forward = catch
        try:
            self.decoder(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for module in self.decoder.layers:
                del module.forward
        return entered[0], arguments

    def embed_windows(self, windows: Tensor, batch_tokens: int) -> Batches:
        """`embed` of windows [n, L] in batches of about `batch_tokens`, hidden states on the CPU."""
        batches = []
        for ids in windows.split(max(1, batch_tokens // windows.shape[1])):
            hidden, arguments = self.embed(ids)
            batches.append((hidden.cpu(), arguments))
        return batches

    def run(self, module: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        """One decoder layer on [n, L, H], with gradients where they are enabled."""
        out = module(hidden.to(self.device), **arguments[self._place[module]])
        return out[0] if isinstance(out, tuple) else out

    def expert_inputs(self, module: nn.Module, batches: Batches) -> tuple[LayerInputs, Batches]:
        """What enters the routed experts of a decoder layer, and what leaves it without their share.

        The experts do not run: their output is added to what is returned later, which saves a second attention.

        Args:
            module: from `layer`.
            batches: hidden states [n, L, H] and layer arguments.

        Returns:
            The experts' inputs, and the layer's output with zeros from the experts, as the next layer's batches.
        """
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def catch(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            seen.append((x.reshape(-1, x.shape[-1]).float(), ids.long(), weights.float()))
            return torch.zeros_like(x)

        experts: Any = module.get_submodule(MODULE_EXPERTS)
        experts.forward = catch
        try:
            rest = self.through(module, batches)
        finally:
            del experts.forward
        return LayerInputs(*(torch.cat(parts) for parts in zip(*seen, strict=True))), rest

    @torch.no_grad()
    def through(self, module: nn.Module, batches: Batches) -> Batches:
        """`run` of every batch, results on the CPU."""
        return [(self.run(module, hidden, arguments).cpu(), arguments) for hidden, arguments in batches]

    @property
    def head(self) -> Tensor:
        """Output embedding [V, H], float32."""
        tied = self.source.config.get("tie_word_embeddings", False)
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return self.source.tensors.get(name).to(self.device, torch.float32)

    @torch.no_grad()
    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Logits [..., V] from what leaves the last layer; head as `self.head` returns it."""
        return self.decoder.norm(hidden.to(self.device)) @ head.T

    def materialize(self) -> nn.Module:
        """The whole model in memory, for generation."""
        for index in range(self.num_layers):
            with self.layer(index) as module:
                filled = dict(kept_tensors(module))
            for name, value in filled.items():
                _assign(module, name, value)
        _assign(self.model, "lm_head.weight", self.head)
        return self.model


def _assign(root: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    parent = root.get_submodule(path)
    if leaf in parent._buffers:
        parent._buffers[leaf] = value
    else:
        setattr(parent, leaf, nn.Parameter(value, requires_grad=False))
