"""The tasks of `evaluate.py`. A new one is a file here, and a line in this table."""

from evaluation.task import Task
from evaluation.tasks.caption import Caption
from evaluation.tasks.loss import Loss
from evaluation.tasks.pope import Pope
from evaluation.tasks.vqa import Vqa
from evaluation.tasks.world import World

TASKS: dict[str, Task] = {
    "loss": Loss(),
    "world": World(),
    "vqa": Vqa(),
    "pope": Pope(),
    "caption": Caption(),
}
