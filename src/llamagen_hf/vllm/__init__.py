"""LlamaGen on stock vLLM, with classifier-free guidance of its own strength for each request: extra `vllm`."""

MODEL = "llamagen_hf.vllm.model:LlamaGenTwin"


def register() -> None:
    """Make the generator known to vLLM, which calls this in each of its processes (`vllm.general_plugins`)."""
    from vllm import ModelRegistry

    # The second is what our checkpoints say they are; starting vLLM on one as it is gets a sentence of what is missing.
    for architecture in ("LlamaGenTwin", "LlamaGenForConditionalGeneration"):
        ModelRegistry.register_model(architecture, MODEL)
