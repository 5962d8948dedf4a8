"""The released code (FoundationVision/LlamaGen) from a checkout, in the words of our benchmarks. None of it is here.

What differs from its scripts: the models run on whatever device is asked for, where the scripts name CUDA; weights are
random, and the output layer, which the released code sets to zero, too; the training step is that of `train_c2i.py`
without DistributedDataParallel and without a scaler, which bfloat16 and float32 do not use.
"""

import importlib
import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn


class Enough(Exception):
    """As many codes as were asked for; the released `generate` has no other way to stop early."""


class Released:
    """The modules of a checkout.

    Args:
        folder (`Path`): A checkout of FoundationVision/LlamaGen.

    Raises:
        ValueError: If it is none.
    """

    def __init__(self, folder: Path):
        if not (folder / "autoregressive/models/generate.py").is_file():
            raise ValueError(f"{str(folder)!r} is no checkout of FoundationVision/LlamaGen.")
        sys.path.insert(0, str(folder.resolve()))
        # The released code asks for math attention through a context that torch has deprecated.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*sdp_kernel")
        self.gpt = importlib.import_module("autoregressive.models.gpt")
        self.generation = importlib.import_module("autoregressive.models.generate")
        self.tokenizer = importlib.import_module("tokenizer.tokenizer_image.vq_model")

    def generator(self, size: str, grid_size: int) -> nn.Module:
        """A class-conditional generator with random weights."""
        model = self.gpt.GPT_models[f"GPT-{size}"](block_size=grid_size**2)
        nn.init.normal_(model.output.weight, std=model.config.initializer_range)
        return model.eval()

    def vq_model(self) -> nn.Module:
        """VQ-16 with random weights."""
        return self.tokenizer.VQ_models["VQ-16"]().eval()

    def codes(
        self, model: nn.Module, classes: torch.Tensor, num_codes: int, limit: int, greedy: bool, **sampling
    ) -> Iterator[torch.Tensor]:
        """Generate with the released `generate`, and hand out the codes `(batch,)` of the first `limit` steps.

        Times between them are seconds of a code: the loop is not left before all are drawn.
        """
        drawn, decode = [], self.generation.decode_one_token

        def recording(model, codes, *args, **kwargs):
            drawn.append((time.perf_counter(), time.process_time(), codes[: len(classes), 0].clone()))
            if len(drawn) == limit:
                raise Enough
            return decode(model, codes, *args, **kwargs)

        with patch.object(self.generation, "decode_one_token", recording):
            try:
                self.generation.generate(model, classes, num_codes, sample_logits=not greedy, **sampling)
            except Enough:
                pass
        yield from drawn


class ReleasedTraining:
    """The training step of `train_c2i.py`, as many at a time as wanted.

    Args:
        model (`torch.nn.Module`): The released generator.
        batches (`list[dict]`): `codes` and `class_labels` of each step.
        mixed_precision (`str`): `"bf16"` or `"no"`.
        compile (`bool`): As the script does unless told otherwise.
    """

    def __init__(self, model: nn.Module, batches: list[dict], mixed_precision: str, compile: bool):
        self.model, self.batches, self.bfloat16 = model.train(), batches, mixed_precision == "bf16"
        self.forward: Callable = torch.compile(model) if compile else model
        matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == kind] for kind in (True, False))
        groups = [{"params": matrices, "weight_decay": 5e-2}, {"params": vectors, "weight_decay": 0.0}]
        fused = {"fused": True} if "fused" in inspect.signature(torch.optim.AdamW).parameters else {}
        self.optimizer = torch.optim.AdamW(groups, 1e-4, (0.9, 0.95), **fused)

    def train_steps(self, steps: int) -> list[torch.Tensor]:
        """Take `steps` steps; their losses."""
        losses = []
        for batch in self.batches[:steps]:
            codes, classes = batch["codes"], batch["class_labels"]
            with torch.autocast(codes.device.type, torch.bfloat16, enabled=self.bfloat16):
                _, loss = self.forward(cond_idx=classes, idx=codes[:, :-1], targets=codes)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return losses
