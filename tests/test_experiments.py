"""The paper's claims hold in the experiments, on small data; their files and their mistakes."""

import argparse
import csv
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import (
    _common,
    allocation_stability,
    coloured_digits,
    fitted_tails,
    layerwise_transforms,
    marchenko_pastur,
    random_init,
    teacher_student,
    window_grid,
)
from farms_jax.errors import InputError
from farms_jax.marchenko_pastur import hill_alpha
from train.data import load

NAMES = [
    "random_init",
    "marchenko_pastur",
    "teacher_student",
    "fitted_tails",
    "layerwise_transforms",
    "allocation_stability",
    "window_grid",
]


def arguments(module, *given):
    """Options of an experiment as its command line would read them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    (module.options if hasattr(module, "options") else importlib.import_module("experiments._grid").options)(parser)
    return parser.parse_args([str(word) for word in given])


@pytest.mark.slow
def test_at_random_init_width_moves_the_baseline_and_not_farms():
    args = arguments(random_init, "--models", "vgg16", "--widths", 0.25, 1, "--repeats", 2)
    result = random_init.experiment(args)
    spread = result.facts["spread"]["vgg16"]
    assert spread["baseline"] > 0.1
    assert spread["FARMS"] <= spread["baseline"] / 4
    farms = [row for row in result.rows if row["method"] == "FARMS" and row["width"] == 1]
    baseline = [row for row in result.rows if row["method"] == "baseline" and row["width"] == 1]
    assert max(abs(row["alpha"] - hill_alpha(1.0)) for row in farms) < 0.25
    assert all((row["alpha"] > 2.5) == (row["aspect_ratio"] > 1.5) for row in baseline)


def test_he_weights_have_the_variance_of_their_inputs():
    weights = random_init.he_weights("resnet18", 0.5, 100, seed=0)
    assert weights["linear/kernel"].shape == (256, 100)
    assert weights["layer1/0/conv1/kernel"].shape == (3, 3, 32, 32)
    for name, inputs in (("linear/kernel", 256), ("layer1/0/conv1/kernel", 9 * 32)):
        assert weights[name].var() == pytest.approx(2 / inputs, rel=0.05)


def test_noise_follows_the_law_and_only_the_baseline_sees_its_shape():
    row, eigenvalues = marchenko_pastur.measure(100, 400, seeds=3)
    assert eigenvalues.size == 300
    assert row["ks"] < 0.05
    assert row["alpha_whole"] == pytest.approx(row["alpha_law"], rel=0.05)
    assert row["alpha_law"] == pytest.approx(hill_alpha(0.25))
    assert row["alpha_farms"] == pytest.approx(hill_alpha(1.0), rel=0.02)


@pytest.mark.slow
def test_alpha_of_farms_falls_where_the_student_is_aligned():
    small = ["--inputs", 100, "--widths", 25, 50, 100, 400, "--window", 20, "--repeats", 2, "--batch", 400]
    result = teacher_student.experiment(arguments(teacher_student, *small))
    found = result.facts["correlation"]
    assert found["farms"]["pearson"] < -0.5
    assert found["farms"]["spearman"] < -0.8
    assert found["farms"]["spearman"] < found["baseline"]["spearman"]
    assert all(row["alignment"] > 0.5 for row in result.summary)  # chance is 0.1
    shape = [row["baseline_at_start"] for row in result.summary]
    assert shape[0] > shape[1] > shape[2] < shape[3]


def test_alignment_is_that_of_the_first_right_singular_vector():
    weights = np.diag([1.0, 3.0, 2.0])[:, [1, 2, 0]]
    assert teacher_student.alignment(weights, np.array([0.6, 0.0, 0.8])) == pytest.approx(0.6)


def test_a_final_layer_of_noise_misleads_the_baseline_only(tmp_path):
    generator = np.random.default_rng(0)
    layers = {"linear/kernel": (512, 100), "conv/kernel": (3, 3, 32, 32), "conv/bias": (32,)}
    np.savez(tmp_path / "net.npz", **{name: generator.normal(size=shape) for name, shape in layers.items()})
    result = fitted_tails.experiment(arguments(fitted_tails, "--weights", tmp_path / "net.npz"))
    alphas = {row["method"]: row["alpha"] for row in result.rows}
    assert alphas["baseline"] == pytest.approx(hill_alpha(100 / 512), rel=0.1)
    assert alphas["FARMS"] == pytest.approx(hill_alpha(1.0), rel=0.05)
    assert {row["shape"] for row in result.rows} == {"100 x 512"}
    assert all(row["others"] == pytest.approx(hill_alpha(1.0), rel=0.1) for row in result.rows)
    for pattern, said in ((".*kernel", "matches 2 weights"), ("head", "linear/kernel"), ("(", "no regular expression")):
        with pytest.raises(InputError, match=said):
            fitted_tails.measure(tmp_path / "net.npz", pattern)
    with pytest.raises(InputError, match="no layer that can be measured: bias, norm or other vector"):
        fitted_tails.measure(tmp_path / "net.npz", "conv/bias")


def test_coloured_digits_are_of_their_labels_and_splits():
    images, digits = coloured_digits.coloured_digits(200, 100, seed=1), load("digits")
    assert images.train_images.shape == (200, 32, 32, 3)
    assert np.bincount(images.train_labels).tolist() == [2] * 100
    # The brightest channel of every colour is full: it is the digit itself.
    drawn = {
        image[..., 0].tobytes(): label for image, label in zip(digits.train_images, digits.train_labels, strict=True)
    }
    for image, label in zip(images.train_images, images.train_labels, strict=True):
        assert drawn[image.max(-1).tobytes()] == label // 10
        pixel = image.reshape(-1, 3)[image.max(-1).argmax()] / image.max()
        assert np.abs(coloured_digits.COLOURS - pixel).sum(1).argmin() == label % 10
    assert not any(image.max(-1).tobytes() in drawn for image in images.test_images)


@pytest.mark.slow
def test_the_grid_is_filled_once_and_its_ends_are_marked(tmp_path, monkeypatch):
    grid = ["--rows", 16, "--per-axis", 2, 3, "--tail", "median", "--cache", tmp_path, "--out", tmp_path]
    tiny = [*grid, "--samples", 1, "--length", 16, "--limit", 2]
    args = arguments(window_grid, *tiny)
    result = window_grid.experiment(args)
    _common.write(tmp_path, "window_grid", result, vars(args), 1.0)
    assert [row["setting"] for row in result.summary][:3] == ["uniform", "alphapruning", "16 rows, 2 per axis"]
    assert all(row["sparsity"] == pytest.approx(0.6, abs=2e-3) for row in result.rows)
    assert all(row["perplexity"] != result.facts["dense"] for row in result.summary)
    monkeypatch.setattr(window_grid, "simulate", None)  # a cell that is computed again would fail
    assert window_grid.experiment(args).summary == result.summary
    with pytest.raises(InputError, match="another sparsity; name another --out"):
        window_grid.experiment(arguments(window_grid, *tiny, "--sparsity", 0.5))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "window_grid.json").write_text('{"settings": ')
    with pytest.raises(InputError, match="window_grid.json: damaged"):
        allocation_stability.experiment(arguments(allocation_stability, *grid, "--out", tmp_path / "broken"))
    stability = allocation_stability.experiment(arguments(allocation_stability, *grid))
    # The best and the worst window are in the legend, and every setting removes the same share on the whole.
    best, *_, worst = sorted(result.summary[2:], key=lambda row: row["perplexity"])
    texts = {text.get_text() for text in stability.figure.axes[0].get_legend().get_texts()}
    assert {f"best perplexity: {best['setting']}", f"worst perplexity: {worst['setting']}"} <= texts
    for setting in {row["setting"] for row in stability.rows}:
        shares = [row["sparsity"] for row in stability.rows if row["setting"] == setting]
        assert np.mean(shares) == pytest.approx(0.6, abs=1e-3)


@pytest.mark.slow
def test_a_layerwise_transform_trains_and_none_trains_like_another(tmp_path):
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(["cat", "fox", "sees", "eats", "the", "red"], 12)) for _ in range(4000)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    tiny = ["--text", tmp_path / "text.txt", "--steps", 6, "--hidden-size", 16, "--blocks", 2, "--vocab-size", 300]
    tiny += ["--methods", "LLR, FARMS", "AlphaDecay, FARMS", "HTMuon", "--rates", 0.03, "--seeds", 0]
    result = layerwise_transforms.experiment(arguments(layerwise_transforms, *tiny))
    losses = {row["method"]: row["loss"] for row in result.rows}
    assert len(set(losses.values())) == len(losses) == 3
    assert max(losses.values()) < np.log(300)
    assert {row["method"]: row["loss"] for row in result.summary} == losses


def test_methods_are_compared_at_the_best_rate_of_each():
    losses = {("AdamW", 0.1): (3, 5), ("AdamW", 0.2): (2, 3), ("LLR", 0.1): (2, 4), ("LLR", 0.2): (7, 7)}
    rows = [
        {"method": method, "rate": rate, "seed": seed, "loss": float(loss)}
        for (method, rate), own in losses.items()
        for seed, loss in enumerate(own)
    ]
    assert layerwise_transforms.summarise(rows) == [
        {"method": "AdamW", "rate": 0.2, "loss": 2.5, "difference": 0.0, "range": 0.0},
        {"method": "LLR", "rate": 0.1, "loss": 3.0, "difference": 0.5, "range": 1.0},
    ]


def test_a_result_is_three_files_and_a_table(tmp_path, monkeypatch, capsys):
    drawing, _ = _common.figure(2, 2)
    rows = [{"layer": "conv1", "alpha": 2.5}, {"layer": "linear", "alpha": 12.0}]
    result = _common.Result(rows, rows[:1], {"noise": 1}, drawing)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "new"), "--seed", "3"])
    _common.run("named", "usage", lambda parser: parser.add_argument("--seed", type=int), lambda args: result)
    assert (tmp_path / "new" / "named.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "new" / "named.json").read_text())
    assert content["settings"]["seed"] == 3
    assert (content["noise"], content["summary"]) == (1, rows[:1])
    assert list(csv.DictReader((tmp_path / "new" / "named.csv").open()))[1] == {"layer": "linear", "alpha": "12.0"}
    printed = capsys.readouterr().out
    assert "conv1  2.500" in printed
    assert "named.png" in printed


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_explains_itself(name, monkeypatch, capsys):
    module = importlib.import_module(f"experiments.{name}")
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    assert f"python -m experiments.{name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("random_init", "--widths 0.01 --depth-width 0.01", "--widths must be at least 1/32"),
        ("random_init", "--depth-width 3", "--depth-width 3 is none of the --widths"),
        ("random_init", "--repeats 0", "must be at least 1"),
        ("marchenko_pastur", "--aspect-ratios 0.5", "--aspect-ratios must be at least 1"),
        ("teacher_student", "--widths 100 100", "at least three different ones"),
        ("teacher_student", "--window 200", "--window 200 does not fit"),
        ("teacher_student", "--gain 0", "--gain and --rate must be above 0"),
        ("fitted_tails", "--images 10", "--images must be at least 100"),
        ("fitted_tails", "--weights no/such/file", "no such file or folder"),
        ("window_grid", "--sparsity 1.5", "--sparsity must be in"),
        ("allocation_stability", "--model no/such/model", "no/such/model"),
    ],
)
def test_a_mistake_is_a_line_that_names_the_flag(name, options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), *options.split()])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"experiments.{name}").main()
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
