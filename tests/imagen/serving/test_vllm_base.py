"""A cascade whose base vLLM draws for: the server's side of it, with a stand-in for vLLM itself."""

import base64
import io

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from tiny import generators
from tiny_cascade import build_cascade
from tiny_diffusion import build_diffusion_pipeline
from tiny_unclip import build_unclip

from llamagen_cli.serve import load_frontend
from llamagen_hf import AutoregressiveImagePipeline, CascadePipeline
from llamagen_hf.llamagen.serving import vllm_engine
from llamagen_hf.llamagen.serving.batch import ContinuousBatch, GenerationRequest
from llamagen_hf.serving.app import build_app
from llamagen_hf.serving.service import ImageService
from llamagen_hf.serving.settings import ServingSettings


class StandIn:
    """`VLLMEngine`, as far as the server asks it: it loads what vLLM would load, and takes what vLLM would take."""

    is_alive = True

    def __init__(self, checkpoint, max_num_seqs: int):
        folder = AutoregressiveImagePipeline.find_checkpoint(checkpoint) / "transformer"
        self.batch = ContinuousBatch.from_pretrained(str(folder), slots=2 * max_num_seqs)
        self.config = self.batch.model.config

    async def draw(
        self, class_label=None, prompt_embeds=None, prompt_attention_mask=None, prefix_codes=(), seed=None, **sampling
    ):
        assert class_label is None and prompt_embeds.shape == (self.config.condition_length, self.config.condition_dim)
        condition = {"prompt_embeds": prompt_embeds, "prompt_attention_mask": prompt_attention_mask}
        request = GenerationRequest(seed=seed, prefix_codes=list(prefix_codes), **condition, **sampling)
        self.batch.add("image", request)
        while not self.batch.is_idle:
            yield self.batch.step().latents["image"]

    def shutdown(self) -> None:
        pass


def build_enlarged_unclip() -> CascadePipeline:
    base = build_unclip("autoregressive", "autoregressive")
    return CascadePipeline(base, build_diffusion_pipeline(text=False, upsamples=True))


@pytest.mark.parametrize("build", [build_cascade, build_enlarged_unclip])
@pytest.mark.parametrize("is_saved", [True, False])
def test_images_are_those_of_the_cascade(tmp_path, monkeypatch, build, is_saved):
    monkeypatch.setattr(vllm_engine, "VLLMEngine", StandIn)
    cascade = build()
    if is_saved:
        cascade.save_pretrained(tmp_path / "base")
        frontend, _, base = load_frontend(str(tmp_path / "base"), None, "cpu", torch.float32)
    else:  # as by --upsampler
        cascade.base.save_pretrained(tmp_path / "base")
        cascade.upsampler.save_pretrained(tmp_path / "large")
        frontend, _, base = load_frontend(str(tmp_path / "base"), str(tmp_path / "large"), "cpu", torch.float32)
    backend = vllm_engine.VLLMBackend(base, max_num_seqs=1)
    settings = {"guidance_scale": 2.0, "top_k": 9, "upsampler_num_inference_steps": 2}
    with TestClient(build_app(ImageService(frontend, backend, ServingSettings("tiny")))) as client:
        while client.get("/ready").status_code != 200:
            pass
        for size, pipe in ((16, cascade), (8, cascade.base)):
            fields = settings if size == 16 else {name: settings[name] for name in ("guidance_scale", "top_k")}
            body = {"prompt": "a cat", "seed": 3, "size": f"{size}x{size}"}
            answer = client.post("/v1/images/generations", json=body | settings).json()
            image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
            expected = pipe("a cat", generator=generators(3), **fields).images[0]
            assert image.size == (size, size) and image.tobytes() == expected.tobytes()
