"""Checks of settings and hyperparameters, and preset tables, that attacks share; one clear line per mistake.

Every compared attack has the presets "original" (its authors' defaults), "gse_paper" (the settings of the
comparison on CIFAR-10, also called "cifar10") and "imagenet" (those of the comparison there).

References:
    arXiv 2311.17434, appendix (settings of the compared attacks).
"""

import dataclasses
import math

import jax
import numpy as np

DOMAINS = ("original", "gse_paper", "cifar10", "imagenet")


def chooser(method: str, presets):
    """Make a `Method.preset` of an attack's preset table.

    Args:
        method: name of the attack, for messages.
        presets: domain -> (settings, hyperparams), or (domain, targeted) where the direction matters, with
            domains "original", "cifar10" and "imagenet".

    Returns:
        (domain, targeted) -> (settings, hyperparams), domain one of `DOMAINS`; raises ValueError for others.
    """
    def preset(domain: str, targeted: bool):
        if domain not in DOMAINS:
            raise ValueError(f"domain={domain!r} has no preset for method {method!r}; "
                             f"use one of {', '.join(map(repr, DOMAINS))}")
        domain = "cifar10" if domain == "gse_paper" else domain
        return presets[domain] if domain in presets else presets[domain, bool(targeted)]

    return preset


def check_types(method: str, settings, hyperparams, settings_type, hyperparams_type) -> None:
    """Refuse the configuration of another attack.

    Args:
        method: name of the attack.
        settings: what came.
        hyperparams: what came.
        settings_type: what is expected.
        hyperparams_type: what is expected.

    Raises:
        TypeError: for anything else, and for a switch that is not True or False.
    """
    for name, value, expected in (("settings", settings, settings_type),
                                  ("hyperparams", hyperparams, hyperparams_type)):
        if not isinstance(value, expected):
            raise TypeError(f"{name} must be a {expected.__name__}, got {type(value).__name__}; "
                            f"start from gse_jax.preset({method!r}, 'cifar10') or 'imagenet'")
    for field in dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ():
        value = getattr(settings, field.name)
        # Any text is true in Python, "false" too.
        if isinstance(field.default, bool) and not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"settings.{field.name}={value!r} must be True or False")


def check_whole_numbers(settings, smallest: dict[str, int], prefix: str = "settings.") -> None:
    """Refuse settings that are no whole numbers, or too small.

    Args:
        settings: static configuration.
        smallest: field -> smallest value.
        prefix: what messages put before the field.

    Raises:
        ValueError: naming the field. A loop of 12.5 steps would never end.
    """
    for name, low in smallest.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"{prefix}{name}={value!r} must be a whole number >= {low}")
        if value < low:
            raise ValueError(f"{prefix}{name}={value} must be >= {low}")


def check_choice(settings, name: str, choices) -> None:
    """Refuse a setting that is not one of the choices.

    Args:
        settings: static configuration.
        name: field.
        choices: what it may be.

    Raises:
        ValueError: naming the choices.
    """
    if getattr(settings, name) not in choices:
        raise ValueError(f"settings.{name}={getattr(settings, name)!r} must be one of "
                         f"{', '.join(map(repr, choices))}")


def known_numbers(hyperparams):
    """Yield (name, float) of the hyperparameters that are not traced.

    Args:
        hyperparams: NamedTuple of numbers.

    Raises:
        ValueError: for one that is no single number.
    """
    for name, value in hyperparams._asdict().items():
        if np.shape(value) != ():
            raise ValueError(f"hyperparams.{name} must be one number, got shape "
                             f"{list(np.shape(value))}; to sweep it use jax.vmap over hyperparams")
        if not isinstance(value, jax.core.Tracer):
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise ValueError(f"hyperparams.{name}={value!r} must be a number") from None
            yield name, number


def check_numbers(hyperparams, may_be_zero=(), at_most_one=()) -> None:
    """Refuse hyperparameters that are not single positive finite numbers.

    Args:
        hyperparams: NamedTuple of numbers; traced values are not looked at.
        may_be_zero: fields for which 0 is allowed.
        at_most_one: fields that end at 1.

    Raises:
        ValueError: naming the field.
    """
    for name, number in known_numbers(hyperparams):
        zero_ok = name in may_be_zero
        if not (math.isfinite(number) and (number >= 0.0 if zero_ok else number > 0.0)):
            raise ValueError(f"hyperparams.{name}={number:g} must be finite and "
                             f"{'>= 0' if zero_ok else '> 0'}")
        if name in at_most_one and number > 1.0:
            raise ValueError(f"hyperparams.{name}={number:g} must be <= 1")


def check_range_width(settings) -> None:
    """Refuse a pixel range without width.

    Args:
        settings: static configuration with `range_width`.

    Raises:
        ValueError: unless it is positive and finite.
    """
    if not (math.isfinite(settings.range_width) and settings.range_width > 0.0):
        raise ValueError(f"settings.range_width={settings.range_width:g} must be finite and > 0")


def check_fits(settings, name: str, image_shape) -> None:
    """Refuse a number of pixels, or of cells in a row, that is larger than the image.

    Args:
        settings: static configuration.
        name: field.
        image_shape: (H, W, C).

    Raises:
        ValueError: if it is above the shorter side.
    """
    height, width = image_shape[:2]
    if getattr(settings, name) > min(height, width):
        raise ValueError(f"settings.{name}={getattr(settings, name)} does not fit into images of "
                         f"{height}x{width} pixels; use at most {min(height, width)}")


def check_num_pixels(settings, image_shape) -> None:
    """Refuse a budget that does not fit into the image.

    Args:
        settings: static configuration with `num_pixels`.
        image_shape: (H, W, C).

    Raises:
        ValueError: unless 1 <= num_pixels <= H * W.
    """
    check_whole_numbers(settings, {"num_pixels": 1})
    total = image_shape[0] * image_shape[1]
    if settings.num_pixels > total:
        raise ValueError(f"settings.num_pixels={settings.num_pixels} must lie in [1, {total}] for "
                         f"images of {image_shape[0]}x{image_shape[1]} pixels")
