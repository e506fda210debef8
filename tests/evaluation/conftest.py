import pytest
import tiny_bundle
import tiny_evaluation
from tiny_shards import write_shards


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """A data set of plain squares with the splits val and test_seen."""
    root = tmp_path_factory.mktemp("squares")
    return write_shards(root, splits=("val", "test_seen"), images=24)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A data set of emoji scenes whose images are noise."""
    return tiny_evaluation.write_data(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny bundle with both priors and a judge."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return tiny_evaluation.write_model(folder, (*tiny_bundle.NAMES, "prior_ar"))


@pytest.fixture(scope="session")
def small_model(tiny_model, tmp_path_factory):
    """The same bundle without the autoregressive prior."""
    folder = tmp_path_factory.mktemp("models") / "small"
    return tiny_evaluation.part_of(tiny_model, folder, *tiny_bundle.NAMES, "judge")
