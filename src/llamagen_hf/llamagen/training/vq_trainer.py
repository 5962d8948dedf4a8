"""Training of the image tokenizer: images through codes and back, as close as possible (VQGAN, arXiv 2012.09841)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn

from ...autoencoders import load_vq_model
from ...data.fingerprint import Inputs, fingerprint_module, fingerprint_rows
from ...data.loader import StepLoader, batches_once
from ...data.samples import ImageSamples, stack_images
from ...data.source import DataConfig
from ...evaluation.reconstruction import CodeCounts, PerceptualLoss, ReconstructionMetrics
from ...files import replace_result
from ...training.record import public_settings, training_facts
from ...training.trainer import Trainer, TrainingTask
from ..vq_model import LlamaGenVQModel, LlamaGenVQOutput
from .vq_config import TokenizerTrainingConfig
from .vq_losses import (
    adaptive_weight,
    build_discriminator,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)


SAMPLES = 8


def train_tokenizer(data: DataConfig, config: TokenizerTrainingConfig) -> dict[str, float]:
    """Train [`LlamaGenVQModel`], resuming from the newest checkpoint of `config.output_dir`, where it is saved.

    Returns:
        `dict[str, float]`: Metrics of the averaged weights on the test split: `test_psnr` in dB and `test_ssim`, means
        over images, `test_codebook_usage` in [0, 1] and `test_codebook_perplexity`. Empty if there is none.

    Raises:
        ValueError: Recipe and data do not fit each other.
    """
    return Trainer(config, VQTask(data, config)).fit()


class VQTask(TrainingTask):
    """The training of an image tokenizer, for [`~llamagen_hf.training.trainer.Trainer`]."""

    results = (LlamaGenVQModel.config_name,)

    def __init__(self, data: DataConfig, config: TokenizerTrainingConfig):
        self.data, self.config = data, config
        self.max_bad_rows = data.max_bad_rows

    def load(self) -> None:
        if self.trainer.is_sharded:
            raise ValueError(
                "A tokenizer can't be sharded; leave out FSDP and train it on whole copies (multi_gpu.yaml)."
            )
        self.model = build_vq_model(self.data, self.config)
        self.train, self.test = self.data.load("train"), self.data.load("test")
        self.shown = None

    def inputs(self) -> Inputs:
        """The images, the settings that choose among them, and the weights that are not new."""
        found = fingerprint_rows(self.data, self.trainer.output_dir, [self.train, self.test])
        if self.config.init_from is not None:
            found["the weights of init_from"] = fingerprint_module(self.model)
        return found

    def step_loader(self) -> StepLoader:
        rows = self.train.select_columns([self.data.image_column])
        samples = ImageSamples(self.data, self.config.crop, self.config.random_flip)
        return self.trainer.step_loader(rows, samples, stack_images, shuffle_buffer_size=self.data.shuffle_buffer_size)

    def prepare(self) -> tuple[nn.Module, list]:
        config, model, trainer, accelerator = self.config, self.model, self.trainer, self.trainer.accelerator
        if config.decoder_only:
            for part in (model.encoder, model.quant_conv, model.quantize):
                part.requires_grad_(False)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.encoder.compile()
            model.decoder.compile()
        self.model, self.optimizer = accelerator.prepare(model, self._optimizer(model))
        self.raw = accelerator.unwrap_model(self.model)
        self.counts = CodeCounts(self.raw.config.num_vq_embeddings, trainer.device)
        self.scheduler = trainer.scheduler(self.optimizer)
        stateful = [self.counts, self.scheduler]
        self.discriminator = self.perceptual_loss = None
        if config.discriminator is not None:
            discriminator = build_discriminator(config.discriminator, self.data.image_size, config.discriminator_width)
            optimizer = self._optimizer(discriminator)
            self.discriminator, self.discriminator_optimizer = accelerator.prepare(discriminator, optimizer)
            steps = max(1, trainer.last_step - config.discriminator_start)
            self.discriminator_scheduler = trainer.scheduler(self.discriminator_optimizer, steps)
            stateful.append(self.discriminator_scheduler)
        if config.perceptual_weight:
            self.perceptual_loss = PerceptualLoss.from_pretrained().to(trainer.device)
        return self.raw, stateful

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.Adam(
            parameters, self.config.learning_rate, (self.config.adam_beta1, self.config.adam_beta2)
        )

    def train_step(self, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        config, trainer, step = self.config, self.trainer, self.trainer.step + 1
        if (step - 1) % config.revive_every == 0:
            self.counts.counts.zero_()
        adversarial = self.discriminator is not None and step > config.discriminator_start
        modules = [self.model, self.discriminator] if adversarial else [self.model]
        records = []
        for batch in micro_batches:
            images = batch["images"]
            with trainer.accelerator.accumulate(*modules):
                output = self.model(images)
                losses = self.losses(output, images, adversarial)
                trainer.update(self.model, self.optimizer, sum(losses.values()))
                if self.discriminator is not None:
                    losses["discriminator"] = torch.zeros((), device=trainer.device)
                if adversarial:
                    real, fake = self.discriminator(images), self.discriminator(output.sample.detach())
                    loss = discriminator_loss(config.discriminator_loss, real.float(), fake.float())
                    losses["discriminator"] = config.adversarial_weight * loss
                    trainer.update(self.discriminator, self.discriminator_optimizer, losses["discriminator"])
            self.counts.add(trainer.accelerator.gather(output.codes))
            mean_error = F.mse_loss(output.sample.float(), images) / 4
            records.append({name: loss.detach() for name, loss in losses.items()} | {"psnr": -10 * mean_error.log10()})
        rate = images.new_tensor(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        if adversarial:
            self.discriminator_scheduler.step()
        if step % config.revive_every == 0 and step <= config.revive_until_step:
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
            losses["adversarial"] = torch.zeros((), device=self.trainer.device)
        if adversarial:
            discriminator = self.trainer.accelerator.unwrap_model(self.discriminator).requires_grad_(False)
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

    def log_values(self, samples_per_second: float) -> dict[str, float]:
        return {"codebook_usage": self.counts.usage, "codebook_perplexity": self.counts.perplexity}

    def measure(self) -> dict[str, float]:
        if self.test is None:
            return {}
        batches = self.trainer.batches_once(self.test, ImageSamples(self.data), stack_images)
        metrics = evaluate_tokenizer(self.raw, batches, self.trainer.accelerator)
        return {f"test_{name}": value for name, value in metrics.items()}  # beside those of the training batches

    def draw_samples(self) -> Image.Image:
        """Test images above their reconstructions."""
        if self.shown is None:
            rows = self.trainer.steps.rows if self.test is None else self.test
            self.shown = next(batches_once(rows, ImageSamples(self.data), stack_images, SAMPLES))["images"]
        images = self.shown.to(self.trainer.device)
        with torch.no_grad():
            both = torch.cat([images, self.raw(images).sample])
        return make_image_grid(VaeImageProcessor().postprocess(both, output_type="pil"), 2, len(images))

    def save(self) -> None:
        if self.trainer.accelerator.is_main_process:
            replace_result(self.trainer.output_dir, self.raw.config_name, self.raw.save_pretrained)

    def facts(self, metrics: dict[str, float]) -> dict:
        return {"data": public_settings(self.data), "vq_model": training_facts(self.config, metrics)}


def build_vq_model(data: DataConfig, config: TokenizerTrainingConfig) -> LlamaGenVQModel:
    """Build a tokenizer with new weights, or load `config.init_from`, with the recipe's loss weights."""
    weights = {"commit_weight": config.commit_weight, "entropy_weight": config.entropy_weight}
    if config.init_from is not None:
        return load_vq_model(config.init_from, sample_size=data.image_size, **weights).train()
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
    """Measure PSNR in dB and SSIM, means over single images in [0, 1], and the usage and perplexity of the codebook.

    Args:
        model ([`LlamaGenVQModel`]): The tokenizer.
        batches (`Iterable[dict]`): Batches of `images` in [-1, 1]; those of this process, if there are several.
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

    Args:
        model ([`LlamaGenVQModel`]): The tokenizer, changed in place.
        counts (`torch.Tensor` of shape `(codes,)`): How often each code was used.
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): Pixels in [-1, 1].

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
