"""Time of one decoding step and of one batch of images, four ways side by side in one run.

python benchmarks/decode.py --sizes B --batch 1 --guidance 4 --dtype bfloat16 [--device cuda] [--num-codes 64]

- dynamic:  a plain loop over transformers' growing cache, eager
- generate: `model.generate()`, with its built-in guidance
- loop:     our token loop, static shapes, eager
- compiled: our token loop, its step compiled

Weights are random, class-conditional, on the released VQ-16 with a 16x16 grid. Modes take turns within each repeat,
so that whatever else the machine does hits all of them; medians are reported. A step is the time of N codes less that
of one, over N - 1; images are pixels from the condition on, tokenizer included. The last column is the share of the
measured copy bandwidth at which a step reads weights and cache, a step's lower bound for few images.
"""

import argparse
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

import diffusers
import torch
import transformers

from llamagen_hf import LlamaGenConfig, LlamaGenForConditionalGeneration, LlamaGenVQModel
from llamagen_hf.llamagen.conversion import VARIANTS
from llamagen_hf.llamagen.decoding import CodeDecoder
from llamagen_hf.llamagen.sampling import guide, sample


class Bench:
    """One model, and the four ways to draw codes from it."""

    def __init__(self, size: str, args: argparse.Namespace):
        torch.manual_seed(0)
        self.args = args
        self.device = torch.device(args.device)
        dtype = getattr(torch, args.dtype)
        with torch.device(self.device):
            self.model = LlamaGenForConditionalGeneration(LlamaGenConfig(**VARIANTS[size])).to(dtype).eval()
            self.vq_model = LlamaGenVQModel().to(dtype).eval()
            self.classes = self.model.config.vocab_size + torch.arange(args.batch)
            self.keys = torch.arange(args.batch)
        self.loop_decoder = CodeDecoder(self.model)
        self.compiled_decoder = CodeDecoder(self.model)
        self.compiled_decoder.compile()

    @torch.no_grad()
    def dynamic(self, num_codes: int) -> torch.Tensor:
        guided = self.args.guidance != 1
        inputs = self.classes[:, None]
        if guided:
            inputs = torch.cat([inputs, torch.full_like(inputs, self.model.config.null_class_id)])
        cache, codes = None, []
        for index in range(num_codes):
            output = self.model(inputs, past_key_values=cache, use_cache=True)
            logits, cache = output.logits[:, -1], output.past_key_values
            if guided:
                logits = guide(*logits.chunk(2), self.args.guidance)
            codes.append(sample(logits, self.keys, index))
            inputs = codes[-1][:, None]
            inputs = inputs.repeat(2, 1) if guided else inputs
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def generate(self, num_codes: int) -> torch.Tensor:
        prompt, options = self.classes[:, None], {}
        if self.args.guidance != 1:
            options["guidance_scale"] = float(self.args.guidance)
            options["negative_prompt_ids"] = torch.full_like(prompt, self.model.config.null_class_id)
        return self.model.generate(prompt, max_new_tokens=num_codes, do_sample=True, top_k=0, **options)[:, 1:]

    def loop(self, num_codes: int) -> torch.Tensor:
        return self._decode(self.loop_decoder, num_codes)

    def compiled(self, num_codes: int) -> torch.Tensor:
        return self._decode(self.compiled_decoder, num_codes)

    def _decode(self, decoder: CodeDecoder, num_codes: int) -> torch.Tensor:
        # Shapes stay those of all the codes, so that fewer of them compile nothing and allocate nothing anew.
        stream = decoder.stream(self.keys, class_ids=self.classes, guidance_scale=self.args.guidance)
        (codes,) = deque(islice(stream, num_codes), maxlen=1)
        stream.close()
        return codes

    def seconds(self, function, *args) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        function(*args)
        synchronize(self.device)
        return time.perf_counter() - start

    @torch.no_grad()
    def pixels(self) -> torch.Tensor:
        side = self.model.config.grid_size
        return self.vq_model.decode_codes(
            torch.zeros(self.args.batch, side, side, dtype=torch.long, device=self.device)
        )

    def step_bytes(self) -> int:
        """Bytes that a step must read: all weights but the embedding table, and the cache."""
        config = self.model.config
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        table = self.model.model.embed_tokens.weight
        rows = self.args.batch * (2 if self.args.guidance != 1 else 1)
        length = -(-(1 + self.args.num_codes) // 8) * 8
        cache = 2 * config.num_hidden_layers * rows * length * config.num_key_value_heads * config.head_dim
        return weights - table.numel() * table.element_size() + cache * table.element_size()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def copy_bandwidth(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second, read and written, of copies larger than any cache."""
    source = torch.randint(256, (2**29 if device.type == "cpu" else 2**31,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        synchronize(device)
        start = clock()
        target.copy_(source)
        synchronize(device)
        times.append(clock() - start)
    return 2 * source.numel() / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(VARIANTS), default=["B"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-codes", type=int, default=256, help="codes of an image; fewer measure faster")
    parser.add_argument("--repeats", type=int, default=5)
    modes = ["dynamic", "generate", "loop", "compiled"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    args = parser.parse_args()
    if args.num_codes < 2 or args.repeats < 1 or args.batch < 1:
        parser.error("--num-codes must be at least 2, --repeats and --batch at least 1")

    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    bandwidth = copy_bandwidth(device)
    print(
        f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, diffusers {diffusers.__version__}, copies at {bandwidth / 1e9:.1f} GB/s"
    )
    print(
        f"batch {args.batch}, guidance {args.guidance}, {args.dtype}, {args.num_codes} codes, {args.repeats} repeats"
    )
    print(f"{'size':5} {'mode':9} {'step ms':>8} {'images s':>9} {'speed-up':>9} {'bandwidth':>10}")
    for size in args.sizes:
        bench = Bench(size, args)
        functions = {mode: getattr(bench, mode) for mode in args.modes}
        times = {mode: {"one": [], "all": []} for mode in functions}
        decode = []
        for repeat in range(args.repeats + 1):
            for mode, function in functions.items():
                one, everything = bench.seconds(function, 1), bench.seconds(function, args.num_codes)
                if repeat:  # the first round warms up and compiles
                    times[mode]["one"].append(one)
                    times[mode]["all"].append(everything)
            decode.append(bench.seconds(bench.pixels))
        pixels = statistics.median(decode[1:])
        reference = None
        for mode in functions:
            whole = statistics.median(times[mode]["all"])
            step = (whole - statistics.median(times[mode]["one"])) / (args.num_codes - 1)
            reference = reference or step
            share = bench.step_bytes() / step / bandwidth
            print(
                f"{size:5} {mode:9} {1e3 * step:8.2f} {whole + pixels:9.2f} {reference / step:8.2f}x {share:9.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
