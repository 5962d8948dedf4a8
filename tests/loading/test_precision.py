"""`dtype="auto"` is bfloat16 where the device has instructions for it, and float32 elsewhere."""

import pytest
import torch
from tiny import build_class_pipeline, generators

from llamagen_hf import AutoregressiveImagePipeline
from llamagen_hf.loading.precision import resolve_dtype


CPUS = [({"amx_bf16": True}, torch.bfloat16), ({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    build_class_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def cpu(monkeypatch):
    """Makes the machine one with this CPU and without an accelerator."""

    def set_capabilities(found):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    return set_capabilities


@pytest.mark.parametrize(("capabilities", "expected"), CPUS)
def test_auto_is_what_the_cpu_has_instructions_for(cpu, folder, capabilities, expected):
    cpu(capabilities)
    assert resolve_dtype("auto") == resolve_dtype("auto", "cpu") == expected
    assert resolve_dtype("auto", "cuda") == torch.bfloat16
    pipe = AutoregressiveImagePipeline.from_pretrained(folder, dtype="auto")
    assert {p.dtype for model in (pipe.vq_model, pipe.transformer) for p in model.parameters()} == {expected}
    # The parameters of an image say which it was, so that it is drawn again in the same.
    output = pipe(class_labels=1, generator=generators(0))
    assert output.parameters[0]["dtype"] == str(expected)[6:]
    again = AutoregressiveImagePipeline.from_pretrained(folder, dtype=output.parameters[0]["dtype"])
    assert torch.equal(again.redraw(output.parameters[0]).codes, output.codes)


def test_names_of_dtypes_and_other_words():
    assert resolve_dtype("float16") == resolve_dtype(torch.float16) == torch.float16
    for wrong in ("int9", "nn", 16):
        with pytest.raises(ValueError, match="expected a torch.dtype, the name of one, or 'auto'"):
            resolve_dtype(wrong)
