"""The families of base models. Another one is one more file here and one name in `FAMILIES`."""

from model.families.family import Family as Family
from model.families.llama import LLAMA
from model.families.phi3 import PHI3
from model.families.qwen2 import QWEN2
from model.families.qwen3 import QWEN3

FAMILIES = {family.model_type: family for family in (PHI3, LLAMA, QWEN2, QWEN3)}
"""by the model_type of a config.json"""
