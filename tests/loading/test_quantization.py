"""Quantized weights: loaded, saved, told by images, and refused in a sentence."""

import json
import sys

import pytest
import torch
from diffusers import PipelineQuantizationConfig
from PIL import Image
from tiny import build_text_pipeline, generators
from tiny_diffusion import build_diffusion_pipeline
from typer.testing import CliRunner

import llamagen_cli
from llamagen_hf import AutoregressiveImagePipeline, PixelDiffusionPipeline
from llamagen_hf.llamagen.serving.batch import ContinuousBatch, GenerationRequest
from llamagen_hf.llamagen.serving.frontend import LlamaGenFrontend
from llamagen_hf.loading.quantization import MODES, describe_quantization, quantize_components, quantized_names
from llamagen_hf.provenance import read_parameters


pytest.importorskip("torchao", reason="the quantization extra is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    build_text_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized")
    load(checkpoint, "int8").save_pretrained(path)
    return path


def load(path, mode=None, **kwargs):
    if mode is not None:
        kwargs["quantization_config"] = quantize_components({"transformer": mode})
    pipe = AutoregressiveImagePipeline.from_pretrained(path, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    return pipe("a red apple", generator=generators(3))


def invoke(*arguments):
    return CliRunner().invoke(llamagen_cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_saved_pipeline_draws_the_same_codes(checkpoint, tmp_path, mode, dtype):
    pipe = load(checkpoint, mode, dtype=dtype)
    assert type(pipe.transformer.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    again = load(tmp_path, dtype=dtype)
    drawn, redrawn = draw(pipe), draw(again)
    assert torch.equal(redrawn.codes, drawn.codes)
    assert redrawn.images[0].tobytes() == drawn.images[0].tobytes()
    assert redrawn.parameters[0]["quantization"] == drawn.parameters[0]["quantization"] == {"transformer": mode}


def test_int8_changes_logits_a_little_and_takes_a_quarter_of_the_bytes(checkpoint, quantized):
    weight = load(quantized).transformer.model.layers[0].mlp.up_proj.weight
    plain = load(checkpoint).transformer.model.layers[0].mlp.up_proj.weight
    assert 0 < (weight.dequantize() - plain).norm() / plain.norm() < 0.01
    assert weight.qdata.dtype == torch.int8 and weight.qdata.numel() == plain.numel()


def test_every_model_of_a_pipeline_can_be_quantized(checkpoint, tmp_path):
    names = {"transformer": "int8", "text_encoder": "int8-dynamic", "vq_model": "float8"}
    pipe = load(checkpoint, quantization_config=quantize_components(names))
    assert describe_quantization(pipe) == {"quantization": names}
    pipe.save_pretrained(tmp_path)
    assert draw(load(tmp_path)).images[0].tobytes() == draw(pipe).images[0].tobytes()


def test_unets_too(tmp_path):
    build_diffusion_pipeline().save_pretrained(tmp_path / "plain")
    config = quantize_components({"unet": "int8"})
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path / "plain", quantization_config=config)
    pipe.save_pretrained(tmp_path / "int8")
    again = PixelDiffusionPipeline.from_pretrained(tmp_path / "int8")
    settings = {"num_inference_steps": 2, "prompt": "a red apple" if pipe.reads_text else None}
    drawn = pipe(**settings, generator=generators(3))
    assert drawn.parameters[0]["quantization"] == {"unet": "int8"}
    assert again(**settings, generator=generators(3)).images[0].tobytes() == drawn.images[0].tobytes()
    assert again.redraw(drawn.parameters[0]).images[0].tobytes() == drawn.images[0].tobytes()
    plain = PixelDiffusionPipeline.from_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="the pipeline has none"):
        plain.redraw(drawn.parameters[0])


def test_other_configurations_are_written_out(checkpoint):
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    def describe(*args, **kwargs):
        config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(*args, **kwargs)})
        return describe_quantization(load(checkpoint, quantization_config=config))["quantization"]["transformer"]

    assert describe(Int8WeightOnlyConfig(set_inductor_config=True)) == "int8"
    assert describe(Int8WeightOnlyConfig(), modules_to_not_convert=["fc1"]).endswith(") without fc1")
    grouped = describe(Int8WeightOnlyConfig(granularity=PerGroup(16)))
    assert grouped.startswith("Int8WeightOnlyConfig(") and '"group_size": 16' in grouped


def test_an_image_is_redrawn_with_its_own_quantization_only(checkpoint, quantized):
    (plain,), (rounded,) = draw(load(checkpoint)).parameters, draw(load(quantized)).parameters
    assert "quantization" not in plain
    with pytest.raises(ValueError, match=r"drawn with the quantization \{'transformer': 'int8'\}, the .* has none"):
        load(checkpoint).redraw(rounded)
    with pytest.raises(ValueError, match="drawn with the quantization none"):
        load(quantized).redraw(plain)
    assert torch.equal(load(quantized).redraw(rounded).codes, draw(load(quantized)).codes)


@pytest.mark.parametrize("is_saved", [False, True])
def test_generate_quantizes_and_draws_again(checkpoint, quantized, tmp_path, is_saved):
    options = ["--checkpoint", quantized] if is_saved else ["--checkpoint", checkpoint, "--quantization", "int8"]
    result = invoke("generate", "a red apple", *options, "--seed", 3, "--output", tmp_path / "apple.png")
    assert result.exit_code == 0, result.output
    assert read_parameters(tmp_path / "apple.png")["quantization"] == {"transformer": "int8"}
    again = invoke("generate", "--from", tmp_path / "apple.png", "--output", tmp_path / "again.png")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "apple.png").read_bytes()


def test_the_server_draws_what_the_pipeline_draws(checkpoint):
    frontend = LlamaGenFrontend.from_pretrained(str(checkpoint), "cpu", torch.float32, "int8")
    batch = frontend.batch_loader(2)()
    assert isinstance(batch, ContinuousBatch) and frontend.facts["quantization"] == {"transformer": "int8"}
    embeds, mask = (part[0] for part in frontend.pipe.encode_prompt("a red apple"))
    request = GenerationRequest(seed=3, prompt_embeds=embeds, prompt_attention_mask=mask, temperature=1.0)
    batch.add("image", request)
    codes = []
    while not batch.is_idle:
        codes += batch.step().latents["image"]
    drawn = load(checkpoint, "int8")("a red apple", guidance_scale=1, generator=generators(3))
    assert codes == drawn.codes.flatten().tolist()


def test_what_does_not_run_is_refused_in_a_sentence(checkpoint, quantized, tmp_path):
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig
    from transformers import TorchAoConfig

    with pytest.raises(ValueError, match="The quantization is 'int3'; expected 'int8', "):
        quantize_components({"transformer": "int3"})
    if not torch.cuda.is_available():
        config = TorchAoConfig(Float8DynamicActivationFloat8WeightConfig())
        with pytest.raises(ValueError, match="Config of torchao does not run on 'cpu' in float32: .* requires"):
            load(
                checkpoint,
                quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": config}),
            )
    build_diffusion_pipeline().save_pretrained(tmp_path / "diffusion")
    for arguments, code, message in [
        (["--checkpoint", quantized, "--quantization", "int8"], 1, "quantized already"),
        (["--checkpoint", tmp_path / "diffusion", "--quantization", "int8"], 1, "`--quantization` is for models that"),
        (["--checkpoint", checkpoint, "--quantization", "int4"], 2, "'int4'"),
    ]:
        result = invoke("generate", "a red apple", *arguments, "--output", tmp_path / "out.png")
        assert result.exit_code == code and message in result.output, result.output
        assert "Traceback" not in result.output and not (tmp_path / "out.png").exists()


def test_without_torchao_a_sentence_says_what_to_install(checkpoint, quantized, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    for options in (["--checkpoint", quantized], ["--checkpoint", checkpoint, "--quantization", "int8"]):
        result = invoke("generate", "a red apple", *options, "--output", tmp_path / "out.png")
        assert result.exit_code == 1 and "pip install llamagen-hf[quantization]" in result.output, result.output
    with pytest.raises(ValueError, match="The transformer of this checkpoint is quantized"):
        LlamaGenFrontend.from_pretrained(str(quantized), "cpu", torch.float32)
    assert load(quantized, transformer=None).transformer is None  # the rest needs none


def test_damaged_parameters_and_incomplete_weights_are_refused(quantized, tmp_path):
    from llamagen_hf.provenance import save_png

    parameters = {"prompt": "a", "seed": 1, "checkpoint": str(quantized), "quantization": 8}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "bad.png", parameters)
    result = invoke("generate", "--from", tmp_path / "bad.png", "--output", tmp_path / "out.png")
    assert result.exit_code == 1 and "These parameters are damaged: quantization is 8" in result.output

    whole = {"_type": "Int8Tensor", "_tensor_data_names": ["qdata", "scale"]}
    header = {"tensor_names": '["a.weight", "b.bias"]', "a.weight": json.dumps(whole), "b.bias": '{"_type": "Tensor"}'}
    assert quantized_names({"a._weight_qdata", "a._weight_scale", "b.bias"}, header) == {"a.weight"}
    assert quantized_names({"a._weight_qdata", "b.bias"}, header) == set()
    assert quantized_names({"a.weight"}, None) == set()
