"""What a prior returns, and how an embedding is drawn again from its parameters."""

from dataclasses import dataclass
from importlib.metadata import version

import torch
from diffusers.utils import BaseOutput

from ..llamagen.noise import NOISE
from ..loading.quantization import check_same_quantization, describe_quantization
from ..provenance import complete, seeded
from ..reproducibility import told_apart


@dataclass
class EmbeddingPriorOutput(BaseOutput):
    """What [`EmbeddingPriorPipeline`] returns.

    Args:
        image_embeds (`torch.Tensor` or `np.ndarray` of shape `(batch, dim)`): Image embeddings of length 1, by prompt.
        parameters (`list[dict]`): For each embedding what made it: its prompt, settings, seed and checkpoint.
            [`EmbeddingPriorPipeline.redraw`] draws it again from them.
        scores (`list[float]`): For each embedding the cosine to that of its prompt.
    """

    image_embeds: torch.Tensor
    parameters: list[dict]
    scores: list[float]


class PriorRedrawMixin:
    """What the parameters of embeddings say about a prior, and the way back from them."""

    @property
    def facts(self) -> dict:
        """What the parameters of all embeddings say about the pipeline: checkpoint, scheduler, device, dtype."""
        facts = dict(self._origin)
        if self.scheduler is not None:
            facts["scheduler"] = type(self.scheduler).__name__
        if self.is_autoregressive:
            facts["noise"] = NOISE
        facts |= {"device": self._execution_device.type, "dtype": str(self.prior.dtype)[6:]}
        facts |= describe_quantization(self)
        return facts | {"llamagen_hf": version("llamagen-hf"), "torch": torch.__version__}

    def redraw(self, parameters: dict) -> EmbeddingPriorOutput:
        """Draw an embedding again from the parameters that made it.

        With the same checkpoint, device, dtype and library versions it is the same to the last bit.

        Args:
            parameters (`dict`): One of an output's `parameters`.

        Raises:
            ValueError: If they do not determine an embedding, or do not fit the checkpoint.
        """
        own, theirs = self.facts.get("scheduler"), parameters.get("scheduler")
        if theirs != own:
            raise ValueError(f"The embedding was drawn with scheduler {theirs!r}, but the pipeline has {own!r}.")
        if parameters.get("noise") != self.facts.get("noise"):
            raise ValueError("The embedding was drawn with other noise, so its seed gives another one here.")
        check_same_quantization(self, parameters)
        settings = [name for name in self.sampling_settings() if name != "num_candidates"]
        full = complete(parameters, settings)
        if not isinstance(full.get("prompt"), str):
            raise ValueError("These parameters hold no prompt of the prior, so its embedding can't be drawn again.")
        condition = {name: full[name] for name in ("negative_prompt", "truncate_prompt") if name in full}
        # The whole batch, with every row the wanted one, since the size of a batch can change the last bits.
        generators = [told_apart([seeded(full)] * (full["seed_index"] + 1))[-1] for _ in range(full["batch_size"])]
        output = self(
            full["prompt"],
            **condition,
            **{name: full[name] for name in settings},
            num_images_per_prompt=full["batch_size"],
            num_candidates=1,
            generator=generators,
        )
        row = full["batch_index"]
        return EmbeddingPriorOutput(output.image_embeds[row : row + 1], [parameters], output.scores[row : row + 1])
