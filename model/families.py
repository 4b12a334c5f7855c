"""The families of models that `Llama` runs: what each of them does otherwise, as data.

A family of this kind is an entry here, and a line in the tests. One whose layers compute something
else needs a layer of its own; some that people ask for are named with the reason.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What is not as in Llama 2, beside the sizes in the config.

    architecture: transformers' class; biases: queries, keys and values have some; head_norms:
    queries and keys are normalised, head by head, before they are rotated; fused: the checkpoint
    holds queries, keys and values as one matrix, and gate and up as one. Layers that rotate nothing
    and windows that attention is limited to are named by configs, whatever the family.
    """

    architecture: str
    biases: bool = False
    head_norms: bool = False
    fused: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", biases=True),
    "qwen3": Family("Qwen3ForCausalLM", head_norms=True),
    "smollm3": Family("SmolLM3ForCausalLM"),
    "phi3": Family("Phi3ForCausalLM", fused=True),
}

_GEMMA = "its norms add one to their weights, and its embeddings are scaled"
_EXPERTS = "it chooses among experts for every token"
_WHY_NOT = {
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA}; layers have four norms, and scores are capped",
    "gemma3": f"{_GEMMA}; layers have four norms, and two kinds of attention take turns",
    "gemma3_text": f"{_GEMMA}; layers have four norms, and two kinds of attention take turns",
    "olmo2": "its norms stand behind attention and MLP, not before them",
    "olmo3": "its norms stand behind attention and MLP, not before them",
    "granite": "it multiplies embeddings, residuals, scores and logits by factors of its own",
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "deepseek_v3": f"{_EXPERTS}, and its keys are compressed",
}


def why_unknown(model_type: object) -> str:
    """What to say of a model that is of none of the families."""
    known = ", ".join(FAMILIES)
    reason = _WHY_NOT.get(str(model_type))
    if reason is not None:
        return f"type {model_type!r}, which needs another layer ({reason}); known are {known}"
    return f"type {model_type!r}; known are {known}"
