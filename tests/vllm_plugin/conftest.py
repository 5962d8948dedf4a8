import os


# vLLM's CPU backend takes half of the memory for keys and values unless told otherwise.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Nobody is told that tests ran.
os.environ["VLLM_NO_USAGE_STATS"] = "1"
