"""What vLLM is asked, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import build_transformer, generators

from llamagen_hf.llamagen.noise import draw_noise_keys
from llamagen_hf.llamagen.sampling import guide, sample


pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

from vllm import EngineArgs, SamplingParams  # noqa: E402
from vllm_engines import save_checkpoint  # noqa: E402

from llamagen_hf.llamagen.vllm import GenerationSettings, engine_arguments, sampling_params  # noqa: E402
from llamagen_hf.llamagen.vllm.engine_args import check_start  # noqa: E402
from llamagen_hf.llamagen.vllm.model import LlamaGenTwin  # noqa: E402
from llamagen_hf.llamagen.vllm.processor import GuidedSampling  # noqa: E402
from llamagen_hf.llamagen.vllm.weight_loading import pad_heads  # noqa: E402


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"extra_args": {"guidance_scale": -1}}, "`guidance_scale` is -1"),
        ({"extra_args": {"guidance_scale": float("nan")}}, "`guidance_scale` is nan"),
        ({"extra_args": {"guidance_interval": 1.5}}, "`guidance_interval` is 1.5"),
        ({"extra_args": {"temperature": "hot"}}, "`temperature` is hot"),
        ({"extra_args": {"top_k": -1}}, "`top_k` is -1"),
        ({"extra_args": {"top_p": 2}}, "`top_p` is 2"),
        ({"extra_args": {"seed": -1}}, "`seed` is -1; expected an integer from 0 to 18446744073709551615"),
        ({"extra_args": {"prefix_length": -1}}, "`prefix_length` is -1"),
        (
            {"extra_args": {"guidence_scale": 2}},
            "`extra_args` has guidence_scale; it may have guidance_scale, ",
        ),
        ({"temperature": 0.5}, "SamplingParams has `temperature` 0.5; expected 0"),
        ({"seed": 3}, "SamplingParams has `seed`, which does nothing here"),
        ({"logprobs": 2}, "SamplingParams has `logprobs`"),
        ({"allowed_token_ids": [1]}, "SamplingParams has `allowed_token_ids`"),
        ({"repetition_penalty": 1.2}, "SamplingParams has `repetition_penalty`"),
    ],
)
def test_parameters_that_draw_nothing_sensible_are_refused(changes, message):
    GuidedSampling.validate_params(sampling_params(build_transformer().config, GenerationSettings()))
    with pytest.raises(ValueError, match=message):
        GuidedSampling.validate_params(SamplingParams(**{"temperature": 0.0, **changes}))


def test_vllm_is_started_as_it_must_be(tmp_path):
    arguments = engine_arguments(save_checkpoint(build_transformer(conditioning="text"), tmp_path))
    check_start(EngineArgs(**arguments).create_engine_config())
    for name, missing in [
        ("logits_processors", "logits_processors"),
        ("enable_prompt_embeds", "enable_prompt_embeds"),
        ("enable_prefix_caching", "enable_prefix_caching=False"),
        ("hf_overrides", "hf_overrides"),
    ]:
        given = {key: value for key, value in arguments.items() if key != name}
        with pytest.raises(
            ValueError, match=f"vLLM lacks {missing}.* start it with llamagen_hf.llamagen.vllm.engine_args"
        ):
            check_start(EngineArgs(**given).create_engine_config())


def test_there_must_be_a_checkpoint(tmp_path):
    with pytest.raises(OSError, match="is not a checkpoint"):
        engine_arguments(tmp_path)


def twin_logits(batch, vocab_size=64):
    torch.manual_seed(0)
    return torch.randn(batch, 2 * vocab_size), torch.full((batch, 3), -torch.inf)


def build_processor(states=None):
    config = build_transformer().config
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(generator_config=config)),
    )
    return GuidedSampling(vllm_config, states), config


def test_a_row_keeps_its_code_alone_and_ones_that_overflow_say_so():
    processor, config = build_processor()
    logits, padding = twin_logits(3)
    for row in range(3):
        params = sampling_params(config, GenerationSettings(seed=row, guidance_scale=2.0))
        processor.rows[row] = processor._new_row(params, None, [0] * row)
    keys = draw_noise_keys(3, generators(0, 1, 2), torch.device("cpu"))
    expected = sample(guide(logits[:, :64], logits[:, 64:], 2.0), keys, torch.arange(3))
    result = processor.apply(torch.cat([logits, padding], dim=1))
    assert torch.equal(result.argmax(1), expected) and (result.isfinite().sum(1) == 1).all()
    logits[1, 70] = torch.inf
    result = processor.apply(torch.cat([logits, padding], dim=1))
    assert result.argmax(1).tolist() == [expected[0], 64, expected[2]]


def test_slots_of_the_newer_runner_draw_as_rows_of_the_older_one():
    lengths = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([1, 0, 5, 0, 1])))
    processor, config = build_processor(lengths)
    logits, padding = twin_logits(3)
    slots, drawn = [4, 0, 2], [3, 0, 7]
    for slot in slots:
        processor.add_request(slot, sampling_params(config, GenerationSettings(seed=slot)))
    context = SimpleNamespace(idx_mapping_np=np.array(slots), seq_lens_upper_bound_np=np.array([4, 1, 12, 99]))
    result = processor.apply(torch.cat([logits, padding], dim=1), context)
    keys = draw_noise_keys(3, generators(*slots), torch.device("cpu"))
    assert torch.equal(result.argmax(1), sample(logits[:, :64], keys, torch.tensor(drawn)))


@pytest.mark.parametrize("words, prefix, codes", [(12, 0, 5), (3, 4, 0), (1, 2, 3)])
def test_the_last_word_stands_right_before_the_first_code(words, prefix, codes):
    config = build_transformer(conditioning="text").config
    tokens = [config.vocab_size] * words + list(range(prefix + codes))
    model = SimpleNamespace(config=config)
    positions, offset = LlamaGenTwin.get_mrope_input_positions(model, tokens, [])
    assert positions.shape == (3, len(tokens)) and (positions == positions[0]).all()
    assert positions[0, words] == config.condition_length == words + offset


def test_wider_heads_compute_the_same():
    torch.manual_seed(0)
    # In double precision, since the order of sums differs with the width.
    shapes = [(200, 32), (200, 32), (200, 32), (32, 200), (7, 32)]
    query, key, value, output, x = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    wide = [pad_heads(weight, 100, 112, dim) for weight, dim in ((query, 0), (key, 0), (value, 0), (output, 1))]
    assert wide[0].shape == (224, 32) and wide[3].shape == (32, 224)

    def attend(query, key, value, output):
        q, k, v = ((x @ weight.T).unflatten(1, (2, -1)) for weight in (query, key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k).softmax(-1)
        return torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ output.T

    torch.testing.assert_close(attend(*wide), attend(query, key, value, output))
