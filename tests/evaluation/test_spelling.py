"""Known similarities, and the OCR reader on words that a font draws."""

import sys

import pytest
import torch

from unclip.evaluation.limits import WORDS, load_reader, sign, similarity


def test_similarity_ignores_case_and_spaces():
    pairs = {
        ("Deep Learning", "deeplearning"): 1,
        ("", "STOP"): 0,
        ("SHOP", "STOP"): 0.75,
        ("STOPSTOP", "STOP"): 0.5,
        ("", ""): 1,
        ("kitten", "sitting"): 1 - 3 / 7,
        ("intention", "execution"): 1 - 5 / 9,
        ("ab", "ba"): 0,
    }
    assert similarity(*zip(*pairs, strict=True)).tolist() == pytest.approx(list(pairs.values()))


def test_a_sign_holds_its_words_whole():
    for size in (64, 256):
        for words in ("I", *WORDS):
            dark = sign(words, size).float().mean(dim=0) < 128
            assert dark.any()
            edge = size // 32
            assert not dark[:edge].any() and not dark[-edge:].any()
            assert not dark[:, :edge].any() and not dark[:, -edge:].any()


def test_the_reader_reads_what_a_font_draws_and_nothing_in_an_empty_image():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    read = load_reader()
    assert read(sign("HELLO", 256)) == "HELLO"
    assert read(torch.full((3, 64, 64), 255, dtype=torch.uint8)) == ""


def test_without_the_reader_the_message_has_the_command(monkeypatch):
    from unclip.evaluation import limits as spelling

    monkeypatch.setattr(spelling, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[text\]'"):
        load_reader()


def test_a_network_that_the_package_lacks_is_not_fetched(monkeypatch, tmp_path):
    pytest.importorskip("rapidocr")
    monkeypatch.setattr(sys.modules["rapidocr"], "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="has no network for Det"):
        load_reader()
