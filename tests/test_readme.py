"""The pages say what is there: metadata, links, files, and the same code in both languages."""

import re

import pytest
from conftest import CODE_FILES, ROOT

PAGES = sorted(path for path in ROOT.glob("**/*.md") if not {"build", ".venv"} & set(path.relative_to(ROOT).parts))
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
    assert card["pipeline_tag"] == "text-generation" and (ROOT / card["license_link"]).is_file()


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
