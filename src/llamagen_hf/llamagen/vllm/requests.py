"""What a request is asked for, on its way through vLLM: a prompt, and sampling parameters with our own in them."""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from ...arguments import FieldError, is_integer, plain
from ..configuration import LlamaGenConfig
from ..sampling import SamplingParams


if TYPE_CHECKING:
    import vllm


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(SamplingParams):
    """How one image is drawn. vLLM carries it as `SamplingParams.extra_args`; without guidance unless asked for.

    Args:
        seed (`int`, *optional*, defaults to 0): Seed of the image, in [0, 2^64). It gives the image that
            `torch.Generator().manual_seed(seed)` gives in the pipeline.
        prefix_length (`int`, *optional*, defaults to 0): Number of codes that the prompt already holds.
        kwargs: As for [`~llamagen_hf.llamagen.sampling.SamplingParams`].

    Raises:
        FieldError: If a setting is out of range.
    """

    seed: int = 0
    prefix_length: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.fill()
        self.check_sampling()
        for name, limit in (("seed", 2**64), ("prefix_length", 2**31)):
            value = plain(getattr(self, name))
            if not is_integer(value) or not 0 <= value < limit:
                raise FieldError(name, f"`{name}` is {value!r}; expected an integer from 0 to {limit - 1}.")
            object.__setattr__(self, name, value)

    @classmethod
    def from_extra_args(cls, extra_args: dict[str, Any] | None) -> "GenerationSettings":
        """Settings as vLLM carries them; a `ValueError` names those that do not exist."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(extra_args or {}) - set(known)):
            raise ValueError(f"`extra_args` has {', '.join(unknown)}; it may have {', '.join(known)}.")
        return cls(**extra_args or {})


def sampling_params(config: LlamaGenConfig, settings: GenerationSettings) -> "vllm.SamplingParams":
    """vLLM's parameters for an image: it takes the likeliest of logits from which the code was drawn before.

    Args:
        config ([`LlamaGenConfig`]): Says how many codes an image has.
        settings ([`GenerationSettings`]): How it is drawn.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        temperature=0.0,
        max_tokens=config.num_codes - settings.prefix_length,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=asdict(settings),
    )


def class_prompt(config: LlamaGenConfig, class_id: int, prefix_codes: list[int]) -> dict[str, Any]:
    """vLLM's prompt for a class: its input id, then the codes that are kept."""
    return {"prompt_token_ids": [class_id, *prefix_codes]}


def text_prompt(config: LlamaGenConfig, words: torch.Tensor, prefix_codes: list[int]) -> dict[str, Any]:
    """vLLM's prompt for a text.

    Args:
        config ([`LlamaGenConfig`]): The checkpoint's.
        words (`torch.Tensor` of shape `(n, hidden_size)`): Projected states of the words, without padding.
        prefix_codes (`list[int]`): The codes that are kept.
    """
    kept = len(prefix_codes)
    return {
        "prompt_embeds": torch.cat([words, words.new_zeros(kept, words.shape[1])]),
        # An id beyond the codes marks a word, since positions count back from the first code.
        "prompt_token_ids": [config.vocab_size] * len(words) + prefix_codes,
        "prompt_is_token_ids": [False] * len(words) + [True] * kept,
    }
