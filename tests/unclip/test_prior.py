"""The diffusion prior: equal to Kandinsky's, each embedding from its own seed alone, errors of one sentence."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, KandinskyV22PriorPipeline, UnCLIPScheduler
from PIL import Image
from tiny import build_clip, generators
from tiny_unclip import build_clip_encoders, build_prior, build_quantizer, kandinsky_encoders
from tiny_unclip import build_prior_pipeline as build_new_pipeline
from transformers import ByT5Tokenizer

from llamagen_hf import EmbeddingPriorPipeline
from llamagen_hf.arguments import FieldError
from llamagen_hf.unclip.clip_encoders import encode_captions, load_clip_encoders, tokenize_captions
from llamagen_hf.unclip.embedding_denoising import prior_scheduler


KINDS = ("diffusion", "autoregressive")
# No test changes one.
build_prior_pipeline = functools.cache(build_new_pipeline)


@pytest.fixture
def pipe():
    return build_prior_pipeline()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_loop_is_kandinskys(guidance_scale):
    text_encoder, image_encoder = kandinsky_encoders()
    prior, tokenizer = build_prior(embedding_dim=16), ByT5Tokenizer(model_max_length=12)
    kandinsky = KandinskyV22PriorPipeline(
        prior, image_encoder, text_encoder, tokenizer, UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=10.0
        ), None,
    )  # fmt: skip
    ours = EmbeddingPriorPipeline(prior, text_encoder, tokenizer, prior_scheduler())
    found = {}

    def record(name):
        def callback(_, step, timestep, tensors):
            found.setdefault(name, []).append(tensors["latents"].clone())
            return tensors

        return callback

    call = {"prompt": ["a cat", "a red dog"], "num_inference_steps": 8, "guidance_scale": guidance_scale}
    for name, each in (("kandinsky", kandinsky), ("ours", ours)):
        each.set_progress_bar_config(disable=True)
        more = {"num_candidates": 1} if name == "ours" else {}
        embeds = each(**call, **more, generator=generators(1, 2), callback_on_step_end=record(name)).image_embeds
        found[f"{name} embeds"] = F.normalize(embeds, dim=-1)
    for mine, theirs in zip(found["ours"][:-1], found["kandinsky"][:-1], strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 1e-4  # rounding
    # At the last step Kandinsky's scheduler has a share of 0.999472 where it should be 1.
    for name in ("ours", "ours embeds"):
        mine, theirs = (torch.as_tensor(found[each][-1]) for each in (name, name.replace("ours", "kandinsky")))
        assert (mine - theirs).norm() / theirs.norm() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_depends_on_its_own_seed_alone(kind):
    pipe = build_prior_pipeline(kind)
    both = pipe(["a cat", "a dog"], num_images_per_prompt=2, generator=generators(1, 2, 3, 4), guidance_scale=2.0)
    alone = pipe("a dog", generator=generators(3), guidance_scale=2.0)
    torch.testing.assert_close(both.image_embeds[2:3], alone.image_embeds, rtol=0, atol=1e-5)
    assert both.image_embeds.shape == (4, 8) and both.parameters[2]["prompt"] == "a dog"
    assert torch.allclose(both.image_embeds.norm(dim=-1), torch.ones(4), atol=1e-5)
    assert (both.image_embeds[0] - both.image_embeds[1]).abs().max() > 1e-3
    assert isinstance(pipe("a cat", output_type="np").image_embeds, np.ndarray)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_and_prompts_change_what_is_drawn(kind):
    pipe = build_prior_pipeline(kind)

    def draw(prompt="a cat", **kwargs):
        if kind == "autoregressive":
            kwargs["temperature"] = 0.01  # random weights say little beside the noise
        return pipe(prompt, generator=generators(1, 2, 3)[:1], num_candidates=1, **kwargs).image_embeds

    plain = draw(guidance_scale=1.0)
    assert torch.equal(plain, draw(guidance_scale=1.0))
    assert not torch.equal(plain, draw("trees", guidance_scale=1.0))
    assert not torch.equal(plain, draw(guidance_scale=6.0))
    if kind == "diffusion":
        assert not torch.equal(draw(guidance_scale=6.0), draw(guidance_scale=6.0, negative_prompt="a dog"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_of_several_is_kept_and_drawn_again(kind):
    pipe = build_prior_pipeline(kind)
    output = pipe(["a cat", "a dog"], num_candidates=5, generator=generators(1, 2))
    text = F.normalize(pipe.encode_prompt(["a cat", "a dog"]).embeds, dim=-1)
    torch.testing.assert_close(torch.tensor(output.scores), (text * output.image_embeds).sum(-1))
    first = pipe(["a cat", "a dog"], num_candidates=1, generator=generators(1, 2))
    assert all(best >= one for best, one in zip(output.scores, first.scores, strict=True))
    assert output.scores != first.scores
    for row, parameters in enumerate(output.parameters):
        again = pipe.redraw(parameters)
        assert torch.equal(again.image_embeds, output.image_embeds[row : row + 1])
    with pytest.raises(ValueError, match="hold no seed"):
        pipe.redraw(output.parameters[0] | {"seed": None})


@pytest.mark.parametrize("kind", KINDS)
def test_saved_equals_loaded(kind, tmp_path):
    pipe = build_prior_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    loaded = EmbeddingPriorPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    draw = {"prompt": "a cat", "generator": None}
    for each in (pipe, loaded):
        draw[each] = each("a cat", generator=generators(1)).image_embeds
    assert torch.equal(draw[pipe], draw[loaded])
    assert loaded.sampling_settings() == pipe.sampling_settings()
    image = Image.new("RGB", (9, 7), "red")
    torch.testing.assert_close(loaded.encode_image(image), pipe.encode_image(image))


def test_another_scheduler_of_the_same_noise_schedule_fits():
    pipe = build_new_pipeline()
    before = pipe("a cat", generator=generators(1)).parameters[0]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    output = pipe("a cat", generator=generators(1))
    assert output.parameters[0]["scheduler"] == "DPMSolverMultistepScheduler"
    assert torch.equal(pipe.redraw(output.parameters[0]).image_embeds, output.image_embeds)
    with pytest.raises(ValueError, match="drawn with scheduler 'DDPMScheduler'"):
        pipe.redraw(before)
    pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="does not fit"):
        pipe("a cat")


def test_callbacks_change_what_follows(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape))
        pipe._guidance_scale = 0
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 4 else {}

    output = pipe("a cat", guidance_scale=3.0, callback_on_step_end=callback, generator=generators(1))
    assert seen == [(step, (2, 8)) for step in range(5)]
    mean = F.normalize(pipe.prior.clip_mean, dim=-1)
    torch.testing.assert_close(output.image_embeds, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_turns_guidance_off(kind):
    pipe = build_prior_pipeline(kind)

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0
        return {}

    def draw(callback=None):
        call = {"guidance_scale": 4.0, "num_candidates": 1, "generator": generators(1)}
        return pipe("a cat", **call, callback_on_step_end=callback).image_embeds

    assert not torch.equal(draw(callback), draw())


def test_callbacks_see_the_codes():
    pipe, seen = build_prior_pipeline("autoregressive"), []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["codes"].shape)
        return {"codes": torch.zeros_like(tensors["codes"])}

    embeds = pipe("a cat", callback_on_step_end=callback).image_embeds
    assert seen == [(2, step + 1) for step in range(4)]
    torch.testing.assert_close(embeds, pipe.quantizer.decode(torch.zeros(1, 4, dtype=torch.long)))


def test_the_halves_of_a_clip_are_what_it_computes(tmp_path):
    model, processor = build_clip()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoders = load_clip_encoders(tmp_path)
    ids, mask = tokenize_captions(encoders.tokenizer, ["a cat"], 12)
    text = encode_captions(encoders.text_encoder, ids, mask)
    torch.testing.assert_close(text.embeds, model.get_text_features(ids, attention_mask=mask).pooler_output)
    # States are projected to the width of embeddings; that of the last word is the embedding.
    torch.testing.assert_close(text.states[:, int(mask.sum()) - 1], text.embeds)
    states, mask = text.padded_left
    torch.testing.assert_close(states[:, -1], text.embeds)
    assert not states[mask == 0].any()
    pixels = torch.randn(2, 3, 8, 8)
    expected = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    torch.testing.assert_close(F.normalize(encoders.image_encoder(pixels).image_embeds, dim=-1), expected)


@pytest.mark.parametrize(
    "kind, call, message",
    [
        ("diffusion", {"prompt": "a very long caption"}, "is longer than the 12 positions that CLIP reads"),
        ("diffusion", {"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ("diffusion", {"num_candidates": 0}, "`num_candidates` is 0"),
        ("diffusion", {"temperature": 1.0}, "A diffusion prior takes no `temperature`"),
        ("diffusion", {"negative_prompt": ["a", "b"]}, "`negative_prompt` holds 2, but 1 or 1 are needed"),
        ("diffusion", {"output_type": "pil"}, "`output_type` is 'pil'"),
        ("diffusion", {"generator": generators(1, 2)}, "is a list of 2, but 1"),
        ("diffusion", {"callback_on_step_end_tensor_inputs": ["codes"]}, "this prior has only"),
        ("autoregressive", {"negative_prompt": "a"}, "takes no `negative_prompt`"),
        ("autoregressive", {"num_inference_steps": 3}, "An autoregressive prior takes no `num_inference_steps`"),
        ("autoregressive", {"top_p": 2.0}, "`top_p` is 2.0"),
    ],
)
def test_what_does_not_fit_is_one_sentence(kind, call, message):
    with pytest.raises(FieldError, match=message):
        build_prior_pipeline(kind)(**{"prompt": "a cat"} | call)


def test_long_captions_are_cut_on_request(pipe):
    output = pipe("a very long caption", truncate_prompt=True, generator=generators(1))
    assert output.parameters[0]["truncate_prompt"]
    assert torch.equal(pipe.redraw(output.parameters[0]).image_embeds, output.image_embeds)


def test_parts_that_do_not_belong_together_are_refused():
    encoders = build_clip_encoders().components
    text_encoder, image_encoder = kandinsky_encoders()
    with pytest.raises(ValueError, match="8 wide, but those of the text encoder 16"):
        EmbeddingPriorPipeline(build_prior(), **encoders | {"text_encoder": text_encoder}, scheduler=prior_scheduler())
    with pytest.raises(ValueError, match="8 wide, but those of the image encoder 16"):
        EmbeddingPriorPipeline(
            build_prior(), **encoders | {"image_encoder": image_encoder}, scheduler=prior_scheduler()
        )
    with pytest.raises(ValueError, match="it needs a scheduler, and takes no quantizer"):
        EmbeddingPriorPipeline(build_prior(), **encoders, quantizer=build_quantizer())
    transformer = build_prior_pipeline("autoregressive").prior
    with pytest.raises(ValueError, match="writes 4 codes below 16, but the quantizer has 5 below 8"):
        EmbeddingPriorPipeline(transformer, **encoders, quantizer=build_quantizer(5, 8))
    with pytest.raises(ValueError, match="`sampling_defaults` has .'steps'."):
        EmbeddingPriorPipeline(build_prior(), **encoders, scheduler=prior_scheduler(), sampling_defaults={"steps": 3})


def test_images_without_an_image_encoder_or_a_finite_embedding_are_refused():
    with pytest.raises(ValueError, match="has no image encoder"):
        build_prior_pipeline(image_encoder=False).encode_image(Image.new("RGB", (8, 8)))
    pipe = build_new_pipeline()
    torch.nn.init.constant_(pipe.image_encoder.visual_projection.weight, float("nan"))
    with pytest.raises(ValueError, match="Image embedding 0 is not finite"):
        pipe.encode_image(Image.new("RGB", (8, 8)))


def test_a_prior_without_statistics_is_refused():
    """New ones in diffusers draw nothing but zeros."""
    encoders = replace(build_clip_encoders()).components
    prior = build_prior()
    torch.nn.init.zeros_(prior.clip_mean)
    torch.nn.init.zeros_(prior.clip_std)
    pipe = EmbeddingPriorPipeline(prior, **encoders, scheduler=prior_scheduler())
    with pytest.raises(ValueError, match="Image embedding 0 is zero"):
        pipe("a cat")
