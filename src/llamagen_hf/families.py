"""The tables of pipelines and models. Publishing, loading, the demo and the commands know families by them alone."""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from diffusers import DiffusionPipeline
from torch import nn

from .loading.checkpoint import CheckpointLoaderMixin, find_missing_weights, read_weight_names


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a model card says about the method behind a model.

    Args:
        name (`str`): The method's name.
        reference (`str`): Authors, year and arXiv number of its paper.
        summary (`str`): What it does, as a sentence; `{pipe.image_size}` and the like are filled in.
        tags (`tuple[str, ...]`): Tags on the Hub, beside the task's; the first is the method's own.
        citation (`str`): Its paper in BibTeX.
        record (`str`, *optional*): The section of `training.json` that is about its training.
        noun (`str`, *optional*): What it is, for those that do not draw images.
        task (`str`, *optional*): The Hub's name of what they do.
        usage (`str`, *optional*): Python code that loads one of `{checkpoint}` and uses it.
        limits (`str`, *optional*): What to expect of one.
    """

    name: str
    reference: str
    summary: str
    tags: tuple[str, ...]
    citation: str
    record: str | None = None
    noun: str | None = None
    task: str | None = None
    usage: str | None = None
    limits: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family(Method):
    """A pipeline of this package, with what [`Method`] says about it.

    Args:
        pipeline (`str`): Name of its class, in `llamagen_hf`.
        draws (`str`, *optional*, defaults to `"images"`): What it draws, `"images"` or `"embeddings"`.
    """

    pipeline: str
    draws: Literal["images", "embeddings"] = "images"

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The class itself, imported on demand, since the families' own modules import this package."""
        return own_class(self.pipeline)


@dataclass(frozen=True, kw_only=True)
class ModelFamily(Method):
    """A model that is no pipeline and stands by itself, in a folder with `config.json`; with what [`Method`] says.

    Args:
        model (`str`): Name of its class, as `config.json` has it.
        library (`str`): The library whose class it is or extends.
        loader (`str`): Module and name of what loads one from a folder: the model, or a tuple that it comes first in.
    """

    model: str
    library: str
    loader: str

    def load(self, folder: Path) -> nn.Module:
        """Load one.

        Raises:
            OSError: If there is none, or if its weights are damaged or incomplete.
        """
        module, _, name = self.loader.rpartition(".")
        loaded = getattr(import_module(module), name)
        if isinstance(loaded, type):
            loaded = loaded.from_pretrained
        found = loaded(folder)
        model = found[0] if isinstance(found, tuple) else found
        saved_names = read_weight_names(folder, "*.safetensors")
        if missing := find_missing_weights(model, set().union(*saved_names.values())):
            raise OSError(f"The weights in {str(folder)!r} miss {', '.join(missing)}.")
        return model


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

DALLE2 = """\
@article{ramesh2022hierarchical,
  title   = {Hierarchical Text-Conditional Image Generation with {CLIP} Latents},
  author  = {Ramesh, Aditya and Dhariwal, Prafulla and Nichol, Alex and Chu, Casey and Chen, Mark},
  journal = {arXiv preprint arXiv:2204.06125},
  year    = {2022}
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
        pipeline="EmbeddingPriorPipeline",
        draws="embeddings",
        name="DALL-E 2",
        noun="A prior",
        reference="Ramesh et al. 2022, arXiv 2204.06125",
        summary=(
            "It draws the CLIP embedding, {pipe.embedding_dim} wide, of an image that fits a caption. A decoder draws "
            "the image from that."
        ),
        tags=("dall-e-2", "unclip", "prior"),
        citation=DALLE2,
        record="prior",
        task="feature-extraction",
        usage="""\
from llamagen_hf import EmbeddingPriorPipeline

prior = EmbeddingPriorPipeline.from_pretrained("{checkpoint}")
embeds = prior("a red apple").image_embeds""",
        limits="""\
Its embeddings mean something to decoders that were trained with the same CLIP, and to no others. It knows captions
like those of its training data, whose biases it repeats.""",
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
        citation=DALLE2,
    ),
)

MODELS = (
    ModelFamily(
        model="CLIPModel",
        library="transformers",
        loader="llamagen_hf.clip.load_clip",
        name="CLIP",
        noun="Two encoders that embed images and captions side by side",
        reference="Radford et al. 2021, arXiv 2103.00020",
        summary=(
            "The cosine of two embeddings says how well an image of {pipe.config.vision_config.image_size} x "
            "{pipe.config.vision_config.image_size} pixels and a caption fit. It ranks candidates and guides drawing, "
            "and its embeddings are conditions of decoders. transformers loads it as `CLIPModel` and `CLIPProcessor`."
        ),
        tags=("clip",),
        citation="""\
@inproceedings{radford2021learning,
  title     = {Learning Transferable Visual Models From Natural Language Supervision},
  author    = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and
               Agarwal, Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and
               Krueger, Gretchen and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  note      = {arXiv preprint arXiv:2103.00020},
  year      = {2021}
}""",
        record="clip",
        task="zero-shot-image-classification",
        usage="""\
from llamagen_hf.clip import CLIPScorer

scorer = CLIPScorer.from_pretrained("{checkpoint}", template="{{}}")
cosines = scorer(images, ["a red apple"] * len(images))""",
        limits="""\
It judges well only images and captions that resemble its training data, whose biases it repeats. Its cosines can be
compared with each other, and not with those of another CLIP.""",
    ),
    ModelFamily(
        model="NoisyClassifier",
        library="diffusers",
        loader="llamagen_hf.diffusion.noisy_classifier.NoisyClassifier",
        name="ADM",
        noun="A classifier of noisy images",
        reference="Dhariwal and Nichol 2021, arXiv 2105.05233",
        summary=(
            "It tells the classes of images of {pipe.config.image_size} x {pipe.config.image_size} pixels apart at "
            "every level of noise, and so guides pixel diffusion of that size towards a class."
        ),
        tags=("classifier-guidance", "pixel-diffusion"),
        citation="""\
@article{dhariwal2021diffusion,
  title   = {Diffusion Models Beat {GANs} on Image Synthesis},
  author  = {Dhariwal, Prafulla and Nichol, Alex},
  journal = {arXiv preprint arXiv:2105.05233},
  year    = {2021}
}""",
        record="classifier",
        task="image-classification",
        usage="""\
from llamagen_hf.diffusion.guides import ClassifierGuide

guide = ClassifierGuide.from_pretrained("{checkpoint}", labels=[{label}])
image = pipe("a red apple", guide=guide).images[0]  # pipe: a PixelDiffusionPipeline""",
        limits="""\
It knows its classes alone, and the noise of this package's schedule. What it leads to is what it tells classes apart
by, which need not be what people see in them.""",
    ),
)


def own_class(name: str) -> type | None:
    """A public class of this package by its name; `None` if there is none of that name."""
    return getattr(import_module("llamagen_hf"), name, None)


def ranks_candidates(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline tells by itself which of several images is best: one that LlamaGen draws the images of."""
    inner = [getattr(pipe, name, None) for name in ("base", "decoder")]
    if part := next((part for part in inner if isinstance(part, DiffusionPipeline)), None):
        return ranks_candidates(part)
    return isinstance(pipe, own_class("AutoregressiveImagePipeline"))


def find_family(pipeline: str | None) -> Family | None:
    """The family of a pipeline by the name of its class, as `model_index.json` has it; `None` for any other."""
    return next((family for family in FAMILIES if family.pipeline == pipeline), None)


def find_model_family(config: dict) -> ModelFamily | None:
    """The family of a model by the content of its `config.json`; `None` for any other."""
    name = model_class_name(config)
    return next((family for family in MODELS if family.model == name), None)


def model_class_name(config: dict) -> str | None:
    """The class that a `config.json` of diffusers or transformers names; `None` if it names none."""
    names = config.get("_class_name") or config.get("architectures")
    return names[0] if isinstance(names, list) and names else names or None


def check_draws(family: Family, draws: str | None, path) -> None:
    """Raise an `OSError` if the pipelines of a family draw something else; `None` accepts anything."""
    if draws not in (None, family.draws):
        raise OSError(
            f"{str(path)!r} holds a prior, which draws {family.draws} and no {draws}; join it with a decoder "
            "(PriorDecoderPipeline)."
        )


def load_pipeline(pretrained_model_name_or_path=None, draws: str | None = None, **kwargs) -> DiffusionPipeline:
    """Load a checkpoint of any family.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
            As for [`AutoregressiveImagePipeline.from_pretrained`].
        draws (`str`, *optional*): What it must draw, `"images"` or `"embeddings"`; by default anything.
        kwargs: As for [`AutoregressiveImagePipeline.from_pretrained`].

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
    check_draws(family, draws, path)
    return family.pipeline_class.from_pretrained(path, **kwargs)
