"""Packages of compiled code: they compute what the module computes, and are made once."""

import os

import pytest
import torch

import llamagen_hf.loading.package
from llamagen_hf.loading.package import load_package


pytestmark = pytest.mark.slow


class Counter(torch.nn.Module):
    """Counts its calls in a tensor of the caller's."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, x, calls):
        calls.add_(1)
        return self.linear(x)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "packages"


@pytest.fixture
def inputs():
    return torch.randn(2, 8), torch.zeros(1, dtype=torch.long)


@torch.no_grad()
def test_a_package_computes_what_the_module_does_and_is_made_once(folder, inputs, monkeypatch):
    module, (x, calls) = Counter().eval(), inputs
    with torch.inference_mode():
        run = load_package(module, inputs)
    torch.testing.assert_close(run(x + 1, calls), module.linear(x + 1))
    assert calls == 1
    (file,) = folder.iterdir()
    os.utime(file, (0, 0))

    def refuse(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    torch.testing.assert_close(load_package(module, inputs)(x, calls), module.linear(x))
    assert file.stat().st_mtime > 0  # used just now
    others = [(Counter().eval(), inputs), (module, (x[:1], calls))]
    for other in others:
        with pytest.raises(AssertionError, match="compiled again"):
            load_package(*other)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    with pytest.raises(AssertionError, match="compiled again"):
        load_package(module, inputs)
    torch.set_num_threads(threads)
    assert [*folder.iterdir()] == [file]  # nothing half-written


def test_the_oldest_packages_are_deleted(folder, inputs, monkeypatch):
    folder.mkdir()
    monkeypatch.setattr(llamagen_hf.loading.package, "MAX_BYTES", 10**8)
    for age, size in ((3, 100), (2, 10**8), (1, 1000)):
        with (folder / f"{age}.pt2").open("wb") as file:
            file.truncate(size)
        os.utime(folder / f"{age}.pt2", (10 - age, 10 - age))
    load_package(Counter().eval(), inputs)
    assert len([*folder.iterdir()]) == 2 and (folder / "1.pt2").exists()
