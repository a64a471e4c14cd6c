"""Untrusted bytes are read in child processes, within limits; and work that is done in turns."""
