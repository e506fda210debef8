import pytest
import torch
from tiny_evaluation import PerfectClip

from unclip.emoji.probes import Probe
from unclip.evaluation.choices import choose, distractors, judge_choices, wilson


def test_choices_on_constructed_embeddings():
    texts = torch.eye(3)
    images = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.5, 0.0], [0.0, 0.2, 0.9]])
    answer = torch.tensor([0, 1, 2])
    own = texts.repeat(3, 1, 1)
    assert choose(images, own, answer).tolist() == [True, False, True]
    own[1] = own[1].flip(0)  # the second image's choices in another order
    assert choose(images, own, torch.tensor([0, 2, 2])).tolist() == [True, True, True]


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_collapsed_or_broken_clip_is_never_right(value):
    texts = torch.full((5, 4, 2), value)
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


def test_a_perfect_judge_is_always_right_and_a_blind_one_never():
    texts = [f"caption {k}" for k in range(10)]
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 4, 4)
    probe = Probe(
        rows=[1, 4],
        choices=[["caption 1", "caption 2"], ["caption 9", "caption 4"]],
        answers=[0, 1],
    )
    unasked = Probe(rows=[], choices=[], answers=[])
    asked = {"probe": probe, "unasked": unasked}
    right = judge_choices(PerfectClip(texts), images, texts, asked, among=6)
    assert right == {
        "caption": {"share": 1.0, "error": 0.0, "interval": [*wilson(1, 10)], "among": 6, "n": 10},
        "probe": {"share": 1.0, "error": 0.0, "interval": [*wilson(1, 2)], "among": 2, "n": 2},
    }
    shifted = judge_choices(PerfectClip(texts), images.roll(1, 0), texts, {}, among=10)
    assert shifted["caption"]["share"] == 0
