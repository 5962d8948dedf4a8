"""A decoding step for CPUs: compiled with the weights frozen in, and kept for the next process."""

import logging
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import nn

from ..loading.package import FASTEST_KERNELS, load_package
from .kv_cache import SlotCache


logger = logging.getLogger(__name__)

Step = Callable[[torch.LongTensor, SlotCache], torch.Tensor]


class _StepOfTensors(nn.Module):
    """A step as a function of nothing but tensors, which can be exported."""

    def __init__(self, model: nn.Module, step: Step, cache: SlotCache):
        super().__init__()
        self.model, self._step, self._cache = model, step, cache

    def forward(self, codes: torch.LongTensor, *tensors: torch.Tensor) -> torch.Tensor:
        return self._step(codes, self._cache.around(*tensors))


class PackagedStep:
    """A step of a decoder, with a package of compiled code for each shape of codes.

    Quantized weights, which a package would hold unpacked, are compiled for this process alone, as is what can't be
    packaged.

    Args:
        model (`nn.Module`): The generator, on a CPU.
        step (`Callable[[torch.LongTensor, SlotCache], torch.Tensor]`):
            Computes with the generator the logits `(rows, width, V)` of the codes after each of `(rows, width)`.
    """

    def __init__(self, model: nn.Module, step: Step):
        self._model, self._eager = model, step
        self._compiled: dict[torch.Size, Step] = {}

    def __call__(self, codes: torch.LongTensor, cache: SlotCache) -> torch.Tensor:
        """What the step computes. The cache has a slot for each row."""
        if codes.shape not in self._compiled:
            self._compiled[codes.shape] = self._compile(codes)
        return self._compiled[codes.shape](codes, cache)

    def _compile(self, codes: torch.LongTensor) -> Step:
        model = self._model
        if any(hasattr(weight, "__tensor_flatten__") for weight in model.parameters()):
            return self._compile_without_package()
        spare = SlotCache(model.config, len(codes), model.dtype, model.device)
        try:
            run = load_package(_StepOfTensors(model, self._eager, spare), (torch.zeros_like(codes), *spare.tensors))
        except Exception as error:  # of many kinds, from export, inductor and the C++ compiler
            logger.warning("Compiled code can't be kept for the next process: %s", error)
            return self._compile_without_package()
        return lambda codes, cache: run(codes, *cache.tensors)

    def _compile_without_package(self) -> Step:
        compiled = torch.compile(self._eager, fullgraph=True, dynamic=False, options=FASTEST_KERNELS)

        def step(codes: torch.LongTensor, cache: SlotCache) -> torch.Tensor:
            # Not an option of torch.compile: the tracer, which makes weights constants, reads the global setting.
            with torch._inductor.config.patch(freezing=True):
                return compiled(codes, cache)

        return step
