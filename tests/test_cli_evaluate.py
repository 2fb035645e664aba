"""`gse-jax evaluate`, `check`, `verify` and `report` as a user types them."""

import io
import json
import shutil
import signal
import sys

import numpy as np
import pytest

from gse_jax import cli
from gse_jax.evaluation import evaluator

PLAN = """
data = "digits"
model = "resnet20"
weights = "digits"
limit = 4
[[attacks]]
method = "gse"
settings = { num_runs = 1, max_steps = 6, phase1_steps = 3 }
[[attacks]]
method = "gse"
offsets = [1, 2]
settings = { num_runs = 1, max_steps = 6, phase1_steps = 3 }
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run, evaluated through the command line."""
    folder = tmp_path_factory.mktemp("evaluate")
    plan = folder / "plan.toml"
    plan.write_text(PLAN)
    assert cli.main(["evaluate", "--plan", str(plan), "--out", str(folder / "run")]) == 0
    return folder / "run", plan


def test_evaluate_ends_with_tables_and_a_page(run, capsys):
    folder, plan = run
    assert cli.main(["evaluate", "--plan", str(plan), "--out", str(folder)]) == 0  # nothing left
    shown = capsys.readouterr().out
    assert "12 of 12 results" in shown and "gse/untargeted" in shown and "gse/targeted+2" in shown
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "gse/targeted+1" in page
    for name in ("summary.csv", "summary.md", "summary.tex", "targeted.csv"):
        assert (folder / "report" / name).stat().st_size > 50


def test_flags_reach_the_evaluation(monkeypatch, tmp_path):
    seen = []

    def evaluate(plan, out, **options):
        seen.append((plan, options["stall_seconds"]))
        raise ValueError("enough")

    monkeypatch.setattr("gse_jax.evaluation.evaluate", evaluate)
    flags = ["evaluate", "--data", "digits", "--model", "resnet20", "--weights", "digits", "--out", str(tmp_path)]
    assert cli.main([*flags, "--seed", "3", "--stall-minutes", "2", "--offsets", "1,3", "--lanes", "5"]) == 2
    assert cli.main([*flags, "--stall-minutes", "0", "--method", "pgd"]) == 2 and cli.main(flags) == 2
    said = [(plan.seed, stall, plan.lanes, plan.attacks[0].offsets, plan.attacks[0].method) for plan, stall in seen]
    assert said == [(3, 120, 5, (1, 3), "gse"), (0, None, None, (), "pgd"), (0, 3600, None, (), "gse")]


def test_another_plan_in_the_same_directory_is_refused(run, capsys, tmp_path):
    folder, plan = run
    other = tmp_path / "other.toml"
    other.write_text(PLAN.replace("max_steps = 6", "max_steps = 7", 1))
    assert cli.main(["evaluate", "--plan", str(other), "--out", str(folder)]) == 2
    assert "belongs to another run" in capsys.readouterr().err


def test_an_order_of_attacks_is_no_other_run(run, tmp_path):
    folder, _ = run
    first, *attacks = PLAN.split("[[attacks]]")
    other = tmp_path / "other.toml"
    other.write_text("[[attacks]]".join([first, *reversed(attacks)]))
    assert cli.main(["evaluate", "--plan", str(other), "--out", str(folder)]) == 0


def test_records_without_a_manifest_are_taken_by_order_only(run, tmp_path, capsys):
    folder, plan = run
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    command = ["evaluate", "--plan", str(plan), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 2
    assert "holds records but no manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert cli.main([*command, "--allow-mismatch"]) == 0
    assert "allowed mismatch: manifest: lost" in capsys.readouterr().out


def test_images_of_another_record_are_refused(run, tmp_path, capsys):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    array = next((tmp_path / "run" / "arrays").iterdir())
    with np.load(array) as stored:
        arrays = dict(stored)
    np.savez(array, **arrays | {"index": arrays["index"] + 1})
    assert cli.main(["verify", str(tmp_path / "run")]) == 2
    assert "another file was put in its place" in capsys.readouterr().out


def test_weights_that_moved(run, tmp_path, capsys):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["plan"]["weights"] = "gone.safetensors"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["verify", str(tmp_path / "run")]) == 2
    assert "gone.safetensors" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path / "run"), "--weights", "digits"]) == 0


def test_an_incomplete_run_says_so(run, tmp_path, capsys):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    journal = next((tmp_path / "run" / "records").iterdir())
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "run: incomplete: 11 of 12 records" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "run")]) == 0
    assert "not complete" in capsys.readouterr().out


def test_where_nobody_reads_the_files_are_written_all_the_same(run, tmp_path, monkeypatch):
    folder, plan = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "report")

    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert cli.main(["evaluate", "--plan", str(plan), "--out", str(tmp_path / "run")]) == 141
    sys.stdout.close()  # what took its place
    assert (tmp_path / "run" / "report" / "index.html").exists()


def test_sigterm_while_loading_ends_with_the_resumable_code(run, tmp_path, monkeypatch, capsys):
    _, plan = run
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(evaluator, "set_up", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert cli.main(["evaluate", "--plan", str(plan), "--out", str(tmp_path / "run")]) == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) == before


def test_verify_confirms_and_the_page_says_so(run, capsys):
    folder, _ = run
    assert cli.main(["verify", str(folder)]) == 0
    assert "verified" in capsys.readouterr().out
    assert json.loads((folder / "verification.json").read_text())["ok"]
    for content, said in (None, True), ("[]", False), ('{"ok": tr', False):
        if content is not None:
            (folder / "verification.json").write_text(content)
        assert cli.main(["report", str(folder), "--out", str(folder / "again")]) == 0
        page = (folder / "again" / "index.html").read_text(encoding="utf-8")
        assert ("have not been checked by a fresh forward pass" not in page) == said


def test_a_verification_of_images_that_are_gone_counts_no_more(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    assert cli.main(["verify", str(folder)]) == 0
    next((folder / "arrays").iterdir()).unlink()
    assert cli.main(["report", str(folder), "--out", str(folder / "again")]) == 0
    page = (folder / "again" / "index.html").read_text(encoding="utf-8")
    assert "have not been checked by a fresh forward pass" in page


@pytest.mark.slow
def test_check_passes_the_embedded_model_and_refuses_a_wrong_range(capsys, tmp_path):
    import numpy as np

    from gse_jax import data

    flags = ["--model", "resnet20", "--weights", "digits", "--limit", "40"]
    assert cli.main(["check", "--data", "digits", *flags]) == 0
    assert "accuracy" in capsys.readouterr().out
    images = data.load("digits", limit=40)
    np.savez(tmp_path / "shuffled.npz", x=images.images, y=(images.labels + 1) % 10)
    assert cli.main(["check", "--data", f"npz:{tmp_path / 'shuffled.npz'}", *flags]) == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["evaluate", "--out", "nowhere"], "--data is missing"),
    (["evaluate", "--plan", "/nowhere.toml"], "/nowhere.toml"),
    (["evaluate", "--data", "digits", "--model", "resnet20", "--weights", "digits", "--offsets",
      "a"], "--offsets"),
    (["evaluate", "--data", "digits", "--model", "resnet20", "--weights", "digits", "--shard",
      "3/3"], "shard"),
    (["evaluate", "--plan", "plan.toml", "--limit", "10"], "--limit is given beside --plan"),
    (["check", "--plan", "plan.toml", "--expected-accuracy", "0.9"], "--expected-accuracy is given"),
    (["evaluate", "--data", "digits", "--model", "resnet20", "--weights", "digits", "--limit", "2",
      "--out", "file/run"], "cannot write file/run"),
    (["verify", "/nowhere"], "/nowhere"),
    (["report", "/nowhere"], "/nowhere"),
])
def test_bad_input_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_check_reads_as_evaluate_does(tmp_path, capsys):
    """A folder named by the plan, and an image that cannot be used."""
    import numpy as np

    from gse_jax import data

    images = data.load("digits", limit=30)
    x = images.images.copy()
    x[7] = np.nan
    np.savez(tmp_path / "some.npz", x=x, y=images.labels)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"data": "npz:some.npz", "data_dir": str(tmp_path), "model": "resnet20",
                                "weights": "digits"}))
    assert cli.main(["check", "--plan", str(plan)]) == 0
    assert "1 of 30 images cannot be used; the first is '000007'" in capsys.readouterr().out


@pytest.mark.slow
def test_a_page_does_not_call_verified_what_came_after(run, tmp_path, monkeypatch):
    """Verified half-way, then continued: the earlier verdict is not about this run."""
    folder, plan = run
    part = tmp_path / "part"
    assert cli.main(["evaluate", "--plan", str(plan), "--out", str(part), "--shard", "0/2"]) == 0
    assert cli.main(["verify", str(part)]) == 0
    confirmed = lambda: "\u2714 confirmed" in (part / "report" / "index.html").read_text()
    monkeypatch.chdir(part)
    assert cli.main(["report", "."]) == 0 and confirmed()
    assert "<title>part" in (part / "report" / "index.html").read_text()
    assert cli.main(["evaluate", "--plan", str(plan), "--out", str(part)]) == 0 and not confirmed()
    assert cli.main(["verify", str(part)]) == 0
    assert cli.main(["report", str(part)]) == 0 and confirmed()
