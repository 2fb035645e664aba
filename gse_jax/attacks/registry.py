"""Every attack by name: one line each."""

from gse_jax.attacks.algorithm import Method
from gse_jax.attacks.gse import GSE

METHODS: dict[str, Method] = {
    "gse": GSE,
}


def find_method(name: str) -> Method:
    """Return the registry row of an attack.

    Args:
        name: key of `METHODS`.

    Returns:
        Method.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; use one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]


def preset(method: str, domain: str, targeted: bool = False):
    """Return the published configuration of an attack.

    Args:
        method: name of the attack, e.g. "gse".
        domain: "cifar10", "imagenet" (also NIPS2017) or "imagenet_robust".
        targeted: direction of the attack.

    Returns:
        (settings, hyperparams): static configuration, and a pytree of floats that can be swept
        without compiling anew.

    Raises:
        ValueError: for an unknown method or domain.
    """
    return find_method(method).preset(domain, targeted)
