"""The pages say what is there: metadata, links, files, the same commands in both languages, and blocks that run.

Of a page's fenced blocks, ```python and ```console run as a reader would run them, in a copy of the repository's folder
where `chatglm2-6b` is the tiny checkpoint. A print() with a comment behind it has to print that comment; a command
behind "$ " has to print the lines below it, where a line "..." stands for any number of others. A python block that
begins without an import goes on from those before it. What needs a network, a server or real weights is a ```sh block,
or says "localhost".
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CODE_FILES, ROOT, TINY, import_file

FOLDERS = (".", "benchmarks", "docs", "evaluation", "examples/tiny", "examples/tiny3", "export", "finetune", "tests")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
NEED_TOOLS = ("evaluation/README.md", "finetune/README.md")  # pages whose blocks need what `make tools` installs
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
BOTH = pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])


def code_blocks(text):
    """The fenced blocks, without comments, which are in the reader's language."""
    return [re.sub(r" *# .*", "", block) for block in re.findall(r"```.*?```", text, flags=re.S)]


def commands(text):
    """What is quoted in a line and is more than a name: commands and calls."""
    return {
        code
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.S))
        if " " in code
    }


@BOTH
def test_model_card_metadata(text):
    """The head of both pages is what the hub reads of a model: licence, languages, library, task."""
    yaml = pytest.importorskip("yaml")
    card = yaml.safe_load(text.split("---\n")[1])
    assert card["language"] == ["zh", "en"] and card["library_name"] == "transformers"
    assert card["pipeline_tag"] == "text-generation" and card["license"] == "apache-2.0"


@BOTH
def test_readme_length(text):
    assert text.count("\n") <= 150


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_are_valid(page):
    """Every relative link of a page is a file, and every anchor a heading of the page that it leads to."""

    def headings(path):
        titles = re.findall(r"\n#+ (.*)", path.read_text(encoding="utf-8"))
        return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}

    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    ):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), target
            assert not anchor or anchor in headings(path), target


@BOTH
def test_every_file_of_the_package_is_listed(text):
    listed = text.rpartition("\n## ")[2]
    assert [path.name for path in CODE_FILES if f"`{path.name}`" not in listed] == []


def test_both_languages_paste_the_same_code():
    assert code_blocks(ENGLISH) == code_blocks(CHINESE)
    assert commands(ENGLISH) == commands(CHINESE)


def test_tables_match_the_results():
    """`python benchmarks tables` would change none of the pages."""
    for page, text in import_file(ROOT / "benchmarks" / "tables.py").pages().items():
        assert page.read_text(encoding="utf-8") == text


@BOTH
def test_claims_match_the_results(text):
    """Each figure of the first screen's claims is the newest run's."""
    claims = "".join(re.findall(r"\n- .*", text.partition("\n## ")[0]))
    assert [
        figure for figure in import_file(ROOT / "benchmarks" / "tables.py").headline() if figure not in claims
    ] == []


# Blocks that run


def blocks(page):
    """[(language, text)] of a page's blocks that can run, in order."""
    found = re.findall(r"```(python|console)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    return [block for block in found if "localhost" not in block[1]]


def sessions(text):
    """[(command, expected lines)] of a console block."""
    found = re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", text, flags=re.M)
    return [(command, expected.splitlines()) for command, expected in found]


def matches(lines, expected):
    """Whether a command printed these lines, of which "..." are any."""
    pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(line) + r"\n" for line in expected)
    return re.fullmatch(pattern, "".join(line + "\n" for line in lines)) is not None


def run(command, folder):
    """What it printed, by lines."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=300,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout.splitlines()


@pytest.fixture
def checkout(tmp_path):
    """The repository's folder, and beside its files `chatglm2-6b`, in which the tiny checkpoint stands for it."""
    for path in ROOT.iterdir():
        if path.name not in ("output", "build") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(TINY, tmp_path / "chatglm2-6b")
    return tmp_path


def runnable():
    """A parameter for each page that has blocks to run; the Chinese README's are those of the English one."""
    for page, name in zip(PAGES, NAMES):
        if name != "README_zh.md" and blocks(page):
            yield pytest.param(page, id=name, marks=[pytest.mark.tools] if name in NEED_TOOLS else [])


@pytest.mark.needs_transformers("5.0", "all that the pages print")
@pytest.mark.parametrize("page", list(runnable()))
def test_code_blocks_print_their_output(page, checkout):
    script = ""
    for language, text in blocks(page):
        if language == "console":
            for command, expected in sessions(text):
                lines = run(["bash", "-c", command], checkout)
                assert matches(lines, expected), f"$ {command}\n" + "\n".join(lines)
        else:
            script = text if re.match(r"(import|from) ", text) else script + text
            expected = re.findall(r"print\(.*\) *# (.*)", text)
            printed = run([sys.executable, "-c", script], checkout)
            if expected:
                assert printed[-len(expected) :] == expected, text


def test_wrong_output_of_a_code_block_is_detected(checkout):
    """The test above can fail: on another output, on lines left out, and on an error."""
    page = checkout / "page.md"
    page.write_text(
        "```console\n$ echo a; echo b\na\n```\n```python\nimport os\nprint(1)  # 2\n```\n", encoding="utf-8"
    )
    (_, console), (_, python) = blocks(page)
    assert sessions(console) == [("echo a; echo b", ["a"])]
    assert not matches(["a", "b"], ["a"]) and matches(["a", "b"], ["a", "..."]) and not matches(["b"], ["a", "..."])
    with pytest.raises(AssertionError, match="echo a; echo b"):
        test_code_blocks_print_their_output(page, checkout)
    with pytest.raises(AssertionError, match="No such file"):
        run(["bash", "-c", "cat nothing-there"], checkout)
