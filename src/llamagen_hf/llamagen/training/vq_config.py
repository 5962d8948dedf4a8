"""Settings of a tokenizer training."""

from dataclasses import dataclass, field
from typing import Literal

from ...training.config import RunConfig


@dataclass
class TokenizerTrainingConfig(RunConfig):
    """Settings of [`~llamagen_hf.llamagen.training.vq_trainer.train_tokenizer`]: a recipe's section `vq_model`.

    The defaults are LlamaGen's on ImageNet, except `ema_decay`: the released training does not average its weights.
    """

    batch_size: int = field(default=128, metadata={"help": "Images of an optimizer step, over all processes."})

    # The model; with init_from, that of the tokenizer to start from.
    init_from: str | None = field(
        default=None, metadata={"help": "Tokenizer to start from: a folder or Hub id of one, or of a pipeline."}
    )
    decoder_only: bool = field(
        default=False, metadata={"help": "Keep encoder and codebook, so that codes stay valid."}
    )
    new_codebook: int | None = field(
        default=None, metadata={"help": "Codes of a new codebook, fitted to init_from's encoder by k-means."}
    )
    block_out_channels: list[int] = field(
        default_factory=lambda: [128, 128, 256, 256, 512], metadata={"help": "Width of each level."}
    )
    layers_per_block: int = field(default=2, metadata={"help": "Residual blocks a level."})
    latent_channels: int = field(default=256, metadata={"help": "Channels before the codebook."})
    norm_num_groups: int = field(default=32, metadata={"help": "Groups of the group normalisation."})
    vq_embed_dim: int = field(default=8, metadata={"help": "Width of a codebook vector."})
    num_vq_embeddings: int = field(default=16384, metadata={"help": "Number of codes."})

    # Images
    crop: Literal["center", "random"] = field(
        default="random", metadata={"help": "Random crops have 0.8 to 1 of the shorter side."}
    )
    random_flip: bool = field(default=True, metadata={"help": "Mirror half of the images."})

    # Losses
    l1_weight: float = field(default=0.0, metadata={"help": "Weight of the mean absolute pixel error."})
    l2_weight: float = field(default=1.0, metadata={"help": "Weight of the mean squared pixel error."})
    gradient_weight: float = field(default=0.0, metadata={"help": "Weight of the error in neighbour differences."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of LPIPS; loads VGG16 if above 0."})
    codebook_weight: float = field(default=1.0, metadata={"help": "Weight of the codebook's pull to the encoder."})
    commit_weight: float = field(default=0.25, metadata={"help": "Weight of the encoder's pull to the codebook."})
    entropy_weight: float = field(default=0.0, metadata={"help": "Weight of the entropy loss."})
    discriminator: Literal["patchgan", "stylegan"] | None = field(
        default="patchgan", metadata={"help": "In a recipe, null for none."}
    )
    discriminator_width: int | None = field(default=None, metadata={"help": "Its channels; by default as published."})
    discriminator_start: int = field(default=20_000, metadata={"help": "Steps before it takes part."})
    discriminator_loss: Literal["hinge", "vanilla", "non-saturating"] = field(
        default="hinge", metadata={"help": "Loss of the discriminator."}
    )
    adversarial_loss: Literal["hinge", "non-saturating"] = field(
        default="hinge", metadata={"help": "Loss of the tokenizer against it."}
    )
    adversarial_weight: float = field(default=0.5, metadata={"help": "Weight of both of these losses."})
    adaptive_adversarial_weight: bool = field(
        default=False, metadata={"help": "Also scale the tokenizer's to the reconstruction's gradient, as VQGAN does."}
    )
    revive_until_step: int = field(
        default=0, metadata={"help": "Until this step, unused codes are moved to the data."}
    )
    revive_every: int = field(default=100, metadata={"help": "Steps in which a code must be used, or it is moved."})

    def __post_init__(self):
        super().__post_init__()
        if self.decoder_only and self.init_from is None:
            raise ValueError("decoder_only needs a tokenizer whose codes to keep: set init_from.")
        if self.new_codebook is not None and (self.init_from is None or self.decoder_only):
            raise ValueError("new_codebook needs a tokenizer that trains on: set init_from, and not decoder_only.")
        if self.decoder_only and self.revive_until_step:
            raise ValueError("decoder_only keeps the codebook, so revive_until_step must be 0.")
