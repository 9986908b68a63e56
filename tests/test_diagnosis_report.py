"""How a diagnosis is shown: text, terminal, files, one HTML page, figures."""

import csv
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from diagnosis_samples import HOSTILE, NOISE, diagnosis

import farms_jax
from farms_jax.diagnosis.columns import find_column
from farms_jax.diagnosis.compare import Comparison
from farms_jax.diagnosis.diagnosis import Diagnosis
from farms_jax.diagnosis.figures import COLOURS, axes, spectrum, tail_line
from farms_jax.diagnosis.spectrum import Histogram
from farms_jax.diagnosis.status import MEANINGS, attention
from farms_jax.errors import InputError


class Page(HTMLParser):
    """The page as a reader without a script has it: rows of cells by layer, texts by tag, no tag left open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.texts, self.links, self.marks, self.ids = [], [], {}, [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "wbr", "input"}:  # those that have no end
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        self.ids += [value for name, value in attrs if name == "id"]
        links = [value for name, value in attrs if name in {"src", "href", "action", "data"}]
        (self.marks if tag == "use" else self.links).extend(links)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.texts[tag] = self.texts.get(tag, "") + data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def sample():
    return diagnosis()


@pytest.fixture(scope="module")
def write_page(tmp_path_factory):
    def write(diagnosis):
        path = tmp_path_factory.mktemp("page") / "report.html"
        diagnosis.write_html(path)
        return path.read_text(encoding="utf-8")

    return write


@pytest.fixture(scope="module")
def html(sample, write_page):
    return write_page(sample)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_text_fits_and_says_what_needs_attention_first(sample, capsys):
    text = str(sample)
    assert repr(sample) == text
    assert max(len(line) for line in text.splitlines() if not line.startswith("     ")) <= 120  # but code
    assert "1 degenerate, 1 over-correlated, 2 undertrained, 12 well trained" in text
    assert "look first at" in " ".join(text.splitlines()[-2:])  # it stays on the screen
    assert f"{sample.layers[1]['alpha']:.2f} ±0.04" in text
    assert f"alpha of noise: {NOISE:.3f}" in text
    assert "all names begin with model.layers." in text
    assert "left out (excluded): lm_head.weight" in text
    assert all(f"{status}: {MEANINGS[status]}" in text for status in sample.column("status"))
    sample.show()  # no terminal: no colours, names in full
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert all(name in out for name in sample.names)


@pytest.mark.parametrize(("zeros", "noisy", "told"), [(0.5, 16, "all"), (0.0, 13, "most")])
def test_a_model_of_zeros_and_noise_is_told_as_one(sample, zeros, noisy, told):
    status = ["undertrained"] * noisy + ["well trained"] * (16 - noisy)
    layers = tuple(row | {"zeros": zeros, "status": one} for row, one in zip(sample.layers, status, strict=True))
    line = dataclasses.replace(sample, layers=layers).headline()
    assert ("50% of their weights zero" in line) == bool(zeros)
    assert line.endswith(f"; {told} of them are as noise, or nearly")
    dead = dataclasses.replace(sample, layers=(layers[0] | {"status": "degenerate"}, *layers[1:]))
    assert f"look first at {layers[0]['layer']}" in dead.headline()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_table_is_as_wide_as_the_terminal(sample, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", out := Terminal())
    sample.show()
    lines = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines()
    assert max(len(line) for line in lines if not line.startswith("     ")) <= width
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("layer ")) + 1 :]
    assert [line.split()[1] for line in table[: len(sample)]] == [row["status"].split()[0] for row in sample.layers]
    assert "\x1b[" in out.getvalue()
    if width == 200:
        assert HOSTILE in out.getvalue()


def test_columns_and_order(sample):
    found = attention(sample.layers)
    assert [row["status"] for row in found] == ["degenerate", "over-correlated", "undertrained", "undertrained"]
    assert found[2]["alpha"] > found[3]["alpha"]
    assert len(sample) == len(sample.names) == 16
    assert sample.column("alpha") == [row["alpha"] for row in sample.layers]
    assert sample.sort("status").column("status")[:2] == ["degenerate", "over-correlated"]
    assert sample.sort("rank").column("rank") == list(range(1, 17))
    assert sample.sort("sv_min", descending=True).column("sv_min")[-1] is None
    assert sample.sort("noise").names == sample.sort("noise_alpha").names
    with pytest.raises(InputError, match="no column 'alfa'"):
        sample.column("alfa")


@pytest.mark.parametrize("columns", [Diagnosis.possible, Comparison.possible])
def test_a_head_names_one_column(columns):
    for column in columns:
        assert find_column(column.name, columns) == find_column(column.head or column.name, columns) == column
    heads = [column.head for column in columns if column.head]
    assert len(heads) == len(set(heads))


def test_csv_and_data_frame_have_every_digit(sample, tmp_path):
    sample.write_csv(tmp_path / "layers.csv")
    rows = list(csv.DictReader((tmp_path / "layers.csv").open(newline="")))
    frame = sample.to_pandas()
    assert list(rows[0]) == [frame.index.name, *frame.columns]
    for row, ours in zip(rows, sample.layers, strict=True):
        assert (row["layer"], row["shape"]) == (ours["layer"], ours["shape"])
        assert float(row["whole_norm"]) == ours["whole_norm"] == frame.loc[ours["layer"], "whole_norm"]
    assert rows[-1]["alpha"] == rows[-1]["sv_min"] == rows[-1]["rand_distance"] == ""


def test_json_comes_back_and_the_page_is_in_network_order(sample, tmp_path, write_page, html):
    by_alpha = sample.sort("alpha")
    assert by_alpha.names != sample.names
    by_alpha.write_json(tmp_path / "a.json")
    json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    again = Diagnosis.read_json(tmp_path / "a.json")
    assert again.names == by_alpha.names
    assert again.to_dict() == sample.to_dict()
    assert again.histograms == sample.histograms
    assert again.left_out == sample.left_out
    assert write_page(again) == html


@pytest.mark.parametrize("text", ["[]", "no json", '{"format": "farms_jax diagnosis 2"}', "[" * 100_000])
def test_another_file_is_no_diagnosis(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="a.json: no diagnosis; make one with"):
        Diagnosis.read_json(tmp_path / "a.json")


def test_page_is_complete_without_its_script(sample, html, page):
    heads, *rows = (row for row in page.rows if len(row) > 20)
    assert {column.name for column in sample.columns} == {*heads, "reason"}
    for row, cells in zip(sample.layers, rows, strict=True):
        shown = dict(zip(heads, cells, strict=True))
        assert shown["layer"] == row["layer"]
        assert shown["status"] == row["status"]
        if row["alpha"]:
            assert shown["alpha"] == f"{row['alpha']:.2f} ±0.04"
            assert shown["whole_alpha"] == f"{row['whole_alpha']:.3f}"
    details = [row[0] for row in page.rows if len(row) == 1]
    assert all(row["reason"] in text for row, text in zip(sample.layers, details, strict=True))
    everything = " ".join(page.texts.values())
    provenance = ["/models/smol/model.safetensors", "ab" * 32, "resamples 200"]
    expected = [*MEANINGS.values(), "lm_head.weight", *provenance, *(column.meaning for column in sample.columns)]
    assert [text for text in expected if text not in everything] == []
    assert all(html.index(text) > html.index("</table>") for text in provenance)


def test_page_is_small_and_needs_nothing_from_outside(sample, html):
    assert len(html.encode()) < 45_000 + 5500 * len(sample)
    assert "://" not in html
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|innerHTML", html)


def test_marks_of_layers_lead_to_their_rows(sample, page):
    layers = [i for i, row in enumerate(sample.layers) if row["alpha"]]
    assert sorted(page.links) == sorted(2 * [f"#l{i}" for i in layers])  # alpha by depth, and the bias
    assert {target.removeprefix("#") for target in (*page.links, *page.marks)} <= set(page.ids)
    assert f"{sample.names[1]}: alpha" in page.texts["title"]


def test_a_dark_screen_has_every_colour_of_the_figures(html):
    style, _, content = html.partition("</style>")
    for name, colour in COLOURS.items():
        assert f"--{name}: {colour}" in style
        assert len(set(re.findall(f"--{name}: (#\\w+)", style))) == 2
        assert colour not in content


def test_names_are_text_never_markup(html, page, write_page):
    assert "<b>&" not in html
    assert HOSTILE in [row[0] for row in page.rows]
    assert "SmolLM2 <135M>" in page.texts["h1"]
    hostile = diagnosis(1, model="</title><script>alert(1)</script>")
    assert write_page(hostile).count("<script>") == 1
    quantised = dataclasses.replace(hostile, model="small", facts={"quantisation": "Q4_1"})
    assert '<p class="lead">Q4_1: 4 layers' in write_page(quantised)  # the name is the heading
    notebook = hostile._repr_html_()
    assert notebook.count("<tr>") == 1 + len(hostile)
    assert "exponent of the tail over windows" in notebook
    assert "<script>" not in notebook and HOSTILE not in notebook


def test_page_without_whole_matrices_statuses_and_spectra_or_layers(sample, write_page):
    rows = tuple({name: row[name] for name in ("layer", "shape", "alpha")} for row in sample.layers)
    bare = Diagnosis(model="bare", layers=rows, left_out=(), settings={}, facts={}, histograms={})
    found = Page(write_page(bare))
    assert len([row for row in found.rows if row[0] in bare.names]) == len(bare)
    assert "whole matrix" not in str(bare)
    assert "undertrained" not in str(bare)
    with pytest.raises(InputError, match="bias needs whole matrices"):
        bare.plot("bias")
    median = f"<b>{(rows[0]['alpha'] + rows[1]['alpha']) / 2:.2f}</b><span>alpha</span>"
    assert median in write_page(dataclasses.replace(bare, layers=rows[:2]))
    nothing = dataclasses.replace(bare, layers=(), left_out=(("a", "scalar"),))
    assert "0 layers" in str(nothing)
    assert Page(write_page(nothing)).texts["b"] == "0"


def test_fitted_line_holds_the_share_of_the_tail():
    # A pure power law: the line must lie on the densities.
    alpha, edges = 2.5, np.linspace(0, 6, 301)
    share = 10 ** ((1 - alpha) * edges)
    densities = (share[:-1] - share[1:]) / np.diff(edges)
    histogram = Histogram(tuple(edges.tolist()), tuple(densities.tolist()))
    start, top, end, bottom = tail_line({"alpha": alpha, "xmin": 10.0}, histogram) or pytest.fail()
    assert start == 1
    np.testing.assert_allclose([10**top, 10**bottom], densities[[50, 299]], rtol=0.05)
    assert math.isclose(end, 6)
    assert tail_line({"layer": "a", "alpha": None, "xmin": None}, histogram) is None
    figure, axis = axes()
    spectrum(axis, {"layer": "a"}, Histogram((0.0, 1.0, 2.0), (0.0, 0.0)))  # no eigenvalues
    figure.canvas.draw()


def test_figures(sample):
    for kind in ("alpha", "bias"):
        (axis,) = sample.plot(kind).axes
        assert {"well trained", "undertrained", "over-correlated"} <= set(axis.get_legend_handles_labels()[1])
    assert "degenerate" in sample.plot("spectrum").get_suptitle()
    drawn = sample.plot("spectrum", sample.names[1])
    drawn.canvas.draw()
    assert sample.names[1] in drawn.get_suptitle()
    wrong = {
        ("alphas",): "no kind 'alphas'",
        ("spectrum", "head"): "no layer 'head'",
        ("bias", "head"): "leave out `la",
    }
    for arguments, message in wrong.items():
        with pytest.raises(InputError, match=message):
            sample.plot(*arguments)


def test_report_is_shown_alike():
    weights = {f"<{i}>": np.random.default_rng(i).normal(size=(20, 30)).astype(np.float32) for i in range(3)}
    report = farms_jax.analyze(weights | {"bias": np.ones(3, np.float32)})
    frame = report.to_pandas()
    assert frame.index.tolist() == list(report.names)
    np.testing.assert_allclose(frame["alpha"], report.alpha)
    assert repr(report) == str(report)
    assert report._repr_html_().count("<tr>") == 4
    assert "<0>" not in report._repr_html_()
    assert "left out" in report._repr_html_()
    figure = report.plot()
    (axis,) = figure.axes
    np.testing.assert_allclose(axis.lines[0].get_ydata(), report.alpha)
    assert figure._repr_png_().startswith(b"\x89PNG")  # in notebooks, without %matplotlib inline
    seen = []  # traced and stacked reports have no numbers to show
    jax.jit(lambda one: seen.append((repr(one), one._repr_html_())))(report)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), report)
    assert seen[0][0].startswith("LayerReport(3 layers")
    assert repr(stacked) == "LayerReport(3 layers, alpha (2, 3))"
