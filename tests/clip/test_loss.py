import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from unclip.clip import caption_ids, contrastive_loss, recall_at


def _pairs(count=6, dim=5):
    image = F.normalize(torch.randn(count, dim, dtype=torch.float64), dim=-1).requires_grad_()
    text = F.normalize(torch.randn(count, dim, dtype=torch.float64), dim=-1)
    return image, text, torch.arange(count)


def test_the_loss_is_the_mean_of_two_cross_entropies():
    image, text, captions = _pairs()
    contrast = contrastive_loss(image, text, torch.tensor(10.0), captions)
    logits = 10 * image @ text.T
    rows = -(logits.diag() - logits.logsumexp(1)).mean()
    columns = -(logits.diag() - logits.logsumexp(0)).mean()
    torch.testing.assert_close(contrast.loss, (rows + columns) / 2)
    torch.testing.assert_close(contrast.loss, ClipLoss()(image, text, 10.0))
    own = torch.arange(6)
    assert contrast.image_to_text == (logits.argmax(1) == own).float().mean()
    assert contrast.text_to_image == (logits.argmax(0) == own).float().mean()


def test_a_repeated_caption_is_not_a_negative():
    image, text, captions = _pairs(4)
    captions[2] = captions[0]
    text = torch.cat([text[:2], text[:1], text[3:]])
    logits = 10 * image @ text.T
    expected = 0.0
    for i in range(4):
        rest = [j for j in range(4) if {i, j} != {0, 2}]
        expected += logits[i, rest].logsumexp(0) + logits[rest, i].logsumexp(0) - 2 * logits[i, i]
    contrast = contrastive_loss(image, text, torch.tensor(10.0), captions)
    torch.testing.assert_close(contrast.loss, expected / 8)
    contrast.loss.backward()
    assert image.grad.isfinite().all()


def test_equal_tokens_have_equal_ids_and_others_do_not():
    tokens = torch.randint(0, 49408, (2000, 77))
    tokens[1] = tokens[0]
    tokens[2] = tokens[0].roll(1)  # the same tokens in another order
    tokens[3] = tokens[0]
    tokens[3, 76] += 1
    ids = caption_ids(tokens)
    assert ids[0] == ids[1] and len(ids.unique()) == 1999


PROCESS = """
    import sys, unclip, torch, torch.distributed as dist, torch.multiprocessing as mp
    import torch.nn.functional as F
    from unclip.clip import contrastive_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    image, text = torch.randn(2, 6, 5, dtype=torch.float64).unbind()
    text[4] = text[1]
    captions = torch.tensor([0, 1, 2, 3, 1, 5])

    def loss(weight, rows, gather):
        pair = [F.normalize(part[rows] @ weight, dim=-1) for part in (image, text)]
        return contrastive_loss(*pair, torch.tensor(10.0), captions[rows], gather=gather).loss

    def work(rank, folder):
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
        weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
        part = loss(weight, slice(3 * rank, 3 * rank + 3), True)
        part.backward()
        both = torch.cat([part.detach().view(1), weight.grad.flatten()])
        dist.all_reduce(both)
        if rank == 0:
            weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
            whole = loss(weight, slice(None), False)
            whole.backward()
            expected = torch.cat([whole.detach().view(1), weight.grad.flatten()])
            torch.testing.assert_close(both / 2, expected)
        dist.destroy_process_group()

    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_gradients_of_two_processes_average_to_those_of_the_whole_batch(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROCESS), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr


def test_recall_equals_a_result_by_hand():
    # images 0 and 3 are nearest to their own texts, 1 and 2 to each other's
    image = torch.eye(4)
    text = torch.tensor([[1, 0, 0, 0], [0, 0.5, 1, 0], [0, 1, 0.5, 0], [0.9, 0, 0, 1.0]])
    recall = recall_at(image, text, k=(1, 2), among=4)
    for way in ("image_to_text", "text_to_image"):
        assert (recall[f"{way}_at_1"], recall[f"{way}_at_2"]) == (0.5, 1)


def test_unrelated_and_constant_embeddings_score_chance():
    for image, text in (torch.randn(2, 64 * 40, 64), torch.ones(2, 64, 4)):
        recall = recall_at(image, text)
        assert recall["image_to_text_at_1"] == pytest.approx(1 / 64, abs=0.01)
        assert recall["text_to_image_at_5"] == pytest.approx(5 / 64, abs=0.02)


def test_groups_are_consecutive_and_an_incomplete_one_is_left_out():
    image = torch.eye(10)
    text = image.clone()
    text[8:] = text[[9, 8]]
    assert recall_at(image, text, among=4)["image_to_text_at_1"] == 1
    assert recall_at(image, text, among=10)["image_to_text_at_1"] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="10 pairs, fewer than a group"):
        recall_at(image, text)
