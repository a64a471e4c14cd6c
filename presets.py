"""The presets: which fields of the config each one overrides, and why. A path is the project's."""

from __future__ import annotations

from typing import Any

DEFAULT_PRESET = "tiny"

TINY: dict[str, Any] = {
    # Two cores, about 1 M weights, one epoch of 20,000 short conversations: see the README.
    "base": "assets/tiny/phi3",
    "vision": "assets/tiny/clip",
    "base_cache": "",  # a base of a million weights is quantised sooner than it is looked up
    "speech": "assets/tiny/whisper/tiny.pt",  # hears the world's own questions, in English
    "data": "cache/world/train.json",
    "images": "cache/world/images",
    "held_out_questions": "cache/world/held_out.jsonl",
    "novel_pair_questions": "cache/world/novel_pairs.jsonl",
    "run": "runs/tiny",
    # The shortest length that the conversations (mostly 40 to 150 tokens) fill to 97 %.
    "row_tokens": 352,
    "batch_size": 6,  # about 2,000 tokens a step, so that one epoch makes 900 steps
    "accumulation": 1,  # a small model learns more from many small steps than from few large ones
    "learning_rate": 3e-3,  # a narrow model takes, and needs, a higher rate than a wide one
    "gradient_checkpointing": "none",  # memory is not short; computing twice would cost a third
    "evaluate_steps": 200,  # an evaluation takes as long as ten steps
    "evaluation_conversations": 100,
    "save_steps": 100,  # a step takes a quarter of a second; saving every 25 would be felt
}

PRESETS: dict[str, dict[str, Any]] = {"phi35": {}, "tiny": TINY}
