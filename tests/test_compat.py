"""The original's names give the original's results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.models import BERT, tiny_model, write_dictionary, write_tokenizer
from support.original import arch, cases
from transformers import BertTokenizer

from bagformer import BagSegmenter, compat, reference
from bagformer.models.conversion import to_original

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def loss_cases(golden):
    arrays = np.load(golden / "loss.npz")
    for case in json.loads((golden / "loss_cases.json").read_text(encoding="utf-8")):
        name = case["name"]
        found = {
            key.split("/", 1)[1]: torch.from_numpy(np.asarray(arrays[key]))
            for key in arrays.files
            if key.startswith(name + "/")
        }
        yield case, found


def close(actual, expected, what):
    # relative to the largest value: single entries of a gradient may be sums that cancel
    worst = (actual.detach() - expected).abs().max()
    assert worst <= 1e-5 * expected.abs().max(), f"{what}: {worst}"


def test_scores_losses_and_gradients_match_the_original(golden):
    seen = set()
    for case, arrays in loss_cases(golden):
        name = case["name"]
        text = arrays["text"].float().requires_grad_()
        image = arrays["image"].float().requires_grad_()
        if "ngram" in case:
            loss = compat.ngramwise_similarity_loss(text, image)
            similarity = compat.ngramwise_similarity(image[0], text)
            close(similarity, arrays["ngramwise_similarity_0"], f"{name} similarity")
        else:
            mask = arrays.get("mask", torch.ones(text.shape[:2]))[..., None].float()
            i2t, t2i = compat.tokenwise_similarity_martix(text * mask, image)
            close(i2t, arrays["sim_i2t"], f"{name} sim_i2t")
            close(t2i, arrays["sim_t2i"], f"{name} sim_t2i")
            if "loss" not in arrays:
                continue
            loss = compat.tokenwise_similarity_loss(text * mask, image)
        close(loss, arrays["loss"], f"{name} loss")
        loss.backward()
        close(text.grad, arrays["grad_text"], f"{name} grad_text")
        close(image.grad, arrays["grad_image"], f"{name} grad_image")
        seen.add(name)
    assert len(seen) >= 2


def test_pairs_and_sparse_results_match_the_original(golden):
    for case, arrays in loss_cases(golden):
        if "ngram" in case:
            continue
        mask = arrays.get("mask", torch.ones(arrays["text"].shape[:2]))[..., None].float()
        text, image = arrays["text"].float() * mask, arrays["image"].float()
        for key, pair, metric in (
            ("l2_pairwise", (text, image), "l2"),
            ("cosine_pairwise", (text, image), "cosine"),
            ("l2_pairwise_swapped", (image, text), "l2"),
        ):
            if key in arrays:
                first, second = (side[: len(arrays[key])] for side in pair)
                close(compat.tokenwise_similarity(first, second, metric), arrays[key], key)
        k, row = case["sparse_topk"], case["cls_text_row"]
        full = compat.sparse_tokenwise_similarity_martix(text, image, topk=k)
        cls = compat.sparse_cls_token_similarity(image[:, 0], text[:, row], topk=k)
        for kind, (i2t, t2i) in (("sparse", full), ("sparse_cls", cls)):
            for direction, found in (("i2t", i2t), ("t2i", t2i)):
                wanted = arrays[f"{kind}_{direction}_idx"]
                assert [list(one) for one in found] == wanted.tolist()
                values = torch.tensor([list(one.values()) for one in found])
                close(values, arrays[f"{kind}_{direction}_val"], f"{kind}_{direction}")


def sides(texts=4, images=3, seed=0):
    maker = torch.Generator().manual_seed(seed)
    return torch.randn(texts, 5, 8, generator=maker), torch.randn(images, 7, 8, generator=maker)


def test_similarities_follow_plain_pytorch():
    text, image = sides()
    similarity = torch.einsum("atd,bpd->abtp", text, image)
    i2t, t2i = compat.tokenwise_similarity_martix(text, image)
    torch.testing.assert_close(t2i, similarity.amax(3).sum(2), **CLOSE)
    torch.testing.assert_close(i2t, similarity.amax(2).sum(2).t(), **CLOSE)
    one = compat.tokenwise_similarity(text[0], image)
    torch.testing.assert_close(one, t2i[0], **CLOSE)
    pairs = compat.tokenwise_similarity(text[:3], image)
    torch.testing.assert_close(pairs, t2i[:3].diagonal(), **CLOSE)
    distance = torch.cdist(text[:3].double(), image.double()).square().amin(2).sum(1)
    squared = compat.tokenwise_similarity(text[:3], image, "l2")
    torch.testing.assert_close(squared, -distance.float(), **CLOSE)
    with pytest.raises(ValueError, match="similarity_metric must be one of cosine, l2"):
        compat.tokenwise_similarity(text, image, "dot")
    with pytest.raises(ValueError, match="query must be"):
        compat.tokenwise_similarity(text[0, 0], image)


def test_ngrams_follow_plain_pytorch():
    maker = torch.Generator().manual_seed(0)
    text = torch.randn(3, 2, 5, 8, generator=maker, requires_grad=True)
    image = torch.randn(3, 7, 8, generator=maker, requires_grad=True)
    every = torch.einsum("agtd,bpd->abgtp", text, image)
    i2t, t2i = every.amax((2, 4)).sum(2).t(), every.amax((2, 3)).sum(2)
    torch.testing.assert_close(compat.ngramwise_similarity(image[1], text), i2t[1], **CLOSE)
    torch.testing.assert_close(compat.ngramwise_similarity(text[1], image), t2i[1], **CLOSE)
    target = torch.arange(3)
    truth = (F.cross_entropy(i2t, target) + F.cross_entropy(t2i, target)) / 2
    loss = compat.ngramwise_similarity_loss(text, image)
    torch.testing.assert_close(loss, truth, **CLOSE)
    wanted = torch.autograd.grad(truth, (text, image))
    torch.testing.assert_close(torch.autograd.grad(loss, (text, image)), wanted, **CLOSE)
    with pytest.raises(ValueError, match="give"):
        compat.ngramwise_similarity(text, image)


def test_sparse_results_are_the_best_of_the_full_matrix():
    text, image = sides(6, 5)
    i2t, t2i = compat.tokenwise_similarity_martix(text, image)
    for full, sparse in zip(
        (i2t, t2i), compat.sparse_tokenwise_similarity_martix(text, image, topk=3), strict=True
    ):
        for row, found in zip(full, sparse, strict=True):
            values, index = row.topk(3)
            assert list(found) == index.tolist()
            np.testing.assert_allclose(list(found.values()), values, rtol=1e-5)
    cls_i2t, cls_t2i = compat.sparse_cls_token_similarity(image[:, 0], text[:, 0], topk=2)
    assert len(cls_i2t) == 5 and len(cls_t2i) == 6
    best = (text[:, 0] @ image[:, 0].t()).argmax(dim=1).tolist()
    assert [next(iter(one)) for one in cls_t2i] == best


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compat")
    write_dictionary(folder / "dictionary.txt")
    made = BertTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer"))
    made.dictionary = folder / "dictionary.txt"
    return made


def test_flat_offsets_and_masks(tokenizer):
    helper = compat.EmbeddingBagHelperAutomaton(tokenizer, tokenizer.dictionary)
    text = tokenizer(["玫瑰红色a", "手机壳"], padding="max_length", max_length=8)
    first, second = text["input_ids"]
    # 玫瑰 and 红色 touch: an empty bag between them; 手机壳 needs 手机 to be an entry
    assert helper.get_offsets(first) == [0, 1, 3, 3, 5, 6, 7]
    assert helper.get_offsets(second) == [0, 1, 2, 3, 4, 5, 6, 7]
    offsets, mask = helper.process(text, return_mask=True)
    assert offsets == [0, 1, 3, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert mask == [[0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0]]
    assert helper.process(text) == offsets
    assert helper.process(text.convert_to_tensors("pt")) == offsets
    backward = compat.EmbeddingBagHelper(tokenizer, tokenizer.dictionary, masked_token=["[CLS]"])
    assert backward.get_offsets(second)[:3] == [0, 1, 4]
    masked = backward.process(tokenizer(["手机壳"]), return_mask=True)[1]
    assert masked == [[0, 1, 1]]
    with pytest.raises(ValueError, match="no rows"):
        helper.process({"input_ids": []})


@pytest.fixture(scope="module")
def read_once():
    """The original's dictionary takes seconds to tokenise; it is read once for this file."""
    entities: dict = {}

    def from_dictionary(path, tokenizer, matcher, masked_tokens):
        if path not in entities:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            entities[path] = tokenizer(lines, add_special_tokens=False)["input_ids"]
        masked = tokenizer.convert_tokens_to_ids(list(masked_tokens))
        return BagSegmenter(entities[path], matcher=matcher, masked_ids=masked)

    return from_dictionary


def test_bags_match_the_original(golden, original_data, monkeypatch, read_once):
    monkeypatch.setattr(BagSegmenter, "from_dictionary", read_once)
    tokenizer = BertTokenizer.from_pretrained(golden / "tokenizer")
    dictionary = str(original_data / "entity_dict_20220507")
    helpers = {
        "fwd": compat.EmbeddingBagHelperAutomaton(tokenizer, dictionary),
        "bmm": compat.EmbeddingBagHelper(tokenizer, dictionary),
    }
    arrays = np.load(golden / "offsets.npz")
    batches = json.loads((golden / "offsets_process.json").read_text(encoding="utf-8"))
    checked = 0
    for batch in batches:
        source = batch["source"]
        if f"ids_{source}" not in arrays.files:
            continue
        rows = arrays[f"ids_{source}"][batch["rows"]].tolist()
        offsets, mask = helpers[batch["helper"]].process({"input_ids": rows}, return_mask=True)
        assert offsets == batch["offsets"]
        assert ["".join(map(str, row)) for row in mask] == batch["mask"]
        checked += 1
    assert checked > 20


def settings(folder, dictionary, **changes):
    bert = {**BERT, "fusion_layer": 2, "encoder_width": 32, "model_type": "bert"}
    (folder / "bert.json").write_text(json.dumps(bert), encoding="utf-8")
    return {
        "bert_config": str(folder / "bert.json"),
        "image_res": 64,
        "vision_width": 32,
        "vision_depth": 2,
        "vision_heads": 2,
        "embed_dim": 16,
        "temp": 0.07,
        "queue_size": 8,
        "momentum": 0.995,
        "fusion_strategy": "late_fusion",
        "entity_dict_path": str(dictionary),
        **changes,
    }


def checkpoint_of(model):
    state = {to_original(name): value for name, value in model.state_dict().items()}
    state["vision_proj_m.weight"] = state["vision_proj.weight"] + 1
    state["image_queue"] = torch.zeros(16, 8)
    state["text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return state


@pytest.mark.parametrize("strategy", ["late_fusion", "early_fusion"])
def test_model_has_the_originals_parameters_and_losses(tokenizer, tmp_path, strategy):
    fusion = strategy.removesuffix("_fusion")
    model = tiny_model(protocol="original", fusion=fusion)
    state = checkpoint_of(model)
    config = settings(tmp_path, tokenizer.dictionary, fusion_strategy=strategy)
    old = compat.BagFormer(config=config, tokenizer=tokenizer)
    assert not old.training
    old.load_state_dict(state, strict=False)
    old.load_state_dict(state)
    kept, _ = compat.select(state)
    assert old.state_dict().keys() == kept.keys()
    with pytest.raises(RuntimeError, match=r"text_proj\.bias"):
        old.load_state_dict({k: v for k, v in state.items() if k != "text_proj.bias"})
    assert sum(1 for _ in old.parameters()) == sum(1 for _ in model.parameters())
    helper = compat.EmbeddingBagHelperAutomaton(tokenizer, tokenizer.dictionary)
    text = tokenizer(["玫瑰红色a", "手机壳"], padding="max_length", max_length=12)
    offsets, mask = helper.process(text, return_mask=True)
    text = text.convert_to_tensors("pt")
    image = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    losses = old(image, text, (torch.tensor(offsets), torch.tensor(mask)), 0.0, None, config)
    starts = torch.tensor(offsets).view(2, -1) - torch.tensor([[0], [12]])
    torch.manual_seed(0)
    output = model(
        text.input_ids,
        text.attention_mask,
        F.pad(starts, (0, 1), value=12).int(),
        torch.tensor(mask).bool(),
        image,
        return_loss=True,
    )
    torch.testing.assert_close(losses, (output.loss_ita, output.loss_itm, output.loss_twc))
    with pytest.raises(ValueError, match="fusion_strategy must be one of"):
        compat.BagFormer({**config, "fusion_strategy": "late"})


def test_moving_and_copying_keeps_one_set_of_weights(tokenizer, tmp_path):
    import copy

    old = compat.BagFormer(settings(tmp_path, tokenizer.dictionary))
    for one in (old.double(), copy.deepcopy(old)):
        names = {id(value) for value in one.parameters()}
        assert names == {id(v) for v in one.retrieval.parameters()}
        assert one.temp.dtype == one.retrieval.text_proj.weight.dtype == torch.float64


def test_bert_weights_are_loaded_from_a_folder(tokenizer, tmp_path):
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(**BERT), add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "bert")
    config = settings(tmp_path, tokenizer.dictionary)
    model = compat.BagFormer(config, text_encoder=tmp_path / "bert", tokenizer=tokenizer)
    state = model.text_encoder.state_dict()
    assert all(torch.equal(state[name], value) for name, value in bert.state_dict().items())
    # a folder with a vocabulary alone leaves BERT as it was initialised
    torch.manual_seed(0)
    fresh = compat.BagFormer(config, text_encoder=tokenizer.dictionary.parent / "tokenizer")
    torch.manual_seed(0)
    plain = compat.BagFormer(config).state_dict()
    assert all(torch.equal(plain[name], value) for name, value in fresh.state_dict().items())


def test_readme_flow_on_own_fixtures(tokenizer, tmp_path):
    """What the original's README does, against the reference in plain steps."""
    config = settings(tmp_path, tokenizer.dictionary)
    model = compat.BagFormer(config, tokenizer.dictionary.parent / "tokenizer", tokenizer)
    transform = compat.get_test_transform(config)
    image = transform(Image.effect_noise((50, 70), 90))[None]
    assert image.shape == (1, 3, 64, 64)
    helper = compat.EmbeddingBagHelperAutomaton(
        tokenizer, config["entity_dict_path"], masked_token=["[CLS]", "[PAD]"]
    )
    text = tokenizer(["玫瑰红色", "nike 手机壳"], padding="max_length", max_length=12)
    offsets, _ = helper.process(text, return_mask=True)
    text = text.convert_to_tensors("pt")
    with torch.no_grad():
        patches = model.visual_encoder(image)
        states = model.text_encoder(
            text.input_ids, attention_mask=text.attention_mask, mode="text"
        ).last_hidden_state
        flat = states.view(-1, states.shape[-1])
        bags = F.embedding_bag(
            torch.arange(len(flat)), flat, torch.tensor(offsets), mode="sum"
        ).view(2, -1, states.shape[-1])
        i2t, t2i = compat.tokenwise_similarity_martix(F.normalize(bags, dim=-1), patches[..., :24])
    starts = torch.tensor(offsets).view(2, -1) - torch.tensor([[0], [12]])
    pooled = reference.bag_pool(states, F.pad(starts, (0, 1), value=12))
    wanted = reference.maxsim(reference.l2_normalize(pooled), patches[..., :24])
    torch.testing.assert_close(t2i, wanted.text_to_image, **CLOSE)
    torch.testing.assert_close(i2t, wanted.image_to_text, **CLOSE)
    assert patches.shape == (1, 17, 32)


IMPORTS = {
    "from ruamel import yaml": "import yaml",
    "from models.loss import": "from bagformer.compat import",
    "from models.model_helper import": "from bagformer.compat import",
    "from models.model_retrieval_bagwise import": "from bagformer.compat import",
    "from MUGE_helper.dataset import": "from bagformer.compat import",
}


def replace_all(code, changes):
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


def test_the_seeds_snippet_runs_with_only_its_imports_changed(
    golden, original_data, tmp_path, monkeypatch, read_once
):
    """With paths filled in and its one misspelt variable corrected; then on the recorded texts
    and pictures, whose numbers it must give."""
    seed = golden.parent / "seed.md"
    if not seed.exists():
        pytest.skip("SKIPPED LOUDLY: the seed is not here")
    section = seed.read_text(encoding="utf-8").split("### Calculate bag-wise similarity")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    found = cases(golden, "readme")
    assert found
    monkeypatch.setattr(BagSegmenter, "from_dictionary", read_once)
    for case, info in found:
        letter = case.name.split("_")[1]
        described = arch(golden, letter)
        sizes = described["arch"]
        (tmp_path / "bert.json").write_text(json.dumps(described["bert_config"]), encoding="utf-8")
        config = settings(
            tmp_path,
            original_data / "entity_dict_20220507",
            bert_config=str(tmp_path / "bert.json"),
            image_res=sizes["image_res"],
            vision_width=sizes["vit"],
            vision_depth=sizes["vit_depth"],
            vision_heads=sizes["vit_heads"],
            patch_size=sizes["patch"],
            embed_dim=sizes["embed_dim"],
        )
        (tmp_path / "bert.json").write_text(json.dumps(described["bert_config"]), encoding="utf-8")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        torch.save(
            {"model": load_file(golden / f"model_{letter}.safetensors")}, tmp_path / "model.pth"
        )
        Image.effect_noise((80, 60), 70).convert("RGB").save(tmp_path / "photo.jpeg")
        plain = replace_all(
            code,
            {
                **IMPORTS,
                "toext_encoder": "text_encoder",
                "bert-base-chinese": str(golden / "tokenizer"),
                "configs/config_muge.yaml": str(tmp_path / "config.yaml"),
                "path-to-checkpoint": str(tmp_path / "model.pth"),
                "rumble_roller.jpeg": str(tmp_path / "photo.jpeg"),
                'device = "cuda" if torch.cuda.is_available() else "cpu"': 'device = "cpu"',
            },
        )
        names: dict = {}
        exec(compile(plain, "snippet", "exec"), names)
        assert names["sim_t2i"].shape == (2, 1) and names["sim_i2t"].shape == (1, 2)
        assert names["embedbag_feats"].shape == (2, 25, sizes["hidden"])
        recorded = replace_all(
            plain,
            {
                '["rumble roller", "nike zoomx vista"]': repr(info["texts"]),
                "product_image.unsqueeze(0)": "recorded_image",
            },
        )
        names = {"recorded_image": case["image"]}
        exec(compile(recorded, "snippet", "exec"), names)
        tolerance = {"rtol": 1e-4, "atol": 2e-4}
        assert names["embed_bag_offset"].tolist() == case["embed_bag_offset"].tolist()
        assert names["text"].input_ids.tolist() == case["input_ids"].tolist()
        for ours, theirs in {
            "image_features": "visual_encoder",
            "text_features": "text_last_hidden_state",
            "embedbag_feats": "embedbag_feats",
            "sim_i2t": "sim_i2t",
            "sim_t2i": "sim_t2i",
        }.items():
            torch.testing.assert_close(names[ours], case[theirs], **tolerance)
