"""Guides: exact on a Gaussian mixture, and right for every kind of prediction, scheduler and U-Net."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from tiny import build_clip, generators
from tiny_cascade import build_cascade
from tiny_diffusion import build_diffusion_pipeline
from torch import nn

from llamagen_hf.diffusion.denoising import denoise, shifted_by
from llamagen_hf.diffusion.guides import ClassifierGuide, CLIPGuide
from llamagen_hf.diffusion.noisy_classifier import ALPHAS_CUMPROD, NoisyClassifier
from llamagen_hf.diffusion.schedules import sampling_scheduler, training_scheduler, with_thresholding


MEANS, STD, WEIGHTS = (-0.5, 0.1, 0.5), 0.2, (0.5, 0.3, 0.2)
KINDS = ("epsilon", "sample", "v_prediction")


class Mixture(nn.Module):
    """Images of three classes, each normal around its grey: their classifier, and the ideal U-Net for them.

    Args:
        prediction_type (`str`, *optional*): What the U-Net predicts.
        label (`int`, *optional*): The only class that it knows; by default all.
    """

    config = SimpleNamespace(in_channels=3, out_channels=3, sample_size=1)
    dtype = torch.float32

    def __init__(self, prediction_type: str = "epsilon", label: int | None = None):
        super().__init__()
        self.scheduler = training_scheduler(prediction_type)
        self.label = label

    def logits(self, noisy, timesteps):
        alpha = ALPHAS_CUMPROD.to(noisy)[timesteps.long()].expand(len(noisy))[:, None]
        means, variance = torch.tensor(MEANS).to(noisy), alpha * STD**2 + 1 - alpha
        fit = alpha.sqrt() * means * noisy.flatten(1).sum(1, keepdim=True)
        size = noisy[0].numel()
        return torch.tensor(WEIGHTS).to(noisy).log() + (fit - size * alpha * means**2 / 2) / variance

    def images(self, noisy, timesteps):
        """The mean of the images given noisy ones."""
        alpha = ALPHAS_CUMPROD.to(noisy)[timesteps.long()].expand(len(noisy))[:, None, None, None]
        if self.label is None:
            shares = self.logits(noisy, timesteps).softmax(-1)
            mean = (shares * torch.tensor(MEANS).to(noisy)).sum(-1)[:, None, None, None]
        else:
            mean = MEANS[self.label]
        gain = alpha.sqrt() * STD**2 / (alpha * STD**2 + 1 - alpha)
        return mean + gain * (noisy - alpha.sqrt() * mean)

    def forward(self, noisy, timesteps, **kwargs):
        images, alpha = self.images(noisy, timesteps), ALPHAS_CUMPROD.to(noisy)[timesteps.long()]
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return (images,)
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        return ((noisy - signal * images) / spread if kind == "epsilon" else (signal * noisy - images) / spread,)


class MixtureClassifier(Mixture):
    def forward(self, noisy, timesteps):
        return self.logits(noisy, timesteps)


@pytest.mark.parametrize("prediction_type", KINDS)
def test_an_unconditional_model_and_its_guide_are_the_conditional_model(prediction_type):
    noisy = torch.randn(6, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guide = ClassifierGuide(MixtureClassifier(), [0, 1, 2])
    for step in (1, 300, 700, 990):
        timestep, alpha = torch.tensor(step), float(ALPHAS_CUMPROD[step])
        (output,) = Mixture(prediction_type)(noisy, timestep)
        scheduler = training_scheduler(prediction_type)
        found = shifted_by(scheduler, output, guide(noisy, timestep, noisy, alpha), timestep)
        for label in range(3):
            rows = slice(2 * label, 2 * label + 2)
            (expected,) = Mixture(prediction_type, label)(noisy[rows], timestep)
            torch.testing.assert_close(found[rows], expected, rtol=1e-6, atol=1e-6)


# The steps after which the schedulers' own errors are small enough.
CASES = [(DDIMScheduler, 60, "v_prediction"), (EulerDiscreteScheduler, 60, "v_prediction")]
CASES += [pytest.param(DDPMScheduler, 150, "v_prediction", marks=pytest.mark.slow)]
CASES += [(DPMSolverMultistepScheduler, 40, kind) for kind in KINDS]


@pytest.mark.parametrize("kind, steps, prediction_type", CASES)
def test_guided_samples_have_the_mean_and_the_deviation_of_their_class(kind, steps, prediction_type):
    scheduler = kind.from_config(sampling_scheduler(prediction_type, "none").config)
    if kind is not EulerDiscreteScheduler:
        scheduler = with_thresholding(scheduler, "none")
    noise = torch.randn(3000, 3, 1, 1, generator=torch.Generator().manual_seed(0))

    def run(unet, noise, guide=None):
        *_, last = denoise(unet, scheduler, noise, steps, guide=guide, generators=generators(1)[0])
        return last.sample

    guided = run(Mixture(prediction_type), noise, ClassifierGuide(MixtureClassifier(), [0, 2]))
    for images, label in zip(guided.chunk(2), (0, 2), strict=True):
        assert abs(images.mean().item() - MEANS[label]) < 0.02
        assert abs(images.std().item() - STD) < 0.02
    conditional = run(Mixture(prediction_type, 0), noise)[:1500]
    torch.testing.assert_close(guided[:1500], conditional, rtol=0, atol=2e-3)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    sizes = {"block_out_channels": [8, 16], "layers_per_block": [1, 1], "attention_levels": [1]}
    model = NoisyClassifier(["Circle", "square"], image_size=16, attention_head_dim=8, **sizes)
    with torch.no_grad():  # with weights as at the start of training, the classes would be as good as alike
        model.head.weight.mul_(100)
    return model


@pytest.fixture(scope="module", params=["plain", "patches", "upsampler"])
def pipe(request):
    kinds = {"plain": {}, "patches": {"patch_size": 2}, "upsampler": {"upsamples": True}}
    return build_diffusion_pipeline(**kinds[request.param])


def draw(pipe, count=1, **kwargs):
    """Images of seeds 0, 1, ... in [0, 1]."""
    image = {"image": torch.full((1, 3, 8, 8), 0.5)} if pipe.upsamples else {}
    options = {"num_images_per_prompt": count, "generator": generators(*range(count)), "num_inference_steps": 2}
    return pipe("a", output_type="pt", **options | image | kwargs).images


def guides(classifier, scale=1.0):
    return [ClassifierGuide(classifier, "circle", scale), CLIPGuide(*build_clip(), "a", scale)]


def test_scale_0_changes_nothing_and_more_does(pipe, classifier):
    plain = draw(pipe)
    for none, some in zip(guides(classifier, 0), guides(classifier, 3.0), strict=True):
        assert torch.equal(draw(pipe, guide=none), plain)
        assert not torch.equal(draw(pipe, guide=some), plain)


def test_an_image_depends_on_its_own_seed_and_label_alone(pipe, classifier):
    for guide in guides(classifier, 3.0):
        assert torch.allclose(draw(pipe, 2, guide=guide)[0], draw(pipe, guide=guide)[0], atol=1e-4)
    both = draw(pipe, 2, guide=ClassifierGuide(classifier, ["circle", 1], 3.0))
    for row, label in enumerate(("Circle", "square")):
        alone = draw(pipe, generator=generators(row), guide=ClassifierGuide(classifier, label, 3.0))
        assert torch.allclose(both[row], alone[0], atol=1e-4)


def test_a_guide_is_the_gradient_of_a_log_probability(classifier):
    noisy, timestep = torch.randn(2, 3, 16, 16), torch.tensor(300)
    guide, step = ClassifierGuide(classifier, ["circle", "square"], 2.0), 1e-2
    gradient = guide(noisy, timestep, noisy, float(ALPHAS_CUMPROD[300]))
    direction = gradient / gradient.norm()

    def log_p(noisy):
        return classifier(noisy, timestep).log_softmax(-1).diagonal().sum()

    slope = (log_p(noisy + step * direction) - log_p(noisy - step * direction)) / (2 * step)
    assert 2 * slope.item() == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_clip_sees_more_of_its_prompt(pipe):
    clip, noisy = CLIPGuide(*build_clip(), "a", 3.0), []
    unguided = draw(pipe, num_inference_steps=4, guide=lambda x, *_: noisy.append(x) or 0 * x)
    assert len(noisy) == 4 and noisy[0].shape == (1, 3, 16, 16)
    guided = draw(pipe, num_inference_steps=4, guide=clip)
    cosines = [(clip.embed(2 * images - 1) @ clip.texts.T).item() for images in (guided, unguided)]
    assert cosines[0] > cosines[1]


def test_candidates_share_the_label_of_their_prompt(classifier):
    pipe, seen = build_diffusion_pipeline(), []

    def scorer(images, prompts):
        seen.extend(images)
        return range(len(images))

    guide = ClassifierGuide(classifier, [0, 1], 30.0)
    options = {"guide": guide, "output_type": "pt", "num_candidates": 2, "scorer": scorer}
    found = pipe(["a", "a"], generator=generators(0, 0), **options).images
    options["guide"] = ClassifierGuide(classifier, 1, 30.0)
    assert torch.allclose(found[1], pipe("a", generator=generators(0), **options).images[0], atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_clip_sees_thresholded_images(classifier):
    pipe, seen = build_diffusion_pipeline(), []
    draw(pipe, guidance_scale=30.0, guide=lambda noisy, timestep, images, alpha: seen.append(images) or 0 * noisy)
    assert max(images.abs().max().item() for images in seen) <= 1


def test_guides_work_whatever_surrounds_the_call(classifier):
    pipe = build_diffusion_pipeline()
    for guide in guides(classifier, 3.0):
        expected = draw(pipe, guide=guide)
        with torch.inference_mode():
            assert torch.equal(draw(pipe, guide=guide), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(draw(pipe, guide=guide), expected)
    assert all(parameter.grad is None for parameter in [*classifier.parameters(), *pipe.unet.parameters()])


def test_the_parameters_name_the_guide_and_its_settings(classifier):
    guide, clip = guides(classifier, 2.0)
    (parameters,) = build_diffusion_pipeline()("a", guide=guide).parameters
    assert parameters["guide"] == {"name": "ClassifierGuide", "labels": ["Circle"], "scale": 2.0}
    assert clip.facts == {"name": "CLIPGuide", "prompts": ["a"], "scale": 2.0}


def test_a_cascade_guides_each_part(classifier):
    cascade = build_cascade("diffusion")
    guide = ClassifierGuide(classifier, 0, 30.0)
    options = {"generator": generators(0), "output_type": "pt"}
    plain, guided = (cascade("a", **options | given) for given in ({}, {"upsampler_guide": guide}))
    assert not torch.equal(plain.images, guided.images)
    assert guided.parameters[0]["upsampler"]["guide"]["name"] == "ClassifierGuide"


def test_what_does_not_fit_is_one_sentence(classifier):
    pipe = build_diffusion_pipeline()
    with pytest.raises(ValueError, match="There is no class 'circel'; did you mean 'circle'"):
        ClassifierGuide(classifier, "circel")
    with pytest.raises(ValueError, match="Class id 2 is out of range"):
        ClassifierGuide(classifier, 2)
    for scale in (float("nan"), "much", True):
        with pytest.raises(ValueError, match="The guide's `scale` is .*; expected a finite number"):
            ClassifierGuide(classifier, 0, scale)
    with pytest.raises(ValueError, match="The guide has 2 labels, but 3 images are drawn"):
        draw(pipe, 3, guide=ClassifierGuide(classifier, [0, 1]))
    with pytest.raises(ValueError, match="trained on images of 16x16 pixels, not on 8x8"):
        classifier(torch.zeros(1, 3, 8, 8), 0)
    with pytest.raises(ValueError, match="trained on another noise schedule"):
        ClassifierGuide(classifier, 0)(torch.zeros(1, 3, 16, 16), torch.tensor(500), torch.zeros(1, 3, 16, 16), 0.1)
    with pytest.raises(ValueError, match="needs at least 2 classes; `labels` has 1"):
        NoisyClassifier(["one"])


def test_a_classifier_is_saved_and_loaded(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    guide = ClassifierGuide.from_pretrained(tmp_path, labels=["square"], scale=2.0)
    noisy = torch.randn(2, 3, 16, 16)
    assert torch.equal(guide.classifier(noisy, 500), classifier(noisy, 500)) and guide.ids == [1]
    with pytest.raises(OSError, match="There is no classifier of noisy images at"):
        ClassifierGuide.from_pretrained(tmp_path / "none", labels=0)


def test_under_nothing_but_noise_a_classifier_knows_its_prior_alone(classifier):
    logits = classifier(torch.randn(4, 3, 16, 16), 999)
    torch.testing.assert_close(logits, classifier.prior.expand(4, 2), rtol=0, atol=1e-2)
