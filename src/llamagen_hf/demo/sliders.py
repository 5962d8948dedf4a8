"""The settings of a call that the app has sliders for, if the pipeline has them."""

from typing import NamedTuple


class SliderRange(NamedTuple):
    """A slider's label, lowest and highest value, step and explanation. A whole `step` stands for whole numbers."""

    label: str
    low: float
    high: float
    step: float
    info: str


SLIDERS = {
    "guidance_scale": SliderRange("Guidance", 1, 10, 0.5, "1 is off, and twice as fast."),
    "temperature": SliderRange("Temperature", 0, 2, 0.05, "0 takes the likeliest code."),
    "top_k": SliderRange("Top k", 0, 0, 1, "Likeliest codes, 0 for all."),  # up to the size of the codebook
    "top_p": SliderRange("Top p", 0, 1, 0.01, "Their probability, 1 for all."),
    "num_inference_steps": SliderRange("Steps", 1, 100, 1, "From noise to image."),
}
# Where the pipeline knows the best by itself. It is no setting of a checkpoint: without it, one is drawn.
CANDIDATES_SLIDERS = {
    "num_candidates": SliderRange("Candidates", 1, 4, 1, "Draws so many, and keeps the best."),
}
UPSAMPLING_SLIDERS = {
    "aug_level": SliderRange("Noise level", 0, 1, 0.05, "0 keeps the small image, 1 draws anew."),
    "upsampler_num_inference_steps": SliderRange("Upsampling steps", 1, 100, 1, "To the larger image."),
    "upsampler_guidance_scale": SliderRange("Upsampling guidance", 1, 10, 0.5, "1 is off, and twice as fast."),
}
# Of prompts alone: variations are drawn without the prior.
PRIOR_SLIDERS = {
    "prior_guidance_scale": SliderRange("Prior guidance", 1, 10, 0.5, "How closely it follows the prompt, 1 is off."),
    "prior_num_candidates": SliderRange("Prior candidates", 1, 16, 1, "The best of them is drawn."),
}
