"""In the other system: every command is imported, and a run trained, resumed and asked."""

import contextlib
import io
import json
import os
import signal
import sys

import app  # noqa: F401
import checkpoints
import evaluate  # noqa: F401
import export  # noqa: F401
import infer
import serve  # noqa: F401
import sweep  # noqa: F401
import train
from system import limits, locks

_, run, picture, *flags = sys.argv
assert locks.fcntl is None and limits.resource is None, "this is the ordinary system"
assert not hasattr(os, "preadv") and not hasattr(signal, "SIGKILL") and os.name == "nt"
said = io.StringIO()
with contextlib.redirect_stdout(said):
    codes = [
        train.main([f"--run={run}", "--stop-at-step=1", *flags]),
        train.main(["--resume", f"--run={run}"]),
        infer.main([f"--run={run}", "--image", picture, "--prompt", "What is this?", "--json"]),
        checkpoints.main(["verify", run]),
    ]
print(json.dumps({"codes": codes, "said": said.getvalue()}))
