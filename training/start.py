"""What a run begins with: nothing, its own newest checkpoint, or the weights of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import config as configs
import config_values
from checkpoint_state import need_run
from config import Config
from data.sources import pinned
from errors import PhiSightError
from model.build import Assembled, load_model_state, model_state
from model.projectors import PROJECTORS
from packing import packed_parts
from paths import command, typed
from tensors import mismatches
from training.exactness import changed_fields
from training.options import RunOptions
from training.ranks import Ranks


def starting_point(
    config: Config, options: RunOptions, ranks: Ranks
) -> tuple[Config, checkpoints.Checkpoint | None]:
    """The config to train with, and the checkpoint to go on from, if any.

    Raises:
        PhiSightError: the options contradict each other or what the run's folder holds.
    """
    names = ranks.from_first(lambda: [path.name for path in checkpoints.checkpoints_in(config.run)])
    if options.resume and options.overwrite:
        raise PhiSightError("--resume --overwrite: go on, or start anew? give one of them")
    if options.resume or (options.resume_if_any and names):
        checkpoint = newest_checkpoint(config.run, ranks)
        need_run(checkpoint)
        saved = config_values.from_dict(checkpoint.config["config"], str(checkpoint.path))
        if "published" in checkpoint.config:  # before it is told to be finished, if it is
            raise PhiSightError(
                f"{config.run}: is a published run, without the state of an optimizer, so that it"
                f" cannot be gone on with; {begin_anew(config.run, saved)}"
            )
        # What was given wins over what was saved; `check_same_run` says what that would cost.
        places = packed_parts(config.run) | options.given | {"run": config.run}
        return _pinned(configs.replace(saved, **places), ranks), checkpoint
    if names and not options.overwrite:
        raise PhiSightError(
            f"{config.run}: holds {names[-1]} already; go on with --resume, start anew with"
            " --overwrite, or choose another --run"
        )
    return _pinned(config, ranks), None


def _pinned(config: Config, ranks: Ranks) -> Config:
    """With the commit of each data set of the hub, which the first process asks for: a run that
    goes on has the same files, whatever has become of the branch."""
    return configs.replace(config, data=tuple(ranks.from_first(lambda: pinned(config.data))))


def newest_checkpoint(run: str, ranks: Ranks) -> checkpoints.Checkpoint:
    """The newest intact checkpoint of a run, read once: the first process chooses it, and the
    others read the one that it has chosen. Raises PhiSightError when there is none."""
    loaded: list[checkpoints.Checkpoint] = []

    def choose() -> str:
        loaded.append(checkpoints.load_newest(run))
        return str(loaded[0].path)

    path = ranks.from_first(choose)
    return loaded[0] if loaded else checkpoints.load(path)


def is_at_stop(checkpoint: checkpoints.Checkpoint, options: RunOptions) -> bool:
    """Whether the run stands where it is to stop. Raises PhiSightError where it is past that."""
    if not options.stop_at_step:
        return False
    if checkpoint.step > options.stop_at_step:
        raise PhiSightError(
            f"--stop-at-step {options.stop_at_step}: the run stands at step {checkpoint.step}"
            " already; give a later step, or leave it out"
        )
    return checkpoint.step == options.stop_at_step


def check_demands(
    config: Config, checkpoint: checkpoints.Checkpoint | None, options: RunOptions
) -> None:
    """Raise PhiSightError for what cannot be done, before anything is loaded."""
    if checkpoint is not None and "imported_from" in checkpoint.config:
        raise PhiSightError(
            f"{config.run}: was imported, without the state of an optimizer, so that it cannot be"
            f" gone on with; {begin_anew(config.run, config)}"
        )
    check_rounding(config)
    if not config.train_lora and not config.train_projector:
        raise PhiSightError(
            "--no-train-lora --no-train-projector: nothing would be trained; give one of them"
        )
    asked = options.given if checkpoint is not None else vars(config)
    for name in ("early_stopping", "keep_best"):
        if not getattr(config, name) or not asked.keys() & {name, "evaluate_steps"}:
            continue
        if not config.evaluate_steps or not config.validation_fraction:
            lacking = "evaluate_steps" if not config.evaluate_steps else "validation_fraction"
            raise PhiSightError(
                f"{configs.flag_of(name)}: needs evaluations, and {configs.flag_of(lacking)} is 0;"
                f" give it a value such as {configs.FIELDS[lacking].default}, or leave"
                f" {configs.flag_of(name)} out"
            )


def check_rounding(config: Config) -> None:
    """Raise PhiSightError where `--merge-rounding` does not go with the rest; see `lora.rounding`.

    Nested scales are rounded themselves, by what depends on all blocks of a tensor: a weight that
    is rounded once more would not stay as it is.
    """
    if config.merge_rounding == "none":
        return
    for name, needed in (("quantization", "nf4"), ("lora_dropout", 0)):
        if getattr(config, name) != needed:
            raise PhiSightError(
                f"--merge-rounding {config.merge_rounding}: goes with {configs.flag_of(name)}"
                f" {needed} only, not {getattr(config, name)}; give both"
            )


def is_finished(config: Config, checkpoint: checkpoints.Checkpoint) -> bool:
    """Whether the run is finished, and `config` does not make it another one."""
    saved = {"config": checkpoint.config["config"]}
    changes = changed_fields(saved, {"config": config_values.to_dict(config)})
    return bool(checkpoint.trainer_state.get("finished")) and not changes


def load_start_weights(config: Config, parts: Assembled) -> dict[str, Any] | None:
    """Put the adapter and projector of `--start-from` into the model.

    Returns:
        What they were, for the checkpoint's config.json; None without `--start-from`.

    Raises:
        PhiSightError: they were trained on another base or encoder, or in an adapter of other
            layers, another rank or another scaling, unless that adapter was not trained; or the
            projector is another one.
    """
    if not config.start_from:
        return None
    source = checkpoints.resolve(config.start_from)
    need_run(source)
    theirs = config_values.from_dict(source.config["config"], str(source.path))
    if Path(config.run).resolve() in (source.path.resolve(), *source.path.resolve().parents):
        raise PhiSightError(
            f"--start-from {config.start_from}: lies in --run {config.run}; give"
            " the new run a folder of its own"
        )
    facts, state, adapter = source.config, source.state, adapter_flags(theirs)
    tokenizer = parts.base.tokenizer.fingerprint  # former versions do not say it
    own = model_state(parts.model)["lora_weights"]
    # An adapter whose B is zero adds nothing to the base: one of another shape may take its place.
    untrained = not any(t.any() for n, t in state["lora_weights"].items() if n.endswith("lora_B"))
    if untrained and (adapter != adapter_flags(config) or mismatches(own, state["lora_weights"])):
        state, adapter = state | {"lora_weights": own}, adapter_flags(config)
    for what, saved, here in (
        ("base", facts["base_fingerprint"], parts.base.fingerprint),
        ("tokenizer.json", facts.get("tokenizer_fingerprint", tokenizer), tokenizer),
        ("way to read pictures", vision_flags(theirs), vision_flags(config)),
        ("--picture-fit", theirs.picture_fit, config.picture_fit),
        ("picture encoder", facts["vision_fingerprint"], parts.vision.key),
        ("--quantization", theirs.quantization, config.quantization),
        ("projector", projector_flags(theirs), projector_flags(config)),
        ("adapter", adapter, adapter_flags(config)),
    ):
        if saved != here:
            raise PhiSightError(
                f"--start-from {config.start_from}: was trained with another {what}"
                f" ({saved}, here {here}); use the same for both stages"
            )
    load_model_state(parts.model, state)
    return {
        **({"run": source.published_as} if source.published_as else {}),
        "step": source.step,
        "weights_digest": checkpoints.weights_digest(source.state),
        "finished": source.trainer_state.get("finished", ""),
    }


def begin_anew(source: str, config: Config) -> str:
    """What to do in place of resuming a run that has weights alone."""
    return (
        f"begin a run with its weights: {command('train.py')} --run NEW"
        f" --start-from {typed(source)} {projector_flags(config)} {adapter_flags(config)}"
    )


def projector_flags(config: Config) -> str:
    """What to type for a projector with the same parameters."""
    flags = f"--projector {config.projector}"
    has_queries = PROJECTORS[config.projector].has_queries
    return f"{flags} --projector-queries {config.projector_queries}" if has_queries else flags


def vision_flags(config: Config) -> str:
    """What to type for the same features of an encoder."""
    return (
        f"--vision-features {config.vision_features} --vision-layer {config.vision_layer}"
        f" --feature-pooling {config.feature_pooling}"
    )


def adapter_flags(config: Config) -> str:
    """What to type for an adapter of the same layers, rank and scaling."""
    stabilized = " --rank-stabilized" if config.rank_stabilized else ""
    return (
        f"--lora-rank {config.lora_rank} --lora-alpha {config.lora_alpha}{stabilized}"
        f" --lora-targets {','.join(sorted(config.lora_targets))}"
    )
