"""CLIP's byte-pair tokenizer, with any context length and optionally a small vocabulary."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import islice, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

BYTE_TOKENS = 512  # ids 0 to 255 are bytes inside a word, 256 to 511 the last byte of a word
CACHED_CAPTIONS = 65536
LONGEST_WORD = 1024  # bytes; longer ones are split, because merging takes their length squared


class Tokens(NamedTuple):
    """Captions as token ids.

    Attributes:
        tokens: start token, text, end token, then zeros.
        text_mask: true from the start token to the end token.
    """

    tokens: Int64[Tensor, "batch length"]
    text_mask: Bool[Tensor, "batch length"]


@lru_cache(maxsize=1)
def _byte_pairs() -> SimpleTokenizer:
    """Return open_clip's tokenizer, whose merges are part of its package."""
    return SimpleTokenizer()


class Tokenizer:
    """CLIP's tokenizer (Radford et al. 2021): the ids of `open_clip.tokenize`, and a mask.

    With a small vocabulary the ids are renumbered in CLIP's order, so that the start and end tokens
    are still the two largest and 0 is still the padding. A token that is not in the vocabulary is
    split into the two that it was merged from, recursively down to single bytes, so every text can
    be encoded.

    Args:
        context_length: length of a row, including start and end tokens.
        vocabulary: CLIP's ids that are kept, ascending (`fit_vocabulary`); None keeps all 49,408.

    Raises:
        ValueError: the context has no room for text, or the vocabulary cannot encode every text.
    """

    def __init__(self, context_length: int = 77, vocabulary: Sequence[int] | None = None):
        if context_length < 3:
            raise ValueError(f"context_length is {context_length}; it must be at least 3")
        if vocabulary is not None:
            vocabulary = tuple(int(token) for token in vocabulary)
            _check_vocabulary(vocabulary)
        self.context_length = context_length
        self.vocabulary = vocabulary
        self.vocabulary_size = full_vocabulary_size() if vocabulary is None else len(vocabulary)
        self.start = self.vocabulary_size - 2
        self.end = self.vocabulary_size - 1
        self._row = lru_cache(maxsize=CACHED_CAPTIONS)(self._encode)

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """Encode captions; longer ones are truncated before the end token."""
        if isinstance(captions, str):
            raise ValueError("the tokenizer takes a list of captions, not one string")
        rows = [self._row(caption) for caption in captions]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        tokens = [row + (0,) * (self.context_length - len(row)) for row in rows]
        return Tokens(
            torch.tensor(tokens, dtype=torch.int64).view(-1, self.context_length),
            torch.arange(self.context_length) < lengths[:, None],
        )

    def cut(self, caption: str) -> str:
        """Return the part of a caption that is truncated, or "" if the caption fits.

        The text is in CLIP's form: lower case, single spaces.
        """
        text = _byte_pairs().clean_fn(caption)
        length = 2
        for start, tokens in _words(text):
            length += len(self._compact(tokens))
            if length > self.context_length:
                return text[start:]
        return ""

    def _encode(self, caption: str) -> tuple[int, ...]:
        """Return a caption's ids from start to end token, without padding."""
        text = _byte_pairs().clean_fn(caption)
        body = (token for _, tokens in _words(text) for token in self._compact(tokens))
        return self.start, *islice(body, self.context_length - 2), self.end

    def _compact(self, tokens: Iterable[int]) -> list[int]:
        """Convert CLIP's ids to this vocabulary's."""
        if self.vocabulary is None:
            return list(tokens)
        return [self._index[part] for token in tokens for part in _spell(token, self._index)]

    @cached_property
    def _index(self) -> dict[int, int]:
        return {token: index for index, token in enumerate(self.vocabulary or ())}

    def __reduce__(self):
        return Tokenizer, (self.context_length, self.vocabulary)  # without the cache


def full_vocabulary_size() -> int:
    """Return the number of CLIP's ids, including start and end tokens: 49,408."""
    return _byte_pairs().vocab_size


def fit_vocabulary(captions: Iterable[str], size: int) -> list[int]:
    """Return the `size` most useful ids of CLIP's vocabulary for these captions, ascending.

    They are the 512 single bytes, the start and end tokens, and the most frequent ids of the
    captions (in ties, the lower id). If the captions use fewer, the rest are CLIP's first merges,
    the most frequent pieces of general English.

    Raises:
        ValueError: the size is below 514 or above 49,408.
    """
    everything = full_vocabulary_size()
    if not BYTE_TOKENS + 2 <= size <= everything:
        raise ValueError(
            f"the vocabulary size is {size}; it can be {BYTE_TOKENS + 2} to {everything}"
        )
    counts: Counter[int] = Counter()
    for caption, times in Counter(captions).items():
        for _, tokens in _words(_byte_pairs().clean_fn(caption)):
            for token in tokens:
                counts[token] += times
    merged = range(BYTE_TOKENS, everything - 2)
    chosen = sorted(merged, key=lambda token: (-counts[token], token))[: size - BYTE_TOKENS - 2]
    return [*range(BYTE_TOKENS), *sorted(chosen), everything - 2, everything - 1]


def _words(text: str) -> Iterable[tuple[int, list[int]]]:
    """Yield the start of each word of a cleaned text, and its ids."""
    bpe = _byte_pairs()
    for match in bpe.pat.finditer(text):
        symbols = "".join(bpe.byte_encoder[byte] for byte in match[0].encode("utf-8"))
        for start in range(0, len(symbols), LONGEST_WORD):
            pieces = bpe.bpe(symbols[start : start + LONGEST_WORD]).split(" ")
            yield match.start(), [bpe.encoder[piece] for piece in pieces]


@lru_cache(maxsize=1)
def _parts() -> list[tuple[int, int]]:
    """Return the two ids that each merged id, from 512 on, consists of."""
    bpe = _byte_pairs()
    return [(bpe.encoder[left], bpe.encoder[right]) for left, right in bpe.bpe_ranks]


def _spell(token: int, kept) -> list[int]:
    """Split an id into kept ids."""
    if token in kept:
        return [token]
    left, right = _parts()[token - BYTE_TOKENS]
    return _spell(left, kept) + _spell(right, kept)


def _check_vocabulary(vocabulary: tuple[int, ...]) -> None:
    everything = full_vocabulary_size()
    needed = (*range(BYTE_TOKENS), everything - 2, everything - 1)
    ascending = all(a < b for a, b in pairwise(vocabulary))
    if not ascending or vocabulary[:BYTE_TOKENS] + vocabulary[-2:] != needed:
        raise ValueError(
            "the vocabulary must be ascending and contain the ids 0 to 511 and the start and end "
            f"tokens {needed[-2:]}; use unclip.clip.fit_vocabulary(captions, size)"
        )
