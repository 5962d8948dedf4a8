"""LoRA adapters in a pipeline: which of them draw, and what is said and saved about them."""

import logging

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import build_class_pipeline, build_text_pipeline, build_transformer, generators

from llamagen_hf import AutoregressiveImagePipeline
from llamagen_hf.loading.lora import LoraLoaderMixin, lora_config
from llamagen_hf.loading.offloading import OffloadingMixin


pytest.importorskip("peft", reason="the lora extra is not installed")

LOADS = "transformers.modeling_utils", "transformers.integrations.peft", "transformers.utils.loading_report"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters "a" and "b", as training saves them; alpha / rank is not 1."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        donor = build_transformer()
        donor.add_adapter(lora_config(3, alpha=7))
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight_name, weight in donor.named_parameters():
                if "lora" in weight_name:
                    weight.normal_(std=0.3)
        donor.save_pretrained(root / name)
    return root


@pytest.fixture
def pipe(folder):
    """Both adapters loaded."""
    pipe = build_class_pipeline()
    for name in "ab":
        pipe.load_lora_weights(folder / name, adapter_name=name)
    return pipe


def logits_of(pipe):
    with torch.no_grad():
        return pipe.transformer(torch.tensor([[65, 1, 2, 3]])).logits


def with_weights(folder, **weights):
    """Logits of weights to which the adapters' products are added by hand."""
    pipe = build_class_pipeline()
    state = pipe.transformer.state_dict()
    for name, weight in weights.items():
        adapter = load_file(folder / name / "adapter_model.safetensors")
        for key in adapter:
            if "lora_A" in key:
                target = key.removeprefix("base_model.model.").replace("lora_A.", "")
                state[target] += weight * 7 / 3 * adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
    return logits_of(pipe)


def lora(folder, name, **more):
    return {"path": str(folder / name), "name": name} | more


def test_the_one_loaded_last_draws_alone(folder, pipe):
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]} and pipe.get_active_adapters() == ["b"]
    torch.testing.assert_close(logits_of(pipe), with_weights(folder, b=1))
    assert pipe(class_labels=1).parameters[0]["lora"] == pipe.loras == [lora(folder, "b")]


def test_adapters_are_chosen_weighted_switched_and_deleted(folder, pipe):
    plain = logits_of(build_class_pipeline())
    pipe.set_adapters(["a", "b"], [0.7, 1.0])
    torch.testing.assert_close(logits_of(pipe), with_weights(folder, a=0.7, b=1))
    assert pipe.loras == [lora(folder, "a", weight=0.7), lora(folder, "b")]
    pipe.disable_lora()
    assert torch.equal(logits_of(pipe), plain)
    assert pipe.loras == [] and "lora" not in pipe(class_labels=1).parameters[0]
    pipe.enable_lora()
    pipe.delete_adapters("b")
    torch.testing.assert_close(logits_of(pipe), with_weights(folder, a=0.7))
    assert pipe.loras == [lora(folder, "a", weight=0.7)]
    with pytest.raises(ValueError, match=r"There is no adapter 'b'; there are \['a'\]"):
        pipe.delete_adapters(["a", "b"])
    pipe.delete_adapters("a")
    assert torch.equal(logits_of(pipe), plain) and pipe.loras == [] and pipe.get_list_adapters() == {}
    assert pipe.transformer.state_dict().keys() == build_transformer().state_dict().keys()


def test_a_weight_for_some_layers_is_named_by_layer(folder, pipe):
    pipe.set_adapters("a", {"transformer": {"layers.0": 0.25}})
    weights = pipe.loras[0]["weight"]
    assert {name.split(".")[2]: weight for name, weight in weights.items()} == {"0": 0.25, "1": 1.0}
    again = build_class_pipeline()
    again.load_loras(pipe.loras)
    assert again.loras == pipe.loras and torch.equal(logits_of(again), logits_of(pipe))


def test_fused_adapters_are_unfused_or_final(folder, pipe):
    plain = logits_of(build_class_pipeline())
    pipe.set_adapters(["a", "b"], [0.7, 0.5])
    pipe.fuse_lora()
    drawn = logits_of(pipe)
    torch.testing.assert_close(drawn, with_weights(folder, a=0.7, b=0.5))
    both = [lora(folder, "a", weight=0.7, fused=True), lora(folder, "b", weight=0.5, fused=True)]
    assert pipe.loras == both and pipe.num_fused_loras == 2
    for change in (
        lambda: pipe.set_adapters("a", 0.1),
        lambda: pipe.delete_adapters("a"),
        lambda: pipe.load_lora_weights(folder / "a", adapter_name="c"),
        lambda: pipe.fuse_lora(lora_scale=0.5),
    ):
        with pytest.raises(ValueError, match="Adapters are fused: call unfuse_lora"):
            change()
    assert pipe.loras == both and torch.equal(logits_of(pipe), drawn)
    pipe.disable_lora()
    assert pipe.loras == []
    torch.testing.assert_close(logits_of(pipe), plain)
    pipe.enable_lora()
    pipe.set_adapters("a", 0.1)
    assert pipe.loras == [lora(folder, "a", weight=0.1)]
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.loras == [lora(folder, "a", weight=0.05, fused=True)]
    pipe.unfuse_lora()
    torch.testing.assert_close(logits_of(pipe), with_weights(folder, a=0.05))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.unload_lora_weights()
    torch.testing.assert_close(logits_of(pipe), with_weights(folder, a=0.05))
    assert pipe.loras == [lora(folder, "a", weight=0.05, fused=True)]
    pipe.load_lora_weights(folder / "b", adapter_name="b")
    assert pipe.loras == [lora(folder, "a", weight=0.05, fused=True), lora(folder, "b")]
    again = build_class_pipeline()
    again.load_loras(pipe.loras)
    assert again.loras == pipe.loras
    torch.testing.assert_close(logits_of(again), logits_of(pipe))


def test_one_that_is_final_is_not_taken_for_a_later_one_of_its_name(folder):
    pipe = build_class_pipeline()
    pipe.load_lora_weights(folder / "a")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folder / "b")
    assert pipe.loras == [{"path": str(folder / "a"), "fused": True}, {"path": str(folder / "b")}]
    torch.testing.assert_close(logits_of(pipe), with_weights(folder, a=1, b=1))
    again = build_class_pipeline()
    again.load_loras(pipe.loras)
    assert again.loras == pipe.loras and torch.equal(logits_of(again), logits_of(pipe))


def test_a_fused_pipeline_saves_under_its_own_names_and_goes_on(pipe, tmp_path):
    with pytest.raises(ValueError, match="call fuse_lora"):
        pipe.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    pipe.fuse_lora()
    drawn = logits_of(pipe)
    pipe.save_pretrained(tmp_path / "fused")
    saved = load_file(tmp_path / "fused" / "transformer" / "model.safetensors")
    assert saved.keys() == build_transformer().state_dict().keys()
    assert not (tmp_path / "fused" / "transformer" / "adapter_config.json").exists()
    assert torch.equal(logits_of(AutoregressiveImagePipeline.from_pretrained(tmp_path / "fused")), drawn)
    pipe.unfuse_lora()
    assert pipe.get_active_adapters() == ["b"]
    pipe.unload_lora_weights()
    torch.testing.assert_close(logits_of(pipe), logits_of(build_class_pipeline()))


def test_names_are_free_or_refused_and_nothing_is_reported_missing(folder, caplog, capsys):
    pipe = build_class_pipeline()
    for name in LOADS:
        caplog.set_level(logging.INFO, name)
    with caplog.at_level(logging.INFO):
        pipe.load_lora_weights(folder / "a")
        pipe.load_lora_weights(folder / "b")
    said = caplog.text + "".join(capsys.readouterr())
    assert "MISSING" not in said and "UNEXPECTED" not in said
    assert pipe.get_list_adapters() == {"transformer": ["default", "default_1"]}
    with pytest.raises(ValueError, match="There is an adapter 'default_1' already"):
        pipe.load_lora_weights(folder / "a", adapter_name="default_1")
    with pytest.raises(TypeError, match="takes no weight_name"):
        pipe.load_lora_weights(folder / "a", weight_name="other.safetensors")


def test_pipelines_that_share_a_transformer_say_the_same(folder, pipe):
    other = AutoregressiveImagePipeline.from_pipe(pipe)
    assert other.loras == pipe.loras == [lora(folder, "b")]
    pipe.transformer = build_transformer()
    assert pipe.loras == []


def test_the_dtype_and_the_mode_are_the_models(folder):
    pipe = build_class_pipeline().to(torch.bfloat16)
    pipe.load_lora_weights(folder / "a")
    assert {weight.dtype for weight in pipe.transformer.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in pipe.transformer.modules())
    assert pipe(class_labels=1).parameters[0]["dtype"] == "bfloat16"


def test_one_that_does_not_fit_leaves_nothing_behind(folder, pipe, tmp_path):
    def damaged(name, change):
        (tmp_path / name).mkdir()
        weights = load_file(folder / "a" / "adapter_model.safetensors")
        save_file(change(weights), tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_bytes((folder / "a" / "adapter_config.json").read_bytes())
        return tmp_path / name

    before = logits_of(pipe)
    cases = [
        damaged("short", lambda weights: dict(list(weights.items())[1:])),
        damaged("renamed", lambda weights: {name.replace("q_proj", "w_proj"): w for name, w in weights.items()}),
        damaged("wider", lambda weights: {name: torch.cat([w, w], dim=1) for name, w in weights.items()}),
    ]
    (cases[0] / "adapter_config.json").write_text("{")
    cases.append(damaged("cut", dict))
    (cases[-1] / "adapter_model.safetensors").write_bytes(b"cut")
    for path in cases:
        for one in (pipe, build_class_pipeline()):
            keys = one.transformer.state_dict().keys()
            with pytest.raises(ValueError, match="does not fit this model"):
                one.load_lora_weights(path)
            assert one.transformer.state_dict().keys() == keys
    assert torch.equal(logits_of(pipe), before) and pipe.loras == [lora(folder, "b")]
    text = build_text_pipeline()
    text.load_lora_weights(folder / "a")  # its layers are the same
    assert text("apple").parameters[0]["lora"] == [{"path": str(folder / "a")}]


def test_a_compiled_step_keeps_its_adapters(pipe):
    pipe.decoder.compile()
    for change in (pipe.disable_lora, pipe.enable_lora, pipe.fuse_lora, pipe.unload_lora_weights):
        with pytest.raises(ValueError, match="change adapters before compile_step"):
            change()
    with pytest.raises(ValueError, match="change adapters before compile_step"):
        pipe.set_adapters("a")


@pytest.mark.parametrize("kind", ["model", "block_level", "leaf_level", "disk"])
def test_adapters_come_and_go_while_weights_are_offloaded(folder, kind, tmp_path):
    settings = {"class_labels": 1, "output_type": "pt"}
    plain, adapted = build_class_pipeline(), build_class_pipeline()
    adapted.load_lora_weights(folder / "a")
    expected = [pipe(**settings, generator=generators(0)) for pipe in (plain, adapted)]
    assert not torch.equal(expected[0].codes, expected[1].codes)
    pipe = build_class_pipeline()
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "disk":
        pipe.load_lora_weights(folder / "a")
        pipe.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
        assert torch.equal(pipe(**settings, generator=generators(0)).images, expected[1].images)
        with pytest.raises(ValueError, match="change adapters before enable_group_offload"):
            pipe.unload_lora_weights()
        return
    else:
        pipe.enable_group_offload("cpu", offload_type=kind, num_blocks_per_group=1)
    pipe.load_lora_weights(folder / "a")
    assert torch.equal(pipe(**settings, generator=generators(0)).images, expected[1].images)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(pipe(**settings, generator=generators(0)).images, expected[0].images)


class UNetPipeline(LoraLoaderMixin, OffloadingMixin, DiffusionPipeline):
    _lora_loadable_modules = ["unet"]

    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet)


def build_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def test_a_pipeline_names_the_model_that_takes_adapters(tmp_path):
    from peft import LoraConfig

    donor = build_unet()
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, weight in donor.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    peft = pytest.importorskip("peft")
    weights = peft.get_peft_model_state_dict(donor, adapter_name="default")
    save_file(
        {f"base_model.model.{name}": weight for name, weight in weights.items()},
        tmp_path / "adapter_model.safetensors",
    )
    donor.peft_config["default"].save_pretrained(tmp_path)
    pipe, inputs = UNetPipeline(build_unet()), (torch.ones(1, 4, 8, 8), 3, torch.ones(1, 2, 8))

    def predict(unet):
        with torch.no_grad():
            return unet(*inputs).sample

    plain = predict(pipe.unet)
    pipe.load_lora_weights(tmp_path)
    expected = predict(donor)
    assert not torch.equal(expected, plain)
    torch.testing.assert_close(predict(pipe.unet), expected)
    assert pipe.get_list_adapters() == {"unet": ["default"]} and pipe.loras == [{"path": str(tmp_path)}]
    pipe.set_adapters("default", 0.5)
    weighted = predict(pipe.unet)
    again = UNetPipeline(build_unet())
    again.load_loras(pipe.loras)
    torch.testing.assert_close(predict(again.unet), weighted)
    pipe.fuse_lora()
    torch.testing.assert_close(predict(pipe.unet), weighted)
    pipe.save_pretrained(tmp_path / "fused")
    torch.testing.assert_close(predict(UNet2DConditionModel.from_pretrained(tmp_path / "fused" / "unet")), weighted)
    pipe.unload_lora_weights()
    assert pipe.unet.state_dict().keys() == build_unet().state_dict().keys()
    assert pipe.loras == [{"path": str(tmp_path), "weight": 0.5, "fused": True}]
    with pytest.raises(ValueError, match="This pipeline has no unet, which takes adapters"):
        UNetPipeline(None).load_lora_weights(tmp_path)
