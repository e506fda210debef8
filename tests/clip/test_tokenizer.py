import pickle
import random
import time

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from unclip.clip import Tokenizer, fit_vocabulary

CAPTIONS = [
    "a red apple to the left of a blue dog",
    "",
    "  Two\tCATS &amp;lt;3 &eacute; it's we'll ‘quoted’ 1984  ",
    "日本語の絵 🍎🍏 ünïcödé",
    "the quick brown fox jumps over the lazy dog " * 20,
    "<end_of_text> and <start_of_text>",
    "a" * 300,
    "=-" * 1000,
    "红色的狗" * 100,
]


@pytest.fixture(scope="module")
def small():
    return fit_vocabulary(["a red apple", "a blue apple"], 520)


@pytest.mark.parametrize("length", [3, 16, 77])
def test_the_whole_vocabulary_equals_open_clip(length):
    tokens, mask = Tokenizer(length)(CAPTIONS)
    assert torch.equal(tokens, open_clip.tokenize(CAPTIONS, context_length=length))
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    for row, row_mask in zip(tokens.tolist(), mask.tolist(), strict=True):
        count = sum(row_mask)
        assert row_mask == [True] * count + [False] * (length - count)
        assert row[0] == 49406 and row[count - 1] == 49407
        assert not any(row[count:])


def test_a_caption_of_a_megabyte_without_a_space_takes_no_longer_than_one_of_a_kilobyte():
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=2**20)
    started = time.process_time()
    tokens, _ = Tokenizer()(["".join(letters)])
    assert time.process_time() - started < 5  # hours if the word were merged as a whole
    assert torch.equal(tokens, open_clip.tokenize(["".join(letters[:1024])]))


def test_a_fitted_vocabulary_has_the_size_the_bytes_and_the_frequent_words(small):
    assert len(small) == 520 and small == sorted(set(small))
    assert small[:512] == list(range(512)) and small[-2:] == [49406, 49407]
    words = open_clip.tokenize("red apple blue")[0, 1:4].tolist()
    assert set(words) < set(small)
    # three words, and CLIP's first merges in the other three places
    assert set(small[512:-2]) - set(words) == {512, 513, 514}


def test_frequent_ids_are_kept_and_in_ties_the_lower_id():
    red, blue, apple = open_clip.tokenize("red blue apple")[0, 1:4].tolist()
    assert fit_vocabulary(["blue apple", "blue"], 515)[512] == blue
    assert fit_vocabulary(["apple red"], 515)[512] == min(red, apple)
    assert fit_vocabulary(iter(["apple red", "red apple"]), 514)[512:] == [49406, 49407]


def test_a_small_vocabulary_encodes_every_text(small):
    tokens, mask = Tokenizer(4000, small)(CAPTIONS)
    assert tokens.max() == 519
    full = SimpleTokenizer()
    for row, caption in enumerate(CAPTIONS[:5]):
        text = full.decode([small[index] for index in tokens[row][mask[row]][1:-1]])
        assert text == full.decode(full.encode(caption))


def test_words_of_the_vocabulary_are_one_token_and_others_are_split(small):
    tokenizer = Tokenizer(32, small)
    words = open_clip.tokenize("red apple")[0, 1:3].tolist()
    tokens, mask = tokenizer(["red apple", "zebra"])
    assert [small[index] for index in tokens[0, 1:3]] == words
    assert mask[0].sum() == 4 and mask[1].sum() > 3


def test_the_end_token_has_the_largest_id_for_argmax_pooling(small):
    tokens, mask = Tokenizer(16, small)([caption for caption in CAPTIONS if "<end" not in caption])
    assert torch.equal(tokens.argmax(1), mask.sum(1) - 1)
    assert (tokens[:, 0] == 518).all()


def test_cut_returns_the_truncated_part_with_the_whole_word_that_was_split(small):
    tokenizer = Tokenizer(7)  # five words
    assert tokenizer.cut("a red apple on grass") == ""
    assert tokenizer.cut("a red apple on grass, Far   away") == ", far away"
    caption = "one two three four five six seven"
    fits = caption.removesuffix(tokenizer.cut(caption))
    assert fits == "one two three four five "
    assert torch.equal(tokenizer([fits]).tokens, tokenizer([caption]).tokens)
    assert Tokenizer(5, small).cut("apple xylophone") == "xylophone"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_vocabulary([], 513), "514 to 49408"),
        (lambda: fit_vocabulary([], 49409), "514 to 49408"),
        (lambda: Tokenizer(8, range(512)), "fit_vocabulary"),
        (lambda: Tokenizer(8, [*range(511), 600, 49406, 49407]), "fit_vocabulary"),
        (lambda: Tokenizer(8, [*range(512), 900, 800, 49406, 49407]), "fit_vocabulary"),
        (lambda: Tokenizer(2), "at least 3"),  # no room for text
        (lambda: Tokenizer(8)("a red apple"), "list of captions"),
    ],
)
def test_what_cannot_encode_every_text_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_tokenizer_can_be_pickled(small):
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(12, small)))
    assert tokenizer.context_length == 12
    assert torch.equal(tokenizer(CAPTIONS).tokens, Tokenizer(12, small)(CAPTIONS).tokens)
