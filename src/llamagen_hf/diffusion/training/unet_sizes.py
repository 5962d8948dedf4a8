"""The sizes of a new U-Net, or of the half of one that classifies."""

from dataclasses import dataclass, field, fields


@dataclass
class UNetSizes:
    """Settings that [`~llamagen_hf.diffusion.unet.efficient_unet`] is built by, in recipes that train such a model."""

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

    @property
    def sizes(self) -> dict:
        """These settings by name."""
        return {each.name: getattr(self, each.name) for each in fields(UNetSizes)}
