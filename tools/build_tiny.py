"""Make the tiny preset's assets from nothing: tokenizer, text-only base, CLIP, Whisper.

    python -m tools.build_tiny                       # all, in order
    python -m tools.build_tiny --only base           # one part again, see --help

Every part starts from a fixed seed. The base reads scenes told in words and sees no picture; the
CLIP sees pictures and captions and never sees a question; the Whisper hears what espeak-ng says
(tools/build_whisper.py). What each part measures about itself goes to `build_report.json` beside
it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from config import Parser
from errors import run_main
from tools import build_whisper
from tools.tiny.base import build_base
from tools.tiny.clip import build_clip
from tools.tiny.review import review_base
from tools.tiny.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = Parser(prog="build_tiny.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "tiny")
    parser.add_argument("--only", choices=("tokenizer", "base", "review", "clip", "whisper"))
    parser.add_argument("--base-steps", type=int, default=4500, help="of the last lesson")
    parser.add_argument("--base-batch", type=int, default=12)
    parser.add_argument("--base-lr", type=float, default=1e-3)
    parser.add_argument("--review-steps", type=int, default=4500, help="after the last lesson")
    parser.add_argument("--review-batch", type=int, default=16)
    parser.add_argument("--review-lr", type=float, default=2e-3)
    parser.add_argument("--clip-steps", type=int, default=3000)
    parser.add_argument("--clip-batch", type=int, default=64)
    parser.add_argument("--clip-lr", type=float, default=1e-3)
    parser.add_argument("--clip-pictures", type=int, default=24000)
    parser.add_argument("--whisper-steps", type=int, default=2800)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only in (None, "tokenizer"):
        build_tokenizer(options.out / "phi3", shorthand=True)
    if options.only in (None, "base"):
        build_base(options.out / "phi3", options.base_steps, options.base_batch, options.base_lr)
    if options.only in (None, "review"):
        review_base(
            options.out / "phi3", options.review_steps, options.review_batch, options.review_lr
        )
    if options.only in (None, "clip"):
        build_clip(
            options.out / "clip",
            options.clip_steps,
            options.clip_batch,
            options.clip_lr,
            options.clip_pictures,
        )
    if options.only in (None, "whisper"):
        build_whisper.build(
            options.out / "whisper", ROOT / "cache" / "speech", options.whisper_steps
        )


if __name__ == "__main__":
    run_main(main)
