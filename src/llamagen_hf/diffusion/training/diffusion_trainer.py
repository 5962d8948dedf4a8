"""Training of pixel diffusion: the noise in an image, given a prompt or a smaller image, or both."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn

from ...conditioning.text import tokenize_prompts
from ...data.captions import Captions
from ...data.fingerprint import Inputs, fingerprint_components, fingerprint_rows
from ...data.loader import StepLoader, batches_once
from ...data.samples import ImageSamples
from ...data.source import DataConfig
from ...evaluation.reconstruction import PerceptualLoss
from ...evaluation.upsampling import Enlarged, evaluate_upsampling
from ...files import replace_result
from ...loading.lora import UNET_LAYERS, lora_config, save_adapter
from ...local_paths import unless_folder
from ...training.record import public_settings, training_facts
from ...training.sharding import state_of_part, unsharded
from ...training.single_model import SingleModelTask, parameter_groups
from ...training.text_encoder import pretrain_text_encoder
from ...training.trainer import Trainer
from ..encoding import CONVENTIONS
from ..pipeline import PixelDiffusionPipeline
from ..preconditioning import linear_guess
from ..schedules import augment, enlarge, sampling_scheduler
from ..unet import patch_size, predict
from .diffusion_config import DiffusionTrainingConfig
from .diffusion_loss import DiffusionLoss, min_snr_weights, prediction_target
from .diffusion_models import build_models, size_factor
from .diffusion_samples import DiffusionCollator, DiffusionSamples
from .small_images import SmallImages


logger = get_logger(__name__)

SAMPLES = 8
SUMMARY_SIZE = 8  # of an image as a new text encoder learns to foresee it


def train_diffusion(data: DataConfig, config: DiffusionTrainingConfig) -> dict[str, float]:
    """Train a [`PixelDiffusionPipeline`], resuming from the newest checkpoint of `config.output_dir`.

    The pipeline is saved to `config.output_dir`, or the adapter alone if `config.lora_rank` is set.

    Returns:
        `dict[str, float]`: `test_loss` of the averaged weights, and with text `test_loss_without_prompt`; the larger
        their difference, the more the model reads in its prompts. For an upsampler also the `test_psnr` in dB, the
        `test_ssim`, the `test_consistency` and, where VGG16 can be loaded, the `test_lpips` of enlarged reduced images
        (see [`~llamagen_hf.evaluation.upsampling.evaluate_upsampling`]), each beside that of bicubic enlargement
        (`test_psnr_bicubic`, ...), and the same of redrawn ones (`test_redrawn_psnr`, ...). Empty if there is no test
        split.

    Raises:
        ValueError: Recipe, data and models do not fit each other.
    """
    return Trainer(config, DiffusionTask(data, config)).fit()


class DiffusionTask(SingleModelTask):
    """The training of a U-Net, for [`~llamagen_hf.training.trainer.Trainer`]."""

    results = (PixelDiffusionPipeline.config_name, "adapter_config.json")

    def __init__(self, data: DataConfig, config: DiffusionTrainingConfig):
        self.data, self.config = data, config
        self.max_bad_rows = data.max_bad_rows

    def load(self) -> None:
        data, config, device = self.data, self.config, self.trainer.device
        self.train, self.test = data.load("train"), data.load("test")
        self.small_images = self.perceptual_loss = None
        if config.low_image_size is not None:
            self.small_images = SmallImages(config.low_image_size, data.image_size, config.low_vq_model, device)
            self.perceptual_loss = None if self.test is None else load_perceptual_loss(device)
        self.models = models = build_models(config, data, self.train, device)
        factor = size_factor(models.unet)
        if config.crop_size is not None and (config.crop_size % factor or config.crop_size > data.image_size):
            raise ValueError(
                f"crop_size is {config.crop_size}; expected a multiple of {factor} of at most image_size "
                f"({data.image_size})."
            )
        self.convention = CONVENTIONS[models.convention]
        self.encoder_learns = (
            models.text_encoder is not None
            and not (config.lora_rank or config.teacher)
            and (models.text_encoder_is_new or config.train_text_encoder)
        )
        self.run_text_encoder = partial(self.convention.encode, length=models.condition_length)
        if models.text_encoder is not None:
            models.text_encoder.to(device).requires_grad_(self.encoder_learns).train(self.encoder_learns)
        if models.teacher is not None:
            models.teacher.to(device).requires_grad_(False)
        self.tokenize = partial(
            tokenize_prompts,
            models.tokenizer,
            length=models.condition_length,
            cleaning=self.convention.prompt_cleaning,
        )
        self.collate = DiffusionCollator(self.tokenize)

    def inputs(self) -> Inputs:
        """The images, the settings that choose among them, and the weights that are not new."""
        config, models = self.config, self.models
        components = {}
        if config.init_from is not None:
            components["init_from"] = models.unet
        if models.teacher is not None:
            components["teacher"] = models.teacher
        if models.text_encoder is not None and not models.text_encoder_is_new:
            components |= {"text_encoder": models.text_encoder, "tokenizer": models.tokenizer}
        if models.clip is not None:
            components["clip"] = models.clip.clip
        if self.small_images is not None and self.small_images.vq_model is not None:
            components["low_vq_model"] = self.small_images.vq_model
        rows = fingerprint_rows(self.data, self.trainer.output_dir, [self.train, self.test])
        return rows | fingerprint_components(components)

    def step_loader(self) -> StepLoader:
        samples, size = self.samples(self.train), self.data.shuffle_buffer_size
        rows = self.train.select_columns(samples.columns)
        return self.trainer.step_loader(rows, samples, self.collate, shuffle_buffer_size=size)

    def samples(
        self, rows: Dataset | IterableDataset, training: bool = True, without_prompt: bool = False
    ) -> DiffusionSamples:
        config = self.config
        images = ImageSamples(self.data, config.crop, config.random_flip) if training else ImageSamples(self.data)
        captions = None
        if config.conditioning == "text" and config.clip is None:
            captions = Captions(rows, config.caption_templates, self.convention.prompt_cleaning, training)
        grid = 1 if self.small_images is None else self.small_images.factor * patch_size(self.models.unet)
        return DiffusionSamples(images, captions, config, grid, training, without_prompt)

    def pretrain(self, steps: Iterable[list[dict]]) -> None:
        config = self.config
        if self.models.text_encoder_is_new and config.text_pretrain_steps:
            batches, rate = chain.from_iterable(steps), config.text_pretrain_learning_rate
            pretrain_text_encoder(self.models.text_encoder, batches, summaries, config.text_pretrain_steps, rate)

    def prepare(self) -> tuple[nn.Module, list]:
        config, unet, accelerator = self.config, self.models.unet, self.trainer.accelerator
        if config.lora_rank:
            unet.requires_grad_(False)
            unet.add_adapter(lora_config(config.lora_rank, config.lora_alpha, UNET_LAYERS))
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        text_encoder = self.models.text_encoder if self.encoder_learns else None
        model = DiffusionLoss(unet, text_encoder, self.run_text_encoder, self.trainer.compiles).train()
        groups = parameter_groups(model, config.learning_rate, config.text_learning_rate, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.adam_beta1, config.adam_beta2), fused=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.scheduler = self.trainer.scheduler(self.optimizer)
        return accelerator.unwrap_model(self.model), [self.scheduler]

    @torch.no_grad()
    def encode(self, batch: dict) -> dict:
        """A batch of samples as the arguments of [`DiffusionLoss`]: noise added, small images made, captions encoded.

        Text states stand in place of tokens where the text encoder is not trained.
        """
        scheduler, images, timesteps = self.models.scheduler, batch["images"], batch["timesteps"]
        condition = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if not self.encoder_learns:
            condition = self.encode_condition(batch)
        if self.small_images is not None:
            with self.trainer.accelerator.autocast():
                small = self.small_images(images, batch["redrawn"])
            small = enlarge(small, self.data.image_size, self.convention.enlargement)
            if "crops" in batch:
                images, small = (cut_windows(each, batch["crops"], self.config.crop_size) for each in (images, small))
            noise, low_noise = row_noise(batch["seeds"], (2, *images.shape[1:]), images).unbind(1)
            levels = batch["aug_levels"]
            condition |= {"small": augment(scheduler, small, low_noise, levels), "aug_level": levels}
        else:
            noise = row_noise(batch["seeds"], images.shape[1:], images)
        noisy = scheduler.add_noise(images, noise, timesteps)
        weights = min_snr_weights(scheduler, timesteps, self.config.snr_gamma)
        target = prediction_target(scheduler, images, noise, timesteps)
        if self.small_images is not None and self.convention.corrects_guess:
            guess, scale = linear_guess(scheduler, noisy, timesteps, condition["small"], condition["aug_level"])
            target = (target - guess) / scale
            if self.config.snr_gamma is not None:  # of the errors before they were divided
                weights = weights * scale.flatten() ** 2
        if self.models.teacher is not None:
            target = self.teach(noisy, timesteps, **condition)
        return {"noisy": noisy, "timesteps": timesteps, "target": target, "weights": weights} | condition

    def encode_condition(self, batch: dict) -> dict:
        """The states of a batch and their mask, of its captions or of its images; empty if nothing is read."""
        if self.models.clip is not None:
            with torch.no_grad(), self.trainer.accelerator.autocast():
                states = self.models.clip.embed_tensor(batch["images"])
            is_kept = ~batch["dropped"][:, None]
            return {"states": states * is_kept[..., None], "mask": is_kept.long()}
        if "input_ids" not in batch:
            return {}
        return self.encode_tokens(batch["input_ids"], batch["attention_mask"])

    def encode_tokens(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor) -> dict:
        """Text states and their mask, from the text encoder as it is."""
        with torch.no_grad(), self.trainer.accelerator.autocast():
            states, mask = self.run_text_encoder(self.models.text_encoder, input_ids, attention_mask)
        return {"states": states, "mask": mask}

    def teach(self, noisy: torch.Tensor, timesteps: torch.LongTensor, **condition: torch.Tensor) -> torch.Tensor:
        """What the teacher predicts with guidance (the first stage of arXiv 2210.03142)."""
        teacher, scale = self.models.teacher, self.config.teacher_guidance_scale
        with self.trainer.accelerator.autocast():
            output = predict(teacher, noisy, timesteps, **condition)[:, :3].float()
            if "states" not in condition or scale == 1:
                return output
            null = self.encode_tokens(*(each.to(noisy.device) for each in self.tokenize([""])))
            null = {name: value.expand(len(noisy), *value.shape[1:]) for name, value in null.items()}
            unguided = predict(teacher, noisy, timesteps, **condition | null)[:, :3].float()
        return unguided + scale * (output - unguided)

    def measure(self) -> dict[str, float]:
        if self.test is None:
            return {}
        values = {"test_loss": self.mean_loss()}
        if self.config.conditioning == "text":
            values["test_loss_without_prompt"] = self.mean_loss(without_prompt=True)
        # A part of a sharded model can't be called without the rest, as the sampling loop would.
        if self.small_images is not None and not self.trainer.is_sharded:
            values |= self.measure_upsampling()
        return values

    def test_batches(self, num_rows: int | None = None, without_prompt: bool = False) -> Iterator[dict]:
        """This process's part of the test rows, or of the first of them."""
        samples = self.samples(self.test, training=False, without_prompt=without_prompt)
        rows = self.test.select_columns(samples.columns)
        rows = rows if num_rows is None else rows.take(num_rows)
        for batch in self.trainer.batches_once(rows, samples, self.collate):
            yield send_to_device(batch, self.trainer.device)

    @torch.no_grad()
    def mean_loss(self, without_prompt: bool = False) -> float:
        """The loss over all test rows."""
        total = torch.zeros(2, device=self.trainer.device)
        for batch in self.test_batches(without_prompt=without_prompt):
            rows = len(batch["images"])
            total += torch.stack([rows * self.model(**self.encode(batch)), total.new_tensor(rows)])
        total = self.trainer.accelerator.reduce(total)
        return (total[0] / total[1]).item()

    def measure_upsampling(self) -> dict[str, float]:
        """How well small test images are enlarged, reduced ones and redrawn ones."""
        kinds = {"": False} if self.small_images.vq_model is None else {"": False, "redrawn_": True}
        values, accelerator = {}, self.trainer.accelerator
        for kind, is_redrawn in kinds.items():
            batches = self.test_batches(self.config.eval_images)
            enlarged = (self.enlarge(batch, is_redrawn, self.config.eval_inference_steps) for batch in batches)
            found = evaluate_upsampling(enlarged, self.trainer.device, self.perceptual_loss, accelerator)
            values |= {f"test_{kind}{name}": value for name, value in found.items()}
        return values

    @torch.no_grad()
    def enlarge(self, batch: dict, is_redrawn: bool, num_inference_steps: int | None = None) -> Enlarged:
        """Make the small images of a batch, and enlarge them with the seeds of its rows."""
        images = batch["images"]
        small = self.small_images(images, torch.full((len(images),), is_redrawn, device=images.device))
        condition = {}
        if states := self.encode_condition(batch):
            condition = {"prompt_embeds": states["states"], "prompt_attention_mask": states["mask"]}
        sample = self.pipeline().draw_pixels(
            image=(small + 1) / 2,
            generator=[torch.Generator().manual_seed(seed) for seed in batch["seeds"].tolist()],
            num_inference_steps=num_inference_steps,
            **condition,
        )
        return Enlarged(small, sample, images)

    def pipeline(self) -> PixelDiffusionPipeline:
        """The pipeline with the present weights."""
        models, prediction_type = self.models, self.models.scheduler.config.prediction_type
        pipe = PixelDiffusionPipeline(
            models.unet,
            # Dynamic thresholding is for guidance. Without it, the noise of first steps would turn white into grey.
            sampling_scheduler(prediction_type, "dynamic" if self.config.conditioning == "text" else "static"),
            models.text_encoder,
            models.tokenizer,
            models.condition_length,
            models.convention,
            self.sampling_defaults or None,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def sampling_defaults(self) -> dict:
        """Those of the recipe; a model that has learnt guided predictions needs no guidance."""
        learns_guided = self.config.teacher is not None and self.config.conditioning == "text"
        return ({"guidance_scale": 1.0} if learns_guided else {}) | self.config.sampling_defaults

    def sample_prompts(self) -> list[str] | None:
        """The prompts of a base's images in samples/; `None` without text."""
        if (
            self.config.conditioning == "none"
            or self.config.clip is not None
            or self.config.sample_prompts is not None
        ):
            return self.config.sample_prompts
        rows = self.train if self.test is None else self.test
        return [sample["caption"] for sample in next(batches_once(rows, self.samples(rows, False), list, SAMPLES))]

    def first_rows(self) -> dict:
        """A batch of the first test rows."""
        rows = self.train if self.test is None else self.test
        batch = next(batches_once(rows, self.samples(rows, training=False), self.collate, SAMPLES))
        return send_to_device(batch, self.trainer.device)

    def draw_samples(self) -> Image.Image:
        """A base's images, with the seeds 0, 1, 2, ...; or test images: small, enlarged, as they are.

        With a CLIP, test images and what is drawn from their embeddings.
        """
        if self.small_images is not None:
            batch = self.first_rows()
            small, sample, images = self.enlarge(batch, self.small_images.vq_model is not None)
            small = F.interpolate(small, images.shape[-2:])
            grid = VaeImageProcessor().postprocess(torch.cat([small, sample, images]), output_type="pil")
            return make_image_grid(grid, 3, len(images))
        if self.models.clip is not None:
            batch = self.first_rows()
            pipe, states = self.pipeline(), self.encode_condition(batch)["states"]
            seeds = [torch.Generator().manual_seed(seed) for seed in range(len(states))]
            drawn = pipe(prompt_embeds=states, generator=seeds).images
            images = VaeImageProcessor().postprocess(batch["images"], output_type="pil")
            return make_image_grid([*images, *drawn], 2, len(images))
        prompts = self.sample_prompts()
        count = SAMPLES if prompts is None else len(prompts)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
        condition = {"num_images_per_prompt": count} if prompts is None else {"prompt": prompts}
        return make_image_grid(self.pipeline()(**condition, generator=seeds).images, 1, count)

    def save(self) -> None:
        """Save the adapter, or the whole pipeline."""
        accelerator, output_dir = self.trainer.accelerator, self.trainer.output_dir
        state = accelerator.get_state_dict(self.model) if self.trainer.is_sharded else None
        if not accelerator.is_main_process:
            return
        unet = None if state is None else state_of_part(state, "unet.")
        if self.config.lora_rank:
            base = unless_folder(self.config.init_from)
            adapter = partial(save_adapter, self.models.unet, base=base, state=unet)
            replace_result(output_dir, "adapter_config.json", adapter)
            return
        pipe = self.pipeline()
        if state is not None:
            whole = {"unet": unsharded(self.models.unet, unet)}
            if self.encoder_learns:
                text_encoder = state_of_part(state, "text_encoder.")
                whole["text_encoder"] = unsharded(self.models.text_encoder, text_encoder)
            pipe.register_modules(**whole)
        replace_result(output_dir, pipe.config_name, pipe.save_pretrained)

    def facts(self, metrics: dict[str, float]) -> dict:
        """Data and this training, and prompts that suit the model."""
        facts = {"data": public_settings(self.data), "diffusion": training_facts(self.config, metrics)}
        return facts | {"examples": self.sample_prompts() or []}


def load_perceptual_loss(device: torch.device) -> PerceptualLoss | None:
    """LPIPS; `None` where VGG16 is neither in the cache nor within reach."""
    try:
        return PerceptualLoss.from_pretrained().to(device)
    except OSError as error:
        logger.info(f"LPIPS is not measured: {error}")
        return None


def row_noise(seeds: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Normal noise `(rows, *shape)` on the device of `like`, each row from its own seed."""
    generators = [torch.Generator(like.device).manual_seed(seed) for seed in seeds.tolist()]
    return randn_tensor((len(generators), *shape), generators, like.device, torch.float32)


def cut_windows(images: torch.Tensor, corners: torch.Tensor, size: int) -> torch.Tensor:
    """A square of side `size` of each image `(batch, 3, height, width)`, by its top left corner `(batch, 2)`."""
    places = zip(images, corners.tolist(), strict=True)
    return torch.stack([image[:, top : top + size, left : left + size] for image, (top, left) in places])


def summaries(batch: dict) -> torch.Tensor:
    """Images as small as that a new text encoder can foresee them from their captions: `(batch, 3 * 8 * 8)`."""
    return F.adaptive_avg_pool2d(batch["images"], SUMMARY_SIZE).flatten(1)
