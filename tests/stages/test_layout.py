"""The layout loss of the decoder."""

import pytest
import torch
import torch.nn.functional as F
from tiny_stages import decoder, embedded_batch, train

from unclip.batch import UNKNOWN_LABEL
from unclip.stages.layout import LayoutHead

CLASSES = [3, 4]
LAYOUT = {"level": 1, "classes": CLASSES, "weight": 0.5}


def labels_of(count=4):
    return torch.stack([torch.randint(classes, (count, 4, 4)) for classes in CLASSES], dim=1)


def test_the_loss_is_the_mean_cross_entropy_of_the_known_cells_summed_over_the_maps():
    head, features, labels = LayoutHead(5, CLASSES), torch.randn(4, 5, 4, 4), labels_of()
    labels[1] = UNKNOWN_LABEL
    known = [0, 2, 3]
    maps = head.out(F.silu(head.hidden(head.norm(features))))[known].split(CLASSES, dim=1)
    expected = sum(F.cross_entropy(maps[k], labels[known, k]) for k in range(2))
    torch.testing.assert_close(head(features, labels), expected)


@pytest.mark.parametrize("labels", [None, torch.full((4, 2, 4, 4), UNKNOWN_LABEL)])
def test_without_labels_the_loss_is_zero_and_reaches_every_weight(labels):
    head = LayoutHead(5, CLASSES)
    loss = head(torch.randn(4, 5, 4, 4), labels)
    loss.backward()
    assert loss == 0 and all(weight.grad is not None for weight in head.parameters())


def test_labels_of_another_size_are_an_error():
    with pytest.raises(ValueError, match=r"labels of \(4, 2, 4, 4\).*\(4, 2, 8, 8\)"):
        LayoutHead(5, CLASSES)(torch.randn(4, 5, 8, 8), labels_of())


def test_a_decoder_adds_the_weighted_layout_loss():
    stage = decoder(layout=LAYOUT)
    batch = embedded_batch() | {"labels": labels_of()}
    losses = []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        stage.layout["weight"] = weight
        losses.append(stage.loss(batch))
    plain, both = losses
    torch.testing.assert_close(both["loss"], plain["loss"] + 0.5 * both["layout"])
    assert both["layout"] == plain["layout"] > 0


def test_a_decoder_learns_what_is_where_from_its_features():
    stage = decoder(layout=LAYOUT)
    batch = embedded_batch() | {"labels": labels_of(1).expand(4, -1, -1, -1)}
    before = stage.loss(batch)["layout"]
    train(stage, batch, steps=60, lr=1e-2)
    assert stage.loss(batch)["layout"] < 0.5 * before


def test_sampling_does_not_depend_on_the_layout_head(generators):
    stage, batch = decoder(layout=LAYOUT), embedded_batch()
    samples = []
    for _ in range(2):
        samples.append(stage.sample(stage.condition(batch), generators=generators(4)))
        torch.nn.init.normal_(stage.layout_head.out.weight)
    assert torch.equal(*samples)
