"""transformers' Auto classes know our models as soon as bagformer is imported, in any order."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.models import make_inputs, tiny_model, write_dictionary, write_tokenizer

from bagformer import BagFormerProcessor

ORDERS = {
    "bagformer first": "import bagformer\nimport transformers",
    "auto classes first": (
        "from transformers import AutoConfig, AutoModel, AutoProcessor, AutoImageProcessor\n"
        "import bagformer"
    ),
}
LOAD = """
import sys, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
folder = sys.argv[1]
torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()
names = [type(AutoConfig.from_pretrained(folder)), type(AutoImageProcessor.from_pretrained(folder))]
print(type(processor).__name__, type(model).__name__, *(one.__name__ for one in names))
print(type(AutoModel.from_config(model.config)).__name__)
inputs = torch.load(folder + "/inputs.pt", weights_only=True)
with torch.no_grad():
    output = model(**inputs)
wanted = torch.load(folder + "/scores.pt", weights_only=True)
assert torch.equal(output.text_to_image, wanted[0]) and torch.equal(output.image_to_text, wanted[1])
ids = processor(text=["红色手机壳"])["input_ids"]
assert torch.equal(ids, torch.load(folder + "/ids.pt", weights_only=True))
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:bagformer", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    model = tiny_model()
    processor = BagFormerProcessor.from_config(
        model.config,
        write_tokenizer(folder / "tokenizer"),
        write_dictionary(folder / "dictionary.txt"),
    )
    target = folder / "model"
    model.save_pretrained(target)
    processor.save_pretrained(target)
    inputs = make_inputs()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        output = model(**inputs)
    torch.set_num_threads(threads)
    torch.save(inputs, target / "inputs.pt")
    torch.save((output.text_to_image, output.image_to_text), target / "scores.pt")
    torch.save(processor(text=["红色手机壳"])["input_ids"], target / "ids.pt")
    return target


@pytest.mark.parametrize("order", ORDERS)
def test_round_trip_through_the_auto_classes(saved, order):
    lines = python(ORDERS[order] + LOAD, str(saved)).splitlines()
    assert lines[-2:] == [
        "BagFormerProcessor BagFormerForRetrieval BagFormerConfig BagFormerImageProcessor",
        "BagFormerForRetrieval",
    ]


def test_import_is_quick_and_leaves_transformers_alone():
    code = (
        "import time, sys, torch\n"
        "start = time.perf_counter()\n"
        "import bagformer\n"
        "print(time.perf_counter() - start, 'transformers' in sys.modules, 'timm' in sys.modules)"
    )
    seconds, *others = python(code).split()
    assert float(seconds) < 2 and others == ["False", "False"]


def test_other_models_still_load(tmp_path):
    from transformers import BertConfig, BertModel

    options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    BertModel(BertConfig(**options, intermediate_size=8)).save_pretrained(tmp_path)
    code = (
        "import sys, bagformer\n"
        "from transformers import AutoModel, AutoConfig, PreTrainedModel\n"
        "import transformers.models.auto.modeling_auto as auto\n"
        "import copy, pickle\n"
        "print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)\n"
        "keys = [one.__name__ for one in auto.MODEL_MAPPING.keys()]\n"
        "print('BagFormerConfig' in keys, keys.count('BagFormerConfig'))\n"
        "copied = pickle.loads(pickle.dumps(auto.MODEL_MAPPING))\n"
        "print(copied[bagformer.BagFormerConfig].__name__)\n"
    )
    assert python(code, str(tmp_path)).split() == [
        "BertModel",
        "True",
        "1",
        "BagFormerForRetrieval",
    ]
