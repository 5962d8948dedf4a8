"""vLLM's way to our generator: the entry point `vllm.general_plugins`.

A module of its own, since each process of vLLM runs it, whatever model it serves, and `llamagen_hf` takes a while to
import.
"""

MODEL = "llamagen_hf.llamagen.vllm.model:LlamaGenTwin"


def register() -> None:
    """Make the generator known to vLLM."""
    from vllm import ModelRegistry

    # The second name is the one in our checkpoints: vLLM started on one as it is shall say what is missing.
    for architecture in ("LlamaGenTwin", "LlamaGenForConditionalGeneration"):
        ModelRegistry.register_model(architecture, MODEL)
