"""Images per second of vLLM against our own loop, on the same requests in one run.

.venv-vllm/bin/python benchmarks/decode_vllm.py --sizes B --images 8 --num-codes 64 [--compile]

- single: our token loop, one image after the other
- batch:  our token loop, all images in one batch
- vllm:   vLLM in this process, all images asked for at once

Weights are random, class-conditional, with a 16x16 grid of 16384 codes. All draw the same images from the same seeds,
and how many codes agree is reported. Modes take turns within each repeat, so that whatever else the machine does hits
all of them; ratios are medians of those within a repeat. Pixels are left out, for they are the same work.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from itertools import islice


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, and so the same threads for all
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import torch
import vllm

from llamagen_hf import (
    AutoregressiveImagePipeline,
    LlamaGenConfig,
    LlamaGenForConditionalGeneration,
    LlamaGenVQModel,
)
from llamagen_hf.llamagen.conversion import VARIANTS
from llamagen_hf.llamagen.decoding import CodeDecoder
from llamagen_hf.llamagen.noise import draw_noise_keys
from llamagen_hf.llamagen.vllm import GenerationSettings, class_prompt, engine_arguments, sampling_params


class Bench:
    """One model, and the ways to draw the same images from it."""

    def __init__(self, size: str, args: argparse.Namespace, folder: str):
        torch.manual_seed(0)
        self.args = args
        dtype = getattr(torch, args.dtype)
        config = LlamaGenConfig(**VARIANTS[size])
        self.model = LlamaGenForConditionalGeneration(config).to(dtype).eval()
        vq_model = LlamaGenVQModel(block_out_channels=(32,), layers_per_block=1)  # pixels are not drawn
        AutoregressiveImagePipeline(vq_model, self.model).save_pretrained(folder)
        self.llm = vllm.LLM(
            **engine_arguments(
                folder, dtype=args.dtype, enforce_eager=not args.compile, max_num_seqs=max(args.images, 2)
            )
        )
        self.device = next(self.llm.llm_engine.model_executor.driver_worker.model_runner.model.parameters()).device
        self.model.to(self.device)
        self.decoder = CodeDecoder(self.model)
        self.settings = {"guidance_scale": args.guidance, "top_k": args.top_k, "top_p": args.top_p}
        self.classes = config.vocab_size + torch.arange(args.images, device=self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in range(args.images)]
        self.keys = draw_noise_keys(args.images, generators, self.device)
        self.prompts = [class_prompt(config, class_id, []) for class_id in self.classes.tolist()]
        self.params = [
            sampling_params(config, GenerationSettings(seed=seed, **self.settings)) for seed in range(args.images)
        ]
        for params in self.params:
            params.max_tokens = args.num_codes
        if args.compile:
            self.decoder.compile()

    def _decode(self, rows: slice) -> torch.Tensor:
        stream = self.decoder.stream(self.keys[rows], class_ids=self.classes[rows], **self.settings)
        (codes,) = deque(islice(stream, self.args.num_codes), maxlen=1)
        stream.close()
        return codes

    def single(self) -> torch.Tensor:
        return torch.cat([self._decode(slice(row, row + 1)).clone() for row in range(self.args.images)])

    def batch(self) -> torch.Tensor:
        return self._decode(slice(None))

    def vllm(self) -> torch.Tensor:
        outputs = self.llm.generate(self.prompts, self.params, use_tqdm=False)
        return torch.tensor([output.outputs[0].token_ids for output in outputs], device=self.device)

    def timed(self, mode: str) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        codes = getattr(self, mode)().cpu()  # waits for the device
        return time.perf_counter() - start, codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(VARIANTS), default=["B"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--num-codes", type=int, default=256, help="codes of an image; fewer measure faster")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the model on all sides")
    modes = ["single", "batch", "vllm"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    args = parser.parse_args()

    print(f"{'size':5} {'mode':7} {'images/s':>9} {'ratio':>7} {'codes':>7}")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(size, args, folder)
        seconds: dict[str, list[float]] = {mode: [] for mode in args.modes}
        for repeat in range(args.repeats + 1):
            codes = {}
            for mode in args.modes:
                elapsed, codes[mode] = bench.timed(mode)
                if repeat:  # the first round warms up and compiles
                    seconds[mode].append(elapsed)
        for mode, times in seconds.items():
            reference = seconds[args.modes[0]]
            ratio = statistics.median(first / mine for first, mine in zip(reference, times, strict=True))
            equal = (codes[mode] == codes[args.modes[0]]).float().mean()
            speed = args.images * args.num_codes / bench.model.config.num_codes / statistics.median(times)
            print(f"{size:5} {mode:7} {speed:9.3f} {ratio:6.2f}x {equal:6.1%}", flush=True)
    print(
        f"{bench.device.type}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
        f"vllm {vllm.__version__}\n"
        f"{args.images} images, guidance {args.guidance}, {args.dtype}, {args.num_codes} codes, {args.repeats} repeats"
    )


if __name__ == "__main__":
    main()
