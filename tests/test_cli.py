"""The command line as a user types it."""

import json
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from gse_jax import Status, cli, evaluation, report
from gse_jax.cli import explain, options, output
from gse_jax.evaluation import load_run
from gse_jax.evaluation.explanation import Explanation


def command(*arguments, timeout=600):
    return subprocess.run([sys.executable, "-m", "gse_jax.cli", *map(str, arguments)],
                          capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One real demo on a few images, shared by the tests of its outputs."""
    folder = tmp_path_factory.mktemp("demo")
    done = command("demo", "--num", 4, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_demo_prints_the_table_and_progress(demo):
    _, done = demo
    for words in ("clean accuracy", "of correctly classified", "ACP", "ANC", "l2 norm", "d_{2,0}",
                  "gradient evaluations per image", "images per second"):
        assert words in done.stdout, words
    assert "4/4 images" in done.stderr


def test_demo_fools_the_classifier_and_says_so_truly(demo):
    folder, _ = demo
    from gse_jax import models

    run = load_run(folder)
    apply_fn, params = models.load("resnet20", weights="digits")
    fooled = np.asarray(apply_fn(params, run.adversarials).argmax(-1)) != run.y
    np.testing.assert_array_equal(fooled, run.success)
    assert fooled.all()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_images"] == 4 and summary["asr_all"] == 1.0
    assert summary["changed_pixels"]["mean"] == np.mean(
        [(a != b).any(-1).sum() for a, b in zip(run.x, run.adversarials)])


def test_demo_draws_the_picture(demo):
    folder, _ = demo
    assert (folder / "panel.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "panel.pdf").read_bytes()[:5] == b"%PDF-"


def test_explain_writes_panels_curves_and_a_table(demo):
    folder, _ = demo
    assert cli.main(["explain", str(folder), "--panels", "2"]) == 0
    out = folder / "explain"
    for stem in ("panels", "interpretability", "success_pixels", "success_patches",
                 "distributions"):
        assert (out / f"{stem}.png").stat().st_size > 1000
        assert (out / f"{stem}.pdf").stat().st_size > 1000
    table = (out / "table.csv").read_text()
    assert "interpretability score, 90th percentile" in table and "top 20 % of CAM" in table


def test_explain_tells_how_to_name_weights_that_moved(demo, tmp_path, capsys):
    from gse_jax.evaluation import load_run, save_run

    run = load_run(demo[0])
    save_run(run._replace(about=run.about | {"weights": str(tmp_path / "gone.npz")}), tmp_path / "adversarials.npz")
    for option, told in (([], True), (["--weights", str(tmp_path / "wrong.npz")], False)):
        assert cli.main(["explain", str(tmp_path), *option]) == 2
        error = capsys.readouterr().err
        assert "does not exist" in error and ("pass --weights" in error) == told


def test_images_without_a_salient_region_are_left_out_and_counted():
    from gse_jax import metrics
    from gse_jax.cli.explain import _explanation_rows

    found = np.asarray([True, True, False])
    maps = np.zeros((3, 10, 10), np.float32)
    maps[0, :4, :5] = 1.0
    images = np.zeros((3, 10, 10, 1), np.float32)
    changed = images.copy()
    changed[:, 0, 0] = 1.0
    overlap = metrics.overlap_score(images, changed, maps)
    explained = Explanation(maps, maps, "Grad-CAM", np.zeros((3, 5)), overlap, overlap, found)
    told = dict(_explanation_rows(explained))["changed pixels in the top 20 % of Grad-CAM"]
    assert told == "1.000 (same mask anywhere: 0.200; 100% of images above; 1 images without a map)"
    by_chance = explained._replace(saliency_overlap=overlap._replace(score=overlap.control))
    assert "; 0% of images above" in dict(_explanation_rows(by_chance))["changed pixels in the top 20 % of saliency"]
    none = explained._replace(found=np.asarray([False, True, True]))
    assert dict(_explanation_rows(none))["changed pixels in the top 20 % of saliency"] == "-; 2 images without a map"


def made_up_run(targets=-1):
    """Six images: found, missed, found, misclassified, not finite, missed; the found ones have 2 and 6 black pixels."""
    x = np.full((6, 8, 8, 1), 0.5, np.float32)
    adversarials = x.copy()
    adversarials[0, 0, :2], adversarials[2, 0, :6] = 0.0, 0.0
    status = np.int32([Status.FOUND, Status.NOT_FOUND, Status.FOUND, Status.ALREADY_MISCLASSIFIED, Status.NON_FINITE,
                       Status.NOT_FOUND])
    y, count = np.zeros(6, np.int32), np.asarray
    return evaluation.AttackRun(
        x, y, y + targets, adversarials, count([True, False, True, True, False, False]), status,
        count([10, 20, 30, 0, 5, 15]), count([12, 22, 32, 0, 6, 17]), np.zeros(6), count([0, 0, 0, 1, -1, 0]),
        count([1, 0, 1, 1, -1, 0]), np.full(6, 0.9), np.full(6, 0.8), count(list("abcdef")),
        {"bounds": [0.0, 1.0], "seconds": 2.0, "method": "gse"})


def test_the_table_of_a_run_by_hand():
    assert output.table(made_up_run()) == [
        ("clean accuracy", "66.7% (4 of 6)"),
        ("attack success rate, of correctly classified or not finite", "40.0% (2 of 5)"),
        ("attack success rate, of all images", "50.0% (3 of 6)"),
        ("changed pixels (ACP)", "4.00"), ("clusters of changed pixels (ANC)", "1.00"),
        ("l2 norm, images in [-1, 1]", f"{(2**0.5 + 6**0.5) / 2:.3f}"), ("8x8 patches touched (d_{2,0})", "1.00"),
        ("gradient evaluations per image", "16.0"),
        ("attacked images per second, compilation included", "2.50 (5 in 2.0 s)")]


def test_pictures_show_successes_first_and_curves_count_attacked_images(monkeypatch, tmp_path):
    seen, run = {}, made_up_run()
    monkeypatch.setattr(report, "attack_panel", lambda x, adversarials, *_, **options: seen.update(options))
    monkeypatch.setattr(report, "success_curves", lambda budgets, rates, xlabel: seen.update({xlabel: rates["gse"]}))
    monkeypatch.setattr(report, "save_figure", lambda *_: [])
    output.draw_panel(run, tmp_path / "panel", 3)
    assert seen["status"].tolist() == [Status.FOUND, Status.FOUND, Status.NOT_FOUND]
    explained = Explanation(None, None, "CAM", np.zeros((6, 5)), None, None, run.found)
    explain._draw_curves(run, explained, tmp_path)
    np.testing.assert_allclose(seen["changed pixels k"], [0, 0, 0.2, 0.2, 0.2, 0.2, 0.4])


def test_compare_and_pareto_keep_offsets_and_mark_what_is_incomplete(monkeypatch, tmp_path):
    one, other = made_up_run(targets=1), made_up_run(targets=2)
    rows = ({"attack": "pgd", "over targets": "best", "ASR": 0.5},)
    monkeypatch.setattr(evaluation, "compare", lambda *_, **__: [evaluation.Comparison("pgd", (one, other), rows)])
    job = ["--data", "digits", "--model", "resnet20", "--weights", "digits", "--limit", "1", "--out", str(tmp_path)]
    assert cli.main(["compare", *job, "--methods", "pgd", "--offsets", "1,2"]) == 0
    for offset in (1, 2):
        assert (load_run(tmp_path / "pgd" / str(offset)).targets == offset).all()

    none, two, ones = np.zeros((2, 1), bool), np.asarray([0.5, 1.0]), np.ones((2, 4))
    front = evaluation.Front(("gse", "pgd"), two * np.inf, ~none[0], ~none[0], none, ones[:, None], none, two, two,
                             ones, none[:, 0], two, two)
    seen = {}
    monkeypatch.setattr(evaluation, "pareto", lambda *_, **__: front)
    monkeypatch.setattr(report, "front_plot", lambda means, whole: seen.update(whole))
    monkeypatch.setattr(report, "save_figure", lambda *_: [])
    assert cli.main(["pareto", *job, "--methods", "gse,pgd"]) == 0
    assert {name: whole.tolist() for name, whole in seen.items()} == {"gse": [False], "pgd": [True]}


def test_more_targets_than_images_are_those_of_the_first(tmp_path):
    (tmp_path / "targets.txt").write_text("1\n2\n3\n")
    assert options.targets(str(tmp_path / "targets.txt"), np.zeros(2, int), 10).tolist() == [1, 2]


def test_attack_on_the_users_files(demo, tmp_path):
    """npz images, a weights file, targets from a file: what the demo does, on own data."""
    from gse_jax import data, models

    images = data.load("digits", limit=2)
    np.savez(tmp_path / "mine.npz", x=images.images, y=images.labels)
    models.save(tmp_path / "net.safetensors", models.load("resnet20", weights="digits")[1])
    targets = (images.labels + 3) % 10
    np.savetxt(tmp_path / "targets.txt", targets, fmt="%d")
    code = cli.main(["attack", "--data", f"npz:{tmp_path / 'mine.npz'}", "--model", "resnet20",
                     "--weights", str(tmp_path / "net.safetensors"), "--normalize", "0.5/0.5",
                     "--targets", str(tmp_path / "targets.txt"), "--limit", "2",
                     "--hyperparams", "mu=0.1,step_size=0.1", "--out", str(tmp_path / "out")])
    assert code == 0
    run = load_run(tmp_path / "out")
    np.testing.assert_array_equal(run.targets, targets)
    np.testing.assert_array_equal(run.predictions_after == targets, run.success)
    assert run.success.any()


BAD = {
    "missing data": (["attack", "--data", "npz:/nowhere.npz", "--model", "resnet20", "--weights",
                      "digits"], "/nowhere.npz"),
    "missing weights": (["attack", "--data", "digits", "--model", "resnet20", "--weights",
                         "/nowhere.safetensors"], "/nowhere.safetensors"),
    "unknown model": (["attack", "--data", "digits", "--model", "resnet21", "--weights",
                       "digits"], "resnet21"),
    "unknown method": (["attack", "--data", "digits", "--model", "resnet20", "--weights",
                        "digits", "--method", "gze", "--limit", "1"], "gze"),
    "normalize": (["attack", "--data", "digits", "--model", "resnet20", "--weights", "digits",
                   "--normalize", "huh"], "--normalize 'huh'"),
    "hyperparams": (["attack", "--data", "digits", "--model", "resnet20", "--weights", "digits",
                     "--hyperparams", "speed=3", "--limit", "1"], "speed"),
    "unknown method of many": (["compare", "--data", "digits", "--model", "resnet20", "--weights", "digits",
                                "--methods", "gze", "--limit", "1"], "gze"),
    "num": (["demo", "--num", "0"], "--num"),
    "no run": (["explain", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, capsys, tmp_path, monkeypatch):
    arguments, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["attack", "compare", "pareto"])
def test_a_folder_that_cannot_be_is_told_before_anything_is_computed(command, tmp_path, capsys,
                                                                      monkeypatch):
    def never(*_, **__):
        raise AssertionError("computed")

    for name in ("run_attack", "compare", "pareto"):
        monkeypatch.setattr(f"gse_jax.evaluation.{name}", never)
    (tmp_path / "file").write_text("no folder")
    assert cli.main([command, "--data", "digits", "--model", "resnet20", "--weights", "digits",
                     "--limit", "2", "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error, code, words", [
    (evaluation.Preempted("SIGTERM"), 75, "stopped by SIGTERM; everything finished is stored"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocating"), 2, "--lanes"),
])
def test_ends_that_are_no_bug_are_one_line(error, code, words, capsys, monkeypatch):
    def ends(args):
        raise error

    monkeypatch.setattr("gse_jax.cli.attack._attack", ends)
    assert cli.main(["demo"]) == code
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


@pytest.mark.parametrize("content", ["1\n2\n", "1 2\n3 4\n5 6\n"])
def test_targets_that_do_not_fit_the_images_are_refused(content, tmp_path, capsys):
    (tmp_path / "targets.txt").write_text(content)
    assert cli.main(["attack", "--data", "digits", "--model", "resnet20", "--weights", "digits",
                     "--limit", "3", "--targets", str(tmp_path / "targets.txt")]) == 2
    assert "expected one class for each of the 3 images" in capsys.readouterr().err


def test_a_file_that_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "adversarials.npz").write_text("<html>not found</html>")
    assert cli.main(["explain", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err


@pytest.mark.slow
def test_pareto_writes_table_figure_and_arrays(tmp_path, capsys):
    arguments = ["pareto", "--data", "digits", "--model", "resnet20", "--weights", "digits",
                 "--limit", "2", "--out", str(tmp_path / "front")]
    assert cli.main([*arguments, "--methods", "pgd0"]) == 0
    assert {p.name for p in (tmp_path / "front").iterdir()} == {
        f"front.{suffix}" for suffix in ("csv", "md", "tex", "png", "pdf", "npz")}
    with np.load(tmp_path / "front" / "front.npz") as arrays:
        assert list(arrays["methods"]) == ["pgd0"] and arrays["images"].shape == (1, 2, 4)
    capsys.readouterr()
    assert cli.main([*arguments, "--methods", "gse_refined", "--max-l2", "1,x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_empty_targets_file_is_one_line_without_a_warning(tmp_path):
    (tmp_path / "targets").touch()
    expected = r"has shape \[0\], expected one class for each of the 2"
    with warnings.catch_warnings(), pytest.raises(ValueError, match=expected):
        warnings.simplefilter("error")
        options.targets(str(tmp_path / "targets"), np.zeros(2, np.int32), 5)
