"""SmolLM2 in Llama's layout: transformers reads it as its own, and we read it as it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import torch
from real_weights import real_weights
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from errors import PhiSightError
from model.base import load_base
from tools.small.llama_layout import write_llama

WORDS = ["<|endoftext|>", "<|im_start|>", "<|end|>", *"abcdefgh"]


@pytest.fixture
def phi3_folder(tmp_path) -> Path:
    """As SmolLM2 is stored with Phi-3's marks: two rows of the embedding belong to these."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=len(WORDS) + 2, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        original_max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=0, rms_norm_eps=3e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi3")
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(WORDS)}, []))
    tokenizer.add_special_tokens([AddedToken(WORDS[2], rstrip=True, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True), AddedToken("<|system|>")])
    tokenizer.save(str(tmp_path / "phi3" / "tokenizer.json"))
    return tmp_path / "phi3"


@torch.no_grad()
def test_the_weights_are_the_same_and_the_tokens_are_smollm2s(phi3_folder, tmp_path):
    write_llama(phi3_folder, tmp_path / "llama")
    ids = torch.arange(len(WORDS))[None]
    old = Phi3ForCausalLM.from_pretrained(phi3_folder)(ids).logits
    new = LlamaForCausalLM.from_pretrained(tmp_path / "llama")(ids).logits
    assert new.shape[-1] == len(WORDS)
    torch.testing.assert_close(new, old[..., : len(WORDS)], rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    assert len(tokenizer) == len(WORDS)
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    said = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    turns = "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n"
    assert said == f"{turns}<|im_start|>assistant\n"


def test_another_folder_is_refused_and_nothing_is_written(phi3_folder, tmp_path):
    tokenizer = json.loads((phi3_folder / "tokenizer.json").read_text(encoding="utf-8"))
    del tokenizer["model"]["vocab"]["<|end|>"]
    (phi3_folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    for folder in (phi3_folder, runs.ROOT / "assets/tiny/phi3"):
        with pytest.raises(PhiSightError) as caught:
            write_llama(folder, tmp_path / "llama")
        assert str(caught.value) == (
            f"{folder}: not SmolLM2 in Phi-3's layout (fused projections, <|end|> in the"
            " vocabulary); give the folder smollm2-phi3 of the real weights"
        )
    assert not (tmp_path / "llama").exists()


@pytest.mark.real
@torch.no_grad()
def test_smollm2_itself_has_the_logits_of_transformers_and_says_what_it_knows(tmp_path):
    source, folder = real_weights("smollm2-phi3"), tmp_path / "llama"
    write_llama(source, folder)
    base = load_base(folder, None, torch.float32, "cpu", "none")
    hub = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    for text in (ids, torch.randint(17, 49152, (1, 300), generator=torch.Generator())):
        length = text.shape[1]
        states = base.model.model(
            base.model.model.embed_tokens(text), torch.arange(length)[None], [length]
        )
        assert torch.equal(base.model.lm_head(states), hub(text).logits)
    said = hub.generate(ids, max_new_tokens=2, do_sample=False)[0]
    assert tokenizer.decode(said) == "The capital of France is Paris."
