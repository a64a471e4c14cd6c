"""Phi-3, Phi-3.5 and Phi-4-mini: fused projections as the decoder has them, and LongRoPE.

Phi-4-mini (arXiv:2503.01743) is the same layout with options that Phi-3 mini does not use: only a
part of each head turns, heads share keys and values, and the head is the embedding.
"""

from data.chat_forms.phi3 import PHI3 as PHI3_CHAT
from data.chat_forms.phi4 import PHI4 as PHI4_CHAT
from model.families.family import Family

PHI3 = Family(
    model_type="phi3",
    name="Phi-3",
    architecture="Phi3ForCausalLM",
    chat_forms=(PHI3_CHAT, PHI4_CHAT),
    is_fused=True,
    rope_kinds={
        "default": "default",
        "longrope": "longrope",
        "su": "longrope",  # the older names that its files have
        "yarn": "longrope",
    },
    has_partial_rotary=True,
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
)
