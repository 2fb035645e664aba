"""Every attack by name: one line each."""

from gse_jax.attacks.algorithm import Method
from gse_jax.attacks.baselines.group_mirror_descent import GSMD
from gse_jax.attacks.baselines.homotopy import HOMOTOPY
from gse_jax.attacks.baselines.nuclear_frank_wolfe import FWNUCL
from gse_jax.attacks.baselines.perturbation_factorization import SAPF
from gse_jax.attacks.baselines.projected_gradient_descent import PGD
from gse_jax.attacks.baselines.projected_gradient_descent_l0 import PGD0
from gse_jax.attacks.baselines.random_search import SPARSE_RS
from gse_jax.attacks.baselines.sigma_zero import SIGMA_ZERO
from gse_jax.attacks.baselines.sparse_frank_wolfe import SAIF
from gse_jax.attacks.baselines.sparse_projected_gradient_descent import SPARSE_PGD
from gse_jax.attacks.baselines.structured_attack import STRATTACK
from gse_jax.attacks.gse import GSE
from gse_jax.attacks.refinement import GSE_REFINED

METHODS: dict[str, Method] = {
    "gse": GSE,
    "gse_refined": GSE_REFINED,
    "pgd": PGD,
    "sigma_zero": SIGMA_ZERO,
    "pgd0": PGD0,
    "sparse_rs": SPARSE_RS,
    "sparse_pgd": SPARSE_PGD,
    "saif": SAIF,
    "fwnucl": FWNUCL,
    "strattack": STRATTACK,
    "gsmd": GSMD,
    "homotopy": HOMOTOPY,
    "sapf": SAPF,
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
        domain: "cifar10" or "imagenet" (also NIPS2017), the settings of the GSE paper; for GSE also
            "imagenet_robust"; for the compared attacks also "original" (their authors' defaults)
            and "gse_paper" (the same as "cifar10").
        targeted: direction of the attack.

    Returns:
        (settings, hyperparams): static configuration, and a pytree of floats that can be swept
        without compiling anew.

    Raises:
        ValueError: for an unknown method or domain.
    """
    return find_method(method).preset(domain, targeted)
