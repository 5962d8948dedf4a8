"""Where a prior's training starts, new or from another prior, and its loss."""

import torch
import torch.nn.functional as F
from diffusers import PriorTransformer
from torch import nn

from ...llamagen.configuration import LlamaGenConfig
from ...llamagen.modeling import LlamaGenForConditionalGeneration
from ..clip_encoders import TextCondition, load_clip_encoders
from ..embedding_codes import EmbeddingQuantizer
from ..embedding_denoising import predict_embeddings, prior_scheduler
from ..prior import EmbeddingPriorPipeline
from .prior_config import PriorTrainingConfig


# Less than this is no deviation: a dimension that never changes would be divided by it.
SMALLEST_DEVIATION = 1e-6
DROPOUTS = ("embedding_dropout", "residual_dropout", "ffn_dropout")


def build_pipeline(config: PriorTrainingConfig) -> EmbeddingPriorPipeline:
    """A new prior with the CLIP of `config.clip`, or the one of `config.init_from`.

    Raises:
        ValueError: What is loaded does not fit the recipe.
    """
    if config.init_from is not None:
        try:
            pipe = EmbeddingPriorPipeline.from_pretrained(config.init_from)
        except OSError as error:
            raise ValueError(f"init_from can't be loaded: {error}") from error
        if pipe.is_autoregressive != (config.kind == "autoregressive"):
            raise ValueError(f"kind is {config.kind!r}, but the prior of init_from is of the other kind.")
        if pipe.image_encoder is None:
            raise ValueError("The prior of init_from has no image encoder, whose embeddings are learnt.")
        return pipe
    try:
        clip = load_clip_encoders(config.clip)
    except OSError as error:
        raise ValueError(f"clip can't be loaded: {error}") from error
    text_config = clip.text_encoder.config
    dim, length = text_config.projection_dim, min(text_config.max_position_embeddings, clip.tokenizer.model_max_length)
    if config.kind == "diffusion":
        prior = PriorTransformer(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            num_layers=config.num_layers,
            embedding_dim=dim,
            num_embeddings=length,
            dropout=config.dropout,
        )
        # They start at zero in the library, where nothing would tell them apart.
        for parameter in (prior.positional_embedding, prior.prd_embedding):
            nn.init.normal_(parameter, std=0.02)
        return EmbeddingPriorPipeline(prior, scheduler=prior_scheduler(), **clip.components)
    if config.grid_size**2 > dim:
        raise ValueError(f"grid_size is {config.grid_size}, so {config.grid_size**2} codes; embeddings have {dim}.")
    prior = LlamaGenForConditionalGeneration(
        LlamaGenConfig(
            vocab_size=config.num_buckets,
            hidden_size=config.num_attention_heads * config.attention_head_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            grid_size=config.grid_size,
            conditioning="text",
            condition_length=length,
            condition_dim=dim,
            condition_dropout=config.condition_dropout,
            **dict.fromkeys(DROPOUTS, config.dropout),
        )
    )
    nn.init.zeros_(prior.lm_head.weight)  # all codes equally likely at the start
    quantizer = EmbeddingQuantizer(dim, config.grid_size**2, config.num_buckets)
    return EmbeddingPriorPipeline(prior, quantizer=quantizer, **clip.components)


class PriorLoss(nn.Module):
    """A prior, and its quantizer if it has one, as one module for optimizer and launcher.

    Args:
        pipe ([`EmbeddingPriorPipeline`]): Has both.
        compiles (`bool`, *optional*, defaults to `False`): Compile the prior's call in training mode.
    """

    text_path = ()  # CLIP is frozen: nothing that is trained reads text at a rate of its own

    def __init__(self, pipe: EmbeddingPriorPipeline, compiles: bool = False):
        super().__init__()
        self.prior, self.quantizer, self.scheduler = pipe.prior, pipe.quantizer, prior_scheduler()
        if self.quantizer is None:
            self.prior.clip_mean.requires_grad_(False)
            self.prior.clip_std.requires_grad_(False)
        loss = self._denoising_loss if self.quantizer is None else self._code_loss
        self._loss, self._training_loss = loss, torch.compile(loss) if compiles else loss

    @torch.no_grad()
    def measure_statistics(self, embeds: torch.Tensor) -> None:
        """Take mean and deviation of image embeddings `(count, dim)`, or fit the quantizer to them."""
        if self.quantizer is not None:
            self.quantizer.fit(embeds)
            return
        deviation, mean = torch.std_mean(embeds.double(), dim=0)
        self.prior.clip_mean.copy_(mean[None])
        self.prior.clip_std.copy_(deviation[None].clamp(min=SMALLEST_DEVIATION))

    def forward(
        self,
        image_embeds: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.LongTensor,
        embeds: torch.Tensor,
        states: torch.Tensor,
        mask: torch.LongTensor,
    ) -> torch.Tensor:
        """Mean squared error of predicted standardised embeddings, or mean cross-entropy of their codes in nats.

        Args:
            image_embeds (`torch.Tensor` of shape `(batch, dim)`): Image embeddings of length 1.
            noise (`torch.Tensor` of shape `(batch, dim)`): Normal noise, for a diffusion prior.
            timesteps (`torch.LongTensor` of shape `(batch,)`): Places in the noise schedule, from 0 to 999.
            embeds, states, mask: Captions, see [`~llamagen_hf.unclip.clip_encoders.TextCondition`].

        Returns:
            `torch.Tensor`: A scalar.
        """
        loss = self._training_loss if self.training else self._loss
        return loss(image_embeds, noise, timesteps, TextCondition(embeds, states, mask))

    def _denoising_loss(self, image_embeds, noise, timesteps, text: TextCondition) -> torch.Tensor:
        target = (image_embeds - self.prior.clip_mean) / self.prior.clip_std
        noisy = self.scheduler.add_noise(target, noise, timesteps)
        return F.mse_loss(predict_embeddings(self.prior, noisy, timesteps, text), target)

    def _code_loss(self, image_embeds, noise, timesteps, text: TextCondition) -> torch.Tensor:
        codes = self.quantizer.encode(image_embeds)
        states, mask = text.padded_left
        condition = {"prompt_embeds": states.to(self.prior.dtype), "prompt_attention_mask": mask}
        return self.prior(codes[:, :-1], **condition, use_cache=False, labels=codes).loss
