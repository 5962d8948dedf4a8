import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_vq_model, generators

from llamagen_hf.images.previews import PREVIEW_SHARE, PreviewSchedule
from llamagen_hf.llamagen.preview import decode_partly


def test_the_last_step_is_what_a_call_returns(text_pipe):
    *_, last = text_pipe.stream("a red apple", generator=generators(3), preview_every=4)
    expected = text_pipe("a red apple", generator=generators(3))
    assert last.images[0].tobytes() == expected.images[0].tobytes()
    assert torch.equal(last.output.codes, expected.codes) and last.output.parameters == expected.parameters


@pytest.mark.parametrize("every, drawn", [(1, range(1, 17)), (4, (4, 8, 12, 16)), (5, (5, 10, 15, 16)), (99, (16,))])
def test_steps_come_every_k_codes(class_pipe, every, drawn):
    steps = list(class_pipe.stream(class_labels=[1, 2], preview_every=every, generator=generators(0, 1)))
    assert [step.codes.shape for step in steps] == [(2, n) for n in drawn]
    assert [step.output is None for step in steps] == [True] * (len(steps) - 1) + [False]
    final = steps[-1].codes
    assert all(torch.equal(step.codes, final[:, : step.codes.shape[1]]) for step in steps)
    assert {step.num_steps for step in steps} == {16}


def test_previews_are_made_when_they_are_looked_at(class_pipe, monkeypatch):
    made, preview = [], class_pipe.preview
    monkeypatch.setattr(class_pipe, "preview", lambda *args: made.append(1) or preview(*args))
    steps = list(class_pipe.stream(class_labels=1, preview_every=4))
    assert made == [] and steps[-1].images is steps[-1].output.images
    assert steps[1].images is steps[1].images and made == [1]


def test_previews_show_what_is_drawn_and_grey(class_pipe):
    steps = list(class_pipe.stream(class_labels=1, preview_every=6, output_type="np"))
    grey = (0.86 + 1) / 2
    first = steps[0].images[0]  # 6 of 4 x 4 codes, each 2 x 2 pixels
    np.testing.assert_allclose(first[4:], grey, atol=1e-6)
    np.testing.assert_allclose(first[2:4, 4:], grey, atol=1e-6)
    assert abs(first[:2] - grey).max() > 0.05 and abs(first[2:4, :4] - grey).max() > 0.05


def test_a_grid_that_is_complete_decodes_as_usual():
    vq_model = build_vq_model()
    codes = torch.randint(64, (2, 16))
    with torch.no_grad():
        whole = vq_model.decode_codes(codes.view(2, 4, 4))
        torch.testing.assert_close(decode_partly(vq_model, codes, 4), whole)
        nothing = decode_partly(vq_model, codes[:, :0], 4)
    assert nothing.shape == whole.shape and nothing.unique().numel() == 1


def test_the_callback_can_preview_too(class_pipe):
    frames = []

    def show(pipe, step, timestep, tensors):
        frames.append(pipe.preview(tensors["codes"])[0].tobytes())
        return {}

    last = class_pipe(class_labels=1, callback_on_step_end=show, generator=generators(0)).images[0]
    assert len(set(frames)) == 16 and frames[-1] == last.tobytes()


def test_leaving_the_loop_stops_the_work_and_leaves_nothing_behind(class_pipe, monkeypatch):
    steps = []
    forward = class_pipe.transformer.forward
    monkeypatch.setattr(class_pipe.transformer, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    stream = class_pipe.stream(class_labels=1, preview_every=4)
    next(stream)
    stream.close()
    assert len(steps) == 4
    expected = class_pipe(class_labels=2, generator=generators(5), output_type="codes").images
    assert torch.equal(expected, class_pipe(class_labels=2, generator=generators(5), output_type="codes").images)


def test_candidates_are_all_watched_and_the_best_comes_last(text_pipe):
    arguments = {"num_candidates": 3, "scorer": lambda images, prompts: [0, 2, 1], "num_images_per_prompt": 1}
    *frames, last = text_pipe.stream("apple", generator=generators(3), preview_every=4, **arguments)
    assert [len(frame.images) for frame in frames] == [3, 3, 3] and len(last.images) == 1
    expected = text_pipe("apple", generator=generators(3), **arguments)
    assert last.images[0].tobytes() == expected.images[0].tobytes()
    assert [candidate.score for candidate in last.output.candidates[0]] == [2, 1, 0]


def test_a_completion_begins_with_what_is_kept(text_pipe):
    image = Image.effect_noise((8, 8), 90).convert("RGB")
    kept = text_pipe.encode_image(image)[:, :2].flatten(1)
    arguments = {"image": image, "keep_rows": 2, "preview_every": 4}
    steps = list(text_pipe.stream("apple", generator=generators(3), **arguments))
    assert [step.codes.shape[1] for step in steps] == [12, 16]
    assert all(torch.equal(step.codes[:, :8], kept) for step in steps)


def test_an_error_on_the_way_comes_out_and_the_next_drawing_is_right(text_pipe):
    def fail(images, prompts):
        raise RuntimeError("no score")

    expected = text_pipe("apple", generator=generators(3)).codes
    stream = text_pipe.stream("apple", num_candidates=2, scorer=fail, preview_every=8)
    assert next(stream).codes.shape == (2, 8)
    with pytest.raises(RuntimeError, match="no score"):
        next(stream)
    assert torch.equal(text_pipe("apple", generator=generators(3)).codes, expected)


def test_streams_side_by_side_draw_what_they_draw_alone(text_pipe):
    prompts = ["apple", "a pear", "fish"]
    alone = [text_pipe(prompt, generator=generators(i)).images[0].tobytes() for i, prompt in enumerate(prompts)]
    streams = [text_pipe.stream(prompt, generator=generators(i), preview_every=1) for i, prompt in enumerate(prompts)]
    *_, last = zip(*streams, strict=True)
    assert [step.images[0].tobytes() for step in last] == alone


def test_gradients_are_off_while_drawing_and_back_in_between(class_pipe):
    for step in class_pipe.stream(class_labels=1, preview_every=8, output_type="pt"):
        assert not step.images.requires_grad
        assert torch.is_grad_enabled()


def test_codes_have_no_previews(class_pipe):
    steps = list(class_pipe.stream(class_labels=1, preview_every=8, output_type="codes"))
    assert torch.equal(steps[0].images, steps[0].codes) and steps[-1].images.shape == (1, 4, 4)


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_preview_every_must_be_a_count(class_pipe, every):
    with pytest.raises(ValueError, match="`preview_every` is"):
        next(class_pipe.stream(class_labels=1, preview_every=every))


def test_by_default_previews_are_cheap():
    schedule, drawing = PreviewSchedule(None, grid_size=2), 0.0
    shown = []
    for num_drawn in range(1, 41):
        time.sleep(0.002)
        if schedule.is_due(num_drawn):
            with schedule.measured():
                time.sleep(0.002)
            shown.append(num_drawn)
    drawing = time.perf_counter() - schedule.start - schedule.spent
    assert shown[0] == 2 and all(n % 2 == 0 for n in shown)
    # The first is free, since what it costs is not known before.
    assert 2 <= len(shown) < 10 and schedule.spent - schedule.last <= PREVIEW_SHARE * drawing + 0.004
