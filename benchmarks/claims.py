"""What the literature and guides claim about these models, measured at a small size: for docs/claims.md.

OMP_NUM_THREADS=1 python benchmarks/claims.py [--only NAME ...] [--dataset runs/emoji/data] [--codes runs/emoji/codes]

- batch:         images a second by batch size: the emoji checkpoint from prompt to pixels, and steps of LlamaGen-B
- cache:         memory and time of a step of LlamaGen-B with the keys and values of earlier codes, and without
- checkpointing: memory and time of a training step with gradient checkpointing, and without
- guidance:      scores of the emoji checkpoint's images by guidance, for training captions
- positions:     a rotary embedding, a sine-cosine one, and AdaLN: test losses of small Llamas, see variants.py
- continuous:    reconstructions from latents before and after quantization, as they are and with a tuned decoder

Seconds are those of the processor, with one thread, so that other work on the machine counts less; what is compared
takes turns, and medians are reported. Memory is the sum of all tensors at the moment when they are most, counted
without computing anything (torch's MemTracker on fake tensors), so it does not depend on device or allocator.
"""

import argparse
import copy
import platform
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import islice

import diffusers
import torch
import torch.nn.functional as F
import transformers
from scoreboard import BATCH_SIZE, as_batches, commit, evenly, load_judge
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import StaticCache, T5Config, T5EncoderModel
from variants import KINDS, learn, read_codes

from llamagen_hf import AutoregressiveImagePipeline, LlamaGenConfig, LlamaGenForConditionalGeneration
from llamagen_hf.data.source import DataConfig
from llamagen_hf.diffusion.unet import efficient_unet
from llamagen_hf.evaluation.reconstruction import ReconstructionMetrics
from llamagen_hf.evaluation.sampling import SamplingConfig, sample_images
from llamagen_hf.llamagen.conversion import VARIANTS
from llamagen_hf.llamagen.decoding import CodeDecoder


BATCHES, GUIDANCE, SEEDS = (1, 2, 4, 8, 16), (1.0, 2.0, 5.0, 8.0), (0, 1)
MEASURED = (40, 80, 160)  # steps of `positions`
EMOJI = {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 6, "num_attention_heads": 5}
EMOJI |= {"grid_size": 8, "vocab_size": 4096}
FLAN_T5_XL = {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu"}


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(modes: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Processor time of each mode: the median of `repeats` turns, after one that warms up."""
    times = {mode: [] for mode in modes}
    for _ in range(1 + repeats):
        for mode, run in modes.items():
            start = time.process_time()
            run()
            times[mode].append(time.process_time() - start)
    return {mode: statistics.median(values[1:]) for mode, values in times.items()}


def peak_mib(build: Callable[[], tuple], run: Callable) -> float:
    """Most MiB of all tensors while `run` works on what `build` returns: a model, and an optimizer if it has one."""
    with FakeTensorMode():
        built = build()
        run(*built)  # from then on, optimizers have their averages
        tracker = MemTracker()
        tracker.track_external(*built)
        with tracker:
            run(*built)
        (sizes,) = tracker.get_tracker_snapshot("peak").values()
    return sizes["Total"] / 2**20


def measure_batch(args: argparse.Namespace) -> str:
    pipe = AutoregressiveImagePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    decoder = CodeDecoder(LlamaGenForConditionalGeneration(LlamaGenConfig(**VARIANTS["B"])).eval())
    num_codes = 6

    def draw(batch: int) -> None:
        pipe("a red apple", num_images_per_prompt=batch, guidance_scale=4.0, output_type="np")

    def step(batch: int) -> None:
        classes = decoder.model.config.vocab_size + torch.arange(batch)
        stream = decoder.stream(torch.rand(batch, 256), class_ids=classes, guidance_scale=4.0)
        deque(islice(stream, num_codes), maxlen=1)
        stream.close()

    images = seconds({batch: lambda batch=batch: draw(batch) for batch in BATCHES}, args.repeats)
    steps = seconds({batch: lambda batch=batch: step(batch) for batch in BATCHES}, args.repeats)
    rows = []
    for batch in BATCHES:
        speed, step_speed = batch / images[batch], batch * num_codes / steps[batch]
        rows.append(
            [f"{batch}", f"{speed:.2f}", f"{speed * images[1]:.2f}x", f"{1000 * steps[batch] / num_codes:.0f}"]
            + [f"{step_speed:.1f}", f"{step_speed * steps[1] / num_codes:.2f}x"]
        )
    return table(["batch", "emoji: images/s", "ratio", "B: ms a step", "codes/s", "ratio"], rows)


def measure_cache(args: argparse.Namespace) -> str:
    config, half, whole = LlamaGenConfig(**VARIANTS["B"]), 128, 256

    def build() -> tuple:
        return (LlamaGenForConditionalGeneration(config).eval(),)

    @torch.no_grad()
    def with_cache(rows: int, cache: StaticCache | None, length: int, model: torch.nn.Module) -> StaticCache:
        cache = cache or StaticCache(config=config, max_cache_len=whole + 8)  # allocated whole at the first step
        codes = torch.zeros(rows, length, dtype=torch.long)
        model(codes, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.no_grad()
    def without_cache(rows: int, length: int, model: torch.nn.Module) -> None:
        model(torch.zeros(rows, length, dtype=torch.long), use_cache=False, logits_to_keep=1)

    (model,), lines = build(), []
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    for rows in (2, 16):
        peaks = {
            "with": peak_mib(build, partial(with_cache, rows, None, 1)),
            "without": peak_mib(build, partial(without_cache, rows, whole)),
        }
        cache = with_cache(rows, None, half, model)
        modes = {
            "with": partial(with_cache, rows, cache, 1, model),
            "without": partial(without_cache, rows, half, model),
        }
        for name, spent in seconds(modes, args.repeats).items():
            peak, step = peaks[name], 1000 * spent
            lines.append([f"{rows} rows, {name} cache", f"{peak:.0f}", f"{peak - weights:.0f}", f"{step:.0f}"])
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**FLAN_T5_XL))
        generator = LlamaGenForConditionalGeneration(LlamaGenConfig(**VARIANTS["XL"], conditioning="text"))
    sizes = [sum(p.numel() for p in module.parameters()) for module in (encoder, generator)]
    columns = ["LlamaGen-B, float32", "peak MiB", "without weights", "ms a step"]
    return (
        f"{table(columns, lines)}\n\nPeaks are of code {whole}, times of code {half}. Text-conditional XL has "
        f"{sizes[1] / 1e6:.0f}M weights, and FLAN-T5-XL's encoder {sizes[0] / 1e6:.0f}M: with stored text states "
        f"{sizes[0] / sum(sizes):.0%} of the weights need not be loaded."
    )


def llama_loss(model: LlamaGenForConditionalGeneration, batch: int) -> torch.Tensor:
    codes = torch.zeros(batch, model.config.num_codes, dtype=torch.long)
    inputs = torch.cat([torch.full_like(codes[:, :1], model.config.vocab_size), codes[:, :-1]], dim=1)
    logits = model(inputs, use_cache=False).logits  # without `labels`, since their check reads values
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def unet_loss(model: diffusers.UNet2DConditionModel, batch: int) -> torch.Tensor:
    side = model.config.sample_size
    images, timesteps = torch.zeros(batch, 3, side, side), torch.zeros(batch, dtype=torch.long)
    return model(images, timesteps, encoder_hidden_states=None, return_dict=False)[0].square().mean()


def measure_checkpointing(args: argparse.Namespace) -> str:
    def llama(sizes: dict, checkpoints: bool) -> torch.nn.Module:
        model = LlamaGenForConditionalGeneration(LlamaGenConfig(**sizes))
        if checkpoints:
            model.activation_checkpointing_enable()
        return model.train()

    def unet(sizes: dict, checkpoints: bool) -> torch.nn.Module:
        model = efficient_unet(64, **sizes)
        if checkpoints:
            model.enable_gradient_checkpointing()
        return model.train()

    def with_optimizer(model: torch.nn.Module) -> tuple:
        return model, torch.optim.AdamW(model.parameters())

    def train(loss: Callable, batch: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = []
    for name, make, sizes, loss, batch, timed_batch in (
        ("LlamaGen-B, batch 8", llama, VARIANTS["B"], llama_loss, 8, 1),
        ("Llama of the emoji checkpoint's size, batch 64", llama, EMOJI, llama_loss, 64, 8),
        ("U-Net of a 64 px base, batch 16", unet, {}, unet_loss, 16, 2),
    ):
        peaks, modes = [], {}
        for checkpoints in (False, True):
            build = partial(make, sizes, checkpoints)
            peaks.append(peak_mib(lambda build=build: with_optimizer(build()), partial(train, loss, batch)))
            modes[checkpoints] = partial(train, loss, timed_batch, *with_optimizer(build()))
        times = seconds(modes, args.repeats)
        change, slower = peaks[1] / peaks[0] - 1, times[True] / times[False]
        rows.append([name, f"{peaks[0]:.0f}", f"{peaks[1]:.0f}", f"{change:+.0%}", f"{slower:.2f}x"])
    return table(["training step, float32, AdamW", "peak MiB", "checkpointed", "change", "time"], rows)


def measure_guidance(args: argparse.Namespace) -> str:
    rows = DataConfig(args.dataset).load("train")
    judge, chosen = load_judge({"train": rows}), evenly(rows, args.count)
    pipe = AutoregressiveImagePipeline.from_pretrained()
    lines = []
    for scale in GUIDANCE:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"arguments": {"guidance_scale": scale}, "batch_size": BATCH_SIZE}
            config = SamplingConfig(args.count, prompts=list(chosen["caption"]), **settings)
            scores = judge.score(sample_images(pipe, config, folder, progress=False), chosen)
        forms = {"distance_to_train": ".2f", "precision_train": ".3f", "recall_train": ".3f"}
        forms |= {"subgroup_accuracy": ".1%", "r_precision": ".1%"}
        lines.append([f"{scale:g}", *(format(scores[key], form) for key, form in forms.items())])
    return table(["guidance", "distance to train", "precision", "recall", "subgroup", "R-precision"], lines)


def measure_positions(args: argparse.Namespace) -> str:
    facts, lines = read_codes(args.codes), []
    for seed in SEEDS:
        for kind in KINDS:
            losses = learn(facts, kind, seed, MEASURED)
            lines.append([f"{kind}, seed {seed}", *(f"{losses[step]:.3f}" for step in MEASURED)])
            print(*lines[-1], file=sys.stderr)
    return table(["test loss, nats a code, after", *(f"{step} steps" for step in MEASURED)], lines)


def measure_continuous(args: argparse.Namespace) -> str:
    model = AutoregressiveImagePipeline.from_pretrained().vq_model.float().eval().requires_grad_(False)
    data, steps, batch_size = DataConfig(args.dataset), 60, 16
    test, train = (evenly(data.load(split), count) for split, count in (("test", 200), ("train", steps * batch_size)))
    images = torch.cat([batch["images"] for batch in as_batches(train, model.config.sample_size)])
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]

    def latents(images: torch.Tensor, quantized: bool) -> torch.Tensor:
        z = F.normalize(model._encode(images), dim=1)
        return model.quantize(z).quantized if quantized else z

    def tune(quantized: bool) -> torch.nn.Module:
        decoder = copy.deepcopy(model).requires_grad_(True)
        optimizer = torch.optim.AdamW([*decoder.decoder.parameters(), *decoder.post_quant_conv.parameters()], 2e-4)
        for batch in images.split(batch_size):
            F.mse_loss(decoder._decode(latents(batch, quantized)), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return decoder

    lines = []
    for name, decoders in (("as it is", (model, model)), (f"tuned {steps} steps", (tune(True), tune(False)))):
        for decoder, quantized in zip(decoders, (True, False), strict=True):
            metrics = ReconstructionMetrics(None, torch.device("cpu"))
            for batch in as_batches(test, model.config.sample_size):
                with torch.no_grad():
                    metrics.add(batch["images"], decoder._decode(latents(batch["images"], quantized)), None)
            scores = metrics.compute()
            kind = "codes" if quantized else "continuous"
            lines.append([f"{kind}, decoder {name}", f"{scores['psnr']:.2f}", f"{scores['ssim']:.3f}"])
    return table(["200 test images, 64 px, 8x8 latents of 8 numbers", "PSNR, dB", "SSIM"], lines)


MEASURES = {
    "batch": measure_batch,
    "cache": measure_cache,
    "checkpointing": measure_checkpointing,
    "guidance": measure_guidance,
    "positions": measure_positions,
    "continuous": measure_continuous,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES), metavar="NAME")
    parser.add_argument("--dataset", default="runs/emoji/data", help="The emoji, as split_emoji.py wrote them.")
    parser.add_argument("--codes", default="runs/emoji/codes", help="Their codes, of pipelines/recipes/emoji.yaml.")
    parser.add_argument("--count", type=int, default=120, help="Images for each guidance.")
    parser.add_argument("--repeats", type=int, default=3, help="Turns of what is timed, after one that warms up.")
    args = parser.parse_args(argv)
    if args.count < 4 or args.repeats < 1:
        parser.error("--count must be at least 4, --repeats at least 1")
    print(
        f"## {date.today()}, claims at {commit()}\n\ntorch {torch.__version__}, transformers "
        f"{transformers.__version__}, diffusers {diffusers.__version__}; {torch.get_num_threads()} threads "
        f"({platform.machine()})."
    )
    for name in args.only:
        start = time.process_time()
        try:
            text = MEASURES[name](args)
        except ValueError as error:
            parser.error(str(error))
        print(f"\n### {name}\n\n{text}\n\n{time.process_time() - start:.0f} s of a core.", flush=True)


if __name__ == "__main__":
    main()
