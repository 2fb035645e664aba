"""Source strings, the limit, and what importing the room costs."""

import subprocess
import sys

import pytest

from gse_jax import data


def test_unknown_source_names_those_there_are():
    with pytest.raises(ValueError) as caught:
        data.load("cifar11:test")
    assert "'cifar11:test'" in str(caught.value)
    assert all(usage in str(caught.value) for usage in data.sources())


@pytest.mark.parametrize(
    ("limit", "error"), [(0, ValueError), (-3, ValueError), (True, TypeError), (2.0, TypeError)]
)
def test_bad_limit(limit, error):
    with pytest.raises(error, match=f"limit: got {limit}, expected an integer of at least 1"):
        data.load("digits", limit=limit)


def test_source_must_be_a_string():
    with pytest.raises(TypeError, match="source: got int, expected a string"):
        data.load(3)


def test_importing_the_room_loads_no_reader():
    heavy = "sklearn", "tensorflow_datasets", "tensorflow", "PIL", "flax"
    code = f"import sys, gse_jax.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
