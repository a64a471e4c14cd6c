"""The model's rooms: base, vision, projector, the whole, generation."""

import lora  # noqa: F401  quietens bitsandbytes before any module here imports it
