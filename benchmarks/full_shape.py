"""Phi-3.5-mini and CLIP ViT-L/14-336 at full shape, with random weights, through the real path.

    python -m benchmarks.full_shape [--layers 32] [--starts-only | --commands-only]

Writes a base (32 layers, 3072 wide, fused projections, LongRoPE factors, sharded bfloat16
safetensors) and a CLIP in the hub's layout to a temporary folder, and then types what a person
types: `train.py --preset phi35` for one step with gradient checkpointing, and `infer.py` for an
answer. Before that it loads the base alone, three times: without a cache of the quantised base,
with one that is empty, and with one that is full. Prints seconds and peak memory of each as JSON.
Needs about 13 GB of disk and 12 of memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

from config import Parser
from data.world import write_world
from errors import PhiSightError, run_main

ROOT = Path(__file__).resolve().parent.parent

SHARD_BYTES = 5 * 10**9  # the hub's own file has 4.97 and 2.67 GB
HEAD = 96  # dimensions of one head
# LongRoPE's factors grow from 1 on; Phi-3.5's own long ones reach 64.
SHORT_FACTORS = [round(1 + 1.8 * i / (HEAD // 2), 4) for i in range(HEAD // 2)]
LONG_FACTORS = [round(1 + 63 * (i / (HEAD // 2)) ** 1.5, 4) for i in range(HEAD // 2)]


def phi_config(layers: int) -> dict:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": SHORT_FACTORS,
            "long_factor": LONG_FACTORS,
        },
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """bfloat16 of standard deviation 0.02; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    block = torch.randn(1 << 20, generator=generator) * 0.02
    count = math.prod(shape)  # one million numbers, over and over: what is measured is the shape
    return block.repeat(-(-count // len(block)))[:count].view(shape).to(torch.bfloat16)


def write_base(folder: Path, layers: int, shard_bytes: int = SHARD_BYTES, **changes: object) -> int:
    """Sharded safetensors with their index; returns the bytes of the largest shard. `changes`
    replace entries of the config."""
    folder.mkdir(parents=True)
    config = phi_config(layers) | changes
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for file in (ROOT / "assets/tiny/phi3").glob("tokenizer*"):
        shutil.copy(file, folder)
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width)
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.qkv_proj.weight": (3 * width, width),
            prefix + "self_attn.o_proj.weight": (width, width),
            prefix + "mlp.gate_up_proj.weight": (2 * inner, width),
            prefix + "mlp.down_proj.weight": (width, inner),
            prefix + "input_layernorm.weight": (width,),
            prefix + "post_attention_layernorm.weight": (width,),
        }
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * math.prod(shape) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    largest = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {key: random_weight(shape, generator) for key, shape in shard.items()},
            folder / name,
            {"format": "pt"},
        )
        weight_map |= dict.fromkeys(shard, name)
        largest = max(largest, (folder / name).stat().st_size)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map}), encoding="utf-8"
    )
    return largest


def write_clip(folder: Path) -> None:
    """CLIP ViT-L/14-336's vision half in float16, and its preprocessor."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    folder.mkdir(parents=True)
    model = CLIPVisionModel(config).half()
    state = {
        name if name.startswith("vision_model.") else f"vision_model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    preprocessor = json.loads(
        (ROOT / "assets/tiny/clip/preprocessor_config.json").read_text(encoding="utf-8")
    )
    preprocessor |= {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")


LOAD = """
import json, sys, time
import torch
from model.base import load_base
clock = time.perf_counter()
load_base(sys.argv[1], None, torch.float32, "cpu", "nf4", sys.argv[2])
print(json.dumps(round(time.perf_counter() - clock, 1)))
"""


def measure_starts(base: Path, cache: Path) -> dict[str, object]:
    """Loading the base alone: seconds of `load_base`, and of the whole process."""
    found: dict[str, object] = {}
    for name, folder in (("without a cache", ""), ("first start", cache), ("second start", cache)):
        said, used = run("-c", LOAD, base, folder)
        found[name] = {"load_seconds": json.loads(said), **used}
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return found | {"cache_gb": round(size / 1e9, 2)}


def run(*arguments: object) -> tuple[str, dict[str, float]]:
    """A command of the project to its end: its output, its seconds and peak memory."""
    clock = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise PhiSightError(f"{arguments[0]}: ended with status {status}; see what it said above")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return printed, {
        "seconds": round(time.perf_counter() - clock, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_gb": round(peak / 1e9, 2),
    }


def training_flags(folder: Path) -> list[object]:
    """What is typed after `train.py`: one step of one row on what lies in `folder`."""
    given = {
        "preset": "phi35",
        "base": folder / "phi",
        "vision": folder / "clip",
        "data": folder / "world/train.json",
        "images": folder / "world/images",
        "features": folder / "features",
        "base-cache": folder / "cache",
        "run": folder / "run",
        "validation-fraction": 0.3,
        "batch-size": 1,
        "accumulation": 1,
        "max-steps": 1,
        "log-steps": 1,
        "evaluate-steps": 0,
    }
    return [word for name, value in given.items() for word in (f"--{name}", value)]


def measure_commands(folder: Path, tokens: int, llama: str | None = None) -> None:
    """Train one step and answer one question of `tokens` tokens; print what both took. With the
    interpreter of llama.cpp's bindings, export the run to GGUF too, and print its certificate."""
    write_world(folder / "world", pictures=8, held_out=1, turns=3)
    printed, training = run("train.py", *training_flags(folder))
    print(printed)
    image = folder / "world/images/held_out_000000.png"
    question = ("--image", image, "--prompt", "What is there?", "--max-new-tokens", tokens)
    answer, answering = run("infer.py", "--run", folder / "run", *question, "--json")
    facts = {"training": training, "answering": answering, "answer": json.loads(answer)}
    print(json.dumps(facts, indent=1), flush=True)
    if llama:
        # Of random weights no answer is likelier than another: the log-probabilities tell.
        loose = ("--max-loss-difference", 1, "--min-greedy-equal", 0)
        few = ("--greedy-answers", 1, "--evaluation-conversations", 2, "--quantize", "f16")
        asked = ("--gguf", folder / "gguf", "--llama-python", llama, *few, *loose)
        printed, exporting = run("export.py", "--run", folder / "run", *asked)
        certificate = json.loads(
            (folder / "gguf" / "gguf_certificate.json").read_text(encoding="utf-8")
        )
        kept = ("with_picture", "without_picture", "pictures", "dtype")
        sizes = {path.name: path.stat().st_size for path in (folder / "gguf").glob("*.gguf")}
        found = {name: certificate[name] for name in kept}
        print(printed + json.dumps({"exporting": exporting, "bytes": sizes, **found}, indent=1))


def main() -> None:
    parser = Parser(prog="full_shape.py", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of the answer")
    parser.add_argument("--llama-python", help="export to GGUF too, measured by its llama.cpp")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--starts-only", action="store_true", help="load the base, no more")
    only.add_argument("--commands-only", action="store_true", help="train and answer, no more")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        # By another process: those that are measured would inherit the peak of this one.
        with ProcessPoolExecutor(1, get_context("spawn")) as writer:
            largest = writer.submit(write_base, folder / "phi", options.layers).result()
            writer.submit(write_clip, folder / "clip").result()
        four_bit = sum(p.stat().st_size for p in (folder / "phi").glob("*.safetensors")) / 4
        facts = {
            "layers": options.layers,
            "largest_shard_gb": round(largest / 1e9, 2),
            "memory_limit_gb": round((1.5 * largest + four_bit) / 1e9, 2),
        }
        if not options.commands_only:
            facts["starts"] = measure_starts(folder / "phi", folder / "cache")
        print(json.dumps(facts, indent=1), flush=True)
        if not options.starts_only:
            measure_commands(folder, options.tokens, options.llama_python)


if __name__ == "__main__":
    run_main(main)
