"""Every figure of conf/measure/paper.yaml on a tiny bundle."""

import inspect
from unittest.mock import Mock

import pytest
import torch
from emoji_renders import drawn
from omegaconf import OmegaConf
from tiny_evaluation import CONF, configured, part_of, scenes_context

from unclip.cascade import Cascade
from unclip.emoji.prompts import caption_pairs
from unclip.emoji.scene_files import description
from unclip.evaluation.figure_scores import diversity, write_word
from unclip.evaluation.measurement import run
from unclip.evaluation.sources import Real

pytestmark = pytest.mark.filterwarnings("ignore:a prompt is too long")

SMALL = {
    "variations": {"images": 2, "count": 2},
    "interpolation": {"pairs": 1, "frames": 3},
    "text_diffs": {"images": 2, "frames": 2},
    "components": {"images": 2, "dimensions": [1, 4, 99]},
    "text_diff_score": {"pairs": 4, "frames": 3},
    "inversion": {"images": 2, "steps": [2, 3], "guidance": [1.0]},
    "typographic_attack": {"images": 2, "count": 1},
    "prior_importance": {"prompts": ["a red apple", "a blue star"]},
    "priors": {"captions": 3, "shown": 2},
    "guidance": {"scales": [1.0, 2.0], "captions": 2, "each": 3},
}
FIGURES = configured("paper", {name: {**small, "size": 64} for name, small in SMALL.items()})


def context_with_images(model, out, **settings):
    """Return a context whose real images are noise with the captions of single objects."""
    context = scenes_context(model, out / "no data", out, **settings)
    scenes = [scene for scene in drawn("test_seen", 60) if scene.kind == "recoloured"][:12]
    metadata = [description(scene, seed=0) for scene in scenes]
    captions = [scene["captions"][0] for scene in metadata]
    torch.manual_seed(0)
    real = Real(torch.randint(256, (12, 3, 64, 64)).byte(), captions, metadata)
    context.real = lambda split, size=64, count=None: real
    return context


@pytest.fixture(scope="module")
def context(small_model, tmp_path_factory):
    return context_with_images(small_model, tmp_path_factory.mktemp("out"))


def table_of(figure, context):
    return next(iter(FIGURES[figure](context).tables.values()))


def test_every_figure_of_the_configuration_is_tried_here():
    assert set(OmegaConf.load(CONF / "paper.yaml")) == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_figure_has_images_or_tables_and_a_note(context, name):
    result = FIGURES[name](context)
    assert (result.images or result.tables) and result.note
    for table in result.tables.values():
        assert table.rows and all(len(row) == len(table.head) for row in table.rows)
    for image in result.images.values():
        assert min(image.size) > 64


def test_figures_are_as_large_as_the_bundle_can_make_them(context):
    large = configured("paper", {"variations": {"images": 1, "count": 1, "size": 4096}})
    assert large["variations"].size_in(context) == context.cascade.size


def test_a_prior_that_the_bundle_lacks_is_named_with_its_command(context):
    assert "ar: `python src/train.py stage=prior_ar" in FIGURES["priors"](context).note


def test_a_figure_without_the_judge_is_not_available(small_model, tmp_path):
    model = part_of(small_model, tmp_path, "clip", "prior", "decoder")
    chosen = {"guidance": FIGURES["guidance"]}
    reasons = run(chosen, context_with_images(model, tmp_path)).not_available
    assert "judge.safetensors is missing" in reasons["guidance"]


def test_diversity_is_one_minus_the_mean_cosine_between_images_of_a_caption():
    same, orthogonal = torch.ones(2, 4), torch.eye(4)[:2]
    assert diversity(same, 2) == pytest.approx(0, abs=1e-6)
    assert diversity(torch.cat([same, 3 * orthogonal]), 2) == pytest.approx(0.5)


def test_a_word_is_written_on_a_slip():
    plain = torch.zeros(3, 256, 256, dtype=torch.uint8)
    changed = (write_word(plain, "star") != plain).any(dim=0)
    rows, columns = changed.nonzero().unbind(dim=1)
    assert 0 < changed.float().mean() < 0.3
    assert 128 < rows.float().mean() < 220 and 100 < columns.float().mean() < 156


def test_cosines_and_answers_do_not_depend_on_the_length_of_embeddings(context, monkeypatch):
    """Image embeddings of Karlo's CLIP are not of unit length."""
    before, embed = table_of("typographic_attack", context), Cascade.embed
    monkeypatch.setattr(Cascade, "embed", lambda *args, **how: 3 * embed(*args, **how))
    assert all(1 / 9 < row[-1] <= 1 + 1e-5 for row in table_of("inversion", context).rows)
    after = table_of("typographic_attack", context)
    for row, expected in zip(after.rows, before.rows, strict=True):
        assert row[2:] == pytest.approx(expected[2:], abs=1e-5)


@pytest.mark.parametrize("name", ["text_diffs", "text_diff_score"])
def test_caption_pairs_are_chosen_by_the_context_s_seed(small_model, tmp_path, name, monkeypatch):
    chosen = Mock(side_effect=caption_pairs)
    monkeypatch.setattr(inspect.getmodule(type(FIGURES[name])), "caption_pairs", chosen)
    FIGURES[name](context_with_images(small_model, tmp_path, seed=7))
    assert chosen.call_args.kwargs == {"seed": 7}
