"""Trainings of one model by one optimizer: their step, and the groups of their weights."""

from abc import abstractmethod

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .trainer import TrainingTask


class SingleModelTask(TrainingTask):
    """A task that optimizes one module, whose forward pass returns the loss.

    Attributes:
        model (`torch.nn.Module`), optimizer (`torch.optim.Optimizer`): Both as the accelerator prepared them.
        scheduler (`torch.optim.lr_scheduler.LRScheduler`): The optimizer's.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler

    @abstractmethod
    def encode(self, batch: dict) -> dict:
        """A batch as the model's arguments."""

    def train_step(self, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        losses = []
        for batch in micro_batches:
            with self.trainer.accelerator.accumulate(self.model):
                loss = self.model(**self.encode(batch))
                self.trainer.update(self.model, self.optimizer, loss)
            losses.append(loss.detach())
        rate = losses[0].new_tensor(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        return {"loss": torch.stack(losses).mean(), "learning_rate": rate}


def parameter_groups(
    model: nn.Module, learning_rate: float, text_learning_rate: float | None, weight_decay: float
) -> list[dict]:
    """Groups for AdamW: decay for matrices and none for vectors, and a rate of its own for what reads the text.

    Args:
        model (`torch.nn.Module`): Its weights that require a gradient are in the groups. Its `text_path` says how the
            names of those begin that read the text.
        learning_rate (`float`): Peak rate.
        text_learning_rate (`float`, *optional*): That of the text path; the same by default.
        weight_decay (`float`): Decay of matrices.
    """
    text_rate = learning_rate if text_learning_rate is None else text_learning_rate
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for is_text, rate in ((False, learning_rate), (True, text_rate)):
        chosen = [p for name, p in named if name.startswith(model.text_path) == is_text]
        for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
            parameters = [p for p in chosen if (p.ndim >= 2) == is_matrix]
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return groups
