"""What the pipeline returns, and how an image is drawn again from its parameters."""

from dataclasses import dataclass
from importlib.metadata import version

import torch
from PIL import Image

from ..loading.quantization import check_same_quantization, describe_quantization
from ..outputs import SavableOutput
from ..provenance import complete, seeded
from ..reproducibility import told_apart
from ..reranking import Candidate


@dataclass
class PixelDiffusionOutput(SavableOutput):
    """What [`PixelDiffusionPipeline`] returns.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): Images in the output type, by prompt.
        parameters (`list[dict]`): For each image what made it: its prompt, settings, seed and checkpoint.
            [`PixelDiffusionPipeline.redraw`] draws it again from them.
        candidates (`list[list[Candidate]]`, *optional*): For each image all of its candidates, best first.
    """

    parameters: list[dict] | None = None
    candidates: list[list[Candidate]] | None = None


class RedrawMixin:
    """What the parameters of images say about a pixel diffusion pipeline, and the way back from them."""

    @property
    def facts(self) -> dict:
        """What the parameters of all images say about the pipeline: checkpoint, scheduler, device, dtype, versions."""
        config = self.scheduler.config
        facts = self._origin | {"scheduler": type(self.scheduler).__name__}
        if config.get("thresholding"):
            facts["sample_max_value"] = config.sample_max_value
        if self.loras:
            facts["lora"] = self.loras
        facts |= {"device": self._execution_device.type, "dtype": str(self.unet.dtype)[6:]}
        facts |= describe_quantization(self)
        return facts | {"llamagen_hf": version("llamagen-hf"), "torch": torch.__version__}

    def redraw(
        self,
        parameters: dict,
        image: Image.Image | torch.Tensor | None = None,
        output_type: str = "pil",
        prompt_embeds: torch.Tensor | None = None,
    ) -> PixelDiffusionOutput:
        """Draw an image again from the parameters that made it.

        With the same checkpoint, device, dtype and library versions it is the same to the last bit.

        Args:
            parameters (`dict`): One of an output's `parameters`, or what
                [`~llamagen_hf.provenance.read_parameters`] reads.
            image (`PIL.Image.Image` or `torch.Tensor` of shape `(1, 3, height, width)`, *optional*):
                The image that was enlarged, if the pipeline upsamples.
            output_type (`str`, *optional*, defaults to `"pil"`): As for [`PixelDiffusionPipeline.__call__`].
            prompt_embeds (`torch.Tensor` of shape `(1, condition_length, condition_dim)`, *optional*):
                The text states or the embedding that the image was drawn from, which parameters do not hold.

        Raises:
            ValueError: If they do not determine an image, or do not fit the checkpoint.
        """
        for name, own in (("scheduler", self.facts["scheduler"]), ("sample_max_value", None), ("lora", None)):
            own, theirs = self.facts.get(name, own), parameters.get(name)
            if theirs != own:
                raise ValueError(f"The image was drawn with {name} {theirs!r}, but the pipeline has {own!r}.")
        check_same_quantization(self, parameters)
        if "guide" in parameters:
            raise ValueError("The image was drawn with a guide, which the parameters do not hold.")
        full = complete(parameters, list(self.sampling_settings()))
        condition = {name: full[name] for name in ("prompt", "negative_prompt") if full.get(name) is not None}
        if prompt_embeds is not None:
            condition["prompt_embeds"] = prompt_embeds
        elif self.reads_text and "prompt" not in condition and not self.upsamples:
            raise ValueError("These parameters hold no prompt, so the image can't be drawn again.")
        if ("prompt_embeds" in parameters and prompt_embeds is None) or "negative_prompt_embeds" in parameters:
            raise ValueError("The image was drawn from text states, which the parameters do not hold.")
        # The whole batch, with every image the wanted one, since the size of a batch can change the last bits.
        generators = [told_apart([seeded(full)] * (full["seed_index"] + 1))[-1] for _ in range(full["batch_size"])]
        settings = {name: full[name] for name in self.sampling_settings()}
        output = self(
            **condition,
            **settings,
            image=image,
            num_images_per_prompt=full["batch_size"],
            generator=generators,
            output_type=output_type,
        )
        one = slice(full["batch_index"], full["batch_index"] + 1)
        return PixelDiffusionOutput(output.images[one], [parameters])
