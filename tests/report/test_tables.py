"""Numbers of the tables: by hand, and against gse_jax.metrics."""

import csv

import numpy as np
import pytest
from tests.report.small_runs import SmallRun, record, run, targeted, untargeted

from gse_jax import metrics, report
from gse_jax.report import summary
from gse_jax.report.tables import show_error, show_number, show_rate, show_share, write_tables


def test_case_numbers_by_hand():
    (row,) = summary.summarise_cases(SmallRun("r", untargeted()))
    assert row.counts == {"found": 3, "not_found": 1, "non_finite": 1, "already_misclassified": 1,
                          "quarantined": 1}
    assert (row.asr_attacked.hits, row.asr_attacked.total, row.asr_attacked.share) == (3, 5, 0.6)
    assert (row.asr_all.hits, row.asr_all.total) == (4, 6)  # The quarantined one is in neither.
    pixels = row.spreads["changed_pixels"]
    assert (pixels.mean, pixels.median, pixels.count) == (6.0, 4.0, 3)
    np.testing.assert_allclose(pixels.error, np.std([2, 4, 12], ddof=1) / np.sqrt(3))
    # Failures cost evaluations as well: 0, 10, 20, 30 and 40.
    assert (row.spreads["gradient_evals"].mean, row.spreads["gradient_evals"].count) == (20, 5)
    assert row.spreads["forward_evals"].mean == 21


def test_the_clean_accuracy_is_of_images_that_were_read():
    assert summary.clean_accuracy(untargeted() + targeted())[:3] == (5 / 6, 5, 6)


def test_wilson_interval():
    # Reference values: scipy.stats.binomtest(k, n).proportion_ci(method="wilson").
    half, none, every = summary.rate(5, 10), summary.rate(0, 10), summary.rate(10, 10)
    np.testing.assert_allclose([half.low, half.high], [0.236593, 0.763407], atol=1e-5)
    np.testing.assert_allclose([none.low, none.high], [0, 0.277533], atol=1e-5)
    np.testing.assert_allclose([every.low, every.high], [0.722467, 1], atol=1e-5)
    assert summary.rate(0, 0) == (None, 0, 0, None, None)


def test_targeted_protocol_by_hand():
    best, average, worst = summary.summarise_targeted(SmallRun("r", targeted()))
    assert [row.kind for row in (best, average, worst)] == ["best", "average", "worst"]
    assert (best.rate.hits, best.rate.total, best.spreads["changed_pixels"].mean) == (2, 3, 6)
    assert (average.rate.hits, average.rate.total) == (3, 6)
    np.testing.assert_allclose(average.spreads["l2"].mean, (0.5 + 0.9 + 0.3) / 3)
    assert (worst.rate.hits, worst.rate.total, worst.spreads["patch_count"].mean) == (1, 3, 10)
    assert worst.targets == 2
    assert summary.summarise_targeted(SmallRun("r", untargeted())) == []


def test_an_average_over_equal_targets_is_no_surer_than_one_of_them():
    one = [record(i, "gse/targeted+1", "found" if i % 3 else "not_found", 4 + i) for i in range(30)]
    two = [r | {"case": "gse/targeted+2"} for r in one]
    best, average, _ = summary.summarise_targeted(SmallRun("r", one + two))
    np.testing.assert_allclose(average.rate[3:], best.rate[3:], rtol=0.02)
    np.testing.assert_allclose(average.spreads["l2"].error, best.spreads["l2"].error)
    other = [record(i, "gse/targeted+2", "not_found" if i % 3 else "found", 4 + i) for i in range(30)]
    assert summary.summarise_targeted(SmallRun("r", one + other))[1].rate == summary.rate(30, 60)  # no surer than pairs
    every = [r | {"status": "found", "changed_pixels": 1} for r in one + two]
    assert summary.summarise_targeted(SmallRun("r", every))[1].rate.low == summary.rate(30, 30).low


def random_records(rng, targets=3, images=40):
    statuses = ["found", "not_found", "already_misclassified", "non_finite"]
    return [record(i, f"gse/targeted+{k}", str(rng.choice(statuses, p=[0.7, 0.1, 0.15, 0.05])),
                   int(rng.integers(1, 60))) for k in range(1, targets + 1) for i in range(images)]


def test_agrees_with_the_metrics_room():
    records = random_records(np.random.default_rng(0))
    grid = np.array(records, object).reshape(3, 40)
    found = np.vectorize(lambda r: r["status"] == "found")(grid)
    attacked = np.vectorize(lambda r: r["status"] != "already_misclassified")(grid)
    pixels = np.vectorize(lambda r: float(r["changed_pixels"] or 0))(grid)
    expected = metrics.targeted_protocol(pixels, found, attacked=attacked)
    for row, case in zip(summary.summarise_targeted(SmallRun("r", records)), expected, strict=True):
        assert tuple(row.spreads["changed_pixels"]) == pytest.approx(tuple(case.metric))
        assert row.rate.total - row.rate.hits == case.failures
        assert row.rate.share == pytest.approx(case.success_rate)


def test_csv_holds_everything_in_full_precision(tmp_path):
    runs = [run("first"), run("second, with comma")]
    paths = report.write_tables(runs, tmp_path / "new" / "tables")
    assert [path.name for path in paths] == ["summary.csv", "summary.md", "summary.tex",
                                             "targeted.csv", "targeted.md", "targeted.tex",
                                             "images.csv"]
    with open(paths[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and rows[3]["run"] == "second, with comma"
    assert float(rows[0]["asr_attacked"]) == 0.6 and rows[0]["quarantined"] == "1"
    assert float(rows[0]["asr_attacked_low95"]) < 0.6 < float(rows[0]["asr_attacked_high95"])
    assert (rows[0]["changed_pixels_mean"], rows[0]["changed_pixels_median"]) == ("6.0", "4.0")
    exact = np.std([2, 4, 12], ddof=1) / np.sqrt(3)
    assert float(rows[0]["changed_pixels_stderr"]) == pytest.approx(exact, rel=1e-12)
    with open(paths[-1], newline="") as file:
        images = list(csv.DictReader(file))
    assert len(images) == sum(len(one.records) for one in runs)
    assert images[6]["reason"] == "the file is empty" and images[6]["changed_pixels"] == ""


def test_markdown_and_latex(tmp_path):
    report.write_tables([SmallRun("a_b|c & 5%", untargeted())], tmp_path)
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[0].startswith("| run | case | images | attacked | found | ASR (all)")
    assert r"a\_b\|c & 5%" in lines[2]
    assert lines[2].split(" | ")[2:8] == ["7", "5", "3", "66.7 %", "60.0 %", "6.00 ± 3.06"]
    assert {line.replace(r"\|", "").count("|") for line in lines} == {14}
    latex = (tmp_path / "summary.tex").read_text()
    assert r"a\_b|c \& 5\%" in latex and r"6.00 $\pm$ 3.06" in latex and r"60.0 \%" in latex
    assert r"\begin{tabular}{llrrrrrrrrrrr}" in latex and r"$d_{2,0}$" in latex
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {row.replace(r"\&", "").count("&") for row in rows} == {12}
    assert not (tmp_path / "targeted.csv").exists()


def test_a_targeted_table_counts_failures(tmp_path):
    report.write_tables([SmallRun("r", targeted())], tmp_path)
    rows = [line.split(" | ")[2:7] for line in (tmp_path / "targeted.md").read_text().splitlines()[2:]]
    assert rows == [["2", "best", "66.7 %", "1 of 3", "6.00 ± 3.00"],
                    ["2", "average", "50.0 %", "3 of 6", "5.67 ± 2.22"], ["2", "worst", "33.3 %", "2 of 3", "5.00"]]


def test_rates_are_told_from_other_numbers_and_not_rounded_to_all_or_nothing(tmp_path):
    paths = report.write_table([{"attack": "a", "ASR": 0.5, "ASR@8": None, "ACP": 0.5}], tmp_path / "table")
    assert paths[1].read_text().splitlines()[2] == "| a | 0.500 | \u2013 | 0.50 |"
    assert list(map(show_rate, (0.0, 1e-5, 0.99996, 1.0))) == ["0.000", "0.001", "0.999", "1.000"]
    assert list(map(show_share, (0.0, 1e-5, 0.99996, 1.0, None))) == ["0.0 %", "0.1 %", "99.9 %", "100.0 %", "\u2013"]


def test_missing_numbers_are_dashes_not_zeros(tmp_path):
    report.write_tables([SmallRun("none", [record(0, status="not_found")])], tmp_path)
    cells = (tmp_path / "summary.md").read_text().splitlines()[2].split(" | ")
    assert cells[5:9] == ["0.0 %", "0.0 %", "\u2013", "\u2013"]
    report.write_tables([SmallRun("empty", [])], tmp_path)
    assert len((tmp_path / "summary.md").read_text().splitlines()) == 2


@pytest.mark.parametrize(("value", "words"), [
    (None, "\u2013"), (0.0, "0.00"), (5, "5"), (12345, "12,345"), (9.994, "9.99"), (9.996, "10.0"), (99.94, "99.9"),
    (99.96, "100"), (0.00044, "0.00044"), (0.0096, "0.010"), (1234.5, "1,234"), (-3.14159, "-3.14")])
def test_show_number(value, words):
    assert show_number(value) == words


@pytest.mark.parametrize(("error", "mean", "words"), [
    (43.9, 501.2, "44"), (0.095, 2.54, "0.10"), (0.2, 150.0, "0.20"), (0.0, 3.0, "0.00"), (None, 3.0, "\u2013")])
def test_an_error_has_the_decimals_of_its_mean(error, mean, words):
    assert show_error(error, mean) == words


def test_wrong_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="runs: got none"):
        report.write_tables([], tmp_path)
    with pytest.raises(ValueError, match="two are named 'first'"):
        report.write_tables([run(), run()], tmp_path)
    with pytest.raises(ValueError, match="'s0' has status 'odd'"):
        report.write_tables([SmallRun("r", [record(0, status="odd")])], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tables_are_deterministic(tmp_path):
    for folder in "ab":
        report.write_tables([run("x"), run("y")], tmp_path / folder)
    for one in (tmp_path / "a").iterdir():
        assert one.read_bytes() == (tmp_path / "b" / one.name).read_bytes()


def test_targeted_tables_of_another_run_do_not_stay(tmp_path):
    write_tables([SmallRun("two", targeted())], tmp_path)
    assert (tmp_path / "targeted.tex").is_file()
    write_tables([SmallRun("one", untargeted())], tmp_path)
    assert not list(tmp_path.glob("targeted.*"))
