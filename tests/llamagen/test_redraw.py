"""An image says what made it, and that draws it again."""

import json

import pytest
import torch
from PIL import Image
from tiny import build_class_pipeline, build_text_pipeline, generators
from typer.testing import CliRunner

import llamagen_cli
from llamagen_hf import AutoregressiveImagePipeline, __version__
from llamagen_hf.provenance import read_parameters, save_png


def invoke(*arguments):
    return CliRunner().invoke(llamagen_cli.app, [str(argument) for argument in arguments])


def assert_redrawn(pipe, output):
    for image, codes, parameters in zip(output.images, output.codes, output.parameters, strict=True):
        again = pipe.redraw(json.loads(json.dumps(parameters)))
        assert again.images[0].tobytes() == image.tobytes()
        assert torch.equal(again.codes[0], codes) and again.parameters == [parameters]


def test_parameters_say_everything(text_pipe):
    (parameters,) = text_pipe("a red apple", top_k=9, generator=generators(3)).parameters
    assert parameters == {
        "prompt": "a red apple",
        "guidance_scale": 4.0,
        "guidance_interval": -1,
        "temperature": 1.0,
        "top_k": 9,
        "top_p": 1.0,
        "seed": 3,
        "noise": "gumbel-splitmix64",
        "device": "cpu",
        "dtype": "float32",
        "llamagen_hf": __version__,
        "torch": torch.__version__,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"generator": lambda: generators(7)[0], "num_images_per_prompt": 3},
        {"generator": lambda: generators(7, 8, 9), "num_images_per_prompt": 3},
        {"guidance_scale": 1.0, "temperature": 0.8, "top_p": 0.9, "top_k": 12, "guidance_interval": 5},
        {"image": Image.new("RGB", (9, 8), "teal"), "keep_rows": 2, "num_images_per_prompt": 2},
        {"prefix_codes": torch.arange(5)[None]},
    ],
)
@pytest.mark.parametrize("build", [build_class_pipeline, build_text_pipeline])
def test_every_drawing_can_be_drawn_again(build, arguments):
    pipe = build()
    arguments = arguments | {"generator": arguments.get("generator", lambda: None)()}
    condition = {"prompt": "a red apple"} if pipe.condition_kind == "text" else {"class_labels": "goldfish"}
    assert_redrawn(pipe, pipe(**condition, **arguments))


def test_images_of_a_mixed_batch_too(text_pipe):
    assert_redrawn(text_pipe, text_pipe(["a red apple", "a"], generator=generators(1)[0], num_images_per_prompt=2))


def test_without_a_generator_seeds_differ_and_follow_torch(class_pipe):
    torch.manual_seed(1)
    first = class_pipe(class_labels=[1, 1])
    seeds = [parameters["seed"] for parameters in first.parameters]
    assert len(set(seeds)) == 2
    torch.manual_seed(1)
    assert [parameters["seed"] for parameters in class_pipe(class_labels=[1, 1]).parameters] == seeds


def test_a_generator_in_use_has_no_seed_to_tell(class_pipe):
    (generator,) = generators(3)
    class_pipe(class_labels=1, generator=generator)
    (parameters,) = class_pipe(class_labels=1, generator=generator).parameters
    assert parameters["seed"] is None
    with pytest.raises(ValueError, match="hold no seed"):
        class_pipe.redraw(parameters)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": None, "class_labels": None}, "neither a prompt nor a class"),
        ({"top_k": None}, "lack top_k"),
        ({"seed": "3"}, "damaged: seed is '3'"),
        ({"seed": 2**64}, "damaged: seed"),
        ({"batch_size": 10**9}, "damaged: batch_size"),
        ({"batch_index": 1}, "damaged: batch_index"),
        ({"prefix_codes": "12"}, "damaged: prefix_codes"),
        ({"generator_device": "abacus"}, "The device 'abacus'"),
        ({"lora": [{"path": "user/style"}]}, r"drawn with the adapters .*'user/style'.*, the pipeline has \[\]"),
        ({"top_p": 7}, "`top_p` is 7"),
        ({"class_labels": 77}, "Class id 77 is out of range"),
        ({"noise": None}, r"llamagen_hf \d.* drew the image with other noise"),
        ({"decoding_window": 0}, "`decoding_window` is 0; expected an integer of at least 1"),
    ],
)
def test_parameters_that_do_not_do_are_refused_in_a_sentence(class_pipe, change, message):
    (parameters,) = class_pipe(class_labels=1, generator=generators(0)).parameters
    changed = {name: value for name, value in (parameters | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        class_pipe.redraw(changed)


def test_saved_images_carry_their_parameters(class_pipe, tmp_path):
    output = class_pipe(class_labels=[1, 2], generator=generators(5, 6))
    paths = output.save(tmp_path / "fish.png")
    assert [path.name for path in paths] == ["fish-0.png", "fish-1.png"]
    assert [read_parameters(path) for path in paths] == output.parameters
    (single,) = class_pipe(class_labels=1).save(str(tmp_path / "one.png"))
    assert single.name == "one.png"
    with pytest.raises(ValueError, match="output_type='pil'"):
        class_pipe(class_labels=1, output_type="pt").save(tmp_path / "x.png")


def test_parameters_name_the_checkpoint(class_pipe, tmp_path):
    class_pipe.save_pretrained(tmp_path)
    loaded = AutoregressiveImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded(class_labels=1).parameters[0]["checkpoint"] == str(tmp_path)
    assert "checkpoint" not in class_pipe(class_labels=1).parameters[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    build_text_pipeline().save_pretrained(path)
    return path


def test_generate_from_a_image_draws_it_again(checkpoint, tmp_path):
    Image.new("RGB", (20, 30), "teal").save(tmp_path / "teal.png")
    drawn = invoke(
        "generate", "a red apple", "--checkpoint", checkpoint, "--count", 3, "--seed", 5, "--top-k", 20,
        "--image", tmp_path / "teal.png", "--keep-rows", 1, "--output", tmp_path / "apple.png",
    )  # fmt: skip
    assert drawn.exit_code == 0, drawn.output
    for name in ("apple-0.png", "apple-2.png"):
        again = invoke("generate", "--from", tmp_path / name, "--output", tmp_path / "again.png")
        assert again.exit_code == 0, again.output
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / name).read_bytes()


def redrawn(path):
    """What `llamagen generate --from` makes of an image, as bytes of the file."""
    again = path.with_name("again.png")
    result = invoke("generate", "--from", path, "--output", again)
    assert result.exit_code == 0, result.output
    return again.read_bytes()


def test_generate_from_the_best_of_several(checkpoint, tmp_path):
    pipe = AutoregressiveImagePipeline.from_pretrained(checkpoint)
    output = pipe("apple", num_candidates=4, scorer=lambda images, prompts: range(4), generator=generators(3))
    assert output.parameters[0]["seed_index"] == 3
    output.save(tmp_path / "apple.png")
    assert redrawn(tmp_path / "apple.png") == (tmp_path / "apple.png").read_bytes()


def test_generate_from_a_variant(tmp_path):
    pipe = build_text_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    with torch.no_grad():
        pipe.transformer.lm_head.weight.neg_()
    pipe.save_pretrained(tmp_path / "pipe", variant="other")
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / "pipe", variant="other")
    pipe("apple", generator=generators(3)).save(tmp_path / "apple.png")
    assert redrawn(tmp_path / "apple.png") == (tmp_path / "apple.png").read_bytes()


@pytest.mark.parametrize("fused", [False, True])
def test_generate_from_a_image_of_an_adapter(checkpoint, tmp_path, fused):
    pytest.importorskip("peft", reason="the lora extra is not installed")
    from llamagen_hf.loading.lora import lora_config

    donor = build_text_pipeline().transformer
    donor.add_adapter(lora_config(2))
    with torch.no_grad():
        for name, weight in donor.named_parameters():
            if "lora" in name:
                weight.normal_(std=0.3)
    donor.save_pretrained(tmp_path / "style")

    pipe = AutoregressiveImagePipeline.from_pretrained(checkpoint)
    plain = pipe("apple", generator=generators(3))
    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    if fused:
        pipe.fuse_lora()
    output = pipe("apple", generator=generators(3))
    assert not torch.equal(output.codes, plain.codes)
    lora = {"path": str(tmp_path / "style"), "name": "style"}
    assert output.parameters[0]["lora"] == [lora | {"fused": True} if fused else lora]
    output.save(tmp_path / "apple.png")
    assert redrawn(tmp_path / "apple.png") == (tmp_path / "apple.png").read_bytes()
    if not fused:
        pipe.unload_lora_weights()
        assert pipe("apple", generator=generators(3)).parameters == plain.parameters


@pytest.mark.parametrize("loras", [["user/style"], [{"name": "style"}]])
def test_adapters_that_are_damaged_are_refused(text_pipe, loras):
    with pytest.raises(ValueError, match="These parameters are damaged: lora is"):
        text_pipe.load_loras(loras)


def test_generate_keeps_the_upper_half_by_default(checkpoint, tmp_path):
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "teal.png")
    result = invoke("generate", "apple", "--checkpoint", checkpoint, "--image", tmp_path / "teal.png",
                    "--output", tmp_path / "apple.png")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(read_parameters(tmp_path / "apple.png")["prefix_codes"]) == 8


def test_generate_from_says_what_is_wrong(checkpoint, tmp_path):
    picture = Image.new("RGB", (8, 8))
    picture.save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    save_png(picture, tmp_path / "bare.png", {"prompt": "apple", "seed": 1})
    save_png(picture, tmp_path / "styled.png", {"prompt": "apple", "lora": [{"path": str(tmp_path / "absent")}]})
    save_png(picture, tmp_path / "lost.png", {"prompt": "apple", "checkpoint": str(tmp_path / "absent")})
    for arguments, message in [
        (["--from", tmp_path / "plain.png"], "holds no parameters"),
        (["--from", tmp_path / "text.png"], "can't be read"),
        (["--from", tmp_path / "absent.png"], "can't be read"),
        (["--from", tmp_path / "bare.png"], "does not name its checkpoint"),
        (["--from", tmp_path / "bare.png", "--checkpoint", checkpoint], "lack guidance_scale"),
        (["--from", tmp_path / "lost.png"], "There is no folder"),
        (["--from", tmp_path / "styled.png", "--checkpoint", checkpoint], "There is no adapter"),
        (["--from", tmp_path / "bare.png", "--seed", 3, "--top-k", 4], "takes seed, top_k from the image"),
        (["pear", "--from", tmp_path / "bare.png"], "takes prompt from the image"),
        (["pear", "--image", tmp_path / "text.png"], "can't be read"),
        (["pear", "--keep-rows", 2], "`--image` to keep, which is missing"),
    ]:
        result = invoke("generate", *arguments, "--output", tmp_path / "out.png")
        assert result.exit_code == 1 and message in result.output, result.output
        assert "Traceback" not in result.output and not (tmp_path / "out.png").exists()
