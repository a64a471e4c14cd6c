"""The other side of benchmarks/vs_peft_trainer.py: transformers' Trainer with PEFT, as a user of
these libraries writes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.collate import IGNORED
from errors import PhiSightError
from lora.layer import LoRALinear, secure_four_bit
from model.base import BaseModel
from ops.nf4 import PanelLinear, bitsandbytes_form
from training.run import Run


class PeftWithPictures(nn.Module):
    """A PEFT model whose picture places are filled with projected features."""

    language_model: Any  # PEFT's own class, which delegates to the model inside

    def __init__(self, language_model: nn.Module, projector: nn.Module, placeholder: int) -> None:
        super().__init__()
        self.language_model, self.projector = language_model, projector
        self.placeholder = placeholder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        image_features: Tensor,
        **loss_settings: Any,
    ) -> Any:
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        pictures = self.projector(image_features).flatten(0, 1)  # (places, dim)
        places = (input_ids == self.placeholder)[..., None]
        return self.language_model(
            inputs_embeds=embeddings.masked_scatter(places, pictures),
            attention_mask=attention_mask,
            labels=labels,
            **loss_settings,
        )


def peft_model(run: Run) -> PeftWithPictures:
    """The model of `run`, its LoRA layers replaced by PEFT's with the same A and B.

    `run`'s own model is taken apart for it: the base is there once.
    """
    import peft

    own, config = run.parts.base.model, run.config
    ours = {name: module for name, module in own.named_modules() if isinstance(module, LoRALinear)}
    for name, layer in ours.items():
        own.set_submodule(name, layer.base)
    base = hub_base(run.parts.base)
    base.is_loaded_in_4bit = config.quantization != "none"  # PEFT chooses its layer class by it
    adapted = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # takes a fraction too
            lora_dropout=config.lora_dropout,
            target_modules=list(config.lora_targets),
            task_type="CAUSAL_LM",
        ),
    )
    with torch.no_grad():
        for name, layer in ours.items():
            theirs = base.get_submodule(name)
            theirs.lora_A["default"].weight.copy_(layer.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.lora_B)
    return PeftWithPictures(adapted, run.parts.model.projector, run.parts.chat_format.image_id)


def hub_base(base: BaseModel) -> Any:
    """transformers' own Phi-3 over the very weights of our base, quantised as they are."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config.from_dict(dict(base.hub_config))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        theirs: Any = Phi3ForCausalLM(config)
    for name, module in base.model.named_modules():
        if isinstance(module, PanelLinear):
            theirs.set_submodule(name, bitsandbytes_layer(module))
        elif isinstance(module, bnb.nn.Linear4bit):
            theirs.set_submodule(name, module)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            # Embeddings and head are kept in 16 bits, which theirs would not multiply by float32.
            weight = module.weight.detach().to(base.compute_dtype)
            theirs.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    if base.model.config.tie_word_embeddings:
        theirs.lm_head.weight = theirs.model.embed_tokens.weight
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=config)
    return theirs.requires_grad_(False)


def bitsandbytes_layer(layer: PanelLinear) -> bnb.nn.Linear4bit:
    """The same codes and scales as bitsandbytes' own layer."""
    codes, state = bitsandbytes_form(layer)
    own = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=state.dtype,
        quant_type="nf4", compress_statistics=False, device="meta",
    )  # fmt: skip
    own.quant_state = state
    own.weight = bnb.nn.Params4bit(
        codes, requires_grad=False, quant_state=state, blocksize=state.blocksize,
        compress_statistics=False, quant_type="nf4", module=own, bnb_quantized=True,
    )  # fmt: skip
    secure_four_bit(own)
    return own


class Samples(torch.utils.data.Dataset):
    """Rendered samples as the Trainer takes them."""

    def __init__(self, run: Run) -> None:
        self.samples, self.store = run.data.train, run.store

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        labels = [
            token if supervised else IGNORED
            for token, supervised in zip(sample.input_ids, sample.supervised, strict=True)
        ]
        return {
            "input_ids": sample.input_ids,
            "labels": labels,
            "attention_mask": [1] * len(labels),
            "image_features": [self.store.features_of(name) for name in sample.images],
        }


def padding_collator(run: Run) -> Callable[[list[dict]], dict[str, Tensor]]:
    """Some of `Samples` -> a batch of rows of one sample each, padded to the longest."""
    from transformers import DataCollatorForSeq2Seq

    tokenizer = run.parts.base.tokenizer.full
    tokenizer.pad_token_id, tokenizer.padding_side = run.parts.chat_format.padding_id, "right"
    pad = DataCollatorForSeq2Seq(tokenizer, padding=True)

    def collator(features: list[dict]) -> dict[str, Tensor]:
        pictures = [one for feature in features for one in feature.pop("image_features")]
        stacked = torch.stack(pictures) if pictures else torch.zeros(0, *run.store.shape)
        return {**pad(features), "image_features": stacked}

    return collator


def trainer_of(run: Run, model: nn.Module, batches: list[list[int]], total: int) -> Any:
    """A Trainer that takes these micro-batches in this order."""
    from transformers import Trainer, TrainingArguments

    config, samples, collator = run.config, Samples(run), padding_collator(run)

    class InThisOrder(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(samples, batch_sampler=batches, collate_fn=collator)

    arguments = TrainingArguments(
        output_dir=str(Path(config.run) / "trainer"),
        use_cpu=True,
        report_to="none",
        max_steps=total,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=math.ceil(total * config.warmup_fraction),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_gradient_norm,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=config.seed,
    )
    return InThisOrder(model=model, args=arguments, train_dataset=samples, data_collator=collator)


def train_theirs(
    run: Run, steps: list[list[list[int]]], on_step: Callable[[], None] = lambda: None
) -> list[float]:
    """Each step's loss, by the Trainer; `on_step` is called after each."""
    from transformers import TrainerCallback

    if any(len(step) != run.config.accumulation for step in steps):
        raise PhiSightError(
            "accumulation: the last step of an epoch has fewer rows, which the"
            " Trainer is not told; choose a number of steps within whole ones"
        )
    losses: list[float] = []
    batches = [micro for step in steps for micro in step]
    trainer = trainer_of(run, peft_model(run), batches, run.total_steps)
    inner, sums = trainer.training_step, []

    def training_step(*arguments: Any, **settings: Any) -> Tensor:
        loss = inner(*arguments, **settings)
        sums.append(loss)  # already divided by the answer tokens of the whole window
        return loss

    class AtStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            losses.append(float(sum(sums)))
            sums.clear()
            on_step()
            control.should_training_stop = len(losses) == len(steps)

    trainer.training_step = training_step
    trainer.add_callback(AtStep())
    trainer.train()
    return losses


def grouped(run: Run, steps: list[list[list[int]]]) -> list[list[list[int]]]:
    """The same samples as Trainer's group_by_length orders them, in batches of one size."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    samples = [i for step in steps for micro in step for i in micro]
    size = math.ceil(len(samples) / len(steps))
    order = LengthGroupedSampler(
        size,
        lengths=[len(run.data.train[i].input_ids) for i in samples],
        generator=torch.Generator().manual_seed(run.config.seed),
    )
    ordered = [samples[place] for place in order]
    return [[ordered[start : start + size]] for start in range(0, len(ordered), size)]
