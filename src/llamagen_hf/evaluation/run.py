"""One evaluation from start to finish: generate, compare, and state the settings."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel, ProcessorMixin

from ..families import check_draws, find_family
from ..loading.checkpoint import is_shipped, shipped_folder
from ..local_paths import public_name
from ..processes import this_process
from .images import open_images
from .inception import FeatureExtractor
from .presets import Preset, PresetName, check_reference, get_preset
from .sampling import ClassChoice, SamplingConfig, sample_images
from .statistics import compute_statistics, evaluate_generation, reference_statistics
from .text import clip_score, embed_pairs, prompt_clip_scores, r_precision


R_PRECISION_PROMPTS = 100  # candidates, where there are as many prompts


@dataclass
class EvaluationConfig:
    """What to evaluate, and against what.

    Args:
        subjects (`list[str]`): Checkpoints of any diffusers pipelines to generate from; or images, as
            [`~llamagen_hf.evaluation.images.open_images`] takes them.
        reference (`str`): Images or statistics, as for
            [`~llamagen_hf.evaluation.statistics.reference_statistics`].
        output_dir (`str`): Folder for the generated images.
        preset (`str`, *optional*): A name in [`~llamagen_hf.evaluation.presets.PRESETS`]; the other settings take
            precedence over it.
        count (`int`, *optional*): Number of images to generate from each checkpoint; by default the preset's, or that
            of the reference.
        prompts (`list[str]`, *optional*): Prompts to generate from; by default classes, or nothing if a checkpoint
            draws without a condition.
        classes, seed, batch_size, num_classes: As in [`~llamagen_hf.evaluation.sampling.SamplingConfig`].
        guidance_scales (`list[float]`, *optional*): Evaluate with each of them; by default with the checkpoint's own.
        arguments (`dict`, *optional*): More arguments for the pipelines' calls.
        image_size (`int`, *optional*): Side in pixels to bring all images to; the preset's by default.
        split (`str`, *optional*, defaults to `"test"`): Split of a dataset.
        skip_bad (`bool`, *optional*, defaults to `False`): Leave out, and count, images that can't be used.
        device (`str`, *optional*, defaults to `"cpu"`): Where to generate.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype of the checkpoints.
        overwrite (`bool`, *optional*, defaults to `False`): Replace what an earlier run generated into `output_dir`.
    """

    subjects: list[str]
    reference: str
    output_dir: str
    preset: PresetName | None = None
    count: int | None = None
    prompts: list[str] | None = None
    classes: ClassChoice = "random"
    num_classes: int | None = None
    seed: int = 0
    batch_size: int = 32
    guidance_scales: list[float] | None = None
    arguments: dict = field(default_factory=dict)
    image_size: int | None = None
    split: str = "test"
    skip_bad: bool = False
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    overwrite: bool = False


def evaluate(
    config: EvaluationConfig,
    extractor: FeatureExtractor,
    clip: tuple[PreTrainedModel, ProcessorMixin] | None = None,
    progress: bool = True,
) -> list[dict]:
    """Generate from checkpoints where needed, and compare the images with the reference.

    Args:
        config ([`EvaluationConfig`]): What to evaluate, and against what.
        extractor ([`~llamagen_hf.evaluation.inception.FeatureExtractor`]): Features; with those of
            [`~llamagen_hf.evaluation.inception.InceptionFeatures`] the numbers are FID, sFID and so on.
        clip (`tuple`, *optional*): A CLIP model and its processor, for CLIP score, R-precision and the `scores` of
            prompts.
        progress (`bool`, *optional*, defaults to `True`): Show progress bars.

    Returns:
        `list[dict]`: For each subject what [`~llamagen_hf.evaluation.report.write_report`] takes, and `samples`, the
            folder or file with its images. With several guidance scales the result is that of the lowest FID, and
            `sweep` holds all. On all processes but the first the list is empty.

    Raises:
        OSError: If a checkpoint, a file or a folder is missing or damaged.
        ValueError: If the settings, the subjects and the reference do not fit each other.
    """
    preset = None if config.preset is None else get_preset(config.preset)
    titles = [public_name(subject) for subject in config.subjects]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise ValueError(f"Two subjects are called {twice[0]!r}, and so are their reports; evaluate them one by one.")
    image_size = config.image_size or (preset.image_size if preset else None)
    options = {"image_size": image_size, "split": config.split, "skip_bad": config.skip_bad}
    state = this_process()
    with state.main_process_first():
        reference = reference_statistics(config.reference, extractor, config.batch_size, progress, **options)
    count = config.count or (preset.count if preset else reference.count)
    if count == 0:
        raise ValueError(f"{reference.name!r} does not state its number of images; set `count`.")
    if preset is not None:
        check_reference(preset, reference, count)
    common = {
        "preset": config.preset,
        "reference": {"name": reference.name, "count": reference.count or None},
        "features": extractor.fingerprint[:24],
        "device": config.device,
        "date": date.today().isoformat(),
        "versions": {"llamagen_hf": version("llamagen-hf")}
        | {library.__name__: library.__version__ for library in (torch, transformers, diffusers)},
    }

    def measure(source: str | Path, prompts: list[str] | None) -> dict:
        # No image generated from prompts may be left out: the others would shift to wrong prompts.
        images = open_images(source, **options | {"skip_bad": config.skip_bad and prompts is None})
        samples = compute_statistics(images, extractor, config.batch_size, progress)
        if preset is not None:
            check_reference(preset, reference, samples.count)
        metrics = evaluate_generation(reference, samples)
        facts = {"count": samples.count, "image_size": list(samples.image_size[::-1]), "metrics": metrics}
        if clip is not None and prompts is not None:
            pairs = embed_pairs(images, [prompts[index % len(prompts)] for index in range(samples.count)], *clip)
            metrics["clip_score"] = clip_score(*pairs)
            different = list(dict.fromkeys(prompts[: samples.count]))
            if len(different) > 1:
                metrics["r_precision"] = r_precision(*pairs, num_candidates=min(R_PRECISION_PROMPTS, len(different)))
                named = zip(different, prompt_clip_scores(*pairs), strict=True)
                facts |= {"score_metric": "clip_score", "scores": [{"name": n, "score": s} for n, s in named]}
        if images.left_out:
            facts["left_out_files"] = images.left_out
        return facts | ({"skipped_images": len(images.skipped)} if images.skipped else {})

    results = []
    for subject, title in zip(config.subjects, titles, strict=True):
        measured = []
        for scale, source, facts in _images_of(subject, config, preset, count, image_size, progress):
            if state.is_main_process:
                prompts = config.prompts if facts else None
                measured.append((scale, {**facts, **common, "samples": source, **measure(source, prompts)}))
        if measured:
            _, best = min(measured, key=lambda entry: entry[1]["metrics"]["fid"])
            if len(measured) > 1:
                best["sweep"] = [{"guidance_scale": scale} | one["metrics"] for scale, one in measured]
            results.append({"title": title} | best)
    state.wait_for_everyone()
    return results


def is_checkpoint(subject: str) -> bool:
    """Whether a subject is a pipeline to generate from: the shipped one, a folder of one, or by its form a Hub id."""
    if is_shipped(subject):
        return True
    path = Path(subject).expanduser()
    if path.exists():
        return (path / DiffusionPipeline.config_name).is_file()
    return path.suffix != ".npz" and not subject.startswith((".", "/", "~"))


def load_subject(subject: str, device: str, dtype: str) -> DiffusionPipeline:
    """Load a pipeline of any kind; an `OSError` if it is missing, or diffusers can't load it."""
    try:
        index = DiffusionPipeline.load_config(shipped_folder(subject) or subject)
    except (OSError, ValueError) as error:
        raise OSError(f"There is no pipeline {subject!r} to generate from: {str(error).splitlines()[0]}") from error
    if family := find_family(index["_class_name"]):
        check_draws(family, "images", subject)
        pipe = family.pipeline_class.from_pretrained(subject, dtype=getattr(torch, dtype))
    else:
        pipe = DiffusionPipeline.from_pretrained(subject, torch_dtype=getattr(torch, dtype))
    return pipe.to(device)


def _images_of(
    subject: str, config: EvaluationConfig, preset: Preset | None, count: int, image_size: int | None, progress: bool
) -> Iterator[tuple[float | None, str | Path, dict]]:
    """For each guidance scale: the scale, where the images are, and the settings if they were generated."""
    if not is_checkpoint(subject):
        yield None, subject, {}
        return
    pipe, title = load_subject(subject, config.device, config.dtype), public_name(subject)
    same = ("prompts", "classes", "num_classes", "batch_size", "seed", "overwrite")
    for scale in config.guidance_scales or [None]:
        arguments = (preset.sampling if preset else {}) | config.arguments
        if scale is not None:
            arguments = arguments | {"guidance_scale": scale}
        sampling = SamplingConfig(
            count, image_size=image_size, arguments=arguments, **{name: getattr(config, name) for name in same}
        )
        folder = Path(config.output_dir) / "samples" / (title if scale is None else f"{title}-guidance-{scale:g}")
        source = sample_images(pipe, sampling, folder, progress)
        settings = {"seed": config.seed, "batch_size": config.batch_size, "dtype": config.dtype, **arguments}
        if hasattr(pipe, "sampling_settings"):
            settings |= pipe.sampling_settings(**arguments)
        settings["conditions"] = f"{len(config.prompts)} prompts" if config.prompts else f"{config.classes} classes"
        if getattr(pipe, "condition_kind", None) == "none":
            settings["conditions"] = "none"
        yield scale, source, {"checkpoint": subject, "sampling": settings}
