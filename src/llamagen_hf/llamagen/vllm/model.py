"""The generator for vLLM, with twin heads: one request carries its conditional and its unconditional stream.

vLLM has no guidance, and two requests can't be kept in step: the scheduler runs, preempts and resumes each for itself.
Here a token's hidden state is a pair of rows. Linear layers and norms see twice as many rows, attention sees twice as
many heads, of which the first half is the conditional stream's. So both streams share one block table, and whatever
vLLM does to a request, it does to both. They differ only in what stands at the positions of the condition.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from transformers.models.llama.modeling_llama import rotate_half
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsPP
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from ..modeling import rotary_2d
from .engine_args import check_start
from .weight_loading import ConditionWeights, pad_heads, vllm_weights


class TwinAttention(nn.Module):
    """Attention of both streams of each token in one call: to vLLM they are heads of one request."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        twin = vllm_config.model_config.hf_config
        config, self.head_dim = twin.generator_config, twin.head_dim
        quant_config = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.sizes = [heads * self.head_dim for heads in (self.qkv_proj.num_heads, *2 * [self.qkv_proj.num_kv_heads])]
        self.attn = Attention(
            2 * self.qkv_proj.num_heads,
            self.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=2 * self.qkv_proj.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cos, sin = rotary  # (tokens, 1, head_dim)
        qkv, _ = self.qkv_proj(hidden_states)  # (2 tokens, ...), the streams of a token one after the other
        # Seen as (tokens, 2 heads, head_dim), a token's second row is its second half of heads.
        q, k, v = (part.reshape(len(cos), -1, self.head_dim) for part in qkv.split(self.sizes, dim=-1))
        q, k = (states * cos + rotate_half(states) * sin for states in (q, k))
        output = self.attn(q.flatten(1), k.flatten(1), v.flatten(1))
        output, _ = self.o_proj(output.reshape(len(hidden_states), -1))
        return output


class TwinDecoderLayer(nn.Module):
    """Llama's decoder layer on rows of both streams."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config.generator_config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TwinAttention(vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.mlp",
        )

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The norm adds its inputs up first, and returns the sum beside its own result.
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, rotary)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class LlamaGenTwinModel(nn.Module):
    """The Llama without its output head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        twin = vllm_config.model_config.hf_config
        self.config, self.head_dim, self.num_input_ids = twin.generator_config, twin.head_dim, twin.num_input_ids
        hidden_size = self.config.hidden_size
        if get_pp_group().is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                self.num_input_ids, hidden_size, prefix=f"{prefix}.embed_tokens"
            )
            # What stands for no condition, at each of its positions.
            self.register_buffer("null_condition", torch.zeros(self.config.condition_length, hidden_size), False)
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            self.config.num_hidden_layers,
            lambda prefix: TwinDecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        is_last = get_pp_group().is_last_rank
        self.norm = RMSNorm(hidden_size, eps=self.config.rms_norm_eps) if is_last else PPMissingLayer()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        # An id that does not exist would end the engine, and with it the requests of all others.
        return self.embed_tokens(input_ids.clamp(0, self.num_input_ids - 1))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        positions = positions[0] if positions.ndim == 2 else positions  # M-RoPE's three are the same here
        if get_pp_group().is_first_rank:
            conditional = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            null = self.null_condition[positions.clamp(max=self.config.condition_length - 1)]
            is_condition = (positions < self.config.condition_length)[:, None]
            unconditional = torch.where(is_condition, null, conditional)
            hidden_states = torch.stack([conditional, unconditional], dim=1).flatten(0, 1)
            residual = torch.zeros_like(hidden_states)
        else:  # ranks exchange one row a token
            hidden_states, residual = (
                intermediate_tensors[name].unflatten(1, (2, -1)).flatten(0, 1)
                for name in ("hidden_states", "residual")
            )

        rotary = tuple(
            pad_heads(table[0], self.config.head_dim, self.head_dim, dim=1)[:, None].to(hidden_states.dtype)
            for table in rotary_2d(self.config, positions[None])
        )
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(hidden_states, residual, rotary)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors(
                {
                    "hidden_states": hidden_states.unflatten(0, (-1, 2)).flatten(1),
                    "residual": residual.unflatten(0, (-1, 2)).flatten(1),
                }
            )
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states.unflatten(0, (-1, 2)).flatten(1)


class LlamaGenTwin(nn.Module, SupportsPP, SupportsMRoPE):
    """LlamaGen's generator for vLLM. It emits the logits of both streams, of which
    [`~llamagen_hf.llamagen.vllm.processor.GuidedSampling`] makes a code.

    Raises:
        ValueError: If vLLM was not started with `engine_arguments`.
    """

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        check_start(vllm_config)
        self.twin_config = vllm_config.model_config.hf_config
        self.config = self.twin_config.generator_config
        self.model = LlamaGenTwinModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                self.config.vocab_size,
                self.config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            self.logits_processor = LogitsProcessor(self.config.vocab_size)
        else:
            self.lm_head = PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], 2 * self.config.hidden_size
        )

    @staticmethod
    def get_model_state_cls():
        """What carries the requests' inputs in vLLM's newer model runner."""
        from .model_state import LlamaGenModelState

        return LlamaGenModelState

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[torch.Tensor, int]:
        """Positions of a text prompt and its codes: the last word stands right before the first code.

        Args:
            input_tokens (`list[int]`):
                `vocab_size` for each word, then codes, see [`~llamagen_hf.llamagen.vllm.requests.text_prompt`].
            mm_features (`list`): None.

        Returns:
            `torch.Tensor` of shape `(3, length)`, and the distance that later tokens keep from their place in the
            sequence.
        """
        offset = self.config.condition_length - input_tokens.count(self.config.vocab_size)
        return (torch.arange(len(input_tokens)) + offset).expand(3, -1), offset

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits `(rows, V conditional + V unconditional)`, filled up with -inf to the width that vLLM expects."""
        logits = self.logits_processor(self.lm_head, hidden_states.unflatten(1, (2, -1)).flatten(0, 1))
        if logits is None:  # with tensor parallelism one rank samples for all
            return None
        logits = logits.unflatten(0, (-1, 2)).flatten(1)
        missing = self.twin_config.vocab_size - logits.shape[1]
        return nn.functional.pad(logits, (0, missing), value=-torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters, loaded = dict(self.named_parameters()), set()
        condition = ConditionWeights(self.config)
        for name, weight, shard in vllm_weights(condition.keep(weights), self.twin_config):
            if is_pp_missing_parameter(name, self):
                continue
            parameter = parameters[name]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, weight, *(() if shard is None else (shard,)))
            loaded.add(name)
        if get_pp_group().is_first_rank:
            self.model.null_condition.copy_(condition.null_embeddings())
        return loaded
