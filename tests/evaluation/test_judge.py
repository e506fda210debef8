import pytest
import torch

from unclip.evaluation.judge import choose, distractors


def test_choices_on_constructed_embeddings():
    texts = torch.eye(3)
    images = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.5, 0.0], [0.0, 0.2, 0.9]])
    answer = torch.tensor([0, 1, 2])
    assert choose(images, texts, answer).tolist() == [True, False, True]
    own = texts[None].expand(3, -1, -1).clone()
    own[1] = own[1].flip(0)  # the second picture's choices in another order
    assert choose(images, own, torch.tensor([0, 2, 2])).tolist() == [True, True, True]


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_collapsed_or_broken_clip_is_never_right(value):
    texts = torch.full((4, 2), value)
    assert not choose(torch.ones(5, 2), texts, torch.zeros(5, dtype=torch.int64)).any()


def test_distractors_differ_in_their_words_and_are_repeatable():
    captions = [f"caption {k % 9}" for k in range(30)]  # 21 of them repeated
    rows = distractors(captions, count=7, seed=3)
    assert rows.shape == (30, 7)
    for caption, row in zip(captions, rows.tolist(), strict=True):
        texts = {captions[index] for index in row}
        assert len(texts) == 7 and caption not in texts
    assert torch.equal(rows, distractors(captions, count=7, seed=3))
    assert not torch.equal(rows, distractors(captions, count=7, seed=4))


def test_too_few_captions_for_the_distractors():
    assert distractors(["a", "b"], count=1).tolist() == [[1], [0]]
    with pytest.raises(ValueError, match="3 different captions, there are 2"):
        distractors(["a", "b", "b"], count=2)
