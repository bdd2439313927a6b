"""What all steps of one layer work with: its weights, calibration moments, options and workers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch

from bitsmoe_kernels.models.families import MoEShape
from offline_quant.calibration.moments import LayerMoments, MeasuredExpert
from offline_quant.config import QuantizeConfig
from offline_quant.layer.cache import LayerCache
from offline_quant.model.expert_weights import ExpertWeights, OneExpert
from offline_quant.runtime.chunks import chunks_of, matrix_bytes
from offline_quant.runtime.distributed import Workers
from offline_quant.runtime.malloc import trim

Result = TypeVar("Result")


def _ignore(experts: int) -> None:
    pass


@dataclass(frozen=True)
class LayerContext:
    """One layer and what works on it.

    Attributes:
        load: loads experts of the layer.
        moments: of the layer's calibration inputs.
        shape: sizes of the layer's experts.
        config: options.
        prefix: the layer's tensor prefix, for messages.
        workers: processes that share the work.
        cache: keeps tensors between passes.
        chunk_share: bytes of a GPU's memory that a chunk may take in every process, see `chunks_of`; 0 on a CPU.
        on_progress: called after every chunk of every pass with its number of experts, see `pass_count`.
        sampled: chunks that stand for the layer, the first ones; None: all of them.
    """

    load: Callable[[range], ExpertWeights]
    moments: LayerMoments
    shape: MoEShape
    config: QuantizeConfig
    prefix: str
    workers: Workers = field(default_factory=Workers)
    cache: LayerCache = field(default_factory=LayerCache)
    chunk_share: int = 0
    on_progress: Callable[[int], None] = _ignore
    sampled: Sequence[range] | None = None

    @property
    def device(self) -> torch.device:
        """Where the layer is worked on."""
        return self.moments.inputs.x.device

    @cached_property
    def chunks(self) -> Sequence[range]:
        """Experts that are worked on together; all workers cut alike."""
        s = self.shape
        return self.sampled or chunks_of(s.num_experts, s.hidden_size, s.intermediate_size, self.chunk_share)

    def sample(self, experts: int) -> "LayerContext":
        """The layer with its first chunks only, of so many experts at least. It counts no progress."""
        count = next((i for i, chunk in enumerate(self.chunks, 1) if chunk.stop >= experts), len(self.chunks))
        return replace(self, sampled=self.chunks[:count], on_progress=_ignore)

    @property
    def local_experts(self) -> list[int]:
        """Experts of this process."""
        return [e for i, chunk in enumerate(self.chunks) if self.workers.is_local(i) for e in chunk]

    def each(self, work: Callable[[range], Result], counted: bool = True) -> Iterator[Result]:
        """One pass over the experts: `work` of every chunk, shared by the workers; results in the order of chunks.

        Args:
            work: of a chunk.
            counted: whether the pass counts as progress.
        """
        matrix = matrix_bytes(self.shape.hidden_size, self.shape.intermediate_size)

        def worked(chunk: range) -> Result:
            result = work(chunk)
            trim(matrix)
            return result

        for chunk, result in zip(self.chunks, self.workers.map(self.chunks, worked), strict=True):
            yield result
            if counted:
                self.on_progress(len(chunk))

    def load_balanced(self, chunk: range) -> ExpertWeights:
        """Experts that compute what the model's do, up and down of sizes of the same order."""
        return self.load(chunk).balanced(self.shape.hidden_act)

    def measure_expert(self, expert: int, weights: OneExpert) -> MeasuredExpert:
        """See `LayerMoments.measure_expert`; all outputs and tokens alike with the ablation `output-weights`."""
        measured = self.moments.measure_expert(expert, weights)
        if "output-weights" in self.config.ablations:
            alike = torch.ones_like(measured.output_weights)
            return replace(measured, inputs=self.moments.plain_moments(expert), output_weights=alike)
        return measured
