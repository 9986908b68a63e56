"""The training program: recipes, data on the device, an epoch, the run directory, resuming."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import same

import farms_jax
from farms_jax._figures import figure as make_figure
from farms_jax.errors import InputError
from farms_jax.programs import layer_plots
from farms_jax.programs.config_file import read_config, write_config
from farms_jax.programs.epoch_loop import layer_rows
from farms_jax.programs.run_directory import SeedDirectory
from train import cifar, vgg
from train.config import RECIPES, Config, resolve
from train.results import summarise
from train.steps import (
    Normalise,
    Piece,
    TrainState,
    augment,
    cosine_rate,
    make_evaluate,
    make_network,
    make_optimizer,
    make_steps,
)
from train.training import make_refresh

SMALL = Config(dataset="digits", model="vgg16", width=0.0625, epochs=3, batch_size=16, limit_train=64)

# Paper, Table 13: model, method, initial learning rate, range of the factors.
TABLE_13 = """
resnet18 tb 0.1 0.6 1.4 | resnet18 ls-tb 0.1 0.2 1.8 | resnet18 ours 0.1 0.1 1.9 | resnet18 ls-ours 0.1 0.1 1.9
resnet34 tb 0.1 0.5 1.5 | resnet34 ls-tb 0.1 0.3 1.7 | resnet34 ours 0.1 0.2 1.8 | resnet34 ls-ours 0.1 0.3 1.7
vgg16 tb 0.05 0.6 1.4 | vgg16 ls-tb 0.05 0.3 1.7 | vgg16 ours 0.05 0.2 1.8 | vgg16 ls-ours 0.05 0.2 1.8
vgg19 tb 0.05 0.6 1.4 | vgg19 ls-tb 0.05 0.2 1.8 | vgg19 ours 0.05 0.2 1.8 | vgg19 ls-ours 0.05 0.4 1.6
"""


@pytest.mark.parametrize("row", TABLE_13.replace("\n", "|").strip("|").split("|"))
def test_recipe_is_the_papers_row(row):
    model, method, rate, low, high = row.split()
    config = RECIPES[f"{model}-{method}"]
    assert [config.model, config.learning_rate, config.low, config.high] == [model, *map(float, (rate, low, high))]
    assert (config.tb, config.layer_selection) == ("tb" if method.endswith("tb") else "farms", method.startswith("ls-"))
    common = (config.momentum, config.weight_decay, config.batch_size, config.epochs, config.seeds, config.dataset)
    assert common == (0.9, 5e-4, 128, 200, (43, 37, 13), "cifar100")


def test_baseline_rates_are_among_the_papers():
    assert all(RECIPES[f"{model}-cal"].learning_rate in {0.05, 0.1, 0.15} for model in ("resnet18", "resnet34"))
    assert all(RECIPES[f"{model}-cal"].learning_rate in {0.025, 0.05, 0.1} for model in ("vgg16", "vgg19"))


def test_every_recipe_builds():
    parameters = {}  # of each model, with 100 classes
    for config in RECIPES.values():
        if config.model not in parameters:
            parameters[config.model], stats = jax.eval_shape(make_network(config, 100).init, jax.random.key(0))
            assert stats
        params = parameters[config.model]
        state = jax.eval_shape(make_optimizer(config, 390).init, params)
        assert optax.tree.get(state, "lr_scale").keys() == params.keys()
        assert (config.window_of_run() is None) == (config.tb == "tb")
    assert len(RECIPES) == 74


def test_resolve_fills_in_and_keeps_what_was_given():
    full = resolve(Config(model="vgg19", tb="tb"), small=False)
    assert (full.learning_rate, full.low, full.high, full.epochs, full.width) == (0.05, 0.2, 1.8, 200, 1.0)
    short = resolve(Config(learning_rate=0.3), small=True)
    assert (short.learning_rate, short.augment, short.epochs) == (0.3, False, 12)


def test_augmentation_crops_and_flips():
    images = jnp.arange(64 * 8 * 8 * 3, dtype=jnp.uint8).reshape(64, 8, 8, 3)
    found = np.asarray(augment(jax.random.key(0), images))
    padded = np.pad(np.asarray(images), ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners, flips = set(), 0
    for image, source in zip(found, padded, strict=True):
        hits = [
            (i, j, flip)
            for i in range(9)
            for j in range(9)
            for flip in (False, True)
            if np.array_equal(image[:, ::-1] if flip else image, source[i : i + 8, j : j + 8])
        ]
        assert hits
        corners.add(hits[0][:2])
        flips += hits[0][2]
    assert len(corners) > 25
    assert 16 < flips < 48
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, augment(jax.random.key(0), images))


@pytest.fixture(scope="module")
def trained():
    """A small network on noise: its functions, the data, an epoch of 4 steps, and the state before."""
    config = resolve(SMALL, small=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg, "CONVOLUTIONS", {16: (1, 1, 1, 1, 1)})  # compiling takes most of the time
        network, optimizer = make_network(config, 10), make_optimizer(config, 4)
        params, stats = jax.jit(network.init)(jax.random.key(0))
    normalise = Normalise(jnp.full(3, 0.5), jnp.full(3, 0.25))
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.integers(0, 256, (70, 32, 32, 3), np.uint8)), jnp.asarray(rng.integers(0, 10, 70))
    steps = make_steps(network, optimizer, normalise, config)

    def epoch(state, seed, cuts=()):
        piece, first = Piece(state, np.zeros(2, np.float32), 0, 0.0, True), 0
        for last in (*cuts, 4):
            piece = steps(piece.state, np.asarray(piece.sums), jax.random.key(seed), first, last, images, labels)
            first = last
        return piece

    def start():  # a copy, as the steps donate it
        return jax.tree.map(jnp.copy, TrainState(params, stats, optimizer.init(params)))

    return network, normalise, images, labels, epoch, start


@pytest.mark.slow
def test_an_epoch_is_a_function_of_state_and_key(trained):
    *_, epoch, start = trained
    first, other = epoch(start(), 1), epoch(start(), 2)
    assert same(first, epoch(start(), 1))
    assert not np.array_equal(first.state.params["linear"]["kernel"], other.state.params["linear"]["kernel"])
    assert int(first.state.opt_state[2].count) == 4  # 70 // 16 steps
    assert (int(first.step), bool(first.is_finite)) == (4, True)
    assert 4 < float(first.sums[0]) < 16  # chance is log(10) a step


def test_it_does_not_matter_in_how_many_pieces_an_epoch_runs(trained):
    *_, epoch, start = trained
    whole = epoch(start(), 1)
    assert all(same(whole, epoch(start(), 1, cuts)) for cuts in ((1, 2, 3), (2, 2)))


def test_a_step_that_is_not_finite_is_not_taken(trained):
    *_, epoch, start = trained
    state = start()
    state.params["linear"]["kernel"] *= 1e30  # the loss is finite, the norm of its gradient is not
    piece = epoch(state, 1)
    expected = start()
    expected.params["linear"]["kernel"] *= 1e30
    assert (int(piece.step), bool(piece.is_finite), bool(np.isfinite(piece.loss))) == (0, False, True)
    assert same(piece.state, expected)
    assert same(piece.sums, np.zeros(2))


def test_lr_scale_zero_freezes_a_layer(trained):
    *_, epoch, start = trained
    state = start()
    scale = jax.tree.map(jnp.ones_like, optax.tree.get(state.opt_state, "lr_scale"))
    scale["linear"]["kernel"] = jnp.zeros(())
    before = np.asarray(state.params["linear"]["kernel"])
    after = epoch(state._replace(opt_state=farms_jax.refresh(state.opt_state, scale)), 1).state
    np.testing.assert_array_equal(after.params["linear"]["kernel"], before)
    assert not np.array_equal(after.params["linear"]["bias"], start().params["linear"]["bias"])


def test_evaluation_counts_every_image_once(trained, monkeypatch):
    network, normalise, images, labels, _, start = trained
    monkeypatch.setattr("train.steps._EVAL_BATCH", 32)  # 70 images: the last batch is padded
    state = start()
    found = make_evaluate(network, normalise)(state, images, labels)
    logits, _ = network.apply(state.params, state.batch_stats, normalise(images), train=False)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(found["test_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(found["test_accuracy"], (logits.argmax(-1) == labels).mean(), rtol=1e-6)


def test_the_rate_is_a_cosine_by_epoch():
    config = resolve(Config(epochs=4, learning_rate=0.1), small=False)
    np.testing.assert_allclose(
        [cosine_rate(config, e) for e in range(5)], [0.1, 0.0853553, 0.05, 0.0146447, 0], atol=1e-7
    )
    optimizer = make_optimizer(config, steps_per_epoch=3)
    params = {"linear": {"kernel": jnp.ones((2, 2))}}
    state, rates = optimizer.init(params), []
    for _ in range(7):
        _, state = optimizer.update(params, state, params)
        rates.append(float(state[1].hyperparams["learning_rate"]))
    np.testing.assert_allclose(rates, np.repeat([0.1, 0.0853553, 0.05], 3)[:7], rtol=1e-5)


@pytest.mark.parametrize(("tb", "selection"), [("none", True), ("tb", True), ("farms", True), ("farms", False)])
def test_refresh_sets_the_rates_and_reports_them(trained, tb, selection):
    *_, start = trained
    config = resolve(dataclasses.replace(SMALL, tb=tb, layer_selection=selection), small=False)
    state, report, factor_of = make_refresh(config)(start())
    rate = float(cosine_rate(config, 1))
    rows = layer_rows(report, factor_of, rate, 1)
    factors = {row["layer"]: row["lr_scale"] for row in rows}
    scale = dict(farms_jax.named_leaves(optax.tree.get(state.opt_state, "lr_scale")))
    assert all(float(scale[layer]) == factor for layer, factor in factors.items())
    assert all(row["learning_rate"] == pytest.approx(rate * row["lr_scale"]) for row in rows)
    assert len(factors) == 6
    ends = [factors["features/conv_1/kernel"], factors["linear/kernel"]]
    if tb == "none":
        assert set(factors.values()) == {1.0}
    else:
        assert (ends == [1.0, 1.0]) == selection
        assert min(factors.values()) == pytest.approx(config.low)
        assert max(factors.values()) == pytest.approx(config.high)
        assert scale["features/bn_7/scale"] == scale["features/conv_7/kernel"] == scale["features/conv_7/bias"]


def test_summary():
    lines = [{"test_accuracy": a, "seconds": 2.0, "refresh_seconds": 0.5} for a in (0.5, 0.75, 0.25)]
    summary = summarise({1: lines, 2: lines[:2]})
    assert summary["seeds"][1] == {"last": 25, "best": 75, "seconds": 6, "refresh_seconds": 1.5}
    assert summary["last"] == {"mean": 50, "std": pytest.approx(35.355, abs=1e-3)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "resnet9"], "--recipe: there is no 'resnet9'"),
        (["--resume", "nowhere"], "there is no config.json in it"),
        (["--resume", "nowhere", "--epochs", "3"], "leave out --epochs 3"),
        (["--dataset", "mnist"], "mnist"),
        (["--dataset", "digits", "--low", "2", "--high", "1"], "--low must not be above --high"),
        (["--dataset", "digits", "--low", "1.95"], "--low must not be above --high, got 1.95 and 1.9"),  # Table 13's
        (["--dataset", "digits", "--rows", "0"], "Window: rows must be a whole number of at least 1"),
        (["--dataset", "digits", "--epochs", "0"], "--epochs must be above 0"),
        (["--dataset", "digits", "--seeds", "1", "1"], "--seed must be different"),
        (["--dataset", "digits", "--batch-size", "5000"], "--batch-size 5000 is more than the"),
        (["--dataset", "folder:nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.cifar", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cifar.main()
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert message in last
    assert last.startswith("train.cifar: ")


def test_nan_ends_a_run_in_one_line(trained):
    *_, start = trained
    state = start()
    state.params["linear"]["kernel"] *= jnp.nan
    with pytest.raises(InputError, match="NaN or Inf in linear/kernel; train from an earlier checkpoint"):
        make_refresh(resolve(SMALL, small=False))(state)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a program's settings may hold."""

    name: str = "a"
    out: Path = Path("runs")
    rate: float | None = None
    data: Path | None = None
    files: tuple[Path, ...] = ()
    grid: tuple[tuple[str, float], ...] = ()
    pair: tuple[int, str] | None = None
    inner: "Settings | None" = None


INNER = Settings(data=Path("e"), pair=(1, "z"))


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings("b", Path("/x/y"), 0.5, Path("d"), (Path("1"), Path("2")), (("u", 0.1), ("v", 2.0)), (3, "w"), INNER),
    ],
)
def test_settings_are_read_back_as_they_were(settings, tmp_path):
    write_config(tmp_path / "run", settings, {"fingerprint": "f", "versions": {"jax": "1"}})
    found, facts = read_config(tmp_path / "run", Settings)
    assert found == settings
    assert facts == {"fingerprint": "f", "versions": {"jax": "1"}}


def stored(**changes):
    return json.dumps({"config": {**dataclasses.asdict(Settings()), **changes}}, default=str)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"config": {"tb": "fa', "is damaged or of another version"),
        ("3", "is damaged"),
        ("{}", "'config'"),
        ('{"config": {}}', "fields data, files, grid, inner, name, out, pair, rate"),
        (stored(new=1), r"\(fields new\); start anew"),
        (stored(pair=[1]), "is damaged"),
        (stored(out=None), "is damaged"),
    ],
)
def test_a_config_of_another_shape_is_named(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_config(tmp_path, Settings)
    assert str(error.value).startswith(f"--resume {tmp_path}: {tmp_path / 'config.json'} is damaged")


@pytest.mark.parametrize(
    ("name", "text"),
    [("metrics.jsonl", '{"epoch": 0}\n{"epo\n'), ("layers.csv", "epoch,layer,alpha\n0,a,x\n")],
)
def test_a_damaged_line_is_named(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    directory = SeedDirectory(tmp_path)
    with pytest.raises(InputError, match=f"{name} is damaged"):
        directory.metrics() if name == "metrics.jsonl" else directory.layers()


def test_layer_rows_are_read_back_to_the_last_digit(tmp_path):
    rows = [
        {"epoch": 0, "layer": 'ä,"b"', "alpha": 0.1 + 0.2, "lr_scale": 1e-300, "learning_rate": 0.0},
        {"epoch": 12, "layer": "c", "alpha": float("inf"), "lr_scale": 1.0, "learning_rate": 1 / 3},
    ]
    directory = SeedDirectory(tmp_path)
    directory.append_layers(rows[:1])
    directory.append_layers(rows[1:])
    assert directory.layers() == rows


ROWS = [
    {"epoch": epoch, "layer": layer, "alpha": alpha + epoch, "lr_scale": 1.0, "learning_rate": alpha / 10}
    for epoch in range(3)
    for layer, alpha in (("a", 2.0), ("b", 4.0))
]


def test_the_history_shows_every_layer_once():
    alpha, rate, colours = layer_plots.layer_history([*ROWS[:-1], {**ROWS[-1], "alpha": 0.0}], "title").axes
    assert [label.get_text() for label in colours.get_yticklabels()] == ["a", "b"]
    assert len(alpha.lines) == len(rate.lines) == 2
    np.testing.assert_array_equal(alpha.lines[0].get_xydata(), [[0, 2], [1, 3], [2, 4]])
    np.testing.assert_array_equal(alpha.lines[1].get_ydata(), [4, 5, np.nan])  # no tail: a gap
    np.testing.assert_array_equal(rate.lines[1].get_xydata(), [[0, 0.4], [1, 0.4]])  # nothing is trained in the last


def test_the_distribution_is_that_of_the_last_epoch(tmp_path):
    figure = layer_plots.alpha_distribution({"x": ROWS, "y": [*ROWS[:-1], {**ROWS[-1], "alpha": 0.0}]}, "title")
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["x", "y"]
    np.testing.assert_array_equal(axis.lines[-2].get_xydata(), [[1, 4], [1, 6]])
    np.testing.assert_array_equal(axis.lines[-1].get_xydata(), [[2, 4]])  # a layer without a tail is left out
    (file,) = layer_plots.save(tmp_path, {"alphas.png": figure})
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    figure, _ = make_figure("title", 1)
    (file,) = layer_plots.save(tmp_path, {"alphas.png": figure})
    before = file.read_bytes()

    def cut_off(part, **_):
        Path(part).write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", cut_off)
    with pytest.raises(OSError, match="alphas.png"):
        layer_plots.save(tmp_path, {"alphas.png": figure})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
