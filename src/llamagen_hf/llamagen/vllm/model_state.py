"""Inputs of requests in vLLM's newer model runner, which the older one carries without help."""

from dataclasses import replace

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class LlamaGenModelState(DefaultModelState):
    """vLLM's state, but for the ids from which positions are counted.

    vLLM puts zeros where embeddings stand, and so hides where the words of a text end. After a preemption the ids go
    on with the codes that were drawn.
    """

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        prompt = new_req_data.prompt_token_ids
        ids = prompt + new_req_data.prefill_token_ids[len(prompt) :]
        super().add_request(req_index, replace(new_req_data, prefill_token_ids=ids))
