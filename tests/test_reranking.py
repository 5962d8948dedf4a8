import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_clip, generators

from llamagen_hf.clip import CLIPScorer
from llamagen_hf.reranking import rank_candidates


def test_candidates_are_ranked_within_their_image():
    assert rank_candidates([0.1, 0.9, 0.5, 3.0, 2.0, 4.0], 3) == [[1, 2, 0], [5, 3, 4]]
    assert rank_candidates([1.0, 2.0, 1.0, 2.0], 4) == [[1, 3, 0, 2]]  # equal scores keep their order
    assert rank_candidates([5.0, 1.0], 1) == [[0], [1]]
    assert rank_candidates([], 2) == []
    for scores, num_candidates in (([1.0, 2.0, 3.0], 2), ([1.0], 0)):
        with pytest.raises(ValueError, match=f"{len(scores)} scores can't be divided into groups of {num_candidates}"):
            rank_candidates(scores, num_candidates)


def brightness(images, prompts):
    return [int(np.asarray(image.convert("L"), int).sum()) for image in images]


def test_the_best_is_returned_and_all_are_there(class_pipe):
    output = class_pipe(class_labels=[1, 2], num_candidates=3, scorer=brightness, generator=generators(0, 1))
    assert len(output.images) == 2 and output.codes.shape == (2, 4, 4)
    for image, codes, parameters, candidates in zip(
        output.images, output.codes, output.parameters, output.candidates, strict=True
    ):
        scores = [candidate.score for candidate in candidates]
        assert len(candidates) == 3 and scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
        assert scores == brightness([candidate.image for candidate in candidates], None)
        assert image.tobytes() == candidates[0].image.tobytes()
        assert torch.equal(codes, candidates[0].codes) and parameters == candidates[0].parameters
        for candidate in candidates:
            again = class_pipe.redraw(candidate.parameters)
            assert torch.equal(again.codes[0], candidate.codes)
            assert again.images[0].tobytes() == candidate.image.tobytes()


def test_the_first_candidate_is_the_one_drawn_without(class_pipe):
    alone = class_pipe(class_labels=1, generator=generators(4)).codes[0]
    (candidates,) = class_pipe(class_labels=1, num_candidates=4, scorer=brightness, generator=generators(4)).candidates
    firsts = [candidate for candidate in candidates if "seed_index" not in candidate.parameters]
    assert len(firsts) == 1 and torch.equal(firsts[0].codes, alone)
    assert len({tuple(candidate.codes.flatten().tolist()) for candidate in candidates}) == 4


@pytest.mark.parametrize("output_type", ["pt", "np", "codes"])
def test_scorers_see_images_whatever_is_returned(class_pipe, output_type):
    def settings(kind):
        return {"num_candidates": 3, "scorer": brightness, "generator": generators(0, 1), "output_type": kind}

    expected = class_pipe(class_labels=[1, 2], **settings("pil"))
    output = class_pipe(class_labels=[1, 2], **settings(output_type))
    assert torch.equal(output.codes, expected.codes) and len(output.images) == 2
    assert output.images.shape[1:] == {"pt": (3, 8, 8), "np": (8, 8, 3), "codes": (4, 4)}[output_type]


def test_scorers_get_the_prompt_of_each_image(text_pipe, class_pipe):
    seen = []

    def scorer(images, prompts):
        seen.append(prompts)
        return torch.zeros(len(images))

    text_pipe(["a", "b"], num_candidates=2, num_images_per_prompt=2, scorer=scorer)
    class_pipe(class_labels=["goldfish", 0], num_candidates=2, scorer=scorer)
    assert seen == [["a"] * 4 + ["b"] * 4, ["goldfish"] * 2 + ["tench, Tinca tinca"] * 2]


def loss_of(pipe, codes, **condition):
    """The generator's mean loss of one image's codes."""
    model, codes = pipe.transformer, codes.flatten()[None]
    if "prompt" in condition:
        embeds, mask = pipe.encode_prompt(condition["prompt"])
        inputs = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "input_ids": codes[:, :-1]}
    else:
        ids = torch.tensor([[model.config.vocab_size + condition["class_labels"]]])
        inputs = {"input_ids": torch.cat([ids, codes[:, :-1]], 1)}
    with torch.no_grad():
        return model(**inputs, labels=codes, use_cache=False).loss.item()


@pytest.mark.parametrize("condition", [{"prompt": "a"}, {"class_labels": 1}])
def test_without_a_scorer_the_generators_own_likelihood_chooses(text_pipe, class_pipe, condition):
    pipe = text_pipe if "prompt" in condition else class_pipe
    output = pipe(**condition, num_candidates=4, num_images_per_prompt=2, generator=generators(0, 1))
    for codes, candidates in zip(output.codes, output.candidates, strict=True):
        scores = [candidate.score for candidate in candidates]
        assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
        expected = [-loss_of(pipe, candidate.codes, **condition) for candidate in candidates]
        assert scores == pytest.approx(expected, rel=1e-5)
        assert torch.equal(codes, candidates[0].codes)
    alone = pipe(**condition, num_candidates=4, generator=generators(1), output_type="codes")
    assert torch.equal(alone.images[0], output.codes[1])
    assert [each.score for each in alone.candidates[0]] == pytest.approx([each.score for each in output.candidates[1]])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_candidates": 2, "scorer": "clip"}, "needs a `scorer`"),
        ({"num_candidates": 0, "scorer": brightness}, "`num_candidates` is 0"),
        ({"num_candidates": 2, "scorer": lambda images, prompts: [1.0]}, "a finite number for each of 2 images"),
        ({"num_candidates": 2, "scorer": lambda images, prompts: [1.0, float("nan")]}, "a finite number for each"),
    ],
)
def test_wrong_scorers_are_refused_in_a_sentence(class_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        class_pipe(class_labels=1, **arguments)


def test_clip_scores_are_cosines_and_choose(tmp_path, text_pipe):
    model, processor = build_clip()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    scorer = CLIPScorer.from_pretrained(tmp_path)

    images, prompts = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")], ["a", "a long prompt " * 9]
    scores = scorer(images, prompts)
    inputs = scorer.processor(
        text=["a photo of a", "a photo of " + prompts[1]], images=images, padding=True, truncation=True, max_length=12,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        whole = model(**inputs)
    expected = (whole.image_embeds * whole.text_embeds).sum(-1)
    torch.testing.assert_close(torch.tensor(scores), expected)

    output = text_pipe("a", num_candidates=3, scorer=scorer)
    assert max(scorer([c.image for c in output.candidates[0]], ["a"] * 3)) == output.candidates[0][0].score
