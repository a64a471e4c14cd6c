"""What a run says of itself where it is published: its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reports.compare import Saved


def model_card(
    saved: Saved,
    records: Sequence[Mapping[str, Any]],
    certificates: Sequence[Mapping[str, Any]] = (),
    repository: str = "",
) -> str:
    """The text of README.md for the hub."""
    return f"# {repository or 'A run of PhiSight'}\n\nStep {saved.step:,}.\n"
