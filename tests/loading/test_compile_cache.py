"""Compiled code is kept in the user's cache folder, and the next process starts with it."""

import os
import subprocess
import sys

import pytest
from tiny import build_transformer

from llamagen_hf.loading.compile_cache import keep_compiled_code


STEP = """
import sys
import torch
from torch._dynamo.utils import counters
from llamagen_hf.llamagen.serving.batch import ContinuousBatch

batch = ContinuousBatch.from_pretrained(sys.argv[1], slots=2, compile=True)
with torch.no_grad():
    batch._step(torch.zeros(1, 1, dtype=torch.long))
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # before monkeypatch brings back what there was


def test_the_folder_is_the_users(home):
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(home / "cache" / "llamagen_hf" / "compiled")
    assert (home / "cache" / "llamagen_hf" / "compiled").is_dir()


def test_a_folder_that_is_named_stays(home, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere" and not (home / "cache").exists()


def test_no_folder_no_error(home, monkeypatch):
    (home / "cache").write_text("a file where the folder would be")
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@pytest.mark.slow
def test_a_second_process_compiles_nothing(home):
    build_transformer(num_hidden_layers=1).save_pretrained(home / "transformer")

    def hits_and_misses() -> list[str]:
        command = [sys.executable, "-W", "ignore", "-c", STEP, home / "transformer"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]

    assert hits_and_misses() == ["0", "1"]
    assert hits_and_misses() == ["1", "0"]
