"""The pages say what is there: metadata, links, files, and the same code in both languages."""

import os
import re
import subprocess
import sys

import pytest
from conftest import CODE_FILES, ROOT, import_file

FOLDERS = (".", "benchmarks", "docs", "evaluation", "examples/tiny", "export", "finetune", "tests")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))


def code_blocks(text):
    """The fenced blocks, without comments, which are in the reader's language."""
    return [re.sub(r" *#.*", "", block) for block in re.findall(r"```.*?```", text, flags=re.S)]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_model_card_metadata(text):
    """The head of both pages is what the hub reads of a model: licence, languages, library, task."""
    yaml = pytest.importorskip("yaml")
    card = yaml.safe_load(text.split("---\n")[1])
    assert card["language"] == ["zh", "en"] and card["library_name"] == "transformers"
    assert card["pipeline_tag"] == "text-generation" and card["license"] == "apache-2.0"


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_somewhere(page):
    """Every relative link of a page is a file, and every anchor of its own a heading."""
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in re.findall(r"\n#+ (.*)", text)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_every_file_of_the_package_is_listed(text):
    assert [path.name for path in CODE_FILES if f"| `{path.name}`" not in text and f"`{path.name}` |" not in text] == []


def test_both_languages_paste_the_same_code():
    assert code_blocks(ENGLISH) == code_blocks(CHINESE)


def test_tables_are_those_of_the_results():
    """`python benchmarks tables` would change none of the pages."""
    tables = import_file(ROOT / "benchmarks" / "tables.py")
    for page, text in tables.pages().items():
        assert page.read_text(encoding="utf-8") == text


def pasted(text):
    """The python blocks that print what a comment behind says, but for those that need a server."""
    blocks = re.findall(r"```python\n(.*?)```", text.split("## The tools around it")[1].split("\n## ")[0], flags=re.S)
    return [block for block in blocks if re.search(r"print\(.*\)  # ", block) and "localhost" not in block]


@pytest.mark.tools
@pytest.mark.parametrize("block", pasted(ENGLISH))
def test_pasted_block_prints_what_it_says(block, tmp_path):
    """As a reader runs it, from the repository's folder."""
    expected = re.findall(r"print\(.*\)  # (.*)", block)
    done = subprocess.run(
        [sys.executable, "-c", block.replace('"offload"', repr(str(tmp_path)))],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    got = [str(sorted(eval(line))) if line.startswith("{") else line for line in done.stdout.splitlines()]
    assert got == [str(sorted(eval(line))) if line.startswith("{") else line for line in expected], done.stderr[-2000:]
