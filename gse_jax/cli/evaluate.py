"""`gse-jax evaluate`, `check`, `verify` and `report`: large evaluations that go on after a kill."""

import dataclasses
import json
from pathlib import Path

from gse_jax.cli import options


def add_commands(commands) -> None:
    """Add `evaluate`, `check`, `verify` and `report` to the parser.

    Args:
        commands: what `add_subparsers` returned.
    """
    evaluate = commands.add_parser(
        "evaluate", help="attack a data set into a run directory; call it again to resume",
        description="Attack every correctly classified image, and store each result. Called again "
                    "with the same arguments it goes on where it stopped.")
    evaluate.add_argument("--plan", help="TOML or JSON file with data, model and attacks")
    _add_plan_flags(evaluate)
    evaluate.add_argument("--method", help="name of the attack (default gse)")
    evaluate.add_argument("--offsets", help="targeted: label + 1, + 3, ... as 1,3; default "
                                            "untargeted")
    evaluate.add_argument("--target-file", help="targeted: sample ids and targets (.csv, .json, .npy)")
    evaluate.add_argument("--lanes", type=int, help="images worked on at a time")
    evaluate.add_argument("--seed", type=int, help="for attacks with randomness (default 0)")
    evaluate.add_argument("--out", default="gse-run", help="run directory (default gse-run)")
    evaluate.add_argument("--shard", metavar="I/N", help="do part I of N only (array jobs)")
    evaluate.add_argument("--engine", default="local", choices=("local", "distributed", "ray"))
    evaluate.add_argument("--stall-minutes", type=float, default=60.0,
                          help="end with the resumable code 75 when nothing moves for so long, as "
                               "on a hung device (default 60; 0 never)")
    evaluate.add_argument("--allow-mismatch", action="store_true",
                          help="go on in a directory of other weights, data or settings")
    evaluate.add_argument("--force", action="store_true", help="go on although a check found an "
                                                               "error")
    evaluate.set_defaults(run=_evaluate)

    check = commands.add_parser("check", help="look for what makes an evaluation worthless")
    _add_plan_flags(check)
    check.add_argument("--plan", help="TOML or JSON file with data and model")
    # The others are what only `evaluate` is told.
    check.set_defaults(run=_check, method=None, offsets=None, target_file=None, lanes=None, seed=None)

    verify = commands.add_parser("verify", help="classify and measure the stored images afresh")
    verify.add_argument("path", metavar="RUN", help="run directory of evaluate")
    verify.add_argument("--weights", help="where the run's weights are now (default: where the run says)")
    verify.add_argument("--quantize", action="store_true", help="after rounding to 8 bits, as in a PNG file")
    verify.set_defaults(run=_verify)

    report = commands.add_parser("report", help="one HTML page, and tables, of one or more runs")
    report.add_argument("paths", metavar="RUN", nargs="+", help="run directories of evaluate")
    report.add_argument("--out", help="folder (default: report/ in the first run)")
    report.set_defaults(run=_report)


_CHECKED_IMAGES = 1024  # at most, spread over the data: twice 0.6 GB at 224 x 224 pixels

# What a plan says; all of them are None where they were not given.
_PLAN_FLAGS = ("data", "model", "weights", "normalize", "limit", "expected_accuracy", "method",
               "offsets", "target_file", "lanes", "seed")


def _add_plan_flags(parser):
    parser.add_argument("--data", help=options.DATA)
    options.add_model(parser, required=False, hint="")
    parser.add_argument("--limit", type=int, help="take the first N images only")
    parser.add_argument("--expected-accuracy", type=float, help="clean accuracy to expect, 0 to 1")


def _plan(args):
    """The plan of a file, or of the flags."""
    from gse_jax.evaluation import Plan, load_plan

    if args.plan:
        given = next((flag for flag in _PLAN_FLAGS if getattr(args, flag) is not None), None)
        if given:
            raise ValueError(f"--{given.replace('_', '-')} is given beside --plan, which says it "
                             f"already; write it into {args.plan}")
        return load_plan(args.plan)
    for name in ("data", "model", "weights"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; pass --data, --model and --weights, or --plan")
    options.require_positive("--limit", args.limit)
    attack = {"method": "gse" if args.method is None else args.method}
    if args.offsets is not None:
        attack["offsets"] = options.integers("--offsets", args.offsets)
    if args.target_file is not None:
        attack["target_file"] = args.target_file
    return Plan.from_dict({
        "data": args.data, "model": args.model, "weights": args.weights, "limit": args.limit,
        "normalize": options.normalization(args.normalize or "half"), "attacks": [attack],
        "expected_accuracy": args.expected_accuracy, "seed": args.seed or 0, "lanes": args.lanes})


def _evaluate(args):
    from gse_jax.evaluation import display, evaluate, parse_shard
    from gse_jax.evaluation.interruption import resumable

    if args.stall_minutes < 0:
        raise ValueError(f"--stall-minutes must be positive, or 0 for never, got {args.stall_minutes:g}")
    plan = _plan(args)
    shard = parse_shard(args.shard) if args.shard is not None else None
    with resumable():
        with display() as show:
            run = evaluate(plan, args.out, shard=shard, engine=args.engine, on_progress=show,
                           allow_mismatch=args.allow_mismatch, force=args.force,
                           stall_seconds=60 * args.stall_minutes or None)
        lines = [f"{finding['severity']}: {finding['message']} {finding['fix']}"
                 for finding in run.manifest.get("findings", ()) if finding["severity"] != "info"]
        lines.append(f"{len(run.records)} of {run.total} results in {args.out}")
        if run.complete:
            lines += _write_report([_with_verification(run)], Path(args.out) / "report")
    print(*lines, sep="\n")  # when all is written: nobody may read it any more


def _check(args):
    from gse_jax.evaluation.job import preflight, set_up

    findings = preflight(set_up(_plan(args)), num_images=_CHECKED_IMAGES)
    for finding in findings:
        print(f"{finding.severity}: {finding.name}: {finding.message} {finding.fix}".rstrip())
    worst = [f for f in findings if f.severity == "error"]
    if worst:
        raise ValueError(f"{len(worst)} of the checks found an error")


def _verify(args):
    from gse_jax.evaluation import Plan, open_run, verify
    from gse_jax.evaluation.job import load_model

    model = None
    if args.weights is not None:
        plan = Plan.from_dict(open_run(args.path).manifest["plan"])
        model = load_model(dataclasses.replace(plan, weights=args.weights))
    result = verify(args.path, model=model, quantize=args.quantize)
    if not open_run(args.path).complete:
        print("the run is not complete: what is not there yet was not looked at")
    for name, case in result.cases.items():
        print(f"{name}: {json.dumps(case._asdict())}")
    for problem in result.problems[:20]:
        print(f"problem: {problem}")
    if not result.ok:
        where = (f"up to a thousand are in {result.path}" if result.path else
                 "the first 20 are above; the run's directory cannot be written to")
        raise ValueError(f"verification found {result.num_problems} problems; {where}")
    if any(case.attacked for case in result.cases.values()):
        print("verified: every success holds in a fresh forward pass")
    else:
        print("nothing to verify: no image was attacked")


def _report(args):
    from gse_jax.evaluation import open_run

    runs = [_with_verification(open_run(path)) for path in args.paths]
    print(*_write_report(runs, Path(args.out) if args.out else Path(args.paths[0]) / "report"), sep="\n")


def _with_verification(run):
    """Give the run what the page shows beside its records: a name, and what verify found."""
    from gse_jax.evaluation.store import digest_of_records, lost_records

    run.name = run.path.resolve().name
    path = run.path / "verification.json"
    if path.is_file():
        try:
            verification = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # damaged: as if it were not there
            verification = None
        # What was verified before the run went on, or lost some, says nothing of what is there now.
        if (isinstance(verification, dict) and verification.get("entries") == digest_of_records(run.path)
                and not lost_records(run.path)):
            run.manifest["verification"] = verification
    return run


def _write_report(runs, folder):
    """Write page and tables; return what to say."""
    from gse_jax import report
    from gse_jax.report.summary import misses_of_gse

    tables = report.write_tables(runs, folder)
    page = report.write_page(runs, folder / "index.html")
    return ["written: " + ", ".join(str(p) for p in (page, *tables)),
            next(p for p in tables if p.name == "summary.md").read_text(encoding="utf-8"),
            *(f"{run.name}: {line}" for run in runs for line in run.warnings),
            *(line for run in runs for line in misses_of_gse(run))]
