import pytest
import tiny_protocol
from tiny_shards import write_shards


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """A data set of plain squares with the splits val and test_seen."""
    root = tmp_path_factory.mktemp("squares")
    return write_shards(root, splits=("val", "test_seen"), images=24)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny bundle with both priors and a judge."""
    return tiny_protocol.write_model(tmp_path_factory.mktemp("models") / "tiny")
