"""What a pruning run writes beside weights: precision, comparison, model card, plots, and its upload."""

import dataclasses
import json
import shlex
import shutil
import types

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import tyro
from gguf import GGMLQuantizationType as Kind
from huggingface_hub import errors, metadata_load
from prune_helpers import (
    byte_level_metadata,
    byte_tokenizer,
    bytes_of,
    card_of,
    config_of,
    gguf_metadata,
    small_run,
    weights_of,
    write_folder,
    write_gguf,
)
from transformers import GenerationConfig

import prune.job
import prune.pruning
from farms_jax.errors import InputError
from prune import sparsity_plots
from prune.checkpoints import open_checkpoint
from prune.command import command_line
from prune.comparison import compare, perplexity_interval
from prune.config import Config
from prune.job import prepare
from prune.model_card import _base_model
from prune.precision import Precision, converted
from prune.publishing import check_push
from prune.results import LayerRow
from prune.run import run

NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


# --- Comparison ------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_normal_distribution_for_many_blocks():
    rng = np.random.default_rng(0)
    text, change = rng.normal(3, 0.6, 400), rng.normal(0.2, 0.05, 400)
    for found, losses in ((perplexity_interval(text), text), (compare(text + change, text), change)):
        mean, half = losses.mean(), 1.96 * losses.std() / 20
        expected = np.exp([mean, mean - half, mean + half]) - (losses is change)
        np.testing.assert_allclose(found, expected, atol=0.12 * (expected[2] - expected[0]))
        assert found.value == pytest.approx(expected[0], rel=1e-12)


def test_blocks_are_paired():
    text = np.random.default_rng(0).normal(3, 0.6, 30)
    np.testing.assert_allclose(compare(text + 0.1, text), np.expm1(0.1))
    assert perplexity_interval([3.0]) == tuple(np.exp([3.0] * 3))
    with pytest.raises(InputError, match="30 and 29 blocks cannot be paired"):
        compare(text, text[1:])


# --- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "asked", "dtype"),
    [
        (Kind.Q8_0, {}, "source", "float16"),
        (Kind.Q8_0, {NORM: 1e5}, "source", "bfloat16"),  # too large
        (Kind.Q8_0, {NORM: 1e-6}, "source", "bfloat16"),  # too small for all digits
        (Kind.F16, {}, "source", "float16"),
        (Kind.BF16, {}, "source", "bfloat16"),
        (Kind.F32, {NORM: 1e5}, "source", "float32"),
        (Kind.Q8_0, {NORM: 1e5}, "float32", "float32"),
    ],
    ids=str,
)
def test_a_gguf_file_is_written_in_a_dtype_that_holds_its_numbers(kind, changes, asked, dtype, tmp_path):
    tensors = weights_of("llama_tiny")
    for name, value in changes.items():
        tensors[name] = np.full_like(tensors[name], value)
    kinds = {name: kind for name, tensor in tensors.items() if tensor.ndim == 2}
    path = write_gguf(tmp_path / "model.gguf", tensors, gguf_metadata(config_of("llama_tiny")), kinds=kinds)
    job = prepare(small_run(tmp_path, path, dtype=asked))
    assert {np.dtype(info.dtype).name for info in job.checkpoint.tensors.values()} == {dtype}
    source, read = open_checkpoint(str(path)), job.checkpoint.read
    for name in (NORM, UP):
        np.testing.assert_array_equal(read(name), source.read(name).astype(read(name).dtype), err_msg=name)
    if dtype == "bfloat16" and changes:
        assert NORM in job.precision.reason


def test_a_folder_in_another_dtype(tmp_path):
    tensors = weights_of("llama_tiny")
    source = open_checkpoint(str(write_folder(tmp_path / "source", tensors, shards=2)))
    other = converted(source, Precision("bfloat16", ""))
    other.copy_sidecars(tmp_path / "copy", byte_tokenizer())
    content = {name: (tmp_path / "copy" / name).read_text() for name in ("config.json", "model.safetensors.index.json")}
    assert json.loads(content["config.json"])["dtype"] == other.config["dtype"] == "bfloat16"
    index = json.loads(content["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values()) / 2
    for filename, layout in other.shards().items():
        assert set(layout.tensors) == {name for name, file in index["weight_map"].items() if file == filename}
        assert layout.size == len(layout.header) + sum(tensors[name].nbytes // 2 for name in layout.tensors)
    np.testing.assert_array_equal(other.read(UP), tensors[UP].astype(ml_dtypes.bfloat16))
    assert converted(source, Precision("float32", "")) is source


def test_float16_that_cannot_hold_a_weight_is_refused(tmp_path):
    tensors = weights_of("llama_tiny")
    tensors[UP].flat[3] = -7e4
    config = small_run(tmp_path, write_folder(tmp_path / "source", tensors), dtype="float16")
    with pytest.raises(InputError, match=rf"--dtype float16 holds no number above 65504, which {UP} .* bfloat16$"):
        prepare(config)


# --- Run and model card ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": "a folder/model.gguf", "sparsity": 0.65, "special_tokens": False, "epsilon": "auto"},
        {"groups": "2:4", "allocation": "uniform", "method": "sparsegpt", "dtype": "bfloat16", "limit": 3},
    ],
    ids=str,
)
def test_the_command_on_record_gives_the_settings(settings):
    config = Config(**settings)
    words = shlex.split(command_line(dataclasses.replace(config, fresh=True, push="me/model")))
    assert words[:2] == ["farms", "prune"]
    assert tyro.cli(Config, args=words[2:]) == config


def test_run_json_says_when_by_what_and_how_sure(finished):
    card = card_of(finished.path)
    assert card["command"] == command_line(finished.config)
    assert card["date"][:2] == "20" and card["processor"]["cores"] >= 1 and card["versions"]["farms-jax"]
    losses, against = card["nll_per_block"], card["against"]["dense"]
    assert against == compare(losses["pruned"], losses["dense"])._asdict()
    ratio = card["perplexity"]["pruned"] / card["perplexity"]["dense"]
    assert against["value"] == pytest.approx(ratio - 1)
    assert against["low"] <= against["value"] <= against["high"]


def test_the_model_card_has_what_the_hub_reads(finished):
    path, card = finished.path / "model" / "README.md", card_of(finished.path)
    found = metadata_load(path)
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
    assert {"wanda", "farms", "pruning"} <= set(found["tags"])
    text = path.read_text()
    assert f"| farms | 0.5000 | {card['perplexity']['pruned']:.4f} |" in text
    assert "3 blocks of 40 tokens" in text
    assert "--calibration calibration.npy" in text and str(finished.config.out.parent) not in text


@pytest.mark.parametrize(
    ("model", "base"),
    [(None, None), ("OWNER/NAME", "OWNER/NAME"), ("OWNER/NAME@main", "OWNER/NAME"), ("no/such/folder", None)],
)
def test_the_base_model_is_a_name_of_the_hub(model, base, tmp_path):
    assert _base_model(model) == base
    (folder := tmp_path / "hub" / "models--OWNER--NAME" / "snapshots" / "0a1b").mkdir(parents=True)
    assert _base_model(str(folder)) == "OWNER/NAME"
    assert _base_model(str(tmp_path)) is None


def test_generation_stops_at_the_tokens_of_the_file(tmp_path):
    tokenizer = byte_level_metadata("gpt-2", **{"eot_token_id": 7})
    path = write_gguf(
        tmp_path / "model.gguf", weights_of("llama_tiny"), gguf_metadata(config_of("llama_tiny")) | tokenizer
    )
    open_checkpoint(str(path)).copy_sidecars(tmp_path / "of gguf", byte_tokenizer())
    end = tokenizer["tokenizer.ggml.eos_token_id"]
    assert GenerationConfig.from_pretrained(tmp_path / "of gguf").eos_token_id == [end, 7]
    source = write_folder(tmp_path / "source", weights_of("llama_tiny"))
    (source / "config.json").write_text(json.dumps(config_of("llama_tiny", bos_token_id=4, eos_token_id=[5, 6])))
    open_checkpoint(str(source)).copy_sidecars(tmp_path / "of a folder", byte_tokenizer())
    made = GenerationConfig.from_pretrained(tmp_path / "of a folder")
    assert (made.bos_token_id, made.eos_token_id) == (4, [5, 6])


def test_one_alpha_far_beyond_leaves_the_others_readable():
    alphas = [*np.linspace(2, 4, 20), 48.0, 0.0]
    rows = [LayerRow(str(i // 4), str(i), 9, a, a, a + 0.1, 0.5, None, 0.5, None) for i, a in enumerate(alphas)]
    (axis,) = sparsity_plots._alphas(rows, "").axes
    assert 4 < axis.get_ylim()[1] < 5
    assert [text.get_text() for text in axis.texts] == ["48", "48.1"]
    (axis,) = sparsity_plots._alphas(rows[:20], "").axes
    assert not axis.texts


def test_asked_and_reached_are_drawn_where_they_differ():
    rows = [LayerRow(str(i), str(i), 9, None, None, None, 0.5, None, 0.5 + (i == 2) / 10, None) for i in range(4)]
    (axis,) = sparsity_plots._sparsity(rows, "").axes
    asked = next(line for line in axis.lines if line.get_label() == "asked")
    assert asked.get_xydata().tolist() == [[2, 0.5]]
    (axis,) = sparsity_plots._sparsity(rows[:2], "").axes
    assert [line.get_label() for line in axis.lines] == ["reached", "all blocks"]


# --- Upload ----------------------------------------------------------------------------------------------------------

ME = {
    "name": "me",
    "orgs": [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}],
    "auth": {"accessToken": {"role": "write"}},
}


class Hub:
    """Stands for the API of the hub; `fails` names a call that raises an error."""

    def __init__(self, person=ME, **fails):
        self.person, self.fails, self.calls = person, fails, []

    def __call__(self):
        return self

    def _called(self, call, result, **keywords):
        self.calls.append((call, keywords))
        if call in self.fails:
            raise self.fails[call]
        return result

    def whoami(self):
        return self._called("whoami", self.person)

    def create_repo(self, name, **keywords):
        return self._called("create_repo", f"https://hub/{name}", name=name, **keywords)

    def upload_folder(self, **keywords):
        return self._called("upload_folder", None, **keywords)


def refused(status):
    response = types.SimpleNamespace(headers={}, status_code=status, request=None)
    return errors.HfHubHTTPError(f"{status}: no", response=response)


@pytest.mark.parametrize(
    ("hub", "name", "message"),
    [
        (Hub(whoami=errors.LocalTokenNotFoundError("no token")), "me/x", "nobody is logged in: `hf auth login`, or"),
        (Hub(whoami=errors.OfflineModeIsEnabled("offline")), "me/x", "HF_HUB_OFFLINE is set: unset it"),
        (Hub(whoami=ConnectionError("[Errno -2] no\nname")), "me/x", r"the hub cannot be reached \(.*Errno -2"),
        (Hub(whoami=refused(401)), "me/x", "the token is not valid: `hf auth login`"),
        (Hub(whoami=refused(500)), "me/x", r"refused by the hub \(500: no"),
        (Hub(ME | {"auth": {"accessToken": {"role": "read"}}}), "me/x", "the token may only read; `hf auth login`"),
        (Hub(), "readers/x", "me may not write there; OWNER may be me, team$"),
    ],
    ids=["no login", "offline", "unreachable", "invalid token", "500", "read token", "other owner"],
)
def test_who_may_not_push_is_told_before_any_work(hub, name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(prune.job, "open_checkpoint", None)
    with pytest.raises(InputError, match=rf"^--push {name}: {message}") as told:
        prepare(small_run(tmp_path, push=name))
    assert "\n" not in str(told.value)


def test_who_may_push(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub())
    check_push("team/x")
    check_push("Me/x")
    with pytest.raises(InputError, match=r"^--push must be OWNER/NAME of the hub, got 'x'$"):
        Config(push="x").check()


def test_a_finished_run_is_pushed_without_pruning_again(finished_copy, monkeypatch, capsys):
    monkeypatch.setattr(prune.pruning, "run_blocks", None)
    readme = finished_copy.path / "model" / "README.md"
    readme.write_text("edited")
    before = bytes_of(finished_copy.path / "model")
    hub = Hub(upload_folder=refused(403))
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    job = prepare(dataclasses.replace(finished_copy.config, push="me/small"))
    folder = job.path / "model"
    with pytest.raises(InputError, match=rf"no right to write there; the model is in {folder}; the same command push"):
        run(job)
    assert "perplexity on" in capsys.readouterr().out  # not lost with the upload
    hub.fails.clear()
    assert run(job) == "pushed: https://hub/me/small"
    (_, made), (_, sent) = hub.calls[-2:]
    assert made == {"name": "me/small", "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/small", folder)
    assert bytes_of(folder) == before
    shutil.rmtree(folder)


def test_a_dry_run_pushes_nothing(finished, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert "size:" in run(prepare(dataclasses.replace(finished.config, push="me/x", dry_run=True)))
