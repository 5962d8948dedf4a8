"""The cascade: what its parts draw one after the other, each image from its own seed alone."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from tiny import build_class_pipeline, build_text_pipeline, generators
from tiny_cascade import BASES, build_ddpm_pipeline, build_nested_cascade, quiet
from tiny_cascade import build_cascade as build_new_cascade
from tiny_diffusion import build_diffusion_pipeline

from llamagen_hf import CascadePipeline
from llamagen_hf.arguments import FieldError
from llamagen_hf.families import find_family
from llamagen_hf.provenance import read_parameters


# No test changes one.
build_cascade = functools.cache(build_new_cascade)


@pytest.fixture
def cascade():
    return build_cascade()


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def brightness(images: list[Image.Image], prompts: list) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


class Recorder:
    """A scorer by brightness that keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, images, prompts):
        self.asked.append(([image.size for image in images], list(prompts)))
        return brightness(images, prompts)


def test_two_lines(cascade):
    image = cascade("a red apple").images[0]
    assert isinstance(image, Image.Image) and image.size == (16, 16)


@pytest.mark.parametrize("kind", BASES)
def test_every_base_draws_alike_in_a_batch_and_alone(kind):
    cascade, condition = build_cascade(kind), BASES[kind][1]
    images = cascade(**condition, num_images_per_prompt=3, generator=generators(1, 2, 3)).images
    assert len(images) == 3 and not same(images[0], images[1])
    assert same(images[1], cascade(**condition, generator=generators(2)[0]).images[0])


@pytest.mark.parametrize("kind", ["text", "diffusion"])
def test_the_base_draws_as_without_the_cascade(cascade, kind):
    cascade = build_cascade(kind)
    small = cascade.base(["a", "b"], generator=generators(1, 2)).images
    output = cascade(["a", "b"], generator=generators(1, 2))
    assert all(map(same, output.base.images, small))


@pytest.mark.parametrize("text", [True, False])
def test_the_upsampler_draws_as_it_does_alone(text):
    cascade = build_cascade(text=text)
    output = cascade("a red apple", aug_level=0.3, upsampler_num_inference_steps=2, generator=generators(5))
    seed = output.parameters[0]["upsampler"]["seed"]
    prompt = {"prompt": "a red apple"} if text else {}
    settings = {"aug_level": 0.3, "num_inference_steps": 2, "generator": generators(seed)}
    alone = cascade.upsampler(**prompt, image=output.base.images[0], **settings)
    assert same(output.images[0], alone.images[0])


def test_the_upsampler_reads_the_prompt_of_each_image(cascade):
    one, other = cascade(["a", "b"], num_images_per_prompt=2, generator=generators(1, 2, 3, 4)).parameters[1:3]
    assert one["upsampler"]["prompt"] == "a" and other["upsampler"]["prompt"] == "b"
    assert other["prompt"] == "b"


def test_a_generator_for_several_images_gives_each_its_own_noise(cascade):
    output = cascade("a", num_images_per_prompt=2, generator=torch.Generator().manual_seed(3))
    seeds = [each["upsampler"]["seed"] for each in output.parameters]
    assert len(set(seeds)) == 2
    assert same(output.images[0], cascade.redraw(output.parameters[0]).images[0])
    assert same(output.images[1], cascade.redraw(output.parameters[1]).images[0])


def test_a_run_without_a_generator_says_its_seed(cascade):
    output = cascade("a", num_images_per_prompt=2)
    again = cascade("a", generator=generators(output.parameters[1]["seed"]))
    assert same(output.images[1], again.images[0])


@pytest.mark.parametrize(
    "output_type, kind, shape", [("np", np.ndarray, (2, 16, 16, 3)), ("pt", torch.Tensor, (2, 3, 16, 16))]
)
def test_output_types(cascade, output_type, kind, shape):
    images = cascade(["a", "b"], output_type=output_type).images
    assert isinstance(images, kind) and images.shape == shape and 0 <= images.min() and images.max() <= 1
    assert cascade("a", output_type=output_type, return_dict=False)[0].shape == (1, *shape[1:])


def test_pixels_to_measure_are_those_of_the_image(cascade):
    pixels = cascade.draw_pixels("a red apple", generator=generators(2))
    images = cascade("a red apple", generator=generators(2), output_type="pt").images
    assert torch.allclose((pixels / 2 + 0.5).clamp(0, 1), images, atol=1e-6)


def test_candidates_are_drawn_by_the_base_and_only_the_best_is_enlarged(cascade):
    scorer = Recorder()
    output = cascade("a", num_images_per_prompt=2, num_candidates=3, scorer=scorer, generator=generators(1, 2))
    assert scorer.asked == [([(8, 8)] * 6, ["a"] * 6)]
    assert len(output.images) == 2 and [len(each) for each in output.base.candidates] == [3, 3]
    assert all(each[0].score == max(c.score for c in each) for each in output.base.candidates)
    assert same(output.base.images[0], output.base.candidates[0][0].image)
    assert all(
        same(image, cascade.redraw(p).images[0]) for image, p in zip(output.images, output.parameters, strict=True)
    )


@pytest.mark.parametrize("kind, name", [("text", "a red apple"), ("class", "goldfish"), ("dit", "crane")])
def test_the_best_of_several_levels_is_kept(kind, name):
    cascade, condition, scorer = build_cascade(kind, text=False), BASES[kind][1], Recorder()
    levels = [0.0, 0.5, 1.0]
    output = cascade(**condition, aug_level=levels, scorer=scorer, generator=generators(4))
    assert scorer.asked == [([(16, 16)] * 3, [name] * 3)]
    alone = [cascade(**condition, aug_level=level, generator=generators(4)).images[0] for level in levels]
    best = int(np.argmax(brightness(alone, [])))
    assert output.parameters[0]["upsampler"]["aug_level"] == levels[best]
    assert np.abs(np.asarray(output.images[0], int) - np.asarray(alone[best], int)).max() <= 1
    assert len(output.candidates[0]) == 3
    assert same(output.images[0], cascade.redraw(output.parameters[0]).images[0])


@pytest.mark.parametrize("kind", BASES)
def test_redrawn_from_a_file_an_image_is_the_same(kind, tmp_path):
    cascade = build_cascade(kind, text=False)
    output = cascade(**BASES[kind][1], aug_level=0.2, num_images_per_prompt=2, generator=generators(1, 2))
    paths = output.save(tmp_path / "image.png")
    parameters = read_parameters(paths[1])
    assert parameters == output.parameters[1] and parameters["upsampler"]["aug_level"] == 0.2
    again = cascade.redraw(parameters)
    assert same(again.images[0], output.images[1])
    assert again.save(tmp_path / "again.png")[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("kind", ["text", "diffusion", "ddpm"])
def test_the_last_step_of_a_stream_is_the_call(kind):
    cascade, condition = build_cascade(kind, text=False), BASES[kind][1]
    expected = cascade(**condition, generator=generators(2))
    steps = list(cascade.stream(**condition, generator=generators(2), preview_every=1))
    assert {image.size for step in steps for image in step.images} == {(16, 16)}
    numbers = [step.step for step in steps]
    assert numbers == sorted(set(numbers)) and numbers[-1] == steps[-1].num_steps == steps[0].num_steps
    assert sum(step.step > steps[-1].num_steps - 4 for step in steps) == 4  # those of the upsampler
    assert all(step.output is None for step in steps[:-1])
    assert same(steps[-1].output.images[0], expected.images[0])
    assert steps[-1].output.parameters == expected.parameters


def test_previews_come_in_the_output_type(cascade):
    for step in cascade.stream("a", output_type="pt", preview_every=8):
        assert step.images.shape == (1, 3, 16, 16)


def test_a_cascade_is_a_base():
    cascade = build_nested_cascade()
    assert cascade.image_size == 32 and cascade.condition_kind == "text"
    settings = cascade.sampling_settings(aug_level=0.1, base_aug_level=0.5)
    assert settings["aug_level"] == 0.1 and settings["base_aug_level"] == 0.5 and settings["temperature"] == 1.0
    output = cascade(["a", "b"], **settings, generator=generators(1, 2))
    parameters = output.parameters[1]
    assert output.images[0].size == (32, 32)
    assert parameters["upsampler"]["aug_level"] == 0.5 and parameters["upsampler"]["upsampler"]["aug_level"] == 0.1
    assert parameters["upsampler"]["prompt"] == "b" and "prompt" not in parameters["upsampler"]["upsampler"]
    assert same(cascade("b", **settings, generator=generators(2)).images[0], output.images[1])
    assert same(cascade.redraw(parameters).images[0], output.images[1])
    steps = list(cascade.stream("b", **settings, generator=generators(2), preview_every=1))
    assert same(steps[-1].images[0], output.images[1]) and steps[-1].step == 16 + 4 + 4
    assert cascade.facts["upsampler"]["upsampler"]["scheduler"] == "DPMSolverMultistepScheduler"


def test_what_it_is():
    cascade = build_cascade("class")
    assert (cascade.condition_kind, cascade.num_classes, cascade.image_size) == ("class", 10, 16)
    assert cascade.class_names(["1", 4]) == ["goldfish", "golden retriever"]
    assert find_family(type(cascade).__name__).name == "Imagen"
    assert build_cascade("dit").class_names(["crane", "Carassius", 7]) == ["crane", "Carassius, goldfish", "7"]
    assert build_cascade("dit").num_classes == 1000 and build_cascade("ddpm").condition_kind == "none"
    settings = cascade.sampling_settings(upsampler_num_inference_steps=7, guidance_scale=2.0)
    assert settings["upsampler_num_inference_steps"] == 7 and settings["guidance_scale"] == 2.0
    assert settings["upsampler_guidance_scale"] == 4.0 and settings["aug_level"] == 0.0


@pytest.mark.parametrize(
    "base, upsampler, message",
    [
        (torch.nn.Linear(1, 1), None, "`base` must be a pipeline of diffusers"),
        (None, torch.nn.Linear(1, 1), "`upsampler` must be a PixelDiffusionPipeline, not Linear"),
        (None, build_text_pipeline, "`upsampler` must be a PixelDiffusionPipeline"),
        (None, build_diffusion_pipeline, "`upsampler` draws images from noise alone"),
        (lambda: build_diffusion_pipeline(upsamples=True, image_size=8), None, "`base` enlarges images"),
        (build_diffusion_pipeline, None, "The base draws images of 16x16 pixels, but the upsampler makes 16x16"),
        (lambda: build_ddpm_pipeline(32), None, "The base draws images of 32x32 pixels"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_sentence(base, upsampler, message):
    base = base() if callable(base) and not isinstance(base, torch.nn.Module) else base or build_class_pipeline()
    if upsampler is None:
        upsampler = build_diffusion_pipeline(upsamples=True)
    elif not isinstance(upsampler, torch.nn.Module):
        upsampler = upsampler()
    with pytest.raises(ValueError, match=message) as info:
        CascadePipeline(base, upsampler)
    assert str(info.value).count(". ") == 0


@pytest.mark.parametrize(
    "kind, arguments, field, message",
    [
        ("text", {"aug_level": 1.5}, "aug_level", r"`aug_level` is 1.5; expected a number in \[0, 1\]"),
        ("text", {"aug_level": [0.1, -0.1], "scorer": brightness}, "aug_level", "`aug_level` is -0.1"),
        ("text", {"aug_level": [0.1, 0.2]}, "scorer", "A list of `aug_level` needs a `scorer`"),
        ("text", {"num_candidates": 2, "scorer": "clip"}, "scorer", "`num_candidates` needs a `scorer`"),
        ("text", {"upsampler_guidance_scale": -1}, "upsampler_guidance_scale", "`upsampler_guidance_scale` is -1"),
        ("text", {"upsampler_num_inference_steps": 0}, "upsampler_num_inference_steps", "is 0; expected an integer"),
        ("text", {"output_type": "codes"}, "output_type", "`output_type` is 'codes'"),
        ("text", {"num_images_per_prompt": 0}, "num_images_per_prompt", "`num_images_per_prompt` is 0"),
        ("text", {"generator": generators(1, 2)}, "generator", "list of 2, but 1 images"),
        ("text", {"class_labels": 1, "prompt": None}, "class_labels", "text-conditional"),
        ("ddpm", {}, "prompt", "DDPMPipeline reads no text"),
        ("ddpm", {"prompt": None, "class_labels": 1}, "class_labels", "DDPMPipeline draws no classes"),
        ("ddpm", {"prompt": None, "top_k": 1}, "top_k", "DDPMPipeline takes no `top_k`"),
        ("ddpm", {"prompt": None, "batch_size": 2}, "batch_size", "DDPMPipeline takes no `batch_size`"),
        ("ddpm", {"prompt": None, "num_images_per_prompt": 0}, "num_images_per_prompt", "is 0"),
        ("dit", {"prompt": None}, "class_labels", "DiTPipeline draws classes: pass `class_labels`"),
        ("dit", {"prompt": None, "class_labels": "cran"}, "class_labels", "did you mean 'crane'"),
    ],
)
def test_bad_arguments_are_refused_before_the_base_draws(kind, arguments, field, message, monkeypatch):
    cascade = build_cascade(kind)
    for model in cascade.base.components.values():
        if isinstance(model, torch.nn.Module):
            monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("it draws"))
    with pytest.raises(FieldError, match=message) as info:
        cascade(**{"prompt": "a"} | arguments)
    assert info.value.field == field


def test_an_upsampler_without_text_has_no_guidance():
    with pytest.raises(FieldError, match="reads no text that could guide it") as info:
        build_cascade(text=False)("a", upsampler_guidance_scale=3.0)
    assert info.value.field == "upsampler_guidance_scale"


class OtherPipeline(DDPMPipeline):
    """Returns what no cascade can enlarge."""

    returned = {}

    def __call__(self, **kwargs):
        return SimpleNamespace(**self.returned)


@pytest.mark.parametrize(
    "returned, message",
    [
        ({"frames": []}, "OtherPipeline did not return a list of 1 `images`, so it can't be a base"),
        ({"images": [Image.new("RGB", (20, 20))]}, "drew an image of 20x20 pixels, but the upsampler makes 16x16"),
        ({"images": [Image.new("RGB", (8, 6))]}, "drew an image of 8x6 pixels"),
    ],
)
def test_a_base_whose_result_can_not_be_enlarged_is_named(returned, message, monkeypatch):
    cascade = build_cascade("ddpm")
    monkeypatch.setattr(OtherPipeline, "returned", returned)
    other = quiet(CascadePipeline(OtherPipeline(**cascade.base.components), cascade.upsampler))
    with pytest.raises(ValueError, match=message):
        other()


def test_parameters_that_do_not_determine_an_image_are_refused(cascade):
    parameters = cascade("a", generator=generators(1)).parameters[0]
    base = {name: value for name, value in parameters.items() if name != "upsampler"}
    with pytest.raises(ValueError, match="These parameters hold no upsampler"):
        cascade.redraw(base)
    with pytest.raises(ValueError, match="another number of upsamplers"):
        build_nested_cascade().redraw(parameters)
    with pytest.raises(ValueError, match="scheduler 'DDIMScheduler'"):
        cascade.redraw(base | {"upsampler": parameters["upsampler"] | {"scheduler": "DDIMScheduler"}})
    ddpm = build_cascade("ddpm")
    with pytest.raises(ValueError, match="The image was drawn by None, but the base is DDPMPipeline"):
        ddpm.redraw(parameters)


def test_what_the_parameters_do_not_hold_is_said():
    cascade = build_cascade("deepfloyd")
    states, null = torch.rand(1, 77, 16), torch.rand(1, 77, 16)
    call = {"prompt_embeds": states, "negative_prompt_embeds": null, "num_inference_steps": 2}
    output = cascade(**call, num_images_per_prompt=2, num_candidates=2, scorer=brightness, generator=generators(1, 2))
    assert len(output.images) == 2 and output.parameters[0]["not_recorded"] == list(call)[:2]
    with pytest.raises(ValueError, match="drawn with prompt_embeds, negative_prompt_embeds, which the parameters do"):
        cascade.redraw(output.parameters[0])


def test_a_used_generator_can_not_be_given_again():
    cascade, used = build_cascade("ddpm"), generators(1)
    torch.rand(1, generator=used[0])
    parameters = cascade(num_inference_steps=2, generator=used).parameters[0]
    with pytest.raises(ValueError, match="hold no seed"):
        cascade.redraw(parameters)
