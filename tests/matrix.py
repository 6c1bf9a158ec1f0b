"""Run the test suite on every supported release of transformers, and write the table tests/matrix.md.

    python tests/matrix.py [--releases 4.30.2 5.23.0] [--jobs 2] [--quick] [TESTS ...]

Each release gets an environment under build/matrix/. torch, pytest and what they need are not installed again: they
are linked from the environment that runs this script. Everything else is pinned below.
"""

import argparse
import os
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
SHARED = ("torch", "numpy", "sentencepiece", "jinja2", "pytest", "hypothesis")


def link_shared(folder):
    """A folder of links to the SHARED distributions of this environment and to those that they require."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting, seen = list(SHARED), set()
    while waiting:
        distribution = metadata.distribution(waiting.pop())
        for path in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = folder / path
            if not link.exists():
                link.symlink_to(distribution.locate_file(path))
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
    names = ("tokenizers", "huggingface_hub", "accelerate", "safetensors")
    pins = [f"transformers=={release}", *(f"{name}=={pin}" for name, pin in zip(names, PINS[release]))]
    constraints = home / "constraints.txt"
    constraints.write_text(f"torch=={metadata.version('torch')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--only-binary", ":all:"]
    subprocess.run([*pip, "--constraint", str(constraints), *pins], check=True)
    done.touch()
    return python
