"""Settings of a pixel diffusion training."""

from dataclasses import dataclass, field
from typing import Literal

from ...arguments import FieldError
from ...training.config import ConditionalTrainingConfig
from ..schedules import PredictionType
from .unet_sizes import UNetSizes


@dataclass
class DiffusionTrainingConfig(UNetSizes, ConditionalTrainingConfig):
    """A recipe's section `diffusion`: the settings of
    [`~llamagen_hf.diffusion.training.diffusion_trainer.train_diffusion`].

    The U-Net is a base, or an upsampler if `low_image_size` is set. It is new or starts from the weights of another
    pipeline, at the same or at another image size, since convolutions have none. All weights are trained, or a LoRA
    adapter alone; it learns from images, or from a teacher too.
    """

    adam_beta2: float = field(default=0.99, metadata={"help": "AdamW's second beta."})

    # What is trained
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

    # Prompts
    clip: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a CLIP, which is not trained: the embedding of the image itself is the "
            "condition, in place of a prompt. That makes a decoder of DALL-E 2."
        },
    )
    condition_dropout: float = field(
        default=0.1, metadata={"help": "Chance of the empty prompt, or of an embedding of zeros, for guidance."}
    )
    condition_length: int | None = field(
        default=None, metadata={"help": "Positions of a prompt. Default: as for init_from or teacher, else 77."}
    )

    # Optimization
    prediction_type: PredictionType | None = field(
        default=None,
        metadata={"help": "What the U-Net predicts. Default: as for init_from or teacher, else v_prediction."},
    )
    snr_gamma: float | None = field(
        default=None,
        metadata={
            "help": "Limit of the weight of little noise, such as 5 (min-SNR); null for equal weights, of errors "
            "relative to those of a linear guess for an upsampler."
        },
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Decay of matrices; vectors have none."})

    # Results
    eval_images: int = field(default=64, metadata={"help": "Test images that an upsampler is measured on."})
    eval_inference_steps: int = field(default=8, metadata={"help": "Steps of each of these upsamplings."})
    sample_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of a base's images in samples/; those of 8 rows by default."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("low_vq_share", "max_aug_level", "condition_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise FieldError(name, f"{name} is {getattr(self, name)}; expected a number from 0 to 1.")
        if self.low_image_size is None:
            for name in ("low_vq_model", "crop_size"):
                if getattr(self, name) is not None:
                    raise FieldError(name, f"{name} is for upsamplers; set low_image_size too.")
        if self.clip is not None:
            if self.conditioning != "text":
                raise FieldError(
                    "clip", "The embedding of clip stands in place of a prompt; set conditioning to 'text'."
                )
            if self.condition_length not in (None, 1):
                raise FieldError(
                    "condition_length", "The embedding of clip is one position; leave condition_length out."
                )
            for name in ("text_encoder", "teacher", "sample_prompts"):
                if getattr(self, name) is not None:
                    raise FieldError(name, f"The condition is the embedding of clip; leave {name} out.")
        if self.teacher is not None and self.text_encoder is not None:
            raise ValueError("With a teacher its text encoder is used; leave text_encoder out.")
