"""What the prior and the decoder return together, and how the parameters of both are kept."""

from dataclasses import dataclass, replace

import torch

from ..outputs import SavableOutput
from ..reranking import Candidate


@dataclass
class PriorDecoderOutput(SavableOutput):
    """What [`PriorDecoderPipeline`] returns.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): Images in the output type, by prompt.
        parameters (`list[dict]`): For each image what made it: its prompt, the decoder's parameters, and below
            `"prior"` the prior's, or the embedding that was given as `"image_embeds"`.
            [`PriorDecoderPipeline.redraw`] draws it again from them.
        image_embeds (`torch.Tensor` of shape `(batch, dim)`): The embedding of length 1 that each was drawn from.
        candidates (`list[list[Candidate]]`, *optional*): For each image all that were decoded, best first.
    """

    parameters: list[dict] | None = None
    image_embeds: torch.Tensor | None = None
    candidates: list[list[Candidate]] | None = None


@dataclass
class Embeddings:
    """The image embeddings of a call, and where they are from.

    Args:
        embeds (`torch.Tensor` of shape `(batch, dim)`): One for each image, of length 1.
        names (`list[str | None]`): The prompt of each; `None` if the embedding was given.
        parameters (`list[dict]`, *optional*): What made each, if a prior did.
        generators (`list[torch.Generator]`): What the decoder draws each image from.
    """

    embeds: torch.Tensor
    names: list[str | None]
    parameters: list[dict] | None
    generators: list[torch.Generator]

    def row(self, row: int) -> "Embeddings":
        """One of them by itself."""
        parameters = None if self.parameters is None else [self.parameters[row]]
        return Embeddings(self.embeds[row : row + 1].clone(), [self.names[row]], parameters, [self.generators[row]])

    def joined(self, row: int, decoder: dict) -> dict:
        """The parameters of an image that was decoded from a row with the parameters `decoder`."""
        if self.parameters is None:
            return decoder | {"image_embeds": self.embeds[row].tolist()}
        prior = {name: value for name, value in self.parameters[row].items() if name != "prompt"}
        return {"prompt": self.names[row]} | decoder | {"prior": prior}

    def output(self, decoded: SavableOutput, origin: dict) -> PriorDecoderOutput:
        """What the pipeline returns for what its decoder returned; `origin` says what was loaded."""
        candidates = decoded.candidates
        if candidates is not None:
            candidates = [
                [replace(each, parameters=self.joined(row, each.parameters) | origin) for each in group]
                for row, group in enumerate(candidates)
            ]
        parameters = [self.joined(row, each) | origin for row, each in enumerate(decoded.parameters)]
        return PriorDecoderOutput(decoded.images, parameters, self.embeds, candidates)


def divided(parameters: dict) -> tuple[dict, dict | None, list[float] | None]:
    """The way back: the decoder's parameters, the prior's or `None`, and the embedding that was given or `None`.

    Raises:
        ValueError: If the image was not drawn by a prior and a decoder.
    """
    prior, embed = parameters.get("prior"), parameters.get("image_embeds")
    if not isinstance(prior, dict) and not isinstance(embed, list):
        raise ValueError("These parameters hold neither a prior's nor an image embedding: no prior drew the image.")
    decoder = {name: value for name, value in parameters.items() if name not in ("prompt", "prior", "image_embeds")}
    if isinstance(embed, list):
        return decoder, None, embed
    return decoder, prior | {"prompt": parameters.get("prompt")}, None
