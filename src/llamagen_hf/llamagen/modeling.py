"""The generator: a Llama that writes an image code by code after a condition (LlamaGen, arXiv 2406.06525).

The decoder layers are transformers' own. This file adds what images need: rotary positions on a grid, class and text
conditions in front of the codes, and the paper's dropouts.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaRMSNorm,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration import LlamaGenConfig
from .generation import CodeGenerationMixin
from .loss import check_inputs, check_labels, code_loss


def rotary_2d(config: LlamaGenConfig, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cosine and sine of the 2D rotary embedding, in float32 and in Llama's half-split layout.

    The first half of the frequencies encodes the row of a code, the second half its column. Positions of the condition
    are not in the grid. With `condition_rotary="zero"` their cosine and sine are 0, so their queries and keys vanish,
    as in the released `precompute_freqs_cis_2d`; with `"identity"` they are not rotated.

    Args:
        config ([`LlamaGenConfig`]): Gives `head_dim`, `grid_size`, `condition_length`, `condition_rotary` and
            `rope_theta`.
        position_ids (`torch.LongTensor` of shape `(batch, length)`):
            Positions in the sequence; 0 is the first position of the condition.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Cosine and sine, each of shape `(batch, length, head_dim)`.
    """
    half = config.head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=position_ids.device) / half
    frequencies = 1.0 / config.rope_theta**exponents
    cell = position_ids - config.condition_length
    row = torch.div(cell, config.grid_size, rounding_mode="floor")
    column = cell - row * config.grid_size
    angles = torch.cat([row[..., None] * frequencies, column[..., None] * frequencies], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    is_code = (cell >= 0)[..., None]
    cos, sin = angles.cos() * is_code, angles.sin() * is_code
    return (cos + ~is_code if config.condition_rotary == "identity" else cos), sin


class LlamaGenAttention(LlamaAttention):
    """Llama's attention with dropout on its output."""

    def __init__(self, config: LlamaGenConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return self.residual_dropout(output), weights


class LlamaGenMLP(LlamaMLP):
    """Llama's SwiGLU with dropout on its output."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x):
        return self.ffn_dropout(super().forward(x))


class LlamaGenDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer with the paper's dropouts."""

    def __init__(self, config: LlamaGenConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = LlamaGenAttention(config, layer_idx)
        self.mlp = LlamaGenMLP(config)


class LlamaGenTextProjector(nn.Module):
    """Maps text encoder states to embeddings, by two linear layers without bias."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.condition_dim, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(prompt_embeds), approximate="tanh"))


class LlamaGenNullPrompt(nn.Module):
    """Learned text encoder states that stand for "no prompt".

    This is a module because offloading moves parameters only when the module that owns them is called.
    """

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.condition_length, config.condition_dim))

    def forward(self, batch_size: int) -> torch.Tensor:
        return self.weight.expand(batch_size, -1, -1)


class LlamaGenPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the LlamaGen models."""

    config: LlamaGenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaGenDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LlamaGenDecoderLayer, "attentions": LlamaGenAttention}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LlamaGenNullPrompt):
            init.normal_(module.weight, std=self.config.condition_dim**-0.5)


class LlamaGenModel(LlamaGenPreTrainedModel):
    """The generator without its output head.

    Args:
        config ([`LlamaGenConfig`]): Sizes and conditioning.
    """

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        is_text = config.conditioning == "text"
        rows = config.vocab_size if is_text else config.null_class_id + 1
        self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        self.text_projector = LlamaGenTextProjector(config) if is_text else None
        self.uncond_embedding = LlamaGenNullPrompt(config) if is_text else None
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(LlamaGenDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def drop_conditions(
        self, input_ids: torch.LongTensor | None, prompt_embeds: torch.Tensor | None
    ) -> tuple[torch.LongTensor | None, torch.Tensor | None]:
        """Replace each condition of a training batch by the null condition, with probability `condition_dropout`."""
        rows = input_ids if prompt_embeds is None else prompt_embeds
        drop = torch.rand(len(rows), device=rows.device) < self.config.condition_dropout
        if prompt_embeds is not None:
            null = self.uncond_embedding(len(rows)).to(prompt_embeds.dtype)
            return input_ids, torch.where(drop[:, None, None], null, prompt_embeds)
        condition = torch.where(drop, self.config.null_class_id, input_ids[:, 0])
        return torch.cat([condition[:, None], input_ids[:, 1:]], dim=1), None

    def embed(
        self, input_ids: torch.LongTensor | None, prompt_embeds: torch.Tensor | None, is_start: bool
    ) -> torch.Tensor:
        """Embed the condition and the codes, `(batch, length, hidden_size)`; `is_start` allows condition dropout."""
        if self.training and is_start and self.config.condition_dropout:
            input_ids, prompt_embeds = self.drop_conditions(input_ids, prompt_embeds)
        parts = []
        if prompt_embeds is not None:
            parts.append(self.text_projector(prompt_embeds))
        if input_ids is not None:
            parts.append(self.embed_tokens(input_ids))
        return torch.cat(parts, dim=1)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states of all positions; arguments as in [`LlamaGenForConditionalGeneration.forward`]."""
        check_inputs(self.config, input_ids, inputs_embeds, prompt_embeds, prompt_attention_mask, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, prompt_embeds, is_start=past_key_values is None)
        if attention_mask is None and prompt_attention_mask is not None:
            codes = inputs_embeds.shape[1] - prompt_attention_mask.shape[1]
            attention_mask = F.pad(prompt_attention_mask, (0, codes), value=1)

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = self.embedding_dropout(inputs_embeds)
        # Angles need float32; the layers need their own dtype.
        position_embeddings = tuple(table.to(hidden_states.dtype) for table in rotary_2d(self.config, position_ids))
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class LlamaGenForConditionalGeneration(LlamaGenPreTrainedModel, CodeGenerationMixin):
    """LlamaGen's generator: next-code prediction under a class or a text condition.

    Args:
        config ([`LlamaGenConfig`]): Sizes and conditioning.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf import LlamaGenConfig, LlamaGenForConditionalGeneration

    >>> config = LlamaGenConfig(
    ...     vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, grid_size=4, num_classes=10
    ... )
    >>> model = LlamaGenForConditionalGeneration(config).eval()
    >>> class_prompt = torch.tensor([[config.vocab_size + 3]])
    >>> model.generate(class_prompt, do_sample=True).shape  # the class id and 4x4 codes
    torch.Size([1, 17])
    ```
    """

    _tp_plan = LlamaForCausalLM._tp_plan
    # Layers are offloaded one by one. The null prompt is called separately.
    _group_offload_block_modules = ["model", "uncond_embedding"]

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.model = LlamaGenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.max_new_tokens = config.num_codes
        self.loss_type = None  # from the class name, Trainer would infer that the first label is not predicted

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""Predict the next code at every position.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, n)`, *optional*):
                Class mode: the class id (`vocab_size` + class) and the codes so far, in raster order. Text mode: the
                codes alone. With a filled cache: the codes since then.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for positions to attend to, including those of the condition and of the cache. By default all.
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Positions in the sequence; 0 is the first position of the condition.
            past_key_values ([`~transformers.Cache`], *optional*): Keys and values of the previous positions.
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`, *optional*):
                Embeddings to use instead of `input_ids`.
            prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                Text mode: the text encoder's states, padded on the left. Required unless the cache holds them.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, condition_length)`, *optional*):
                1 for words, 0 for padding. By default all 1.
            labels (`torch.LongTensor` of shape `(batch, m)`, *optional*):
                The codes to predict, starting with the first code and without the condition. -100 excludes a code.
                `loss` is the mean cross-entropy in nats, or 0 if all codes are excluded.
            use_cache (`bool`, *optional*): Whether to return `past_key_values`.
            logits_to_keep (`int` or `torch.LongTensor`, *optional*, defaults to 0):
                Compute logits for this many last positions, or for the positions with these indices; 0 means all.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*):
                Divisor of the summed loss, by default the number of codes. `Trainer` passes the number of codes in
                the whole step when it accumulates gradients.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: `logits` of shape `(batch, codes + 1,
            vocab_size)` in float32, where position i predicts code i; `loss` if `labels` are given.

        Raises:
            ValueError: If the condition is missing, of the other kind or of a wrong shape, or if `labels` are not the
                codes that the inputs predict.
        """
        if labels is not None and not torch.compiler.is_compiling():
            check_labels(self.config, labels, input_ids, logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if prompt_embeds is not None:  # the last word predicts the first code; the other words predict nothing
            hidden_states = hidden_states[:, prompt_embeds.shape[1] - 1 :]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept]).float()

        loss = None
        if labels is not None:
            loss = code_loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Saved pipelines record the module of each class. The package's name is stable, while files in it may move.
for _class in (LlamaGenModel, LlamaGenForConditionalGeneration):
    _class.__module__ = "llamagen_hf"

AutoConfig.register("llamagen", LlamaGenConfig)
AutoModel.register(LlamaGenConfig, LlamaGenModel)
AutoModelForCausalLM.register(LlamaGenConfig, LlamaGenForConditionalGeneration)
