"""The generator's configuration as vLLM reads it: two streams in one, heads as wide as its kernels take."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ..configuration import LlamaGenConfig


# Head widths that the paged attention kernels of CPUs and GPUs have in common.
HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@strict
class LlamaGenTwinConfig(PreTrainedConfig):
    """What vLLM needs to know of a generator whose requests carry a conditional and an unconditional stream.

    Args:
        checkpoint (`dict`, *optional*): The checkpoint's [`LlamaGenConfig`] as a dict; all else follows from it.

    Attributes:
        vocab_size (`int`): Logits of a request: those of the codes for each stream, and room for all input ids.
        num_attention_heads (`int`): Those of both streams, as is `num_key_value_heads`.
        head_dim (`int`): Width of a head, filled up to one that kernels take.
        max_position_embeddings (`int`): Positions of the condition and of one image.
        mrope_section (`list[int]`): In text mode says that positions come as those of M-RoPE do.
    """

    model_type = "llamagen_twin"

    checkpoint: dict | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    mrope_section: list | None = None

    def __post_init__(self, **kwargs):
        config = self.generator_config
        self.vocab_size = max(2 * config.vocab_size, self.num_input_ids)
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = 2 * config.num_attention_heads
        self.num_key_value_heads = 2 * config.num_key_value_heads
        self.head_dim = next(width for width in HEAD_WIDTHS if width >= config.head_dim)
        self.max_position_embeddings = config.max_position_embeddings
        if config.conditioning == "text":
            # A prompt is as long as its words, but its codes begin after `condition_length` positions. vLLM carries a
            # distance of this kind, different for each request, only for models with M-RoPE.
            self.mrope_section = [1, 1, 1]
        super().__post_init__(**{"architectures": ["LlamaGenTwin"], "dtype": config.dtype, **kwargs})

    @property
    def generator_config(self) -> LlamaGenConfig:
        """The checkpoint's own configuration."""
        return LlamaGenConfig.from_dict(self.checkpoint or {})

    @property
    def num_input_ids(self) -> int:
        """Rows of the embedding table: codes, then classes and the null class, or what stands for a word."""
        config = self.generator_config
        return config.null_class_id + 1 if config.conditioning == "class" else config.vocab_size + 1


def twin_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """vLLM's `hf_overrides`: a [`LlamaGenConfig`] becomes a [`LlamaGenTwinConfig`], others stay as they are."""
    return LlamaGenTwinConfig(checkpoint=config.to_dict()) if isinstance(config, LlamaGenConfig) else config


AutoConfig.register("llamagen_twin", LlamaGenTwinConfig)
