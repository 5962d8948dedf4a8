"""Tokenizer training: its losses, what it saves, and what it keeps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_training import tokenizer_config, write_shapes


pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf import LlamaGenVQModel  # noqa: E402
from llamagen_hf.data.loader import batches_once  # noqa: E402
from llamagen_hf.data.samples import ImageSamples, stack_images  # noqa: E402
from llamagen_hf.evaluation.reconstruction import (  # noqa: E402
    CodeCounts,  # noqa: E402
    PerceptualLoss,  # noqa: E402
    psnr,
    ssim,
)
from llamagen_hf.llamagen.training import vq_trainer as vq_trainer  # noqa: E402
from llamagen_hf.llamagen.training.extraction import vq_model_fingerprint  # noqa: E402
from llamagen_hf.llamagen.training.vq_codebook import encode_cells, fit_codebook, revive_codes  # noqa: E402
from llamagen_hf.llamagen.training.vq_losses import (  # noqa: E402
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,  # noqa: E402
)
from llamagen_hf.llamagen.training.vq_trainer import (  # noqa: E402
    VQTask,
    train_tokenizer,
)
from llamagen_hf.training import trainer as trainer_module  # noqa: E402
from llamagen_hf.training.record import read_facts  # noqa: E402
from llamagen_hf.training.trainer import Trainer  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, train_tokenizer(data, tokenizer_config(folder))


def set_up(data, config) -> VQTask:
    """The task of a training that has not taken its first step."""
    trainer = Trainer(config, VQTask(data, config))
    trainer.setup()
    return trainer.task


def test_training_saves_a_tokenizer_with_images_and_metrics(trained):
    folder, metrics = trained
    assert metrics["test_psnr"] > 0 and -1 <= metrics["test_ssim"] <= 1
    assert 0 < metrics["test_codebook_usage"] <= 1 <= metrics["test_codebook_perplexity"] <= 32
    assert LlamaGenVQModel.from_pretrained(folder).config.sample_size == 16
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["step-00000003.png", "step-00000006.png"]
    assert not list(folder.rglob("*partial*"))


def test_a_finished_run_trains_no_further(data, trained):
    folder, metrics = trained
    assert train_tokenizer(data, tokenizer_config(folder)) == metrics


@pytest.mark.parametrize("part", ["measure", "draw_samples"])
def test_a_fault_after_the_last_step_loses_no_weights(data, tmp_path, monkeypatch, part):
    def fail(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(VQTask, part, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_tokenizer(data, tokenizer_config(tmp_path, max_train_steps=2))
    LlamaGenVQModel.from_pretrained(tmp_path)
    assert read_facts(tmp_path)["vq_model"]["metrics"] == {}


def test_training_gets_better(data, tmp_path):
    short = train_tokenizer(data, tokenizer_config(tmp_path / "1", max_train_steps=1))
    rarely = dict.fromkeys(("checkpointing_steps", "eval_steps", "sample_steps"), 100)
    config = tokenizer_config(tmp_path / "20", max_train_steps=20, learning_rate=1e-2, **rarely)
    longer = train_tokenizer(data, config)
    assert longer["test_psnr"] > short["test_psnr"] + 2


def test_decoder_only_training_keeps_every_code(data, trained, tmp_path):
    folder, _ = trained
    config = tokenizer_config(tmp_path, init_from=str(folder), decoder_only=True, revive_until_step=0)
    train_tokenizer(data, config)
    before, after = (LlamaGenVQModel.from_pretrained(path) for path in (folder, tmp_path))
    assert vq_model_fingerprint(before) == vq_model_fingerprint(after)
    for key, value in before.state_dict().items():
        if key.startswith(("encoder", "quant")):
            assert torch.equal(value, after.state_dict()[key]), key
        elif key.endswith("conv.weight"):
            assert not torch.equal(value, after.state_dict()[key]), key


def test_fine_tuning_starts_from_the_weights_with_other_loss_weights(data, trained, tmp_path):
    folder, _ = trained
    config = tokenizer_config(tmp_path, init_from=str(folder), commit_weight=0.7, entropy_weight=0.1)
    model = vq_trainer.build_vq_model(data, config)
    assert model.quantize.commit_weight == 0.7 and model.quantize.entropy_weight == 0.1
    for key, value in LlamaGenVQModel.from_pretrained(folder).state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_the_loss_is_the_sum_of_its_parts(data, tmp_path, monkeypatch):
    perceptual = PerceptualLoss()
    monkeypatch.setattr(PerceptualLoss, "from_pretrained", classmethod(lambda cls: perceptual))
    config = tokenizer_config(
        tmp_path, perceptual_weight=0.5, l1_weight=0.3, codebook_weight=0.8, commit_weight=0.2, entropy_weight=0.1,
        discriminator="stylegan", discriminator_width=32, discriminator_start=0, adversarial_weight=0.4,
        adversarial_loss="non-saturating", discriminator_loss="vanilla", adaptive_adversarial_weight=True,
        lr_warmup_steps=0,
    )  # fmt: skip
    training = set_up(data, config)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = training.model(images)
    losses = training.losses(output, images, adversarial=True)
    reconstruction = 0.3 * (output.sample - images).abs().mean() + (output.sample - images).square().mean()
    for axis in (-1, -2):
        reconstruction = reconstruction + (output.sample - images).diff(dim=axis).abs().mean()
    lpips = 0.5 * perceptual(output.sample, images).mean()
    fake = generator_loss("non-saturating", training.discriminator(output.sample))
    weight = adaptive_weight(reconstruction + lpips, fake, training.raw.decoder.conv_out.weight)
    expected = {
        "reconstruction": reconstruction, "perceptual": lpips, "adversarial": 0.4 * weight * fake,
        "codebook": 0.8 * output.vq_loss, "commitment": output.commit_loss, "entropy": output.entropy_loss,
    }  # fmt: skip
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)
    assert all(p.grad is None for p in training.discriminator.parameters())
    before = [p.clone() for p in training.discriminator.parameters()]
    real_logits = training.discriminator(images)
    values = training.train_step([{"images": images}])
    loss = discriminator_loss("vanilla", real_logits, training.discriminator(output.sample))
    assert values["discriminator"] == pytest.approx(0.4 * loss.item(), rel=0.5)
    assert any(not torch.equal(a, b) for a, b in zip(before, training.discriminator.parameters(), strict=True))


def test_the_discriminator_waits_for_its_start(data, tmp_path):
    config = tokenizer_config(tmp_path, discriminator="stylegan", discriminator_width=32, discriminator_start=1)
    training = set_up(data, config)
    batch = [{"images": torch.rand(2, 3, 16, 16) * 2 - 1}]
    before = [p.clone() for p in training.discriminator.parameters()]
    assert training.train_step(batch)["adversarial"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, training.discriminator.parameters(), strict=True))
    training.trainer.step = 1
    assert training.train_step(batch)["adversarial"] != 0


def test_reconstruction_loss_by_its_definition(tmp_path):
    config = tokenizer_config(tmp_path, l1_weight=2.0, l2_weight=3.0, gradient_weight=0.5)
    images = torch.zeros(1, 1, 2, 2)
    sample = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    # One pixel of four is off by 1: two neighbour differences of two each are off by 1 on each axis' mean.
    expected = 2 * 0.25 + 3 * 0.25 + 0.5 * (0.5 + 0.5)
    torch.testing.assert_close(reconstruction_loss(sample, images, config), torch.tensor(expected))


def test_metrics_of_known_images():
    images = torch.rand(2, 3, 16, 16)
    darker = images.clone()
    darker[1] = (images[1] - 0.1).abs()
    torch.testing.assert_close(ssim(images, images), torch.ones(2))
    assert psnr(images, images)[0] == float("inf") and ssim(images, darker)[1] < 1
    torch.testing.assert_close(psnr(torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.1)), torch.tensor([20.0]))


def test_usage_and_perplexity_of_known_counts():
    counts = CodeCounts(8, torch.device("cpu"))
    counts.add(torch.tensor([[0, 1], [2, 3]]))
    assert counts.usage == 0.5 and counts.perplexity == pytest.approx(4.0)
    counts.add(torch.zeros(12, dtype=torch.long))
    shares = torch.tensor([13, 1, 1, 1]) / 16
    assert counts.perplexity == pytest.approx((-(shares * shares.log()).sum()).exp().item())


def test_revived_codes_are_used_at_once():
    torch.manual_seed(0)
    model = LlamaGenVQModel(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=8, num_vq_embeddings=256, norm_num_groups=4
    )
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    counts = model.encode(images).codes.flatten().bincount(minlength=256)
    dead = (counts == 0).nonzero().flatten()
    moved = revive_codes(model, counts, images)
    assert moved == len(dead) > 0
    now = model.encode(images).codes.flatten().bincount(minlength=256)
    assert (now[dead] > 0).float().mean() > 0.9


def test_k_means_finds_the_directions_that_there_are():
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(8)
    cells = centers.repeat(50, 1) + 0.02 * torch.randn(400, 8, generator=generator)
    cells = torch.nn.functional.normalize(cells, dim=-1)
    codes = fit_codebook(cells, 8, generator)
    assert ((centers @ codes.T).amax(1) > 0.999).all()


def test_a_new_codebook_fits_the_encoder_that_it_is_for(trained, data, tmp_path):
    """More codes for the same encoder: its outputs are nearer to them before the first step, and a run resumes."""
    folder, _ = trained
    start = {"init_from": str(folder), "revive_until_step": 0}
    config = tokenizer_config(tmp_path / "new", new_codebook=64, **start)
    before, after = (
        set_up(data, replace(config, output_dir=str(tmp_path / str(size)), new_codebook=size)).raw
        for size in (None, 64)
    )
    images = next(batches_once(data.load("train"), ImageSamples(data), stack_images, 20))["images"]
    assert torch.equal(encode_cells(before, images), encode_cells(after, images))
    losses = [model.encode(images).commit_loss.item() for model in (before, after)]
    assert losses[1] < 0.7 * losses[0]
    train_tokenizer(data, replace(config, max_train_steps=3))
    train_tokenizer(data, config)
    train_tokenizer(data, replace(config, output_dir=str(tmp_path / "whole")))
    one, other = (LlamaGenVQModel.from_pretrained(tmp_path / name) for name in ("new", "whole"))
    assert one.config.num_vq_embeddings == len(one.quantize.embedding.weight) == 64
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    with pytest.raises(ValueError, match="new_codebook needs a tokenizer that trains on: set init_from"):
        tokenizer_config(tmp_path, new_codebook=64)


def test_micro_batches_add_up_to_the_batch(data, tmp_path):
    """Without statistics of a whole batch, the parts of a step give the step's gradients."""
    whole = tokenizer_config(tmp_path / "whole", revive_until_step=0)
    train_tokenizer(data, whole)
    train_tokenizer(data, replace(whole, output_dir=str(tmp_path / "parts"), micro_batch_size=1))
    one, other = (LlamaGenVQModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.slow
def test_memory_that_runs_out_halves_the_micro_batch(data, tmp_path, monkeypatch, caplog):
    """A step of 4 goes on as two of 2, and ends with the same weights as one that was set so."""
    forward = LlamaGenVQModel.forward

    def limited(self, images):
        if torch.is_grad_enabled() and len(images) > 2:
            raise RuntimeError("CUDA out of memory.")
        return forward(self, images)

    config = tokenizer_config(tmp_path / "auto", auto_micro_batch_size=True)
    monkeypatch.setattr(LlamaGenVQModel, "forward", limited)
    train_tokenizer(data, config)
    assert "going on with micro_batch_size 2" in caplog.text
    train_tokenizer(data, replace(config, output_dir=str(tmp_path / "set"), micro_batch_size=2))
    one, other = (LlamaGenVQModel.from_pretrained(tmp_path / name).state_dict() for name in ("auto", "set"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_memory_is_not_shared_out_among_processes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "this_process", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="auto_micro_batch_size is for one process; set micro_batch_size instead."):
        train_tokenizer(data, tokenizer_config(tmp_path, auto_micro_batch_size=True))


def test_too_few_images_for_a_batch_is_one_sentence(data, tmp_path):
    with pytest.raises(ValueError, match="20 rows do not fill one batch of 21"):
        train_tokenizer(data, tokenizer_config(tmp_path, batch_size=21))


def test_a_tracker_gets_losses_and_images(data, tmp_path):
    pytest.importorskip("tensorboard", reason="the test extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_tokenizer(data, tokenizer_config(tmp_path, report_to="tensorboard"))
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.*") if "llamagen" == path.parent.name}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("reconstruction")] == [2, 4, 6]
    assert [event.step for event in events.Images("samples")] == [3, 6]


def test_an_absent_tracker_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="report_to is 'comet_ml', which is not installed"):
        train_tokenizer(data, tokenizer_config(tmp_path, report_to="comet_ml"))
