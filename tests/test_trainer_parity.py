"""Our training beside transformers' Trainer with PEFT: the same losses, step by step."""

from benchmarks import vs_peft_trainer as benchmark
from config import replace

STEPS = 50


def test_fifty_steps_have_the_losses_of_trainer_and_peft(tiny_config, tmp_path):
    """`train.py`'s own loop, with packed rows and accumulation, against rows of one sample each."""
    config = replace(
        tiny_config,
        batch_size=1,
        accumulation=2,
        row_tokens=176,
        epochs=9,
        threads=1,
        validation_fraction=0.1,
    )
    differences = benchmark.parity(config, STEPS, tmp_path)
    assert len(differences) == STEPS
    assert max(map(abs, differences)) < 1e-4
