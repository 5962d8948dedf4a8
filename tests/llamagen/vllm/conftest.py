import os


# vLLM's CPU backend takes half of the memory for keys and values unless told otherwise.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_NO_USAGE_STATS"] = "1"

if os.environ.get("TRITON_INTERPRET") == "1":
    # vLLM's newer model runner needs Triton, which has no backend for CPUs. Its interpreter runs the kernels there,
    # once vLLM believes that there is one.
    from types import SimpleNamespace

    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
