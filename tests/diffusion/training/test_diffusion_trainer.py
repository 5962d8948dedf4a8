"""Diffusion training: what it saves, what it starts from, what it learns from, and what it measures."""

import json
import random
from dataclasses import replace

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file
from tiny import build_text_encoder, build_vq_model, generators
from tiny_diffusion import build_if_pipeline
from tiny_diffusion_training import UPSAMPLER, diffusion_config
from tiny_stages import build_clip
from tiny_training import draw_shape, write_shapes
from transformers import ByT5Tokenizer


pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf import PixelDiffusionPipeline  # noqa: E402
from llamagen_hf.clip import embed_images, load_clip  # noqa: E402
from llamagen_hf.diffusion.schedules import STATIC, UNLIMITED  # noqa: E402
from llamagen_hf.diffusion.training.diffusion_trainer import DiffusionTask, train_diffusion  # noqa: E402
from llamagen_hf.diffusion.unet import predict  # noqa: E402
from llamagen_hf.evaluation.reconstruction import PerceptualLoss  # noqa: E402
from llamagen_hf.training.record import read_facts  # noqa: E402
from llamagen_hf.training.trainer import Trainer  # noqa: E402


ONE_STEP = {"max_train_steps": 1, "learning_rate": 1e-9, "lr_warmup_steps": 0}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Coloured shapes, a base and an upsampler of them, an image tokenizer, and what the base's training returned."""
    folder = tmp_path_factory.mktemp("stages")
    data = write_shapes(folder / "shapes")
    build_vq_model().save_pretrained(folder / "tokenizer")
    base = train_diffusion(data, diffusion_config(folder / "base", text_pretrain_steps=2))
    settings = UPSAMPLER | {"low_vq_model": str(folder / "tokenizer"), "crop_size": 8, "max_aug_level": 0.5}
    upsampler = train_diffusion(data, diffusion_config(folder / "upsampler", **settings))
    return folder, data, {"base": base, "upsampler": upsampler}


def set_up(data, config) -> DiffusionTask:
    """The task of a training that has not taken its first step."""
    trainer = Trainer(config, DiffusionTask(data, config))
    trainer.setup()
    return trainer.task


def weights_of(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_base_ends_as_a_pipeline_that_draws_prompts(stages):
    folder, _, metrics = stages
    assert metrics["base"].keys() == {"test_loss", "test_loss_without_prompt"}
    pipe = PixelDiffusionPipeline.from_pretrained(folder / "base")
    assert pipe("a red circle", generator=generators(0)).images[0].size == (16, 16)
    assert pipe.config.sampling_defaults == {"num_inference_steps": 2} and pipe.config.condition_length == 12
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    with Image.open(folder / "base" / "samples" / "step-00000006.png") as image:
        assert image.size == (8 * 16, 16)
    assert {"loss", "learning_rate", "images/s"} <= logged(folder / "base")[0].keys()
    assert not list(folder.rglob("*partial*"))


def test_only_guided_sampling_is_thresholded_dynamically(stages):
    """Without guidance, the noise of first steps would turn white into grey."""
    for name, limit in (("base", UNLIMITED), ("upsampler", STATIC)):
        config = PixelDiffusionPipeline.from_pretrained(stages[0] / name).scheduler.config
        assert config.thresholding and config.sample_max_value == limit


def test_an_upsampler_is_measured_beside_bicubic_enlargement(stages):
    folder, _, metrics = stages
    names = [
        f"{kind}{name}{of}"
        for kind in ("", "redrawn_")
        for name in ("psnr", "ssim", "consistency")
        for of in ("", "_bicubic")
    ]
    assert metrics["upsampler"].keys() == {"test_loss", *(f"test_{name}" for name in names)}
    assert metrics["upsampler"]["test_psnr_bicubic"] > metrics["upsampler"]["test_redrawn_psnr_bicubic"]
    pipe = PixelDiffusionPipeline.from_pretrained(folder / "upsampler")
    assert pipe.upsamples and not pipe.reads_text
    assert pipe(image=Image.new("RGB", (8, 8))).images[0].size == (16, 16)
    with Image.open(folder / "upsampler" / "samples" / "step-00000006.png") as image:
        assert image.size == (8 * 16, 3 * 16)


def test_the_record_holds_settings_and_metrics_and_no_paths(stages):
    folder, _, metrics = stages
    facts = read_facts(folder / "base")
    assert facts["diffusion"]["metrics"] == metrics["base"]
    assert facts["examples"][0] == "a red circle" and len(facts["examples"]) == 8
    upsampler = read_facts(folder / "upsampler")
    assert upsampler["diffusion"]["settings"]["low_vq_model"] == "tokenizer"
    assert upsampler["data"]["image_size"] == 16 and upsampler["examples"] == []
    assert str(folder) not in json.dumps(facts | upsampler)


def test_lpips_is_measured_where_vgg16_is_at_hand(stages, tmp_path, monkeypatch):
    _, data, _ = stages
    monkeypatch.setattr(PerceptualLoss, "from_pretrained", PerceptualLoss)
    metrics = train_diffusion(data, diffusion_config(tmp_path, **UPSAMPLER | ONE_STEP))
    assert metrics["test_lpips"] > metrics["test_lpips_bicubic"] > 0


def test_a_base_without_conditions_draws(stages, tmp_path):
    _, data, _ = stages
    metrics = train_diffusion(data, diffusion_config(tmp_path, conditioning="none", max_train_steps=1))
    assert metrics.keys() == {"test_loss"}
    assert PixelDiffusionPipeline.from_pretrained(tmp_path)().images[0].size == (16, 16)


def test_a_pretrained_text_encoder_stays_as_it_is(stages, tmp_path):
    _, data, _ = stages
    build_text_encoder().save_pretrained(tmp_path / "encoder")
    ByT5Tokenizer().save_pretrained(tmp_path / "encoder")
    config = diffusion_config(tmp_path / "out", text_encoder=str(tmp_path / "encoder"), condition_length=None)
    train_diffusion(data, config)
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.config.condition_length == 77
    for key, value in build_text_encoder().state_dict().items():
        assert torch.equal(value, pipe.text_encoder.state_dict()[key]), key


def test_text_upsamplers_read_their_prompts(stages, tmp_path):
    _, data, _ = stages
    metrics = train_diffusion(data, diffusion_config(tmp_path, low_image_size=8, patch_size=2, max_train_steps=1))
    assert {"test_loss_without_prompt", "test_psnr", "test_psnr_bicubic"} <= metrics.keys()
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path)
    assert pipe("a red circle", Image.new("RGB", (8, 8))).images[0].size == (16, 16)


def test_training_goes_on_from_a_pipeline(stages, tmp_path):
    folder, data, metrics = stages
    config = diffusion_config(tmp_path, init_from=str(folder / "base"), condition_length=None, **ONE_STEP)
    assert train_diffusion(data, config) == pytest.approx(metrics["base"], abs=1e-4)


def test_training_goes_on_at_another_size(stages, tmp_path):
    """Progressive training: convolutions and attention have no positions."""
    folder, data, _ = stages
    config = diffusion_config(tmp_path, init_from=str(folder / "base"), **ONE_STEP)
    train_diffusion(replace(data, image_size=32), config)
    before, after = weights_of(folder / "base"), weights_of(tmp_path)
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(value, after[key], rtol=0, atol=1e-6, msg=key)
    assert PixelDiffusionPipeline.from_pretrained(tmp_path)("a red circle").images[0].size == (32, 32)
    with pytest.raises(ValueError, match="image_size is 15; the U-Net of init_from takes multiples of 2"):
        set_up(replace(data, image_size=15), diffusion_config(tmp_path / "x", init_from=str(folder / "base")))


def test_what_deepfloyd_trained_is_trained_on_as_it_was(stages, tmp_path):
    _, data, _ = stages
    build_if_pipeline().save_pretrained(tmp_path / "if")
    config = diffusion_config(
        tmp_path / "out", init_from=str(tmp_path / "if"), condition_length=None, max_train_steps=1
    )
    train_diffusion(data, config)
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.config.convention == "deepfloyd" and pipe.config.condition_length == 77
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe("a red circle").images[0].size == (16, 16)


def test_an_adapter_trains_alone_loads_and_unloads(stages, tmp_path):
    pytest.importorskip("peft", reason="the lora extra is not installed")
    folder, data, _ = stages
    settings = {"init_from": str(folder / "base"), "lora_rank": 2, "learning_rate": 1e-1, "lr_warmup_steps": 0}
    metrics = train_diffusion(data, diffusion_config(tmp_path, **settings))
    saved = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved and "unet" not in saved
    assert str(folder) not in (tmp_path / "adapter_config.json").read_text()

    pipe = PixelDiffusionPipeline.from_pretrained(folder / "base")
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe("a red circle", generator=generators(0), output_type="pt").images

    before, plain = draw(), {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(tmp_path)
    adapted = draw()
    assert (adapted - before).abs().max() > 1e-2
    pipe.unload_lora_weights()
    assert torch.equal(draw(), before)
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    torch.testing.assert_close(draw(), adapted, rtol=0, atol=1e-3)
    pipe.save_pretrained(tmp_path / "fused")
    changed = {key for key, value in weights_of(tmp_path / "fused").items() if not torch.equal(value, plain[key])}
    assert changed and all(".resnets." in key or ".attentions." in key or "samplers" in key for key in changed)
    task = set_up(data, diffusion_config(tmp_path / "x", init_from=str(tmp_path / "fused")))
    task.model.eval()
    assert task.mean_loss() == pytest.approx(metrics["test_loss"], abs=1e-3)


@pytest.mark.slow
def test_a_student_learns_the_guided_predictions_of_its_teacher(stages, tmp_path):
    """The teacher has learnt what prompts say: in a new U-Net they shift noise at random, which is hard to learn."""
    _, data, _ = stages
    teacher = str(tmp_path / "teacher")
    rarely = dict.fromkeys(("checkpointing_steps", "eval_steps", "sample_steps"), 100)
    settings = {"text_pretrain_steps": 2, "max_train_steps": 60, "learning_rate": 3e-3}
    train_diffusion(data, diffusion_config(tmp_path / "teacher", **settings, **rarely))
    settings = {"teacher": teacher, "init_from": teacher, "teacher_guidance_scale": 3.0, "max_train_steps": 50}
    config = diffusion_config(tmp_path / "student", **settings, **rarely, ema_decay=0.9)
    start = set_up(data, replace(config, output_dir=str(tmp_path / "x")))
    start.model.eval()
    before = start.mean_loss()
    assert train_diffusion(data, config)["test_loss"] < 0.5 * before
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path / "student")
    assert pipe.config.sampling_defaults == {"guidance_scale": 1.0, "num_inference_steps": 2}


def test_the_target_of_a_student_is_what_the_pipeline_would_use(stages, tmp_path):
    folder, data, _ = stages
    settings = {"teacher": str(folder / "base"), "teacher_guidance_scale": 3.0, "condition_dropout": 0.0}
    task = set_up(data, diffusion_config(tmp_path, **settings))
    (batch,) = next(iter(task.trainer.steps))
    inputs = task.encode(batch)
    pipe = PixelDiffusionPipeline.from_pretrained(folder / "base")
    states, mask = inputs["states"], inputs["mask"]
    null_states, null_mask = pipe.encode_prompt("")
    with torch.no_grad():
        output = predict(pipe.unet, inputs["noisy"], inputs["timesteps"], states=states, mask=mask)
        null = predict(
            pipe.unet, inputs["noisy"], inputs["timesteps"], states=null_states.expand(4, -1, -1),
            mask=null_mask.expand(4, -1),
        )  # fmt: skip
    torch.testing.assert_close(inputs["target"], null + 3.0 * (output - null))
    assert not any(p.requires_grad for p in task.models.teacher.parameters())


def test_compiled_or_checkpointed_a_training_saves_the_same_names(stages, tmp_path, monkeypatch):
    folder, data, _ = stages
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or function)
    train_diffusion(data, diffusion_config(tmp_path, compile=True, gradient_checkpointing=True, max_train_steps=1))
    assert compiled == ["predict"]
    assert weights_of(tmp_path).keys() == weights_of(folder / "base").keys()


def test_other_weights_than_the_run_began_with_are_refused(stages, tmp_path):
    folder, data, _ = stages
    start = {"init_from": str(folder / "base"), "lr_warmup_steps": 0}
    config = diffusion_config(tmp_path / "run", **start, max_train_steps=1)
    train_diffusion(data, config)
    other = replace(config, init_from=str(tmp_path / "run"), max_train_steps=2)
    with pytest.raises(ValueError, match="made from other input: the weights of init_from changed"):
        train_diffusion(data, other)
    with pytest.raises(ValueError, match="the setting image_size changed"):
        train_diffusion(replace(data, image_size=32), replace(config, max_train_steps=2))
    train_diffusion(data, replace(other, overwrite=True))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_rows_without_an_image_or_a_caption_are_skipped(stages, tmp_path):
    from datasets import load_dataset

    folder, data, _ = stages
    (tmp_path / "rows").mkdir()
    rows = load_dataset("parquet", data_files=f"{folder}/shapes/train-*.parquet", split="train")
    rows = rows.map(lambda row, i: {"caption": row["caption"] if i else ""}, with_indices=True)
    rows.to_parquet(tmp_path / "rows" / "train-00000.parquet")
    data = replace(data, dataset=str(tmp_path / "rows"), test_fraction=0.0)
    config = diffusion_config(tmp_path / "run", caption_templates={"{caption}": 1.0}, batch_size=20, max_train_steps=2)
    with pytest.raises(ValueError, match=r"1 row\(s\) can't be used, .*no caption"):
        train_diffusion(data, config)
    assert train_diffusion(replace(data, max_bad_rows=1), replace(config, output_dir=str(tmp_path / "again"))) == {}
    assert logged(tmp_path / "again")[-1]["bad rows: no caption"] == 1


def test_recipes_that_do_not_fit_are_one_sentence(stages, tmp_path):
    folder, data, _ = stages
    base, upsampler = str(folder / "base"), str(folder / "upsampler")
    wrong = {
        "The pipeline of init_from is an upsampler; set low_image_size.": {"init_from": upsampler},
        "The pipeline of teacher is a base; leave low_image_size out.": {"teacher": base, **UPSAMPLER},
        "has conditioning 'text', but the recipe 'none'": {"init_from": base, "conditioning": "none"},
        "init_from can't be loaded: .*is not a checkpoint": {"init_from": str(folder)},
        "predicts 'v_prediction'; leave it out": {"init_from": base, "prediction_type": "epsilon"},
        "low_image_size is 7; expected a part of image_size": {"low_image_size": 7},
        "crop_size is 9; expected a multiple of 2 of at most image_size": {**UPSAMPLER, "crop_size": 9},
        "crop_size is 32; expected a multiple of 2": {**UPSAMPLER, "crop_size": 32},
        "There is no image tokenizer": {**UPSAMPLER, "low_vq_model": str(tmp_path / "none")},
        "The rows have no column 'title'": {"caption_templates": {"{title}": 1.0}},
        "`layers_per_block` has 1 numbers": {"layers_per_block": [1]},
        "20 rows do not fill one batch of 21": {"batch_size": 21},
    }
    for message, settings in wrong.items():
        with pytest.raises(ValueError, match=message):
            train_diffusion(data, diffusion_config(tmp_path / "out", **settings))
    for message, settings in {
        "max_aug_level is 1.5; expected a number from 0 to 1": {"max_aug_level": 1.5},
        "crop_size is for upsamplers; set low_image_size too": {"crop_size": 8},
        "low_vq_model is for upsamplers": {"low_vq_model": "emoji"},
        "A LoRA adapter needs weights to adapt": {"lora_rank": 2},
        "With a teacher its text encoder is used": {"teacher": base, "text_encoder": base},
        "conditioning is 'class'; expected 'text' or 'none'": {"conditioning": "class"},
    }.items():
        with pytest.raises(ValueError, match=message):
            diffusion_config(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_fault_after_the_last_step_loses_no_weights(stages, tmp_path, monkeypatch):
    _, data, _ = stages

    def fail(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DiffusionTask, "draw_samples", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_diffusion(data, diffusion_config(tmp_path, max_train_steps=1))
    assert PixelDiffusionPipeline.from_pretrained(tmp_path)("a red circle").images[0].size == (16, 16)
    assert read_facts(tmp_path)["diffusion"]["metrics"] == {}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for part in build_clip():  # of images of 16 pixels, with embeddings of 12 numbers
        part.save_pretrained(folder)
    return folder


def test_a_decoder_draws_from_the_embedding_of_an_image(stages, clip, tmp_path):
    _, data, _ = stages
    metrics = train_diffusion(data, diffusion_config(tmp_path, clip=str(clip), condition_length=None))
    assert metrics.keys() == {"test_loss", "test_loss_without_prompt"}
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path)
    assert pipe.config.condition_length == 1 and pipe.text_encoder is None
    embeddings = embed_images(*load_clip(clip), [draw_shape(0), draw_shape(1)])
    one, two = pipe(prompt_embeds=embeddings[:, None], generator=generators(0, 0)).images
    assert one.size == (16, 16) and one.tobytes() != two.tobytes()
    with Image.open(tmp_path / "samples" / "step-00000006.png") as image:
        assert image.size == (8 * 16, 2 * 16)
    with pytest.raises(ValueError, match="`prompt_embeds` has values that are not finite"):
        pipe(prompt_embeds=torch.full((1, 1, 12), float("nan")))
    assert read_facts(tmp_path)["diffusion"]["settings"]["condition_dropout"] == 0.1


def test_a_decoder_learns_the_embeddings_of_its_images_and_zeros(stages, clip, tmp_path):
    _, data, _ = stages
    task = set_up(data, diffusion_config(tmp_path, clip=str(clip), condition_length=None, condition_dropout=0.5))
    samples = task.samples(task.train)
    rows = [samples(task.train[i], random.Random(i)) for i in range(8)]
    arguments = task.encode(task.collate(rows))
    images = [VaeImageProcessor().postprocess(row["images"][None])[0] for row in rows]
    embeddings = embed_images(*load_clip(clip), images)
    dropped = [row["dropped"] for row in rows]
    assert 0 < sum(dropped) < 8
    for is_dropped, states, mask, embedding in zip(
        dropped, arguments["states"], arguments["mask"], embeddings, strict=True
    ):
        torch.testing.assert_close(states[0], torch.zeros(12) if is_dropped else embedding, atol=1e-5, rtol=0)
        assert mask.tolist() == [int(not is_dropped)]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"conditioning": "none"}, "stands in place of a prompt; set conditioning to 'text'"),
        ({"condition_length": 12}, "is one position; leave condition_length out"),
        ({"sample_prompts": ["a"]}, "The condition is the embedding of clip; leave sample_prompts out"),
    ],
)
def test_settings_that_do_not_fit_a_decoder(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        diffusion_config(tmp_path, clip="clip", **{"condition_length": None} | settings)


def test_a_decoder_does_not_go_on_from_one_of_prompts(stages, clip, tmp_path):
    folder, data, _ = stages
    settings = {"clip": str(clip), "condition_length": None, "init_from": str(folder / "base")}
    with pytest.raises(ValueError, match="The embeddings of clip are 12 wide, but the U-Net of init_from takes 16"):
        train_diffusion(data, diffusion_config(tmp_path / "x", **settings))
