"""Trainings and exports that are begun from the page, on a server started with `--allow-training`.

A training is a process of its own (`train.py`), which survives the page and the server, and whose
run is found again. An export is a child of the server, and ends with it. Both are begun by the
command line that the page shows. Data and models are named by their paths on the server's machine:
whatever the server's user can read may be named, which is why only the owner may be let in here.
"""
