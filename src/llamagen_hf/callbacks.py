"""What a callback sees of a running call, under the names of diffusers' pipelines."""

from collections.abc import Callable

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from .arguments import FieldError


class CallbackMixin:
    """The state of the running call, which its callback reads and changes."""

    # What a callback may ask for.
    _callback_tensor_inputs: list[str] = []
    _guidance_scale: float | None = None
    _num_timesteps: int | None = None
    _interrupt: bool = False

    @property
    def guidance_scale(self) -> float | None:
        """Strength of guidance in the running call, or the last one. A callback changes it as `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether predictions with and without the condition are combined; at 0 and 1 one of them does not count."""
        return self._guidance_scale not in (None, 0, 1)

    @property
    def num_timesteps(self) -> int | None:
        """Number of steps of the running call, or of the last one; of codes, if it draws codes."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call stops after the current step; a callback sets `_interrupt` to `True` for that."""
        return self._interrupt

    def _wanted_tensors(self, callback: Callable | None, tensor_inputs: list[str] | None) -> list[str]:
        """The names of the tensors that a callback gets.

        Raises:
            FieldError: If there is none of a name.
        """
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        if unknown := set(tensor_inputs or []) - set(self._callback_tensor_inputs):
            raise FieldError(
                "callback_on_step_end_tensor_inputs",
                f"`callback_on_step_end_tensor_inputs` names {sorted(unknown)}; there is only "
                f"{self._callback_tensor_inputs}.",
            )
        return tensor_inputs or []
