"""The parameters that made an image: enough to draw it again, as plain JSON."""

from importlib.metadata import version

import torch

from ..arguments import FieldError, is_integer, plain
from ..loading.quantization import check_same_quantization, describe_quantization
from ..provenance import complete, seeded
from .noise import NOISE, draw_noise_keys
from .pipeline_output import AutoregressiveImageOutput
from .sampling import NEUTRAL


class RedrawMixin:
    """What the parameters of images say about a pipeline, and the way back from them."""

    @property
    def facts(self) -> dict:
        """What the parameters of all images say about the pipeline: checkpoint, device, dtype, versions."""
        facts = self._origin | {"noise": NOISE}
        facts |= {"device": self._execution_device.type, "dtype": str(self.transformer.dtype)[6:]}
        facts |= describe_quantization(self)
        if self.loras:
            facts["lora"] = self.loras
        if self.decoder.is_compiled:
            facts["compiled"] = True
        return facts | {"llamagen_hf": version("llamagen-hf"), "torch": torch.__version__}

    @property
    def varies_images(self) -> bool:
        """It draws no image from another alone: [`variation`] needs to know what the image shows."""
        return False

    def redraw(
        self, parameters: dict, output_type: str = "pil", prompt_embeds: torch.Tensor | None = None
    ) -> AutoregressiveImageOutput:
        """Draw an image again from the parameters that made it.

        With the same checkpoint, device, dtype and library versions it is the same to the last bit.

        Args:
            parameters (`dict`): One of an output's `parameters`, or what
                [`~llamagen_hf.provenance.read_parameters`] reads.
            output_type (`str`, *optional*, defaults to `"pil"`): As for [`AutoregressiveImagePipeline.__call__`].
            prompt_embeds (`torch.Tensor` of shape `(1, condition_length, condition_dim)`, *optional*):
                The text states or the embedding that the image was drawn from, which parameters do not hold.

        Raises:
            ValueError: If they do not determine an image, or do not fit the checkpoint.
        """
        self.require("transformer", "which draws")
        loras = parameters.get("lora", [])
        if loras != self.loras:
            raise ValueError(f"The image was drawn with the adapters {loras}, the pipeline has {self.loras}.")
        check_same_quantization(self, parameters)
        inputs, index = redrawing_inputs(parameters, self._execution_device, prompt_embeds)
        output = self(**inputs, output_type=output_type)
        one = slice(index, index + 1)
        return AutoregressiveImageOutput(output.images[one], output.codes[one], [parameters])

    def variation(self, codes: torch.LongTensor, keep_codes: int, **kwargs) -> AutoregressiveImageOutput | tuple:
        """Draw images again from a certain code on.

        Args:
            codes (`torch.LongTensor` of shape `(grid_size, grid_size)` or `(batch, grid_size, grid_size)`):
                Codes of the images, as in an output's `codes` or from
                [`~llamagen_hf.llamagen.encoding.EncodingMixin.encode_image`].
            keep_codes (`int`): How many of them to keep, in raster order; fewer than all.
            kwargs: As for [`AutoregressiveImagePipeline.__call__`], the prompt or class among them. Another seed gives
                another image.

        Raises:
            FieldError: If an argument does not fit.
        """
        num_codes, side = self.generator_config.num_codes, self.generator_config.grid_size
        if not isinstance(codes, torch.Tensor) or codes.ndim not in (2, 3) or codes.shape[-2:] != (side, side):
            found = f"of shape {tuple(codes.shape)}" if isinstance(codes, torch.Tensor) else type(codes).__name__
            raise FieldError(
                "codes",
                f"`codes` is {found}; expected a tensor of shape ({side}, {side}) or (batch, {side}, {side}).",
            )
        keep_codes = plain(keep_codes)
        if not is_integer(keep_codes) or not 0 <= keep_codes < num_codes:
            raise FieldError(
                "keep_codes", f"`keep_codes` is {keep_codes}; expected an integer from 0 to {num_codes - 1}."
            )
        return self(prefix_codes=codes.reshape(-1, num_codes)[:, :keep_codes], **kwargs)


def redrawing_inputs(
    parameters: dict, device: torch.device, prompt_embeds: torch.Tensor | None = None
) -> tuple[dict, int]:
    """What the pipeline draws an image again from, and the image's place in that batch.

    The whole batch is drawn, with every image the wanted one, since the size of a batch can change the last bits.

    Args:
        parameters (`dict`): As [`~llamagen_hf.provenance.describe`] gives them.
        device (`torch.device`): Where the prefix goes.
        prompt_embeds (`torch.Tensor`, *optional*): Text states in place of a prompt.

    Raises:
        ValueError: If they do not determine an image.
    """
    condition = {name: parameters[name] for name in ("prompt", "class_labels") if name in parameters}
    if prompt_embeds is not None:
        condition["prompt_embeds"] = prompt_embeds
    if len(condition) != 1:
        raise ValueError("These parameters hold neither a prompt nor a class, so the image can't be drawn again.")
    full = complete(parameters, list(NEUTRAL))
    if full.get("noise") != NOISE:
        by = full.get("llamagen_hf", "of unknown version")
        raise ValueError(f"llamagen_hf {by} drew the image with other noise, so its seed gives another image here.")
    codes = full["prefix_codes"]
    if not isinstance(codes, list) or not all(isinstance(code, int) for code in codes):
        raise ValueError("These parameters are damaged: prefix_codes is not a list of codes.")
    generators = []
    for _ in range(full["batch_size"]):
        generator = seeded(full)
        for _ in range(full["seed_index"]):
            draw_noise_keys(1, generator, generator.device)
        generators.append(generator)
    inputs = condition | {name: parameters[name] for name in NEUTRAL}
    inputs |= {"num_images_per_prompt": full["batch_size"], "generator": generators}
    inputs["decoding_window"] = full["decoding_window"]
    if codes:
        inputs["prefix_codes"] = torch.tensor([codes], device=device)
    return inputs, full["batch_index"]
