"""Samples: where they are cut, what is written down about them, and what is refused."""

import hashlib
import json
import sys
import types
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from prune_helpers import byte_tokenizer
from pyarrow import parquet

from farms_jax.errors import InputError
from prune.texts import calibration_samples, evaluation_blocks, hub, tokenizer_fingerprint

TEXT = "\r\n".join(f"Line {number} is its own and nobody else's: {number**3}." for number in range(40)) + "\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(TEXT.encode())
    return path


def encode(text, **keywords):
    return np.array(byte_tokenizer(**keywords)(text)["input_ids"])


def calibrate(source, count=5, length=16, seed=0, **keywords):
    return calibration_samples(str(source), byte_tokenizer(), count=count, length=length, seed=seed, **keywords)


def blocks(source, length=16, **keywords):
    return evaluation_blocks(str(source), byte_tokenizer(), length=length, **keywords)


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts))
    return path


def write_parquet(path, texts, column="text"):
    parquet.write_table(pa.table({column: texts, "number": list(range(len(texts)))}), path)
    return path


def test_calibration_windows_lie_where_the_record_says(text):
    samples = calibrate(text, count=50)
    whole = encode(TEXT)
    assert samples.ids.shape == (50, 16) and samples.ids.dtype == np.int32
    for row, start in zip(samples.ids, samples.record["positions"], strict=True):
        np.testing.assert_array_equal(row, whole[start : start + 16])
    assert len(set(samples.record["positions"])) > 40  # spread, not all at one place
    assert samples.record["tokens"] == len(whole)


def test_the_same_arguments_give_the_same_samples_and_another_seed_others(text):
    first, second, other = calibrate(text), calibrate(text), calibrate(text, seed=1)
    np.testing.assert_array_equal(first.ids, second.ids)
    assert first.record == second.record
    assert first.record["ids_sha256"] != other.record["ids_sha256"]


def test_every_position_can_be_drawn_and_none_beyond_the_end(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abcdef")
    assert set(calibrate(path, count=200, length=4).record["positions"]) == {0, 1, 2}
    assert calibrate(path, count=3, length=6).record["positions"] == [0, 0, 0]


def test_the_record_holds_all_that_samples_depend_on(text):
    record = calibrate(text, seed=7).record
    ids = calibrate(text, seed=7).ids
    assert record["source"] == str(text) and record["kind"] == "text"
    assert (record["count"], record["length"], record["seed"], record["special_tokens"]) == (5, 16, 7, True)
    assert record["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert record["ids_sha256"] == hashlib.sha256(b"".join(int(i).to_bytes(4, "little") for i in ids.flat)).hexdigest()
    assert (
        record["tokenizer_sha256"] == hashlib.sha256(byte_tokenizer().backend_tokenizer.to_str().encode()).hexdigest()
    )
    assert json.loads(json.dumps(record)) == record


def test_fingerprints_tell_tokenizers_apart():
    assert tokenizer_fingerprint(byte_tokenizer()) != tokenizer_fingerprint(byte_tokenizer(begin=True))
    assert tokenizer_fingerprint(None) is None


def test_evaluation_blocks_are_the_whole_text_in_order_less_its_rest(text):
    samples, whole = blocks(text, 100), encode(TEXT)
    assert len(whole) % 100  # there is a rest
    np.testing.assert_array_equal(samples.ids.reshape(-1), whole[: len(whole) // 100 * 100])
    assert samples.record["positions"] == list(range(0, len(samples.ids) * 100, 100))
    assert samples.record["count"] == len(samples.ids) == len(whole) // 100
    np.testing.assert_array_equal(blocks(text, 100, limit=2).ids, samples.ids[:2])
    np.testing.assert_array_equal(blocks(text, 100, limit=10**6).ids, samples.ids)


def test_special_tokens_stand_once_before_the_whole_text_or_not_at_all(text):
    tokenizer = byte_tokenizer(begin=True)
    with_bos = evaluation_blocks(str(text), tokenizer, length=16)
    without = evaluation_blocks(str(text), tokenizer, length=16, special_tokens=False)
    np.testing.assert_array_equal(with_bos.ids.reshape(-1)[1:100], without.ids.reshape(-1)[:99])
    assert with_bos.ids[0, 0] == tokenizer.bos_token_id and (with_bos.ids == tokenizer.bos_token_id).sum() == 1
    assert (with_bos.record["special_tokens"], without.record["special_tokens"]) == (True, False)


@pytest.mark.parametrize(("name", "write"), [("d.jsonl", write_lines), ("d.parquet", write_parquet)])
def test_calibration_windows_lie_inside_documents_that_are_long_enough(tmp_path, name, write):
    documents = ["short", TEXT[:80], "", TEXT[100:117], "as long as asked", TEXT[300:500]]
    samples = calibrate(write(tmp_path / name, documents), count=3)
    used = [document for document, _ in samples.record["positions"]]
    assert sorted(used) == [1, 3, 5]  # each once before any twice
    for row, (document, start) in zip(samples.ids, samples.record["positions"], strict=True):
        np.testing.assert_array_equal(row, encode(documents[document])[start : start + 16])
    again = calibrate(tmp_path / name, count=9)
    assert [document for document, _ in again.record["positions"]] == used * 3
    assert samples.record["kind"] == "documents"


def test_documents_that_are_all_short_are_put_into_one_text(tmp_path, caplog):
    documents = ["one", "two and", "three"] * 4
    samples = calibrate(write_lines(tmp_path / "d.jsonl", documents))
    whole = encode("\n\n".join(documents))
    for row, start in zip(samples.ids, samples.record["positions"], strict=True):
        np.testing.assert_array_equal(row, whole[start : start + 16])
    assert "no document is longer than 16 tokens" in caplog.text


def test_documents_are_joined_to_be_evaluated(tmp_path):
    documents = ["first é", "second", "third \u2028 line"]
    expected = encode("\n\n".join(documents))
    for path in (write_lines(tmp_path / "d.jsonl", documents), write_parquet(tmp_path / "d.parquet", documents)):
        np.testing.assert_array_equal(blocks(path, len(expected)).ids[0], expected)


def test_token_files_of_the_asked_length_are_taken_as_they_are(tmp_path):
    ids = np.random.default_rng(3).integers(0, 256, (6, 16), np.int64)
    np.save(tmp_path / "t.npy", ids)
    np.savez(tmp_path / "t.npz", ids=ids.astype(np.uint16))
    for name in ("t.npy", "t.npz"):
        samples = calibrate(tmp_path / name, count=4)
        np.testing.assert_array_equal(samples.ids, ids[:4])
        assert samples.record["positions"] == [0, 1, 2, 3] and samples.record["kind"] == "tokens"
        np.testing.assert_array_equal(blocks(tmp_path / name).ids, ids)
    assert calibration_samples(str(tmp_path / "t.npy"), None, count=1, length=16, seed=0).ids.shape == (1, 16)


def test_other_token_files_are_one_text(tmp_path):
    ids = np.arange(96).reshape(8, 12)
    np.save(tmp_path / "t.npy", ids)
    np.testing.assert_array_equal(blocks(tmp_path / "t.npy", 40).ids, np.arange(80).reshape(2, 40))
    samples = calibrate(tmp_path / "t.npy")
    for row, start in zip(samples.ids, samples.record["positions"], strict=True):
        np.testing.assert_array_equal(row, np.arange(start, start + 16))
    np.save(tmp_path / "flat.npy", np.arange(96))
    np.testing.assert_array_equal(blocks(tmp_path / "flat.npy", 96).ids, [np.arange(96)])


@pytest.fixture
def papers(monkeypatch):
    """Stands in for `datasets`: the papers' data sets, of a few lines."""
    splits = {
        ("Salesforce/wikitext", "train"): ["", " = Title = \n", "alpha beta gamma\n"],
        ("Salesforce/wikitext", "test"): ["", "delta epsilon\n", "zeta"],
        ("allenai/c4", "train"): ["tiny", "a document that is long enough for a window"],
        ("allenai/c4", "validation"): [f"document {number}" for number in range(2000)],
    }

    def load_dataset(path, name=None, *, split, data_files=None):
        assert (name == "wikitext-2-raw-v1") == (data_files is None)
        return {"text": splits[path, split]}

    module = types.SimpleNamespace(load_dataset=load_dataset, config=types.SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: True)
    return splits


def test_wikitext_is_joined_by_spaces_to_calibrate_and_by_blank_lines_to_evaluate(papers):
    train = " ".join(papers["Salesforce/wikitext", "train"])
    samples = calibrate("wikitext2", count=1, length=len(encode(train)))
    np.testing.assert_array_equal(samples.ids[0], encode(train))
    assert samples.record["text_sha256"] == hashlib.sha256(train.encode()).hexdigest()
    test = "\n\n".join(papers["Salesforce/wikitext", "test"])
    np.testing.assert_array_equal(blocks("wikitext2", len(encode(test))).ids[0], encode(test))


def test_c4_is_documents_to_calibrate_and_the_first_1100_joined_to_evaluate(papers):
    samples = calibrate("c4", count=4)
    assert [document for document, _ in samples.record["positions"]] == [1] * 4
    joined = " ".join(papers["allenai/c4", "validation"][:1100])
    samples = blocks("c4", 16)
    assert samples.ids.shape == (256, 16)  # the reference stops there
    np.testing.assert_array_equal(samples.ids.reshape(-1), encode(joined)[: 256 * 16])
    assert samples.record["tokens"] == len(encode(joined))


@pytest.mark.parametrize(("flag", "cut"), [("--calibration", calibrate), ("--text", blocks)])
@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_without_internet_the_error_names_the_flag_and_the_remedy(monkeypatch, flag, cut, name):
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_reachable", lambda endpoint: False)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", "/nowhere")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=rf"{flag} {name}: cannot be had from the hub .*; give {flag} a file instead"):
        cut(name)
    assert not config.HF_HUB_OFFLINE and not constants.HF_HUB_OFFLINE  # as it was before


def test_an_endpoint_that_does_not_answer_is_found_out():
    assert hub._reachable("http://127.0.0.1:9") is False
    assert hub._reachable("no address") is False


def test_the_package_datasets_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs datasets; pip install"):
        calibrate("wikitext2")


def refused(tmp_path, content, name="bad.txt", length=16):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        blocks(path, length)
    return str(error.value)


def test_a_text_shorter_than_one_block_says_how_long_it_is(tmp_path):
    message = refused(tmp_path, b"twelve bytes", length=13)
    assert "has 12 tokens" in message and "--length 12" in message and "--text" in message
    with pytest.raises(InputError, match=r"--calibration .* has 12 tokens.*--length 12"):
        calibrate(tmp_path / "bad.txt", length=13)


def test_files_that_are_no_text_are_refused(tmp_path):
    assert "holds no text" in refused(tmp_path, b"")
    assert "holds no text" in refused(tmp_path, b" \n\n ")
    assert "not UTF-8 text (byte 0xe9 at 3)" in refused(tmp_path, "café".encode("latin-1") * 10)
    assert "is a folder" in str(pytest.raises(InputError, blocks, tmp_path).value)
    assert "no such file" in str(pytest.raises(InputError, blocks, tmp_path / "nothing.txt").value)
    assert "wikitext2, c4" in str(pytest.raises(InputError, calibrate, "wikitext").value)


@pytest.mark.parametrize("line", [b'{"text": "cut o', b'{"body": "x"}', b'{"text": 3}', b'["text"]', b"NaN"])
def test_a_broken_line_is_named(tmp_path, line):
    message = refused(tmp_path, b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n', "bad.jsonl")
    assert "bad.jsonl: line 3 is not" in message


def test_broken_parquet_files_are_refused(tmp_path):
    assert "not a readable parquet file" in refused(tmp_path, b"PAR1 and no more", "bad.parquet")
    write_parquet(tmp_path / "other.parquet", ["a", "b"], column="content")
    with pytest.raises(InputError, match=r'needs a column "text" of strings, has content \(string\), number \(int64\)'):
        blocks(tmp_path / "other.parquet")


def test_broken_token_files_are_refused(tmp_path):
    assert "no token ids (we only support format" in refused(tmp_path, b"\x93NUMPY and no more", "bad.npy")
    assert "no token ids (File is not a zip file)" in refused(tmp_path, b"PK\x03\x04 and no more", "bad.npz")
    np.save(tmp_path / "float.npy", np.ones((2, 16)))
    np.save(tmp_path / "object.npy", np.array([1, "a"], dtype=object))
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2), int))
    np.savez(tmp_path / "other.npz", tokens=np.arange(64))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("ids", "no array")
    for name, message in (
        ("float.npy", r"must be integers .* got float64 \(2, 16\)"),
        ("object.npy", "Object arrays cannot be loaded"),
        ("cube.npy", r"must be integers of shape"),
        ("other.npz", "ids is not a file in the archive"),
        ("text.npz", "no token ids .no array"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(tmp_path / name)


def test_a_token_file_that_claims_more_than_it_holds(tmp_path):
    """A header of 8 TiB: refused before memory is taken."""
    np.save(tmp_path / "t.npy", np.zeros((1, 64), np.int64))
    content = (tmp_path / "t.npy").read_bytes().replace(b"(1, 64), }            ", b"(1000000000000, 1), } ")
    assert b"(1000000000000, 1)" in content
    assert "no token ids (" in refused(tmp_path, content, "t.npy")


def test_half_a_pair_of_utf16_is_refused(tmp_path):
    assert "line 2 has half of a pair of UTF-16" in refused(
        tmp_path, b'{"text": "a"}\n{"text": "\\ud800"}\n', "t.jsonl"
    )
    write_lines(tmp_path / "whole.jsonl", ["\U0001f642" * 20])
    assert blocks(tmp_path / "whole.jsonl").ids.size


def test_parquet_that_is_not_utf8_is_refused(tmp_path):
    table = pa.table({"text": pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match="not a readable parquet file .*utf-8"):
        blocks(tmp_path / "t.parquet")


def test_a_text_that_the_tokenizer_cannot_take_is_refused(text):
    class Strict:
        def __call__(self, text, **_):
            raise Exception("unknown token,\nand no id for it")

    with pytest.raises(
        InputError, match=r"the tokenizer cannot take this text \(unknown token, and no id .*--tokenizer"
    ):
        evaluation_blocks(str(text), Strict(), length=16)


def test_ids_outside_the_vocabulary_are_refused(tmp_path, text):
    for wrong in (-1, 256, 2**40):
        ids = np.zeros((2, 16), np.int64)
        ids[1, 3] = wrong
        np.save(tmp_path / "t.npy", ids)
        with pytest.raises(InputError, match=rf"token id {wrong} is outside the model's vocabulary"):
            blocks(tmp_path / "t.npy", vocab_size=256 if wrong == 256 else None)
    with pytest.raises(InputError, match=r"outside the model's vocabulary \(0 to 49\)"):
        calibrate(text, vocab_size=50)


def test_too_few_sequences_in_a_token_file_are_refused(tmp_path):
    np.save(tmp_path / "t.npy", np.zeros((3, 16), int))
    with pytest.raises(InputError, match="has 3 sequences, 4 are asked for"):
        calibrate(tmp_path / "t.npy", count=4)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"length": 0}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(text, wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        calibrate(text, **wrong)


def test_text_without_a_tokenizer_is_refused(text):
    with pytest.raises(InputError, match="text needs a tokenizer"):
        evaluation_blocks(str(text), None, length=16)
