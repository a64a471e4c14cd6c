"""The parser of every command's line: what cannot be read ends in one line with a remedy."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from errors import PhiSightError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `PhiSightError`s and name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            unknown = message.removeprefix(prefix).split()[0]
            commands = [
                p
                for action in self._actions
                if isinstance(action, argparse._SubParsersAction)
                for p in action.choices.values()
            ]
            flags = [
                flag
                for parser in (self, *commands)
                for action in parser._actions
                for flag in action.option_strings
            ]
            near = difflib.get_close_matches(unknown.split("=")[0], flags, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
            raise PhiSightError(f"{unknown}: no such flag; {remedy}")
        raise PhiSightError(f"{self.prog}: {message}; see {self.prog} --help")

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
