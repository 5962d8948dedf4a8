"""An engine for servers: vLLM draws many images at once, each asked for by itself."""

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from os import PathLike
from pathlib import Path

import torch
from safetensors import safe_open

from ...arguments import FieldError
from ..configuration import LlamaGenConfig
from ..inputs import GenerationInputs
from ..sampling import SAMPLING_DEFAULTS, SamplingParams
from .engine_args import engine_arguments
from .requests import GenerationSettings, class_prompt, sampling_params, text_prompt
from .weight_loading import build_text_projector


class EngineDiedError(RuntimeError):
    """The engine's process has ended, and all running requests with it; start another engine."""


class VLLMEngine:
    """Draws the codes of images with vLLM, in processes of their own. What makes images of codes is not its concern.

    Running requests share the steps of the model, whatever their settings. An image does not depend on the
    others, nor on when they come and go: with the same seed it has the codes that the pipeline draws, up to the last
    bits of the logits.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
            A pipeline's folder or Hub id, as for [`~AutoregressiveImagePipeline.from_pretrained`].
        kwargs: Arguments of vLLM, see [`~llamagen_hf.llamagen.vllm.engine_args.engine_arguments`].

    Raises:
        OSError: If there is no such checkpoint.

    Example:

    ```python
    >>> from llamagen_hf.llamagen.vllm import VLLMEngine

    >>> engine = VLLMEngine("path/to/checkpoint", tensor_parallel_size=2)
    >>> codes = [code async for new in engine.draw(class_label=207, guidance_scale=4.0, seed=0) for code in new]
    ```
    """

    def __init__(self, pretrained_model_name_or_path: str | PathLike | None = None, **kwargs):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(pretrained_model_name_or_path, **kwargs)
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self.config: LlamaGenConfig = self._llm.model_config.hf_config.generator_config
        self._numbers = itertools.count()
        self._projector = None
        if self.config.conditioning == "text":
            weights = read_projector(Path(arguments["model"]), self._llm.model_config.dtype)
            self._projector = build_text_projector(self.config, weights, torch.device("cpu"))

    async def draw(
        self,
        class_label: int | str | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        prefix_codes: Sequence[int] = (),
        seed: int | None = None,
        **sampling: float | None,
    ) -> AsyncIterator[list[int]]:
        """Draw the codes of one image. Leaving the loop, or cancelling its task, stops the work.

        Args:
            class_label (`int` or `str`, *optional*): A class by id or by name, for class-conditional checkpoints.
            prompt_embeds (`torch.Tensor` of shape `(condition_length, condition_dim)`, *optional*):
                Text states, padded on the left, see [`~AutoregressiveImagePipeline.encode_prompt`].
            prompt_attention_mask (`torch.Tensor` of shape `(condition_length,)`, *optional*):
                1 for words, 0 for padding; all words by default.
            prefix_codes (`Sequence[int]`, *optional*): The first codes, which are kept, in raster order.
            seed (`int`, *optional*): Gives the image of `torch.Generator().manual_seed(seed)`; random by default.
            sampling: Fields of [`~llamagen_hf.llamagen.sampling.SamplingParams`]; those that are left out are the
                defaults of the pipeline, not of the checkpoint.

        Yields:
            `list[int]`: The codes that were drawn since the last time, without the prefix, in raster order.

        Raises:
            ValueError: If an argument does not fit, or if the logits overflow in float16.
            EngineDiedError: If the engine has died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        prefix = list(prefix_codes)
        prompt = self._prompt(class_label, prompt_embeds, prompt_attention_mask, prefix)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        params = SamplingParams(**sampling).filled(SAMPLING_DEFAULTS)
        settings = GenerationSettings(seed=seed, prefix_length=len(prefix), **params.sampling)
        params, missing = sampling_params(self.config, settings), self.config.num_codes - len(prefix)
        try:
            async with aclosing(self._llm.generate(prompt, params, f"image-{next(self._numbers)}")) as outputs:
                async for output in outputs:
                    codes = list(output.outputs[0].token_ids)
                    if self.config.vocab_size in codes:
                        raise ValueError(
                            f"The logits are not finite in {self._llm.model_config.dtype}; use bfloat16 or float32."
                        )
                    missing -= len(codes)
                    if codes:
                        yield codes
        except EngineDeadError as error:
            raise EngineDiedError("The vLLM engine has died; its log says why.") from error
        if missing:
            raise EngineDiedError(f"The vLLM engine was stopped {missing} codes before the end of the image.")

    def _prompt(self, class_label, prompt_embeds, prompt_attention_mask, prefix: list[int]) -> dict:
        """vLLM's prompt, from arguments that are checked as the pipeline checks them."""
        embeds, mask = (
            given[None] if isinstance(given, torch.Tensor) else given
            for given in (prompt_embeds, prompt_attention_mask)
        )
        codes = torch.tensor([prefix]) if prefix else torch.empty(1, 0, dtype=torch.long)
        inputs = GenerationInputs(
            class_labels=class_label, prompt_embeds=embeds, prompt_attention_mask=mask, prefix_codes=codes
        )
        prepared = inputs.prepare(self.config)
        if embeds is None:
            return class_prompt(self.config, prepared.tensors["class_ids"].item(), prefix)
        words = prompt_embeds
        if mask is not None:
            if (prompt_attention_mask.long().diff() < 0).any():
                raise FieldError(
                    "prompt_attention_mask",
                    "`prompt_attention_mask` has padding after a word; expected it on the left.",
                )
            words = prompt_embeds[prompt_attention_mask.bool()]
        if len(words) == 0:
            raise FieldError("prompt_attention_mask", "`prompt_attention_mask` leaves no word; expected at least one.")
        words = self._projector(words.to(self._projector.fc1.weight))
        return text_prompt(self.config, words, prefix)

    @property
    def is_alive(self) -> bool:
        """Whether the engine can draw; vLLM notices the death of its processes by itself."""
        return not self._llm.errored

    def shutdown(self) -> None:
        """End the engine's processes, and with them what is being drawn."""
        self._llm.shutdown()


def read_projector(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights `text_projector.*` of the generator in a folder."""
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name.startswith("model.text_projector."):
                    weights[name.removeprefix("model.")] = file.get_tensor(name).to(dtype)
    return weights
