"""A model's tokenizer.json, read by `tokenizers` alone.

transformers' object of it takes half as long to import as torch does, and a question needs nothing
of it. It is made where something else of it is needed: a checkpoint is saved, or JSON is forced.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from documents import read_json
from errors import PhiSightError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


class FolderTokenizer:
    """What transformers' `PreTrainedTokenizerFast` makes of a folder, as far as we need it."""

    def __init__(self, folder: str | Path) -> None:
        """Raises `PhiSightError` if the folder has no tokenizer that can be loaded."""
        self.folder = Path(folder)
        self.name_or_path = str(folder)
        try:
            has_config = (self.folder / CONFIG).is_file()
            config = read_json(self.folder / CONFIG, own=False) if has_config else {}
            content = (self.folder / FILE).read_text(encoding="utf-8")
            backend = Tokenizer.from_str(content)
            alone = _says_all(backend, config)
        except Exception as error:  # all that `tokenizers` raises, for whatever reason
            raise _unusable(folder, error) from error
        backend.no_truncation()  # by none of ours; transformers too undoes them at every call
        backend.no_padding()
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        """of tokenizer.json, which says the ids of texts"""
        self.alone = alone
        """whether tokenizer.json is all of it; else transformers makes the tokenizer of both"""
        self.backend_tokenizer = backend if self.alone else self.full.backend_tokenizer

    def __len__(self) -> int:
        """Tokens, the added ones among them."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def embeddings(self) -> int:
        """How many a model must have that reads its ids: more than tokens, where ids have gaps."""
        ids = self.backend_tokenizer.get_vocab(with_added_tokens=True).values()
        return max(len(self), max(ids, default=-1) + 1)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Token ids -> their text."""
        if not self.alone:
            return str(self.full.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def full(self) -> PreTrainedTokenizerFast:
        """transformers' object of this folder. Raises `PhiSightError`."""
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # all that transformers and `tokenizers` raise
            raise _unusable(self.folder, error) from error

    def hold(self) -> None:
        """Make `full` now, for who needs it later, when the folder may have changed."""
        assert self.full is not None

    def save_pretrained(self, folder: str) -> None:
        """Write it as transformers does."""
        self.full.save_pretrained(folder)


def _unusable(folder: str | Path, error: Exception) -> PhiSightError:
    reason = " ".join(str(error).split())[:200]
    return PhiSightError(
        f"tokenizer {folder}: cannot be loaded ({reason}); give a folder with {FILE}"
    )


def _says_all(backend: Tokenizer, config: Mapping[str, Any]) -> bool:
    """Whether transformers would change nothing of tokenizer.json by tokenizer_config.json: it
    would add tokens that only the latter names, and has ways of its own to cut and to join text."""
    declared = config.get("added_tokens_decoder")
    if not isinstance(declared, dict):  # transformers then looks for them in older files
        return False
    if any(config.get(name) for name in ("split_special_tokens", "fix_mistral_regex")):
        return False
    if config.get("clean_up_tokenization_spaces") and (
        type(backend.model).__name__ != "BPE"
        or config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    ):
        return False
    known = {str(token.content): token for token in backend.get_added_tokens_decoder().values()}
    for token in declared.values():
        if not isinstance(token, dict) or token.get("content") not in known:
            return False
        if repr(AddedToken(**token)) != repr(known[token["content"]]):
            return False
    return all(name in known for name in _named_tokens(config))


def _named_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that a tokenizer_config.json names."""
    more: list[Any] = []
    for key in ("extra_special_tokens", "additional_special_tokens"):
        value = config.get(key) or []
        more += value.values() if isinstance(value, dict) else value
    named = [value for key, value in config.items() if key.endswith("_token")]
    for value in (*named, *more):
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            yield value
