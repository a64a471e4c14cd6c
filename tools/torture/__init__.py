"""The parts of `tools/torture_resume.py`."""
