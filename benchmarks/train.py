"""Speed of training: our trainer beside a straight PyTorch loop over the same model, in one run.

python benchmarks/train.py --sizes B --batch_size 64 --dtype bfloat16 [--device cuda] [--steps 20] [--repeats 5]
python benchmarks/train.py --sizes diffusion --batch_size 16                  # a U-Net of pixel diffusion
python benchmarks/train.py --sizes emoji --dtype bfloat16 --dropout 0 --modes plain trainer "trainer compiled"

- plain:            the loop without what makes trainings fast on a CPU: eager, float32, SDPA, AdamW that is not fused
- loop:             forward, backward, clipping, AdamW and averaged weights in a dozen lines of PyTorch
- trainer:          `Trainer.train` with its own loader, steps, averaged weights and log lines, under Accelerate
- loop compiled:    the loop with each decoder layer, or the U-Net, compiled
- trainer compiled: the trainer with `compile` set

All start from the same weights and take the same batches. The loops have them ready on the device, their noise added,
while the trainer reads its rows anew, as in real use. Generators are class-conditional, with random codes, extracted
from noise by a tiny tokenizer. U-Nets read no text, and learn images of noise; "emoji upsampler" enlarges crops.
"apart" is how far a mode's weights are from those of the first mode after the steps that warm up, as a share of
the way that these took.
Modes take turns within each repeat, so that whatever else the machine does hits all of them; the medians of their
speeds and of their ratios to the first mode within a repeat are reported, once without and once with averaged weights.
On a GPU, also model FLOPs utilization, and the most memory that a mode used by itself.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from itertools import islice, product
from pathlib import Path

import accelerate
import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import send_to_device
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from llamagen_hf import LlamaGenVQModel
from llamagen_hf.data.source import DataConfig
from llamagen_hf.diffusion.training.diffusion_config import DiffusionTrainingConfig
from llamagen_hf.diffusion.training.diffusion_trainer import DiffusionTask
from llamagen_hf.diffusion.unet import predict
from llamagen_hf.llamagen.conversion import VARIANTS
from llamagen_hf.llamagen.training.extraction import CodeExtractionConfig, extract_codes
from llamagen_hf.llamagen.training.generator_config import GeneratorTrainingConfig
from llamagen_hf.llamagen.training.generator_models import flops_per_image
from llamagen_hf.llamagen.training.generator_trainer import GeneratorTask
from llamagen_hf.training.config import RunConfig
from llamagen_hf.training.hardware import peak_flops
from llamagen_hf.training.trainer import Trainer


# Sizes of the Llama, the side of its grid and the number of its codes; "emoji" is pipelines/recipes/emoji.yaml's.
SIZES = {name: ({"variant": name}, 16, 16384) for name in VARIANTS}
for name, *sizes, grid_size, vocab_size in (("tiny", 32, 64, 2, 2, 4, 64), ("emoji", 320, 896, 6, 5, 8, 4096)):
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    SIZES[name] = dict(zip(fields, sizes, strict=True)), grid_size, vocab_size
# Sizes of the U-Net, and the side of the images; "diffusion" is near docs/cascade.md's, those of the emoji are
# pipelines/recipes/emoji_imagen.yaml's and emoji_upsampler.yaml's.
UPSAMPLER = {"patch_size": 2, "low_image_size": 64, "crop_size": 64}
UNETS = {
    name: (
        {"block_out_channels": widths, "layers_per_block": layers, "attention_levels": levels, "conditioning": "none"}
        | more,
        side,
    )
    for name, widths, layers, levels, side, more in (
        ("tiny diffusion", [8, 16], [1, 1], [1], 16, {"attention_head_dim": 8}),
        ("tiny upsampler", [8, 16], [1, 1], [1], 16, {"attention_head_dim": 8, "low_image_size": 8, "crop_size": 8}),
        ("diffusion", [64, 96, 128], [1, 1, 1], [2], 64, {"attention_head_dim": 32}),
        ("emoji imagen", [96, 160, 224], [2, 2, 2], [1, 2], 64, {"patch_size": 2}),
        (
            "emoji upsampler",
            [48, 96, 128],
            [1, 1, 2],
            [2],
            128,
            {"patch_size": 2, "low_image_size": 64, "crop_size": 64},
        ),
    )
}
MODES = ("plain", "loop", "trainer", "loop compiled", "trainer compiled")
CLASSES, NEVER = 1000, 10**9


def write_images(folder: Path, side: int, rows: int) -> DataConfig:
    """Write images of noise, with classes."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (rows, side, side, 3), np.uint8)
    columns = {"image": [Image.fromarray(image) for image in noise], "label": rng.integers(0, CLASSES, rows)}
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int32"))
    (folder / "images").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "images" / "train.parquet")
    return DataConfig(str(folder / "images"), image_size=side, test_fraction=0.0)


def write_codes(folder: Path, grid_size: int, vocab_size: int, rows: int) -> dict[str, str]:
    """Extract codes from noise, with classes; the folders that a training asks for."""
    data = write_images(folder, 2 * grid_size, rows)
    torch.manual_seed(0)
    LlamaGenVQModel(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=8, norm_num_groups=4,
        num_vq_embeddings=vocab_size, sample_size=2 * grid_size,
    ).save_pretrained(folder / "tokenizer")  # fmt: skip
    paths = {"codes_dir": str(folder / "codes"), "vq_model": str(folder / "tokenizer")}
    extract_codes(data, CodeExtractionConfig(paths["vq_model"], paths["codes_dir"]))
    return paths


class Recording:
    """A training as it is, which also keeps each step's loss."""

    def train_step(self, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        values = super().train_step(micro_batches)
        self.losses.append(values["loss"])
        return values


class RecordingGeneratorTask(Recording, GeneratorTask):
    @property
    def trained(self) -> torch.nn.Module:
        return self.transformer


class RecordingDiffusionTask(Recording, DiffusionTask):
    @property
    def trained(self) -> torch.nn.Module:
        return self.models.unet


class TrainerSide:
    """Our trainer, for as many steps at a time as wanted."""

    def __init__(self, config: RunConfig, task: Recording):
        self.trainer = Trainer(config, task)
        self.trainer.setup()
        self.loader = self.trainer.steps

    @property
    def model(self) -> torch.nn.Module:
        return self.trainer.task.trained

    def train_steps(self, steps: int) -> list[torch.Tensor]:
        """Take `steps` steps, always from the first batch on; their losses."""
        self.trainer.task.losses = []
        self.loader.restart()
        self.trainer.steps = islice(self.loader, steps)
        self.trainer.train()
        return self.trainer.task.losses


class Loop:
    """What one would write for this model alone."""

    def __init__(self, config: RunConfig, model: torch.nn.Module, batches: list[dict]):
        self.config, self.batches, self.model = config, batches, model
        self.loss = self.diffusion_loss if isinstance(model, UNet2DConditionModel) else self.generator_loss
        if config.compile:
            for layer in [model] if isinstance(model, UNet2DConditionModel) else model.model.layers:
                layer.compile()
        matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == kind] for kind in (True, False))
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.adam_beta1, config.adam_beta2))
        self.ema = None
        if config.ema_decay:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))

    def generator_loss(self, batch: dict) -> torch.Tensor:
        codes = batch["codes"]
        inputs = torch.cat([self.model.config.vocab_size + batch["class_labels"][:, None], codes[:, :-1]], dim=1)
        return self.model(inputs, use_cache=False, labels=codes).loss

    def diffusion_loss(self, batch: dict) -> torch.Tensor:
        inputs = {name: batch[name] for name in ("noisy", "timesteps", "small", "aug_level") if name in batch}
        return F.mse_loss(predict(self.model, **inputs, memory_format=torch.channels_last).float(), batch["target"])

    def train_steps(self, steps: int) -> list[torch.Tensor]:
        losses = []
        for batch in self.batches[:steps]:
            device = next(iter(batch.values())).device.type
            with torch.autocast(device, torch.bfloat16, enabled=self.config.mixed_precision == "bf16"):
                loss = self.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            losses.append(loss.detach())
        return losses


def flattened(model: torch.nn.Module) -> torch.Tensor:
    """A copy of the weights, as one vector in float32."""
    return torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])


class Bench:
    """All modes of one size, side by side in memory."""

    def __init__(self, size: str, ema_decay: float, args: argparse.Namespace, folder: Path):
        self.args = args
        torch.compiler.reset()  # or the second size is compiled for any shape, and slower
        rows, self.data = args.batch_size * args.steps, None
        if size in UNETS:
            self.settings, side = UNETS[size]
            self.data = write_images(folder, side, rows)
        else:
            llama, grid_size, vocab_size = SIZES[size]
            self.settings = write_codes(folder, grid_size, vocab_size, rows) | llama
            self.settings |= {"num_classes": CLASSES, "dropout": args.dropout, "condition_dropout": args.dropout}
        self.settings |= {"output_dir": str(folder / "out"), "ema_decay": ema_decay, "batch_size": args.batch_size}
        self.settings |= {"mixed_precision": "bf16" if args.dtype == "bfloat16" else "no", "log_steps": args.steps}
        self.settings |= dict.fromkeys(("max_train_steps", "checkpointing_steps", "eval_steps", "sample_steps"), NEVER)
        side = self.build("trainer")
        self.device, self.on_gpu = side.trainer.device, side.trainer.device.type == "cuda"
        self.batches = [batch for (batch,) in send_to_device(list(islice(side.loader, args.steps)), self.device)]
        if self.data is not None:
            self.batches = [side.trainer.task.encode(batch) for batch in self.batches]
        self.model = copy.deepcopy(side.trainer.task.trained)
        del side
        self.sides, self.held, self.losses, self.apart = {}, {}, {}, {}
        start, first = flattened(self.model), None
        for mode in args.modes:
            before = self.allocated()
            self.sides[mode] = self.build(mode)
            self.losses[mode] = [loss.item() for loss in self.sides[mode].train_steps(args.steps)]  # and compiles
            self.held[mode] = self.allocated() - before
            found = flattened(self.sides[mode].model)
            first = found if first is None else first
            self.apart[mode] = ((found - first).norm() / (first - start).norm()).item()

    def build(self, mode: str) -> TrainerSide | Loop:
        kind = GeneratorTrainingConfig if self.data is None else DiffusionTrainingConfig
        changed = {"mixed_precision": "no"} if mode == "plain" else {}
        config = kind(**self.settings | changed, compile="compiled" in mode)
        if mode == "plain" or "loop" in mode:
            model = copy.deepcopy(self.model)
            if mode == "plain" and self.data is None:
                model.set_attn_implementation("sdpa")
            return Loop(config, model, self.batches)
        is_generator = self.data is None
        task = RecordingGeneratorTask(config) if is_generator else RecordingDiffusionTask(self.data, config)
        return TrainerSide(config, task)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else 0

    def turn(self, mode: str) -> tuple[float, int]:
        """Seconds of all steps, and the most bytes of GPU memory that this mode used, without what others hold."""
        others = self.allocated() - self.held[mode]
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
        clock = time.process_time if self.args.clock == "cpu" else time.perf_counter
        start = clock()
        self.sides[mode].train_steps(self.args.steps)
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        seconds = clock() - start
        return seconds, torch.cuda.max_memory_allocated(self.device) - others if self.on_gpu else 0


def measure(size: str, ema_decay: float, args: argparse.Namespace) -> list[dict]:
    """One record a mode: speeds, their ratio to the first mode's, and the losses of the steps that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(size, ema_decay, args, Path(folder))
        rounds = [{mode: bench.turn(mode) for mode in args.modes} for _ in range(args.repeats)]
    if size in UNETS:
        peak, codes, flops = None, bench.model.config.sample_size**2, None
    else:
        peak, codes, flops = peak_flops(bench.device), bench.model.config.num_codes, flops_per_image(bench.model)
    records = []
    for mode in args.modes:
        images = args.batch_size * args.steps / statistics.median(times[mode][0] for times in rounds)
        records.append(
            {
                "size": size,
                "averaged_weights": bool(ema_decay),
                "mode": mode,
                "images_per_second": images,
                "tokens_per_second": images * codes,
                "ratio": statistics.median(times[args.modes[0]][0] / times[mode][0] for times in rounds),
                "mfu": images * flops / peak if peak else None,
                "peak_gib": max(times[mode][1] for times in rounds) / 2**30 or None,
                "apart": bench.apart[mode],
                "losses": bench.losses[mode],
            }
        )
    return records


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES, *UNETS], default=["B"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="steps of a mode's turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each mode, after one that warms up")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is autocast")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dropout", type=float, default=0.1, help="all dropouts, that of the class included")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES[1:])
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: what this process uses; with one thread, if busy",
    )
    parser.add_argument("--averaged", choices=["no", "yes", "both"], default="both", help="averaged weights")
    return parser.parse_args(args)


def main() -> None:
    args = parse_args()
    os.environ["ACCELERATE_USE_CPU"] = str(args.device == "cpu")
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, accelerate {accelerate.__version__}; batch {args.batch_size}, {args.dtype}, "
        f"{args.steps} steps a turn, {args.repeats} turns, {args.clock} time\n"
    )
    print("| size | averaged | mode | images/s | tokens/s | ratio | apart | MFU | peak GiB |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    records = []
    decays = {"no": (0.0,), "yes": (0.9999,), "both": (0.0, 0.9999)}[args.averaged]
    for size, ema_decay in product(args.sizes, decays):
        for record in measure(size, ema_decay, args):
            mfu = f"{record['mfu']:.1%}" if record["mfu"] else "-"
            peak = f"{record['peak_gib']:.2f}" if record["peak_gib"] else "-"
            speeds = f"{record['images_per_second']:.2f} | {record['tokens_per_second']:.0f} | {record['ratio']:.2f}x"
            averaged, apart = "yes" if ema_decay else "no", f"{record['apart']:.2g}"
            print(f"| {size} | {averaged} | {record['mode']} | {speeds} | {apart} | {mfu} | {peak} |", flush=True)
            records.append(record)
    print(f"\n{json.dumps(records)}")


if __name__ == "__main__":
    main()
