"""Training that starts from a bundle's weights."""

import sys
from pathlib import Path

import pytest
import torch

from unclip import bundle
from unclip.training.run import resolve_init, copy_upstream

sys.path.append(str(Path(__file__).parents[1]))
import tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny", ("clip", "prior"))


def test_a_bundle_or_a_file_is_named(folder):
    path = folder / "prior.safetensors"
    assert resolve_init(folder, "prior") == resolve_init(path, "prior") == path
    with pytest.raises(FileNotFoundError, match=r"init=.*decoder\.safetensors"):
        resolve_init(folder, "decoder")


def test_the_clip_that_the_weights_belong_to_comes_along(folder, tmp_path):
    copy_upstream(["clip", "absent"], folder, tmp_path / "mine")
    names = ("clip.safetensors",)
    copied = tmp_path / "mine" / names[0]
    assert copied.read_bytes() == (folder / names[0]).read_bytes()
    copied.write_bytes(b"own")
    copy_upstream(["clip"], folder, tmp_path / "mine")
    assert copied.read_bytes() == b"own"  # what is there stays


def test_sizes_are_compared_before_anything_is_built(folder):
    recipe = tiny_bundle.recipe("prior")
    with torch.device("meta"):
        bundle.check_start(bundle.build(recipe), folder / "prior.safetensors")
        recipe["network"]["layers"] = 2
        with pytest.raises(ValueError, match=r"lacks network\.blocks\.1"):
            bundle.check_start(bundle.build(recipe), folder / "prior.safetensors")


class Trainer:
    """As much of one as the start of a fit looks at."""

    ckpt_path, world_size, is_global_zero = None, 1, True


def test_statistics_come_with_the_weights(folder, monkeypatch):
    from unclip.training.prior import PriorModule

    embedder = bundle.load_embedder(folder / "clip.safetensors")
    empty = embedder.text([""])
    for fitted in (False, True):
        recipe = {**tiny_bundle.recipe("prior"), "learn_null_text": False}
        module = PriorModule(
            bundle.build(recipe),
            recipe=recipe,
            optimizer=None,
            schedule=None,
            embedder=embedder,
            statistics_loaded=fitted,
        )
        fits = []
        monkeypatch.setattr(module.stage, "fit_statistics", fits.append)
        monkeypatch.setattr(module, "training_batches", lambda: "batches")
        monkeypatch.setattr(type(module), "trainer", Trainer())
        module.on_fit_start()
        assert fits == ([] if fitted else ["batches"])
        null = module.stage.null_text
        assert not null.states.requires_grad
        expected = 0 * empty.text_states if fitted else empty.text_states
        torch.testing.assert_close(null.states, expected[:, :2])
