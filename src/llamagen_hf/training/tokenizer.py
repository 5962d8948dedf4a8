"""Training of the tokenizer: pictures through the codes and back, as close as they get."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, broadcast, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from ..data.images import DataConfig, image_tensors
from ..vq_model import LlamaGenVQModel
from .checkpoints import resume, save_checkpoint


logger = get_logger(__name__)


@dataclass
class TokenizerTrainingConfig:
    """One run of tokenizer training. Fields up to `num_vq_embeddings` are [`LlamaGenVQModel`]'s."""

    output_dir: str = field(metadata={"help": "Folder for the model, with checkpoints/ below it."})
    block_out_channels: list[int] = field(default_factory=lambda: [128, 128, 256, 256, 512])
    layers_per_block: int = 2
    latent_channels: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int = 8
    num_vq_embeddings: int = 16384
    decoder_only: bool = field(
        default=False, metadata={"help": "Keep encoder and codebook, so that codes stay valid."}
    )
    init_from: str | None = field(default=None, metadata={"help": "Tokenizer folder or Hub id to start from."})
    max_train_steps: int = field(default=100_000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=32, metadata={"help": "Pictures a step and process."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak rate."})
    lr_scheduler: str = field(default="constant_with_warmup", metadata={"help": "A name diffusers knows."})
    lr_warmup_steps: int = field(default=500, metadata={"help": "Steps of linear warm-up."})
    random_flip: bool = field(default=True, metadata={"help": "Mirror half of the pictures."})
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of the mean absolute pixel error."})
    l2_weight: float = field(default=1.0, metadata={"help": "Weight of the mean squared pixel error."})
    gradient_weight: float = field(default=0.0, metadata={"help": "Weight of the error in neighbour differences."})
    revive_until_step: int = field(default=0, metadata={"help": "Up to this step, unused codes are moved to data."})
    revive_every: int = field(default=100, metadata={"help": "Steps over which a code must be used to live."})
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the averaged weights, which are saved."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16."})
    checkpointing_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept."})
    log_steps: int = field(default=50, metadata={"help": "Steps between log lines."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, data order and flips."})


def reconstruction_loss(sample: torch.Tensor, images: torch.Tensor, config: TokenizerTrainingConfig) -> torch.Tensor:
    """L1, L2 and the L1 error of horizontal and vertical neighbour differences, which keeps edges sharp."""
    error = sample.float() - images
    loss = config.l1_weight * error.abs().mean() + config.l2_weight * error.square().mean()
    if config.gradient_weight:
        gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = loss + config.gradient_weight * gradients
    return loss


class CodeCounts:
    """How often each code was used since the counts were last cleared; a part of a run's checkpoints."""

    def __init__(self, num_codes: int, device: torch.device):
        self.counts = torch.zeros(num_codes, dtype=torch.long, device=device)

    def add(self, codes: torch.LongTensor) -> None:
        self.counts += codes.flatten().bincount(minlength=len(self.counts))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.counts.copy_(state["counts"])


@torch.no_grad()
def revive_codes(model: LlamaGenVQModel, counts: torch.Tensor, images: torch.Tensor) -> int:
    """Move each code with a zero count onto the encoder's output for a random cell of `images`.

    Returns:
        `int`: How many codes were moved.
    """
    dead = (counts == 0).nonzero().flatten()
    z = F.normalize(model.quant_conv(model.encoder(images)).permute(0, 2, 3, 1).flatten(0, 2).float(), dim=-1)
    dead = dead[torch.randperm(len(dead), device=dead.device)[: len(z)]]
    weight = model.quantize.embedding.weight
    norm = weight.norm(dim=-1).median()  # as long as its neighbours, so that it moves as fast as they do
    weight[dead] = norm * z[torch.randperm(len(z), device=z.device)[: len(dead)]]
    return len(dead)


@torch.no_grad()
def evaluate_tokenizer(model: LlamaGenVQModel, loader: DataLoader) -> dict[str, float]:
    """Mean PSNR in dB over single pictures in [0, 1], and the share of codes that all of them use."""
    psnr, counts = [], CodeCounts(model.config.num_vq_embeddings, model.device)
    for batch in loader:
        images = batch["images"].to(model.device)
        output = model(images)
        error = ((output.sample.clamp(-1, 1) - images) / 2).square().flatten(1).mean(1)
        psnr.append(-10 * error.log10())
        counts.add(output.codes)
    return {"psnr": torch.cat(psnr).mean().item(), "codebook_usage": (counts.counts > 0).float().mean().item()}


def train_tokenizer(data: DataConfig, config: TokenizerTrainingConfig) -> dict[str, float]:
    """Train [`LlamaGenVQModel`], resuming from the newest checkpoint of `config.output_dir`.

    Returns:
        `dict[str, float]`: The averaged model's `psnr` and `codebook_usage` on the test split. The model itself is
        saved to `config.output_dir`.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        step_scheduler_with_optimizer=False,
    )
    output_dir = Path(config.output_dir)
    set_seed(config.seed)
    if config.init_from is not None:
        model = LlamaGenVQModel.from_pretrained(config.init_from)
    else:
        model = LlamaGenVQModel(
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            vq_embed_dim=config.vq_embed_dim,
            num_vq_embeddings=config.num_vq_embeddings,
            sample_size=data.image_size,
        )
    model.train()
    if config.decoder_only:
        model.requires_grad_(False)
        model.post_quant_conv.requires_grad_(True)
        model.decoder.requires_grad_(True)

    train = image_tensors(data.load(data.train_split), data.image_column, data.image_size)
    test = image_tensors(data.load(data.test_split), data.image_column, data.image_size)
    # A generator of its own: an iterator that starts mid-epoch must not take a number from the flips' random state.
    loader = DataLoader(train, batch_size=config.batch_size, shuffle=True, drop_last=True, generator=torch.Generator())
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0
    )
    scheduler = get_scheduler(config.lr_scheduler, optimizer, None, config.lr_warmup_steps, config.max_train_steps)
    ema = EMAModel(model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    raw = accelerator.unwrap_model(model)
    if len(loader) == 0:
        raise ValueError(f"{len(train)} pictures do not fill one batch of {config.batch_size} on each process.")
    counts = CodeCounts(raw.config.num_vq_embeddings, accelerator.device)
    accelerator.register_for_checkpointing(ema, scheduler, counts)
    step = resume(accelerator, output_dir / "checkpoints")
    ema.to(accelerator.device)

    started, first = time.perf_counter(), step
    while step < config.max_train_steps:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, done):
            images = batch["images"]
            if config.random_flip:
                images = torch.where(
                    torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(-1), images
                )
            output = model(images)
            reconstruction = reconstruction_loss(output.sample, images, config)
            loss = reconstruction + output.vq_loss + output.commit_loss + output.entropy_loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            ema.step(raw.parameters())
            step += 1

            counts.add(output.codes)
            if step % config.revive_every == 0:
                used = accelerator.reduce(counts.counts)
                if step <= config.revive_until_step and not config.decoder_only:
                    revive_codes(raw, used, images)
                    broadcast(raw.quantize.embedding.weight.data)  # each process has its own images
                counts.counts.zero_()
                logger.info(f"step {step}: {(used > 0).sum().item()} of {len(used)} codes used")
            if step % config.log_steps == 0:
                rate = (step - first) * config.batch_size * accelerator.num_processes / (time.perf_counter() - started)
                psnr = -10 * math.log10(F.mse_loss(output.sample.float(), images).item() / 4)
                logger.info(
                    f"step {step}: reconstruction {reconstruction.item():.4f}, "
                    f"commit {output.commit_loss.item():.5f}, batch PSNR {psnr:.2f} dB, {rate:.1f} images/s"
                )
            if step % config.checkpointing_steps == 0 or step == config.max_train_steps:
                save_checkpoint(accelerator, output_dir / "checkpoints", step, config.checkpoints_total_limit)
            if step == config.max_train_steps:
                break

    ema.copy_to(raw.parameters())
    raw.eval()
    metrics = evaluate_tokenizer(raw, DataLoader(test, batch_size=config.batch_size))
    if accelerator.is_main_process:
        raw.save_pretrained(output_dir)
    accelerator.end_training()
    return metrics
