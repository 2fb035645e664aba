"""The training script on few images and a narrow network."""

import hashlib

import numpy as np
import pytest

from gse_jax import data, models
from gse_jax.models import train

WIDTHS = (4, 4, 8)


@pytest.fixture(scope="module")
def digits():
    """Digits 0 and 1 at half the size."""
    dataset = data.load("digits:train")
    chosen = np.flatnonzero(dataset.labels < 2)[:192]
    return dataset._replace(images=dataset.images[chosen, ::2, ::2], labels=dataset.labels[chosen])


def run(digits, seed):
    return list(train.train(8, digits.images, digits.labels, epochs=10, seed=seed, widths=WIDTHS))


@pytest.mark.slow
def test_learns_and_repeats_itself_by_seed(digits, tmp_path):
    digests = []
    for seed in (0, 0, 1):
        epochs = run(digits, seed)
        models.save(tmp_path / "w", epochs[-1][1])
        digests.append(hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    losses = [loss for _, _, loss in epochs]
    assert losses[-1] < 0.5 * losses[0]
    apply_fn, params, _ = epochs[-1]
    assert train.accuracy(apply_fn, params, digits) > 0.9
    flipped = digits._replace(labels=1 - digits.labels)
    assert train.accuracy(apply_fn, params, flipped) < 0.1


def test_shifts_move_whole_images_and_fill_with_background():
    random = np.random.RandomState(0)
    image = np.zeros((64, 9, 9, 1), np.float32)
    image[:, 4, 4] = 1
    shifted = train._shifted(random, image, np.array([0.0], np.float32))
    rows, columns = np.nonzero(shifted[..., 0])[1:]
    assert len(rows) == 64 and {*rows} == {*columns} == {*range(9)}
    filled = train._shifted(random, image + 2, np.array([-1.0], np.float32))
    assert filled.shape == image.shape and filled.min() == -1 and filled.max() == 3


def test_an_epoch_is_of_whole_batches():
    for size, count in ((64, 1), (127, 1), (128, 2)):
        batches = list(train._batches(np.random.RandomState(0), size))
        assert len(batches) == count and len(set(np.concatenate(batches))) == 64 * count


def test_too_few_images_or_epochs_are_refused(digits):
    for count, epochs in ((192, 0), (63, 1)):
        with pytest.raises(ValueError, match=f"got {epochs} over {count} images"):
            next(train.train(8, digits.images[:count], digits.labels, epochs=epochs, seed=0))


def test_command_line(digits, tmp_path, monkeypatch, capsys):
    for arguments, message in [
        (["--out", str(tmp_path / "absent" / "w")], "--out: folder"),
        (["--out", str(tmp_path / "w"), "--epochs", "0"], "--epochs: got 0"),
    ]:
        with pytest.raises(SystemExit):
            train.main(arguments)
        assert message in capsys.readouterr().err
    _, params = models.load("resnet20", weights="digits")

    def epochs_of(depth, images, labels, *, epochs, seed):
        assert (depth, len(images), len(labels), epochs, seed) == (20, 1437, 1437, 2, 3)
        apply_fn, _ = models.load("resnet20", weights="digits")
        yield from [(apply_fn, params, 0.5)] * 2

    monkeypatch.setattr(train, "train", epochs_of)
    train.main(["--out", str(tmp_path / "w"), "--epochs", "2", "--seed", "3"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    # What the module's docstring states about the shipped file, checked against that file.
    digest = hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    assert digest in last and digest in train.__doc__
    assert "test accuracy 0.9889" in last and "test accuracy 0.9889" in train.__doc__
