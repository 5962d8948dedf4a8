"""A pipeline of diffusers as the base of a cascade: called, described and drawn again like one of this package."""

import json
from importlib.metadata import version
from inspect import signature
from typing import Literal

import torch
from diffusers import DiffusionPipeline

from ..arguments import FieldError, is_count, plain
from ..conditioning.checks import check_prompt
from ..conditioning.classes import resolve_class_label
from ..outputs import SavableOutput
from ..provenance import complete, describe, seeded
from ..reproducibility import check_generator, image_generators, told_apart
from ..reranking import Candidate, Scorer, check_candidates, rank_candidates, score_images
from .cascade_output import CascadeOutput


# Arguments of pipelines that a cascade passes itself.
RESERVED = {"prompt", "class_labels", "num_images_per_prompt", "batch_size", "generator", "output_type", "return_dict"}


class ForeignBase:
    """Draws images with any pipeline of diffusers whose result has `.images`.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): The pipeline.
    """

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        self.accepted = signature(type(pipeline).__call__).parameters.keys() - {"self"}
        self.settings = self.accepted - RESERVED

    @property
    def name(self) -> str:
        """Name of the pipeline's class."""
        return type(self.pipeline).__name__

    @property
    def condition_kind(self) -> Literal["text", "class", "none"]:
        """What it draws from, by the arguments that it takes."""
        return "text" if "prompt" in self.accepted else "class" if "class_labels" in self.accepted else "none"

    @property
    def num_classes(self) -> int | None:
        """How many classes there are, as the transformer of DiT says; `None` if there are none."""
        if self.condition_kind != "class":
            return None
        return self.pipeline.transformer.config.num_embeds_ada_norm

    def class_names(self, class_labels: int | str | list[int | str]) -> list[str]:
        """The names of classes given by id or by name; the id itself where there is none."""
        names = self._id2label()
        return [names.get(index, str(index)) for index in self._class_ids(class_labels)]

    def _id2label(self) -> dict[int, str]:
        """The names of each class, if the pipeline has them as that of DiT does, with commas between them."""
        names: dict[int, list[str]] = {}
        for name, index in getattr(self.pipeline, "labels", {}).items():
            names.setdefault(index, []).append(name)
        return {index: ", ".join(each) for index, each in names.items()}

    def _class_ids(self, class_labels) -> list[int]:
        labels = plain(class_labels)
        labels = labels if isinstance(labels, list) else [labels]
        return [resolve_class_label(label, self.num_classes, self._id2label()) for label in labels]

    @property
    def image_size(self) -> int | None:
        """Side of the images, in pixels, if its model and its decoder say so."""
        components = self.pipeline.components
        model = components.get("unet") or components.get("transformer")
        side = getattr(getattr(model, "config", None), "sample_size", None)
        if not is_count(side):
            return None
        for name in ("vae", "vqvae"):
            if components.get(name) is not None:
                side *= 2 ** (len(components[name].config.block_out_channels) - 1)
        return side

    @property
    def grid_size(self) -> None:
        """No grid of codes that is drawn row by row is known of."""
        return None

    codebook_size = grid_size
    varies_images = False

    @property
    def facts(self) -> dict:
        """What the parameters of all images say about the pipeline."""
        origin = {} if self.pipeline.name_or_path is None else {"checkpoint": str(self.pipeline.name_or_path)}
        facts = origin | {"pipeline": self.name, "device": self.pipeline._execution_device.type}
        facts["dtype"] = str(self.pipeline.dtype)[6:]
        versions = {name: version(name.replace("_", "-")) for name in ("llamagen_hf", "diffusers")}
        return facts | versions | {"torch": torch.__version__}

    def find_loss(self, prompt: str) -> None:
        """How much of a prompt it reads is not known."""
        return None

    def sampling_settings(self, **given) -> dict:
        """The settings that were given; the others are the pipeline's own."""
        return {name: plain(value) for name, value in given.items() if value is not None}

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_candidates: int = 1,
        scorer: Scorer | None = None,
        **settings,
    ) -> SavableOutput:
        """Draw images; `settings` are other arguments of the pipeline. The rest is as for [`CascadePipeline`].

        Raises:
            ValueError: If an argument does not fit, or the pipeline returns no images.
        """
        settings = {name: plain(value) for name, value in settings.items() if value is not None}
        if unknown := sorted(settings.keys() - self.settings):
            raise FieldError(unknown[0], f"{self.name} takes no `{unknown[0]}`.")
        conditions, name = self._conditions(prompt, class_labels, settings)
        if not is_count(num_images_per_prompt):
            raise FieldError(
                "num_images_per_prompt",
                f"`num_images_per_prompt` is {num_images_per_prompt}; expected an integer of at least 1.",
            )
        num_images = len(conditions) * num_images_per_prompt
        check_generator(generator, num_images)
        check_candidates(num_candidates, scorer)
        conditions = [each for each in conditions for _ in range(num_images_per_prompt * num_candidates)]
        generators = image_generators(generator, num_images, num_candidates)
        names = conditions if name != "class_labels" else self.class_names(conditions)
        hidden = [key for key, value in settings.items() if not is_json(value)]
        parameters = describe(
            [{} if name is None else {name: each} for each in conditions],
            {key: value for key, value in settings.items() if key not in hidden},
            generators,
            self.facts | ({"not_recorded": hidden} if hidden else {}),
        )
        images = self._draw(conditions, name, told_apart(generators), settings)
        if num_candidates == 1:
            return CascadeOutput(images, parameters)
        scores = score_images(scorer, images, names)
        candidates = [Candidate(*row) for row in zip(images, scores, parameters, strict=True)]
        ranked = [[candidates[i] for i in rank] for rank in rank_candidates(scores, num_candidates)]
        best = [rank[0] for rank in ranked]
        return CascadeOutput([each.image for each in best], [each.parameters for each in best], candidates=ranked)

    def _conditions(self, prompt, class_labels, settings: dict) -> tuple[list, str | None]:
        """The prompts or classes, and the name of their argument; `None` for each image or embedding without."""
        kind = self.condition_kind
        if prompt is not None and kind != "text":
            raise FieldError("prompt", f"{self.name} reads no text: leave out `prompt`.")
        if class_labels is not None and kind != "class":
            raise FieldError("class_labels", f"{self.name} draws no classes: leave out `class_labels`.")
        if prompt is not None:
            check_prompt(prompt, True)
            return [prompt] if isinstance(prompt, str) else prompt, "prompt"
        if class_labels is not None:
            return self._class_ids(class_labels), "class_labels"
        if kind == "class":
            raise FieldError("class_labels", f"{self.name} draws classes: pass `class_labels`.")
        if kind == "text" and "prompt_embeds" not in settings:
            raise FieldError("prompt", f"{self.name} draws from prompts: pass `prompt`.")
        return [None] * len(settings.get("prompt_embeds", [None])), None

    def _draw(self, conditions: list, name: str | None, generators: list[torch.Generator], settings: dict) -> list:
        """The images of `conditions`, each from its own generator."""
        if name is not None:
            settings = {name: conditions} | settings
        elif "batch_size" in self.accepted:
            settings = {"batch_size": len(conditions)} | settings
        elif "num_images_per_prompt" in self.accepted:
            count = len(conditions) // len(settings.get("prompt_embeds", [None]))
            settings = {"num_images_per_prompt": count} | settings
        if isinstance(settings.get("negative_prompt"), str) and name == "prompt":
            settings["negative_prompt"] = [settings["negative_prompt"]] * len(conditions)
        output = self.pipeline(**settings, generator=generators, output_type="pil")
        images = getattr(output, "images", None)
        if not isinstance(images, list) or len(images) != len(conditions):
            raise ValueError(
                f"{self.name} did not return a list of {len(conditions)} `images`, so it can't be a base."
            )
        return images

    def redraw(self, parameters: dict) -> SavableOutput:
        """Draw an image again from its parameters.

        Raises:
            ValueError: If they do not determine an image.
        """
        full = complete(parameters, [])
        if "not_recorded" in parameters:
            names = ", ".join(parameters["not_recorded"])
            raise ValueError(f"The image was drawn with {names}, which the parameters do not hold.")
        if parameters.get("pipeline") != self.name:
            raise ValueError(f"The image was drawn by {parameters.get('pipeline')}, but the base is {self.name}.")
        names = self.settings | {"prompt", "class_labels"}
        settings = {name: value for name, value in parameters.items() if name in names}
        generators = [told_apart([seeded(full)] * (full["seed_index"] + 1))[-1] for _ in range(full["batch_size"])]
        images = self(**settings, num_images_per_prompt=full["batch_size"], generator=generators).images
        return CascadeOutput([images[full["batch_index"]]], [parameters])


def is_json(value) -> bool:
    """Whether a value survives in a JSON file."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False
