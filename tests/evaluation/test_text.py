"""CLIP score and R-precision: their definitions, ties, batches, and any CLIP model."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_clip, build_vq_model
from torch.nn import functional as F
from transformers import ByT5Tokenizer, SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipProcessor

from llamagen_hf.clip import embed_images, embed_texts, load_clip
from llamagen_hf.evaluation import text
from llamagen_hf.evaluation.images import open_images
from llamagen_hf.evaluation.text import clip_score, embed_pairs, r_precision, retrieval_recall


PROMPTS = ["a", "bb", "a", "ccc", "d d", "bb", "e", "a long prompt " * 3]


def random_images(count: int = len(PROMPTS)) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def build_siglip() -> tuple[SiglipModel, SiglipProcessor]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=sizes | {"vocab_size": 384, "max_position_embeddings": 12},
        vision_config=sizes | {"image_size": 8, "patch_size": 4},
    )
    image_processor = SiglipImageProcessorPil(size={"height": 8, "width": 8})
    return SiglipModel(config).eval(), SiglipProcessor(image_processor, ByT5Tokenizer())


def test_clip_score_by_its_definition():
    images, texts = torch.randn(20, 8), torch.randn(20, 8)
    pairs = zip(images.numpy(), texts.numpy(), strict=True)
    expected = np.mean([100 * np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    assert clip_score(images, texts) == pytest.approx(expected, rel=1e-5)
    assert clip_score(images.numpy(), -images.numpy()) == pytest.approx(-100)  # not cut off at 0
    order = torch.randperm(20)
    rows = order.argsort().tolist()
    assert clip_score(images, texts[order], rows) == pytest.approx(clip_score(images, texts))


def test_r_precision_among_all_prompts_is_the_share_of_best_ones():
    images, texts = torch.randn(50, 4), torch.randn(12, 4)
    own = torch.randint(12, (50,))
    best = (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(1)
    assert r_precision(images, texts, own, num_candidates=12) == pytest.approx((best == own).float().mean().item())


def test_r_precision_draws_others_and_never_the_own_prompt():
    embeddings = torch.eye(30)
    assert r_precision(embeddings, embeddings, num_candidates=30) == 1
    assert r_precision(embeddings, -embeddings, num_candidates=2) == 0
    # Each image fits its own prompt second best, so it is right exactly where the best was not drawn.
    images = embeddings + 2 * embeddings.roll(1, 1)
    expected = 1 - 9 / 29
    values = [r_precision(images, embeddings, num_candidates=10, seed=seed) for seed in range(40)]
    assert np.mean(values) == pytest.approx(expected, abs=0.03) and len(set(values)) > 1
    assert values[3] == r_precision(images, embeddings, num_candidates=10, seed=3)


@pytest.mark.parametrize("num_candidates", [2, 7, 100])
def test_equal_scores_of_all_texts_count_one_in_n(num_candidates):
    texts = torch.randn(1, 512).expand(120, -1)
    assert r_precision(torch.randn(120, 512), texts, num_candidates=num_candidates) == pytest.approx(
        1 / num_candidates
    )


def test_a_tie_of_two_counts_half():
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert r_precision(texts, texts, num_candidates=3) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_r_precision_does_not_depend_on_the_batch_size(monkeypatch):
    images, texts = torch.randn(150, 3), torch.randn(150, 3)
    whole = r_precision(images, texts, num_candidates=5)
    monkeypatch.setattr(text, "IMAGES_AT_A_TIME", 7)
    assert r_precision(images, texts, num_candidates=5) == pytest.approx(whole) and 0 < whole < 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3, 4), torch.zeros(3, 5)), "image embeddings are 4 wide and the text embeddings 5"),
        ((torch.zeros(3, 4), torch.zeros(2, 4)), "without `prompt_of` their numbers must be equal"),
        ((torch.zeros(3, 4), torch.zeros(2, 4), [0, 1, 2]), "each of 3 images a row of the 2 text embeddings"),
        ((torch.zeros(3, 4), torch.zeros(2, 4), [0, 1]), "each of 3 images a row of the 2 text embeddings"),
        ((torch.full((3, 4), torch.nan), torch.zeros(3, 4)), "3 of 3 image embeddings hold NaN"),
        ((torch.zeros(3, 4), torch.zeros(3)), "text embeddings have shape"),
    ],
)
def test_embeddings_that_do_not_fit(arguments, message):
    for metric in (clip_score, r_precision):
        with pytest.raises(ValueError, match=message):
            metric(*arguments)


def test_retrieval_finds_any_image_of_a_text():
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.9], [0.0, 0.3, 1.0], [0.0, 0.6, 0.9]])
    assert retrieval_recall(images, texts, [0, 1, 2, 1]) == (3 / 4, 1.0)  # the last image is nearer to the third text
    assert retrieval_recall(images, texts, [0, 2, 2, 1]) == (2 / 4, 2 / 3)


def test_too_few_prompts_for_r_precision():
    with pytest.raises(ValueError, match="among 100 prompts needs as many different ones.*there are 6"):
        r_precision(*embed_pairs(random_images(), PROMPTS, *build_clip()))
    with pytest.raises(ValueError, match="among 1 prompts"):
        r_precision(torch.eye(3), torch.eye(3), num_candidates=1)


@pytest.mark.parametrize("build", [build_clip, build_siglip])
def test_images_and_prompts_with_any_model_and_any_batch_size(build):
    model, processor = build()
    expected = embed_pairs(random_images(), PROMPTS, model, processor)
    with torch.no_grad():
        inputs = processor(
            text=PROMPTS, images=random_images(), padding="max_length" if build is build_siglip else True,
            max_length=12, truncation=True, return_tensors="pt",
        )  # fmt: skip
        if build is build_siglip:  # SigLIP's own tokenizer returns none
            del inputs["attention_mask"]
        whole = model(**inputs)
    cosines = (F.normalize(whole.image_embeds, dim=-1) * F.normalize(whole.text_embeds, dim=-1)).sum(-1)
    assert clip_score(*expected) == pytest.approx(100 * cosines.mean().item(), rel=1e-4)
    for size in (1, 3):
        found = embed_pairs(random_images(), PROMPTS, model, processor, batch_size=size)
        assert clip_score(*found) == pytest.approx(clip_score(*expected), rel=1e-4)
        precision = r_precision(*expected, num_candidates=3)
        assert r_precision(*found, num_candidates=3) == pytest.approx(precision, rel=1e-4)


def test_images_may_come_one_by_one():
    model, processor = build_clip()
    images = random_images()
    expected = clip_score(*embed_pairs(images, PROMPTS, model, processor))
    for source in (open_images(images), iter(images), (np.array(image) for image in images)):
        assert clip_score(*embed_pairs(source, PROMPTS, model, processor)) == expected
    with pytest.raises(ValueError, match="There are 7 images and 8 prompts"):
        embed_pairs(images[:7], PROMPTS, model, processor)


def test_prompts_that_images_share_are_not_drawn_against_each_other():
    model, processor = build_clip()
    with torch.no_grad():
        texts = embed_texts(model, processor, ["a", "b"])
        images = embed_images(model, processor, random_images(6))
    prompts = ["a", "b", "a", "a", "b", "b"]
    own = torch.tensor([0, 1, 0, 0, 1, 1])
    expected = ((images @ texts.T).argmax(1) == own).float().mean().item()
    found = r_precision(*embed_pairs(random_images(6), prompts, model, processor), num_candidates=2)
    assert found == pytest.approx(expected)


def test_the_template_is_what_clip_reads():
    model, processor = build_clip()
    plain = clip_score(*embed_pairs(random_images(), [f"x {prompt}" for prompt in PROMPTS], model, processor))
    assert clip_score(*embed_pairs(random_images(), PROMPTS, model, processor, template="x {}")) == plain


def test_models_without_embeddings_are_refused(tmp_path):
    with pytest.raises(OSError, match="There is no CLIP model with a processor at 'no/such-model'"):
        load_clip("no/such-model")
    build_vq_model().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="There is no CLIP model with a processor"):
        load_clip(tmp_path)
    model, processor = build_clip()
    model.text_model.save_pretrained(tmp_path / "text")
    processor.save_pretrained(tmp_path / "text")
    with pytest.raises(OSError, match="holds CLIPTextModel, not a CLIP model"):
        load_clip(tmp_path / "text")
