"""Images and their perturbation as tiles for the eye, and tiles as PNG.

References:
    arXiv 2311.17434 (figures of adversarial examples).
"""

import base64
import io

import numpy as np

_RED = (0.82, 0.05, 0.05)


def to_unit(image, bounds):
    """Map an image from its bounds to RGB in [0, 1].

    Args:
        image: [H, W, C], C = 1 or 3.
        bounds: (lo, hi), shown as black and white.

    Returns:
        [H, W, 3] float64; grey where the image is NaN or infinite.
    """
    low, high = bounds
    unit = (np.asarray(image, np.float64) - low) / (high - low)
    # A broken image is drawn grey where it is broken; its caption says what happened.
    unit = np.clip(np.nan_to_num(unit, nan=0.5, posinf=0.5, neginf=0.5), 0, 1)
    return np.repeat(unit, 3, axis=-1) if unit.shape[-1] == 1 else unit


def changed_places(clean, adversarial):
    """Tell which pixels differ in any channel.

    Args:
        clean: [H, W, C].
        adversarial: [H, W, C].

    Returns:
        bool [H, W]; NaN on both sides counts as equal.
    """
    clean, adversarial = np.asarray(clean), np.asarray(adversarial)
    same = (clean == adversarial) | (np.isnan(clean) & np.isnan(adversarial))
    return ~same.all(axis=-1)


def overlay_tile(unit, changed):
    """Lay the changed pixels in red on the faded grey image.

    The red differs from every grey in brightness as well, so it can be told apart without colours.

    Args:
        unit: [H, W, 3] in [0, 1].
        changed: bool [H, W].

    Returns:
        [H, W, 3] in [0, 1].

    References:
        ITU-R BT.709 (luminance).
    """
    grey = unit @ np.array([0.2126, 0.7152, 0.0722])
    faded = np.repeat(0.45 + 0.55 * grey[..., None], 3, axis=-1)
    return np.where(changed[..., None], np.array(_RED), faded)


def png_data_uri(tile):
    """Encode a tile as a PNG inside a data URI; equal tiles give equal text.

    Args:
        tile: [H, W, 3] in [0, 1].

    Returns:
        str, "data:image/png;base64,...".

    References:
        PNG specification, W3C (third edition).
    """
    from PIL import Image  # when needed

    content = io.BytesIO()
    Image.fromarray(np.round(np.asarray(tile) * 255).astype(np.uint8)).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
