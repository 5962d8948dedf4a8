"""One evaluation from its beginning to its numbers: draw, compare, say with what."""

from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel, ProcessorMixin

from ..families import find_family
from ..loading.checkpoint import EMOJI_CHECKPOINT, is_shipped
from ..local_paths import public_name
from ..processes import this_process
from .generation import evaluate_generation
from .images import open_images
from .inception import FeatureExtractor
from .presets import Preset, check_reference, get_preset
from .sampling import SamplingConfig, sample_images
from .statistics import compute_statistics, reference_statistics
from .text import clip_score, embed_pairs, prompt_clip_scores, r_precision


R_PRECISION_PROMPTS = 100  # to choose from, where there are as many


@dataclass
class EvaluationConfig:
    """What to evaluate, and against what.

    Args:
        subjects (`list[str]`): Checkpoints of any diffusers pipelines, to be drawn from; or images, as
            [`~llamagen_hf.evaluation.images.open_images`] takes them.
        reference (`str`): Images or statistics, as for
            [`~llamagen_hf.evaluation.statistics.reference_statistics`].
        output_dir (`str`): Folder for the images that are drawn.
        preset (`str`, *optional*): A name in [`~llamagen_hf.evaluation.presets.PRESETS`]; what is given beside it
            has precedence.
        count (`int`, *optional*): Images to draw of each checkpoint; the preset's, or as many as the reference has.
        prompts (`list[str]`, *optional*): What to draw; by default classes.
        classes, seed, batch_size, num_classes: As in [`~llamagen_hf.evaluation.sampling.SamplingConfig`].
        guidance_scales (`list[float]`, *optional*): Evaluate with each of them; by default with the checkpoint's own.
        arguments (`dict`, *optional*): More for the pipelines' calls.
        image_size (`int`, *optional*): Side that all images are brought to; the preset's by default.
        split (`str`, *optional*, defaults to `"test"`): Of a dataset.
        skip_bad (`bool`, *optional*, defaults to `False`): Leave out, and count, images that can't be used.
        device (`str`, *optional*, defaults to `"cpu"`): Where to draw.
        dtype (`str`, *optional*, defaults to `"float32"`): Of the checkpoints.
        overwrite (`bool`, *optional*, defaults to `False`): Draw anew what an earlier run drew into `output_dir`.
    """

    subjects: list[str]
    reference: str
    output_dir: str
    preset: str | None = None
    count: int | None = None
    prompts: list[str] | None = None
    classes: str = "random"
    num_classes: int | None = None
    seed: int = 0
    batch_size: int = 32
    guidance_scales: list[float] | None = None
    arguments: dict = field(default_factory=dict)
    image_size: int | None = None
    split: str = "test"
    skip_bad: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    overwrite: bool = False


def evaluate(
    config: EvaluationConfig,
    extractor: FeatureExtractor,
    clip: tuple[PreTrainedModel, ProcessorMixin] | None = None,
    progress: bool = True,
) -> list[dict]:
    """Draw from checkpoints as needed, and compare their images with the reference.

    Args:
        config ([`EvaluationConfig`]): What, and against what.
        extractor ([`~llamagen_hf.evaluation.inception.FeatureExtractor`]): Features; those of
            [`~llamagen_hf.evaluation.inception.InceptionFeatures`] make the numbers FID, sFID and so on.
        clip (`tuple`, *optional*): A CLIP model and its processor, for CLIP score and R-precision of prompts, and the
            `scores` of each.
        progress (`bool`, *optional*, defaults to `True`): Show bars with the time left.

    Returns:
        `list[dict]`: For each subject what [`~llamagen_hf.evaluation.report.write_report`] takes, and `samples`, the
            folder or file with its images. Of several guidance scales the one with the lowest FID counts, and all
            are in `sweep`. On all processes but the first the list is empty.

    Raises:
        OSError or ValueError: In one sentence, if something is not there or does not fit.
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
        raise ValueError(f"{reference.name!r} does not say of how many images it is; set `count`.")
    if preset is not None:
        check_reference(preset, reference, count)
    common = {
        "preset": config.preset,
        "reference": {"name": reference.name, "count": reference.count or None},
        "features": extractor.fingerprint[:24],
        "device": config.device,
        "date": date.today().isoformat(),
        "versions": versions(),
    }

    def measure(source, prompts: list[str] | None) -> dict:
        # Of what was drawn with prompts nothing may be left out: the others would move to wrong prompts.
        images = open_images(source, **options | {"skip_bad": config.skip_bad and prompts is None})
        samples = compute_statistics(images, extractor, config.batch_size, progress)
        if preset is not None:
            check_reference(preset, reference, samples.count)
        metrics, scores = evaluate_generation(reference, samples), {}
        if clip is not None and prompts is not None:
            said = [prompts[index % len(prompts)] for index in range(samples.count)]
            pairs = embed_pairs(images, said, *clip)
            metrics["clip_score"] = clip_score(*pairs)
            different = list(dict.fromkeys(said))
            if len(different) > 1:
                others = min(R_PRECISION_PROMPTS, len(different))
                metrics["r_precision"] = r_precision(*pairs, num_candidates=others)
                named = zip(different, prompt_clip_scores(*pairs), strict=True)
                scores = {"score_metric": "clip_score", "scores": [{"name": n, "score": s} for n, s in named]}
        facts = {"count": samples.count, "image_size": list(samples.image_size[::-1]), "metrics": metrics} | scores
        facts |= {"left_out_files": images.left_out} if images.left_out else {}
        return facts | ({"skipped_images": len(images.skipped)} if images.skipped else {})

    results = []
    for subject in config.subjects:
        measured = []
        for scale, source, facts in _images_of(subject, config, preset, count, image_size, progress):
            if state.is_main_process:
                prompts = config.prompts if facts else None
                measured.append((scale, {**facts, **common, "samples": source, **measure(source, prompts)}))
        if measured:
            _, best = min(measured, key=lambda entry: entry[1]["metrics"]["fid"])
            if len(measured) > 1:
                best = best | {"sweep": [{"guidance_scale": scale} | one["metrics"] for scale, one in measured]}
            results.append({"title": public_name(subject)} | best)
    state.wait_for_everyone()
    return results


def is_checkpoint(subject: str) -> bool:
    """Whether a subject is a pipeline to draw from, by what is there, or a Hub id by its form."""
    if is_shipped(subject):
        return True
    path = Path(subject).expanduser()
    if path.exists():
        return (path / DiffusionPipeline.config_name).is_file()
    return path.suffix != ".npz" and not subject.startswith((".", "/", "~"))


def load_subject(subject: str, device: str, dtype: str) -> DiffusionPipeline:
    """A pipeline of any kind.

    Raises:
        OSError: In one sentence, if there is none, or diffusers can't load it.
    """
    try:
        index = DiffusionPipeline.load_config(EMOJI_CHECKPOINT if is_shipped(subject) else subject)
    except (OSError, ValueError) as error:
        raise OSError(f"There is no pipeline {subject!r} to draw from: {str(error).splitlines()[0]}") from error
    if family := find_family(index["_class_name"]):
        pipe = family.pipeline_class.from_pretrained(subject, dtype=getattr(torch, dtype))
    else:
        pipe = DiffusionPipeline.from_pretrained(subject, torch_dtype=getattr(torch, dtype))
    return pipe.to(device)


def versions() -> dict[str, str]:
    """Of what numbers depend on."""
    libraries = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"llamagen_hf": version("llamagen-hf")} | libraries | {"diffusers": diffusers.__version__}


def _images_of(subject, config: EvaluationConfig, preset: Preset | None, count, image_size, progress):
    """For each guidance scale: the scale, where the images are, and facts on the drawing if there was one."""
    if not is_checkpoint(subject):
        yield None, subject, {}
        return
    pipe = load_subject(subject, config.device, config.dtype)
    for scale in config.guidance_scales or [None]:
        arguments = (preset.sampling if preset else {}) | config.arguments
        if scale is not None:
            arguments = arguments | {"guidance_scale": scale}
        sampling = SamplingConfig(
            count=count,
            prompts=config.prompts,
            classes=config.classes,
            num_classes=config.num_classes,
            image_size=image_size,
            batch_size=config.batch_size,
            seed=config.seed,
            arguments=arguments,
            overwrite=config.overwrite,
        )
        title = public_name(subject)
        folder = Path(config.output_dir) / "samples" / (title if scale is None else f"{title}-guidance-{scale:g}")
        source = sample_images(pipe, sampling, folder, progress)
        settings = {"seed": config.seed, "batch_size": config.batch_size, "dtype": config.dtype, **arguments}
        if hasattr(pipe, "sampling_settings"):
            settings |= pipe.sampling_settings(**arguments)
        said = f"{len(config.prompts)} prompts" if config.prompts else f"{config.classes} classes"
        yield scale, source, {"checkpoint": subject, "sampling": settings | {"conditions": said}}
