"""The demo model's task: three kinds of text prompts whose answers a plain function can check.

| kind    | prompt              | answer         | sizes                                |
|---------|---------------------|----------------|--------------------------------------|
| add     | ``"17+25="``        | ``"42"``       | operands from 0 to 99                |
| sort    | ``"sort 7 3 9 1:"`` | ``" 1 3 7 9"`` | 2 to 10 digits, repeats allowed      |
| reverse | ``"reverse abcd:"`` | ``" dcba"``    | 1 to 13 different lower-case letters |

Every byte is one token of the demo tokenizer, so an answer has 1 to 20 tokens, and one more for ``<eos>``. Training
goes one digit and one letter further than what is asked, because a model is weakest at the longest size it has seen.
A prompt belongs to the training part or to the held-out part by its own hash, so no list of either has to be kept.
Pure functions on the standard library: the training script, the prompt generator and the tests share them.
"""

import hashlib
import random
import re
import string
from collections.abc import Callable, Iterator

LARGEST_OPERAND = 99
SORT_LENGTHS = (2, 10)
WORD_LENGTHS = (1, 13)
EXTRA_TRAINING_LENGTH = 1
"""How many digits or letters the longest training prompts have beyond those that are asked."""

HELD_OUT_ONE_IN = 10
"""One prompt in this many, chosen by hash, is never trained on."""

_ADD = re.compile(r"(\d+)\+(\d+)=")
_SORT = re.compile(r"sort (\d(?: \d)*):")
_REVERSE = re.compile(r"reverse ([a-z]+):")


def add_prompt(rng: random.Random, extra_length: int = 0) -> str:
    """Returns an addition prompt such as ``"17+25="``; there are no longer ones, `extra_length` changes nothing."""
    return f"{rng.randint(0, LARGEST_OPERAND)}+{rng.randint(0, LARGEST_OPERAND)}="


def sort_prompt(rng: random.Random, extra_length: int = 0) -> str:
    """Returns a sorting prompt such as ``"sort 7 3 9 1:"``, at most `extra_length` digits over the asked size."""
    shortest, longest = SORT_LENGTHS
    return f"sort {' '.join(rng.choices(string.digits, k=rng.randint(shortest, longest + extra_length)))}:"


def reverse_prompt(rng: random.Random, extra_length: int = 0) -> str:
    """Returns a reversing prompt such as ``"reverse abcd:"``, at most `extra_length` letters over the asked size."""
    shortest, longest = WORD_LENGTHS
    return f"reverse {''.join(rng.sample(string.ascii_lowercase, k=rng.randint(shortest, longest + extra_length)))}:"


PROMPT_KINDS: dict[str, Callable[[random.Random, int], str]] = {
    "add": add_prompt,
    "sort": sort_prompt,
    "reverse": reverse_prompt,
}


def kind_of(prompt: str) -> str:
    """Returns the kind of a prompt, a key of `PROMPT_KINDS`.

    Raises:
        ValueError: the prompt is of none of the three kinds.
    """
    for kind, pattern in (("add", _ADD), ("sort", _SORT), ("reverse", _REVERSE)):
        if pattern.fullmatch(prompt):
            return kind
    raise ValueError(f"not a demo prompt: {prompt!r}; expected one like '17+25=', 'sort 7 3 9 1:' or 'reverse abcd:'")


def solve(prompt: str) -> str:
    """Returns the right answer to a prompt, without ``<eos>``.

    Raises:
        ValueError: the prompt is of none of the three kinds.
    """
    kind = kind_of(prompt)
    if kind == "add":
        left, right = prompt[:-1].split("+")
        return str(int(left) + int(right))
    body = prompt[:-1].split(" ", maxsplit=1)[1]
    if kind == "sort":
        return " " + " ".join(sorted(body.split(" ")))
    return " " + body[::-1]


def is_held_out(prompt: str) -> bool:
    """Says whether a prompt belongs to the held-out part; the SHA-256 of its UTF-8 bytes decides."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "little") % HELD_OUT_ONE_IN == 0


def draw_prompts(
    rng: random.Random, *, held_out: bool, extra_length: int = 0, weights: dict[str, float] | None = None
) -> Iterator[str]:
    """Yields prompts of one part for ever; the same prompt may come again.

    Args:
        rng: the only source of randomness; the same state gives the same prompts.
        held_out: which part to draw from.
        extra_length: how far past the asked sizes the longest prompts go, in digits or letters.
        weights: relative share of each kind; equal shares when None.
    """
    kinds = list(weights or PROMPT_KINDS)
    shares = [weights[kind] for kind in kinds] if weights else None
    while True:
        kind = rng.choices(kinds, weights=shares)[0]
        # Redrawing inside the kind keeps the shares whatever the hash turns away.
        prompt = PROMPT_KINDS[kind](rng, extra_length)
        while is_held_out(prompt) != held_out:
            prompt = PROMPT_KINDS[kind](rng, extra_length)
        yield prompt


def draw_unique_prompts(seed: int, num_prompts: int, *, held_out: bool, extra_length: int = 0) -> list[str]:
    """Returns `num_prompts` different prompts of one part, the three kinds in nearly equal shares."""
    unique: dict[str, None] = {}
    for prompt in draw_prompts(random.Random(seed), held_out=held_out, extra_length=extra_length):
        unique.setdefault(prompt)
        if len(unique) == num_prompts:
            break
    return list(unique)
