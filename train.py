"""Train the adapter and the projector: the loop and nothing else.

    python train.py                          # the tiny preset, from the start
    python train.py --resume                 # go on from the newest valid checkpoint, bit for bit
    python train.py --preset phi35 --data llava_instruct_150k.json --images train2017
    torchrun --nproc-per-node 2 -- train.py  # the same run on two processes

config -> data -> features -> rows -> model + LoRA -> step -> checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import checkpoints
import config as configs
from config import Config
from data.collate import Batch, collate
from data.dataset import write_quarantine
from data.features import FeatureStore
from data.prepare import TrainingData, prepare
from data.sampler import plan
from errors import PhiSightError, SurvivingOutput, run_main
from evaluation import meter
from files import RunLock
from lora.dropout import key_of
from model.build import Assembled, assemble, load_model_state, model_state
from model.vision import VisionTower
from model.vlm import owner_of
from reports.compare import compare_configs
from reports.curves import draw_curves
from reports.log import MetricsLog, peak_memory_mb, read_metrics
from reports.show import console_line
from training.optim import AdamW, LossScaler, clip_gradients, lr_at, owner_gradient_norms
from training.ranks import Ranks, joined
from training.rng import rng_state, set_rng_state
from training.saver import BackgroundSaver

# Fields that may differ between a checkpoint and the run that resumes it: they say where things
# lie, how often something is written and what listens later, never what the next step computes.
FREE_FIELDS = (
    "run",
    "features",
    "base_cache",
    "save_steps",
    "save_every_minutes",
    "keep_checkpoints",
    "strict",
    "speech",
)


@dataclass
class Progress:
    """Where the run stands. All of it is in every checkpoint; nothing else is remembered."""

    step: int = 0
    """optimiser steps made"""
    epoch: int = 0
    row: int = 0
    """next row of this epoch's plan"""
    best_loss: float | None = None
    evaluations_without_better: int = 0
    finished: str = ""
    """why the run is over, or empty"""
    recent_losses: list[float] = field(default_factory=list)
    """mean loss of the latest logged windows"""
    window: dict[str, float] = field(default_factory=dict)
    """sums since the last logged step"""
    steps_digest: str = ""
    """sha256 over the digest before and the loss, gradient norm and place of every step"""


# -- what is prepared before the first step --------------------------------------------------------


@dataclass
class Run:
    """All that the loop works on. `log` is None on every process but the first."""

    config: Config
    parts: Assembled
    store: FeatureStore
    data: TrainingData
    plans: list[list[list[int]]]
    """epoch -> rows -> indices of conversations, in the order of training"""
    row_tokens: int
    total_steps: int
    optimizer: AdamW
    scaler: LossScaler
    facts: dict[str, object]
    """what a checkpoint's config.json says"""
    log: MetricsLog | None
    progress: Progress
    last_save: checkpoints.Checkpoint | checkpoints.Snapshot | None


def prepare_run(
    config: Config, resume: checkpoints.Checkpoint | None, options: RunOptions, ranks: Ranks
) -> Run:
    """config -> data -> features -> rows -> model + LoRA, from nothing or as `resume` has it."""
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // ranks.size))
    choose_algorithms(config.deterministic)

    parts = assemble(config)
    # A run that goes on has its weights in its checkpoint: the first stage may be gone by then.
    started_from = resume.config.get("started_from") if resume else start_weights(config, parts)
    with ranks.first_then_others():  # the first fills the feature store, the others find it full
        store = FeatureStore(
            config.features, parts.vision.key, parts.vision.shape, config.feature_storage
        )
        data = prepare(
            config, parts.chat_format, store, lambda: VisionTower(parts.vision, parts.device)
        )

    lengths = data.train.lengths
    row_tokens = config.row_tokens or max(lengths)
    plans = [plan(config.seed, epoch, lengths, row_tokens) for epoch in range(config.epochs)]
    rows_per_step = config.batch_size * config.accumulation
    total_steps = sum(-(-len(rows) // rows_per_step) for rows in plans)
    total_steps = min(total_steps, config.max_steps or total_steps)

    model = parts.model.train()
    if config.gradient_checkpointing:
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = AdamW(
        model.trainable(),
        (config.adam_beta1, config.adam_beta2),
        config.adam_epsilon,
        config.weight_decay,
    )
    scaler = LossScaler(enabled=parts.base.compute_dtype == torch.float16)
    seed_generators(config.seed)  # here: a CLIP that had to be loaded for features draws numbers
    progress = Progress()
    log = MetricsLog(Path(config.run) / checkpoints.METRICS) if ranks.is_first else None
    facts = describe_run(config, parts, data, total_steps, ranks) | {"started_from": started_from}
    if resume is None:
        if options.overwrite and ranks.is_first:  # only now that nothing can keep it from starting
            checkpoints.remove_all(config.run)
        if log:
            log.truncate_to(0)
    else:
        check_same_run(
            resume.config, facts, options.allow_changes, print if ranks.is_first else lambda _: None
        )
        check_place(resume.trainer_state, plans, total_steps)
        if log and (
            problems := checkpoints.log_problems(
                resume, read_metrics(log.path, resume.trainer_state["metrics_offset"])
            )
        ):
            raise PhiSightError(
                f"{log.path}: {resume.path.name}: {problems[0]}; put back the log"
                " that belongs to this run, or the checkpoint that does"
            )
        progress = restore(resume, parts, optimizer, scaler, log, ranks)
    run = Run(
        config,
        parts,
        store,
        data,
        plans,
        row_tokens,
        total_steps,
        optimizer,
        scaler,
        facts,
        log,
        progress,
        resume,
    )
    if ranks.is_first:
        write_quarantine(Path(config.run) / "quarantine.jsonl", data.quarantined)
        announce(run, ranks)
    return run


def start_weights(config: Config, parts: Assembled) -> dict[str, object] | None:
    """Put the adapter and projector of `--start-from` into the model; what they were, or None.

    Raises PhiSightError unless they were trained on this base and this CLIP, in an adapter of
    these layers, this rank and this scaling.
    """
    if not config.start_from:
        return None
    source = checkpoints.resolve(config.start_from)
    if Path(config.run).resolve() in (source.path.resolve(), *source.path.resolve().parents):
        raise PhiSightError(
            f"--start-from {config.start_from}: lies in --run {config.run}; give"
            " the new run a folder of its own"
        )
    for what, saved, found in (
        ("base", source.config["base_fingerprint"], parts.base.fingerprint),
        ("CLIP, or way to read it,", source.config["vision_fingerprint"], parts.vision.key),
        ("--quantization", source.config["config"]["quantization"], config.quantization),
        ("--lora-alpha", source.config["config"]["lora_alpha"], config.lora_alpha),
    ):
        if saved != found:
            raise PhiSightError(
                f"--start-from {config.start_from}: was trained with another {what}"
                f" ({saved}, here {found}); use the same for both stages"
            )
    load_model_state(parts.model, source.state)
    return {
        "step": source.step,
        "weights_digest": checkpoints.weights_digest(source.state),
        "finished": source.trainer_state["finished"],
    }


def choose_algorithms(deterministic: bool) -> None:
    """The same bits every time, or whatever is fastest on a GPU."""
    # torch refuses matrix products in deterministic mode unless cuBLAS was told, before its first
    # use, to work in buffers of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # That mode also fills every new tensor, in case something reads what it has not written: a
    # sixth of a step on a CPU.
    torch.utils.deterministic.fill_uninitialized_memory = False
    # The backward of memory-efficient attention adds in the order in which blocks finish; the plain
    # one (flash attention takes no mask) is what is left.
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)


# -- the loop -------------------------------------------------------------------------------------


def train(
    config: Config,
    resume: checkpoints.Checkpoint | None,
    options: RunOptions,
    ranks: Ranks = Ranks(),
) -> Progress:
    """One run, from `resume` or from nothing, until it is finished or asked to stop."""
    started = saved = time.monotonic()
    run = prepare_run(config, resume, options, ranks)
    progress, plans, total_steps = run.progress, run.plans, run.total_steps
    rows_per_step = config.batch_size * config.accumulation
    saver, out_of_time = BackgroundSaver(), False
    bar = tqdm(
        total=total_steps,
        initial=progress.step,
        desc="training",
        unit="step",
        disable=None if ranks.is_first else True,
    )
    with StopSignals() as stop, finishing(saver):
        while not progress.finished:
            clock = time.perf_counter()
            end = min(progress.row + rows_per_step, len(plans[progress.epoch]))
            batches = load_batches(run, ranks.share_of(list(range(progress.row, end))))
            rate = lr_at(
                progress.step,
                total_steps,
                config.warmup_fraction,
                config.learning_rate,
                config.schedule,
            )
            logging = (progress.step + 1) % config.log_steps == 0
            result = train_step(
                run.parts.model,
                run.optimizer,
                run.scaler,
                batches,
                rate,
                config.max_gradient_norm,
                measure_updates=logging,
                ranks=ranks,
            )

            progress.steps_digest = digest_of_step(progress, result)
            progress.step += 1
            progress.row = end
            if progress.row >= len(plans[progress.epoch]):
                progress.epoch, progress.row = progress.epoch + 1, 0
            # After --allow-changes the rows can be used up before the steps are.
            if progress.step == total_steps or progress.epoch == len(plans):
                progress.finished = "all steps done"
            add_to_window(progress, result, time.perf_counter() - clock)
            if logging or progress.finished:
                log_window(run, rate, result, bar)
            if config.evaluate_steps and (
                progress.step % config.evaluate_steps == 0 or progress.finished
            ):
                evaluate(run, ranks, bar)
                if progress.finished and "tokens" in progress.window:  # stopped early
                    log_window(run, rate, result, bar)
            bar.update()

            saver.check()  # a save that failed in the background stops the run here
            now = time.monotonic()  # the first process's clock decides for all
            asked, out_of_time, save_is_due = ranks.any_of(
                stop.requested,
                ranks.is_first and 0 < options.max_minutes <= (now - started) / 60,
                ranks.is_first and 0 < config.save_every_minutes <= (now - saved) / 60,
            )
            stopping = asked or out_of_time or progress.step == options.stop_at_step
            if (
                progress.finished
                or stopping
                or save_is_due
                or progress.step % config.save_steps == 0
            ):
                save(run, saver, ranks)
                saved = now
            if stopping and not progress.finished:
                break
        saver.wait()
    bar.close()
    if ranks.is_first:
        tell_end(run, "the time is up" if out_of_time else "", ranks)
    return progress


@contextlib.contextmanager
def finishing(saver: BackgroundSaver) -> Iterator[None]:
    """However the body ends, the save in flight is done before anything else is: before the lock is
    given back, above all."""
    try:
        yield
    finally:
        saver.finish()


def load_batches(run: Run, row_numbers: list[int]) -> list[Batch]:
    """Micro-batches of these rows of the epoch; each row brings the key that its dropout draws by.

    All rows are padded to one length, so that a row is the same whatever shares its micro-batch.
    """
    config, epoch = run.config, run.progress.epoch
    return [
        collate(
            [[run.data.train[i] for i in run.plans[epoch][number]] for number in chunk],
            run.store.features_of,
            run.parts.chat_format.end_of_text_id,
            run.store.shape,
            run.row_tokens,
            [key_of(config.seed, epoch, number) for number in chunk],
        ).to(run.parts.device)
        for chunk in chunks(row_numbers, config.batch_size)
    ]


def save(run: Run, saver: BackgroundSaver, ranks: Ranks) -> None:
    """Copy all that the next step depends on; the first process writes it beside the training."""
    clock = time.perf_counter()
    generators = ranks.gather(rng_state())
    if run.log is None:
        return
    saver.wait()
    config, progress, log = run.config, run.progress, run.log
    state = model_state(run.parts.model) | {
        "optimizer": run.optimizer.state_tensors(),
        "rng": merged_generators(generators),
    }
    trainer_state = dataclasses.asdict(progress) | {
        "loss_scaler": run.scaler.state_dict(),
        "metrics_offset": log.offset(),
        "chain": log.chain,
        "total_steps": run.total_steps,
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    snapshot = checkpoints.take_snapshot(
        progress.step, state, run.facts, trainer_state, run.parts.base.tokenizer, run.last_save
    )
    run.last_save = snapshot

    def write() -> None:
        log.sync()  # before the checkpoint that counts its bytes
        checkpoints.commit(config.run, snapshot, config.keep_checkpoints)

    saver.start(write)
    stalled = progress.window.get("save_stall_seconds", 0.0)
    progress.window["save_stall_seconds"] = stalled + time.perf_counter() - clock


def digest_of_step(progress: Progress, result: StepResult) -> str:
    """The link of this step in the chain of all steps: its place, and its numbers to the bit."""
    facts = (
        progress.steps_digest,
        progress.step,
        progress.epoch,
        progress.row,
        result.loss_sum.hex(),
        result.gradient_norm.hex(),
    )
    return hashlib.sha256("/".join(map(str, facts)).encode()).hexdigest()


@dataclass
class StepResult:
    """What one optimiser step tells of itself."""

    loss_sum: float
    supervised_tokens: int
    tokens: int
    places: int
    """tokens and padding"""
    gradient_norm: float
    gradient_norms: dict[str, float]
    skipped: bool
    update_norms: dict[str, float] | None


def train_step(
    model: torch.nn.Module,
    optimizer: AdamW,
    scaler: LossScaler,
    batches: list[Batch],
    learning_rate: float,
    max_norm: float,
    measure_updates: bool = False,
    ranks: Ranks = Ranks(),
) -> StepResult:
    """One optimiser step over an accumulation window, of which this process has its `batches`.

    Every micro-batch's summed loss is divided by the supervised tokens of the whole window on all
    processes, so that the gradient does not depend on how the window was cut.
    """
    supervised, tokens, places = map(
        int,
        ranks.sum_numbers(
            sum(batch.supervised_tokens for batch in batches),
            sum(batch.tokens for batch in batches),
            sum(batch.input_ids.numel() for batch in batches),
        ),
    )
    loss_sum = 0.0
    for batch in batches:
        loss, _ = model(**vars(batch))
        scaler.scale_loss(loss / supervised).backward()
        loss_sum += loss.item()
    named = list(optimizer.parameters.items())
    ranks.sum_gradients(optimizer.parameters.values())
    [loss_sum] = ranks.sum_numbers(loss_sum)
    scaler.unscale_gradients(optimizer.parameters.values())
    by_owner = {owner: norm.item() for owner, norm in owner_gradient_norms(named, owner_of).items()}
    norm = clip_gradients(optimizer.parameters.values(), max_norm).item()
    finite = norm < float("inf")  # False for NaN too
    if not finite and not scaler.enabled:
        raise PhiSightError(
            f"step: the gradient norm is {norm}, the loss {loss_sum / supervised}; training has"
            " diverged: resume an earlier checkpoint with a lower --learning-rate"
        )
    before = [(name, p.detach().clone()) for name, p in named] if measure_updates else []
    if finite:
        optimizer.step(learning_rate)
    scaler.update(finite)
    optimizer.zero_grad()
    moved = moved_by_owner(before, optimizer.parameters) if measure_updates else None
    return StepResult(loss_sum, supervised, tokens, places, norm, by_owner, not finite, moved)


def moved_by_owner(
    before: list[tuple[str, Tensor]], now: dict[str, torch.nn.Parameter]
) -> dict[str, float]:
    """How far each owner's weights moved in one step: the L2 norm of the change."""
    squares: dict[str, float] = {}
    for name, old in before:
        change = (now[name].detach() - old).square().sum().item()
        squares[owner_of(name)] = squares.get(owner_of(name), 0.0) + change
    return {owner: total**0.5 for owner, total in squares.items()}


def seed_generators(seed: int) -> None:
    """Every generator that a checkpoint holds, so that two runs of one seed start alike."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def chunks(rows: list, size: int) -> Iterator[list]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


class StopSignals:
    """SIGINT and SIGTERM ask for a stop after the step in hand; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignals:
        self._former = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


# -- saving the place and finding it again --------------------------------------------------------


def describe_run(
    config: Config, parts: Assembled, data: TrainingData, total_steps: int, ranks: Ranks
) -> dict[str, object]:
    """What a checkpoint's config.json says: the config and the facts exactness rests on."""
    return {
        "config": configs.to_dict(config),
        "base_fingerprint": parts.base.fingerprint,
        "vision_fingerprint": parts.vision.key,
        "data_fingerprint": data.fingerprint,
        "compute_dtype": str(parts.base.compute_dtype).removeprefix("torch."),
        "device": parts.device.type,
        "threads": torch.get_num_threads(),
        "total_steps": total_steps,
        "world_size": ranks.size,
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
            "bitsandbytes": importlib.metadata.version("bitsandbytes"),
            "numpy": numpy.__version__,
        },
        # Another instruction set, or another card, rounds otherwise.
        "processor": torch.backends.cpu.get_cpu_capability()
        if parts.device.type == "cpu"
        else torch.cuda.get_device_name(parts.device),
    }


def check_same_run(
    saved: dict, current: dict, allow_changes: bool, say: Callable[[str], None] = print
) -> None:
    """Stop, naming the fields, where going on would not be exact; with `allow_changes`, say so.

    Another number of processes is no such change: samples, order and global batch stay the same.
    """
    free = tuple(f"config.{name}" for name in FREE_FIELDS)
    if saved.get("world_size") != current["world_size"]:
        free += ("world_size", "threads", "config.threads")
        say(
            f"saved on {saved.get('world_size')} processes, resumed on {current['world_size']}:"
            " same samples, order and global batch; sums are taken in another order, so losses"
            " agree to rounding and not to the bit"
        )
    changes = compare_configs(saved, current, free)
    if not changes:
        return
    listed = "; ".join(changes)
    if not allow_changes:
        raise PhiSightError(
            f"--resume: would not be exact, these differ: {listed}; restore them, or go on"
            " all the same with --allow-changes"
        )
    say(f"warning: the resumed run is not exact, these differ: {listed}")


def check_place(state: dict, plans: list[list[list[int]]], total_steps: int) -> None:
    """Stop where changes that a person allowed leave nothing to do after the saved place."""
    step, epoch, row = state["step"], state["epoch"], state["row"]
    if step >= total_steps or epoch >= len(plans) or row >= len(plans[epoch]):
        raise PhiSightError(
            f"--resume: the checkpoint stands at step {step} (epoch {epoch}, row {row}), the"
            f" changed run ends at step {total_steps} of {len(plans)} epochs; ask for more --epochs"
            " or --max-steps"
        )


def restore(
    checkpoint: checkpoints.Checkpoint,
    parts: Assembled,
    optimizer: AdamW,
    scaler: LossScaler,
    log: MetricsLog | None,
    ranks: Ranks,
) -> Progress:
    """Put every tensor, generator, counter and the log back to where the checkpoint was saved."""
    load_model_state(parts.model, checkpoint.state)
    optimizer.load_state_tensors(checkpoint.state["optimizer"])
    set_rng_state(own_generators(checkpoint.state["rng"], checkpoint.config["world_size"], ranks))
    state = checkpoint.trainer_state | {"finished": ""}  # if it was: it has been given more to do
    scaler.load_state_dict(state["loss_scaler"])
    if log:
        log.truncate_to(state["metrics_offset"], state["chain"])
    return Progress(**{spec.name: state[spec.name] for spec in dataclasses.fields(Progress)})


def merged_generators(generators: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The random state of every process; those after the first have their number in the name."""
    return generators[0] | {
        f"rank{rank}.{name}": tensor
        for rank, state in enumerate(generators[1:], start=1)
        for name, tensor in state.items()
    }


def own_generators(saved: dict[str, Tensor], world_size: int, ranks: Ranks) -> dict[str, Tensor]:
    """This process's part of `merged_generators`; the first one's where the number has changed."""
    prefix = f"rank{ranks.rank}." if ranks.rank and ranks.size == world_size else ""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in saved.items()
        if name.startswith(prefix or ("python.", "numpy.", "torch."))
    }


def resume_command(config: Config, ranks: Ranks = Ranks()) -> str:
    default = configs.default_config(configs.DEFAULT_PRESET).run
    # Without the "--", torchrun would take --run for the start of a flag of its own.
    start = "python" if ranks.size == 1 else f"torchrun --nproc-per-node {ranks.size} --"
    return f"{start} train.py --resume" + (
        "" if config.run == default else f" --run {shlex.quote(config.run)}"
    )


# -- telling --------------------------------------------------------------------------------------


def announce(run: Run, ranks: Ranks) -> None:
    """What is about to be trained, on what, and every decision with its reason."""
    config, parts, data = run.config, run.parts, run.data
    plans, row_tokens, total_steps = run.plans, run.row_tokens, run.total_steps
    dtype = str(parts.base.compute_dtype).removeprefix("torch.")
    processes = "" if ranks.size == 1 else f" in each of {ranks.size} processes"
    print(
        f"compute: {dtype} on {parts.device.type}, {torch.get_num_threads()} threads{processes}"
        f" ({parts.compute_reason})"
    )
    if not config.deterministic:
        print("warning: without deterministic algorithms a resumed run can differ in the last bits")
    print(
        f"data: {len(data.train)} conversations to train on, {len(data.validation)} to validate;"
        f" {len(data.quarantined)} records quarantined, {data.shortened} shortened"
    )
    filled = sum(data.train.lengths)
    rows = len(plans[0])
    print(
        f"rows: {rows} of {row_tokens} tokens an epoch, padding"
        f" {100 * (1 - filled / (rows * row_tokens)):.1f} %; {total_steps} steps of"
        f" {config.batch_size} x {config.accumulation} rows"
    )
    for owner, parameters in parts.model.owners().items():
        trained = any(p.requires_grad for _, p in parameters)
        count = sum(logical_size(p) for _, p in parameters)
        print(
            f"  {'TRAINED' if trained else 'FROZEN ':8} {owner:10} {len(parameters):4} tensors"
            f" {count:>14,} weights"
        )
        if owner != "base" and not trained and (config.train_lora or owner != "lora"):
            print(f"warning: the weights of {owner!r} are frozen and will not be trained")
    if data.quarantined:
        print(
            f"warning: {len(data.quarantined)} records quarantined, reasons in"
            f" {Path(config.run) / 'quarantine.jsonl'}"
        )
    if started := run.facts["started_from"]:
        print(
            f"weights of {config.start_from} at step {started['step']}"
            f" ({started['finished'] or 'not finished'}) to begin with"
        )
    if run.progress.step:
        print(f"resumed at step {run.progress.step} of {total_steps}")


def tell_end(run: Run, reason: str, ranks: Ranks) -> None:
    """How the run ended, and what to type next."""
    step, folder = run.progress.step, Path(run.config.run)
    if not run.progress.finished:
        print(
            f"stopped at step {step} of {run.total_steps}{reason and f': {reason}'}, saved; go on"
            f" with: {resume_command(run.config, ranks)}"
        )
        return
    draw_curves(folder / checkpoints.METRICS, folder / "curves.png")
    print(f"finished at step {step}: {run.progress.finished}; curves in {folder / 'curves.png'}")


def logical_size(parameter: Tensor) -> int:
    """Weights a parameter stands for: a packed 4-bit one holds two a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def add_to_window(progress: Progress, result: StepResult, seconds: float) -> None:
    for name, value in (
        ("loss_sum", result.loss_sum),
        ("supervised_tokens", result.supervised_tokens),
        ("tokens", result.tokens),
        ("places", result.places),
        ("skipped_steps", int(result.skipped)),
        ("seconds", seconds),
    ):
        progress.window[name] = progress.window.get(name, 0) + value


def log_window(run: Run, rate: float, result: StepResult, bar: tqdm) -> None:
    """Write down the steps since the last record, and tell the person."""
    record = close_window(run, rate, result)
    if run.log:
        run.log.write(record)
        bar.write(console_line(record))
        if rate > 0:  # the first rate of a warm-up is 0
            warn_of_still_owners(result)


def close_window(run: Run, rate: float, result: StepResult) -> dict[str, object]:
    """The metrics record of the steps since the last one; the sums start anew."""
    progress = run.progress
    window, progress.window = progress.window, {}
    loss = window["loss_sum"] / window["supervised_tokens"]
    progress.recent_losses = [*progress.recent_losses, loss][-5:]
    return {
        "kind": "train",
        "step": progress.step,
        "epoch": progress.epoch,
        "row": progress.row,
        "loss": loss,
        "lr": rate,
        "gradient_norm": result.gradient_norm,
        "gradient_norms": result.gradient_norms,
        "update_norms": result.update_norms,
        "padding_share": 1 - window["tokens"] / window["places"],
        "supervised_tokens": window["supervised_tokens"],
        "tokens": window["tokens"],
        "skipped_steps": window["skipped_steps"],
        "steps_digest": progress.steps_digest,
        "weights_digest": checkpoints.weights_digest(model_state(run.parts.model)),
        "timing": {
            "seconds": round(window["seconds"], 3),
            "save_stall_seconds": round(window.get("save_stall_seconds", 0.0), 4),
            "tokens_per_second": round(window["tokens"] / window["seconds"], 1),
            **peak_memory_mb(),
        },
    }


def warn_of_still_owners(result: StepResult) -> None:
    """A frozen projector trains without an error and answers without the picture: say it aloud."""
    for owner, moved in (result.update_norms or {}).items():
        if moved == 0 and not result.skipped:
            print(
                f"warning: the weights of {owner!r} did not move in this step (gradient norm"
                f" {result.gradient_norms[owner]:.3g})"
            )


def evaluate(run: Run, ranks: Ranks, bar: tqdm) -> None:
    """Validation loss and alignment meter into the log; early stopping decides here. The first
    process evaluates, all of them hear of it."""
    config, data, progress, clock = run.config, run.data, run.progress, time.perf_counter()
    found = ranks.from_first(
        lambda: meter.evaluate(
            run.parts.model,
            data.validation,
            data.first_exchanges,
            run.store,
            max(
                run.row_tokens,
                *(len(s.input_ids) for s in [*data.validation, *data.first_exchanges]),
            ),
            run.parts.chat_format.end_of_text_id,
            run.parts.device,
        )
    )
    record = {
        "kind": "evaluation",
        "step": progress.step,
        **found,
        "timing": {"seconds": round(time.perf_counter() - clock, 3)},
    }
    if run.log:
        run.log.write(record)
        bar.write(console_line(record))
    # A loss that is not finite is never the best: nothing would be better than a first NaN.
    if found["validation_loss"] < (
        float("inf") if progress.best_loss is None else progress.best_loss
    ):
        progress.best_loss, progress.evaluations_without_better = found["validation_loss"], 0
        return
    progress.evaluations_without_better += 1
    if config.early_stopping and progress.evaluations_without_better >= config.early_stopping:
        progress.finished = progress.finished or (
            f"early stopping: no better validation loss in {config.early_stopping} evaluations"
        )


# -- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions:
    """What is asked of this process and is no part of what the run is."""

    resume: bool = False
    resume_if_any: bool = False
    overwrite: bool = False
    allow_changes: bool = False
    stop_at_step: int = 0
    max_minutes: float = 0.0
    typed: dict[str, object] = field(default_factory=dict)
    """the config fields that the person gave"""


def parse(arguments: list[str] | None) -> tuple[Config, RunOptions]:
    parser = configs.Parser(prog="train.py", description=__doc__.splitlines()[0])
    configs.add_config_flags(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the run's newest valid checkpoint"
    )
    parser.add_argument(
        "--resume-if-any",
        action="store_true",
        help="--resume where the run has a checkpoint, else start",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew in a run folder that has checkpoints, and remove them",
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="resume although the result will not be exact"
    )
    parser.add_argument(
        "--stop-at-step",
        type=int,
        default=0,
        help="save and stop after this step; --resume goes on",
    )
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=0.0,
        help="save and stop after so many minutes; 0 for never",
    )
    options = parser.parse_args(arguments)
    if options.stop_at_step < 0:
        raise PhiSightError(f"--stop-at-step {options.stop_at_step}: must be 0 (never) or more")
    if not 0 <= options.max_minutes < float("inf"):
        raise PhiSightError(f"--max-minutes {options.max_minutes}: must be 0 (never) or more")
    return configs.config_from_options(options), RunOptions(
        options.resume,
        options.resume_if_any,
        options.overwrite,
        options.allow_changes,
        options.stop_at_step,
        options.max_minutes,
        configs.given_fields(options),
    )


def starting_point(
    config: Config, options: RunOptions, ranks: Ranks
) -> tuple[Config, checkpoints.Checkpoint | None]:
    """The config to train with, and the checkpoint to go on from, if any."""
    existing = [
        Path(path)
        for path in ranks.from_first(
            lambda: [str(path) for path in checkpoints.checkpoints_in(config.run)]
        )
    ]
    if options.resume and options.overwrite:
        raise PhiSightError("--resume --overwrite: go on, or start anew? give one of them")
    if options.resume or (options.resume_if_any and existing):
        loaded: list[checkpoints.Checkpoint] = []  # what the first process has read is read

        def newest() -> str:
            loaded.append(checkpoints.load_newest(config.run))
            return str(loaded[0].path)

        path = ranks.from_first(newest)
        checkpoint = loaded[0] if loaded else checkpoints.load(path)
        saved = configs.from_dict(checkpoint.config["config"], str(path))
        # What was typed wins over what was saved; `check_same_run` says what that would cost.
        return dataclasses.replace(saved, **(options.typed | {"run": config.run})), checkpoint
    if existing and not options.overwrite:
        raise PhiSightError(
            f"{config.run}: holds {existing[-1].name} already; go on with --resume, start anew with"
            " --overwrite, or choose another --run"
        )
    return config, None


def is_over(config: Config, checkpoint: checkpoints.Checkpoint) -> bool:
    """Whether the run is finished, and nothing was typed that would make it another one."""
    free = tuple(f"config.{name}" for name in FREE_FIELDS)
    saved = {"config": checkpoint.config["config"]}
    changed = compare_configs(saved, {"config": configs.to_dict(config)}, free)
    return bool(checkpoint.trainer_state["finished"]) and not changed


def main(arguments: list[str] | None = None) -> int:
    config, options = parse(arguments)
    with (
        joined(config.device) as ranks,
        RunLock(config.run) if ranks.is_first else contextlib.nullcontext(),
    ):
        config, checkpoint = starting_point(config, options, ranks)
        if checkpoint is None or not is_over(config, checkpoint):
            train(config, checkpoint, options, ranks)
        elif ranks.is_first:
            checkpoints.sweep(Path(config.run))  # what a kill right after the last save left
            log = Path(config.run) / checkpoints.METRICS
            if log.is_file():  # a run that was imported has none
                draw_curves(log, Path(config.run) / "curves.png")
            print(
                f"{config.run}: finished at step {checkpoint.step}"
                f" ({checkpoint.trainer_state['finished']}); ask it with: python infer.py"
            )
    return 0


if __name__ == "__main__":
    sys.stdout = SurvivingOutput(sys.stdout)
    run_main(main)
