"""Every attack by name: one line each, imported when first used."""

import collections
import importlib

from gse_jax.attacks.algorithm import Method


class _Methods(collections.UserDict):
    """Name to Method; an entry may say where its Method is, "module:NAME", until it is asked for.

    A dozen modules of settings and states take as long to import as the engine itself, and a caller
    uses one or two of them.
    """

    def __getitem__(self, name: str) -> Method:
        row = self.data[name]
        if isinstance(row, str):
            module, attribute = row.split(":")
            row = getattr(importlib.import_module(f"gse_jax.attacks.{module}"), attribute)
            self.data[name] = row
        return row


METHODS = _Methods({
    "gse": "gse:GSE",
    "gse_refined": "refinement:GSE_REFINED",
    "pgd": "baselines.projected_gradient_descent:PGD",
    "sigma_zero": "baselines.sigma_zero:SIGMA_ZERO",
    "pgd0": "baselines.projected_gradient_descent_l0:PGD0",
    "sparse_rs": "baselines.random_search:SPARSE_RS",
    "sparse_pgd": "baselines.sparse_projected_gradient_descent:SPARSE_PGD",
    "saif": "baselines.sparse_frank_wolfe:SAIF",
    "fwnucl": "baselines.nuclear_frank_wolfe:FWNUCL",
    "strattack": "baselines.structured_attack:STRATTACK",
    "gsmd": "baselines.group_mirror_descent:GSMD",
    "homotopy": "baselines.homotopy:HOMOTOPY",
    "sapf": "baselines.perturbation_factorization:SAPF",
})


def find_method(name: str) -> Method:
    """Return the registry row of an attack.

    Args:
        name: key of `METHODS`.

    Returns:
        Method.

    Raises:
        ValueError: for an unknown name.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; use one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]


def preset(method: str, domain: str, targeted: bool = False):
    """Return the published configuration of an attack.

    Args:
        method: name of the attack, e.g. "gse".
        domain: "cifar10" or "imagenet" (also NIPS2017), the settings of the GSE paper; for GSE also
            "imagenet_robust"; for the compared attacks also "original" (their authors' defaults)
            and "gse_paper" (the same as "cifar10", for images of any size).
        targeted: direction of the attack.

    Returns:
        (settings, hyperparams): static configuration, and a pytree of floats that can be swept
        without compiling anew.

    Raises:
        ValueError: for an unknown method or domain.
    """
    return find_method(method).preset(domain, targeted)
