"""Superpixels of the images, found on the host before the loop, for the methods that ask for them.

References:
    Achanta, Shaji, Smith, Lucchi, Fua, Suesstrunk, SLIC superpixels compared to state-of-the-art
    superpixel methods, TPAMI 2012 (scikit-image's `slic`).
"""

import jax
import numpy as np

from gse_jax.attacks.validation import is_traced


def slic_segments(images, num_segments: int, blur: float = 0.0) -> np.ndarray:
    """Return SLIC superpixels of each image.

    Args:
        images: [N, H, W, C] NumPy, in [0, 1].
        num_segments: how many to aim at; SLIC makes more or fewer, never more than H * W.
        blur: standard deviation of a Gaussian blur before, in pixels.

    Returns:
        [N, H, W] int32, numbered from 0 without gaps.

    Raises:
        ImportError: in one line, where scikit-image is not installed.
    """
    try:
        from skimage.segmentation import slic
    except ImportError:
        raise ImportError("superpixels need scikit-image, which is not installed; use "
                          "pip install \"gse-jax[baselines]\"") from None
    if images.shape[-1] == 1:  # three channels become Lab, up to 100; beside distances a range of 1 counts for nothing
        images = np.repeat(images, 3, axis=-1)
    found = [slic(np.asarray(image, np.float64), n_segments=num_segments, compactness=10.0,
                  sigma=blur, channel_axis=-1) for image in images]
    # Numbers without gaps, whatever scikit-image's version begins with.
    labels = [np.unique(labels, return_inverse=True)[1].reshape(labels.shape) for labels in found]
    return np.stack(labels).astype(np.int32) if labels else np.zeros(images.shape[:3], np.int32)


def segments_of(method, settings, x, bounds):
    """Return the superpixels that a method needs for these images.

    Args:
        method: row of the registry.
        settings: its static configuration.
        x: [N, H, W, C] in `bounds`; may be traced, the host is then called from the program.
        bounds: (low, high).

    Returns:
        [N, H, W] int32; None where the method needs none.
    """
    low, high = bounds

    def on_host(images):
        unit = (np.asarray(images, np.float64) - low) / (high - low)
        return method.segment(settings, np.clip(unit, 0.0, 1.0))

    # No images tell whether these settings need superpixels at all.
    if method.segment is None or method.segment(settings, np.zeros((0, *x.shape[1:]))) is None:
        return None
    if not is_traced(x):
        return on_host(x)
    shape = jax.ShapeDtypeStruct(x.shape[:3], np.int32)
    return jax.pure_callback(on_host, shape, x, vmap_method="sequential")
