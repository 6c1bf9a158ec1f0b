"""Run the test suite on every supported release of transformers, and write the table tests/matrix.md.

    python tests/matrix.py [--releases 4.30.2 5.23.0] [--quick] [--jobs 2] [--tests tests/test_model.py] [--again]

Each release gets an environment under build/matrix/. torch, pytest and what they need are not installed again: they
are linked from the environment that runs this script. Everything else is pinned below. Only a run of all releases and
all tests writes the table to its file; it takes about half an hour on two cores.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

# transformers -> what it was released with: tokenizers, huggingface_hub, accelerate, safetensors
NAMES = ("tokenizers", "huggingface_hub", "accelerate", "safetensors")
PINS = {
    "4.30.2": ("0.13.3", "0.17.3", "0.21.0", "0.4.5"),
    "4.33.3": ("0.13.3", "0.17.3", "0.23.0", "0.4.5"),
    "4.36.2": ("0.15.2", "0.20.3", "0.25.0", "0.4.5"),
    "4.40.2": ("0.19.1", "0.23.5", "0.30.1", "0.4.5"),
    "4.42.4": ("0.19.1", "0.24.7", "0.32.1", "0.4.5"),
    "4.44.2": ("0.19.1", "0.24.7", "0.33.0", "0.4.5"),
    "4.46.3": ("0.20.3", "0.26.5", "1.1.1", "0.4.5"),
    "4.48.3": ("0.21.0", "0.28.1", "1.3.0", "0.5.3"),
    "4.49.0": ("0.21.0", "0.28.1", "1.4.0", "0.5.3"),
    "4.51.3": ("0.21.1", "0.30.2", "1.6.0", "0.5.3"),
    "4.53.3": ("0.21.4", "0.34.4", "1.9.0", "0.5.3"),
    "4.57.6": ("0.22.2", "0.36.2", "1.12.0", "0.7.0"),
    "5.0.0": ("0.22.2", "1.3.4", "1.12.0", "0.7.0"),
    "5.10.4": ("0.22.2", "1.18.0", "1.13.0", "0.7.0"),
    "5.23.0": ("0.23.3", "2.4.0", "1.15.0", "0.8.0"),
}
PROTOBUF = "protobuf==5.29.5"  # from 4.46 on, a tokenizer's own error is lost without it
QUICK = ("4.30.2", "4.48.3", "4.57.6", "5.23.0")
SHARED = ("torch", "numpy", "sentencepiece", "jinja2", "pytest", "hypothesis")


def link_shared(folder):
    """A folder of links to the SHARED distributions of this environment and to those that they require."""
    folder.mkdir(parents=True, exist_ok=True)
    for link in folder.iterdir():  # of an environment that may have changed since
        link.unlink()
    waiting, seen = list(SHARED), set()
    while waiting:
        distribution = metadata.distribution(waiting.pop())
        for path in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / path).exists():
                (folder / path).symlink_to(distribution.locate_file(path))
        for text in distribution.requires or []:
            requirement = Requirement(text)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and requirement.name not in seen:
                seen.add(requirement.name)
                waiting.append(requirement.name)


def make_environment(release, folder):
    """The Python of an environment with `release`, made where it is not there yet."""
    home = folder / release
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = home / "complete"
    if done.exists():
        return python
    venv.create(home, clear=True, symlinks=os.name != "nt")
    query = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site_packages = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    Path(site_packages, "shared.pth").write_text(str(folder / "shared") + "\n")
    pins = [f"transformers=={release}", *(f"{name}=={pin}" for name, pin in zip(NAMES, PINS[release])), PROTOBUF]
    constraints = home / "constraints.txt"
    constraints.write_text(f"torch=={metadata.version('torch')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--only-binary", ":all:"]
    subprocess.run([*pip, "--constraint", str(constraints), *pins], check=True)
    done.touch()
    return python


def run_tests(python, tests, home):
    """Run pytest; its report is in home/junit.xml then, what it printed in home/pytest.txt."""
    report = home / "junit.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--durations=0", "--tb=short", f"--junitxml={report}"]
    changes = {"HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **changes}
    with open(home / "pytest.txt", "w") as log:
        subprocess.run([*command, *tests], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not report.exists():
        end = Path(log.name).read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"pytest did not get to its end: see {log.name}, which ends with\n{end}")


def read_report(home):
    """{test file: {"passed", "failed", "not offered", "skipped": how many}} and the names of those that failed."""
    groups, failures = {}, []
    for case in ElementTree.parse(home / "junit.xml").iter("testcase"):
        group = (case.get("classname") or case.get("name")).split(".")[-1]  # what cannot be imported has no class
        found = {child.tag: child for child in case}
        if "failure" in found or "error" in found:
            kind = "failed"
            failures.append(f"{group}::{case.get('name')}")
        elif "skipped" in found:
            kind = "not offered" if "needs transformers" in found["skipped"].get("message", "") else "skipped"
        else:
            kind = "passed"
        counts = groups.setdefault(group.removeprefix("test_"), {})
        counts[kind] = counts.get(kind, 0) + 1
    return groups, failures


def cell(counts):
    """ "40", all of which passed; or "38, 2 not offered"; or "**1 failed**, 39"."""
    parts = [f"**{counts['failed']} failed**"] if "failed" in counts else []
    parts += [str(counts["passed"])] if "passed" in counts else []
    parts += [f"{counts[kind]} {kind}" for kind in ("not offered", "skipped") if kind in counts]
    return ", ".join(parts)


def table(results):
    """Markdown: a row a release, a column a file of tests."""
    columns = sorted({group for groups, _ in results.values() for group in groups})
    rows = [["transformers", *columns], ["---"] * (len(columns) + 1)]
    for release, (groups, _) in results.items():
        rows.append([release, *(cell(groups.get(column, {})) for column in columns)])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--releases", nargs="+", choices=PINS, default=list(PINS), metavar="RELEASE")
    parser.add_argument("--quick", action="store_true", help=f"the releases {', '.join(QUICK)} alone")
    parser.add_argument("--jobs", type=int, default=1, help="releases at a time")
    parser.add_argument("--tests", nargs="+", default=[], help="files of tests, and options of pytest")
    parser.add_argument("--again", action="store_true", help="read the reports that are there, run only what has none")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="where the environments are")
    args = parser.parse_args()
    releases = [release for release in args.releases if not args.quick or release in QUICK]
    link_shared(args.folder / "shared")

    def run(release):
        begin = time.time()
        if not (args.again and (args.folder / release / "junit.xml").exists()):
            run_tests(make_environment(release, args.folder), args.tests, args.folder / release)
        groups, failures = read_report(args.folder / release)
        print(f"{release}: {time.time() - begin:.0f} s, {len(failures)} failed", *failures, sep="\n    ", flush=True)
        return groups, failures

    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(releases, pool.map(run, releases)))
    print(table(results))
    if len(releases) == len(PINS) and not args.tests:
        text = (
            f"How many tests of each file passed: `python tests/matrix.py`, Python {platform.python_version()}, "
            f"torch {metadata.version('torch')}, {platform.machine()}. Not offered: that release of transformers lacks "
            "the feature. Skipped: this machine lacks what the test needs, a GPU for example.\n\n"
        )
        (ROOT / "tests" / "matrix.md").write_text(text + table(results))
    sys.exit(any(failures for _, failures in results.values()))


if __name__ == "__main__":
    main()
