"""Configuration of the generator."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig

from ..conditioning.text import check_prompt_cleaning


@strict
class LlamaGenConfig(PreTrainedConfig):
    r"""Sizes and conditioning of [`LlamaGenForConditionalGeneration`]. The defaults are the released LlamaGen-B.

    Codes have the ids 0..`vocab_size` - 1. In class mode, class `c` has the id `vocab_size + c`, and the null class of
    classifier-free guidance has the id `vocab_size + num_classes`.

    Args:
        vocab_size (`int`, *optional*, defaults to 16384): Number of codes, and rows of the output head.
        hidden_size (`int`, *optional*, defaults to 768): Width of the residual stream.
        intermediate_size (`int`, *optional*):
            Width of the SwiGLU; by default 8/3 of `hidden_size`, rounded up to a multiple of 256.
        num_hidden_layers (`int`, *optional*, defaults to 12): Decoder layers.
        num_attention_heads (`int`, *optional*, defaults to 12): Attention heads.
        head_dim (`int`, *optional*):
            Width of a head, a multiple of 4; by default `hidden_size // num_attention_heads`.
        num_key_value_heads (`int`, *optional*): Key and value heads; by default `num_attention_heads`.
        rms_norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of the norms.
        rope_theta (`float`, *optional*, defaults to 10000): Base of the 2D rotary embedding.
        grid_size (`int`, *optional*, defaults to 16): Side of the code grid; an image has `grid_size ** 2` codes.
        conditioning (`str`, *optional*, defaults to `"class"`): `"class"` or `"text"`.
        num_classes (`int`, *optional*, defaults to 1000): Number of classes, class mode only.
        condition_length (`int`, *optional*): Positions before the first code: 1 in class mode, by default 120 in text
            mode.
        condition_dim (`int`, *optional*, defaults to 2048): Width of the text encoder's states, text mode only.
        condition_rotary (`str`, *optional*):
            Rotary embedding at the positions of the condition. `"zero"` has cosine and sine 0, as in the released
            code: queries and keys of all words vanish, so every code attends to all words alike. `"identity"` has
            cosine 1 and sine 0: codes attend to words by what they mean. By default `"zero"` in class mode and
            `"identity"` in text mode. A saved configuration without it means `"zero"`.
        prompt_cleaning (`str`, *optional*, defaults to `"unicode"`):
            How prompts are cleaned, text mode only; see [`~llamagen_hf.conditioning.text.clean_prompt`]. A saved
            configuration without this field means `"released"`.
        id2label (`dict[int, str]`, *optional*): Class names, class mode only.
        embedding_dropout (`float`, *optional*, defaults to 0.1): Dropout of the input embeddings.
        residual_dropout (`float`, *optional*, defaults to 0.1): Dropout of the attention's output.
        ffn_dropout (`float`, *optional*, defaults to 0.1): Dropout of the SwiGLU's output.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout of the attention weights.
        condition_dropout (`float`, *optional*, defaults to 0.1):
            Probability that training replaces a condition by the null condition, which classifier-free guidance needs.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of new weights.

    Raises:
        huggingface_hub.errors.StrictDataclassClassValidationError: If the sizes do not fit together.
    """

    model_type = "llamagen"
    keys_to_ignore_at_inference = ["past_key_values"]
    # The layers are Llama's, under the same names.
    base_model_tp_plan = LlamaConfig.base_model_tp_plan

    vocab_size: int = 16384
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: int | float = 10000.0
    grid_size: int = 16
    conditioning: str = "class"
    num_classes: int = 1000
    condition_length: int | None = None
    condition_dim: int = 2048
    condition_rotary: Literal["zero", "identity"] | None = None
    prompt_cleaning: str = "unicode"
    embedding_dropout: int | float = 0.1
    residual_dropout: int | float = 0.1
    ffn_dropout: int | float = 0.1
    attention_dropout: int | float = 0.0
    condition_dropout: int | float = 0.1
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = False
    # transformers' Llama layers read these, too.
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = -(-int(8 * self.hidden_size / 3) // 256) * 256
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.condition_length is None:
            self.condition_length = 1 if self.conditioning == "class" else 120
        if self.condition_rotary is None:
            self.condition_rotary = "zero" if self.conditioning == "class" else "identity"
        # Without names, the base class would invent "LABEL_0", "LABEL_1".
        named = self.id2label is not None
        super().__post_init__(**kwargs)
        if not named:
            self.id2label = self.label2id = None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # Checkpoints that predate these fields follow the released code.
        return super().from_dict({"prompt_cleaning": "released", "condition_rotary": "zero"} | config_dict, **kwargs)

    def validate_architecture(self):
        """Check that the sizes fit together. Called on construction and on every change."""
        if self.conditioning not in ("class", "text"):
            raise ValueError(f"`conditioning` is {self.conditioning!r}; expected 'class' or 'text'.")
        check_prompt_cleaning(self.prompt_cleaning)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        if self.head_dim % 4:
            raise ValueError(f"2D RoPE needs a head width divisible by 4, but `head_dim` is {self.head_dim}.")
        if self.conditioning == "class" and self.condition_length != 1:
            raise ValueError(f"A class takes one position, but `condition_length` is {self.condition_length}.")

    @property
    def null_class_id(self) -> int:
        """Input id of the null class, which stands for "no condition" in class mode."""
        return self.vocab_size + self.num_classes

    @property
    def num_codes(self) -> int:
        """Number of codes of an image."""
        return self.grid_size**2

    @property
    def max_position_embeddings(self) -> int:
        """Length of the longest sequence: the condition and the codes of one image."""
        return self.condition_length + self.num_codes
