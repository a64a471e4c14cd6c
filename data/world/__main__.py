"""The picture world of the tiny preset: scenes, their drawings, and conversations about them."""

from __future__ import annotations

from pathlib import Path

from config import Parser
from data.world.files import write_world
from errors import PhiSightError, run_main
from paths import located


def main() -> None:
    parser = Parser(prog="data.world", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(located("cache/world")), help="folder to write"
    )
    parser.add_argument("--pictures", type=int, default=8000, help="training pictures")
    parser.add_argument("--held-out", type=int, default=100, help="pictures a held-out set")
    parser.add_argument("--turns", type=int, default=9, help="most questions a conversation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hard", action="store_true", help="free places, more, turned, textured")
    options = parser.parse_args()
    if min(options.pictures, options.held_out, options.turns) < 1:
        raise PhiSightError("--pictures, --held-out and --turns: must be at least 1; ask for more")
    write_world(
        options.out,
        options.pictures,
        options.held_out,
        options.seed,
        options.turns,
        options.hard,
    )


if __name__ == "__main__":
    run_main(main)
