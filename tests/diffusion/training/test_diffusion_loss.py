"""The loss of a diffusion training: targets, weights, groups of parameters, gradients."""

import pytest
import torch
from diffusers.training_utils import compute_snr
from tiny import build_text_encoder
from tiny_diffusion import build_unet


pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.conditioning.text import encode_tokens  # noqa: E402
from llamagen_hf.diffusion.denoising import predicted_images  # noqa: E402
from llamagen_hf.diffusion.schedules import training_scheduler  # noqa: E402
from llamagen_hf.diffusion.training.diffusion_loss import (  # noqa: E402
    DiffusionLoss,
    min_snr_weights,
    prediction_target,
)
from llamagen_hf.diffusion.unet import predict  # noqa: E402
from llamagen_hf.training.single_model import parameter_groups  # noqa: E402


KINDS = ("epsilon", "sample", "v_prediction")


def batch_of(count=2, size=16):
    torch.manual_seed(3)
    noisy, target = torch.randn(2, count, 3, size, size)
    return {
        "noisy": noisy,
        "timesteps": torch.tensor([10, 700])[:count],
        "target": target,
        "weights": torch.ones(count),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_leads_back_to_the_image(kind):
    scheduler = training_scheduler(kind)
    images, noise = torch.rand(1, 3, 8, 8) * 2 - 1, torch.randn(1, 3, 8, 8)
    for timestep in (0, 400, 900):
        timesteps = torch.tensor([timestep])
        noisy = scheduler.add_noise(images, noise, timesteps)
        target = prediction_target(scheduler, images, noise, timesteps)
        found = predicted_images(scheduler, noisy, target, timesteps[0])
        torch.testing.assert_close(found, images, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_same_error_of_the_image(kind):
    """Whatever is predicted: an error of the image counts min(SNR, gamma), as in the paper's equation 5."""
    scheduler, timesteps = training_scheduler(kind), torch.tensor([5, 300, 600, 950])
    images, noise, error = torch.zeros(4, 3, 4, 4), torch.randn(4, 3, 4, 4), 0.1
    noisy = scheduler.add_noise(images, noise, timesteps)
    signal = scheduler.alphas_cumprod[timesteps].sqrt().view(4, 1, 1, 1)
    noise_of = lambda images: (noisy - signal * images) / (1 - signal**2).sqrt()  # noqa: E731
    right, wrong = (prediction_target(scheduler, each, noise_of(each), timesteps) for each in (images, images + error))
    weights = min_snr_weights(scheduler, timesteps, 5.0)
    losses = weights * (right - wrong).square().mean((1, 2, 3))
    torch.testing.assert_close(
        losses, error**2 * compute_snr(scheduler, timesteps).clamp(max=5.0), rtol=1e-3, atol=1e-7
    )
    assert torch.equal(min_snr_weights(scheduler, timesteps, None), torch.ones(4))


def test_the_loss_is_the_weighted_error_of_what_the_pipeline_calls():
    unet, text_encoder = build_unet(condition_dim=16), build_text_encoder()
    encode = lambda *arguments: encode_tokens(*arguments, length=12)  # noqa: E731
    model = DiffusionLoss(unet, text_encoder, encode).eval()
    batch = batch_of() | {"weights": torch.tensor([1.0, 3.0])}
    ids, mask = torch.randint(1, 300, (2, 6)), torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    states, states_mask = encode(text_encoder, ids, mask)
    output = predict(unet, batch["noisy"], batch["timesteps"], states=states, mask=states_mask)
    errors = (output - batch["target"]).square().mean((1, 2, 3))
    expected = (errors[0] + 3 * errors[1]) / 2
    torch.testing.assert_close(model(**batch, input_ids=ids, attention_mask=mask), expected)
    torch.testing.assert_close(model(**batch, states=states, mask=states_mask), expected)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        unet = build_unet(upsamples=True).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        batch = batch_of() | {"small": torch.zeros(2, 3, 16, 16), "aug_level": torch.zeros(2)}
        DiffusionLoss(unet)(**batch).backward()
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_every_parameter_is_in_one_group_with_its_rate_and_decay():
    model = DiffusionLoss(build_unet(condition_dim=16), build_text_encoder())
    groups = parameter_groups(model, learning_rate=1e-3, text_learning_rate=1e-4, weight_decay=0.05)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert found[id(parameter)]["lr"] == (1e-4 if name.startswith("text_encoder") else 1e-3), name
        assert found[id(parameter)]["weight_decay"] == (0.05 if parameter.ndim >= 2 else 0.0), name


def test_a_learnt_variance_is_left_alone():
    """DeepFloyd IF's U-Nets predict it in three more channels, which have no target."""
    unet = build_unet()
    unet.conv_out = torch.nn.Conv2d(8, 6, 3, padding=1)
    unet.register_to_config(out_channels=6)
    DiffusionLoss(unet.train())(**batch_of()).backward()
    gradient = unet.conv_out.weight.grad
    assert gradient[:3].abs().max() > 0 and gradient[3:].abs().max() == 0
