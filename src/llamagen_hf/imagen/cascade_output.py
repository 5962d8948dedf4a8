"""What the cascade returns, and how the parameters of its parts are kept together."""

from dataclasses import dataclass

from ..outputs import SavableOutput
from ..reranking import Candidate


@dataclass
class CascadeOutput(SavableOutput):
    """What [`CascadePipeline`] returns.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): Images in the output type, by prompt.
        parameters (`list[dict]`): For each image what made it: the base's parameters, and in them the upsampler's as
            `"upsampler"`. [`CascadePipeline.redraw`] draws it again from them.
        base ([`~llamagen_hf.outputs.SavableOutput`]): What the base returned: the small images, their parameters and
            candidates.
        candidates (`list[list[Candidate]]`, *optional*): If several `aug_level` were tried, for each image that of
            each level, best first.
    """

    parameters: list[dict] | None = None
    base: SavableOutput | None = None
    candidates: list[list[Candidate]] | None = None


def with_upsampler(parameters: dict, upsampler: dict) -> dict:
    """The parameters of an image, and below `"upsampler"` those by which it was enlarged.

    If it was enlarged before, they stand within those of the upsampler before, as the parts of a cascade follow each
    other.
    """
    if "upsampler" in parameters:
        upsampler = with_upsampler(parameters["upsampler"], upsampler)
    return parameters | {"upsampler": upsampler}


def without_upsampler(parameters: dict) -> tuple[dict, dict]:
    """The way back from [`with_upsampler`]: the parameters of the small image, and those of the last upsampler.

    Raises:
        ValueError: If there is no upsampler in them.
    """
    rest, upsampler = dict(parameters), parameters.get("upsampler")
    if not isinstance(upsampler, dict):
        raise ValueError("These parameters hold no upsampler, so the image was not drawn by a cascade.")
    if "upsampler" not in upsampler:
        return {name: value for name, value in rest.items() if name != "upsampler"}, upsampler
    inner, last = without_upsampler(upsampler)
    return rest | {"upsampler": inner}, last
