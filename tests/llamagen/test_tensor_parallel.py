"""The tensor-parallel plan, on two processes of this machine."""

import os
import subprocess
import sys

import pytest
import torch
from tiny import build_transformer

from llamagen_hf.llamagen.decoding import CodeDecoder


DRAW = """
import sys, torch
import torch.distributed as dist
from llamagen_hf import LlamaGenForConditionalGeneration
from llamagen_hf.llamagen.decoding import CodeDecoder

model = LlamaGenForConditionalGeneration.from_pretrained(sys.argv[1], tp_plan="auto")
assert isinstance(model.model.layers[0].self_attn.q_proj.weight, dist.tensor.DTensor)
ids = torch.tensor([[65, 3, 4, 5]])
with torch.no_grad():
    logits = model(ids).logits
codes = CodeDecoder(model)(torch.zeros(1, 16), class_ids=ids[:, 0], temperature=0, guidance_scale=2.0)
if dist.get_rank() == 0:
    torch.save({"logits": logits, "codes": codes}, sys.argv[2])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(tmp_path):
    model = build_transformer(num_attention_heads=4)
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "draw.py"
    script.write_text(DRAW)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
         script, tmp_path / "model", tmp_path / "drawn.pt"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    drawn = torch.load(tmp_path / "drawn.pt")
    ids = torch.tensor([[65, 3, 4, 5]])
    torch.testing.assert_close(drawn["logits"], model(ids).logits, atol=1e-5, rtol=1e-4)
    alone = CodeDecoder(model)(torch.zeros(1, 16), class_ids=ids[:, 0], temperature=0, guidance_scale=2.0)
    assert torch.equal(drawn["codes"], alone)
