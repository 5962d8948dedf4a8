"""Training of the tokenizer: images through the codes and back, as close as they get (VQGAN, arXiv 2012.09841)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from datasets import Dataset, IterableDataset
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from PIL import Image

from ...autoencoders import load_tokenizer
from ...data.fingerprint import Inputs, fingerprint_dataset, fingerprint_module
from ...data.images import ImageSamples, stack_images
from ...data.loader import batches_once
from ...data.source import DataConfig
from ...evaluation.reconstruction import CodeCounts, PerceptualLoss, ReconstructionMetrics
from ...files import replace_result
from ...training.record import public_settings, training_facts
from ...training.trainer import Run, side_by_side, train_with_memory_at_hand
from ..vq_model import LlamaGenVQModel, LlamaGenVQOutput
from .discriminators import build_discriminator
from .losses import adaptive_weight, discriminator_loss, generator_loss, reconstruction_loss
from .vq_config import TokenizerTrainingConfig


SAMPLES = 8


def train_tokenizer(data: DataConfig, config: TokenizerTrainingConfig) -> dict[str, float]:
    """Train [`LlamaGenVQModel`], resuming from the newest checkpoint of `config.output_dir`, where it is saved.

    Returns:
        `dict[str, float]`: What the averaged weights reach on the test split: `test_psnr` in dB and `test_ssim`, means
        over images, `test_codebook_usage` in [0, 1] and `test_codebook_perplexity`. Empty if there is none.

    Raises:
        ValueError: If recipe and data do not fit each other.
    """
    return train_with_memory_at_hand(
        config, lambda micro_batch_size: TokenizerTraining(data, config, micro_batch_size).run()
    )


class TokenizerTraining:
    """What a [`Run`] does with the tokenizer: its steps, measurements, images and result."""

    def __init__(self, data: DataConfig, config: TokenizerTrainingConfig, micro_batch_size: int | None):
        self.data, self.config = data, config
        self.training = training = Run(config, micro_batch_size, data.max_bad_rows)
        self.accelerator, self.device = training.accelerator, training.accelerator.device
        if training.is_sharded:
            raise ValueError(
                "A tokenizer can't be sharded; leave out FSDP and train it on whole copies (multi_gpu.yaml)."
            )
        model = build_vq_model(data, config)
        if config.decoder_only:
            for part in (model.encoder, model.quant_conv, model.quantize):
                part.requires_grad_(False)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.encoder.compile()
            model.decoder.compile()
        samples = ImageSamples(data, config.crop, config.random_flip)
        rows, self.test = data.load("train"), data.load("test")
        started_from = {} if config.init_from is None else {"the weights of init_from": fingerprint_module(model)}
        self.shown = None
        self.feed = training.feed(
            rows.select_columns([data.image_column]), samples, stack_images,
            shuffle_buffer_size=data.shuffle_buffer_size,
        )  # fmt: skip
        training.begin(lambda: self.inputs(rows) | started_from, [model.config_name])
        self.model, self.optimizer = self.accelerator.prepare(model, self._optimizer(model))
        self.raw = self.accelerator.unwrap_model(self.model)
        self.discriminator = None
        if config.discriminator is not None:
            discriminator = build_discriminator(config.discriminator, data.image_size, config.discriminator_width)
            self.discriminator, self.discriminator_optimizer = self.accelerator.prepare(
                discriminator, self._optimizer(discriminator)
            )
        self.perceptual_loss = None
        if config.perceptual_weight:
            self.perceptual_loss = PerceptualLoss.from_pretrained().to(self.device)
        training.set_length(self.feed)
        self.scheduler = self._scheduler(self.optimizer, training.last_step)
        schedulers = [self.scheduler]
        if self.discriminator is not None:
            steps = max(1, training.last_step - config.discriminator_start)
            self.discriminator_scheduler = self._scheduler(self.discriminator_optimizer, steps)
            schedulers.append(self.discriminator_scheduler)
        self.counts = CodeCounts(self.raw.config.num_vq_embeddings, self.device)
        training.start(self.raw, self.counts, *schedulers)

    def inputs(self, rows: Dataset | IterableDataset) -> Inputs:
        """What the training reads: images, and what chooses among them."""
        data = self.data
        found = fingerprint_dataset(data.dataset, self.training.output_dir, [rows, self.test], data.image_column)
        settings = ("dataset_config", "train_split", "test_split", "test_fraction", "split_seed", "image_column")
        settings += ("image_size", "min_image_size")
        values = {name: getattr(data, name) for name in settings}
        return found | {f"the setting {name}": "none" if value is None else value for name, value in values.items()}

    def _optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.Adam(
            parameters, self.config.learning_rate, (self.config.adam_beta1, self.config.adam_beta2)
        )

    def _scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return get_scheduler(self.config.lr_scheduler, optimizer, None, self.config.lr_warmup_steps, steps)

    def run(self) -> dict[str, float]:
        self.training.train(self)
        return self.training.finish(self)

    def save(self) -> None:
        if self.accelerator.is_main_process:
            replace_result(self.training.output_dir, self.raw.config_name, self.raw.save_pretrained)

    def facts(self, metrics: dict[str, float]) -> dict:
        return {"data": public_settings(self.data), "tokenizer": training_facts(self.config, metrics)}

    def train_step(self, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        step = self.training.step + 1
        if (step - 1) % self.config.revive_every == 0:
            self.counts.counts.zero_()
        adversarial = self.discriminator is not None and step > self.config.discriminator_start
        modules = [self.model, self.discriminator] if adversarial else [self.model]
        records = []
        for batch in micro_batches:
            images = batch["images"]
            with self.accelerator.accumulate(*modules):
                output = self.model(images)
                losses = self.losses(output, images, adversarial)
                self.update(self.model, self.optimizer, sum(losses.values()))
                if self.discriminator is not None:
                    losses["discriminator"] = torch.zeros((), device=self.device)
                if adversarial:
                    real, fake = self.discriminator(images), self.discriminator(output.sample.detach())
                    loss = discriminator_loss(self.config.discriminator_loss, real.float(), fake.float())
                    losses["discriminator"] = self.config.adversarial_weight * loss
                    self.update(self.discriminator, self.discriminator_optimizer, losses["discriminator"])
            self.counts.add(self.accelerator.gather(output.codes))
            mean_error = F.mse_loss(output.sample.float(), images) / 4
            records.append({name: loss.detach() for name, loss in losses.items()} | {"psnr": -10 * mean_error.log10()})
        rate = images.new_tensor(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        if adversarial:
            self.discriminator_scheduler.step()
        if step % self.config.revive_every == 0 and step <= self.config.revive_until_step:
            revive_codes(self.raw, self.counts.counts, images)
            broadcast(self.raw.quantize.embedding.weight.data)  # each process has its own images
        values = {name: torch.stack([record[name].detach() for record in records]).mean() for name in records[0]}
        return values | {"learning_rate": rate}

    def losses(self, output: LlamaGenVQOutput, images: torch.Tensor, adversarial: bool) -> dict[str, torch.Tensor]:
        """The tokenizer's losses, with their weights, as scalars."""
        config = self.config
        losses = {"reconstruction": reconstruction_loss(output.sample, images, config)}
        if self.perceptual_loss is not None:
            distances = self.perceptual_loss(output.sample, images)
            losses["perceptual"] = config.perceptual_weight * distances.mean()
        if self.discriminator is not None:
            losses["adversarial"] = torch.zeros((), device=self.device)
        if adversarial:
            discriminator = self.accelerator.unwrap_model(self.discriminator).requires_grad_(False)
            loss = generator_loss(config.adversarial_loss, discriminator(output.sample).float())
            discriminator.requires_grad_(True)
            weight = config.adversarial_weight
            if config.adaptive_adversarial_weight:
                visible = losses["reconstruction"] + losses.get("perceptual", 0.0)
                weight = weight * adaptive_weight(visible, loss, self.raw.decoder.conv_out.weight)
            losses["adversarial"] = weight * loss
        losses["codebook"] = config.codebook_weight * output.vq_loss
        losses["commitment"] = output.commit_loss
        if config.entropy_weight:
            losses["entropy"] = output.entropy_loss
        return losses

    def update(self, model: torch.nn.Module, optimizer, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def measure(self) -> dict[str, float]:
        if self.test is None:
            return {}
        accelerator, samples = self.accelerator, ImageSamples(self.data)
        split = (accelerator.process_index, accelerator.num_processes)
        batches = batches_once(self.test, samples, stack_images, self.training.micro_batch_size, *split)
        metrics = evaluate_tokenizer(self.raw, batches, accelerator)
        return {f"test_{name}": value for name, value in metrics.items()}  # beside those of the training batches

    def draw(self) -> Image.Image:
        """Test images above their reconstructions."""
        if self.shown is None:
            rows = self.feed.rows if self.test is None else self.test
            self.shown = next(batches_once(rows, ImageSamples(self.data), stack_images, SAMPLES))["images"]
        images = self.shown.to(self.device)
        with torch.no_grad():
            reconstructions = self.raw(images).sample
        processor = VaeImageProcessor()
        return side_by_side([processor.postprocess(shown, output_type="pil") for shown in (images, reconstructions)])

    def speed(self, steps_per_second: float) -> dict[str, float]:
        return {
            "codebook_usage": self.counts.usage,
            "codebook_perplexity": self.counts.perplexity,
            "images/s": steps_per_second * self.config.batch_size,
        }


def build_vq_model(data: DataConfig, config: TokenizerTrainingConfig) -> LlamaGenVQModel:
    """A tokenizer with new weights, or `config.init_from` with the recipe's loss weights."""
    weights = {"commit_weight": config.commit_weight, "entropy_weight": config.entropy_weight}
    if config.init_from is not None:
        return load_tokenizer(config.init_from, sample_size=data.image_size, **weights).train()
    return LlamaGenVQModel(
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        vq_embed_dim=config.vq_embed_dim,
        num_vq_embeddings=config.num_vq_embeddings,
        sample_size=data.image_size,
        **weights,
    )


@torch.no_grad()
def evaluate_tokenizer(
    model: LlamaGenVQModel, batches: Iterable[dict], accelerator: Accelerator | None = None
) -> dict[str, float]:
    """PSNR in dB and SSIM, means over single images in [0, 1], and the usage and perplexity of the codebook.

    Args:
        model ([`LlamaGenVQModel`]): The tokenizer.
        batches (`Iterable[dict]`): Batches of `images`; those of this process, if there are several.
        accelerator ([`~accelerate.Accelerator`], *optional*): Adds up the results of several processes.
    """
    metrics = ReconstructionMetrics(model.config.num_vq_embeddings, model.device)
    for batch in batches:
        images = batch["images"].to(model.device)
        output = model(images)
        metrics.add(images, output.sample, output.codes)
    if accelerator is not None:
        metrics.reduce(accelerator)
    return metrics.compute()


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
