"""When two short answers are the same: the normalisation and the accuracy of VQA (arXiv 1505.00468,
and https://visualqa.org/evaluation.html).

An answer and the people's answers go through the same three steps: punctuation is dropped, words of
a number become digits, articles are dropped and missing apostrophes are put in. VQA's own script
does only the first step to the people's answers, which its files hold normalised; its server does
all three to both, and so do we, so that files of other makers count alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

AGREEING = 3  # people who say the same make an answer right
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
ARTICLES = ("a", "an", "the")
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
# Each is put in place of itself without one of its apostrophes. "she'd" and "we'd" are not among
# them, as "shed" and "wed" are words; "i'm" is not, as the script's "Im" meets no lower-cased text.
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _contractions() -> dict[str, str]:
    found = {"somebody'd": "somebodyd"}  # the one entry that takes an apostrophe away
    for whole in CONTRACTED:
        for place, character in enumerate(whole):
            if character == "'":
                found[whole[:place] + whole[place + 1 :]] = whole
    return found


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """Punctuation becomes a space, or nothing where it stands beside a space, or where the text has
    a number such as 1,000; a full stop goes unless a digit follows it."""
    kept = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_space or THOUSANDS.search(text) else " ")
    return FULL_STOP.sub("", kept)


def normalised(answer: str) -> str:
    """What is compared of an answer."""
    text = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, labels: Sequence[str]) -> float:
    """VQA accuracy, from 0 to 1: leave out each of the people in turn, and see how many of the
    others say the same; `AGREEING` make it right, fewer a third each; the mean over all of them.

    Where fewer than `AGREEING` + 1 answers were given, no answer could be wholly right: one that
    equals any of them counts as right there.
    """
    said = normalised(answer)
    same = [said == normalised(label) for label in labels]
    if len(labels) <= AGREEING:
        return float(any(same))
    agreeing = sum(same)
    return sum(min((agreeing - own) / AGREEING, 1.0) for own in same) / len(labels)


def token_f1(answer: str, label: str) -> float:
    """Harmonic mean of precision and recall over the words of both, each as often as it stands
    there (as in SQuAD, arXiv 1606.05250); 1 for two empty answers."""
    said, wanted = normalised(answer).split(), normalised(label).split()
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))
