"""The card says what the files and the evaluation say."""

import json

import pytest
import tiny_bundle

from unclip.bundle import save_stage
from unclip.model_card import write_model_card

TRAINED = {
    "seconds": 1800.0,
    "data": "data/emoji_s",
    "license": "CC-BY-SA-4.0",
    "concept_set": "S",
    "commit": "0123456789ab",
    "command": "python src/train.py stage=upsampler_256 scale=emoji",
    "validation/psnr": 31.25,
}
SHARE = {"interval": [0.4, 0.6], "n": 47}
RESULTS = {
    "key": "emoji-seen-64-n500-9e332394",
    "scores": {
        "fd_effnet_lite0": {"value": 524.27, "interval": [498.3, 550.2], "n": 500, "real": 65.2},
        "unknown_real": {"value": 0.5, "interval": [0.4, 0.6], "n": 500, "real": None},
    },
    "two_objects": {
        "test_seen": {
            "generated": {"both": {"share": 0.5, **SHARE}, "colors": {"share": 0.95, **SHARE}},
            "real": {"both": {"share": 1.0, **SHARE}, "colors": {"share": 1.0, **SHARE}},
        }
    },
    "upsampler_256": dict(psnr=32.7, psnr_bicubic=24.1, ssim=0.98, ssim_bicubic=0.91, n=48),
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "demo" / "upsampler_256.safetensors"
    stage, recipe = tiny_bundle.stage("upsampler_256"), tiny_bundle.recipe("upsampler_256")
    save_stage(path, stage, recipe=recipe, steps=1500, clip_fingerprint=None, extra=TRAINED)
    return path.parent


def card(folder):
    return write_model_card(folder).read_text()


def test_it_tells_how_the_stages_were_trained_and_credits_openmoji(folder):
    parameters = sum(p.numel() for p in tiny_bundle.stage("upsampler_256").parameters()) / 1e6
    text = card(folder)
    assert text.startswith("# demo\n")
    for words in (
        f"| upsampler_256 | {parameters:.2f} | 1500 | 1800 s | psnr 31.25 |",
        "took 0.5 hours with unclip at commit 0123456789ab",
        "\n    python src/train.py stage=upsampler_256 scale=emoji\n",
        "The 18 concepts are: apple, dog, cat",
        *("[OpenMoji](https://openmoji.org)", "License of the weights: CC-BY-SA-4.0"),
    ):
        assert words in text


def test_other_data_is_not_credited_to_openmoji(tmp_path):
    text = card(tiny_bundle.write(tmp_path / "own", ("clip",)))
    assert "OpenMoji" not in text and "The training data is not recorded" in text
    assert "License of the weights: not recorded" in text


def test_without_an_evaluation_it_says_so(folder):
    text = card(folder)
    assert "has not been evaluated: run `python src/evaluate.py model=models/demo`" in text
    assert text.rstrip().endswith("Not measured.")


def test_numbers_have_their_interval_their_count_and_the_real_number(folder):
    (folder / "results.json").write_text(json.dumps(RESULTS))
    text = card(folder)
    assert "protocol key emoji-seen-64-n500-9e332394" in text
    assert "| scores.fd_effnet_lite0 | 524.3 | 498.3 to 550.2 | 65.2 | 500 |" in text
    assert "| scores.unknown_real | 0.5 | 0.4 to 0.6 | – | 500 |" in text
    assert "| two_objects.test_seen.generated.both | 0.5 | 0.4 to 0.6 | 1 | 47 |" in text
    assert "| upsampler_256.psnr | 32.7 | – | 24.1 | 48 |" in text


def test_failures_are_shares_well_below_those_of_real_images(folder):
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "NOTES.md").write_text("![two cats](failures.png)\n")
    failures = card(folder).split("## Known failures")[1]
    assert "- two_objects.test_seen.generated.both: 50% of the images are right" in failures
    assert "colors" not in failures and "fd_effnet" not in failures
    assert failures.endswith("![two cats](failures.png)\n")
