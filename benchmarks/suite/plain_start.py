"""What a new process does to its first token, or over one step of training, by the libraries alone.

    python -m benchmarks.suite.plain_start '{"what": "answer", "threads": 1, "folder": LLAVA, ...}'

Nothing of PhiSight's rooms is used but the text of errors: this is a script as a user of
transformers and PEFT writes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from errors import PhiSightError, run_main

ROWS, TOKENS = 24, 200  # of a step, as in the tiny preset; a conversation is cut at so many


def answer(asked: dict[str, Any]) -> None:
    """Print the first token of the answer to a question about a picture."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(asked["threads"])
    processor = AutoProcessor.from_pretrained(asked["folder"])
    model: Any = LlavaForConditionalGeneration.from_pretrained(asked["folder"], dtype=torch.float32)
    content = [{"type": "image", "path": asked["image"]}, {"type": "text", "text": asked["text"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    made = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    print(made[0, -1].item(), flush=True)


def resume(asked: dict[str, Any]) -> None:
    """Load the base, the adapter and AdamW's state, make one step, and save both again."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(asked["threads"])
    tokenizer = AutoTokenizer.from_pretrained(asked["base"])
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(asked["base"], dtype=torch.float32),
        peft.LoraConfig(
            r=16,
            lora_alpha=16,
            lora_dropout=0.05,
            target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    file = Path(asked["state"])
    if file.is_file():
        state = torch.load(file, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        peft.set_peft_model_state_dict(model, state["adapter"])
        torch.set_rng_state(state["rng"])
    records = json.loads(Path(asked["data"]).read_text(encoding="utf-8"))[:ROWS]
    texts = ["\n".join(said["value"] for said in one["conversations"]) for one in records]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.train()
    model(**batch, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    adapter = peft.get_peft_model_state_dict(model)
    rng = torch.get_rng_state()
    torch.save({"adapter": adapter, "optimizer": optimizer.state_dict(), "rng": rng}, file)


def main() -> None:
    asked = json.loads(sys.argv[-1])
    ways = {"answer": answer, "resume": resume}
    if asked["what"] not in ways:
        raise PhiSightError(f"{asked['what']}: choose one of {', '.join(ways)}")
    ways[asked["what"]](asked)


if __name__ == "__main__":
    run_main(main)
