"""Programs about the project: they make the tiny preset, run the demo, and test resume."""
