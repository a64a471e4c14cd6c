"""Rows of different lengths as one batch, for the programs that train the tiny preset's parts."""

from __future__ import annotations

import torch


def pad_batch(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of equally long lists -> right-padded inputs and marks, (rows, length) int64 each; the
    padding is 0 and -1, and -1 marks places that are not predicted."""
    length = max(len(inputs) for inputs, _ in rows)
    inputs = torch.zeros(len(rows), length, dtype=torch.long)
    marks = torch.full((len(rows), length), -1)
    for row, (row_inputs, row_marks) in enumerate(rows):
        inputs[row, : len(row_inputs)] = torch.tensor(row_inputs)
        marks[row, : len(row_marks)] = torch.tensor(row_marks)
    return inputs, marks
