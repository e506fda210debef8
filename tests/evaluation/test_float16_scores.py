"""float16 changes a bundle's scores by less than their intervals."""

from tiny_evaluation import METRICS, context_of

import convert
from unclip.evaluation.measurement import run


def test_distances_and_retrieval_stay_within_their_intervals(tiny_model, squares, tmp_path):
    found, half = [], tmp_path / "half"
    convert.to_float16(tiny_model, half)
    for model in (tiny_model, half):
        context = context_of(model, squares, tmp_path / f"out of {model.name}")
        found.append(run(METRICS, context).scores)
    for name in ("fd_patches", "kid_patches", "clip_score_judge", "r_precision_judge"):
        low, high = found[0][name].interval
        assert low <= found[1][name].value <= high, name
        assert abs(found[1][name].value - found[0][name].value) <= (high - low) / 2, name
