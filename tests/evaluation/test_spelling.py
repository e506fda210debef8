"""Edit distance by values that are known, and the reader on words that a font draws."""

import sys

import pytest
import torch

from unclip.evaluation.spelling import WORDS, edit_distance, reader, sign, similarity


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("kitten", "sitting", 3),
        ("saturday", "sunday", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance_has_the_textbooks_values(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_similarity_is_of_the_letters_alone():
    assert similarity("Deep Learning", "deeplearning") == 1
    assert similarity("", "STOP") == 0 and similarity("SHOP", "STOP") == 0.75
    assert similarity("STOPSTOP", "STOP") == 0.5
    assert similarity("", "") == 1


def test_a_sign_holds_its_words_whole():
    for size in (64, 256):
        for words in ("I", *WORDS):
            dark = sign(words, size).float().mean(dim=0) < 128
            assert dark.any()
            edge = size // 32
            assert not dark[:edge].any() and not dark[-edge:].any()
            assert not dark[:, :edge].any() and not dark[:, -edge:].any()


def test_the_reader_reads_what_a_font_draws_and_nothing_in_an_empty_picture():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    read = reader()
    assert read(sign("HELLO", 256)) == "HELLO"
    assert read(torch.full((3, 64, 64), 255, dtype=torch.uint8)) == ""


def test_without_the_reader_the_message_has_the_command(monkeypatch):
    from unclip.evaluation import spelling

    monkeypatch.setattr(spelling, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[text\]'"):
        reader()


def test_a_network_that_the_package_lacks_is_not_fetched(monkeypatch, tmp_path):
    pytest.importorskip("rapidocr")
    monkeypatch.setattr(sys.modules["rapidocr"], "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="has no network for Det"):
        reader()
