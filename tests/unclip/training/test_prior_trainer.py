"""The training of a prior: what it measures first, what it saves, what it goes on from, what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny import generators
from tiny_training import write_shapes
from tiny_unclip import prior_config, save_clip


pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf import EmbeddingPriorPipeline  # noqa: E402
from llamagen_hf.arguments import FieldError  # noqa: E402
from llamagen_hf.data.samples import decode_image  # noqa: E402
from llamagen_hf.training.record import read_facts  # noqa: E402
from llamagen_hf.training.trainer import Trainer  # noqa: E402
from llamagen_hf.unclip.training.prior_trainer import PriorTask, train_prior  # noqa: E402


KINDS = ("diffusion", "autoregressive")
FEW_STEPS = {"diffusion": {"num_inference_steps": 3}, "autoregressive": {"temperature": 0.5}}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Coloured shapes, a CLIP, a prior of each kind, and what their trainings returned."""
    folder = tmp_path_factory.mktemp("stages")
    data, clip = write_shapes(folder / "shapes"), str(save_clip(folder / "clip"))
    metrics = {
        kind: train_prior(data, prior_config(folder / kind, clip=clip, kind=kind, sampling_defaults=FEW_STEPS[kind]))
        for kind in KINDS
    }
    return folder, data, metrics


def load(folder) -> EmbeddingPriorPipeline:
    pipe = EmbeddingPriorPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def set_up(data, config) -> PriorTask:
    """The task of a training that has not taken its first step."""
    trainer = Trainer(config, PriorTask(data, config))
    trainer.setup()
    return trainer.task


def embeddings(data, pipe, split="train") -> torch.Tensor:
    return pipe.encode_image([decode_image(row["image"]) for row in data.load(split)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_ends_as_a_pipeline_that_draws_embeddings(stages, kind):
    folder, _, metrics = stages
    names = {f"test_{text}{name}" for text in ("", "text_") for name in ("cosine", "retrieval")}
    assert metrics[kind].keys() == {"test_loss", *names}
    pipe = load(folder / kind)
    assert pipe("red", generator=generators(1)).image_embeds.shape == (1, 8)
    assert pipe.config.sampling_defaults == FEW_STEPS[kind]
    with Image.open(folder / kind / "samples" / "step-00000004.png") as image:
        assert image.size == (8 * 8, 2 * 8)
    facts = read_facts(folder / kind)
    assert facts["prior"]["metrics"] == metrics[kind] and facts["prior"]["settings"]["kind"] == kind
    assert str(folder) not in json.dumps(facts)


def test_the_metrics_are_what_they_say(stages):
    folder, data, metrics = stages
    pipe = load(folder / "diffusion")
    images = embeddings(data, pipe, "test")
    text = pipe.encode_prompt([row["caption"] for row in data.load("test")], truncate_prompt=True)
    texts = F.normalize(text.embeds, dim=-1)
    assert metrics["diffusion"]["test_text_cosine"] == pytest.approx((texts * images).sum(-1).mean().item(), abs=1e-5)
    found = [(row @ images.T).argmax().item() == i for i, row in enumerate(texts)]
    assert metrics["diffusion"]["test_text_retrieval"] == pytest.approx(sum(found) / len(found))


def test_mean_and_deviation_are_those_of_the_training_images(stages):
    folder, data, _ = stages
    pipe = load(folder / "diffusion")
    embeds = embeddings(data, pipe)
    torch.testing.assert_close(pipe.prior.clip_mean[0], embeds.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(pipe.prior.clip_std[0], embeds.std(0), rtol=0, atol=1e-5)


def test_the_quantizer_is_fitted_to_the_training_images(stages):
    folder, data, _ = stages
    pipe = load(folder / "autoregressive")
    embeds = embeddings(data, pipe)
    again = pipe.quantizer.decode(pipe.quantizer.encode(embeds))
    assert F.cosine_similarity(embeds, again).min() > 0.99
    torch.testing.assert_close(pipe.quantizer.mean, embeds.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_prior_with_its_statistics(stages, tmp_path, kind):
    folder, data, metrics = stages
    start = {"init_from": str(folder / kind), "kind": kind, "max_train_steps": 1, "learning_rate": 1e-9}
    other = replace(data, train_split="train[:8]")
    again = train_prior(other, prior_config(tmp_path, **start, sampling_defaults=FEW_STEPS[kind]))
    assert again["test_loss"] == pytest.approx(metrics[kind]["test_loss"], abs=1e-4)
    before, after = load(folder / kind), load(tmp_path)
    if kind == "diffusion":
        assert torch.equal(before.prior.clip_mean, after.prior.clip_mean)
    else:
        assert torch.equal(before.quantizer.boundaries, after.quantizer.boundaries)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_exactly(stages, tmp_path, kind):
    """Also with the statistics, which are measured before the first step only."""
    folder, data, _ = stages
    settings = {"clip": str(folder / "clip"), "kind": kind, "dropout": 0.1, "checkpointing_steps": 2}
    settings |= {"sampling_defaults": FEW_STEPS[kind], "eval_rows": 2}
    train_prior(data, prior_config(tmp_path / "whole", **settings))
    for steps in (2, 4):
        train_prior(data, prior_config(tmp_path / "halves", **settings, max_train_steps=steps))
    one, other = (load_folder(tmp_path / name) for name in ("whole", "halves"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load_folder(folder) -> dict[str, torch.Tensor]:
    """All weights of a saved prior but CLIP's."""
    files = [path for part in ("prior", "quantizer") for path in (folder / part).glob("*.safetensors")]
    assert files
    return {f"{path.parent.name}.{name}": value for path in files for name, value in load_file(path).items()}


def test_captions_are_dropped_so_that_guidance_is_learnt(stages, tmp_path):
    folder, data, _ = stages
    clip = str(folder / "clip")
    for chance, expected in ((1.0, True), (0.0, False)):
        task = set_up(data, prior_config(tmp_path / str(chance), clip=clip, condition_dropout=chance))
        captions = [caption for batch in next(iter(task.trainer.steps)) for caption in batch["captions"]]
        assert (captions == [""] * 4) == expected
        assert all(batch["captions"][0] for batch in task.test_batches())


def test_clip_is_frozen(stages):
    folder, _, _ = stages
    for kind in KINDS:
        pipe = load(folder / kind)
        for half, prefix in ((pipe.text_encoder, "text"), (pipe.image_encoder, "vision")):
            one, other = half.state_dict(), getattr(_clip(folder), f"{prefix}_model").state_dict()
            for name, value in other.items():
                assert torch.equal(value, one[f"{prefix}_model.{name}"])


def _clip(folder):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder / "clip")


def test_rows_whose_captions_are_too_long_count_as_bad(stages, tmp_path):
    folder, data, _ = stages
    config = prior_config(tmp_path, clip=str(folder / "clip"), truncate_captions=False)
    with pytest.raises(ValueError, match="caption longer than CLIP's 12 positions: 'a"):
        train_prior(data, config)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"clip": None}, "Set either clip, for a new prior, or init_from"),
        ({"condition_dropout": 2.0}, "condition_dropout is 2.0"),
        ({"eval_rows": 0}, "eval_rows is 0"),
        ({"num_buckets": 1}, "num_buckets is 1"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(settings, message):
    with pytest.raises(FieldError, match=message):
        prior_config("out", **{"clip": "somewhere"} | settings)


def test_what_is_loaded_must_fit(stages, tmp_path):
    folder, data, _ = stages
    clip = {"clip": str(folder / "clip")}
    for settings, message in (
        ({"clip": str(folder / "nothing")}, "clip can't be loaded: There is no CLIP model"),
        ({"init_from": str(folder / "clip")}, "init_from can't be loaded"),
        ({"init_from": str(folder / "diffusion"), "kind": "autoregressive"}, "is of the other kind"),
        ({"kind": "autoregressive", "grid_size": 3} | clip, "so 9 codes; embeddings have 8"),
        ({"sampling_defaults": {"temperature": 1.0}} | clip, "`sampling_defaults` has .'temperature'."),
    ):
        with pytest.raises(ValueError, match=message):
            set_up(data, prior_config(tmp_path, **settings))
