"""Images in one array, in memory or mapped from a file, that become floats one by one.

An array of 8-bit images is a quarter of the size of what attacks work on, and a mapped one needs no
memory at all.
"""

from collections.abc import Sequence

import numpy as np

from gse_jax.data.dataset import (
    Dataset,
    check_image_array,
    checked_dataset,
    checked_names,
    to_float,
)


class ArrayImages:
    """Labelled images as a source for `gse_jax.evaluation`.

    Attributes:
      ids: N different names.
      labels: `[N]` int32.
      class_names: Name of each class, or `()`.

    Args:
      images: `[N, H, W, C]`, uint8 or floating point; not copied. Floating-point values are not
        looked at here: an evaluation sets single images outside [0, 1] aside.
      labels: `[N]`, integers.
      ids: N different names, or None for the zero-padded position.
      class_names: Name of each class, or `()`.
      source: Where they come from, for error messages.

    Raises:
      TypeError: If images are neither uint8 nor floating point, or labels are no integers.
      ValueError: If a shape or a length is not as described, or an id comes twice.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, ids: Sequence[str] | None,
                 class_names: Sequence[str] = (), *, source: str):
        check_image_array(images, source)
        self.labels, self.ids = checked_names(len(images), labels, ids, class_names, source)
        self.class_names = tuple(class_names)
        self._images, self._source = images, source

    def __len__(self) -> int:
        """Return N."""
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return `(image [H, W, C] float32, label)`; 8-bit images are divided by 255."""
        return to_float(self._images[index]), int(self.labels[index])

    def to_dataset(self) -> Dataset:
        """Convert everything in memory.

        Returns:
          The images, in order.

        Raises:
          ValueError: If an image holds NaN or values outside [0, 1].
        """
        return checked_dataset(self._images, self.labels, self.ids, self.class_names,
                               source=self._source)
