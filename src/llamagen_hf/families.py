"""The table of pipelines. Publishing, loading, the demo and the commands know families through it alone."""

import json
from dataclasses import dataclass
from importlib import import_module

from diffusers import DiffusionPipeline

from .loading.checkpoint import CheckpointLoaderMixin


@dataclass(frozen=True)
class Family:
    """A pipeline of this package, and what its model cards say about the method.

    Args:
        pipeline (`str`): Name of its class, in `llamagen_hf`.
        name (`str`): The method's name.
        reference (`str`): Authors, year and arXiv number of its paper.
        summary (`str`): How it generates an image, as a sentence; `{pipe.image_size}` and the like are filled in.
        tags (`tuple[str, ...]`): Tags on the Hub, beside the task's; the first is the method's own.
        citation (`str`): Its paper in BibTeX.
        record (`str`, *optional*): The section of `training.json` that is about its training.
    """

    pipeline: str
    name: str
    reference: str
    summary: str
    tags: tuple[str, ...]
    citation: str
    record: str | None = None

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The class itself, imported on demand, since the families' own modules import this package."""
        return own_class(self.pipeline)


IMAGEN = """\
@inproceedings{saharia2022photorealistic,
  title     = {Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding},
  author    = {Saharia, Chitwan and Chan, William and Saxena, Saurabh and Li, Lala and Whang, Jay and
               Denton, Emily and Ghasemipour, Seyed Kamyar Seyed and Karagol Ayan, Burcu and
               Mahdavi, S. Sara and Gontijo Lopes, Rapha and Salimans, Tim and Ho, Jonathan and
               Fleet, David J. and Norouzi, Mohammad},
  booktitle = {Advances in Neural Information Processing Systems},
  note      = {arXiv preprint arXiv:2205.11487},
  year      = {2022}
}"""

FAMILIES = (
    Family(
        pipeline="AutoregressiveImagePipeline",
        name="LlamaGen",
        reference="Sun et al. 2024, arXiv 2406.06525",
        summary=(
            "A Llama writes an image of {pipe.image_size} x {pipe.image_size} pixels code by code, "
            "{pipe.generator_config.num_codes} of them, from the top left to the bottom right."
        ),
        tags=("llamagen", "autoregressive"),
        citation="""\
@article{sun2024autoregressive,
  title   = {Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation},
  author  = {Sun, Peize and Jiang, Yi and Chen, Shoufa and Zhang, Shilong and Peng, Bingyue and
             Luo, Ping and Yuan, Zehuan},
  journal = {arXiv preprint arXiv:2406.06525},
  year    = {2024}
}""",
        record="generator",
    ),
    Family(
        pipeline="PixelDiffusionPipeline",
        name="Imagen",
        reference="Saharia et al. 2022, arXiv 2205.11487",
        summary=(
            "A U-Net turns noise into an image of {pipe.image_size} x {pipe.image_size} pixels, step by step, from a "
            "prompt, a smaller image or both."
        ),
        tags=("imagen", "pixel-diffusion"),
        citation=IMAGEN,
        record="diffusion",
    ),
    Family(
        pipeline="CascadePipeline",
        name="Imagen",
        reference="Saharia et al. 2022, arXiv 2205.11487",
        summary=(
            "A base draws a small image, and an upsampler enlarges it to {pipe.image_size} x {pipe.image_size} pixels "
            "by pixel diffusion."
        ),
        tags=("imagen", "cascaded-diffusion"),
        citation=IMAGEN,
    ),
    Family(
        pipeline="PriorDecoderPipeline",
        name="DALL-E 2",
        reference="Ramesh et al. 2022, arXiv 2204.06125",
        summary=(
            "A prior turns a caption into the CLIP embedding of an image that fits it, and a decoder draws an image "
            "of {pipe.image_size} x {pipe.image_size} pixels from that. It also draws variations of images."
        ),
        tags=("dall-e-2", "unclip"),
        citation="""\
@article{ramesh2022hierarchical,
  title   = {Hierarchical Text-Conditional Image Generation with {CLIP} Latents},
  author  = {Ramesh, Aditya and Dhariwal, Prafulla and Nichol, Alex and Chu, Casey and Chen, Mark},
  journal = {arXiv preprint arXiv:2204.06125},
  year    = {2022}
}""",
    ),
)


def own_class(name: str) -> type | None:
    """A public class of this package by its name; `None` if there is none of that name."""
    return getattr(import_module("llamagen_hf"), name, None)


def find_family(pipeline: str | None) -> Family | None:
    """The family of a pipeline by the name of its class, as `model_index.json` has it; `None` for any other."""
    return next((family for family in FAMILIES if family.pipeline == pipeline), None)


def load_pipeline(pretrained_model_name_or_path=None, **kwargs) -> DiffusionPipeline:
    """Load a checkpoint of any family; arguments as for [`AutoregressiveImagePipeline.from_pretrained`].

    Raises:
        OSError: If there is no such checkpoint, if it is of another pipeline, or if its weights are damaged.
    """
    path = pretrained_model_name_or_path
    folder = CheckpointLoaderMixin.find_checkpoint(path, **kwargs)
    name = json.loads((folder / CheckpointLoaderMixin.config_name).read_text(encoding="utf-8")).get("_class_name")
    family = find_family(name)
    if family is None:
        known = ", ".join(family.pipeline for family in FAMILIES)
        raise OSError(f"{str(path)!r} holds another pipeline, of class {name!r}; expected {known}.")
    return family.pipeline_class.from_pretrained(path, **kwargs)
