"""Training of a classifier of noisy images: the class of an image at any place of the noise schedule."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from torch import nn

from ...data.fingerprint import Inputs, fingerprint_rows
from ...data.loader import StepLoader, batches_once
from ...data.samples import ImageSamples
from ...data.source import DataConfig
from ...files import replace_result
from ...training.record import public_settings, training_facts
from ...training.sharding import state_of_part, unsharded
from ...training.single_model import SingleModelTask, parameter_groups
from ...training.trainer import Trainer
from ..noisy_classifier import NoisyClassifier
from ..schedules import training_scheduler
from .classifier_config import ClassifierTrainingConfig
from .classifier_samples import ClassifierSamples, Labels
from .diffusion_samples import DiffusionCollator
from .diffusion_trainer import row_noise


SAMPLES = 8
LEVELS = (0, 250, 500, 750)  # the places in the noise schedule where accuracy is measured
RIGHT, WRONG = "green", "red"


def train_classifier(data: DataConfig, config: ClassifierTrainingConfig) -> dict[str, float]:
    """Train a [`~llamagen_hf.diffusion.noisy_classifier.NoisyClassifier`], resuming from the newest checkpoint of
    `config.output_dir`, where it is saved.

    Returns:
        `dict[str, float]`: Of the averaged weights, `test_loss` in nats over all noise, and the shares of the test
        images whose class is recognized under the noise of a few timesteps: `test_accuracy_0`, `test_accuracy_250`,
        `test_accuracy_500` and `test_accuracy_750`. Empty if there is no test split.

    Raises:
        ValueError: Recipe and data do not fit each other.
    """
    return Trainer(config, ClassifierTask(data, config)).fit()


class ClassifierLoss(nn.Module):
    """The classifier as a module whose forward pass returns the loss, for optimizer and launcher.

    Args:
        classifier ([`~llamagen_hf.diffusion.noisy_classifier.NoisyClassifier`]): The classifier.
        compiles (`bool`, *optional*, defaults to `False`): Compile its call in training mode.
    """

    text_path = ()

    def __init__(self, classifier: NoisyClassifier, compiles: bool = False):
        super().__init__()
        self.classifier = classifier
        self.classify_in_training = torch.compile(classify) if compiles else classify

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.LongTensor, class_labels: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """The mean cross-entropy in nats, a scalar; without `class_labels` the logits `(batch, classes)`.

        Args:
            noisy (`torch.Tensor` of shape `(batch, 3, height, width)`): Noisy images.
            timesteps (`torch.LongTensor` of shape `(batch,)`): Their place in the schedule, from 0 to 999.
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Class ids.
        """
        logits = (self.classify_in_training if self.training else classify)(self.classifier, noisy, timesteps)
        return logits if class_labels is None else F.cross_entropy(logits, class_labels)


def classify(classifier: NoisyClassifier, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The classifier's logits, as a function that can be compiled."""
    return classifier(noisy, timesteps)


class ClassifierTask(SingleModelTask):
    """The training of a classifier, for [`~llamagen_hf.training.trainer.Trainer`]."""

    results = (NoisyClassifier.config_name,)

    def __init__(self, data: DataConfig, config: ClassifierTrainingConfig):
        self.data, self.config = data, config
        self.max_bad_rows = data.max_bad_rows

    def load(self) -> None:
        data, config = self.data, self.config
        self.train, self.test = data.load("train"), data.load("test")
        self.labels = Labels(self.train, config.class_column)
        self.noise_scheduler = training_scheduler()
        self.classifier = NoisyClassifier(
            labels=self.labels.names,
            image_size=data.image_size,
            **config.sizes,
            dropout=config.dropout,
        )
        self.collate = DiffusionCollator()

    def inputs(self) -> Inputs:
        return fingerprint_rows(self.data, self.trainer.output_dir, [self.train, self.test])

    def samples(self, training: bool = True) -> ClassifierSamples:
        crop = (self.config.crop, self.config.random_flip) if training else ()
        return ClassifierSamples(ImageSamples(self.data, *crop), self.labels, training)

    def step_loader(self) -> StepLoader:
        samples, size = self.samples(), self.data.shuffle_buffer_size
        rows = self.train.select_columns(samples.columns)
        return self.trainer.step_loader(rows, samples, self.collate, shuffle_buffer_size=size)

    def prepare(self) -> tuple[nn.Module, list]:
        config, accelerator = self.config, self.trainer.accelerator
        if config.gradient_checkpointing:
            self.classifier.enable_gradient_checkpointing()
        model = ClassifierLoss(self.classifier, self.trainer.compiles).train()
        groups = parameter_groups(model, config.learning_rate, None, config.weight_decay)
        optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.adam_beta1, config.adam_beta2), fused=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.scheduler = self.trainer.scheduler(self.optimizer)
        return accelerator.unwrap_model(self.model), [self.scheduler]

    def encode(self, batch: dict) -> dict:
        """A batch of samples as the arguments of [`ClassifierLoss`], with the noise of its timesteps."""
        noisy, timesteps = self.add_noise(batch), batch["timesteps"]
        return {"noisy": noisy, "timesteps": timesteps, "class_labels": batch["class_labels"]}

    def add_noise(self, batch: dict, timestep: int | None = None) -> torch.Tensor:
        """The images of a batch with the noise of their seeds, all at one place of the schedule if it is given."""
        images, timesteps = batch["images"], batch["timesteps"]
        timesteps = timesteps if timestep is None else torch.full_like(timesteps, timestep)
        return self.noise_scheduler.add_noise(images, row_noise(batch["seeds"], images.shape[1:], images), timesteps)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        if self.test is None:
            return {}
        samples = self.samples(training=False)
        rows = self.test.select_columns(samples.columns)
        totals = torch.zeros(2 + len(LEVELS), device=self.trainer.device)
        for batch in self.trainer.batches_once(rows, samples, self.collate):
            batch = send_to_device(batch, self.trainer.device)
            count = len(batch["images"])
            right = [row.sum() for row in self.recognized(batch)]
            totals += torch.stack([totals.new_tensor(count), count * self.model(**self.encode(batch)), *right])
        count, loss, *right = self.trainer.accelerator.reduce(totals).tolist()
        if not count:
            return {}
        accuracies = {f"test_accuracy_{level}": value / count for level, value in zip(LEVELS, right, strict=True)}
        return {"test_loss": loss / count} | accuracies

    @torch.no_grad()
    def recognized(self, batch: dict) -> Iterator[torch.Tensor]:
        """For each of the levels, whether the class of an image is the most probable: `(batch,)`."""
        for level in LEVELS:
            timesteps = torch.full_like(batch["timesteps"], level)
            logits = self.model(noisy=self.add_noise(batch, level), timesteps=timesteps)
            yield logits.argmax(-1) == batch["class_labels"]

    def draw_samples(self) -> Image.Image:
        """A row for each level of noise: images in a green frame if they are recognized, else in a red one."""
        rows = self.train if self.test is None else self.test
        samples = self.samples(training=False)
        batches = batches_once(rows.select_columns(samples.columns), samples, self.collate, SAMPLES)
        batch = send_to_device(next(batches), self.trainer.device)
        framed, to_pil = [], partial(VaeImageProcessor().postprocess, output_type="pil")
        for level, right in zip(LEVELS, self.recognized(batch), strict=True):
            for image, is_right in zip(to_pil(self.add_noise(batch, level)), right.tolist(), strict=True):
                framed.append(ImageOps.expand(image, 2, RIGHT if is_right else WRONG))
        return make_image_grid(framed, len(LEVELS), len(batch["images"]))

    def save(self) -> None:
        accelerator, classifier = self.trainer.accelerator, self.classifier
        state = accelerator.get_state_dict(self.model) if self.trainer.is_sharded else None
        if not accelerator.is_main_process:
            return
        if state is not None:
            classifier = unsharded(classifier, state_of_part(state, "classifier."))
        replace_result(self.trainer.output_dir, NoisyClassifier.config_name, classifier.save_pretrained)

    def facts(self, metrics: dict[str, float]) -> dict:
        return {"data": public_settings(self.data), "classifier": training_facts(self.config, metrics)}
