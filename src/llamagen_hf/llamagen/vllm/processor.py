"""From the logits of both streams to a code: guidance, temperature, top-k, top-p, draw, as each request wants them.

vLLM's sampler draws otherwise and clamps some settings, so its images would not be ours. The code is drawn here, by
the functions and with the noise of the pipeline, and the sampler is left a row in which that code alone is
possible. No row knows of the others: requests may join, leave, move and be preempted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as NewRunnerLogitsProcessor

from ..noise import draw_noise_keys
from ..sampling import guide, is_guided, sample
from .requests import GenerationSettings


# Parameters of vLLM that do not touch which code is drawn; all others must be at their defaults.
FREE_PARAMETERS = {
    "temperature",  # checked for itself
    "extra_args",
    "max_tokens",
    "ignore_eos",
    "detokenize",
    "output_kind",
    "stream_interval",
    "skip_clone",
    "output_text_buffer_length",
    "skip_special_tokens",
    "spaces_between_special_tokens",
}


@dataclass
class Row:
    """What a request draws with."""

    settings: GenerationSettings
    noise_key: int
    output_codes: Sequence[int] = ()  # vLLM's own list, which grows


class GuidedSampling(LogitsProcessor, NewRunnerLogitsProcessor):
    """vLLM's logits processor that draws the codes of [`~llamagen_hf.llamagen.vllm.model.LlamaGenTwin`].

    One class serves both of vLLM's model runners, which keep requests in rows of a batch and in slots.
    """

    def __init__(self, vllm_config, device_or_states, is_pin_memory: bool = False):
        config = vllm_config.model_config.hf_config.generator_config
        self.num_codes, self.vocab_size = config.num_codes, config.vocab_size
        self.states = device_or_states  # of use with the newer runner only
        self.rows: dict[int, Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse parameters that would draw something else or end the engine.

        Raises:
            ValueError: If there is one.
        """
        GenerationSettings.from_extra_args(sampling_params.extra_args)
        if sampling_params.temperature != 0:
            raise ValueError(
                f"SamplingParams has `temperature` {sampling_params.temperature}; expected 0, and the one to draw "
                "with in `extra_args`."
            )
        defaults = SamplingParams(temperature=0.0)
        for name in sampling_params.__struct_fields__:
            if name in FREE_PARAMETERS or name.startswith("_"):
                continue
            if getattr(sampling_params, name) != getattr(defaults, name):
                raise ValueError(
                    f"SamplingParams has `{name}`, which does nothing here; what an image is drawn with goes into "
                    "`extra_args`."
                )

    def is_argmax_invariant(self) -> bool:
        return False

    def _new_row(self, params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> Row:
        settings = GenerationSettings.from_extra_args(params.extra_args)
        generator = torch.Generator().manual_seed(settings.seed)
        return Row(settings, draw_noise_keys(1, generator, torch.device("cpu")).item(), output_ids)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, self._new_row)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self.rows[req_idx] = self._new_row(sampling_params, None, [])
        return True

    def apply(self, logits: torch.Tensor, ctx=None) -> torch.Tensor:
        """Leave each row of logits one code that is possible."""
        if ctx is None:
            rows = [self.rows[index] for index in range(len(logits))]
            drawn = [len(row.output_codes) for row in rows]
        else:
            slots = ctx.idx_mapping_np.tolist()
            rows = [self.rows[slot] for slot in slots]
            lengths = ctx.seq_lens_upper_bound_np[: len(slots)] - self.states.prompt_len.np[slots]
            # A prompt that is not read to its end yet draws a code as well, which is thrown away.
            drawn = lengths.clip(min=0).tolist()
        codes = self.draw(logits, rows, drawn)
        return logits.fill_(-torch.inf).scatter_(1, codes[:, None], 0.0)

    def draw(self, logits: torch.Tensor, rows: list[Row], drawn: list[int]) -> torch.LongTensor:
        """Draw a code for each row.

        Args:
            logits (`torch.Tensor` of shape `(batch, width)`): Of the conditional stream, then of the other.
            rows (`list[Row]`): What they are drawn with.
            drawn (`list[int]`): How many codes of each were drawn before.

        Returns:
            `torch.LongTensor` of shape `(batch,)`: Codes; `vocab_size` where logits are not finite.
        """
        settings = [row.settings for row in rows]
        # A prompt that was not made for the checkpoint may ask for more codes than an image has.
        places = [min(s.prefix_length + n, self.num_codes - 1) for s, n in zip(settings, drawn, strict=True)]
        keys = torch.tensor([row.noise_key for row in rows]).to(logits.device)
        indices = torch.tensor(places).to(logits.device)
        scales = torch.tensor([float(s.guidance_scale) for s in settings]).to(logits.device)[:, None]
        guided = [
            s.guidance_scale != 1 and is_guided(i, s.guidance_interval) for s, i in zip(settings, places, strict=True)
        ]
        conditional, unconditional = logits[:, : 2 * self.vocab_size].chunk(2, dim=1)
        mixed = guide(conditional, unconditional, scales)
        mixed = torch.where(torch.tensor(guided).to(logits.device)[:, None], mixed, conditional)

        groups: dict[tuple, list[int]] = {}  # most requests filter alike
        for index, s in enumerate(settings):
            groups.setdefault((s.temperature, s.top_k, s.top_p), []).append(index)
        codes = torch.empty(len(rows), dtype=torch.long, device=logits.device)
        for (temperature, top_k, top_p), members in groups.items():
            codes[members] = sample(mixed[members], keys[members], indices[members], temperature, top_k, top_p)
        return torch.where(mixed.isfinite().all(dim=1), codes, self.vocab_size)
