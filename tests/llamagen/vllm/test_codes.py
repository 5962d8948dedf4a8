"""Codes that vLLM draws, against those of our own loop and of the released code."""

import os
import random

import pytest
import torch
from parity import goldens, released_transformer
from tiny import build_transformer


pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

from vllm_engines import engines  # noqa: E402


def class_conditions(config):
    return {"class_ids": config.vocab_size + torch.arange(6)}


def text_conditions(config):
    torch.manual_seed(1)
    mask = torch.ones(6, config.condition_length, dtype=torch.long)
    for row, padding in enumerate((0, 1, 5, 8, 10, 11)):
        mask[row, :padding] = 0
    embeds = torch.randn(6, config.condition_length, config.condition_dim) * mask[..., None]
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


CONDITIONS = {"class": class_conditions, "text": text_conditions}
# Room for three images of 64 codes, not for eight; prompts that are longer than a step may be.
COUNT = 12 if os.environ.get("TRITON_INTERPRET") == "1" else 40  # the interpreter takes its time
NARROW = {"block_size": 32, "num_gpu_blocks_override": 8, "max_num_seqs": 8, "max_num_batched_tokens": 16}


@pytest.fixture(scope="module", params=["class", "text"])
def pair(request, tmp_path_factory):
    """Few blocks and short steps, so that prompts are read in parts and requests are preempted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        model = build_transformer(conditioning=request.param, grid_size=8)
        conditions = CONDITIONS[request.param](model.config)
        folder = tmp_path_factory.mktemp(request.param)
        with engines(folder, model, conditions, disable_log_stats=False, **NARROW) as pair:
            yield pair


def count_preemptions(llm):
    return next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


@pytest.mark.parametrize("name, conditioning", [("c2i_tiny", "class"), ("t2i_tiny", "text")])
def test_greedy_codes_equal_the_released_ones(name, conditioning, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model, golden = released_transformer(name), goldens(name)
    if conditioning == "class":
        conditions = {"class_ids": 96 + golden["generate_class_labels"]}
    else:
        conditions = {key: golden[key] for key in ("prompt_embeds", "prompt_attention_mask")}
    expected, requests = [], []
    with engines(tmp_path, model, conditions) as pair:
        for scale, interval, key in [(1, -1, "1"), (3, -1, "3"), (3, 5, "3_interval5")]:
            expected += golden[f"greedy_guidance{key}"].tolist()
            settings = {"guidance_scale": scale, "guidance_interval": interval, "temperature": 0}
            requests += [pair.request(index, **settings) for index in range(3)]
        assert pair.theirs(requests) == expected  # all in one batch


def test_images_of_all_settings_in_one_batch_equal_ours_drawn_alone(pair):
    rng = random.Random(0)
    requests = [
        pair.request(
            rng.randrange(6),
            [rng.randrange(64) for _ in range(rng.choice((0, 0, 1, 17, 63)))],
            seed=rng.randrange(2**64),
            guidance_scale=rng.choice((0, 1, 1.5, 4.0, 7.5)),
            guidance_interval=rng.choice((-1, -1, 0, 20)),
            temperature=rng.choice((0, 0.005, 0.7, 1, 1.3)),
            top_k=rng.choice((0, 1, 10, 1000)),
            top_p=rng.choice((0, 0.3, 0.95, 1)),
        )
        for _ in range(COUNT)
    ]
    before = count_preemptions(pair.llm)
    images = pair.theirs(requests)
    assert count_preemptions(pair.llm) > before
    assert images == pair.ours(requests)
    assert len(set(map(tuple, images))) > COUNT // 2
    # In another order, with other neighbours.
    order = rng.sample(range(COUNT), COUNT // 2)
    assert pair.theirs([requests[i] for i in order]) == [images[i] for i in order]


def test_a_seed_is_an_image(pair):
    first, second, other = pair.theirs([pair.request(seed=seed, guidance_scale=2.0) for seed in (7, 7, 8)])
    assert first == second != other


def test_the_condition_and_the_scale_matter(pair):
    """What the equality of both sides does not show."""
    settings = {"temperature": 0, "guidance_scale": 4.0}
    images = pair.theirs([pair.request(index, **settings) for index in range(6)])
    assert len(set(map(tuple, images))) == 6
    scales = pair.theirs([pair.request(temperature=0, guidance_scale=scale) for scale in (0, 1, 4)])
    assert len(set(map(tuple, scales))) == 3


def test_heads_of_an_odd_width_and_grouped_queries(tmp_path, monkeypatch):
    """As the released 3B's, 100 wide, which no kernel takes."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model = build_transformer(hidden_size=400, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05)
    with engines(tmp_path, model, class_conditions(model.config)) as pair:
        requests = [pair.request(index, guidance_scale=2.0, seed=index) for index in range(6)]
        assert pair.theirs(requests) == pair.ours(requests)


@pytest.mark.slow
def test_compiled_codes_equal_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model = build_transformer(conditioning="text")
    with engines(tmp_path, model, text_conditions(model.config), enforce_eager=False) as pair:
        requests = [pair.request(index, guidance_scale=2.0, seed=index) for index in range(6)]
        assert pair.theirs(requests) == pair.ours(requests)
