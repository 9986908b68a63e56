"""What README and documentation show is what happens: every block of code runs, every command is understood."""

import contextlib
import io
import re
import shlex
import sys

import pytest
from docs_helpers import PAGES, ROOT, assert_shown, blocks, check, commands, inline_commands, notebook_cells

from farms_jax.diagnosis.columns import COLUMNS

INLINE = sorted({command for page in PAGES for command in inline_commands(page)})


# Tutorials train, prune and draw.
TUTORIALS = [pytest.param(page, marks=pytest.mark.slow) for page in PAGES if "tutorials" in page.parts]


@pytest.mark.parametrize(
    "page",
    [*(page for page in PAGES if "tutorials" not in page.parts), *TUTORIALS],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_page(page, tmp_path, monkeypatch):
    """Run a page's blocks in their order, in a folder of its own; a `text` block right after one is what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names, printed = {"__name__": "page"}, ""
    for block in blocks(page):
        if block.language == "bibtex":
            continue
        if block.language == "text":
            if block.follows:
                assert_shown(block.text, printed)
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            if block.language == "python":
                exec(compile(block.text, f"<code of {page.name}>", "exec"), names)
            else:
                assert block.language == "bash", f"{page}: {block.language!r} is not checked by any test"
                for command in commands(block.text, tmp_path / "shell"):
                    check(command, monkeypatch)
                    if command[0] == "farms" and page.name != "README.md":
                        farms(command[1:], monkeypatch)
        printed = output.getvalue()


def test_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, shown in notebook_cells(ROOT / "docs/diagnose.ipynb"):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, "<cell>", "exec"), names)
        assert_shown(shown, output.getvalue())
    assert (tmp_path / "report.html").stat().st_size > 10_000


def farms(arguments, monkeypatch):
    from farms_jax.__main__ import main

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["farms", *arguments])
        main()


@pytest.mark.parametrize("command", [text for text in INLINE if "benchmarks." not in text])
def test_inline_command(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(shlex.split(command), monkeypatch)


def test_every_column_of_a_diagnosis_is_in_the_reference():
    text = (ROOT / "docs/api/diagnosis.md").read_text()
    rows = [f"| `{c.name}` | {c.meaning} | {c.head} | {c.group} | {c.weightwatcher} |" for c in COLUMNS]
    assert "\n".join(rows) in text


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"`([a-z_]+/[\w/.]*)`", text) + re.findall(r"\]\(([\w/.-]+)\)", text)
    assert len(named) > 5
    assert [
        name for name in named if not ((ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists())
    ] == []


def test_what_is_shown_is_compared():
    assert_shown("alpha 2.127\n...\nlayers: 3", "alpha 2.13\n1.5 seconds\nlayers: 3\n")
    for wrong in ("alpha 2.127", "alpha 2.9\n...\nlayers: 3", "...\nlayers: 4", "layers: 3\n...\nalpha 2.127"):
        with pytest.raises(AssertionError):
            assert_shown(wrong, "alpha 2.13\n1.5 seconds\nlayers: 3\n")


@pytest.mark.parametrize(
    "command",
    [
        "python -m train.cifar --no-such-option 1",
        "python -m train.no_such_program",
        "python -m prune.llama --method magnitud",
        'pip install "farms-jax[no-such-extra]"',
        "pytest tests/test_no_such_file.py",
        "rm -r runs",
    ],
)
def test_a_wrong_command_is_found(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, ImportError)):
        check(shlex.split(command), monkeypatch)


def test_a_program_that_is_not_known_is_found(tmp_path):
    with pytest.raises(Exception, match="non-zero"):
        commands("python -m train.cifar && rm -r runs", tmp_path)
    for_each = 'for tb in none "farms"; do\n  python -m train.cifar \\\n  --tb $tb  # twice\ndone'
    calls = [["python", "-m", "train.cifar", "--tb", name] for name in ("none", "farms")]
    assert commands(for_each, tmp_path) == calls
