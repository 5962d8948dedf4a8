"""What a callback gets, and what it may change."""

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from tiny import build_class_pipeline, build_text_pipeline, generators

from llamagen_hf.llamagen.sampling import is_guided


CONDITIONS = {build_class_pipeline: {"class_labels": [1, 2]}, build_text_pipeline: {"prompt": ["apple", "a pear"]}}
builds = pytest.mark.parametrize("build", CONDITIONS)


def draw(pipe, build, **kwargs):
    settings = {"output_type": "codes", "generator": generators(3, 4), "guidance_scale": 3.0}
    return pipe(**CONDITIONS[build] | settings | kwargs)


@builds
def test_it_gets_the_condition_and_the_state_of_the_call(build):
    pipe, seen = build(), []
    assert (pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt) == (None, None, False)

    def look(pipe, step, index, tensors):
        seen.append((step, index))
        state = (pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps, pipe.interrupt)
        assert state == (3.0, True, 13, False)
        assert tensors["codes"].shape == (2, index + 1)
        assert tensors["prompt_embeds"].shape == ((2, 1) if build is build_class_pipeline else (2, 12, 16))

    prefix = torch.tensor([[5, 6, 7]])
    names = ["codes", "prompt_embeds"]
    draw(pipe, build, prefix_codes=prefix, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert seen == [(step, step + 3) for step in range(13)]
    draw(pipe, build, guidance_scale=1)
    assert not pipe.do_classifier_free_guidance


@builds
def test_the_last_code_that_it_changes_is_drawn_on(build):
    def change(pipe, step, index, tensors):
        if index == 4:
            tensors["codes"][:, -1] = 7
            return {"codes": tensors["codes"].clone()}

    pipe = build()
    plain = draw(pipe, build).codes.flatten(1)
    changed = draw(pipe, build, callback_on_step_end=change).codes.flatten(1)
    prefix = torch.cat([plain[:, :4], torch.full((2, 1), 7)], dim=1)
    assert torch.equal(changed, draw(pipe, build, prefix_codes=prefix).codes.flatten(1))


@pytest.mark.parametrize("bad", [0, torch.zeros(1, 1), torch.zeros(2, 2, dtype=torch.long), torch.full((2, 1), 64)])
def test_codes_that_cannot_be_drawn_on_are_refused(bad):
    with pytest.raises(ValueError, match="The callback returned `codes`"):
        draw(build_class_pipeline(), build_class_pipeline, callback_on_step_end=lambda *_: {"codes": bad})


@builds
@pytest.mark.parametrize("cutoff", [{"cutoff_step_index": 5, "cutoff_step_ratio": None}, {"cutoff_step_ratio": 0.4}])
@pytest.mark.parametrize("first", [0, 3])
def test_diffusers_cutoff_turns_guidance_off(build, cutoff, first):
    step = cutoff.get("cutoff_step_index") or int(0.4 * (16 - first))
    guided = [index for index in range(first, 16) if is_guided(index, first + step - 1)]
    assert len(guided) == step + 1  # the code that the callback is called after is guided
    pipe = build()
    start = {"prefix_codes": torch.tensor([[5, 6, 7]])} if first else {}
    plain = draw(pipe, build, **start)
    expected = draw(pipe, build, guidance_interval=first + step - 1, **start)
    got = draw(pipe, build, callback_on_step_end=SDCFGCutoffCallback(**cutoff), **start)
    assert torch.equal(got.codes, expected.codes) and not torch.equal(got.codes, plain.codes)
    assert pipe.guidance_scale == 0 and not pipe.do_classifier_free_guidance
    assert torch.equal(draw(pipe, build, **start).codes, plain.codes)
    unguided = draw(pipe, build, guidance_scale=1, callback_on_step_end=SDCFGCutoffCallback(**cutoff))
    assert torch.equal(unguided.codes, draw(pipe, build, guidance_scale=1).codes)


def test_guidance_changes_step_by_step():
    def change(pipe, step, index, tensors):
        pipe._guidance_scale = 3.0 if index < 7 else 1.5

    pipe, build = build_class_pipeline(), build_class_pipeline
    got = draw(pipe, build, callback_on_step_end=change).codes.flatten(1)
    first = draw(pipe, build).codes.flatten(1)[:, :8]
    rest = draw(pipe, build, guidance_scale=1.5, prefix_codes=first).codes.flatten(1)
    assert torch.equal(got, rest)
    assert not torch.equal(got, draw(pipe, build).codes.flatten(1))
    with pytest.raises(ValueError, match="Guidance was off at the start"):
        draw(pipe, build, guidance_scale=1, callback_on_step_end=change)

    def spoil(pipe, step, index, tensors):
        pipe._guidance_scale = -1.0

    with pytest.raises(ValueError, match="`guidance_scale` is -1.0"):
        draw(pipe, build, callback_on_step_end=spoil)


@pytest.mark.parametrize("num_candidates", [1, 2])
@pytest.mark.parametrize("output_type", ["codes", "pt", "pil"])
def test_an_interrupted_call_gives_what_it_has(output_type, num_candidates):
    def stop(pipe, step, index, tensors):
        pipe._interrupt = index == 5

    build = build_class_pipeline
    pipe = build()
    candidates = {"num_candidates": num_candidates, "scorer": lambda images, names: range(len(images))}
    whole = draw(pipe, build, output_type=output_type)
    output = draw(pipe, build, output_type=output_type, callback_on_step_end=stop, **candidates)
    assert pipe.interrupt and output.codes.shape == (2, 6)
    assert len(output.images) == 2 and output.parameters[0]["interrupted_after"] == 6
    with pytest.raises(ValueError, match="was interrupted"):
        pipe.redraw(output.parameters[0])
    if num_candidates == 1:
        assert torch.equal(output.codes, whole.codes.flatten(1)[:, :6])
        on = draw(pipe, build, prefix_codes=output.codes)
        assert not pipe.interrupt and torch.equal(on.codes, whole.codes)
    if output_type == "pt" and num_candidates == 1:
        assert torch.equal(output.images, pipe.preview(output.codes, "pt"))


def test_several_callbacks_bring_their_own_inputs():
    class Zeros(PipelineCallback):
        tensor_inputs = ["codes"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            callback_kwargs["codes"] = torch.zeros_like(callback_kwargs["codes"])
            return callback_kwargs

    class Foreign(Zeros):
        tensor_inputs = ["latents"]

    build = build_text_pipeline
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    both = MultiPipelineCallbacks([Zeros(), cutoff])
    assert not draw(build(), build, callback_on_step_end=both).codes.any()
    with pytest.raises(ValueError, match="names .'latents'.; there is only"):
        draw(build(), build, callback_on_step_end=Foreign())
