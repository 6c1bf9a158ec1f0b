"""Run the tests on every minor release of transformers, and write their table to docs/compatibility.md.

    python tests/matrix.py [--releases 4.44 4.57.6 newest tomorrow] [--core] [--jobs 2] [--again] [--prepare]

The releases are those that pip's index offers: the last patch of each minor from OLDEST on. The whole suite runs where
a feature begins that a test needs, and on the oldest and the newest; on the others the files of CORE do.
`tomorrow` is the newest release without what it announces to remove: see tests/tomorrow.py.

Each release gets an environment under build/matrix/, which is kept. torch, pytest and what they need are not installed
again: they are linked from the environment that runs this script. The rest is what pip resolves for requirements.txt
with that release. Only a run of everything writes the table; it takes about an hour on two cores.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "4.30"
SHARED = ("torch", "numpy", "sentencepiece", "jinja2", "pytest", "hypothesis")
CORE = ("golden", "configuration", "loading", "checkpoint_files", "pretrained", "model", "attention", "prefix")
CORE += (
    "inference_cpu",
    "blocks_cpu",
    "blocks_cuda",
    "blocks_cuda_card",
    "cache",
    "generation",
    "streaming",
    "chat",
    "original_names",
    "tokenizer",
    "tokenizer_surface",
    "training_template",
)
CORE += ("against_glm", "pipelines", "transformers_compat", "family")
CORE += ("quantization", "quantization_model", "quantization_loading", "quantization_stock")
BESIDE = {  # minor -> what pip has to be told, since no package's metadata says it
    # tokenizers 0.14 wants huggingface_hub < 0.18; accelerate 0.32 imports what came with huggingface_hub 0.23
    "4.34": ["accelerate<0.32"],
}
KINDS = ("passed", "failed", "not offered", "skipped")
PAGES = ("docs/compatibility.md", "README.md")  # what write_pages() writes to


def minor(release):
    """ "4.44" of "4.44.2"."""
    return ".".join(release.split(".")[:2])


def find_releases():
    """{minor: its last patch} from OLDEST on, in order. pip leaves out what is yanked or needs another Python."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"Available versions: (.*)", output)[1].split(", ")
    versions = sorted(version for version in map(Version, found) if not version.is_prerelease)
    return {minor(str(version)): str(version) for version in versions if version >= Version(OLDEST)}


def marks():
    """[(minor, feature)] of the tests' marks: needs_transformers("4.34", "chat templates")."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py")))
    found = re.findall(r'mark\.needs_transformers\(\s*"([\d.]+)",\s*"([^"]*)"', text)
    return [(minor(release), what) for release, what in found]


def resolve(names, releases):
    """{name of a row: its release} for minors, releases, "newest" and "tomorrow"."""
    newest = list(releases.values())[-1]
    rows = {}
    for name in names:
        release = newest if name in ("newest", "tomorrow") else releases.get(name, name)
        if minor(release) not in releases:
            sys.exit(f"there is no transformers {name}: from {OLDEST} on, pip's index has {', '.join(releases)}")
        rows["tomorrow" if name == "tomorrow" else release] = release
        if name == "newest":
            print(f"newest: transformers {newest}", flush=True)
    return rows


def link_shared(folder):
    """A folder of links to the SHARED distributions of this environment and to those that they require."""
    folder.mkdir(parents=True, exist_ok=True)
    links = {}
    waiting, seen = list(SHARED), set()
    while waiting:
        distribution = metadata.distribution(waiting.pop())
        for path in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            links.setdefault(path, distribution.locate_file(path))
        for text in distribution.requires or []:
            requirement = Requirement(text)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and requirement.name not in seen:
                seen.add(requirement.name)
                waiting.append(requirement.name)
    # Only what differs is touched: another run may be using the folder
    for link in folder.iterdir():
        if link.name not in links or not link.exists() or os.readlink(link) != str(links[link.name]):
            link.unlink()
    for name, target in links.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)


def make_environment(release, folder):
    """The Python of an environment with `release`, made where it is not there yet or was made for something else."""
    home = folder / release
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = home / "complete"
    torch = f"torch=={metadata.version('torch')}"
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    beside = BESIDE.get(minor(release), [])
    wanted = [platform.python_version(), torch, *beside, *(line.split("#")[0].strip() for line in lines)]
    wanted = "".join(line + "\n" for line in wanted if line)
    if done.exists() and done.read_text() == wanted:
        return python
    venv.create(home, clear=True, symlinks=os.name != "nt")
    query = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site_packages = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    Path(site_packages, "shared.pth").write_text(str(folder / "shared") + "\n")
    constraints = home / "constraints.txt"
    constraints.write_text(torch + "\n")
    # --no-compile: the tests compile what they import, and that is a small part
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-compile"]
    command += ["--only-binary", ":all:", "--constraint", str(constraints)]
    subprocess.run([*command, "-r", str(ROOT / "requirements.txt"), f"transformers=={release}", *beside], check=True)
    done.write_text(wanted)
    return python


def run_tests(python, tests, home, folder):
    """Run pytest; its report is in home/junit.xml then, what it printed in home/pytest.txt."""
    home.mkdir(exist_ok=True)
    report = home / "junit.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--durations=0", "--tb=short", f"--junitxml={report}"]
    changes = {
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(folder / "pycache"),  # one for all: torch is compiled once, and the tests
    }
    environment = {**os.environ, **changes}
    with open(home / "pytest.txt", "w") as log:
        subprocess.run([*command, *tests], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not report.exists():
        end = Path(log.name).read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"pytest did not get to its end: see {log.name}, which ends with\n{end}")


def read_report(home):
    """{"passed", "failed", "not offered", "skipped": how many} and the names of the tests that failed."""
    counts, failures = dict.fromkeys(KINDS, 0), []
    for case in ElementTree.parse(home / "junit.xml").iter("testcase"):
        found = {child.tag: child for child in case}
        if "failure" in found or "error" in found:
            kind = "failed"
            # what cannot be imported has no class
            failures.append(f"{(case.get('classname') or '').split('.')[-1]}::{case.get('name')}")
        elif "skipped" in found:
            kind = "not offered" if "needs transformers" in found["skipped"].get("message", "") else "skipped"
        else:
            kind = "passed"
        counts[kind] += 1
    return counts, failures


def markdown(rows):
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def table(results):
    """Markdown: a row a release."""
    rows = [["transformers", "tests", *KINDS]]
    for name, (tests, counts, _) in results.items():
        failed = f"**{counts['failed']}**" if counts["failed"] else "0"
        rows.append([name, tests, *(failed if kind == "failed" else counts[kind] for kind in KINDS)])
    return markdown(rows)


def begins():
    """Markdown: what begins with which release, as the tests' marks say."""
    by_release = {}
    for release, what in sorted(set(marks()), key=lambda feature: (Version(feature[0]), feature[1])):
        by_release.setdefault(release, []).append(what)
    return markdown([["from", "what"], *([release, "; ".join(what)] for release, what in by_release.items())])


def write_pages(results, releases, minutes):
    """The table of docs/compatibility.md, and the line that other pages quote, each between its two comments."""
    first, *_, last = releases.values()
    machine = f"Python {platform.python_version()}, torch {metadata.version('torch')}, {platform.machine()}"
    matrix = f"""
`make matrix`: {machine}, {minutes:.0f} minutes. `tomorrow` is {last} without what it announces to remove. Not offered:
that release lacks the feature, see the list below. Skipped: this machine lacks what the test needs, a GPU for example.

{table(results)}
The whole suite runs on the oldest release, on the newest, and on those with which something begins that a test needs:

{begins()}"""
    for page in map(ROOT.joinpath, PAGES):
        text = page.read_text(encoding="utf-8")
        for name, body in (("matrix", matrix), ("releases", f"{len(releases)} releases, {first} to {last}")):
            marks = rf"(<!-- {name}: made by `make matrix` -->).*?(<!-- end of {name} -->)"
            text = re.sub(marks, lambda found: found[1] + body + found[2], text, flags=re.DOTALL)  # noqa: B023
        page.write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--releases", nargs="+", metavar="NAME", help="4.44 (its last patch), 4.44.2, newest, tomorrow; otherwise all")
    add("--skip", metavar="FILE", help="leave out the release that this constraints file names")
    add("--core", action="store_true", help="the files of CORE alone")
    add("--tests", nargs="+", default=[], help="these files of tests")
    add("--jobs", type=int, default=1, help="releases at a time")
    add("--again", action="store_true", help="read the reports that are there, run only what has none")
    add("--prepare", action="store_true", help="make the environments, and run nothing")
    add("--folder", type=Path, default=ROOT / "build" / "matrix", help="where the environments are")
    args = parser.parse_args()
    begin = time.time()
    releases = find_releases()
    everything = not (args.releases or args.skip or args.core or args.tests)
    rows = resolve(args.releases or [*releases.values(), "tomorrow"], releases)
    if args.skip:
        constrained = re.search(r"^transformers==(\S+)", Path(args.skip).read_text(encoding="utf-8"), re.MULTILINE)[1]
        if rows.pop(constrained, None):
            print(
                f"transformers {constrained} is the one of {args.skip}: it has run there, and is left out", flush=True
            )
    starts = {OLDEST, list(releases)[-1], *(start for start, _ in marks())}
    whole = [
        name for name, release in rows.items() if name != "tomorrow" and (args.releases or minor(release) in starts)
    ]
    args.folder = args.folder.resolve()
    link_shared(args.folder / "shared")
    environments = {}  # release -> its Python, or why it has none
    for release in dict.fromkeys(rows.values()):  # one at a time: pip's cache and index are one
        try:
            environments[release] = make_environment(release, args.folder)
        except subprocess.CalledProcessError as error:
            environments[release] = RuntimeError(f"no environment with transformers {release}: {error}")
    print(f"{len(environments)} environments after {time.time() - begin:.0f} s", flush=True)
    if args.prepare:
        sys.exit("\n".join(str(home) for home in environments.values() if isinstance(home, RuntimeError)))

    def run(name):
        """("whole" or "core", how many passed and so on, which failed)."""
        began = time.time()
        core = args.core or name not in whole
        tests = args.tests or ([f"tests/test_{file}.py" for file in CORE] if core else [])
        tests = [*tests, "-p", "tests.tomorrow"] if name == "tomorrow" else tests
        home, kind = args.folder / name, "core" if core else "whole"
        try:
            if not (args.again and (home / "junit.xml").exists()):
                if isinstance(environments[rows[name]], RuntimeError):
                    raise environments[rows[name]]
                run_tests(environments[rows[name]], tests, home, args.folder)
            counts, failures = read_report(home)
        except RuntimeError as error:  # no environment, or pytest ended early: the other releases are still of interest
            counts, failures = {**dict.fromkeys(KINDS, 0), "failed": 1}, [str(error)]
        seconds = f"{time.time() - began:.0f} s, {counts['passed']} passed, {len(failures)} failed"
        print(f"{name} ({kind}): {seconds}", *failures, sep="\n    ", flush=True)
        return kind, counts, failures

    with ThreadPoolExecutor(args.jobs) as pool:  # the long ones first, so that no job is left alone with one
        ordered = sorted(rows, key=lambda name: name not in whole)
        found = dict(zip(ordered, pool.map(run, ordered)))
    results = {name: found[name] for name in rows}
    minutes = (time.time() - begin) / 60
    print(table(results), f"{len(results)} rows in {minutes:.1f} minutes", sep="\n")
    if everything and not args.again:
        write_pages(results, releases, minutes)
    sys.exit(any(failures for _, _, failures in results.values()))


if __name__ == "__main__":
    main()
