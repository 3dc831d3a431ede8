"""The model on its own: shapes, masks, interactions, protocols, losses, saving."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import BERT, VIT, make_inputs, tiny_config, tiny_model

from bagformer import BagFormerConfig, BagFormerForRetrieval, BagFormerModel, maxsim, reference

NEGATIVES = (torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))


def test_fields_and_shapes():
    inputs = make_inputs()
    model = tiny_model()
    output = model(**inputs, return_loss=True)
    shapes = {
        "text_to_image": (3, 3),
        "image_to_text": (3, 3),
        "text_features": (3, 5, 16),
        "text_mask": (3, 5),
        "text_cls": (3, 16),
        "text_embeds": (3, 8, 24),
        "image_features": (3, 17, 16),
        "image_cls": (3, 16),
        "image_embeds": (3, 17, 32),
        "itm_logits": (9, 2),
        "itm_labels": (9,),
    }
    assert {name: tuple(output[name].shape) for name in shapes} == shapes
    assert output.patch_grid == (4, 4)
    assert output.itm_labels.tolist() == [1] * 3 + [0] * 6
    total = output.loss_twc + output.loss_ita + output.loss_itm
    torch.testing.assert_close(output.loss, total)
    norms = output.text_features.norm(dim=-1)
    torch.testing.assert_close(norms, output.text_mask.float())
    torch.testing.assert_close(output.image_features.norm(dim=-1), torch.ones(3, 17))


def test_no_loss_unless_asked():
    output = tiny_model()(**make_inputs())
    assert {"loss", "loss_twc", "itm_logits"}.isdisjoint(output.keys())


@pytest.mark.parametrize("protocol", ["corrected", "original"])
def test_bagwise_features_and_scores_follow_the_reference(protocol):
    model = tiny_model(protocol=protocol)
    inputs = make_inputs()
    output = model(**inputs)
    pooled = reference.bag_pool(output.text_embeds, inputs["bag_offsets"])
    mask = inputs["bag_mask"].clone()
    assert mask[1, 2], "row 1 has an empty bag that its mask counts"
    if protocol == "corrected":
        mask[1, 2] = False
    features = F.normalize(model.text_proj(pooled), dim=-1) * mask[..., None]
    torch.testing.assert_close(output.text_features, features)
    assert torch.equal(output.text_mask, mask)
    scores = reference.maxsim(
        features, output.image_features, text_mask=mask, mask_mode=model.config.mask_mode
    )
    torch.testing.assert_close(output.text_to_image, scores.text_to_image)
    torch.testing.assert_close(output.image_to_text, scores.image_to_text)


def test_an_empty_bag_is_the_projections_bias_in_the_original():
    model = tiny_model(protocol="original")
    bias = F.normalize(model.text_proj.bias, dim=0)
    torch.testing.assert_close(model(**make_inputs()).text_features[1, 2], bias)


def test_text_encoder_is_transformers_bert():
    from transformers import BertConfig, BertModel

    model = tiny_model()
    config = BertConfig(**{**BERT, "num_hidden_layers": 2})
    bert = BertModel(config, add_pooling_layer=False).eval()
    unknown = bert.load_state_dict(model.text_model.state_dict(), strict=False).missing_keys
    assert unknown == []
    inputs = make_inputs()
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    ours = model.text_model(ids, attention, mode="text").last_hidden_state
    theirs = bert(ids, attention_mask=attention).last_hidden_state
    torch.testing.assert_close(ours[attention.bool()], theirs[attention.bool()])


def test_fusion_layers_are_transformers_decoder_layers_without_causality():
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    model = tiny_model(
        vision_config={**VIT, "kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2}}
    )
    config = BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    config._attn_implementation = "eager"
    inputs = make_inputs()
    output = model(**inputs)
    states = output.text_embeds
    mask = (1 - inputs["attention_mask"][:, None, None, :].float()) * -10000.0
    for layer in model.text_model.encoder.layer[2:]:
        theirs = BertLayer(config).eval()
        theirs.load_state_dict(layer.state_dict())
        states = theirs(states, mask, encoder_hidden_states=output.image_embeds)
    ours = model.match_pairs(output.text_embeds, inputs["attention_mask"], output.image_embeds)
    torch.testing.assert_close(ours, model.itm_head(states[:, 0]))


@pytest.mark.parametrize("protocol", ["corrected", "original"])
def test_early_fusion_encodes_bags_of_embeddings(protocol):
    model = tiny_model(fusion="early", protocol=protocol)
    inputs = make_inputs()
    output = model(**inputs)
    mask = inputs["bag_mask"].clone()
    if protocol == "corrected":
        mask[1, 2] = False
    bags = reference.bag_pool(
        model.text_model.embeddings(inputs["input_ids"]), inputs["bag_offsets"]
    )
    hidden = model.text_model(inputs_embeds=bags, attention_mask=mask, mode="text")
    features = F.normalize(model.text_proj(hidden.last_hidden_state), dim=-1)
    torch.testing.assert_close(output.text_cls, features[:, 0])
    torch.testing.assert_close(output.text_features, features * mask[..., None])
    assert output.text_embeds.shape == (3, 5, 24)
    assert torch.isfinite(model(**inputs, return_loss=True).loss)


def test_early_fusion_of_a_text_without_content_does_not_depend_on_its_padding():
    inputs = make_inputs(batch=1)
    inputs["bag_mask"][:] = False
    more = dict(inputs)
    more["bag_offsets"] = F.pad(inputs["bag_offsets"], (0, 3), value=8)
    more["bag_mask"] = F.pad(inputs["bag_mask"], (0, 3))
    corrected = tiny_model(fusion="early")
    first, second = corrected(**inputs), corrected(**more)
    torch.testing.assert_close(first.text_cls, second.text_cls)
    assert first.text_to_image.item() == second.text_to_image.item() == 0.0
    # the original attends to padding there, but is finite
    original = tiny_model(fusion="early", protocol="original")
    assert torch.isfinite(original(**inputs).text_cls).all()


def test_tokenwise_masks_special_tokens_unless_original():
    inputs = make_inputs()
    output = tiny_model(interaction="tokenwise")(**inputs)
    wanted = inputs["attention_mask"].bool()
    wanted[:, 0] = False
    wanted[0, 5] = wanted[1, 7] = wanted[2, 7] = False  # [SEP]
    assert torch.equal(output.text_mask, wanted)
    original = tiny_model(interaction="tokenwise", protocol="original")(**inputs)
    assert original.text_mask.all()
    assert original.text_features.shape == (3, 8, 16)


def test_cls_token_scores_are_inner_products_and_have_no_bagwise_loss():
    model = tiny_model(interaction="cls_token")
    inputs = make_inputs()
    output = model(**inputs, return_loss=True)
    torch.testing.assert_close(output.text_to_image, output.text_cls @ output.image_cls.t())
    torch.testing.assert_close(output.image_to_text, output.text_to_image.t())
    assert output.loss_twc is None
    del inputs["bag_offsets"], inputs["bag_mask"]
    torch.testing.assert_close(model(**inputs).text_to_image, output.text_to_image)


def test_contrastive_loss_on_cls_tokens_with_several_positives():
    model = tiny_model()
    positives = torch.eye(3, dtype=torch.bool)
    positives[0, 1] = True
    output = model(**make_inputs(), positives=positives, return_loss=True)
    logits = output.text_cls @ output.image_cls.t() / model.temp
    losses = []
    for matrix, targets in ((logits, positives), (logits.t(), positives.t())):
        weights = targets / targets.sum(1, keepdim=True)
        losses.append(F.cross_entropy(matrix, weights))
    torch.testing.assert_close(output.loss_ita, sum(losses) / 2)


def test_matching_loss_uses_the_given_negatives_in_order():
    model = tiny_model()
    output = model(**make_inputs(), return_loss=True, itm_negatives=NEGATIVES)
    text, attention, image = output.text_embeds, output.text_attention_mask, output.image_embeds
    wanted = torch.cat(
        [
            model.match_pairs(text, attention, image),
            model.match_pairs(text, attention, image[NEGATIVES[0]]),
            model.match_pairs(text[NEGATIVES[1]], attention[NEGATIVES[1]], image),
        ]
    )
    torch.testing.assert_close(output.itm_logits, wanted)
    torch.testing.assert_close(output.loss_itm, F.cross_entropy(wanted, output.itm_labels))


def test_negatives_are_never_positives():
    from bagformer.models.fusion import draw_negatives

    positives = torch.eye(5, dtype=torch.bool)
    positives[0, 1:4] = True
    positives[:, 4] = True
    for similarity in (None, torch.randn(5, 5) * 20):
        for seed in range(20):
            torch.manual_seed(seed)
            drawn = draw_negatives(positives, similarity)
            assert not positives[drawn.text_rows, drawn.image_of_text].any()
            assert not positives[drawn.text_of_image, drawn.image_rows].any()
            assert drawn.text_rows.tolist() == [1, 2, 3, 4], "text 0 belongs to every image"
            assert drawn.image_rows.tolist() == [0, 1, 2, 3], "image 4 belongs to every text"


def test_hard_negatives_follow_the_similarity():
    from bagformer.models.fusion import draw_negatives

    similarity = torch.zeros(3, 3)
    similarity[0, 2] = similarity[1, 0] = 50.0
    drawn = draw_negatives(torch.eye(3, dtype=torch.bool), similarity)
    assert drawn.image_of_text[:2].tolist() == [2, 0]


def test_a_batch_of_one_has_a_loss():
    model = tiny_model()
    output = model(**make_inputs(batch=1), return_loss=True)
    assert output.itm_logits.shape == (1, 2)
    torch.testing.assert_close(
        output.loss_itm, F.cross_entropy(output.itm_logits, torch.tensor([1]))
    )
    output.loss.backward()
    assert torch.isfinite(model.text_proj.weight.grad).all()


def test_every_parameter_gets_a_gradient():
    for fusion in ("late", "early"):
        model = tiny_model(fusion=fusion)
        model(**make_inputs(), return_loss=True).loss.backward()
        without = [name for name, value in model.named_parameters() if value.grad is None]
        assert without == []


def test_temperature_of_cls_loss_is_kept_in_range():
    model = tiny_model(cls_temperature=0.9)
    model(**make_inputs(), return_loss=True)
    assert model.temp.item() == pytest.approx(0.5)
    baseline = tiny_model(cls_temperature=0.9, protocol="original", interaction="tokenwise")
    baseline(**make_inputs(), return_loss=True)
    assert baseline.temp.item() == pytest.approx(0.9)


def test_without_matching_head_there_are_no_fusion_layers():
    model = tiny_model(use_itm_head=False)
    assert len(model.text_model.encoder.layer) == 2
    output = model(**make_inputs(), return_loss=True)
    assert output.loss_itm is None
    with pytest.raises(ValueError, match="use_itm_head=False"):
        model.match_pairs(output.text_embeds, output.text_attention_mask, output.image_embeds)
    with pytest.raises(ValueError, match="without fusion layers"):
        model.text_model(
            encoder_embeds=output.text_embeds,
            encoder_hidden_states=output.image_embeds,
            mode="fusion",
        )


def test_either_side_alone():
    model = tiny_model()
    inputs = make_inputs()
    pixels = inputs.pop("pixel_values")
    text = model(**inputs)
    assert text.image_features is None and text.text_features is not None
    image = model(pixel_values=pixels)
    assert image.text_features is None and image.patch_grid == (4, 4)
    with pytest.raises(ValueError, match="needs input_ids and pixel_values"):
        model(**inputs, return_loss=True)
    with pytest.raises(ValueError, match="give input_ids, pixel_values or both"):
        model()


def test_batch_mates_change_nothing():
    model = tiny_model()
    inputs = make_inputs(batch=3)
    together = model(**inputs)
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone.text_to_image[0, 0], together.text_to_image[row, row])


@pytest.mark.parametrize("options", [{}, {"protocol": "original", "reduction": "mean"}])
def test_its_scoring_gives_its_scores_from_its_features(options):
    model = tiny_model(**options)
    output = model(**make_inputs())
    scores = maxsim(
        output.text_features,
        output.image_features,
        text_mask=output.text_mask,
        **model.config.scoring,
    )
    torch.testing.assert_close(scores.text_to_image, output.text_to_image, rtol=0, atol=0)
    swapped = {"exclude": "zero", "zero": "exclude"}[model.config.mask_mode]
    others = model.config.scoring | {"mask_mode": swapped}
    wrong = maxsim(
        output.text_features, output.image_features, text_mask=output.text_mask, **others
    )
    assert not torch.equal(wrong.image_to_text, output.image_to_text)


def test_protocol_sets_its_defaults_and_can_be_changed():
    original = tiny_config(protocol="original")
    assert original.matcher == "original" and original.mask_mode == "zero"
    assert original.masked_tokens == ["[CLS]", "[PAD]"] and original.sep_token is False
    assert original.temperature is None
    corrected = original.with_protocol("corrected")
    assert corrected.mask_mode == "exclude" and corrected.matcher == "leftmost_longest"
    assert corrected.temperature is None, "a weight of the model, not a rule"
    assert original.protocol == "original" and original.mask_mode == "zero"
    assert tiny_config().temperature == "learn"
    assert tiny_config(mask_mode="zero").mask_mode == "zero"


@pytest.mark.parametrize("changes", [{}, {"protocol": "original"}, {"use_itm_head": False}])
def test_save_and_load_are_bit_identical(tmp_path, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    loaded = BagFormerForRetrieval.from_pretrained(tmp_path).eval()
    assert loaded.config.protocol == model.config.protocol
    inputs = make_inputs()
    with torch.no_grad():
        ours, theirs = model(**inputs), loaded(**inputs)
        plain = BagFormerModel.from_pretrained(tmp_path).eval()(**inputs)
    for name in ("text_to_image", "image_to_text", "text_cls", "image_embeds"):
        assert torch.equal(ours[name], theirs[name])
        assert torch.equal(ours[name], plain[name])


def test_configuration_survives_json(tmp_path):
    config = tiny_config(protocol="original", temperature=0.5, hard_negatives=True)
    config.save_pretrained(tmp_path)
    loaded = BagFormerConfig.from_pretrained(tmp_path)
    for name in ("protocol", "matcher", "mask_mode", "masked_tokens", "sep_token", "temperature"):
        assert getattr(loaded, name) == getattr(config, name)
    assert loaded.vision_config.backbone_kwargs == VIT["kwargs"]
    assert loaded.text_config.hidden_size == BERT["hidden_size"]


def test_half_precision_and_float64(tmp_path):
    inputs = make_inputs()
    model = tiny_model()
    wide = tiny_model().double()(**inputs)
    narrow = tiny_model().to(torch.bfloat16)(**inputs)
    single = model(**inputs)
    error = (single.text_to_image - wide.text_to_image).abs().max()
    assert wide.text_to_image.dtype == torch.float64 and error < 1e-4
    assert narrow.text_features.dtype == torch.bfloat16
    assert narrow.text_to_image.dtype == torch.float32
    assert (narrow.text_to_image - wide.text_to_image).abs().max() < 0.1
    model.save_pretrained(tmp_path)
    loaded = BagFormerForRetrieval.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.text_proj.weight.dtype == torch.bfloat16


def test_gradient_checkpointing_changes_nothing():
    inputs = make_inputs()
    gradients = []
    for enabled in (False, True):
        bert = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = tiny_model(text_config=bert).train()
        if enabled:
            model.gradient_checkpointing_enable()
            assert model.vision_model.backbone.grad_checkpointing
            assert model.text_model.encoder.layer[3].gradient_checkpointing
        model(**inputs, return_loss=True, itm_negatives=NEGATIVES).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_compiles_without_a_graph_break():
    inputs = make_inputs()
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [
        one(**inputs, return_loss=True, itm_negatives=NEGATIVES).loss for one in (model, compiled)
    ]
    torch.testing.assert_close(losses[0], losses[1])
