"""Write the API reference, `docs/api/*.md`, from the docstrings: `make docs`, or `python docs/make_api.py`.

griffe parses the source and the docstrings without importing the package. This script lays the parts out as Markdown
for GitHub and turns Hugging Face's cross references into links.
"""

import ast
import re
import shutil
from pathlib import Path

import griffe


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "api"
HEADER = "<!-- Written by docs/make_api.py from the docstrings. Change those, then run `make docs`. -->"
# Docstrings may refer to objects of these libraries.
LIBRARIES = ("accelerate", "datasets", "diffusers", "gradio", "huggingface_hub", "peft", "torch", "transformers")
WIDTH = 100  # of a signature on one line
CROSS_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\()")

# The public API: the title, the subject and the objects of each page. First the families, then the shared rooms.
PAGES = {
    "pipeline": (
        "Pipeline",
        "From a prompt or a class to images.",
        [
            "llamagen.pipeline.AutoregressiveImagePipeline",
            "llamagen.pipeline_output.AutoregressiveImageOutput",
            "outputs.GenerationStep",
            "loading.quantization.quantize_components",
        ],
    ),
    "diffusion": (
        "Pixel diffusion",
        "Imagen's method: U-Nets that draw images from noise, or enlarge smaller ones.",
        [
            "diffusion.pipeline.PixelDiffusionPipeline",
            "diffusion.pipeline_output.PixelDiffusionOutput",
            "diffusion.unet.efficient_unet",
            "diffusion.unet.predict",
            "diffusion.denoising.denoise",
            "diffusion.denoising.DenoisingStep",
            "diffusion.preconditioning.linear_guess",
            "diffusion.guides.ClassifierGuide",
            "diffusion.guides.CLIPGuide",
            "diffusion.noisy_classifier.NoisyClassifier",
            "diffusion.schedules.training_scheduler",
            "diffusion.schedules.sampling_scheduler",
            "diffusion.schedules.with_thresholding",
            "diffusion.schedules.augment",
        ],
    ),
    "cascade": (
        "Cascades",
        "A base draws small images, and upsamplers enlarge them.",
        [
            "imagen.cascade.CascadePipeline",
            "imagen.cascade_output.CascadeOutput",
        ],
    ),
    "unclip": (
        "DALL-E 2",
        "A prior draws image embeddings from captions, and a decoder draws images from them.",
        [
            "unclip.decoder_pipeline.PriorDecoderPipeline",
            "unclip.decoder_output.PriorDecoderOutput",
            "unclip.decoder_pipeline.slerp",
            "unclip.prior.EmbeddingPriorPipeline",
            "unclip.prior_output.EmbeddingPriorOutput",
            "unclip.clip_encoders.CLIPEncodingMixin",
            "unclip.clip_encoders.TextCondition",
            "unclip.clip_encoders.load_clip_encoders",
            "unclip.embedding_denoising.denoise_embeddings",
            "unclip.embedding_denoising.prior_scheduler",
            "unclip.embedding_codes.EmbeddingQuantizer",
        ],
    ),
    "models": (
        "Models",
        "The image tokenizer, a diffusers model, the generator, a transformers model, and their configuration.",
        [
            "llamagen.vq_model.LlamaGenVQModel",
            "llamagen.vq_model.LlamaGenVQEncoderOutput",
            "llamagen.vq_model.LlamaGenVQOutput",
            "llamagen.configuration.LlamaGenConfig",
            "llamagen.modeling.LlamaGenForConditionalGeneration",
            "llamagen.modeling.LlamaGenModel",
        ],
    ),
    "decoding": (
        "Decoding and sampling",
        "The loop that generates codes, and the pure functions from logits to a code.",
        [
            "llamagen.decoding.CodeDecoder",
            "llamagen.windows.CodeWindows",
            "llamagen.noise.draw_noise_keys",
            "llamagen.noise.gumbel_noise",
            "llamagen.sampling.sample",
            "llamagen.sampling.draw",
            "llamagen.sampling.filter_top_k",
            "llamagen.sampling.filter_top_p",
            "llamagen.sampling.guide",
            "llamagen.sampling.is_guided",
            "llamagen.sampling.SamplingParams",
            "llamagen.likelihood.mean_log_likelihoods",
        ],
    ),
    "conversion": (
        "Conversion",
        "From released LlamaGen files to the models of this package, as `llamagen convert` does it.",
        [
            "llamagen.conversion.convert_checkpoint",
            "llamagen.conversion.load_released",
            "llamagen.conversion.vq_model_from_released",
            "llamagen.conversion.transformer_from_released",
            "llamagen.conversion.convert_transformer_state_dict",
        ],
    ),
    "images": (
        "Images",
        "Reading image files, PNG files with parameters, and scorers for the best of several images.",
        [
            "images.reading.read_image",
            "provenance.save_png",
            "provenance.read_parameters",
            "reranking.Candidate",
            "clip.CLIPScorer",
            "clip.load_clip",
        ],
    ),
    "data": (
        "Data",
        "Datasets, and the steps of `llamagen prepare`. Settings are the keys of a recipe's sections.",
        [
            "data.source.DataConfig",
            "data.shards.StageConfig",
            "data.filtering.FilterConfig",
            "data.filtering.filter_rows",
            "data.scoring.ScoreConfig",
            "data.scoring.score",
            "data.recaptioning.RecaptionConfig",
            "data.recaptioning.recaption",
        ],
    ),
    "training": (
        "Training",
        "The stages from images to a pipeline. Settings are the keys of a recipe's sections.",
        [
            "training.config.RunConfig",
            "llamagen.training.vq_config.TokenizerTrainingConfig",
            "llamagen.training.vq_trainer.train_tokenizer",
            "llamagen.training.extraction.CodeExtractionConfig",
            "llamagen.training.extraction.extract_codes",
            "llamagen.training.generator_config.GeneratorTrainingConfig",
            "llamagen.training.generator_trainer.train_generator",
            "diffusion.training.diffusion_config.DiffusionTrainingConfig",
            "unclip.training.prior_config.PriorTrainingConfig",
            "diffusion.training.diffusion_trainer.train_diffusion",
            "unclip.training.prior_trainer.train_prior",
            "diffusion.training.classifier_config.ClassifierTrainingConfig",
            "diffusion.training.classifier_trainer.train_classifier",
            "unclip.training.clip_config.CLIPTrainingConfig",
            "unclip.training.clip_trainer.train_clip",
            "training.trainer.Trainer",
            "training.trainer.TrainingTask",
        ],
    ),
    "evaluation": (
        "Evaluation",
        "Metrics of images and of image tokenizers, and the steps from images to a report.",
        [
            "evaluation.metrics.frechet_distance",
            "evaluation.metrics.FeatureStatistics",
            "evaluation.manifold.precision_recall",
            "evaluation.metrics.inception_score",
            "evaluation.metrics.kernel_distance",
            "evaluation.images.open_images",
            "evaluation.images.Images",
            "evaluation.inception.InceptionFeatures",
            "evaluation.inception.ImageFeatures",
            "evaluation.statistics.ImageStatistics",
            "evaluation.statistics.compute_statistics",
            "evaluation.statistics.reference_statistics",
            "evaluation.statistics.evaluate_generation",
            "evaluation.sampling.SamplingConfig",
            "evaluation.sampling.sample_images",
            "evaluation.presets.Preset",
            "evaluation.run.EvaluationConfig",
            "evaluation.run.evaluate",
            "evaluation.text.embed_pairs",
            "evaluation.text.clip_score",
            "evaluation.text.r_precision",
            "evaluation.text.retrieval_recall",
            "autoencoders.load_autoencoder",
            "autoencoders.reconstruct",
            "autoencoders.describe_autoencoder",
            "evaluation.tokenizers.evaluate_tokenizer",
            "evaluation.tokenizers.compare_tokenizers",
            "evaluation.report.write_report",
        ],
    ),
    "vllm": (
        "vLLM",
        "The generator on vLLM: an engine for servers, and its parts for users of vLLM's own classes.",
        [
            "llamagen.vllm.engine.VLLMEngine",
            "llamagen.vllm.engine_args.engine_arguments",
            "llamagen.vllm.requests.GenerationSettings",
            "llamagen.vllm.requests.sampling_params",
            "llamagen.vllm.requests.class_prompt",
            "llamagen.vllm.requests.text_prompt",
        ],
    ),
    "serving": (
        "Serving",
        "The server behind `llamagen serve`, and the interface of its engines.",
        [
            "serving.settings.ServingSettings",
            "serving.service.ImageService",
            "serving.frontend.ImageRequest",
            "serving.frontend.Frontend",
            "serving.engine.Engine",
            "serving.engine.EngineRequest",
            "serving.local_engine.LocalEngine",
            "llamagen.serving.frontend.LlamaGenFrontend",
            "unclip.serving.frontend.PriorDecoderFrontend",
            "llamagen.serving.batch.GenerationRequest",
            "llamagen.serving.batch.ContinuousBatch",
            "serving.server.serve",
        ],
    ),
    "hub": (
        "Loading and publishing",
        "Checkpoints of any family, from the Hub and to it.",
        [
            "families.load_pipeline",
            "families.find_family",
            "families.Method",
            "families.Family",
            "families.ModelFamily",
            "publishing.publish.publish",
        ],
    ),
}


def load_package() -> griffe.Module:
    """Parse the package."""
    options = {"returns_named_value": False, "returns_multiple_items": False, "warnings": False}
    loader = griffe.GriffeLoader(search_paths=[ROOT / "src"], docstring_parser="google", docstring_options=options)
    package = loader.load("llamagen_hf")
    loader.resolve_aliases(external=False)
    return package


def resolve(scope: griffe.Object, name: str) -> griffe.Object | griffe.Alias | None:
    """Find the object of a cross reference in the docstring of `scope`; `None` if another library owns it.

    Names are looked up in the object itself, in its enclosing scopes, and in the package's root.

    Raises:
        ValueError: If the object does not exist.
    """
    package = scope.package
    first, *rest = name.split(".")
    try:
        library, *path = scope.resolve(first).split(".")
    except griffe.NameResolutionError:
        library, *path = [first] if first in (package.name, *LIBRARIES) else [package.name, first]
    if library != package.name:
        return None
    try:
        return package[".".join(path + rest)]
    except KeyError as error:
        raise ValueError(f"{scope.path} refers to [`{name}`], which does not exist.") from error


def broken_references(package: griffe.Module) -> list[str]:
    """Return what is wrong with the cross references in all docstrings of the package, including private ones."""
    broken = []

    def visit(obj: griffe.Object) -> None:
        for _, name in CROSS_REFERENCE.findall(obj.docstring.value if obj.docstring is not None else ""):
            try:
                resolve(obj, name)
            except ValueError as error:
                broken.append(str(error))
        for member in obj.members.values():
            if not member.is_alias:
                visit(member)

    visit(package)
    return broken


def documented_members(cls: griffe.Class) -> list[griffe.Object | griffe.Alias]:
    """List methods and properties with a docstring: the call, then the class's own, then those of our base classes."""
    members = [member for name, member in cls.all_members.items() if name == "__call__" or not name.startswith("_")]
    members = [member for member in members if not member.is_class and member.docstring is not None]
    return sorted(members, key=lambda member: (member.name != "__call__", member.is_alias))


class Reference:
    """The pages of the reference and the links between them."""

    def __init__(self):
        self.package = load_package()
        self.places: dict[str, str] = {}  # page and anchor of each object that has a heading
        for page, (_, _, names) in PAGES.items():
            for obj in map(self.package.__getitem__, names):
                self.places[obj.path] = f"{page}.md#{slug(obj.name)}"
                for member in documented_members(obj) if obj.is_class else ():
                    place = f"{page}.md#{slug(f'{obj.name}.{member.name}')}"
                    self.places[member.path] = self.places[member.canonical_path] = place

    def pages(self) -> dict[str, str]:
        """Return all pages by their file names."""
        pages = {}
        contents = [HEADER, "# API reference", "Generated from the docstrings by `make docs`."]
        for page, (title, about, names) in PAGES.items():
            objects = [self.package[name] for name in names]
            listed = "\n".join(f"- {self.link(obj, obj.name)}: {self.first_sentence(obj)}" for obj in objects)
            contents += [f"## [{title}]({page}.md)", about, listed]
            parts = [HEADER, f"# {title}", about] + [part for obj in objects for part in self.describe(obj, obj.name)]
            pages[f"{page}.md"] = join(parts)
        return pages | {"index.md": join(contents)}

    def describe(self, obj: griffe.Object, title: str) -> list[str]:
        """Return the Markdown blocks of a class, a function or a property."""
        level = "###" if "." in title else "##"
        blocks = [f"{level} `{title}`", f"```python\n{self.signature(obj, title)}\n```"]
        if obj.is_class and (bases := self.bases(obj)):
            blocks.append(f"Bases: {', '.join(bases)}")
        for section in obj.docstring.parsed:
            blocks += self.section(obj, section)
        if obj.is_class:
            if fields := self.fields(obj):
                blocks += ["**Fields**", "\n".join(fields)]
            for member in documented_members(obj):
                blocks += self.describe(member, f"{title}.{member.name}")
        return blocks

    def signature(self, obj: griffe.Object, title: str) -> str:
        """Return how to import and how to call an object."""
        if obj.is_attribute:
            return f"{title}: {source(obj.annotation)}"
        module = self.package.path if obj.name in self.package.exports else obj.module.path
        start = "" if "." in title else f"from {module} import {obj.name}\n\n"
        if obj.is_class and ("__init__" not in obj.members or "dataclass" in obj.labels):
            return start.strip()
        shown = [show_parameter(parameter) for parameter in obj.parameters if parameter.name not in ("self", "cls")]
        result = f" -> {source(obj.returns)}" if obj.is_function and obj.returns is not None else ""
        name = title.rpartition(".")[2] if obj.is_function and "classmethod" not in obj.labels else title
        line = f"{name}({', '.join(shown)}){result}"
        if len(line) > WIDTH:
            line = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in shown) + f"){result}"
        return start + line

    def section(self, obj: griffe.Object, section: griffe.DocstringSection) -> list[str]:
        """Return the Markdown blocks of one section of a docstring."""
        kind, value = section.kind.value, section.value
        if kind == "text":
            return [self.linked(obj, value).replace("Example:\n", "**Example**\n")]
        if kind in ("parameters", "attributes"):
            items = [
                f"- **{item.name}**{f' ({item.annotation})' if isinstance(item.annotation, str) else ''}: "
                + " ".join(item.description.split())
                for item in value
            ]
        elif kind == "raises":
            items = [f"- `{item.annotation}`: " + " ".join(item.description.split()) for item in value]
        elif kind in ("returns", "yields"):
            # A text without a type describes the type of the signature.
            items = [
                f"{item.annotation}: " * isinstance(item.annotation, str) + " ".join(item.description.split())
                for item in value
            ]
        else:
            raise ValueError(f"{obj.path} has a section {kind!r}, which docs/make_api.py does not support.")
        return [f"**{kind.capitalize()}**", self.linked(obj, "\n".join(items))]

    def fields(self, cls: griffe.Class) -> list[str]:
        """Describe the fields of a dataclass whose metadata has a help text."""
        items = []
        for field in cls.members.values():
            if not isinstance(getattr(field, "value", None), griffe.ExprCall) or str(field.value.function) != "field":
                continue
            given = {argument.name: source(argument.value) for argument in field.value.arguments}
            if "metadata" not in given:
                continue
            default = given.get("default", given.get("default_factory", "").removeprefix("lambda: "))
            default = {"dict": "{}", "list": "[]"}.get(default, default)
            kind = f"`{source(field.annotation)}`"
            if default:
                kind += ", *optional*" + (f", defaults to `{default}`" if default != "None" else "")
            items.append(f"- **{field.name}** ({kind}): {ast.literal_eval(given['metadata'])['help']}")
        return items

    def first_sentence(self, obj: griffe.Object) -> str:
        """Return the first sentence of a docstring."""
        paragraph = " ".join(obj.docstring.value.split("\n\n")[0].split())
        return self.linked(obj, re.split(r"(?<=[.;:]) ", paragraph)[0].rstrip(".;:") + ".")

    def linked(self, scope: griffe.Object, text: str) -> str:
        """Turn the cross references ``[`Name`]`` and ``[`~module.Name`]`` of a text into links, or into code."""

        def replace(match: re.Match) -> str:
            shortened, name = match.groups()
            # Methods keep their class: `DiffusionPipeline.from_pretrained`, not `from_pretrained`.
            label = re.search(r"([A-Z]\w*\.)?\w+$", name)[0] if shortened else name
            return self.link(resolve(scope, name), label)

        return CROSS_REFERENCE.sub(replace, text)

    def link(self, obj: griffe.Object | griffe.Alias | None, label: str) -> str:
        place = obj and self.places.get(obj.canonical_path)
        return f"[`{label}`]({place})" if place else f"`{label}`"

    def bases(self, cls: griffe.Class) -> list[str]:
        """Return the base classes; those of ours without a page are replaced by their own bases."""
        found = []
        for name in map(str, cls.bases):
            base = resolve(cls, name)
            has_page = base is None or base.canonical_path in self.places
            found += [self.link(base, name)] if has_page else self.bases(base)
        return found


def show_parameter(parameter: griffe.Parameter) -> str:
    """Write a parameter as in the source."""
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(parameter.kind, "")
    annotation = f": {source(parameter.annotation)}" if parameter.annotation is not None else ""
    if parameter.default is None or stars:
        return f"{stars}{parameter.name}{annotation}"
    return parameter.name + (f"{annotation} = " if annotation else "=") + source(parameter.default)


def source(expression: griffe.Expr | str) -> str:
    """Write an expression as in the source: griffe renders the strings of a `Literal` with single quotes."""
    text = str(expression)
    return text if '"' in text else text.replace("'", '"')


def slug(title: str) -> str:
    """Return the anchor that GitHub gives a heading made of a dotted name."""
    return title.lower().replace(".", "")


def join(blocks: list[str]) -> str:
    return "\n\n".join(block.strip() for block in blocks) + "\n"


if __name__ == "__main__":
    pages = Reference().pages()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name, text in pages.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
