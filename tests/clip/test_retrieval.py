import pytest
import torch

from unclip.clip import recall_at


def test_recall_equals_a_result_by_hand():
    # images 0 and 3 are nearest to their own texts, 1 and 2 to each other's
    image = torch.eye(4)
    text = torch.tensor([[1, 0, 0, 0], [0, 0.5, 1, 0], [0, 1, 0.5, 0], [0.9, 0, 0, 1.0]])
    recall = recall_at(image, text, k=(1, 2), among=4)
    assert recall["image_to_text_at_1"] == 0.5
    assert recall["image_to_text_at_2"] == 1
    assert recall["text_to_image_at_1"] == 0.5
    assert recall["text_to_image_at_2"] == 1


def test_the_scale_of_an_embedding_does_not_matter():
    image, text = torch.randn(32, 8), torch.randn(32, 8)
    scaled = recall_at(image * torch.rand(32, 1).add(0.1), text * 7, among=16)
    for name, value in recall_at(image, text, among=16).items():
        assert scaled[name] == value


def test_identical_embeddings_have_recall_one():
    image = torch.randn(128, 64)
    assert all(value == 1 for value in recall_at(image, image).values())


def test_unrelated_embeddings_score_chance():
    chance = recall_at(torch.randn(64 * 40, 64), torch.randn(64 * 40, 64))
    assert chance["image_to_text_at_1"] == pytest.approx(1 / 64, abs=0.01)
    assert chance["text_to_image_at_5"] == pytest.approx(5 / 64, abs=0.02)


def test_constant_embeddings_score_chance():
    recall = recall_at(torch.ones(64, 4), torch.ones(64, 4))
    assert recall["image_to_text_at_1"] == pytest.approx(1 / 64)
    assert recall["text_to_image_at_5"] == pytest.approx(5 / 64)


def test_groups_are_consecutive_and_an_incomplete_one_is_left_out():
    image = torch.eye(10)
    text = image.clone()
    text[8:] = text[[9, 8]]
    assert recall_at(image, text, among=4)["image_to_text_at_1"] == 1
    assert recall_at(image, text, among=10)["image_to_text_at_1"] == pytest.approx(0.8)


def test_too_few_pairs_are_an_error():
    with pytest.raises(ValueError, match="10 pairs, fewer than a group"):
        recall_at(torch.eye(10), torch.eye(10))
