"""Low-rank adaptation of frozen, possibly 4-bit, linear layers (arXiv:2106.09685)."""

import logging

# At import bitsandbytes asks for an optional package that would fetch a kernel from the hub, and
# warns when it is absent. Nothing here uses that kernel (see `secure_four_bit`).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
