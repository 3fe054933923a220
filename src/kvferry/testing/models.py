"""Tiny models with random weights, in the shapes of well-known families: real transformers code, made in a moment.

They have no tokenizer: prompts are token ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB_SIZE = 128
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # Wide weights spread the logits, so that equal tokens mean equal computing and not one favourite token.
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "sliding_window": 16,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 24, "head_dim": 8}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            "head_dim": 64,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "first_k_dense_replace": 64,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16}),
    "lfm3": (
        "Lfm3Config",
        {
            "head_dim": 8,
            "sliding_window": 16,
            "num_hidden_layers": 4,
            "layer_types": ["conv", "sliding_attention", "conv", "full_attention"],
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "attention_multiplier": 0.35,
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
}

FAMILIES = tuple(family for family in _FAMILIES if family != "deepseek_v2")
"""Names that `make_model` knows of models that the embedded engine runs: it has no latent attention."""


def make_model(family: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a float32 model of a family to `folder` and return it. `overrides` replace fields of its config."""
    import torch
    import transformers

    config_class, extra = _FAMILIES[family]
    config = getattr(transformers, config_class)(**{**_SIZES, **extra, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder
