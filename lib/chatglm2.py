"""The checkout as the package `chatglm2` that `pip install .` would install: its modules are the files at the root.

Scripts put this folder first in sys.path, pytest does so by pyproject.toml. The checkout then goes before an installed
copy.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent)]
