"""Settings of papers, and the references that fit them."""

from dataclasses import dataclass, field
from typing import Literal

from .statistics import ImageStatistics


PresetName = Literal["imagenet256_paper", "demo"]


@dataclass(frozen=True)
class Preset:
    """Settings of an evaluation, and what its reference must be.

    Args:
        description (`str`): Where the settings come from.
        count (`int`): Number of images to generate.
        image_size (`int`, *optional*): Side in pixels to resize them to; by default they keep their size.
        sampling (`dict`, *optional*): Sampling settings of the pipeline's call.
        reference_name (`str`, *optional*): Name of the reference batch; any reference fits by default.
    """

    description: str
    count: int
    image_size: int | None = None
    sampling: dict = field(default_factory=dict)
    reference_name: str | None = None


PRESETS: dict[PresetName, Preset] = {
    "imagenet256_paper": Preset(
        description=(
            "FID of the LlamaGen paper (arXiv 2406.06525, section 3.1): 50,000 images of random classes, sampled from "
            "all codes and resized to 256 pixels bicubically, against ADM's batch of the ImageNet training set. The "
            "guidance scale is yours to choose; the paper gives it beside each number."
        ),
        count=50_000,
        image_size=256,
        sampling={"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        reference_name="VIRTUAL_imagenet256_labeled",
    ),
    "demo": Preset(
        description="Settings of the released demo, which look better and give a worse FID.",
        count=1_000,
        sampling={"temperature": 1.0, "top_k": 2000, "top_p": 1.0, "guidance_scale": 4.0},
    ),
}
# Parts of the names of validation batches.
VALIDATION = ("val_256", "imagenet_val", "imagenet-val", "ilsvrc2012_val")


def get_preset(name: str) -> Preset:
    """The preset of this name; a `ValueError` lists the presets if there is none."""
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
    return PRESETS[name]


def check_reference(preset: Preset, reference: ImageStatistics, num_samples: int) -> None:
    """Raise a `ValueError` if name, size or count of a comparison differ from those of the preset's paper."""
    if preset.reference_name is None:
        return
    name, size = reference.name, reference.image_size
    wanted = f"the preset compares with ADM's {preset.reference_name}.npz"
    if any(part in name.lower() for part in VALIDATION):
        raise ValueError(f"{name!r} is the ImageNet validation batch, right for rFID, wrong for FID: {wanted}.")
    if preset.reference_name.lower() not in name.lower():
        raise ValueError(f"{name!r} is another reference: {wanted}.")
    if size is not None and size != (preset.image_size, preset.image_size):
        raise ValueError(f"{name!r} has images of {size[1]} x {size[0]} pixels, not {preset.image_size}: {wanted}.")
    if reference.count not in (0, 10_000):  # 0: moments alone do not state a count
        raise ValueError(f"{name!r} holds {reference.count:,} images, not 10,000: {wanted}.")
    if num_samples != preset.count:
        raise ValueError(
            f"There are {num_samples:,} samples; the preset's numbers use {preset.count:,}, and FID depends on that."
        )
