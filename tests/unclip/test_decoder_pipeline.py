"""Prior and decoder together: images from captions, variations, what lies between two, and the way back."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import build_text_pipeline, generators
from tiny_diffusion import build_diffusion_pipeline
from tiny_unclip import build_decoder, build_prior_pipeline
from tiny_unclip import build_unclip as build_new_unclip

from llamagen_hf import CascadePipeline, PriorDecoderPipeline
from llamagen_hf.arguments import FieldError
from llamagen_hf.families import find_family, load_pipeline
from llamagen_hf.provenance import read_parameters
from llamagen_hf.unclip.interpolation import slerp


KINDS = [("diffusion", "diffusion"), ("autoregressive", "autoregressive")]
# No test changes one.
build_unclip = functools.cache(build_new_unclip)


@pytest.fixture
def pipe():
    return build_unclip()


def picture(color: str) -> Image.Image:
    image = Image.new("RGB", (12, 12), color)
    image.paste("white", (0, 0, 5, 6))
    return image


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("decoder, prior", KINDS)
def test_an_image_depends_on_its_own_seed_alone_and_is_drawn_again(decoder, prior, tmp_path):
    pipe = build_unclip(decoder, prior)
    output = pipe(["a cat", "a dog"], num_images_per_prompt=2, generator=generators(1, 2, 3, 4))
    alone = pipe("a dog", generator=generators(3))
    assert torch.allclose(output.image_embeds[2], alone.image_embeds[0], atol=1e-5)
    difference = np.asarray(output.images[2], int) - np.asarray(alone.images[0], int)
    assert np.abs(difference).max() <= 1
    for row, path in enumerate(output.save(tmp_path / "a.png")):
        again = pipe.redraw(read_parameters(path))
        assert same(again.images[0], output.images[row])
        assert torch.equal(again.image_embeds[0], output.image_embeds[row])
    assert output.parameters[2]["prompt"] == "a dog" and output.parameters[2]["prior"]["seed"] == 3
    assert not same(output.images[0], output.images[2])


@pytest.mark.parametrize("decoder, prior", KINDS)
def test_variations_and_their_way_back(decoder, prior, tmp_path):
    pipe = build_unclip(decoder, prior)
    output = pipe.variation(picture("red"), num_images_per_prompt=2, generator=generators(5, 6))
    assert torch.equal(output.image_embeds[0], pipe.encode_image(picture("red"))[0])
    decoded = pipe.decoder(prompt_embeds=output.image_embeds[:1, None], generator=generators(5)).images[0]
    assert np.abs(np.asarray(decoded, int) - np.asarray(output.images[0], int)).max() <= 1
    assert not same(output.images[0], output.images[1])
    for row, path in enumerate(output.save(tmp_path / "a.png")):
        assert same(pipe.redraw(read_parameters(path)).images[0], output.images[row])


def test_the_ends_of_an_interpolation_are_what_lies_there(pipe):
    red, blue = picture("red"), picture("blue")
    output = pipe.interpolate(red, blue, [0.0, 0.5, 1.0], generator=generators(1, 1, 1))
    ends = torch.cat([pipe.encode_image(red), pipe.encode_image(blue)])
    torch.testing.assert_close(output.image_embeds[::2], ends)
    to_ends = ends @ output.image_embeds[1]
    assert to_ends[0] == pytest.approx(to_ends[1].item(), abs=1e-5) and len(output.images) == 3
    texts = pipe.interpolate("a cat", ends[1], 0.0, generator=generators(7), prior_num_candidates=1)
    expected = pipe.prior("a cat", num_candidates=1, generator=generators(7)).image_embeds
    torch.testing.assert_close(texts.image_embeds, expected)


def test_slerp_keeps_the_length_and_the_speed():
    a, b = F.normalize(torch.randn(2, 16, generator=generators(1)[0]), dim=-1)
    whole = torch.arccos(a @ b)
    for weight in (0.0, 0.25, 0.5, 1.0):
        point = slerp(a, b, weight)
        assert point.norm() == pytest.approx(1, abs=1e-6)
        assert torch.arccos((a @ point).clamp(max=1)) == pytest.approx(weight * whole.item(), abs=1e-3)
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-6)
    assert slerp(a, -a, 0.5).norm() == pytest.approx(1, abs=1e-6)


def test_the_scorer_gets_the_prompts(pipe):
    asked = []

    def score(images, prompts):
        asked.append(prompts)
        return [np.asarray(image).mean() for image in images]

    output = pipe(["a", "b"], num_candidates=2, scorer=score, generator=generators(1, 2))
    assert asked == [["a", "a", "b", "b"]]
    assert [len(group) for group in output.candidates] == [2, 2]
    for candidate in output.candidates[1]:
        assert same(pipe.redraw(candidate.parameters).images[0], candidate.image)


@pytest.mark.parametrize("decoder, prior", KINDS)
def test_streamed_equals_called(decoder, prior):
    pipe = build_unclip(decoder, prior)
    steps = list(pipe.stream("a cat", preview_every=1, generator=generators(1)))
    assert len(steps) > 2 and all(step.output is None for step in steps[:-1])
    called = pipe("a cat", generator=generators(1))
    assert same(steps[-1].images[0], called.images[0]) and steps[-1].output.parameters == called.parameters
    pixels = pipe.draw_pixels("a cat", generator=generators(1))
    images = pipe("a cat", generator=generators(1), output_type="pt").images
    assert torch.allclose((pixels / 2 + 0.5).clamp(0, 1), images, atol=1e-5)


def test_settings_reach_the_part_that_they_are_for(pipe):
    settings = pipe.sampling_settings(prior_guidance_scale=3.0, guidance_scale=2.0)
    assert settings == {
        "prior_num_inference_steps": 5, "prior_guidance_scale": 3.0, "prior_num_candidates": 2,
        "num_inference_steps": 3, "guidance_scale": 2.0,
    }  # fmt: skip
    settings = {"prior_num_inference_steps": 2, "prior_negative_prompt": "dog", "prior_guidance_scale": 2.0}
    parameters = pipe("a cat", **settings, num_inference_steps=4).parameters[0]
    assert parameters["prior"]["num_inference_steps"] == 2 and parameters["num_inference_steps"] == 4
    assert parameters["prior"]["negative_prompt"] == "dog"


@pytest.mark.parametrize("decoder, prior", KINDS)
def test_saved_equals_loaded(decoder, prior, tmp_path):
    pipe = build_unclip(decoder, prior)
    pipe.save_pretrained(tmp_path)
    for load in (load_pipeline, DiffusionPipeline.from_pretrained):
        loaded = load(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, PriorDecoderPipeline)
        one, other = (each("a cat", generator=generators(1)).images[0] for each in (pipe, loaded))
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    loaded = load_pipeline(tmp_path)
    parameters = loaded("a cat", generator=generators(1)).parameters[0]
    assert parameters["checkpoint"] == str(tmp_path) and "checkpoint" not in parameters["prior"]
    assert str(tmp_path) not in (tmp_path / "model_index.json").read_text()
    family = find_family("PriorDecoderPipeline")
    assert f"{pipe.image_size} x {pipe.image_size}" in family.summary.format(pipe=pipe)


def test_a_cascade_enlarges_what_they_draw():
    base = build_unclip("autoregressive", "diffusion")
    cascade = CascadePipeline(base, build_diffusion_pipeline(text=False, upsamples=True))
    cascade.set_progress_bar_config(disable=True)
    for call in ({"prompt": ["a cat", "a dog"]}, {"image_embeds": base.encode_image([picture("red")] * 2)}):
        output = cascade(**call, generator=generators(1, 2))
        assert [image.size for image in output.images] == [(16, 16)] * 2
        assert all(map(same, output.base.images, base(**call, generator=generators(1, 2)).images))
        for row, parameters in enumerate(output.parameters):
            assert same(cascade.redraw(parameters).images[0], output.images[row])
    settings = cascade.sampling_settings(prior_num_inference_steps=4, upsampler_num_inference_steps=2)
    assert settings["prior_num_inference_steps"] == 4 and settings["upsampler_num_inference_steps"] == 2


@pytest.mark.parametrize(
    "call, message",
    [
        ({}, "Pass either `prompt` or `image_embeds`"),
        ({"prompt": "a", "image_embeds": torch.ones(1, 8)}, "Pass either `prompt` or `image_embeds`"),
        ({"image_embeds": torch.ones(1, 7)}, "expected .batch, 8."),
        ({"image_embeds": torch.full((1, 8), float("nan"))}, "Image embedding 0 is not finite"),
        ({"image_embeds": torch.zeros(1, 8)}, "Image embedding 0 is zero"),
        ({"image_embeds": torch.ones(1, 8), "prior_guidance_scale": 2.0}, "`prior_guidance_scale` is for prompts"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
        ({"prompt": "a", "prior_num_candidates": 0}, "`prior_num_candidates` is 0"),
        ({"prompt": "a", "num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"prompt": "a very long caption"}, "is longer than the 12 positions that CLIP reads"),
        ({"prompt": "a", "generator": generators(1, 2)}, "is a list of 2, but 1"),
    ],
)
def test_what_does_not_fit_is_one_sentence(pipe, call, message):
    with pytest.raises(FieldError, match=message):
        pipe(**call)


def test_other_errors_are_one_sentence(pipe):
    with pytest.raises(ValueError, match="has no image encoder"):
        build_unclip(image_encoder=False).variation(picture("red"))
    with pytest.raises(FieldError, match="`weight` is 2"):
        pipe.interpolate("a", "b", 2)
    with pytest.raises(FieldError, match="`b` must be an image, a prompt or an embedding of 8 numbers"):
        pipe.interpolate("a", 3)
    with pytest.raises(ValueError, match="no prior drew the image"):
        pipe.redraw({"prompt": "a", "seed": 3})
    parameters = pipe.variation(picture("red"), generator=generators(1)).parameters[0]
    with pytest.raises(ValueError, match="an embedding of 7 numbers; here they have 8"):
        pipe.redraw(parameters | {"image_embeds": parameters["image_embeds"][:7]})


def test_parts_that_do_not_belong_together_are_refused():
    prior, decoder = build_prior_pipeline(), build_decoder()
    with pytest.raises(ValueError, match="`prior` must be an EmbeddingPriorPipeline"):
        PriorDecoderPipeline(decoder, decoder)
    with pytest.raises(ValueError, match="`decoder` must be a PixelDiffusionPipeline or"):
        PriorDecoderPipeline(prior, prior)
    with pytest.raises(ValueError, match="`decoder` takes prompts of 12 positions"):
        PriorDecoderPipeline(prior, build_text_pipeline())
    with pytest.raises(ValueError, match="`decoder` takes no prompts"):
        PriorDecoderPipeline(prior, build_diffusion_pipeline(text=False))
    wide = build_diffusion_pipeline()
    wide.register_modules(text_encoder=None, tokenizer=None)
    wide.register_to_config(condition_length=1)
    with pytest.raises(ValueError, match="8 wide, but the decoder takes 16"):
        PriorDecoderPipeline(prior, wide)
