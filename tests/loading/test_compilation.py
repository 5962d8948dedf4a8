"""Compiling says what it lacks, and its code is kept in the user's cache folder, where the next process finds it."""

import os
import subprocess
import sys

import pytest
import torch
from tiny import build_class_pipeline, build_transformer

from llamagen_hf.llamagen.serving.batch import ContinuousBatch
from llamagen_hf.loading.compilation import check_compiler, keep_compiled_code, missing_for_cpu


SENTENCE = (
    "Compiling for a CPU takes a C\\+\\+ compiler: install g\\+\\+, or name another one in the variable CXX, or go on"
)
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


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", refuse)


def test_it_is_missed(no_compiler):
    assert missing_for_cpu().startswith("a C++ compiler")
    check_compiler(torch.device("cuda"))  # which needs none
    with pytest.raises(ValueError, match=SENTENCE):
        check_compiler(torch.device("cpu"))


def test_headers_are_missed(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert missing_for_cpu() == "Python's headers: install them (python3-dev)"


def test_steps_are_not_compiled_without_it(no_compiler):
    pipe = build_class_pipeline()
    with pytest.raises(ValueError, match=SENTENCE):
        pipe.compile_step()
    assert not pipe.is_compiled and len(pipe(class_labels=1).images) == 1
    with pytest.raises(ValueError, match=SENTENCE):
        ContinuousBatch(build_transformer(), slots=2).compile()
