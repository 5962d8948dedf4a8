"""Settings of a pixel diffusion training."""

from dataclasses import dataclass, field
from typing import Literal

from ...arguments import FieldError
from ...training.config import RunConfig
from ..schedules import PredictionType


@dataclass
class DiffusionTrainingConfig(RunConfig):
    """A recipe's section `diffusion`: the settings of
    [`~llamagen_hf.diffusion.training.diffusion_trainer.train_diffusion`].

    The U-Net is a base, or an upsampler if `low_image_size` is set. It is new or starts from the weights of another
    pipeline, at the same or at another image size, since convolutions have none. All weights are trained, or a LoRA
    adapter alone; it learns from images, or from a teacher too.
    """

    adam_beta2: float = field(default=0.99, metadata={"help": "AdamW's second beta."})

    # What is trained
    init_from: str | None = field(
        default=None,
        metadata={"help": "Pipeline folder or Hub id to start from; its sizes count, not those below."},
    )
    conditioning: Literal["text", "none"] = field(
        default="text", metadata={"help": "What the images are of; none for any images."}
    )
    low_image_size: int | None = field(
        default=None, metadata={"help": "Side of the small images of an upsampler, in pixels; null for a base."}
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Pipeline folder or Hub id whose guided predictions to learn, in place of the images."},
    )
    teacher_guidance_scale: float = field(
        default=4.0, metadata={"help": "Guidance of a teacher that reads text; 1 for none."}
    )

    # The U-Net
    patch_size: int = field(default=1, metadata={"help": "1, 2 or 4: pixels along the side of one position."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [64, 128, 256], metadata={"help": "Width of each level."}
    )
    layers_per_block: list[int] = field(
        default_factory=lambda: [1, 2, 2], metadata={"help": "Residual blocks of each level; 0 only for the first."}
    )
    attention_levels: list[int] = field(
        default_factory=lambda: [2], metadata={"help": "Levels with attention, the first one is 0."}
    )
    attention_head_dim: int = field(default=32, metadata={"help": "Width of an attention head."})

    # Images
    crop: Literal["center", "random"] = field(
        default="center", metadata={"help": "Random crops have 0.8 to 1 of the shorter side."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the images."})
    crop_size: int | None = field(
        default=None, metadata={"help": "Train an upsampler on random windows of this side, in pixels."}
    )
    low_vq_model: str | None = field(
        default=None,
        metadata={"help": "Image tokenizer, a folder, Hub id or emoji, which redraws small images as a base would."},
    )
    low_vq_share: float = field(default=0.5, metadata={"help": "Share of the small images that it redraws."})
    max_aug_level: float = field(
        default=1.0, metadata={"help": "Small images get noise of a level between 0 and this one, at most 1."}
    )

    # Captions and the text encoder
    caption_templates: dict = field(
        default_factory=lambda: {"{caption}": 1.0},
        metadata={
            "help": "Captions with the columns' names in braces, and their weights; the first one is for tests."
        },
    )
    condition_dropout: float = field(default=0.1, metadata={"help": "Chance of the empty prompt, for guidance."})
    condition_length: int | None = field(
        default=None, metadata={"help": "Positions of a prompt. Default: as for init_from or teacher, else 77."}
    )
    text_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a pretrained text encoder, which is not trained; else a small new one."
        },
    )
    train_text_encoder: bool = field(
        default=False, metadata={"help": "Also train the text encoder that init_from brings; a new one always is."}
    )
    text_vocab_size: int = field(default=2048, metadata={"help": "Tokens of a new text tokenizer."})
    text_width: int = field(default=256, metadata={"help": "Width of a new text encoder."})
    text_layers: int = field(default=3, metadata={"help": "Layers of a new text encoder."})
    text_heads: int = field(default=4, metadata={"help": "Heads of a new text encoder."})
    text_pretrain_steps: int = field(
        default=0, metadata={"help": "Steps in which a new text encoder learns what its captions look like, first."}
    )
    text_pretrain_learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of these steps."})

    # Optimization
    prediction_type: PredictionType | None = field(
        default=None,
        metadata={"help": "What the U-Net predicts. Default: as for init_from or teacher, else v_prediction."},
    )
    snr_gamma: float | None = field(
        default=None, metadata={"help": "Limit of the weight of little noise, such as 5 (min-SNR); null for none."}
    )
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of the text encoder; learning_rate by default."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Decay of matrices; vectors have none."})
    lora_rank: int = field(
        default=0, metadata={"help": "Train a LoRA adapter of this rank for init_from, in place of all weights."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's alpha; lora_rank by default."})

    # Results
    eval_images: int = field(default=64, metadata={"help": "Test images that an upsampler is measured on."})
    eval_inference_steps: int = field(default=8, metadata={"help": "Steps of each of these upsamplings."})
    sample_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of a base's images in samples/; those of 8 rows by default."}
    )
    sampling_defaults: dict = field(default_factory=dict, metadata={"help": "Saved with the pipeline."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("low_vq_share", "max_aug_level", "condition_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise FieldError(name, f"{name} is {getattr(self, name)}; expected a number from 0 to 1.")
        if self.low_image_size is None:
            for name in ("low_vq_model", "crop_size"):
                if getattr(self, name) is not None:
                    raise FieldError(name, f"{name} is for upsamplers; set low_image_size too.")
        if self.lora_rank and self.init_from is None:
            raise ValueError("A LoRA adapter needs weights to adapt: set init_from to a pipeline.")
        if self.teacher is not None and self.text_encoder is not None:
            raise ValueError("With a teacher its text encoder is used; leave text_encoder out.")
