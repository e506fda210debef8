"""CLIP's byte-pair tokens, in any context length and, if need be, a small vocabulary."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

BYTE_TOKENS = 512  # ids 0 to 255 spell a byte inside a word, 256 to 511 the last byte of a word
CACHED_CAPTIONS = 65536


class Tokens(NamedTuple):
    """Captions as ids.

    Attributes:
        tokens: start token, text, end token, then zeros.
        text_mask: true from the start to the end token.
    """

    tokens: Int64[Tensor, "batch length"]
    text_mask: Bool[Tensor, "batch length"]


@lru_cache(maxsize=1)
def _byte_pairs() -> SimpleTokenizer:
    """open_clip's tokenizer, whose table of merges comes with its package."""
    return SimpleTokenizer()


class Tokenizer:
    """CLIP's tokenizer (Radford et al. 2021): what `open_clip.tokenize` gives, and a mask.

    Over a small vocabulary the ids are counted anew, in CLIP's order, so that the start and end
    tokens stay the two greatest and 0 stays the padding. A token outside of it is written as the
    two that it was merged from, and these likewise, down to single bytes: every text can be
    written, and read back.

    Args:
        context_length: length of a row, start and end tokens included.
        vocabulary: the ids of CLIP's that are kept, ascending; all 49,408 when None.
            `fit_vocabulary` chooses them.

    Raises:
        ValueError: for a context without room for text, or a vocabulary that cannot spell every
            text.
    """

    def __init__(self, context_length: int = 77, vocabulary: Sequence[int] | None = None):
        if context_length < 3:
            raise ValueError(
                f"context_length is {context_length}; at least 3 leave room for a token"
            )
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
        """Encodes captions; what is too long is cut, and the end token kept at the end."""
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
        """The end of a caption that does not fit the context, from its first cut word on.

        It reads as CLIP reads it: lower case, single spaces. "" when everything fits.
        """
        text = _byte_pairs().clean_fn(caption)
        length = 2
        for start, tokens in _words(text):
            length += len(self._compact(tokens))
            if length > self.context_length:
                return text[start:]
        return ""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of one row of ids, start token, end token and padding left out."""
        text = []
        for token in tokens:
            if int(token) == self.end:
                break
            if int(token) != self.start:
                text.append(int(token) if self.vocabulary is None else self.vocabulary[int(token)])
        return _byte_pairs().decode(text).strip()

    def _encode(self, caption: str) -> tuple[int, ...]:
        """One caption's ids from start to end token, without padding."""
        text = _byte_pairs().clean_fn(caption)
        body = [token for _, tokens in _words(text) for token in self._compact(tokens)]
        return self.start, *body[: self.context_length - 2], self.end

    def _compact(self, tokens: Iterable[int]) -> list[int]:
        """CLIP's ids as this vocabulary's."""
        if self.vocabulary is None:
            return list(tokens)
        return [self._index[part] for token in tokens for part in _spell(token, self._index)]

    @cached_property
    def _index(self) -> dict[int, int]:
        return {token: index for index, token in enumerate(self.vocabulary or ())}

    def __reduce__(self):
        return Tokenizer, (self.context_length, self.vocabulary)  # without the cache


def full_vocabulary_size() -> int:
    """The number of CLIP's ids, start and end tokens included: 49,408."""
    return _byte_pairs().vocab_size


def fit_vocabulary(captions: Iterable[str], size: int) -> list[int]:
    """The `size` ids of CLIP's vocabulary that serve these captions best, ascending.

    They are the 512 single bytes, the start and end tokens, and the ids most frequent in the
    captions
    (ties: the lower id). Where the captions use fewer, CLIP's first merges, the most frequent
        pieces of
    general English, fill up.

    Raises:
        ValueError: for a size under 514 or over 49,408.
    """
    everything = full_vocabulary_size()
    if not BYTE_TOKENS + 2 <= size <= everything:
        raise ValueError(
            f"a vocabulary of {size} is not possible; give {BYTE_TOKENS + 2} to {everything}"
        )
    counts: Counter[int] = Counter()
    for caption, times in Counter(captions).items():
        for token in _byte_pairs().encode(caption):
            counts[token] += times
    merged = range(BYTE_TOKENS, everything - 2)
    chosen = sorted(merged, key=lambda token: (-counts[token], token))[: size - BYTE_TOKENS - 2]
    return [*range(BYTE_TOKENS), *sorted(chosen), everything - 2, everything - 1]


def _words(text: str) -> Iterable[tuple[int, list[int]]]:
    """Where each word of a cleaned text starts, and CLIP's ids for it."""
    bpe = _byte_pairs()
    for match in bpe.pat.finditer(text):
        symbols = "".join(bpe.byte_encoder[byte] for byte in match[0].encode("utf-8"))
        yield match.start(), [bpe.encoder[piece] for piece in bpe.bpe(symbols).split(" ")]


@lru_cache(maxsize=1)
def _parts() -> list[tuple[int, int]]:
    """The two ids that each merged id, from 512 on, consists of."""
    bpe = _byte_pairs()
    return [(bpe.encoder[left], bpe.encoder[right]) for left, right in bpe.bpe_ranks]


def _spell(token: int, kept) -> list[int]:
    """An id in terms of kept ones."""
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
            "the vocabulary must be ascending and hold ids 0 to 511 and the start and end tokens "
            f"{needed[-2:]}; unclip.clip.fit_vocabulary(captions, size) makes one"
        )
