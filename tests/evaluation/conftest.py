"""One uninterrupted small run, and a compilation cache for the processes that the tests start."""

import pytest

from gse_jax.evaluation import evaluate
from tests.evaluation import small_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The small run without any interruption: one device, one lane, many array files."""
    return evaluate(small_run.PLAN, tmp_path_factory.mktemp("whole"), model=small_run.model(),
                    data=small_run.dataset(), flush_samples=10)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder where compiled programs outlive their processes."""
    return tmp_path_factory.mktemp("cache")
