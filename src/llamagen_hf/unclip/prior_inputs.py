"""The arguments of a call of a prior, checked."""

from dataclasses import dataclass

import torch

from ..arguments import FieldError, is_count, plain
from ..conditioning.checks import check_prompt
from ..diffusion.inputs import check_settings
from ..llamagen.sampling import SamplingParams
from ..reproducibility import check_generator


OUTPUT_TYPES = ("pt", "np")
# What each kind of prior is told; where neither the call nor the checkpoint says otherwise, with these values.
DIFFUSION_DEFAULTS = {"num_inference_steps": 25, "guidance_scale": 1.0, "num_candidates": 2}
AUTOREGRESSIVE_DEFAULTS = {
    "guidance_scale": 1.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "num_candidates": 2,
}


@dataclass(frozen=True, kw_only=True)
class PriorInputs:
    """The arguments of a call. [`EmbeddingPriorPipeline.__call__`] says what each of them is."""

    prompt: str | list[str]
    negative_prompt: str | list[str] | None = None
    num_images_per_prompt: int = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    truncate_prompt: bool = False
    output_type: str = "pt"

    def __post_init__(self):
        object.__setattr__(self, "num_images_per_prompt", plain(self.num_images_per_prompt))

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def num_images(self) -> int:
        """Embeddings to return."""
        return len(self.prompts) * self.num_images_per_prompt

    def check(self, reads_negative: bool) -> None:
        """Check the arguments against each other and the kind of prior.

        Args:
            reads_negative (`bool`): Whether the prior can be led away from a prompt.

        Raises:
            FieldError: If one does not fit.
        """
        check_prompt(self.prompt, True)
        if not is_count(self.num_images_per_prompt):
            raise FieldError(
                "num_images_per_prompt",
                f"`num_images_per_prompt` is {self.num_images_per_prompt}; expected an integer of at least 1.",
            )
        if self.negative_prompt is not None:
            if not reads_negative:
                raise FieldError(
                    "negative_prompt", "An autoregressive prior takes no `negative_prompt`; leave it out."
                )
            check_prompt(self.negative_prompt, True, "negative_prompt")
            count = 1 if isinstance(self.negative_prompt, str) else len(self.negative_prompt)
            if count not in (1, len(self.prompts)):
                raise FieldError(
                    "negative_prompt",
                    f"`negative_prompt` holds {count}, but 1 or {len(self.prompts)} are needed.",
                )
        if self.output_type not in OUTPUT_TYPES:
            raise FieldError("output_type", f"`output_type` is {self.output_type!r}; expected 'pt' or 'np'.")
        check_generator(self.generator, self.num_images)


def check_prior_settings(settings: dict) -> None:
    """Check the settings of a call, none of them `None`.

    Raises:
        FieldError: If one is out of range.
    """
    if not is_count(settings["num_candidates"]):
        raise FieldError(
            "num_candidates",
            f"`num_candidates` is {settings['num_candidates']}; expected an integer of at least 1.",
        )
    rest = {name: value for name, value in settings.items() if name != "num_candidates"}
    if "num_inference_steps" in settings:
        check_settings(rest)
    else:
        SamplingParams(**rest).check_sampling()
