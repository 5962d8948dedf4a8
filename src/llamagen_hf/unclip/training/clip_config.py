"""Settings of a CLIP training."""

from dataclasses import dataclass, field
from typing import Literal

from ...arguments import FieldError
from ...training.config import CaptionTrainingConfig


@dataclass
class CLIPTrainingConfig(CaptionTrainingConfig):
    """A recipe's section `clip`: the settings of [`~llamagen_hf.unclip.training.clip_trainer.train_clip`].

    The CLIP is new, two transformers whose sizes are settings, or `init_from` brings it with its tokenizer. The
    defaults suit small datasets; CLIP's own sizes are in arXiv 2103.00020, table 20.
    """

    init_from: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a CLIP to start from; its sizes count, not those of the recipe."},
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak rate."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's second beta."})

    # The CLIP
    patch_size: int = field(default=8, metadata={"help": "Side of a patch of a new vision encoder, in pixels."})
    vision_width: int = field(default=256, metadata={"help": "Width of a new vision encoder."})
    vision_layers: int = field(default=6, metadata={"help": "Layers of a new vision encoder."})
    vision_heads: int = field(default=4, metadata={"help": "Heads of a new vision encoder."})
    projection_dim: int = field(default=128, metadata={"help": "Width of the embeddings of a new CLIP."})
    text_length: int = field(
        default=77, metadata={"help": "Longest caption of a new CLIP in tokens, with its two marks."}
    )

    # Images and captions
    crop: Literal["center", "random"] = field(
        default="center", metadata={"help": "Random crops have 0.8 to 1 of the shorter side."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the images."})
    truncate_captions: bool = field(
        default=False, metadata={"help": "Cut captions that are too long for the CLIP; else their rows can't be used."}
    )

    # Optimization
    weight_decay: float = field(default=0.1, metadata={"help": "Decay of matrices; vectors have none."})

    # Results
    eval_images: int = field(default=1000, metadata={"help": "Test images among which retrieval is measured."})

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 2:
            raise FieldError("batch_size", f"batch_size is {self.batch_size}; a CLIP compares at least 2 rows.")
        if self.eval_images < 2:
            raise FieldError("eval_images", f"eval_images is {self.eval_images}; retrieval needs at least 2.")
