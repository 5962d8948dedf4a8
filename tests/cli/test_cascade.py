"""The commands that enlarge images: `generate` with an upsampler or a cascade's checkpoint, `upscale`, `info`."""

import pytest
from PIL import Image
from tiny import build_class_pipeline, build_clip, build_text_pipeline, generators
from tiny_cascade import build_cascade, build_nested_cascade, quiet
from tiny_diffusion import build_diffusion_pipeline
from typer.testing import CliRunner

import llamagen_cli
from llamagen_hf import CascadePipeline
from llamagen_hf.diffusion.noisy_classifier import NoisyClassifier
from llamagen_hf.loading import checkpoint as checkpoint_module
from llamagen_hf.provenance import read_parameters


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders by name."""
    root = tmp_path_factory.mktemp("checkpoints")
    pipes = {
        "text": build_text_pipeline(),
        "class": build_class_pipeline(),
        "diffusion": build_diffusion_pipeline(),
        "unconditional": build_diffusion_pipeline(text=False),
        "upsampler": build_diffusion_pipeline(upsamples=True),
        "plain-upsampler": build_diffusion_pipeline(text=False, upsamples=True, patch_size=2, image_size=32),
        "cascade": build_cascade(),
        "nested": build_nested_cascade(),
        "ddpm": build_cascade("ddpm", text=False),
    }
    for name, pipe in pipes.items():
        pipe.save_pretrained(root / name)
    clip = build_clip()
    for part in clip:
        part.save_pretrained(root / "clip")
    return {name: str(root / name) for name in [*pipes, "clip"]}


def invoke(*arguments):
    return CliRunner().invoke(llamagen_cli.app, [str(argument) for argument in arguments])


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def read(path):
    with Image.open(path) as image:
        return image.size, image.tobytes()


def generate(output, *arguments):
    result = invoke("generate", *arguments, "--output", output)
    assert result.exit_code == 0, result.output
    return read(output)


def test_generate_with_a_guide(checkpoints, tmp_path):
    sizes = {"block_out_channels": [8, 16], "layers_per_block": [1, 1], "attention_levels": [1]}
    NoisyClassifier(["circle", "square"], 16, **sizes, attention_head_dim=8).save_pretrained(tmp_path / "guide")
    arguments = ("a", "--checkpoint", checkpoints["diffusion"])
    guide = ("--guide", tmp_path / "guide", "--guide-label", "square")
    plain = generate(tmp_path / "plain.png", *arguments)
    assert generate(tmp_path / "none.png", *arguments, *guide, "--guide-scale", 0) == plain
    assert generate(tmp_path / "some.png", *arguments, *guide, "--guide-scale", 3000) != plain
    for wrong, message in [
        ((*arguments, *guide[:2]), "`--guide` and `--guide-label` go together"),
        ((*arguments, "--guide-scale", 2), "`--guide-scale` goes with them"),
        ((*arguments, *guide[:3], "cat"), "There is no class 'cat'"),
        (("a", "--checkpoint", checkpoints["text"], *guide), "This checkpoint takes no `--guide`"),
    ]:
        result = invoke("generate", *wrong, "--output", tmp_path / "wrong.png")
        assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / "wrong.png").exists()


def test_generate_with_an_upsampler(checkpoints, tmp_path):
    size, pixels = generate(
        tmp_path / "apple.png", "a red apple", "--checkpoint", checkpoints["text"], "--upsampler",
        checkpoints["upsampler"], "--aug-level", 0.2, "--upsampler-steps", 3, "--upsampler-guidance-scale", 2,
        "--seed", 5, "--top-k", 9,
    )  # fmt: skip
    settings = {"aug_level": 0.2, "upsampler_num_inference_steps": 3, "upsampler_guidance_scale": 2.0, "top_k": 9}
    expected = build_cascade()("a red apple", **settings, generator=generators(5)).images[0]
    assert size == (16, 16) and pixels == expected.tobytes()
    parameters = read_parameters(tmp_path / "apple.png")
    assert parameters["checkpoint"] == checkpoints["text"] and parameters["top_k"] == 9
    assert parameters["upsampler"]["checkpoint"] == checkpoints["upsampler"]
    assert parameters["upsampler"]["aug_level"] == 0.2 and parameters["upsampler"]["num_inference_steps"] == 3
    assert generate(tmp_path / "again.png", "--from", tmp_path / "apple.png") == (size, pixels)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "apple.png").read_bytes()


def test_the_shipped_upsampler_comes_with_the_shipped_checkpoint(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "SHIPPED", tmp_path)
    for name, folder in (("emoji", "text"), ("emoji_upsampler", "plain-upsampler")):
        (tmp_path / name).symlink_to(checkpoints[folder])
    large = generate(tmp_path / "large.png", "a red apple", "--aug-level", 0.3)
    assert large[0] == (32, 32)
    parameters = read_parameters(tmp_path / "large.png")
    assert (parameters["checkpoint"], parameters["upsampler"]["checkpoint"]) == ("emoji", "emoji_upsampler")
    small = generate(tmp_path / "small.png", "a red apple", "--upsampler", "none")
    assert small[0] == (8, 8) and "upsampler" not in read_parameters(tmp_path / "small.png")
    assert generate(tmp_path / "again.png", "--from", tmp_path / "large.png") == large
    assert generate(tmp_path / "again.png", "--from", tmp_path / "small.png") == small


@pytest.mark.parametrize(
    "name, side, arguments",
    [
        ("cascade", 16, ["a red apple", "--temperature", "0.5"]),
        slow("nested", 32, ["a red apple", "--aug-level", "0.1"]),
        ("diffusion", 16, ["a red apple", "--steps", "2", "--guidance-scale", "2"]),
        slow("unconditional", 16, ["--steps", "2"]),
        ("ddpm", 16, ["--steps", "2"]),
    ],
)
def test_checkpoints_of_other_families_generate_and_generate_again(checkpoints, tmp_path, name, side, arguments):
    first = generate(tmp_path / "a.png", *arguments, "--checkpoint", checkpoints[name], "--seed", 3, "--device", "cpu")
    assert first[0] == (side, side)
    assert read_parameters(tmp_path / "a.png")["checkpoint"] == checkpoints[name]
    assert generate(tmp_path / "b.png", "--from", tmp_path / "a.png") == first


@pytest.mark.slow
def test_an_upsampler_on_top_of_a_cascade(checkpoints, tmp_path):
    first = generate(tmp_path / "a.png", "a", "--checkpoint", checkpoints["cascade"],
                     "--upsampler", checkpoints["plain-upsampler"])  # fmt: skip
    assert first[0] == (32, 32)
    assert generate(tmp_path / "b.png", "--from", tmp_path / "a.png") == first


@pytest.mark.slow
def test_several_images_and_their_grid(checkpoints, tmp_path):
    result = invoke("generate", "--class-label", "goldfish", "--checkpoint", checkpoints["class"], "--upsampler",
                    checkpoints["upsampler"], "--count", 2, "--output", tmp_path / "fish.png",
                    "--grid", tmp_path / "grid.png")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "grid.png")[0] == (32, 16)
    alone = generate(tmp_path / "one.png", "--class-label", 1, "--checkpoint", checkpoints["class"], "--upsampler",
                     checkpoints["upsampler"], "--seed", 1)  # fmt: skip
    assert read(tmp_path / "fish-1.png") == alone


def test_the_best_of_several_levels_and_candidates(checkpoints, tmp_path):
    arguments = ["--checkpoint", checkpoints["cascade"], "--scorer", checkpoints["clip"], "--aug-level", 0.0]
    first = generate(tmp_path / "a.png", "a red apple", *arguments, "--aug-level", 0.9, "--num-candidates", 2)
    assert read_parameters(tmp_path / "a.png")["upsampler"]["aug_level"] in (0.0, 0.9)
    assert generate(tmp_path / "b.png", "--from", tmp_path / "a.png") == first


@pytest.mark.slow
def test_from_an_image_whose_parts_have_no_names(checkpoints, tmp_path):
    image = build_cascade()("a", generator=generators(1)).save(tmp_path / "a.png")[0]
    result = invoke("generate", "--from", image, "--checkpoint", checkpoints["text"])
    assert result.exit_code == 1 and "does not name its upsampler; pass --upsampler." in result.stderr
    result = invoke("generate", "--from", image, "--checkpoint", checkpoints["nested"])
    assert result.exit_code == 1 and "was not drawn by this cascade: it has 3 parts." in result.stderr
    for given in (["cascade"], ["text", "--upsampler", checkpoints["upsampler"]]):
        again = generate(tmp_path / "b.png", "--from", image, "--checkpoint", checkpoints[given[0]], *given[1:])
        assert again == read(image)


@pytest.mark.parametrize("prompt", [None, "a red apple"])
def test_upscale(checkpoints, tmp_path, prompt, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = build_text_pipeline()("a red apple", generator=generators(2)).images[0]
    small.save(tmp_path / "apple.png")
    said = [] if prompt is None else ["--prompt", prompt]
    result = invoke("upscale", "apple.png", "--upsampler", checkpoints["upsampler"], "--aug-level", 0.1, "--seed", 7,
                    "--steps", 3, *said)  # fmt: skip
    assert result.exit_code == 0 and "Saved apple-large.png" in result.output, result.output
    upsampler = quiet(build_diffusion_pipeline(upsamples=True))
    settings = {"aug_level": 0.1, "num_inference_steps": 3, "generator": generators(7)}
    assert read("apple-large.png") == ((16, 16), upsampler(prompt, small, **settings).images[0].tobytes())
    assert read_parameters("apple-large.png")["checkpoint"] == checkpoints["upsampler"]


def test_upscaling_a_generated_image_is_what_the_cascade_does(checkpoints, tmp_path):
    cascade = CascadePipeline(build_text_pipeline(), build_diffusion_pipeline(upsamples=True))
    output = quiet(cascade)("a red apple", aug_level=0.1, generator=generators(2))
    output.base.save(tmp_path / "small.png")
    result = invoke("upscale", tmp_path / "small.png", "--upsampler", checkpoints["upsampler"], "--prompt",
                    "a red apple", "--aug-level", 0.1, "--seed", output.parameters[0]["upsampler"]["seed"],
                    "--output", tmp_path / "large.png")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "large.png")[1] == output.images[0].tobytes()


@pytest.mark.slow
def test_upscale_chooses_among_levels(checkpoints, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    result = invoke("upscale", tmp_path / "a.png", "--upsampler", checkpoints["upsampler"], "--prompt", "red",
                    "--aug-level", 0.2, "--aug-level", 0.7, "--scorer", checkpoints["clip"],
                    "--output", tmp_path / "b.png")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert read_parameters(tmp_path / "b.png")["aug_level"] in (0.2, 0.7)


@pytest.mark.parametrize(
    "command, message",
    [
        ("generate a --checkpoint text --upsampler text", "`upsampler` must be a PixelDiffusionPipeline"),
        ("generate a --checkpoint text --steps 5", "This checkpoint takes no `--steps`."),
        ("generate a --checkpoint text --aug-level 0.5", "`--aug-level` is for upsamplers: pass `--upsampler`"),
        ("upscale a.png --upsampler text", "enlarges no images; expected the checkpoint of an upsampler."),
        ("upscale wide.png --upsampler upsampler", "`image` has 8x6 pixels; expected square images"),
        ("upscale a.png --upsampler upsampler --output b.jpg", "must end in .png"),
        slow("upscale a.png --upsampler upsampler --output no/b.png", "can't be written"),
        slow("upscale a.png --upsampler upsampler --aug-level -1", "`aug_level` is -1.0; expected a number in [0, 1]"),
        slow("upscale a.png --upsampler plain-upsampler --prompt a", "reads no text"),
        slow("upscale a.png --upsampler cascade", "enlarges no images"),
        slow("upscale no.png --upsampler upsampler", "The image 'no.png' does not exist."),
        slow("generate a --checkpoint diffusion --upsampler upsampler", "The base draws images of 16x16 pixels"),
        slow("generate a --checkpoint cascade --aug-level 1.5", "`aug_level` is 1.5; expected a number in [0, 1]"),
        slow("generate a --checkpoint text --upsampler-steps 5", "`--upsampler-steps` is for upsamplers"),
        slow("generate a --checkpoint text --upsampler-guidance-scale 5", "`--upsampler-guidance-scale` is for"),
        slow("generate a --checkpoint ddpm --upsampler-guidance-scale 5", "This checkpoint takes no prompt."),
        slow("generate --from a.png --upsampler none", "leave `--upsampler none` out"),
        slow("generate a --checkpoint diffusion --top-k 5", "This checkpoint takes no `--top-k`."),
        slow("generate a --checkpoint diffusion --image a.png", "This checkpoint takes no `--image`."),
        slow("generate a --checkpoint ddpm", "This checkpoint takes no prompt."),
        slow("generate --class-label 1 --checkpoint diffusion", "This checkpoint takes no `--class-label`."),
        slow("generate a --checkpoint diffusion --compile", "`--compile` is for models that generate codes."),
        slow("generate --checkpoint cascade", "Pass either a prompt or `--class-label`."),
    ],
)
def test_errors_are_one_sentence(checkpoints, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    Image.new("RGB", (8, 6)).save("wide.png")
    result = invoke(*[checkpoints.get(argument, argument) for argument in command.split()])
    assert result.exit_code == 1 and message in result.stderr, result.output
    assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "wide.png"]


def test_info_says_what_they_are(checkpoints):
    said = invoke("info", "--checkpoint", checkpoints["diffusion"]).stdout
    assert "16x16 pixels, from noise" in said and "text, 12 positions of width 16" in said
    assert "U-Net of 8, 16 channels, patches of 1x1 pixels" in said and "DPMSolverMultistepScheduler" in said
    assert "unet 0.1M" in said and "num_inference_steps 4" in said
    said = invoke("info", "--checkpoint", checkpoints["plain-upsampler"]).stdout
    assert "32x32 pixels, enlarged from smaller images" in said and "patches of 2x2" in said
    said = invoke("info", "--checkpoint", checkpoints["nested"]).stdout
    assert "base's base's image:" in said and "8x8 pixels from 4x4 codes" in said
    assert "base's upsampler's image:" in said and "upsampler's parameters:" in said
    assert "DDPMPipeline of diffusers" in invoke("info", "--checkpoint", checkpoints["ddpm"]).stdout
