"""The parts of the tiny preset, each made from nothing by `python -m tools.build_tiny`."""
