"""Training, beside transformers' Trainer with PEFT: the same samples, weights, optimiser, threads.

    python benchmarks/vs_peft_trainer.py [--shapes tiny,mid] [--repeats 5] [--steps 8]
    python benchmarks/vs_peft_trainer.py --parity            # losses of 50 steps, dropout 0

Both sides start from the same NF4 base (ours, from `load_base`), the same A, B and projector, and
see the same samples in every step; AdamW, schedule, clipping and the loss averaged over the
answer tokens are the same. Ours runs `train.py`'s own functions. Theirs is what a user of these
libraries writes: `get_peft_model` on the fused projections, a module that splices the projected
pictures in, `Trainer` with its default optimiser, and a collator that pads to the longest row.
Nothing is logged, saved or evaluated. Each measurement is a process of its own; the sides take
turns. The first steps are not counted; memory is the peak of the resident set after them.

tiny: assets/tiny/phi3 and its picture world, 6 rows a step as in the preset.
mid: 4 layers, 1024 wide, Phi-3's vocabulary of 32,064, random weights; every conversation has a
picture. Its texts are as long as LLaVA's: conversations, descriptions and explanations in the
shares of LLaVA-Instruct-150K, with lognormal lengths fitted to 90 real questions and answers.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config as configs  # noqa: E402
import train  # noqa: E402
from config import Config, Parser  # noqa: E402
from data.chat import load_tokenizer  # noqa: E402
from data.collate import IGNORED, Batch, collate  # noqa: E402
from data.world import write_world  # noqa: E402
from errors import PhiSightError, run_main  # noqa: E402
from lora.dropout import key_of  # noqa: E402
from lora.layer import LoRALinear  # noqa: E402
from model.base import BaseModel  # noqa: E402
from training.batches import chunks, load_batches  # noqa: E402
from training.options import RunOptions  # noqa: E402
from training.ranks import Ranks  # noqa: E402
from training.run import Run, prepare_run  # noqa: E402
from training.schedule import lr_at  # noqa: E402
from training.step import train_step  # noqa: E402

SIDES = {
    "ours": "ours, packed rows",
    "ours-unpacked": "ours, a row a sample",
    "theirs": "Trainer + PEFT",
    "theirs-grouped": "Trainer + PEFT, group_by_length",
}
# Turns of question and answer, share of LLaVA-Instruct-150K, and (mean, deviation) of the logarithm
# of the tokens of a question and of an answer, in Phi-3's tokens.
KINDS = (
    ((3, 6), 58, (2.41, 0.18), (3.00, 0.43)),  # conversation
    ((1, 1), 23, (2.22, 0.26), (4.62, 0.23)),  # description
    ((1, 1), 77, (2.68, 0.25), (4.92, 0.23)),  # explanation
)
WARM_UP = 2  # steps that are not counted


# -- what is trained -------------------------------------------------------------------------------


def tiny_config(folder: Path, steps: int) -> Config:
    """The tiny preset on enough pictures for `steps` steps."""
    write_world(folder / "world", pictures=30 + 10 * steps, held_out=1)
    return configs.replace(
        configs.default_config("tiny"),
        base=str(ROOT / "assets/tiny/phi3"),
        vision=str(ROOT / "assets/tiny/clip"),
        data=str(folder / "world/train.json"),
        images=str(folder / "world/images"),
        features=str(folder / "features"),
        run=str(folder / "run"),
    )


def mid_config(folder: Path, steps: int, picture_tokens: int) -> Config:
    """4 layers of 1024 in NF4, random weights, on conversations of LLaVA's lengths."""
    write_models(folder, round(picture_tokens**0.5))
    write_world(folder / "world", pictures=24, held_out=1)
    pictures = sorted(path.name for path in (folder / "world/images").glob("train_*"))
    records = list(llava_like(pictures, 8 * steps + 40))
    (folder / "data.json").write_text(json.dumps(records))
    return configs.replace(
        configs.default_config("phi35"),
        base=str(folder / "base"),
        vision=str(folder / "clip"),
        data=str(folder / "data.json"),
        images=str(folder / "world/images"),
        features=str(folder / "features"),
        run=str(folder / "run"),
        max_text_tokens=480,
        row_tokens=1024,
        batch_size=2,
        accumulation=1,
        gradient_checkpointing=False,
    )


def write_models(folder: Path, side: int) -> None:
    """A Phi-3 and a CLIP of side x side patches with random weights, in the hub's layout."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    Phi3ForCausalLM(
        Phi3Config(
            vocab_size=32064,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder / "base")
    for file in (ROOT / "assets/tiny/phi3").glob("tokenizer*"):
        shutil.copy(file, folder / "base")
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=16,
            image_size=8 * side,
            patch_size=8,
            projection_dim=64,
        )
    )
    clip.config.save_pretrained(folder / "clip")
    save_file(
        {
            f"vision_model.{name}": tensor
            for name, tensor in clip.state_dict().items()
            if not name.endswith("position_ids")
        },
        folder / "clip/model.safetensors",
    )
    preprocessor = json.loads((ROOT / "assets/tiny/clip/preprocessor_config.json").read_text())
    preprocessor |= {
        "crop_size": {"height": 8 * side, "width": 8 * side},
        "size": {"shortest_edge": 8 * side},
    }
    (folder / "clip/preprocessor_config.json").write_text(json.dumps(preprocessor))


def llava_like(pictures: Sequence[str], count: int) -> Iterator[dict]:
    """Records in LLaVA's form whose texts are as long as its own; nothing to learn from."""
    rng = random.Random(0)
    tokenizer = load_tokenizer(ROOT / "assets/tiny/phi3")
    words = [
        token.removeprefix("▁")
        for token in sorted(tokenizer.get_vocab())
        if token.startswith("▁") and token[1:].isalpha()
    ]

    def text(shape: tuple[float, float]) -> str:
        return " ".join(rng.choices(words, k=max(1, round(rng.lognormvariate(*shape)))))

    for number in range(count):
        turns, _, question, answer = rng.choices(KINDS, [share for _, share, _, _ in KINDS])[0]
        said: list[dict] = []
        for turn in range(rng.randint(*turns)):
            asked = text(question) if turn else "<image>\n" + text(question)
            said += [{"from": "human", "value": asked}, {"from": "gpt", "value": text(answer)}]
        yield {"id": str(number), "image": pictures[number % len(pictures)], "conversations": said}


def prepared(config: Config) -> Run:
    """All that `train.py` has before its first step."""
    return prepare_run(config, None, RunOptions(overwrite=True), Ranks())


def samples_of_steps(run: Run, steps: int) -> list[list[list[int]]]:
    """step -> micro-batch -> samples, for the first steps of training."""
    found: list[list[list[int]]] = []
    for rows in run.plans:
        micro = [[i for row in chunk for i in row] for chunk in chunks(rows, run.config.batch_size)]
        found += chunks(micro, run.config.accumulation)
    return found[:steps]


# -- ours ------------------------------------------------------------------------------------------


def train_ours(run: Run, steps: int, packed: bool = True) -> Iterator[float]:
    """Each step's loss, by the functions of `train.py` that its loop calls."""
    config, progress = run.config, run.progress
    chosen = samples_of_steps(run, steps)
    for step in range(steps):
        rows = len(run.plans[progress.epoch])
        end = min(progress.row + config.batch_size * config.accumulation, rows)
        batches = (
            load_batches(run, list(range(progress.row, end)))
            if packed
            else [a_row_a_sample(run, micro) for micro in chosen[step]]
        )
        rate = lr_at(
            step, run.total_steps, config.warmup_fraction, config.learning_rate, config.schedule
        )
        result = train_step(
            run.parts.model, run.optimizer, run.scaler, batches, rate, config.max_gradient_norm
        )
        progress.row = end % rows
        progress.epoch += end == rows
        yield result.loss_sum / result.supervised_tokens


def a_row_a_sample(run: Run, samples: Sequence[int]) -> Batch:
    """Rows of one sample each, padded to the longest."""
    return collate(
        [[run.data.train[i]] for i in samples],
        run.store.features_of,
        run.parts.chat_format.end_of_text_id,
        run.store.shape,
        row_keys=[key_of(run.config.seed, 0, i) for i in samples],
    )


# -- theirs ----------------------------------------------------------------------------------------


class PeftWithPictures(nn.Module):
    """A PEFT model whose picture places are filled with projected features."""

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
            lora_alpha=config.lora_alpha,
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


def hub_base(base: BaseModel) -> nn.Module:
    """transformers' own Phi-3 over the very weights of our base, quantised as they are."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config.from_dict(dict(base.hub_config))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        theirs = Phi3ForCausalLM(config)
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear):
            theirs.set_submodule(name, module)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            theirs.get_submodule(name).weight = module.weight
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=config)
    return theirs.requires_grad_(False)


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


def trainer_of(run: Run, model: nn.Module, batches: list[list[int]], total: int) -> Any:
    """A Trainer that takes these micro-batches in this order."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    config, tokenizer = run.config, run.parts.base.tokenizer
    tokenizer.pad_token_id, tokenizer.padding_side = run.parts.chat_format.end_of_text_id, "right"
    pad = DataCollatorForSeq2Seq(tokenizer, padding=True)

    def collator(features: list[dict]) -> dict[str, Tensor]:
        pictures = [one for feature in features for one in feature.pop("image_features")]
        stacked = torch.stack(pictures) if pictures else torch.zeros(0, *run.store.shape)
        return {**pad(features), "image_features": stacked}

    class InThisOrder(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(
                self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator
            )

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
    return InThisOrder(
        model=model, args=arguments, train_dataset=Samples(run), data_collator=collator
    )


def train_theirs(
    run: Run, steps: list[list[list[int]]], on_step: Any = lambda: None
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
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
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
    return [[batch] for batch in chunks([samples[place] for place in order], size)]


# -- one measurement, in a process of its own ------------------------------------------------------


def measure(side: str, config: Config, steps: int) -> dict[str, Any]:
    """Train `WARM_UP` + `steps` steps as `side` does; the figures of the last `steps`."""
    run = prepared(config)
    chosen = samples_of_steps(run, WARM_UP + steps)
    losses: list[float] = []
    clocks: list[tuple[float, float]] = []

    def after_step() -> None:
        if len(clocks) == WARM_UP - 1:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        clocks.append((time.perf_counter(), time.process_time()))

    if side.startswith("ours"):
        for loss in train_ours(run, WARM_UP + steps, packed=side != "ours-unpacked"):
            losses.append(loss)
            after_step()
    else:
        torch.use_deterministic_algorithms(False)  # as the Trainer runs unless told otherwise
        if side == "theirs-grouped":
            chosen = chosen[:WARM_UP] + grouped(run, chosen[WARM_UP:])
        losses = train_theirs(run, chosen, after_step)
    timed = [run.data.train[i] for step in chosen[WARM_UP:] for micro in step for i in micro]
    return {
        "side": side,
        "samples": len(timed),
        "seconds": clocks[-1][0] - clocks[WARM_UP - 1][0],
        "processor_seconds": clocks[-1][1] - clocks[WARM_UP - 1][1],
        "tokens": sum(len(sample.input_ids) for sample in timed),
        "memory_mb": resident("VmHWM") / 1e6,
        "losses": losses,
    }


def resident(field: str) -> int:
    """Bytes of VmHWM (peak) or VmRSS (now) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise PhiSightError(f"/proc/self/status: has no {field}; run this on Linux")


def in_a_process(*arguments: object) -> dict[str, Any]:
    """This file with these arguments in a process of its own; the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise PhiSightError(
            f"{' '.join(map(str, arguments))}: ended with status"
            f" {done.returncode}: {done.stderr.strip()[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


# -- the table -------------------------------------------------------------------------------------


def compare(shape: str, config_file: Path, options: Any) -> None:
    """Every side in turn, `--repeats` times; medians, and ratios to the Trainer."""
    sides = options.sides.split(",")
    found: dict[str, list[dict]] = {side: [] for side in sides}
    bar = tqdm(total=options.repeats * len(found), desc=shape, disable=None)
    for _ in range(options.repeats):
        for side, results in found.items():
            results.append(
                in_a_process("--side", side, "--config", config_file, "--steps", options.steps)
            )
            bar.write(f"{side}: {results[-1]['seconds']:.2f} s")
            bar.update()
    first = found["theirs"][0]
    print(
        f"\n{shape}: {options.repeats} x {options.steps} steps, {options.threads} threads,"
        f" {first['samples']} samples of {first['tokens']:,} tokens"
    )
    print(
        f"{'':38}{'samples/s':>10}{'tokens/s':>10}{'wall s':>8}{'spread':>16}{'CPU s':>8}"
        f"{'peak MB':>9}{'speed':>8}{'by CPU s':>10}{'memory':>8}"
    )
    for side, results in found.items():
        print(line_of(side, results, found["theirs"]), flush=True)


def line_of(side: str, mine: list[dict], theirs: list[dict]) -> str:
    """Medians of a side, and its ratios to the Trainer.

    A ratio is taken in each turn, and then the median: what slows the machine slows both sides.
    """

    def median(name: str) -> float:
        return statistics.median(result[name] for result in mine)

    def ratio(name: str) -> float:
        return statistics.median(
            (one["samples"] / one[name]) / (other["samples"] / other[name])
            for one, other in zip(mine, theirs, strict=True)
        )

    seconds, samples, tokens = median("seconds"), mine[0]["samples"], mine[0]["tokens"]
    spread = sorted(result["seconds"] for result in mine)
    memory = statistics.median(result["memory_mb"] for result in theirs)
    return (
        f"{SIDES[side]:38}{samples / seconds:>10.2f}{tokens / seconds:>10,.0f}"
        f"{seconds:>8.2f}{f'{spread[0]:.2f} to {spread[-1]:.2f}':>16}"
        f"{median('processor_seconds'):>8.2f}{median('memory_mb'):>9,.0f}"
        f"{ratio('seconds'):>7.2f}x{ratio('processor_seconds'):>9.2f}x"
        f"{median('memory_mb') / memory:>7.2f}x"
    )


def parity(config: Config, steps: int, folder: Path) -> list[float]:
    """Differences of the losses of `steps` steps, dropout 0: `train.py` itself, and the Trainer."""
    config = configs.replace(
        config,
        lora_dropout=0.0,
        max_steps=steps,
        log_steps=1,
        evaluate_steps=0,
        save_steps=steps,
        run=str(folder / "ours"),
    )
    train.train(config, None, RunOptions(overwrite=True))
    log = [json.loads(line) for line in (folder / "ours/metrics.jsonl").read_text().splitlines()]
    ours = [record["loss"] for record in log if record["kind"] == "train"]
    run = prepared(configs.replace(config, run=str(folder / "theirs")))
    theirs = train_theirs(run, samples_of_steps(run, steps))
    return [mine - other for mine, other in zip(ours, theirs, strict=True)]


def main() -> None:
    parser = Parser(prog="vs_peft_trainer.py", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="tiny,mid")
    parser.add_argument(
        "--sides", default=",".join(SIDES), help="which of the four; theirs among them"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps that count, after the warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture-tokens", type=int, default=144, help="of mid; a square number")
    parser.add_argument("--parity", action="store_true", help="compare losses instead of speed")
    parser.add_argument("--side", choices=SIDES, help="one measurement; for this program itself")
    parser.add_argument("--config", type=Path, help="the run to measure; goes with --side")
    options = parser.parse_args()
    if options.side:
        config = configs.from_dict(json.loads(options.config.read_text()), str(options.config))
        with tempfile.TemporaryDirectory() as name:
            config = configs.replace(config, run=str(Path(name) / "run"))
            print(json.dumps(measure(options.side, config, options.steps)))
        return
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder, steps = Path(name), 50 if options.parity else WARM_UP + options.steps
            config = (
                tiny_config(folder, steps)
                if shape == "tiny"
                else mid_config(folder, steps, options.picture_tokens)
            )
            config = configs.replace(
                config, threads=options.threads, device="cpu", evaluate_steps=0
            )
            if options.parity:
                differences = parity(config, steps, folder)
                print(
                    f"{shape}: losses of {steps} steps differ by at most"
                    f" {max(map(abs, differences)):.2g}"
                )
                continue
            prepared(config)  # the features, once
            (folder / "config.json").write_text(json.dumps(configs.to_dict(config)))
            compare(shape, folder / "config.json", options)


if __name__ == "__main__":
    run_main(main)
