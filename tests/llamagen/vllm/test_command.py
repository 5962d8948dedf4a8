"""`llamagen serve --engine vllm`: the server's whole API, with the images that the pipeline draws."""

import base64
import io
import signal

import pytest
from tiny import generators


pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

import numpy as np  # noqa: E402
import openai  # noqa: E402
from PIL import Image  # noqa: E402
from serving_client import running_command, save_text_checkpoint  # noqa: E402

from llamagen_hf import AutoregressiveImagePipeline  # noqa: E402


def pixels(b64_json):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def drawn(pipe, prompt, seed, **settings):
    return np.asarray(pipe(prompt, generator=generators(seed), **settings).images[0])


def test_serves_what_the_pipeline_draws(tmp_path):
    folder = save_text_checkpoint(tmp_path / "tiny")
    pipe = AutoregressiveImagePipeline.from_pretrained(folder)
    upload = Image.effect_noise((8, 8), 90).convert("RGB")
    file = io.BytesIO()
    upload.save(file, "PNG")
    fields = {"seed": 5, "guidance_scale": 3.0, "top_k": 40}
    with running_command(folder, tmp_path / "log", "--engine", "vllm", "--slots", "8", seconds=600) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        answer = client.images.generate(prompt="a fish", n=3, extra_body=fields)
        for data, seed in zip(answer.data, (5, 6, 7), strict=True):
            expected = drawn(pipe, "a fish", seed, guidance_scale=3.0, top_k=40)
            assert data.seed == seed and np.array_equal(pixels(data.b64_json), expected)

        fields = {"seed": 9, "guidance_scale": 1.0}
        events = list(client.images.generate(prompt="a tree", stream=True, partial_images=1, extra_body=fields))
        assert events[0].type == "image_generation.partial_image" and events[-1].type == "image_generation.completed"
        assert np.array_equal(pixels(events[-1].b64_json), drawn(pipe, "a tree", 9, guidance_scale=1.0))

        (edited,) = client.images.edit(
            image=("noise.png", file.getvalue()), prompt="a fish", extra_body=fields | {"keep_rows": 3}
        ).data
        expected = drawn(pipe, "a fish", 9, guidance_scale=1.0, image=upload, keep_rows=3)
        assert np.array_equal(pixels(edited.b64_json), expected)

        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.images.generate(prompt="a fish", extra_body={"temperature": -1})
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0, running.log.read_text()
