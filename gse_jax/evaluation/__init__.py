"""Data x model x attack -> records: what ran, and what came of it.

`evaluate` is the road for whole data sets: it stores every result, survives a kill at any moment
and resumes. `run_attack` is the short one for images in memory.
"""

from gse_jax.evaluation.attack_run import (
    AttackRun,
    load_run,
    next_class,
    predict,
    run_attack,
    save_run,
)
from gse_jax.evaluation.checks import Finding, check
from gse_jax.evaluation.comparison import BUDGETS, Comparison, compare
from gse_jax.evaluation.durable import StoreError
from gse_jax.evaluation.evaluator import ENGINES, MismatchError, PreflightError, evaluate
from gse_jax.evaluation.explanation import PERCENTILES, Explanation, explain
from gse_jax.evaluation.front import CAPS, Front, pareto
from gse_jax.evaluation.hosts import parse_shard
from gse_jax.evaluation.interruption import EXIT_RESUMABLE, Preempted
from gse_jax.evaluation.plan import AttackPlan, Plan, load_plan
from gse_jax.evaluation.progress import RunProgress, display
from gse_jax.evaluation.run_directory import Run, open_run
from gse_jax.evaluation.sources import ImageSource
from gse_jax.evaluation.verification import CaseVerification, Verification, verify

__all__ = [
    "BUDGETS",
    "CAPS",
    "ENGINES",
    "EXIT_RESUMABLE",
    "PERCENTILES",
    "AttackPlan",
    "AttackRun",
    "CaseVerification",
    "Comparison",
    "Explanation",
    "Finding",
    "Front",
    "ImageSource",
    "MismatchError",
    "Plan",
    "Preempted",
    "PreflightError",
    "Run",
    "RunProgress",
    "StoreError",
    "Verification",
    "check",
    "compare",
    "display",
    "evaluate",
    "explain",
    "load_plan",
    "load_run",
    "next_class",
    "open_run",
    "pareto",
    "parse_shard",
    "predict",
    "run_attack",
    "save_run",
    "verify",
]
