"""The adversarial losses by the formulas of their papers, and the discriminators layer by layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llamagen_hf.llamagen.training.discriminators import (
    Blur,
    PatchGANDiscriminator,
    ResidualDownBlock,
    StyleGANDiscriminator,
    build_discriminator,
)
from llamagen_hf.llamagen.training.losses import adaptive_weight, discriminator_loss, generator_loss


def logits(*shape):
    return (3 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("kind", ["vanilla", "non-saturating"])
def test_discriminator_maximises_the_log_likelihood_of_its_verdicts(kind):
    real, fake = logits(2, 1, 3, 3), logits(5, 1)
    loss = discriminator_loss(kind, real, fake)
    d_real, d_fake = 1 / (1 + (-real).exp()), 1 / (1 + (-fake).exp())
    torch.testing.assert_close(loss, -(d_real.log().mean() + (1 - d_fake).log().mean()) / 2)
    gradients = torch.autograd.grad(loss, (real, fake))
    torch.testing.assert_close(gradients, (-(1 - d_real) / (2 * 18), d_fake / (2 * 5)))


def test_hinge_discriminator_stops_at_its_margins():
    real, fake = logits(2, 1, 3, 3), logits(5, 1)
    loss = discriminator_loss("hinge", real, fake)
    on_real = sum(max(0.0, 1 - x) for x in real.flatten().tolist()) / 18
    on_fake = sum(max(0.0, 1 + x) for x in fake.flatten().tolist()) / 5
    assert loss.item() == pytest.approx((on_real + on_fake) / 2)
    gradients = torch.autograd.grad(loss, (real, fake))
    torch.testing.assert_close(gradients, (-(real < 1).double() / (2 * 18), (fake > -1).double() / (2 * 5)))


def test_generator_losses():
    fake = logits(4, 1, 2, 2)
    hinge, non_saturating = generator_loss("hinge", fake), generator_loss("non-saturating", fake)
    torch.testing.assert_close(hinge, -fake.sum() / 16)
    d_fake = 1 / (1 + (-fake).exp())
    torch.testing.assert_close(non_saturating, -d_fake.log().mean())
    torch.testing.assert_close(torch.autograd.grad(non_saturating, fake), (-(1 - d_fake) / 16,))
    assert torch.autograd.gradcheck(lambda x: generator_loss("non-saturating", x), fake)


def test_losses_of_a_sure_discriminator_stay_finite():
    sure = torch.tensor([1e4])
    assert discriminator_loss("non-saturating", sure, -sure) == 0
    assert discriminator_loss("non-saturating", -sure, sure) == 1e4
    assert generator_loss("non-saturating", -sure) == 1e4


def test_kinds_that_do_not_exist():
    with pytest.raises(ValueError, match="'wgan'; expected 'hinge', 'vanilla' or 'non-saturating'"):
        discriminator_loss("wgan", torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="'vanilla'; expected 'hinge' or 'non-saturating'"):
        generator_loss("vanilla", torch.zeros(1))


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.randn(3, 4, 2, 2, requires_grad=True)
    slope, other = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    reconstruction, adversarial = (weight * slope).sum(), (weight * other).square().sum()
    got = adaptive_weight(reconstruction, adversarial, weight)
    gradient = 2 * weight.detach() * other**2
    expected = math.sqrt(slope.square().sum()) / (math.sqrt(gradient.square().sum()) + 1e-4)
    assert got.item() == pytest.approx(expected, rel=1e-5)
    assert not got.requires_grad and weight.grad is None
    (reconstruction + got * adversarial).backward()  # both graphs are still there
    torch.testing.assert_close(weight.grad, slope + got * gradient)


@pytest.mark.parametrize("scale, expected", [(0.5, 0.5 / 1e-4), (2.0, 1e4)])
def test_adaptive_weight_of_no_adversarial_gradient_is_bounded(scale, expected):
    weight = torch.zeros(1, requires_grad=True)
    assert adaptive_weight(scale * weight.sum(), 0 * weight.sum(), weight).item() == pytest.approx(expected)


@pytest.mark.parametrize("num_layers, field", [(1, 16), (2, 34), (3, 70)])
def test_patchgan_logit_sees_a_square_of_pixels(num_layers, field):
    model = PatchGANDiscriminator(width=4, num_layers=num_layers).double().eval()
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    output = model(images)
    middle = output.shape[-1] // 2
    (gradient,) = torch.autograd.grad(output[0, 0, middle, middle], images)
    seen = gradient[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert len(rows) == len(columns) == field
    assert seen.sum() == field**2


def test_patchgan_layers():
    model = PatchGANDiscriminator(width=4, num_layers=4).eval()
    for layer in model.main:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    weights = model.state_dict()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    x = F.conv2d(images, weights["main.0.weight"], weights["main.0.bias"], stride=2, padding=1)
    for i, (stride, width) in enumerate([(2, 8), (2, 16), (2, 32), (1, 32)]):
        conv, norm = f"main.{2 + 3 * i}", f"main.{3 + 3 * i}"
        x = F.conv2d(torch.where(x > 0, x, 0.2 * x), weights[f"{conv}.weight"], stride=stride, padding=1)
        assert x.shape[1] == width
        mean, var = (weights[f"{norm}.running_{name}"][:, None, None] for name in ("mean", "var"))
        scale, shift = (weights[f"{norm}.{name}"][:, None, None] for name in ("weight", "bias"))
        x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
    x = F.conv2d(torch.where(x > 0, x, 0.2 * x), weights["main.14.weight"], weights["main.14.bias"], padding=1)
    assert x.shape == (2, 1, 2, 2) and len(weights) == 4 + 4 * 6
    torch.testing.assert_close(model(images), x)


def test_patchgan_weights_start_small():
    model = PatchGANDiscriminator()
    convs = torch.cat([m.weight.flatten() for m in model.main if isinstance(m, nn.Conv2d)])
    norms = torch.cat([m.weight for m in model.main if isinstance(m, nn.BatchNorm2d)])
    assert convs.mean().item() == pytest.approx(0, abs=1e-4) and convs.std().item() == pytest.approx(0.02, rel=0.01)
    assert norms.mean().item() == pytest.approx(1, abs=3e-3) and norms.std().item() == pytest.approx(0.02, rel=0.1)
    assert model(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def test_blur_by_hand():
    images = torch.zeros(1, 2, 4, 4)
    images[0, 0, 0, 0] = images[0, 1, 1, 1] = 16
    # A pixel in the corner has no mirror image; one beside the border is seen again beyond it.
    corner = [[4, 2, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    inner = [[4, 4, 2, 0], [4, 4, 2, 0], [2, 2, 1, 0], [0, 0, 0, 0]]
    assert Blur()(images)[0].tolist() == [corner, inner]


def residual_block(x, weights, name):
    """The block from its weights: (blurred and halved main path + 1x1 path) / sqrt(2)."""

    def conv(x, layer, **kwargs):
        return F.conv2d(x, weights[f"{name}{layer}.weight"], weights[f"{name}{layer}.bias"], **kwargs)

    main = F.leaky_relu(conv(F.leaky_relu(conv(x, "net.0", padding=1), 0.2), "net.2", padding=1), 0.2)
    padded = F.pad(main, (1, 1, 1, 1), mode="reflect")
    rows = (padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]) / 4
    blurred = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    return (conv(blurred, "downsample.1", stride=2, padding=1) + conv(x, "conv_res")[..., ::2, ::2]) * 0.5**0.5


def test_stylegan_block():
    block = ResidualDownBlock(3, 5).double()
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), residual_block(x, block.state_dict(), ""))
    assert block(x).shape == (2, 5, 3, 4)


def test_stylegan_from_image_to_logit():
    model = StyleGANDiscriminator(32, width=8)
    weights = model.state_dict()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    x = F.leaky_relu(F.conv2d(images, weights["blocks.0.weight"], weights["blocks.0.bias"], padding=1), 0.2)
    for i in (2, 3, 4):
        x = residual_block(x, weights, f"blocks.{i}.")
    assert x.shape == (3, 8, 4, 4)
    x = F.leaky_relu(F.conv2d(x, weights["final_conv.0.weight"], weights["final_conv.0.bias"], padding=1), 0.2)
    x = F.leaky_relu(x.reshape(3, 128) @ weights["final_linear.0.weight"].T + weights["final_linear.0.bias"], 0.2)
    x = x @ weights["final_linear.2.weight"].T + weights["final_linear.2.bias"]
    torch.testing.assert_close(model(images), x)


@pytest.mark.parametrize(
    "image_size, widths",
    [(16, [512] * 3), (64, [256] + [512] * 4), (1024, [16, 32, 64, 128, 256] + [512] * 4)],
)
def test_stylegan_widths_at_each_size(image_size, widths):
    with torch.device("meta"):
        model = StyleGANDiscriminator(image_size)
        output = model(torch.zeros(2, 3, image_size, image_size))
    assert output.shape == (2, 1)
    blocks = model.blocks[2:]
    assert [model.blocks[0].out_channels] + [block.conv_res.out_channels for block in blocks] == widths
    assert model.final_linear[0].in_features == 512 * 4 * 4


@pytest.mark.parametrize("kind", ["patchgan", "stylegan"])
def test_every_weight_of_a_discriminator_learns(kind):
    model = build_discriminator(kind, 32, width=8)
    assert next(model.parameters()).shape[0] == 8
    model(torch.rand(4, 3, 32, 32)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    "kind, image_size, message",
    [
        ("stylegan", 8, "is 8; expected a power of two between 16 and 1024."),
        ("stylegan", 48, "is 48; expected a power of two between 16 and 1024."),
        ("stylegan", 2048, "is 2048; expected a power of two between 16 and 1024."),
        ("patchgan", 23, "is 23; a PatchGAN discriminator takes 24 pixels a side or more."),
        ("biggan", 64, "'biggan'; expected 'patchgan' or 'stylegan'."),
    ],
)
def test_discriminators_that_cannot_be_built(kind, image_size, message):
    with pytest.raises(ValueError, match=message):
        build_discriminator(kind, image_size)


def test_smallest_images_of_both_discriminators():
    assert build_discriminator("patchgan", 24, width=4)(torch.rand(2, 3, 24, 24)).shape == (2, 1, 1, 1)
    assert build_discriminator("stylegan", 16, width=4)(torch.rand(2, 3, 16, 16)).shape == (2, 1)
