"""What transformers tests its own models and tokenizers for, run on ours: the mixins of its source package.

TRANSFORMERS_SOURCE is a folder of that source, of the installed release; `make tools` fetches it. The package leaves
out the modules of STAND_INS, which the mixins import, among them the mixin of `generate`: test_generation.py is ours.
A test that cannot pass is named, with its reason and with the error that it must end in.
"""

import importlib
import os
import sys
import tempfile
import types
import unittest
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
    GLMBlock,
)
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from conftest import SHARED, SMALL, TINY

pytestmark = pytest.mark.tools
SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE") or f"build/transformers-{transformers.__version__}").resolve()
if not (SOURCE / "tests" / "test_modeling_common.py").is_file():
    pytest.skip(f"TRANSFORMERS_SOURCE={SOURCE}: give a folder of transformers' source", allow_module_level=True)
pytest.importorskip("parameterized", reason="pip install parameterized: transformers' tests import it")
STAND_INS = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
OURS = {
    "MODEL_MAPPING_NAMES": ChatGLMModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ChatGLMForConditionalGeneration,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": ChatGLMForSequenceClassification,
}


def load_mixins():
    """The modules test_modeling_common and test_tokenization_common, in a package whose name is free."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE / "tests")]
    modules = {package.__name__: package}
    for path, name in STAND_INS.items():
        folder = modules[f"{package.__name__}.{path.split('.')[0]}"] = types.ModuleType(path.split(".")[0])
        folder.__path__ = []
        module = modules[f"{package.__name__}.{path}"] = types.ModuleType(path)
        setattr(module, name, type(name, (), {}))
    sys.modules.update(modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # transformers' own marks
        modeling, tokenization = (
            importlib.import_module(f"{package.__name__}.test_{kind}_common") for kind in ("modeling", "tokenization")
        )
    for table, model in OURS.items():  # the mixin decides by these names what a model takes and returns
        setattr(modeling, table, {**getattr(modeling, table), "chatglm": model.__name__})
    modeling.GradientCheckpointingLayer = GLMBlock  # checkpointing is our own, the same on every release
    return modeling, tokenization


MODELING, TOKENIZATION = load_mixins()


def fails(**expected):
    """Class decorator: {test: (the error that it must end in, why it cannot pass)}."""

    def decorate(cls):
        for name, (message, _) in expected.items():
            theirs = getattr(cls, name, None)

            def test(self, theirs=theirs, message=message):
                if theirs is None:
                    self.skipTest("this release has no such test")
                without_subtests = mock.patch.object(self, "subTest", lambda *args, **kwargs: nullcontext())
                with without_subtests, self.assertRaises(Exception) as caught:
                    theirs(self)
                self.assertRegex(repr(caught.exception), message)

            setattr(cls, name, test)
        return cls

    return decorate


class ModelTester:
    """A configuration and inputs, and the attributes that the mixin reads."""

    __test__ = False
    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, SMALL["hidden_size"], SMALL["num_attention_heads"]

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, SMALL["padded_vocab_size"], (self.batch_size, self.seq_length))
        config = ChatGLMConfig(**{**SMALL, "num_layers": self.num_hidden_layers})
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


FROZEN_HEAD = (
    "output_layer.weight in ChatGLMForSequenceClassification has no gradient",
    "the base model owns the output layer, as in the released checkpoints, and a classifier does not use it",
)


@fails(
    test_bc_cache_name_forward=("False is not true", "both names of the cache are right, so neither warns"),
    test_causal_lm_loss_honors_shift_labels=(
        "unexpected keyword argument 'shift_labels'",
        "sequence parallel training is not supported, and a keyword that would be ignored is an error",
    ),
    test_generation_tester_mixin_inheritance=("GenerationTesterMixin", "the package does not hold that mixin"),
    test_load_with_mismatched_shapes=(
        "does not recognize this architecture",
        "AutoModel finds our classes through auto_map, not by model_type; test_loading.py has other shapes",
    ),
    test_model_weights_reload_no_missing_tied_weights=(
        "lacks 17 of the model's 17 tensors",
        "a checkpoint without its weights is an error here, not a model of random values",
    ),
    test_tied_weights_keys=("tie_word_embeddings=True must be false", "the output layer is never tied"),
    test_training_gradient_checkpointing=FROZEN_HEAD,
    test_training_gradient_checkpointing_use_reentrant_false=FROZEN_HEAD,
    test_training_gradient_checkpointing_use_reentrant_true=FROZEN_HEAD,
)
class ModelTest(MODELING.ModelTesterMixin, unittest.TestCase):
    all_model_classes = tuple(OURS.values())

    def setUp(self):
        self.model_tester = ModelTester()
        name = "_gradient_checkpointing_func"  # of a GradientCheckpointingLayer; a GLMBlock calls it `checkpoint`
        same = property(lambda block: block.checkpoint, lambda block, new: setattr(block, "checkpoint", new), id)
        self.enterContext(mock.patch.object(GLMBlock, name, same, create=True))


class Saved:
    """Tests of ChatGLMTokenizer in `tmpdirname`, saved there by itself."""

    tokenizer_class = ChatGLMTokenizer
    folder = TINY

    @classmethod
    def setUpClass(cls):
        if not (cls.folder / "tokenizer.model").exists():
            raise unittest.SkipTest("the released tokenizer.model is not part of the project")
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.tmpdirname = temporary.name
        cls.tokenizers_list = [(cls.tokenizer_class, cls.tmpdirname, {})]
        ChatGLMTokenizer(str(cls.folder / "tokenizer.model")).save_pretrained(cls.tmpdirname)

    @classmethod
    def tearDownClass(cls):
        """Theirs removes the folder, as the cleanup does."""

    @classmethod
    def get_tokenizer(cls, pretrained_name=None, **kwargs):
        return ChatGLMTokenizer.from_pretrained(pretrained_name or cls.tmpdirname, **kwargs)


@fails(
    test_pretokenized_inputs=(
        "Lists differ",
        "it compares words with a text that begins with a space, which gives a piece of its own, as in the original; "
        "test_tokenizer_surface.py has the ids of words",
    ),
    test_tokenizers_common_ids_setters=("'</s>' != None", "without a token of the user's there is the built-in one"),
)
class TinyTokenizerTest(Saved, TOKENIZATION.TokenizerTesterMixin, unittest.TestCase):
    pass


class ReleasedTokenizerTest(TinyTokenizerTest):
    folder = SHARED / "chatglm2-6b"


@fails(test_alignment_methods=("AttributeError", "it asks for the words of tokens, which only fast tokenizers know"))
class TinySentencePieceTest(Saved, TOKENIZATION.SentencePieceBackendTesterMixin, unittest.TestCase):
    pass


class ReleasedSentencePieceTest(TinySentencePieceTest):
    folder = SHARED / "chatglm2-6b"
