"""The token loop as a call of the pipeline runs it: with a progress bar, callbacks and interruption."""

from collections.abc import Callable
from contextlib import closing

import torch

from ..arguments import FieldError
from ..callbacks import CallbackMixin
from .sampling import SamplingParams


class CodeCallbackMixin(CallbackMixin):
    """Draws codes with a callback after each of them."""

    _callback_tensor_inputs = ["codes", "prompt_embeds"]

    def generate_codes(
        self, arguments: dict, callback: Callable | None = None, tensor_inputs: list[str] | None = None
    ) -> torch.LongTensor:
        """Draw codes, with a callback after each of them.

        Args:
            arguments (`dict`): Those of [`~llamagen_hf.llamagen.decoding.CodeDecoder.stream`].
            callback, tensor_inputs: `callback_on_step_end` and `callback_on_step_end_tensor_inputs` of the call.

        Returns:
            `torch.LongTensor` of shape `(batch, n)`: The codes; fewer than all after an interruption.

        Raises:
            ValueError: If the callback asks for tensors that do not exist, or returns what does not fit.
        """
        config = self.transformer.config
        tensor_inputs = self._wanted_tensors(callback, tensor_inputs)
        first = arguments["prefix_codes"].shape[1] if "prefix_codes" in arguments else 0
        condition = arguments.get("prompt_embeds")
        tensors = {"prompt_embeds": arguments["class_ids"][:, None] if condition is None else condition}
        scale, changed_scale = arguments["guidance_scale"], None
        self._guidance_scale, self._num_timesteps, self._interrupt = scale, config.num_codes - first, False
        progress_bar = self.progress_bar(total=config.num_codes)
        with progress_bar, closing(self.decoder.stream(**arguments)) as stream:
            for index in range(first, config.num_codes):
                codes = stream.send(changed_scale)
                progress_bar.update(codes.shape[1] - progress_bar.n)
                if callback is not None:
                    self._guidance_scale = scale  # of this call, whatever runs beside it
                    tensors["codes"] = codes
                    given = {name: tensors[name] for name in tensor_inputs}
                    changed = (callback(self, index - first, index, given) or {}).get("codes")
                    if changed is not None:
                        check_codes(changed, codes.shape, config.vocab_size)
                        codes.copy_(changed)
                    if self._guidance_scale != scale:
                        scale = self._guidance_scale
                        changed_scale = scale or 1.0  # diffusers' callbacks turn guidance off by 0
                        SamplingParams(guidance_scale=changed_scale).check_sampling()
                if self.interrupt:
                    break
        return codes


def check_codes(codes: torch.Tensor, shape: torch.Size, vocab_size: int) -> None:
    """Check codes that a callback returns in place of those that it was given.

    Raises:
        FieldError: If their shape, type or range differs.
    """
    if not isinstance(codes, torch.Tensor) or codes.is_floating_point() or codes.shape != shape:
        found = f"of shape {tuple(codes.shape)}, {codes.dtype}" if isinstance(codes, torch.Tensor) else repr(codes)
        raise FieldError("codes", f"The callback returned `codes` {found}; expected integers of shape {tuple(shape)}.")
    if not (0 <= codes.min() and codes.max() < vocab_size):
        raise FieldError(
            "codes",
            f"The callback returned `codes` of {int(codes.min())}..{int(codes.max())}; expected 0..{vocab_size - 1}.",
        )
