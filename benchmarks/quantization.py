"""What quantization saves and what it costs: bytes, seconds, codes, logits and images, beside float32.

python benchmarks/quantization.py [--checkpoint emoji] [--dataset runs/emoji/data] [--count 100] [--compile]
python benchmarks/quantization.py --unet emoji_upsampler [--dataset runs/emoji/data] [--count 100]

The modes are those of llamagen_hf.loading.quantization; "int4", whose weights torchao rounds in groups of 32, but
stores in 8 bits on a CPU; torch's older `quantize_dynamic`, as guides to Imagen recommend it; and bfloat16 for
comparison. The linear layers of the generator are quantized (all but the head, which only `quantize_dynamic` takes
too), or those of a U-Net.

- MB: the weights as they are saved.
- ms/code or s/image, and ratio: for one image, in turns with float32; the ratio is the median of the turns', below 1
  for faster. With --compile also that of compiled steps.
- Logit error: of the guided logits at each code of images that float32 draws, without their mean: the RMS of the
  difference by that of float32. Of a U-Net: the same for the images, which start from the same noise.
- Codes, forced: how often the same Gumbel noise draws the same code there. Codes, free: how many codes of an image are
  the same where each mode goes on from its own, so that nearly all differ after the first difference.
- Loss: the generator's on the codes of training images with their captions, nats a code. No chance is in it.
- Distance: the scoreboard's Frechet distance from all test images of images for evenly spaced test captions, caption i
  with the seed i; for a U-Net, of windows of enlarged images, see benchmarks/upsampling.py. Modes that move it by more
  than 2 % are marked. The lines "other seeds" are float32 again, and show how far chance alone moves it.
"""

import argparse
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import diffusers
import numpy as np
import torch
import torchao
import transformers
from datasets import Dataset
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from scoreboard import BATCH_SIZE, Judge, as_batches, commit, evenly, load_judge
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import IntxWeightOnlyConfig, PerGroup
from transformers import TorchAoConfig
from upsampling import to_array, to_tensor, upsample, windows

from llamagen_hf import AutoregressiveImagePipeline
from llamagen_hf.data.source import DataConfig
from llamagen_hf.diffusion.training.small_images import SmallImages
from llamagen_hf.evaluation import frechet_distance
from llamagen_hf.families import load_pipeline
from llamagen_hf.llamagen.sampling import filter_top_k, filter_top_p, guide
from llamagen_hf.loading.quantization import MODES, quantize_components
from llamagen_hf.local_paths import public_name


REFERENCE, OTHER_SEEDS, DYNAMIC = "float32", "other seeds", "quantize_dynamic"
VARIANTS = (REFERENCE, "bfloat16", *MODES, "int8 and bfloat16", "int4", DYNAMIC)
TOLERANCE = 0.02  # of the distance
OTHERS = 3  # sets of other seeds
COLUMNS = (  # heading, key and format
    ("MB", "megabytes", ".1f"),
    ("ms/code", "milliseconds", ".2f"),
    ("s/image", "seconds", ".3f"),
    ("ratio", "ratio", ".2f"),
    ("compiled", "compiled_ratio", ".2f"),
    ("logit error", "logit_error", ".2%"),
    ("image error", "image_error", ".2%"),
    ("codes, forced", "forced", ".1%"),
    ("codes, free", "free", ".1%"),
    ("loss", "loss", ".3f"),
    ("distance", "distance", ".2f"),
    ("moved", "moved", "+.1%"),
)


def build(name: str, load: Callable[..., DiffusionPipeline], component: str) -> DiffusionPipeline:
    """A pipeline with a component in another precision.

    Args:
        name (`str`): One of `VARIANTS`.
        load (`Callable`): Loads the pipeline, with arguments of `from_pretrained`.
        component (`str`): `"transformer"` or `"unet"`.
    """
    mode, _, dtype = name.partition(" and ")
    if mode in MODES:
        pipe = load(
            dtype=getattr(torch, dtype or REFERENCE), quantization_config=quantize_components({component: mode})
        )
    elif mode == "int4":
        config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
        pipe = load(quantization_config=PipelineQuantizationConfig(quant_mapping={component: config}))
    elif mode == DYNAMIC:
        pipe = load()
        setattr(pipe, component, quantize_dynamic(getattr(pipe, component), {nn.Linear}, dtype=torch.qint8))
    else:
        pipe = load(dtype=getattr(torch, mode))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def count_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights when they are saved."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def measure_seconds(
    calls: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Median seconds of each call, and the median of its ratios to float32's of the same turn."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):  # the first is to warm up
        for name, call in calls.items():
            start = clock()
            call()
            if repeat:
                seconds[name].append(clock() - start)
    ratios = {
        name: [own / reference for own, reference in zip(values, seconds[REFERENCE], strict=True)]
        for name, values in seconds.items()
    }
    return {
        name: {"seconds": statistics.median(values), "ratio": statistics.median(ratios[name])}
        for name, values in seconds.items()
    }


def relative_error(values: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS of the difference, by that of the reference."""
    return ((values - reference).norm() / reference.norm()).item()


@torch.no_grad()
def guided_logits(pipe: AutoregressiveImagePipeline, captions: list[str], codes: torch.Tensor) -> torch.Tensor:
    """The guided logits `(images, codes, V)` at all codes of given images `(images, codes)`, float32."""
    embeds, mask = pipe.encode_prompt(captions)
    embeds = embeds.to(pipe.transformer.dtype)
    null = pipe.transformer.model.uncond_embedding(len(captions)).to(embeds)
    conditional, unconditional = (
        pipe.transformer(input_ids=codes[:, :-1], prompt_embeds=states, prompt_attention_mask=mask).logits
        for states in (embeds, null)
    )
    return guide(conditional, unconditional, pipe.sampling_settings()["guidance_scale"]).float()


@torch.no_grad()
def mean_loss(pipe: AutoregressiveImagePipeline, captions: list[str], codes: torch.Tensor) -> float:
    """The loss on the codes `(images, codes)` of images with captions, nats a code."""
    total = 0.0
    for first in range(0, len(captions), BATCH_SIZE):
        batch = codes[first : first + BATCH_SIZE]
        embeds, mask = pipe.encode_prompt(captions[first : first + BATCH_SIZE])
        condition = {"prompt_embeds": embeds.to(pipe.transformer.dtype), "prompt_attention_mask": mask}
        total += len(batch) * pipe.transformer(input_ids=batch[:, :-1], labels=batch, **condition).loss.item()
    return total / len(captions)


def draw_forced(logits: torch.Tensor, settings: dict[str, float]) -> torch.Tensor:
    """Codes `(images, codes)` from logits `(images, codes, V)` under noise that is always the same."""
    noise = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(0)).log().neg()
    logits = filter_top_k(logits / settings["temperature"], settings["top_k"])
    return (filter_top_p(logits, settings["top_p"]) + noise).argmax(-1)


def measure_generator(
    load: Callable[..., AutoregressiveImagePipeline],
    judge: Judge,
    rows: Dataset,
    known: Dataset,
    names: list[str],
    repeats: int = 5,
    compiles: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """The scores of each variant of a generator of codes, by its name.

    Args:
        load (`Callable`): Loads the pipeline, which takes prompts, with arguments of `from_pretrained`.
        judge ([`Judge`]): Measures distances.
        rows (`datasets.Dataset`): Captions.
        known (`datasets.Dataset`): Images that it was trained on, with captions.
        names (`list[str]`): Of `VARIANTS`, `"float32"` the first.
        repeats (`int`, *optional*, defaults to 5): Turns that are timed.
        compiles (`bool`, *optional*, defaults to `False`): Whether to time compiled steps too.
        clock (`Callable`, *optional*): Tells the seconds, by default on the wall.
    """
    captions = list(rows["caption"])
    pipes = {name: build(name, load, "transformer") for name in names}
    settings = pipes[REFERENCE].sampling_settings()

    def distance(pipe, seed=0):
        images = []
        for first in range(0, len(captions), BATCH_SIZE):
            batch = captions[first : first + BATCH_SIZE]
            generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(batch))]
            images += pipe(batch, generator=generators).images
        return frechet_distance(judge.references["test"], judge.look_at(np.stack(images)))

    def codes(pipe, count):
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        return pipe(captions[:count], generator=generators, output_type="codes").images.flatten(1)

    few = min(len(captions), 16)
    with torch.no_grad():
        vq_model = pipes[REFERENCE].vq_model
        batches = as_batches(known, pipes[REFERENCE].image_size)
        real = torch.cat([vq_model.encode(batch["images"]).codes.flatten(1) for batch in batches])
    own = codes(pipes[REFERENCE], few)
    expected = guided_logits(pipes[REFERENCE], captions[:few], own)
    drawn = draw_forced(expected, settings)
    results = {}
    for name, pipe in pipes.items():
        logits = guided_logits(pipe, captions[:few], own)
        results[name] = {
            "megabytes": count_bytes(pipe.transformer) / 1e6,
            "logit_error": relative_error(*(each - each.mean(-1, keepdim=True) for each in (logits, expected))),
            "forced": (draw_forced(logits, settings) == drawn).float().mean().item(),
            "free": (codes(pipe, few) == own).float().mean().item(),
            "loss": mean_loss(pipe, list(known["caption"]), real),
            "distance": distance(pipe),
        }
    for number in range(1, OTHERS + 1):
        results[f"{OTHER_SEEDS} {number}"] = {"distance": distance(pipes[REFERENCE], seed=number * len(captions))}
    calls = {name: lambda pipe=pipe: codes(pipe, 1) for name, pipe in pipes.items()}
    for name, times in measure_seconds(calls, repeats, clock).items():
        results[name] |= {"milliseconds": 1e3 * times["seconds"] / own.shape[1], "ratio": times["ratio"]}
    if compiles:
        for pipe in pipes.values():
            pipe.compile_step()
        for name, times in measure_seconds(calls, repeats, clock).items():
            results[name]["compiled_ratio"] = times["ratio"]
    return with_moves(results)


def measure_unet(
    load: Callable[..., DiffusionPipeline],
    judge: Judge,
    rows: Dataset,
    names: list[str],
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """The scores of each variant of an upsampler's U-Net, by its name; arguments as for [`measure_generator`].

    There are no other seeds, since all variants start from the same noise. The small images are those of the rows,
    reduced to half of what the upsampler makes.
    """
    pipes = {name: build(name, load, "unet") for name in names}
    size, captions = pipes[REFERENCE].image_size, list(rows["caption"])
    side = min(judge.model.config.image_size, size)
    large = to_tensor(rows, size)
    small = SmallImages(size // 2, size).reduce(large)
    reference = judge.look_at(windows(to_array(large), side))
    expected, results = upsample(pipes[REFERENCE], small, captions), {}
    for name, pipe in pipes.items():
        enlarged = upsample(pipe, small, captions).float()
        results[name] = {
            "megabytes": count_bytes(pipe.unet) / 1e6,
            "image_error": relative_error(enlarged, expected),
            "distance": frechet_distance(reference, judge.look_at(windows(to_array(enlarged), side))),
        }
    calls = {name: lambda pipe=pipe: upsample(pipe, small[:1], captions[:1]) for name, pipe in pipes.items()}
    for name, times in measure_seconds(calls, repeats, clock).items():
        results[name] |= times
    return with_moves(results)


def with_moves(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The results with how far each distance is from float32's, by that."""
    distance = results[REFERENCE]["distance"]
    return {name: scores | {"moved": scores["distance"] / distance - 1} for name, scores in results.items()}


def show(results: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table, without the columns that were not measured."""
    columns = [column for column in COLUMNS if column[1] in results[REFERENCE]]
    lines = [
        f"| weights | {' | '.join(heading for heading, _, _ in columns)} |",
        "|---" + len(columns) * "|---:" + "|",
    ]
    for name, scores in results.items():
        cells = [format(scores[key], form) if key in scores else "" for _, key, form in columns]
        mark = " **over 2 %**" if abs(scores["moved"]) > TOLERANCE else ""
        lines.append(f"| {name} | {' | '.join(cells)}{mark} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="emoji", help="Folder or Hub id of a generator that takes prompts.")
    parser.add_argument("--unet", help="Instead of it, an upsampler by pixel diffusion.")
    parser.add_argument("--dataset", default="runs/emoji/data", help="The emoji, as split_emoji.py wrote them.")
    parser.add_argument("--count", type=int, default=100, help="Images whose distance is measured.")
    parser.add_argument("--modes", nargs="+", choices=VARIANTS[1:], help="Beside float32. Default: all that fit.")
    parser.add_argument("--repeats", type=int, default=5, help="Turns that are timed.")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: of this process alone, for busy machines."
    )
    parser.add_argument("--compile", action="store_true", help="Time compiled steps too; minutes for each mode.")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    path, modes = args.unet or args.checkpoint, args.modes or VARIANTS[1:]
    if args.unet and not args.modes:  # the widths of U-Nets are no multiples of its groups
        modes = [mode for mode in modes if mode != "int4"]
    names = [REFERENCE, *modes]
    if args.unet and args.compile:
        parser.error("--compile is for generators of codes")
    try:
        rows = DataConfig(args.dataset).load("test")
    except ValueError as error:
        parser.error(str(error))
    if not 4 <= args.count <= len(rows):
        parser.error(f"--count is {args.count}; expected 4 to {len(rows)}, the size of the test split")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    chosen, clock = evenly(rows, args.count), time.process_time if args.clock == "cpu" else time.perf_counter

    def load(**kwargs):
        return load_pipeline(path, **kwargs)

    pipe = load()
    if args.unet and not pipe.upsamples:
        parser.error(f"{path} enlarges no images; expected an upsampler")
    if not args.unet and not (isinstance(pipe, AutoregressiveImagePipeline) and pipe.condition_kind == "text"):
        parser.error(f"{path} does not generate codes from prompts")
    if args.unet:
        results = measure_unet(load, load_judge({}), chosen, names, args.repeats, clock)
    else:
        judge, known = load_judge({"test": rows}), evenly(DataConfig(args.dataset).load("train"), args.count)
        results = measure_generator(load, judge, chosen, known, names, args.repeats, args.compile, clock)
    print(
        f"## {date.today()}, {public_name(path)} quantized, at {commit()}\n\n"
        f"torch {torch.__version__}, torchao {torchao.__version__}, transformers {transformers.__version__}, "
        f"diffusers {diffusers.__version__}; {args.count} images, {args.repeats} turns by the {args.clock} clock; "
        f"{(time.perf_counter() - start) / 60:.1f} minutes with {torch.get_num_threads()} threads "
        f"({platform.machine()}).\n\n{show(results)}\n\n{json.dumps(results)}"
    )


if __name__ == "__main__":
    main()
