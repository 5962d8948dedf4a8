"""The pipeline: prompts and small images in, images out, each from its own seed alone."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from PIL import Image
from tiny import generators
from tiny_diffusion import build_diffusion_pipeline, build_unet

from llamagen_hf import PixelDiffusionPipeline
from llamagen_hf.arguments import FieldError
from llamagen_hf.diffusion.schedules import sampling_scheduler, with_thresholding
from llamagen_hf.families import find_family, load_pipeline
from llamagen_hf.provenance import read_parameters


@pytest.fixture
def base():
    return build_diffusion_pipeline()


@pytest.fixture
def upsampler():
    return build_diffusion_pipeline(upsamples=True)


@pytest.fixture
def plain_upsampler():
    return build_diffusion_pipeline(text=False, upsamples=True, patch_size=2)


def pixels_of(pipe, *seeds, **arguments):
    arguments = {"generator": generators(*seeds or (0,)), "output_type": "pt"} | arguments
    return pipe(**arguments).images


def small_images(count: int = 1, size: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def as_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_two_lines(base, upsampler):
    image = base("a red apple").images[0]
    assert isinstance(image, Image.Image) and image.size == (16, 16)
    assert upsampler("a red apple", image.resize((8, 8))).images[0].size == (16, 16)


@pytest.mark.parametrize(
    "output_type, kind, shape", [("np", np.ndarray, (2, 16, 16, 3)), ("pt", torch.Tensor, (2, 3, 16, 16))]
)
def test_output_types(base, output_type, kind, shape):
    images = base(["a", "b"], output_type=output_type).images
    assert isinstance(images, kind) and images.shape == shape
    assert 0 <= images.min() and images.max() <= 1
    (plain,) = base(["a", "b"], output_type=output_type, return_dict=False)
    assert len(plain) == 2


def test_draw_pixels_are_the_images_before_clamping(base):
    base.scheduler = with_thresholding(base.scheduler, "none")
    pixels = base.draw_pixels(prompt="a", generator=generators(0))
    assert pixels.dtype == torch.float32 and pixels.abs().max() > 1
    assert torch.equal((pixels / 2 + 0.5).clamp(0, 1), pixels_of(base, prompt="a"))


def test_prompts_and_settings_change_the_image(base):
    one = pixels_of(base, prompt="a red apple")
    assert torch.equal(one, pixels_of(base, prompt="a red apple"))
    for other in ({"prompt": "x"}, {"guidance_scale": 1.0}, {"negative_prompt": "y"}, {"num_inference_steps": 3}):
        assert not torch.allclose(one, pixels_of(base, **{"prompt": "a red apple"} | other), atol=1e-4), other
    assert torch.equal(one, pixels_of(base, prompt="a red apple", guidance_scale=4.0, negative_prompt=""))


@pytest.mark.parametrize("kind", ["base", "upsampler"])
def test_an_image_depends_on_its_own_seed_alone(kind, request):
    pipe, images = request.getfixturevalue(kind), small_images(2)
    given = {"image": images, "aug_level": 0.5} if kind == "upsampler" else {}
    batch = pixels_of(pipe, 3, 4, prompt=["a", "b"], **given)
    given = {"image": images[1:], "aug_level": 0.5} if given else {}
    assert torch.allclose(batch[1], pixels_of(pipe, 4, prompt="b", **given)[0], atol=1e-5)
    # One generator for all: the first image is the one that it draws alone.
    given = {"image": images, "aug_level": 0.5} if given else {}
    shared = pipe(["a", "b"], generator=generators(3)[0], output_type="pt", **given).images
    assert torch.allclose(shared[0], batch[0], atol=1e-5)
    assert not torch.allclose(shared[1], batch[1], atol=1e-2)


def test_images_per_prompt_and_one_prompt_for_several_images(base, upsampler):
    images = pixels_of(base, 0, 1, 2, 3, prompt=["a", "b"], num_images_per_prompt=2)
    assert torch.allclose(images[3], pixels_of(base, 3, prompt="b")[0], atol=1e-5)
    small = small_images(3)
    three = pixels_of(upsampler, 0, 1, 2, prompt="a", image=small)
    assert torch.allclose(three[2], pixels_of(upsampler, 2, prompt="a", image=small[2:])[0], atol=1e-5)
    assert torch.allclose(three, pixels_of(upsampler, 0, 1, 2, prompt="a", image=small, num_images_per_prompt=3))
    mixed = [as_pil(small[0]), as_pil(small[1]).resize((5, 5))]
    assert len(upsampler(image=mixed, num_images_per_prompt=2).images) == 4


def test_guidance_1_halves_the_work(base):
    sizes = []
    base.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    base("a", guidance_scale=1.0)
    base("a", guidance_scale=2.0)
    assert sizes == [1] * 4 + [2] * 4


def test_prompt_equals_its_embeddings_and_padding_changes_nothing(base):
    embeds, mask = base.encode_prompt(["a red apple", "hi"])
    assert embeds.shape == (2, 12, 16) and mask.sum(1).tolist() == [12, 3]
    expected = pixels_of(base, 0, 1, prompt=["a red apple", "hi"])
    states = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    assert torch.equal(pixels_of(base, 0, 1, **states), expected)
    for anything in (torch.nan, 99.0):
        embeds[mask == 0] = anything
        assert torch.equal(pixels_of(base, 0, 1, **states), expected)
    assert not torch.allclose(pixels_of(base, 0, 1, prompt_embeds=embeds), expected, atol=1e-3)


def test_guidance_leads_away_from_zeros_without_a_text_encoder(base):
    embeds, mask = base.encode_prompt("hi")
    null = base.encode_prompt("")[0]
    states = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    by_text = pixels_of(base, **states)
    base.text_encoder = base.tokenizer = None
    assert torch.equal(pixels_of(base, **states, negative_prompt_embeds=null), by_text)
    by_zeros = pixels_of(base, **states)
    assert not torch.allclose(by_zeros, by_text, atol=1e-3)
    assert torch.equal(pixels_of(base, **states, negative_prompt_embeds=torch.zeros(1, 12, 16)), by_zeros)


def test_an_embedding_is_a_prompt_of_one_position():
    pipe = build_diffusion_pipeline()
    pipe.register_to_config(condition_length=1)
    pipe.text_encoder = pipe.tokenizer = None
    embeds = torch.randn(2, 1, 16)
    images = pixels_of(pipe, 0, 0, prompt_embeds=embeds)
    assert not torch.allclose(images[0], images[1], atol=1e-3)


def test_level_and_small_image_change_the_result(plain_upsampler):
    image = small_images()
    keeps, forgets = (pixels_of(plain_upsampler, image=image, aug_level=level) for level in (0.0, 0.9))
    assert not torch.allclose(keeps, forgets, atol=1e-3)
    assert torch.equal(keeps, pixels_of(plain_upsampler, image=image))  # the default
    assert not torch.allclose(keeps, pixels_of(plain_upsampler, image=1 - image), atol=1e-3)
    assert torch.allclose(keeps, pixels_of(plain_upsampler, image=as_pil(image[0])), atol=5e-2)


def test_a_list_of_levels_keeps_the_best_by_its_scorer_with_the_same_noise(upsampler):
    levels, seen = [0.0, 0.3, 0.9], []

    def scorer(images, prompts):
        seen.append(prompts)
        return [float(np.asarray(image).mean()) for image in images]

    call = {"prompt": ["a", "b"], "image": small_images(2), "generator": generators(0, 1)}
    output = upsampler(**call, aug_level=levels, scorer=scorer)
    assert seen == [["a"] * 3 + ["b"] * 3]
    for index, (image, parameters, ranked) in enumerate(
        zip(output.images, output.parameters, output.candidates, strict=True)
    ):
        assert {each.parameters["aug_level"] for each in ranked} == set(levels)
        assert ranked[0].score == max(each.score for each in ranked)
        assert parameters == ranked[0].parameters and image == ranked[0].image
        for candidate in ranked:  # each is the image of its level alone, from the same seed
            alone = upsampler(
                "ab"[index],
                small_images(2)[index : index + 1],
                candidate.parameters["aug_level"],
                generator=generators(index),
            ).images[0]
            difference = np.asarray(alone).astype(int) - np.asarray(candidate.image)
            assert np.abs(difference).max() <= 1
    assert upsampler.redraw(output.parameters[1], small_images(2)[1:]).images[0] == output.images[1]


def test_candidates_are_ranked_and_the_first_is_the_one_without(base):
    output = base("a", generator=generators(7), num_candidates=3, scorer=lambda images, prompts: [1.0, 3.0, 2.0])
    assert [each.score for each in output.candidates[0]] == [3.0, 2.0, 1.0]
    assert [each.parameters.get("seed_index", 0) for each in output.candidates[0]] == [1, 2, 0]
    alone = np.asarray(base("a", generator=generators(7)).images[0]).astype(int)
    assert np.abs(alone - np.asarray(output.candidates[0][2].image)).max() <= 1
    assert base.redraw(output.parameters[0]).images[0] == output.images[0]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("upsamples", [False, True])
def test_saved_and_loaded_it_draws_the_same(tmp_path, upsamples, text):
    pipe = build_diffusion_pipeline(text, upsamples=upsamples)
    given = ({"prompt": "a"} if text else {}) | ({"image": small_images()} if upsamples else {})
    expected = pixels_of(pipe, **given)
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert isinstance(loaded, PixelDiffusionPipeline)
    assert torch.equal(pixels_of(loaded, **given), expected)
    assert loaded.sampling_settings()["num_inference_steps"] == 4
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path), PixelDiffusionPipeline)


def test_what_the_shared_rooms_ask(base, plain_upsampler):
    assert (base.condition_kind, base.num_classes, base.image_size) == ("text", None, 16)
    assert plain_upsampler.condition_kind == "image"
    assert build_diffusion_pipeline(text=False).condition_kind == "none"
    assert base.sampling_settings() == {"num_inference_steps": 4, "guidance_scale": 4.0}
    assert plain_upsampler.sampling_settings(aug_level=0.2) == {"num_inference_steps": 4, "aug_level": 0.2}
    family = find_family("PixelDiffusionPipeline")
    assert "16 x 16 pixels" in family.summary.format(pipe=base) and "2205.11487" in family.citation
    assert base.facts["scheduler"] == "DPMSolverMultistepScheduler" and base.facts["dtype"] == "float32"


def test_without_text_or_image_noise_is_enough():
    pipe = build_diffusion_pipeline(text=False)
    assert len(pipe(num_images_per_prompt=3).images) == 3


@pytest.mark.parametrize("kind", ["base", "upsampler"])
def test_redrawn_from_a_png_it_is_the_same_to_the_last_bit(kind, request, tmp_path):
    pipe, small = request.getfixturevalue(kind), [as_pil(each) for each in small_images(2)]
    given = {"image": small, "aug_level": 0.25} if kind == "upsampler" else {}
    output = pipe(["a", "b"], negative_prompt="c", guidance_scale=2.5, **given)
    paths = output.save(tmp_path / "image.png")
    parameters = read_parameters(paths[1])
    assert parameters["prompt"] == "b" and parameters["batch_size"] == 2
    redrawn = pipe.redraw(parameters, small[1] if given else None)
    assert redrawn.images == output.images[1:] and redrawn.parameters == [parameters]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scheduler": "DDIMScheduler"}, "drawn with scheduler 'DDIMScheduler', but the pipeline has"),
        ({"seed": None}, "hold no seed"),
        ({"guide": "towards"}, "drawn with a guide"),
        ({"prompt_embeds": True}, "drawn from text states"),
        ({"prompt": None}, "hold no prompt"),
        ({"interrupted_after": 2}, "was interrupted"),
        ({"batch_index": 7}, "damaged: batch_index is 7"),
    ],
)
def test_parameters_that_do_not_suffice_are_refused(base, change, message):
    parameters = base("a").parameters[0] | change
    with pytest.raises(ValueError, match=message):
        base.redraw({name: value for name, value in parameters.items() if name == "seed" or value is not None})


def test_a_callback_changes_the_sample_and_the_guidance(base):
    calls, sizes = [], []
    base.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))

    def callback(pipe, step, timestep, tensors):
        calls.append((step, int(timestep), sorted(tensors), pipe.guidance_scale, pipe.num_timesteps))
        if step == 1:
            pipe._guidance_scale = 0.0
            return {"sample": torch.zeros_like(tensors["sample"])}

    plain = pixels_of(base, prompt="a")
    names = ["sample", "prompt_embeds"]
    changed = pixels_of(base, prompt="a", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert not torch.allclose(plain, changed, atol=1e-3)
    assert [call[0] for call in calls] == [0, 1, 2, 3] and calls[0][1] == 999
    assert calls[0][2] == sorted(names) and [call[3] for call in calls] == [4.0, 4.0, 1.0, 1.0]
    assert sizes[4:] == [2, 2, 1, 1]


def test_a_callback_stops_the_call(base):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1

    output = base("a", generator=generators(0), callback_on_step_end=stop, output_type="pt")
    assert output.parameters[0]["interrupted_after"] == 2
    *_, preview, _, _ = base.stream("a", generator=generators(0), output_type="pt")
    assert preview.step == 2 and torch.equal(output.images, preview.images)


def test_stream_ends_with_what_the_call_returns(base):
    steps = list(base.stream("a", generator=generators(0), preview_every=2))
    assert [(step.step, step.num_steps) for step in steps] == [(2, 4), (4, 4)]
    assert steps[0].output is None and steps[0].images[0].size == (16, 16)
    called = base("a", generator=generators(0))
    assert steps[-1].images == called.images and steps[-1].output.parameters == called.parameters


def test_a_guide_changes_the_image_and_is_named(base):
    def to_red(noisy, timestep, images, alpha):
        return torch.tensor([5.0, -5.0, -5.0])[:, None, None].expand_as(noisy)

    output = base("a", generator=generators(0), guide=to_red, output_type="pt")
    red, green, _ = (output.images - pixels_of(base, prompt="a"))[0].mean((1, 2))
    assert red > 0 > green and output.parameters[0]["guide"] == "to_red"


def test_it_runs_in_bfloat16_and_under_autocast(base):
    expected = pixels_of(base, prompt="a", guidance_scale=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pixels_of(base, prompt="a", guidance_scale=1.0), expected)
    base.to(torch.bfloat16)
    half = pixels_of(base, prompt="a", guidance_scale=1.0)
    assert half.dtype == torch.float32 and torch.allclose(half, expected, atol=0.2)


def test_an_exchanged_scheduler_must_fit(base):
    base.scheduler = DDPMScheduler.from_config(base.scheduler.config)
    first = pixels_of(base, 0, 1, prompt=["a", "b"])
    assert torch.allclose(first[1], pixels_of(base, 1, prompt="b")[0], atol=1e-5)
    base.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="expects 'epsilon', but the U-Net predicts 'v_prediction'"):
        base("a")


def test_adapters_are_loaded_named_and_taken_out(base, tmp_path):
    peft = pytest.importorskip("peft")
    layers = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base.unet), config).save_pretrained(tmp_path)
    plain = pixels_of(base, prompt="a")
    base.load_lora_weights(tmp_path)
    output = base("a", generator=generators(0), output_type="pt")
    assert not torch.allclose(output.images, plain, atol=1e-2)
    assert output.parameters[0]["lora"] == [{"path": str(tmp_path)}]
    assert torch.equal(base.redraw(output.parameters[0], output_type="pt").images, output.images)
    base.unload_lora_weights()
    assert torch.equal(pixels_of(base, prompt="a"), plain)
    with pytest.raises(ValueError, match="drawn with lora"):
        base.redraw(output.parameters[0])


def test_offloaded_it_draws_the_same(base):
    expected = pixels_of(base, prompt="a")
    base.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pixels_of(base, prompt="a"), expected)


WRONG = [
    ("base", {"image": small_images()}, "This checkpoint enlarges no images: leave out `image`."),
    ("base", {"aug_level": 0.1}, "This checkpoint enlarges no images: leave out `aug_level`."),
    ("base", {"prompt": None}, "Pass `prompt` or `prompt_embeds`; found none of them."),
    ("base", {"prompt": 3}, "`prompt` must be a string or a list of strings, not int."),
    ("base", {"prompt": []}, "`prompt` is an empty list"),
    ("base", {"prompt_embeds": torch.zeros(1, 12, 16)}, "Pass `prompt` or `prompt_embeds`, not both."),
    ("base", {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 16)}, r"expected \(batch, 12, 16\)"),
    ("base", {"prompt_attention_mask": torch.ones(1, 12)}, "goes with `prompt_embeds`, which is missing"),
    ("base", {"negative_prompt": ["a", "b"]}, "`negative_prompt` holds 2, but 1 are needed."),
    ("base", {"num_inference_steps": 0}, "`num_inference_steps` is 0; expected an integer from 1 to 1000."),
    ("base", {"guidance_scale": -1}, "`guidance_scale` is -1; expected a number of at least 0"),
    ("base", {"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
    ("base", {"generator": generators(0, 1)}, "`generator` is a list of 2, but 1 images are to be drawn."),
    ("base", {"num_candidates": 2}, "`num_candidates` needs a `scorer`"),
    ("base", {"output_type": "codes"}, "expected 'pil', 'np' or 'pt'"),
    ("base", {"guide": 1}, "`guide` must be a function, not int."),
    ("base", {"callback_on_step_end_tensor_inputs": ["codes"]}, r"names \['codes'\]; there is only"),
    ("upsampler", {}, "pass them as `image`; expected square images of at most 16x16 pixels."),
    ("upsampler", {"image": small_images(1, 17)}, "`image` has 17x17 pixels; expected square images of at most 16x16"),
    ("upsampler", {"image": Image.new("RGB", (8, 6))}, "`image` has 8x6 pixels; expected square"),
    ("upsampler", {"image": 2 * small_images()}, r"`image` as a tensor must be in \[0, 1\]."),
    ("upsampler", {"image": small_images()[0]}, r"expected \(batch, 3, height, width\)"),
    ("upsampler", {"image": "a.png"}, "`image` must be a PIL image, a list of them or a tensor."),
    ("upsampler", {"prompt": ["a", "b"], "image": small_images(3)}, "`image` holds 3 images, but 1 or 2 are needed."),
    ("upsampler", {"image": small_images(), "aug_level": 1.1}, r"`aug_level` is 1.1; expected a number in \[0, 1\]."),
    ("upsampler", {"image": small_images(), "aug_level": [0.1, -1], "scorer": len}, "`aug_level` is -1"),
    ("upsampler", {"image": small_images(), "aug_level": []}, "`aug_level` is an empty list"),
    ("upsampler", {"image": small_images(), "aug_level": [0.1]}, "A list of `aug_level` needs a `scorer`"),
    ("plain_upsampler", {"image": small_images()}, "reads no text: leave out `prompt`."),
    ("plain_upsampler", {"prompt": None, "image": small_images(), "guidance_scale": 2.0}, "reads no text that could"),
]


@pytest.mark.parametrize("kind, wrong, message", WRONG)
def test_arguments_that_do_not_fit_are_refused_before_any_work(kind, wrong, message, request):
    pipe = request.getfixturevalue(kind)
    pipe.unet.register_forward_pre_hook(lambda module, args: pytest.fail("it worked already"))
    with pytest.raises(FieldError, match=message):
        pipe(**{"prompt": "a"} | wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"sampling_defaults": {"aug_level": 0.1}}, r"`sampling_defaults` has \['aug_level'\]"),
        ({"sampling_defaults": {"guidance_scale": -1.0}}, "`guidance_scale` is -1.0"),
        ({"convention": "other"}, "expected 'own' or 'deepfloyd'"),
        ({"unet": build_unet()}, "states are 16 wide, but the U-Net reads no text"),
        ({"unet": build_unet(condition_dim=20)}, "states are 16 wide, but the U-Net takes 20"),
        ({"scheduler": DDPMScheduler(variance_type="learned")}, "this U-Net predicts no variance"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(base, wrong, message):
    parts = {"unet": base.unet, "scheduler": sampling_scheduler(), "text_encoder": base.text_encoder}
    with pytest.raises(ValueError, match=message):
        PixelDiffusionPipeline(**parts | wrong)
