"""Samples: where they are cut, their records, and the errors."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import sys
import types
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from prune_helpers import byte_tokenizer
from pyarrow import parquet

from farms_jax.errors import InputError
from prune.texts import calibration_samples, evaluation_blocks, hub, sources

TEXT = "\r\n".join(f"Line {number} is its own and nobody else's: {number**3}." for number in range(40)) + "\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(TEXT.encode())
    return path


def encode(text, **keywords):
    return np.array(byte_tokenizer(**keywords)(text)["input_ids"])


def calibrate(source, count=5, length=16, seed=0, tokenizer=None, **keywords):
    settings = {"count": count, "length": length, "seed": seed, "vocab_size": 256} | keywords
    return calibration_samples(str(source), tokenizer or byte_tokenizer(), **settings)


def blocks(source, length=16, tokenizer=None, **keywords):
    return evaluation_blocks(str(source), tokenizer or byte_tokenizer(), length=length, vocab_size=256, **keywords)


def assert_windows(samples, ids):
    """The samples are the windows of these tokens that begin at the recorded positions."""
    for row, start in zip(samples.ids, samples.record["positions"], strict=True):
        np.testing.assert_array_equal(row, ids[start : start + samples.ids.shape[1]])


def write(path, content):
    """Write bytes, documents, or an array, as the file's name says."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in content))
    elif isinstance(content, pa.Table):
        parquet.write_table(content, path)
    elif path.suffix == ".parquet":
        parquet.write_table(pa.table({"text": content, "number": list(range(len(content)))}), path)
    elif path.suffix == ".npy":
        np.save(path, content)
    else:
        np.savez(path, ids=content)
    return path


def test_calibration_windows_are_spread_and_lie_where_the_record_says(text):
    samples = calibrate(text, count=50)
    assert samples.ids.shape == (50, 16) and samples.ids.dtype == np.int32
    assert_windows(samples, encode(TEXT))
    assert len(set(samples.record["positions"])) > 40
    assert samples.record["tokens"] == len(encode(TEXT))
    # The same arguments give the same samples, another seed others.
    again, other = calibrate(text, count=50), calibrate(text, count=50, seed=1)
    np.testing.assert_array_equal(samples.ids, again.ids)
    assert samples.record == again.record
    assert samples.record["ids_sha256"] != other.record["ids_sha256"]


def test_held_out_windows_share_as_few_tokens_as_can_be_with_the_others(text, tmp_path):
    samples, alone = calibrate(text, count=40, held_out=20), calibrate(text, count=20)
    assert_windows(samples, encode(TEXT))
    starts = np.array(samples.record["positions"])
    assert starts[:20].tolist() == alone.record["positions"]
    for number in range(20, 40):
        assert np.abs(starts[number] - starts[:number]).min() >= 16
    assert samples.record == calibrate(text, count=40, held_out=20).record
    short = tmp_path / "short.txt"
    short.write_text("abcdefghijkl")
    first, *others = calibrate(short, count=5, length=6, held_out=4).record["positions"]
    assert first <= 6
    assert np.bincount(np.concatenate([np.arange(start, start + 6) for start in (first, *others)])).max() <= 4


def test_every_position_can_be_drawn_and_none_beyond_the_end(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abcdef")
    assert set(calibrate(path, count=200, length=4).record["positions"]) == {0, 1, 2}
    assert calibrate(path, count=3, length=6).record["positions"] == [0, 0, 0]


def test_the_record_holds_all_that_samples_depend_on(text):
    ids, record = calibrate(text, seed=7)
    assert record["source"] == str(text) and record["kind"] == "text"
    assert (record["count"], record["length"], record["seed"], record["special_tokens"]) == (5, 16, 7, True)
    assert record["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert record["ids_sha256"] == hashlib.sha256(b"".join(int(i).to_bytes(4, "little") for i in ids.flat)).hexdigest()
    definition = byte_tokenizer().backend_tokenizer.to_str()
    assert record["tokenizer_sha256"] == hashlib.sha256(definition.encode()).hexdigest()
    assert json.loads(json.dumps(record)) == record


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
    with_bos = blocks(text, tokenizer=tokenizer)
    without = blocks(text, tokenizer=tokenizer, special_tokens=False)
    np.testing.assert_array_equal(with_bos.ids.reshape(-1)[1:100], without.ids.reshape(-1)[:99])
    assert with_bos.ids[0, 0] == tokenizer.bos_token_id and (with_bos.ids == tokenizer.bos_token_id).sum() == 1
    assert (with_bos.record["special_tokens"], without.record["special_tokens"]) == (True, False)


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_calibration_windows_lie_inside_documents_that_are_long_enough(tmp_path, name):
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
    samples = calibrate(write(tmp_path / "d.jsonl", documents))
    assert_windows(samples, encode("\n\n".join(documents)))
    assert "no document is longer than 16 tokens" in caplog.text


def test_documents_are_joined_to_be_evaluated(tmp_path):
    documents = ["first é", "second \U0001f642", "third \u2028 line"]
    expected = encode("\n\n".join(documents))
    for name in ("d.jsonl", "d.parquet"):
        found = blocks(write(tmp_path / name, documents), len(expected))
        np.testing.assert_array_equal(found.ids[0], expected)


DOCUMENTS = ['first é, with a "quote"', "second \U0001f642\nand a line", "third \u2028 line"]
LINES = "\n".join(json.dumps({"text": text, "url": "x"}, ensure_ascii=False) for text in DOCUMENTS).encode()
TABLE = pa.table({"text": DOCUMENTS, "url": ["x"] * 3})


def csv_of(delimiter):
    quoted = [text.replace('"', '""') for text in DOCUMENTS]
    return "\r\n".join([f"id{delimiter}text", *(f'1{delimiter}"{text}"' for text in quoted)]).encode()


def arrow_of(kind):
    sink = io.BytesIO()
    with kind(sink, TABLE.schema) as file:
        file.write_table(TABLE)
    return sink.getvalue()


def dictionary(kind):
    return pa.table({"text": pa.array(DOCUMENTS, kind).dictionary_encode()})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c4-train.00000-of-01024.json", LINES),
        ("c4-train.00000-of-01024.json.gz", gzip.compress(LINES, mtime=0)),
        ("c4-train.00000-of-01024", LINES),
        ("lines.ndjson.zst", pa.compress(LINES, "zstd", asbytes=True)),
        ("lines.jsonl.xz", lzma.compress(LINES)),
        ("lines.JSONL.bz2", bz2.compress(LINES)),
        ("packed.jsonl", gzip.compress(LINES, mtime=0)),
        *((f"{code}.jsonl", LINES.decode().encode(code)) for code in ("utf-8-sig", "utf-16", "utf-32")),
        ("array.json", json.dumps([{"text": text} for text in DOCUMENTS], indent=1).encode()),
        ("array.txt", json.dumps([{"text": text} for text in DOCUMENTS]).encode()),
        ("strings.json", json.dumps(DOCUMENTS).encode()),
        ("columns.json", json.dumps({"text": DOCUMENTS, "url": ["x"] * 3}).encode()),
        ("table.json", json.dumps({"version": 1, "data": [{"text": text} for text in DOCUMENTS]}, indent=1).encode()),
        ("null.jsonl", LINES + b'\n{"text": null}\n'),
        ("table.csv", csv_of(",")),
        ("table.tsv", csv_of("\t")),
        ("stream.arrow", arrow_of(pa.ipc.new_stream)),
        ("file.arrow", arrow_of(pa.ipc.new_file)),
        ("dictionary.parquet", dictionary(pa.string())),
        ("large.parquet", dictionary(pa.large_string())),
        ("view.parquet", pa.table({"text": pa.array(DOCUMENTS, pa.string_view())})),
        ("without-a-suffix", TABLE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_documents_are_read_from_files_of_every_usual_kind(tmp_path, name, content):
    found = sources.read(str(write(tmp_path / name, content)), "--text")
    assert (found.kind, list(found.texts)) == ("documents", DOCUMENTS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_text_of_any_marked_encoding_is_read(tmp_path, encoding, pack):
    # JSON that is no document is text like any other.
    for text in (TEXT, '{"a": 1}\n{"b": 2}\n', "[1] The first note.\n"):
        found = sources.read(str(write(tmp_path / "words.txt", pack(text.encode(encoding)))), "--text")
        assert (found.kind, found.texts) == ("text", [text])


def test_one_object_is_one_document(tmp_path):
    found = sources.read(str(write(tmp_path / "one.json", b'{"text": "alone",\n "url": "x"}')), "--text")
    assert (found.kind, list(found.texts)) == ("documents", ["alone"])


@pytest.mark.parametrize("name", ["t.npy", "t.npz"])
def test_token_files_of_the_asked_length_are_taken_as_they_are(tmp_path, name):
    ids = np.random.default_rng(3).integers(0, 256, (6, 16), np.uint16)
    path = write(tmp_path / name, ids)
    samples = calibration_samples(str(path), None, count=4, length=16, seed=0, vocab_size=256)
    np.testing.assert_array_equal(samples.ids, ids[:4])
    assert samples.record["positions"] == [0, 1, 2, 3] and samples.record["kind"] == "tokens"
    assert samples.record["tokenizer_sha256"] is None
    np.testing.assert_array_equal(blocks(path).ids, ids)
    with pytest.raises(InputError, match="has 6 sequences, 7 are asked for"):
        calibrate(path, count=7)


@pytest.mark.parametrize("shape", [(8, 12), (96,)])
def test_other_token_files_are_one_text(tmp_path, shape):
    path = write(tmp_path / "t.npy", np.arange(96).reshape(shape))
    np.testing.assert_array_equal(blocks(path, 40).ids, np.arange(80).reshape(2, 40))
    assert_windows(calibrate(path), np.arange(96))


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


@pytest.mark.parametrize(("flag", "cut", "name"), [("--calibration", calibrate, "wikitext2"), ("--text", blocks, "c4")])
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


UNMARKED = ("UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE")
GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n ", "holds no text"),
        ("latin.txt", "café".encode("latin-1") * 10, r"not UTF-8 text \(byte 0xe9 at 3\)"),
        *(
            (f"{kind}.txt", ("Wörter und Wörter\n" * 9).encode(kind), rf"like {kind}.*iconv -f {kind}")
            for kind in UNMARKED
        ),
        ("cyrillic.txt", ("Слова и слова\n" * 9).encode("utf-16-le"), "control characters; it looks like UTF-16LE"),
        ("binary.txt", bytes(range(128)) * 9, "control characters; convert it"),
        ("cut.json.gz", gzip.compress(TEXT.encode(), mtime=0)[:-20], "cannot be unpacked"),
        ("bad.json.zst", b"\x28\xb5\x2f\xfd and no more", "cannot be unpacked"),
        ("text.zip", b"PK\x03\x04 and so on", "it is a zip archive; unpack it"),
        ("data.tar.gz", gzip.compress(b"x" * 257 + b"ustar" + b"x" * 200, mtime=0), "it is a tar archive; unpack it"),
        ("page.txt", b"<!DOCTYPE html>\n<html>", "it is markup"),
        ("c4.json.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (
            "chat.jsonl",
            b'{"messages": [{"role": "user", "content": "x"}]}',
            "line 1 .* but a chat: .*apply_chat_template",
        ),
        ("turns.json", b'[{"role": "user", "content": "x"}]', "document 1 .* but a chat"),
        ("keys.json", b'[{"text": "a"}, {"body": "x", "url": "y"}]', "document 2 .* object with body, url; rename"),
        ("cut.json", b'[{"text": "a"}', "is not JSON"),
        ("number.json", b"3", "but 3; rename"),
        ("table.csv", b"id,body\n1,x\n", 'needs a column "text" in its first line, has id, body'),
        ("short.csv", b"id,text\n1,x\n2\n", "line 3 has 1 fields, the first line 2"),
        ("chat.parquet", pa.table({"messages": [[{"role": "user", "content": "x"}]]}), "has a chat: write it"),
        ("bad.arrow", b"ARROW1 and no more", "not a readable Arrow file"),
        ("short.txt", b"twelve bytes", "has 12 tokens, .*--length 12"),
        ("cut.jsonl", GOOD + b'\n{"text": "cut o\n' + GOOD, "cut.jsonl: line 3 is not"),
        ("key.jsonl", GOOD + b'\n{"body": "x"}\n' + GOOD, "line 3 is not"),
        ("type.jsonl", b'{"text": 3}', "line 1 is not .*rename the key"),
        ("list.jsonl", b'["text"]', "line 1 is not"),
        ("surrogate.jsonl", GOOD + b'{"text": "\\ud800"}\n', "line 2 has half of a pair of UTF-16"),
        ("bad.parquet", b"PAR1 and no more", "not a readable parquet file"),
        ("bad.npy", b"\x93NUMPY and no more", r"no token ids \(we only support format"),
        ("bad.npz", b"PK\x03\x04 and no more", r"no token ids \(File is not a zip file\)"),
        (
            "bytes.parquet",
            pa.array([b"\xff\xfe"], pa.binary()).view(pa.string()),
            "not a readable parquet file .*utf-8",
        ),
        ("float.npy", np.ones((2, 16)), r"must be integers .* got float64 \(2, 16\)"),
        ("object.npy", np.array([1, "a"], dtype=object), "Object arrays cannot be loaded"),
        ("cube.npy", np.ones((2, 2, 2), int), "must be integers of shape"),
    ],
)
def test_files_that_cannot_be_read_are_refused(name, content, message, tmp_path):
    path = write(tmp_path / name, content)
    for flag, cut in (("--text", blocks), ("--calibration", calibrate)):
        with pytest.raises(InputError, match=rf"^{flag} .*{message}"):
            cut(path)


def test_sources_that_are_no_files_are_refused(tmp_path):
    (tmp_path / "state.json").touch()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.jsonl").touch()
    for source, message in (
        (tmp_path, "is a folder; give one file of it, such as .*a.jsonl$"),
        ("nothing.txt", "no such file"),
        ("wikitext", "wikitext2, c4"),
    ):
        with pytest.raises(InputError, match=message):
            blocks(source)


def test_files_without_the_expected_column_or_array_are_refused(tmp_path):
    parquet.write_table(pa.table({"content": ["a", "b"], "number": [0, 1]}), tmp_path / "other.parquet")
    np.savez(tmp_path / "other.npz", tokens=np.arange(64))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("ids", "no array")
    for name, message in (
        ("other.parquet", r'needs a column "text" of strings, has content \(string\), number \(int64\)'),
        ("other.npz", "ids is not a file in the archive"),
        ("text.npz", "no token ids .no array"),
    ):
        with pytest.raises(InputError, match=message):
            blocks(tmp_path / name)


def test_a_token_file_that_claims_more_than_it_holds(tmp_path):
    """A header of 8 TiB: refused before memory is taken."""
    path = write(tmp_path / "t.npy", np.zeros((1, 64), np.int64))
    path.write_bytes(path.read_bytes().replace(b"(1, 64), }            ", b"(1000000000000, 1), } "))
    assert b"(1000000000000, 1)" in path.read_bytes()
    with pytest.raises(InputError, match=r"no token ids \("):
        blocks(path)


def test_a_text_that_the_tokenizer_cannot_take_is_refused(text):
    def fail(text, **_):
        raise Exception("unknown token,\nand no id for it")

    with pytest.raises(InputError, match=r"tokenizer cannot take this text \(unknown token, and no id .*--tokenizer"):
        blocks(text, tokenizer=fail)


def test_ids_outside_the_vocabulary_are_refused(tmp_path, text):
    for wrong in (-1, 256, 2**40):
        ids = np.zeros((2, 16), np.int64)
        ids[1, 3] = wrong
        with pytest.raises(InputError, match=rf"token id {wrong} is outside the model's vocabulary \(0 to 255\)"):
            blocks(write(tmp_path / "t.npy", ids))
    with pytest.raises(InputError, match=r"outside the model's vocabulary \(0 to 49\)"):
        calibrate(text, vocab_size=50)
