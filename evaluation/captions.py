"""How near a description is to those that people gave: ROUGE-L and CIDEr-D, as the COCO caption
evaluation defines them (arXiv 1504.00325).

Texts are cut into lower-case words without punctuation. COCO's own tool cuts them with a Java
program (PTBTokenizer), whose words differ in a few places, such as "don't"; who compares figures
with printed ones to the last digit needs it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

WORD = re.compile(r"\w+(?:['’]\w+)*")
ROUGE_BETA = 1.2  # how much more recall counts than precision
LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty for another length, in words

Ngram = tuple[str, ...]


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return WORD.findall(text.lower())


# -- ROUGE-L --------------------------------------------------------------------------------------


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Words of the longest sequence that stands in both, with others between them or not."""
    row = [0] * (len(second) + 1)
    for one in first:
        before = 0
        for place, other in enumerate(second, 1):
            longest = before + 1 if one == other else max(row[place], row[place - 1])
            before, row[place] = row[place], longest
    return row[-1]


def rouge_l(answer: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L of words, 0 to 1: the best precision and the best recall over the references."""
    common = [common_subsequence(answer, reference) for reference in references]
    precision = max(c / len(answer) for c in common) if answer else 0.0
    recall = max((c / len(r) for c, r in zip(common, references) if r), default=0.0)
    if not precision or not recall:
        return 0.0
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


# -- CIDEr-D --------------------------------------------------------------------------------------


def ngrams(sequence: Sequence[str]) -> Counter[Ngram]:
    """How often every n-gram of 1 to `LONGEST` words stands in a text."""
    return Counter(
        tuple(sequence[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(sequence) - length + 1)
    )


class Cider:
    """CIDEr-D (arXiv 1411.5726): n-grams that few pictures' references have weigh more. How many
    have them is counted once, over the references of all pictures."""

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        self.pictures = math.log(len(references)) if references else 0.0
        self.having: dict[Ngram, int] = defaultdict(int)  # n-gram -> pictures
        for of_one in references:
            for ngram in {ngram for reference in of_one for ngram in ngrams(reference)}:
                self.having[ngram] += 1

    def score(self, answer: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Of one picture's answer, from 0 to 10."""
        mine = self._weighted(answer)
        total = sum(self._similarity(mine, self._weighted(reference)) for reference in references)
        return 10 * total / len(references)

    def _weighted(self, sequence: Sequence[str]) -> tuple[dict[Ngram, float], list[float], int]:
        """Weight of every n-gram, the norm of each length's weights, and the length in pairs of
        words, which is what the reference implementation compares."""
        weights, squares, pairs = {}, [0.0] * LONGEST, 0
        for ngram, count in ngrams(sequence).items():
            weight = count * (self.pictures - math.log(max(1, self.having.get(ngram, 0))))
            weights[ngram] = weight
            squares[len(ngram) - 1] += weight**2
            pairs += count if len(ngram) == 2 else 0
        return weights, [math.sqrt(square) for square in squares], pairs

    def _similarity(self, answer: tuple, reference: tuple) -> float:
        """Mean over the lengths of n-grams of the cosine, in which no n-gram counts more often than
        the reference has it, times the penalty for another length."""
        (mine, my_norms, my_pairs), (other, norms, pairs) = answer, reference
        cosines = [0.0] * LONGEST
        for ngram, weight in mine.items():
            in_reference = other.get(ngram, 0.0)
            cosines[len(ngram) - 1] += min(weight, in_reference) * in_reference
        for length, (first, second) in enumerate(zip(my_norms, norms)):
            if first and second:
                cosines[length] /= first * second
        return sum(cosines) / LONGEST * math.exp(-((my_pairs - pairs) ** 2) / (2 * SIGMA**2))
