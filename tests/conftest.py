import gc
import os
import tempfile


# Before transformers, diffusers and huggingface_hub read them: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models gain nothing from threads, and lose a lot where something else runs beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Trainings are compared to the last bits, on machines with fast bfloat16 and without.
os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")
# What tests compile is not for the user's cache folder.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "llamagen_tests_compiled"))

import pytest  # noqa: E402


# This file imports nothing large: the process that hands out tests to the workers reads it too.

# Modules and collected tests stay to the end; looking for garbage among them took a sixth of the time.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def quiet():
    from diffusers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture
def class_pipe():
    from tiny import build_class_pipeline

    return build_class_pipeline()


@pytest.fixture
def text_pipe():
    from tiny import build_text_pipeline

    return build_text_pipeline()


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)
