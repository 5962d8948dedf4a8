"""What a training runs on: its precision where nobody says, and what the log tells of it."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState


pytest.importorskip("datasets", reason="the training extra is not installed")

from tiny_training import tokenizer_config, write_shapes  # noqa: E402

from llamagen_hf.llamagen.training.vq_trainer import train_tokenizer  # noqa: E402
from llamagen_hf.training.hardware import can_compile, fast_precision, run_sentence  # noqa: E402


CPU = torch.device("cpu")


@pytest.fixture
def new_state():
    """Accelerate keeps the precision of a process's first training."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx512_f": True}, "no"), ({}, "no")],
)
def test_bfloat16_is_for_cpus_that_have_instructions_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast_precision(CPU) == expected
    assert fast_precision(torch.device("cuda")) is None and not can_compile(torch.device("cuda"))


@pytest.mark.parametrize(("said", "expected"), [(None, "bfloat16 (mixed precision)"), ("no", "float32")])
def test_the_log_says_what_runs_and_how_much_memory_it_takes(new_state, tmp_path, monkeypatch, caplog, said, expected):
    """By default what the machine is fast at; what the launcher says comes first."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    if said is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
    caplog.set_level("INFO")
    train_tokenizer(write_shapes(tmp_path / "shapes"), tokenizer_config(tmp_path / "run", max_train_steps=1))
    threads = torch.get_num_threads()
    assert f"Training by 1 process(es) on cpu with {threads} thread(s) in {expected}." in caplog.text
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert 0.1 < logged[0]["memory_gb"] < 100


def test_a_run_that_is_to_be_compiled_needs_a_compiler(new_state, tmp_path, monkeypatch):
    monkeypatch.setattr("llamagen_hf.loading.compilation.missing_for_cpu", lambda: "a compiler")
    config = tokenizer_config(tmp_path / "run", max_train_steps=1, compile=True)
    with pytest.raises(ValueError, match="Compiling for a CPU takes a compiler, or go on without"):
        train_tokenizer(write_shapes(tmp_path / "shapes"), config)


def test_a_compiled_run_says_so():
    assert run_sentence(torch.device("cuda"), 2, "bf16", True).endswith(
        "on cuda in bfloat16 (mixed precision), compiled."
    )
