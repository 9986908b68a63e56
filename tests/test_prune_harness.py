"""Scores of lm-eval's requests and tasks, against the reference's logits and a plain computation in NumPy."""

import functools
import json
import shutil
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import few
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from prune_helpers import DATA, byte_tokenizer, config_of, folder_with_tokenizer, logits_of, weights_of

from farms_jax.errors import InputError
from prune import evaluate, scoring, tasks
from prune.checkpoints import open_checkpoint
from prune.harness import JaxLM
from prune.models import make_network
from prune.perplexity import perplexity
from prune.texts import evaluation_blocks, hub

TASKS = DATA / "tasks"
LETTER = (TASKS / "local_letter.yaml").read_text()
TOLERANCE = 1e-4  # of a log-likelihood, absolute, per token


@pytest.fixture(scope="module")
def reference():
    """Ids (B, T) and log-probabilities (B, T, V) of the public code."""
    arrays = np.load(DATA / "llama_tiny.npz")
    return arrays["llama_tiny/ids"], log_softmax(arrays["llama_tiny/logits"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_with_tokenizer("llama_tiny", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def lm(folder):
    return JaxLM(str(folder))


@pytest.fixture(autouse=True)
def no_internet(monkeypatch, tmp_path):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: False)


def log_softmax(logits):
    below = np.asarray(logits, np.float64) - np.max(logits, -1, keepdims=True)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def encode(text):
    return byte_tokenizer()(text)["input_ids"]


@functools.cache
def log_probabilities(ids):
    """Log-probabilities (T, V) behind ids (T,), by the plain network; it is compiled for one length."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(ids)] = ids
    network = make_network(config_of("llama_tiny"))
    return log_softmax(logits_of(network, weights_of("llama_tiny"), padded)[0, : len(ids)])


def plain(context, continuation):
    """Log-likelihood of a continuation, token by token."""
    logprobs = log_probabilities((*context, *continuation[:-1]))
    return sum(logprobs[len(context) + i - 1, token] for i, token in enumerate(continuation))


def ask(lm, context, continuation):
    return lm.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0)], disable_tqdm=True)[0]


def score_ids(lm, *requests):
    """Answers to pairs of a context and a continuation, in token ids."""
    return lm._loglikelihood_tokens([(None, *request) for request in requests], disable_tqdm=True)


@pytest.mark.parametrize(
    "settings", few([{}, {"batch_tokens": 100}, {"batch_tokens": 1, "stream_tokens": 100}, {"max_length": 39}], 3)
)
def test_scores_are_the_references_whatever_the_batches(reference, folder, settings):
    ids, logprobs = reference
    ends = (2, 9, 30, ids.shape[1])
    cuts = [(row, start, end) for row in range(2) for end in ends for start in sorted({1, end // 2, end - 1})]
    requests = [(ids[row, :start].tolist(), ids[row, start:end].tolist()) for row, start, end in cuts]
    answers = score_ids(JaxLM(str(folder), **settings), *requests)
    for (row, start, end), (score, greedy) in zip(cuts, answers, strict=True):
        steps = logprobs[row, start - 1 : end - 1]
        expected = steps[np.arange(end - start), ids[row, start:end]].sum()
        np.testing.assert_allclose(score, expected, atol=TOLERANCE * (end - start))
        assert greedy == (steps.argmax(-1) == ids[row, start:end]).all()


def test_greedy_is_true_for_what_greedy_decoding_gives(reference, lm):
    context = reference[0][0, :20].tolist()
    decoded = []
    for _ in range(3):
        decoded.append(int(log_probabilities((*context, *decoded))[-1].argmax()))
    wrong = [*decoded[:2], (decoded[2] + 1) % 256]
    answers = score_ids(lm, (context, decoded), (context, wrong))
    assert [greedy for _, greedy in answers] == [True, False]


@pytest.fixture
def shapes(monkeypatch):
    """Collects the shapes that go through the network."""
    seen, embed = [], scoring.apply_embed
    monkeypatch.setattr(scoring, "apply_embed", lambda *args: seen.append(args[-1].shape) or embed(*args))
    return seen


def test_short_inputs_are_not_padded_to_the_length_of_long_ones(lm, shapes):
    score_ids(lm, *(([1] * length, [2]) for length in (36, 5, 40, 16)))
    assert shapes == [(2, 64), (2, 16)]


def test_an_input_that_occurs_twice_goes_through_the_network_once(lm, shapes):
    pairs = [("passage one:", " y"), ("passage one:", " n"), ("passage one", ": y")]
    answers = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    assert shapes == [(1, 16)]
    for pair, answer in zip(pairs, answers, strict=True):
        np.testing.assert_allclose(answer[0], ask(lm, *pair)[0], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("context", "continuation", "as_ids"),
    [
        # Spaces at the end of a context belong to the continuation.
        ("It is  ", "so", (encode("It is"), encode("  so"))),
        ("It is", "  so", (encode("It is"), encode("  so"))),
        # Without context a text follows the first token.
        ("", "so", ([byte_tokenizer().bos_token_id], encode("so"))),
    ],
)
def test_context_and_continuation_are_cut_as_by_lm_eval(context, continuation, as_ids, lm):
    np.testing.assert_allclose(ask(lm, context, continuation)[0], plain(*as_ids), atol=TOLERANCE * 4)


def test_a_first_token_is_put_once_or_not_at_all(folder):
    tokenizer = byte_tokenizer(begin=True)
    given, bare = (JaxLM(str(folder), tokenizer=tokenizer, special_tokens=special) for special in (True, False))
    assert given.tok_encode("so") == [tokenizer.bos_token_id, *encode("so")]
    assert bare.tok_encode("so") == encode("so")
    begun = tokenizer.decode([tokenizer.bos_token_id]) + "so"
    assert given.tok_encode(begun) == tokenizer(begun, add_special_tokens=False)["input_ids"]
    expected = plain([255, *encode("so")], encode(" it"))
    np.testing.assert_allclose(ask(given, "so", " it")[0], expected, atol=1e-3)


def test_input_that_is_too_long_loses_its_start(folder, caplog):
    context, continuation = encode("a long context of many letters"), encode(" end")
    [(found, _)] = score_ids(JaxLM(str(folder), max_length=10), (context, continuation))
    np.testing.assert_allclose(found, plain(context[-7:], continuation), atol=TOLERANCE * 4)
    assert "1 of 1 inputs are longer than 10 tokens" in caplog.text


def test_whole_texts_are_scored_token_by_token_once(folder):
    texts = ["A text longer than the window of ten tokens.", "short", ""]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    found = JaxLM(str(folder), max_length=10).loglikelihood_rolling(requests, disable_tqdm=True)
    bos, ids = byte_tokenizer().bos_token_id, encode(texts[0])
    expected = plain([bos], ids[:10])
    for start in range(10, len(ids), 10):
        end = min(start + 10, len(ids))  # as many tokens before as fit
        expected += plain(ids[end - 11 : start], ids[start:end])
    np.testing.assert_allclose(found[0], expected, atol=TOLERANCE * len(ids))
    np.testing.assert_allclose(found[1], plain([bos], encode("short")), atol=TOLERANCE * 5)
    assert found[2] == 0


def choices_of(task):
    """Context, choices and answer of each example of a task file, written out."""
    examples = [json.loads(line) for line in (TASKS / f"{task}.jsonl").read_text().splitlines()]
    if task == "local_letter":
        return [(f"{row['passage']}\nIs it so:", ["  n", "  y"], row["label"]) for row in examples]
    prompts = [f"Question: {row['question']}\nAnswer:" for row in examples]
    choices = [[f" {choice}" for choice in row["choices"]] for row in examples]
    return list(zip(prompts, choices, [row["answer"] for row in examples], strict=True))


def plain_accuracies(task):
    likeliest, normed = [], []
    for context, choices, answer in choices_of(task):
        scores = np.array([plain(encode(context), encode(choice)) for choice in choices])
        letters = np.array([len(choice) - 1 for choice in choices])  # without the space before
        likeliest.append(scores.argmax() == answer)
        normed.append((scores / letters).argmax() == answer)
    return np.mean(likeliest), np.mean(normed)


@pytest.mark.slow
def test_a_local_task_gives_the_plain_likelihoods_and_accuracies(lm, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # data files are found beside the task file
    loaded = tasks.load_tasks(["local_choice", "local_letter"], TASKS)
    scores = {(score.task, score.metric): score for score in tasks.zero_shot(lm, loaded)}
    accuracy, normed = plain_accuracies("local_choice")
    assert scores["local_choice", "acc"].value == accuracy
    assert scores["local_choice", "acc_norm"].value == normed
    assert scores["local_letter", "acc"].value == plain_accuracies("local_letter")[0]
    assert scores["local_choice", "acc"].examples == 8
    np.testing.assert_allclose(scores["local_choice", "acc"].stderr, np.sqrt(accuracy * (1 - accuracy) / 7))
    found = [instance.resps[0][0] for instance in loaded["local_choice"].instances]
    examples = choices_of("local_choice")
    expected = [plain(encode(context), encode(c)) for context, choices, _ in examples for c in choices]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * 30)
    assert [score.examples for score in tasks.zero_shot(lm, {"local_letter": loaded["local_letter"]}, limit=3)] == [3]


def test_the_class_is_registered_with_lm_eval():
    assert get_model("farms_jax") is JaxLM


def test_tasks_that_cannot_be_loaded_say_what_to_do(tmp_path):
    (tmp_path / "hub.yaml").write_text(LETTER.replace("json\n", "owner/of_the_hub\n"))
    shutil.copy(TASKS / "local_choice.yaml", tmp_path)  # without its data
    for name in ("local_letter", "local_choice"):
        with pytest.raises(InputError, match=rf"--tasks {name}: cannot be loaded \(.*\); .* --tasks-dir FOLDER"):
            tasks.load_tasks([name], tmp_path)


@pytest.mark.parametrize("name", tasks.PAPER_TASKS)
def test_the_papers_tasks_without_internet_say_what_to_do(name, monkeypatch):
    made, manager = [], tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda **settings: made.append(settings) or manager(**settings))
    with pytest.raises(InputError, match=rf"--tasks {name}: cannot be loaded \(Couldn't reach .* --tasks-dir FOLDER"):
        tasks.load_tasks([name])
    assert [settings["include_defaults"] for settings in made] == [False]  # found without reading all of lm-eval's


def test_a_task_that_nobody_has_is_refused(monkeypatch):
    manager = functools.partial(tasks.TaskManager, include_defaults=False)  # all of lm-eval's take seconds to read
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: manager(include_path=include_path))
    message = r"--tasks no_such_task: lm-eval has no such task; --tasks-dir .*tasks has no valid"
    with pytest.raises(InputError, match=message):
        tasks.load_tasks(["local_choice", "no_such_task"], TASKS)


def test_tasks_that_generate_text_are_refused_before_anything_is_computed(tmp_path, lm):
    written = LETTER.replace("multiple_choice", "generate_until")
    written = written.replace("doc_to_target: label", 'doc_to_target: "{{label}}"').replace("acc\n", "exact_match\n")
    (tmp_path / "task.yaml").write_text(written)
    shutil.copy(TASKS / "local_letter.jsonl", tmp_path)
    with pytest.raises(InputError, match="local_letter: generates text"):
        tasks.load_tasks(["local_letter"], tmp_path)
    with pytest.raises(InputError, match="generates text"):
        lm.generate_until([Instance("generate_until", {}, ("a", {}), 0, ("some_task", 0, 1))])


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([1], [], "has 0 tokens"),
        ([], [1, 2], "nothing but spaces"),
        ([1], [2] * 513, "has 513 tokens, the model takes 1 to 512"),
        ([1, 256], [2], "token 256, outside the model's vocabulary of 256"),
    ],
)
def test_requests_that_cannot_be_scored_are_refused(lm, context, continuation, message):
    with pytest.raises(InputError, match=message):
        lm._loglikelihood_tokens([(("a", "b"), context, continuation)], disable_tqdm=True)


def test_a_model_class_that_cannot_be_made_or_used_is_refused(folder):
    for settings in ({"max_length": 0}, {"max_length": 513}, {"batch_tokens": 0}, {"stream_tokens": 0}):
        with pytest.raises(InputError, match="must be"):
            JaxLM(str(folder), **settings)
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither a BOS nor an EOS token"):
        ask(JaxLM(str(folder), tokenizer=tokenizer), "", "so")


def test_a_network_that_gives_nan_is_refused(folder, monkeypatch):
    checkpoint = open_checkpoint(str(folder))
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda name: read(name) * np.nan if "layers.2" in name else read(name))
    with pytest.raises(InputError, match="log-likelihoods of the tasks are not finite; .* get the checkpoint again"):
        ask(JaxLM(checkpoint), "It is", " so")


def run_program(capsys, *args):
    """Exit status, standard output, standard error of the program."""
    try:
        with mock.patch.object(sys, "argv", ["prune.evaluate", *map(str, args)]):
            evaluate.main()
        status = 0
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_the_program_prints_and_writes_perplexity_and_accuracies(folder, tmp_path, capsys):
    text, found = tmp_path / "text.txt", tmp_path / "new" / "found.json"
    text.write_text("One thing and another thing, and so on. " * 20)
    options = ["--text", text, "--length", 100, "--tasks", "local_choice,local_letter", "--tasks-dir", TASKS]
    status, out, _ = run_program(capsys, folder, *options, "--json", found)
    assert status == 0
    checkpoint = open_checkpoint(str(folder))
    samples = evaluation_blocks(str(text), byte_tokenizer(), length=100, vocab_size=256)
    expected = perplexity(checkpoint.network(), checkpoint, samples.ids).value
    assert f"perplexity of {text}: {expected:.4f}   (8 blocks of 100 tokens)" in out
    accuracies = [plain_accuracies(task)[0] for task in ("local_choice", "local_letter")]
    rows = [line.split() for line in out.splitlines()]
    assert ["mean", "acc", f"{np.mean(accuracies):.4f}"] in rows
    assert not any(row[:2] == ["mean", "acc_norm"] for row in rows)  # only one of the two has it
    written = json.loads(found.read_text())
    assert written["perplexity"]["value"] == pytest.approx(expected)
    assert written["perplexity"]["ids_sha256"] == samples.record["ids_sha256"]
    assert written["weights_sha256"] == checkpoint.sha256()
    assert [score["value"] for score in written["tasks"]["scores"] if score["metric"] == "acc"] == accuracies
    assert written["versions"]["jax"] == jax.__version__ and written["config"]["length"] == 100


def test_token_files_need_no_tokenizer(tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.arange(200).reshape(2, 100))
    status, out, _ = run_program(capsys, DATA / "llama_tiny", "--text", tmp_path / "ids.npy", "--length", 100)
    assert status == 0 and "2 blocks of 100 tokens" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give --text SOURCE, --tasks NAMES, or both"),
        (("--tasks", " , "), "--tasks is empty"),
        (("--text", "x.txt", "--limit", "0"), "--limit must be above 0"),
        (("--text", "x.txt", "--length", "1"), "--length must be above 1"),
        (("--text", "x.txt", "--length", "513"), "positions for 512 tokens"),
        (("--text", "x.txt"), "--text x.txt: no such file"),
        (("--text", "x.txt", "--json", "."), "--json .: is a folder"),
        (("--text", "x.txt", "--tokenizer", "no folder"), "--tokenizer no folder"),
        (("--tasks", "local_choice", "--tasks-dir", "nowhere"), "--tasks-dir nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run_program(capsys, folder, *args)
    assert (status, out) == (2, "")
    assert err.startswith("prune.evaluate: ") and err.count("\n") == 1 and message in err


def test_a_missing_lm_eval_is_one_line(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "prune.tasks")
    monkeypatch.delattr("prune.tasks")
    status, _, err = run_program(capsys, folder, "--tasks", "local_choice", "--tasks-dir", TASKS)
    assert status == 2 and err == 'prune.evaluate: --tasks needs lm_eval; pip install "farms-jax[lm-eval]"\n'
