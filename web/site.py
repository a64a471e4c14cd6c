"""What the rooms of the web app share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from web.examples import Examples
from web.model import Model
from web.speech.ears import Ears
from web.speech.mouth import Mouth
from web.temporary import Uploads

if TYPE_CHECKING:
    from speech.voice import Voice
    from speech.whisper import Speech


@dataclass
class Site:
    """One served app: its model, its folders, and what visitors may do."""

    model: Model
    conversations: Path
    """folder of the saved conversations"""
    uploads: Uploads
    examples: Examples
    runs: Path | None = None
    """folder of the runs that the training room shows; None on a public page, which has none"""
    may_train: bool = False
    """whether visitors may start and stop trainings"""
    trainings_at_once: int = 1
    speech: Callable[[], Speech] | None = None
    """gives the Whisper, loaded when it is first needed"""
    voice: Callable[[str], Voice] | None = None
    """gives the voice of a language"""
    ears: Ears = field(default_factory=Ears)
    """whose turn it is to be listened to"""
    mouth: Mouth = field(default_factory=Mouth)
    """whose turn it is to be spoken for"""
    closing: list[Callable[[], None]] = field(default_factory=list)
    """called when the server ends"""

    def close(self) -> None:
        """End what the rooms have begun and what does not outlive the server."""
        for end in self.closing:
            end()
