"""A pytest plugin: transformers without what it announces to remove up to 6.0, and its deprecation warnings as errors.

    python -m pytest -p tests.tomorrow tests/test_chat.py      python tests/matrix.py --releases tomorrow

-p loads it before the first model of transformers is imported, as it has to be. It removes what transformers would
serve without a word, or with a word that is written once a process:

- the old names behind `deprecate_kwarg`: `past_key_values` and `cache_params` of `generate`, of every `forward` and of
  the mask makers. Told that the version is 6.0, transformers' own decorator renames them still and only stops to say
  so; here they are a TypeError, also where **kwargs would swallow them;
- the module attributes behind `deprecate_attr`;
- the old names of the cache in a `ModelOutput`: attribute, key, and argument of its constructor;
- `gradient_checkpointing_enable`, `gradient_checkpointing_disable` and `is_gradient_checkpointing` of a model.

Everything else that transformers warns of, by a FutureWarning, a DeprecationWarning or its log, is an error with that
text: `torch_dtype` and `use_return_dict` of a configuration, `cache_position` made for remote code, and so on. What
carries no warning stays: `torch_dtype` as a key of config.json, and as an argument of `from_pretrained`.

One part of transformers' own cannot run that way, and is left as it is: assisted decoding hands its assistant a
`generation_config` together with settings, which `generate` calls deprecated.
"""

import functools
import logging
import os
import re
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers  # noqa: E402
from packaging.version import Version  # noqa: E402
from transformers.utils import deprecation, generic  # noqa: E402

TOMORROW = Version("6.0.0")
ANNOUNCED = re.compile(r"deprecated|will be removed|will stop")
OLD_CACHE_NAMES = ("past_key_values", "cache_params")

for name in ("masking_utils", "modeling_utils", "generation.utils"):
    assert f"transformers.{name}" not in sys.modules, f"transformers.{name} was imported before its decorators changed"


def refuse_kwarg(old_name, version, *args, **kwargs):
    """In the place of `deprecate_kwarg`."""

    def decorate(function):
        @functools.wraps(function)
        def refusing(*args, **kwargs):
            if old_name in kwargs:
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument '{old_name}' (tomorrow)")
            return function(*args, **kwargs)

        return refusing

    removed = Version(version) <= TOMORROW
    return decorate if removed else deprecate_kwarg(old_name, version, *args, **kwargs)


def refuse_attr(module_name, remove=None, rename=None):
    """In the place of `deprecate_attr`."""

    def __getattr__(name):
        raise AttributeError(f"module {module_name!r} has no attribute {name!r}")

    return __getattr__


deprecate_kwarg = deprecation.deprecate_kwarg
deprecation.deprecate_kwarg = refuse_kwarg
deprecation.deprecate_attr = refuse_attr

generic._rename_kwargs_for_bc = lambda kwargs: None
generic.ModelOutput._replace_old_cache_name = lambda self, key: key
for name in OLD_CACHE_NAMES:
    delattr(generic.ModelOutput, name)

for name in ("gradient_checkpointing_enable", "gradient_checkpointing_disable", "is_gradient_checkpointing"):
    delattr(transformers.PreTrainedModel, name)
transformers.PreTrainedModel._is_overridden = lambda self, name: False  # it compares with what is gone


def is_called_by(module):
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


class Refuse(logging.Handler):
    def emit(self, record):
        text = record.getMessage()
        if not ANNOUNCED.search(text):
            return
        if "`generation_config` together with" in text and is_called_by("transformers.generation.candidate_generator"):
            return
        raise FutureWarning(text)


logging.getLogger("transformers").addHandler(Refuse(logging.WARNING))
warn = warnings.warn


@functools.wraps(warn)
def refuse_warning(message, category=None, *args, **kwargs):
    """`warnings.warn`, an error where transformers announces something."""
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    caller = sys._getframe(1).f_globals.get("__name__", "")
    announced = issubclass(kind, (FutureWarning, DeprecationWarning)) or ANNOUNCED.search(str(message))
    if announced and caller.split(".")[0] == "transformers":
        raise FutureWarning(str(message))
    return warn(message, category, *args, **kwargs)


warnings.warn = refuse_warning


def pytest_report_header():
    return f"transformers {transformers.__version__} without what it announces to remove up to {TOMORROW}"
