"""The contrastive loss of a CLIP over the whole batch of a step, whatever parts it is handled in."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from transformers import CLIPModel


class CLIPEmbedder(nn.Module):
    """A CLIP as a module of one call, for optimizer and launcher.

    Args:
        clip ([`~transformers.CLIPModel`]): The model.
        compiles (`bool`, *optional*, defaults to `False`): Compile the call in training mode, whose batches have one
            shape.
    """

    text_path = ()  # both encoders learn at the same rate

    def __init__(self, clip: CLIPModel, compiles: bool = False):
        super().__init__()
        self.clip = clip
        self.embed_in_training = torch.compile(embed) if compiles else embed

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embed images and captions.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, size, size)`): Images, normalised as the CLIP expects.
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch, words)`): Tokenized captions.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Image and text embeddings `(batch, d)` of length 1, and
            the factor of their cosines; in float32.
        """
        call = self.embed_in_training if self.training else embed
        images, texts = call(self.clip, pixel_values, input_ids, attention_mask)
        images, texts = (F.normalize(each.float(), dim=-1) for each in (images, texts))
        return images, texts, self.clip.logit_scale.float().exp()


def embed(
    clip: CLIPModel, pixel_values: torch.Tensor, input_ids: torch.LongTensor, attention_mask: torch.LongTensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The projections of images and texts, of any length."""
    images = clip.get_image_features(pixel_values=pixel_values).pooler_output
    return images, clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss (arXiv 2103.00020, figure 3): which text belongs to an image, and which image to a text.

    Args:
        images, texts (`torch.Tensor` of shape `(batch, d)`): Embeddings of length 1, of pairs.
        scale (`torch.Tensor`): Factor of the cosines, one over the temperature.

    Returns:
        `torch.Tensor`: Mean of the two cross-entropies, in nats; of random embeddings about the logarithm of `batch`.
    """
    logits = scale * images @ texts.T
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def step_loss(
    accelerator: Accelerator, images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The contrastive loss among the rows of all processes.

    Its gradients are right once they are averaged over the processes, as DDP does.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Says which processes there are.
        images, texts, scale (`torch.Tensor`): This process's, as for [`contrastive_loss`].
    """
    return contrastive_loss(_from_all(accelerator, images), _from_all(accelerator, texts), scale)


def _from_all(accelerator: Accelerator, embeddings: torch.Tensor) -> torch.Tensor:
    """The embeddings of all processes, through which gradients reach those of this one."""
    count = accelerator.num_processes
    if count == 1:
        return embeddings
    parts = list(accelerator.gather(embeddings.detach()).chunk(count))
    own = embeddings.view_as(embeddings)
    if own.requires_grad:
        # Each process has the gradient of its own rows alone, and the average divides it by the number of processes.
        own.register_hook(lambda gradient: count * gradient)
    parts[accelerator.process_index] = own
    return torch.cat(parts)


def embedding_gradients(
    accelerator: Accelerator, model: nn.Module, batches: list[dict]
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """The loss of a step that is handled in several micro-batches, and its gradients in their embeddings.

    A contrastive loss is not the mean of those of its parts. So all rows are embedded first, without a graph, and the
    micro-batches propagate the gradients of their own embeddings afterwards (gradient caching, arXiv 2101.06983).

    Args:
        accelerator ([`~accelerate.Accelerator`]): Says which processes there are.
        model (`torch.nn.Module`): A [`CLIPEmbedder`], as the accelerator prepared it.
        batches (`list[dict]`): Its arguments, for each micro-batch of this process.

    Returns:
        The loss; for each micro-batch the gradients in its image and in its text embeddings; and that in the scale.
    """
    with torch.no_grad():
        embedded = [model(**batch) for batch in batches]
    images, texts = (torch.cat([each[side] for each in embedded]).requires_grad_() for side in (0, 1))
    scale = embedded[0][2].clone().requires_grad_()
    loss = step_loss(accelerator, images, texts, scale)
    of_images, of_texts, of_scale = torch.autograd.grad(loss, (images, texts, scale))
    sizes = [len(each[0]) for each in embedded]
    return loss.detach(), list(zip(of_images.split(sizes), of_texts.split(sizes), strict=True)), of_scale
