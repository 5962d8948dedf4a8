"""Settings of a training of a classifier of noisy images."""

from dataclasses import dataclass, field
from typing import Literal

from ...arguments import FieldError
from ...training.config import RunConfig
from .unet_sizes import UNetSizes


@dataclass
class ClassifierTrainingConfig(UNetSizes, RunConfig):
    """A recipe's section `classifier`: the settings of
    [`~llamagen_hf.diffusion.training.classifier_trainer.train_classifier`].

    The image size of the data must be that of the U-Net which the classifier is to guide.
    """

    class_column: str = field(default="label", metadata={"help": "Column with classes: names, or ids with names."})

    # The model, beside its sizes
    dropout: float = field(default=0.1, metadata={"help": "Dropout in residual blocks and before the head."})

    # Images
    crop: Literal["center", "random"] = field(
        default="random", metadata={"help": "Random crops have 0.8 to 1 of the shorter side."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the images."})

    # Optimization
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of matrices; vectors have none."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise FieldError("dropout", f"dropout is {self.dropout}; expected a number of at least 0 and below 1.")
