"""The HTML page: self-contained, escaped, complete, and its tables sort in a real browser."""

import html.parser
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tests.report.small_runs import SmallRun, record, run, untargeted

from gse_jax import report
from gse_jax.report import gallery
from gse_jax.report.page import _flatten

VOID = {"meta", "link", "img", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome")


class Parsed(html.parser.HTMLParser):
    """Tags in order, visible text, and whether every tag is closed by its own end."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def named(self, tag, **wanted):
        return [attrs for name, attrs in self.tags if name == tag
                and all(attrs.get(k.rstrip("_").replace("_", "-")) == v
                        for k, v in wanted.items())]


def page(runs, tmp_path, **arguments):
    path = report.write_page(runs, tmp_path / "page.html", **arguments)
    return Parsed(path.read_text(encoding="utf-8"))


def test_all_sections_of_one_run(tmp_path):
    parsed = page([run()], tmp_path)
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert [i for i in ids if i != "shown"] == [
        "results", "targeted", "curves", "distributions", "gallery", "troubles", "checks",
        "details", "notes"]
    links = [a["href"] for a in parsed.named("a")]
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    text = parsed.text
    assert "60.0 % 3/5, 23\u201388 %" in text  # ASR attacked with its interval.
    assert "66.7 % 4/6" in text  # ASR all.
    assert "6.00 \u00b1 3.06 median 4.00" in text  # ACP.
    assert "5 attacked of 7, 1 non-finite, 1 quarantined" in text
    assert "s6 gse/untargeted quarantined the file is empty" in text
    assert "Clean accuracy is 80.0%." in text and "no warning" in text
    assert "not been checked by a fresh forward pass; run gse-jax verify" in text
    assert "Two denominators." in text and gallery.RULE in text
    assert len(parsed.named("figure")) >= 2 + 5 and len(parsed.named("h1")) == 1


def test_nothing_comes_from_elsewhere(tmp_path):
    parsed = page([run("a"), run("b")], tmp_path)
    text = (tmp_path / "page.html").read_text()
    assert "://" not in text and "@import" not in text
    (policy,) = parsed.named("meta", http_equiv="Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; img-src data:;")
    assert all(img["src"].startswith("data:image/png;base64,") and img["alt"]
               for img in parsed.named("img"))
    assert not re.search(r"url\((?!data:)", text)
    assert not [attrs for tag, attrs in parsed.tags if tag in ("script", "link", "iframe")
                and (attrs.get("src") or not attrs.get("href", "data:").startswith("data:"))]


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"


def test_texts_of_the_records_are_escaped(tmp_path):
    records = [record(0, case=f"{EVIL}/untargeted", pixels=3, sample_id=EVIL),
               record(1, case=f"{EVIL}/untargeted", status="quarantined", reason=EVIL)]
    manifest = {"class_names": [EVIL] * 3, "plan": {EVIL: EVIL}, "created": EVIL,
                "findings": [{"name": EVIL, "severity": "error", "message": EVIL, "fix": EVIL}]}
    parsed = page([SmallRun(EVIL, records, manifest)], tmp_path)
    assert len(parsed.named("script")) == 1
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]
    assert all(img["src"].startswith("data:") for img in parsed.named("img"))
    assert parsed.text.count("{{ 7 * 7 }}") >= 12 and "49" not in parsed.text


def test_runs_of_other_images_are_not_like_for_like(tmp_path):
    first, second = run("one"), run("two", manifest={"fingerprint": {"weights": "w", "data": "other"}})
    assert "one and two are of different data, so the rows are not" in page([first, second], tmp_path).text
    third = run("three")
    third.records = [{**r, "case": "pgd/untargeted"} for r in untargeted()[:4]]
    assert "one and three cover different images: 3 are in one of" in page([first, third], tmp_path).text


def test_several_runs_stand_side_by_side_and_differences_are_told(tmp_path):
    first, second = run("one"), run("two", manifest={"bounds": [0, 1], "verification": {
        "ok": False, "num_problems": 3, "problems": ["x"] * 50}})
    second.records = second.records[:-1]
    second.warnings = ["incomplete: 12 of 13 records"]
    parsed = page([first, second], tmp_path)
    text = parsed.text
    assert "one \u00b7 gse/untargeted n = 5" in text
    assert "two \u00b7 gse/targeted, 2 targets n = 5" in text
    assert "one and two cover different images in gse/targeted+2: 1 images are in one" in text
    assert "two: gse/targeted+2 has 2 of the 7 images; the run is not finished." in text
    assert "two: incomplete: 12 of 13 records" in text
    assert "one: gse found nothing for 4 of 11. That need not be robustness: the paper's mu" in text
    assert "3 problems" in text and "and 30 more" in text
    differing = re.findall(r"\u2260 ([\w.]+)", text)
    assert "weights" in differing and "bounds" in differing and "jax" not in differing
    # Every row of a run has the name in front; one run alone needs no such column.
    assert text.count("one gse/untargeted") == 1
    assert "run \u2195" not in page([first], tmp_path).text


def test_errors_come_first_and_are_announced(tmp_path):
    findings = [{"name": n, "severity": s, "message": f"{n} is so.", "fix": "Do this."}
                for n, s in (("a", "info"), ("b", "warning"), ("c", "error"))]
    text = page([run(manifest={"findings": findings})], tmp_path).text
    assert "\u2716 1 error" in text and "\u25b2 1 warning" in text
    assert text.index("c is so.") < text.index("b is so.") < text.index("a is so.")


@pytest.mark.parametrize("records", [[], [record(0, status="quarantined")],
                                     [record(0, status="not_found")],
                                     [record(0, status="already_misclassified")],
                                     [record(0, pixels=1)]])
def test_runs_with_little_in_them(records, tmp_path):
    parsed = page([SmallRun("r", records)], tmp_path)
    assert not {"nan", "inf", "None"} & set(parsed.text.split())
    assert ("no records yet" in parsed.text) == (not records)


def test_same_input_same_bytes(tmp_path):
    first, second = (report.write_page([run("a"), run("b")], tmp_path / name).read_bytes()
                     for name in ("1.html", "2.html"))
    assert first == second


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="runs: got none"):
        report.write_page([], tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_room_loads_no_extra():
    program = ("import sys, gse_jax.report; "
               "print({'jinja2', 'markupsafe', 'matplotlib'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=True)
    assert done.stdout.strip() == "set()"


# The gallery.


def test_images_are_chosen_by_rank_and_others_by_index():
    records = [record(i, pixels=100 - i) for i in range(50)]
    records += [record(50 + i, status="not_found") for i in range(20)]
    chosen = gallery.choose_records(records, 8)
    assert [r["changed_pixels"] for r in chosen[:7]] == [51, 59, 67, 75, 84, 92, 100]
    assert [r["index"] for r in chosen[7:]] == [50]
    assert len(gallery.choose_records(records[50:], 8)) == 8
    # One place is not the sparsest's.
    assert [r["changed_pixels"] for r in gallery.choose_records(records[:49], 1)] == [76]
    assert [r["changed_pixels"] for r in gallery.choose_records(records[:49] + records[50:], 2)][0] == 76


def test_cards_hold_the_overlay_and_the_predictions(tmp_path):
    cards, available = gallery.make_cards([run()])
    assert available == 12
    card = next(c for c in cards if c.sample_id == "s1" and c.case == "gse/untargeted")
    assert [caption for caption, _, _ in card.tiles] == ["original", "adversarial", "changed"]
    assert card.lines == [("label", "dog"), ("before", "dog (99.9 %)"), ("after", "owl (50.0 %)"),
                          ("change", "4 px in 1 cluster, \u2113\u2082 0.40")]
    aimed = next(c for c in cards if c.sample_id == "s1" and c.case == "gse/targeted+1")
    assert ("target", "owl") in aimed.lines
    import base64
    import io

    from matplotlib.image import imread

    _, words, uri = card.tiles[2]
    assert words == "s1: the 4 changed pixels in red"
    overlay = imread(io.BytesIO(base64.b64decode(uri.split(",")[1]))).reshape(-1, 3)
    red = (overlay[:, 0] > 0.7) & (overlay[:, 1] < 0.1)
    np.testing.assert_array_equal(np.flatnonzero(red), range(4))


def test_limits_and_missing_images(tmp_path):
    records = [record(i, pixels=i + 1) for i in range(100)]
    assert len(gallery.make_cards([SmallRun("r", records)])[0]) == 48
    assert len(gallery.make_cards([SmallRun("r", records)], 10)[0]) == 10
    assert gallery.make_cards([SmallRun("r", records)], 0) == ([], 100)
    assert "no image stored" in page([SmallRun("r", untargeted(), images=False)], tmp_path).text
    damaged = SmallRun("r", untargeted())
    damaged.images = lambda record: (_ for _ in ()).throw(ValueError("damaged"))
    assert "no image stored" in page([damaged], tmp_path).text
    assert not page([run()], tmp_path, num_images=0).named("img")


# In a browser.


SCRIPT = """
<script>
const out = {};
const table = document.querySelector("#results table");
const column = (i) => [...table.tBodies[0].rows].map((r) =>
  r.cells[i].dataset.word || r.cells[i].dataset.sort || r.cells[i].textContent.trim());
const heads = [...table.tHead.rows[0].cells];
const place = (words) => heads.findIndex((h) => h.textContent.trim() === words);
const click = (words) => heads[place(words)].querySelector("button").click();
out.original = column(place("case"));
out.focusable = heads.every((h) => h.querySelector("button").tabIndex === 0);
click("ACP"); out.up = column(place("ACP")); out.sortUp = heads[place("ACP")].ariaSort;
click("ACP"); out.down = column(place("ACP")); out.sortDown = heads[place("ACP")].ariaSort;
click("ACP"); out.again = column(place("case"));
click("case"); out.words = column(place("case"));
const select = document.querySelector("select[data-filter=status]");
select.value = "not_found"; select.dispatchEvent(new Event("change"));
out.visible = [...document.querySelectorAll(".card")].filter((c) => c.offsetHeight)
  .map((c) => c.dataset.status);
out.said = document.getElementById("shown").textContent;
out.requests = performance.getEntriesByType("resource").map((e) => e.name)
  .filter((name) => !name.startsWith("data:"));
out.wide = document.documentElement.scrollWidth > innerWidth;
document.body.innerHTML = ""; document.body.dataset.result = JSON.stringify(out);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_tables_sort_and_images_filter_in_a_browser(tmp_path):
    extra = [record(i, "rs/untargeted", "found", p) for i, p in ((0, 100), (1, 110))]
    extra += [record(0, "no/untargeted", "not_found")]  # Its ACP does not exist.
    path = report.write_page([SmallRun("r", untargeted() + extra)], tmp_path / "page.html")
    path.write_text(path.read_text().replace("</body>", SCRIPT))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900",
         "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-result="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert result["original"] == ["gse/untargeted", "rs/untargeted", "no/untargeted"]
    assert result["up"][:2] == ["6.0", "105.0"] and result["down"][:2] == ["105.0", "6.0"]
    assert result["up"][2] == result["down"][2] == "\u2013"  # Without a value: always last.
    assert (result["sortUp"], result["sortDown"]) == ("ascending", "descending")
    assert result["again"] == result["original"]
    assert result["words"] == ["gse/untargeted", "no/untargeted", "rs/untargeted"]
    assert result["focusable"] and not result["wide"] and result["requests"] == []
    assert set(result["visible"]) == {"not_found"}
    assert result["said"] == f"{len(result['visible'])} shown"


def test_details_tell_unnamed_attacks_of_a_plan_apart():
    rows = _flatten([{"name": "", "method": "gse"}, {"name": "", "method": "pgd0"}, {"name": "few", "method": "gse"}], "attacks")
    assert {key: value for key, value in rows.items() if key.endswith("method")} == {
        "attacks.0.method": "gse", "attacks.1.method": "pgd0", "attacks.few.method": "gse"}
