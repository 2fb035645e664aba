"""The shared look of the figures and how they are written."""


import matplotlib
import numpy as np
import pytest

from gse_jax import report
from gse_jax.report.figures import COLOURS, line_style


def make_figure():
    rates = {"one": np.linspace(0, 1, 11), "two": np.linspace(0, 0.5, 11)}
    return report.success_curves(np.arange(11), rates)


def test_equal_figures_give_equal_bytes(tmp_path):
    first = report.save_figure(make_figure(), tmp_path / "a" / "curve.v1")
    second = report.save_figure(make_figure(), tmp_path / "b" / "other")
    figure = make_figure()
    third = report.save_figure(figure, tmp_path / "c")
    again = report.save_figure(figure, tmp_path / "d")  # Writing must not change the figure.
    assert [path.name for path in first] == ["curve.v1.png", "curve.v1.pdf"]
    for number in (0, 1):
        contents = {pair[number].read_bytes() for pair in (first, second, third, again)}
        assert len(contents) == 1
    assert first[0].read_bytes().startswith(b"\x89PNG")
    pdf = first[1].read_bytes()
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf and b"atplotlib" not in pdf
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a", "b", "c.pdf", "c.png", "d.pdf", "d.png",
    ]


def test_settings_of_the_user_do_not_leak_in_or_out(tmp_path):
    plain = report.save_figure(make_figure(), tmp_path / "plain")
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 37}):
        changed = report.save_figure(make_figure(), tmp_path / "changed")
    for one, other in zip(plain, changed, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_resolution_is_in_pixels_per_inch(tmp_path):
    png, _ = report.save_figure(make_figure(), tmp_path / "curve", dpi=100)
    width = int.from_bytes(png.read_bytes()[16:20], "big")  # The first field of the PNG header.
    assert width == 330


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("gse_jax.report.files.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        report.save_figure(make_figure(), tmp_path / "curve")
    assert list(tmp_path.iterdir()) == []


def test_lines_are_told_apart_without_colour():
    styles = [line_style(index) for index in range(20)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 20
    assert len({style["marker"] for style in styles[: len(COLOURS)]}) == len(COLOURS)


def _linear(channel):
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
DEFICIENCIES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_differ_for_colour_blind_readers(deficiency):
    seen = []
    for colour in COLOURS:
        rgb = [_linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5)]
        seen.append(np.clip(np.array(DEFICIENCIES[deficiency]) @ rgb, 0, 1) ** (1 / 2.2))
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert np.linalg.norm(one - other) > 0.1
