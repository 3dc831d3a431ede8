"""The model against what the original code computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.original import Case, cases, model_of
from torch import Tensor

from bagformer.models.conversion import from_original
from bagformer.models.fusion import draw_negatives

ATOL, RTOL, GRAD = 2e-4, 1e-4, 1e-3


def letter_of(case: Case, kind: str) -> str:
    return case.name.removeprefix(kind + "_")[0]


def run(folder: Path, case: Case, info: dict):
    early = info["config"]["fusion_strategy"] == "early_fusion"
    model = model_of(
        folder,
        letter_of(case, info["kind"]),
        fusion="early" if early else "late",
        interaction=info["kind"],
    )
    negatives = (case["neg_image_idx"], case["neg_text_idx"])
    return model, model(**case.inputs(), return_loss=True, itm_negatives=negatives)


def check(case: Case, key: str, actual: Tensor) -> None:
    # a text whose every key is masked: its logits of about -10000 are steps of 1e-3 apart
    atol = 2e-3 if "edge" in case.name and "early" in case.name else ATOL
    torch.testing.assert_close(actual.detach(), case[key], rtol=RTOL, atol=atol, msg=None)


def check_gradients(case: Case, model: torch.nn.Module) -> None:
    parameters = dict(model.named_parameters())
    recorded = case.starting("grad/")
    assert recorded
    for name, expected in recorded.items():
        actual = parameters[from_original(name)].grad
        actual = torch.zeros_like(expected) if actual is None else actual
        worst = (actual - expected).abs().max()
        assert worst <= GRAD * expected.abs().max() + 1e-9, f"{case.name} {name}: {worst}"


def features_of(model, output, case: Case) -> None:
    check(case, "visual_encoder", output.image_embeds)
    check(case, "text_mode_text", output.text_embeds)
    check(case, "itm_logits", output.itm_logits)
    check(case, "loss_itm", output.loss_itm)
    check(case, "image_feat_cls", output.image_cls)
    if "text_feat_cls" in case:
        check(case, "text_feat_cls", output.text_cls)


def test_bagwise_model_matches_the_original(golden):
    found = cases(golden, "bagwise")
    assert found
    for case, info in found:
        model, output = run(golden, case, info)
        features_of(model, output, case)
        for key, actual in {
            "text_feats": output.text_features,
            "image_feats": output.image_features,
            "sim_i2t": output.image_to_text,
            "sim_t2i": output.text_to_image,
            "loss_ita": output.loss_ita,
            "loss_twc": output.loss_twc,
            "temp_after": model.temp,
        }.items():
            check(case, key, actual)
        output.loss.backward()
        check_gradients(case, model)


def test_fusion_states_match_the_original(golden):
    for case, info in cases(golden, "bagwise"):
        model, output = run(golden, case, info)
        states = output.text_embeds, output.text_attention_mask, output.image_embeds
        fused = model.text_model(
            encoder_embeds=states[0],
            attention_mask=states[1],
            encoder_hidden_states=states[2],
            mode="fusion",
        ).last_hidden_state
        check(case, "fusion_pos", fused)
        torch.testing.assert_close(model.match_pairs(*states), model.itm_head(fused[:, 0]))


def test_seeds_draw_the_negatives_that_the_original_drew(golden):
    drawn = 0
    for case, info in cases(golden, "bagwise"):
        if "pair" in case.name:
            continue  # forced there, not drawn
        torch.manual_seed(info["torch_manual_seed_before_forward"])
        negatives = draw_negatives(torch.eye(len(case["image"]), dtype=torch.bool))
        assert negatives.image_of_text.tolist() == case["neg_image_idx"].tolist()
        assert negatives.text_of_image.tolist() == case["neg_text_idx"].tolist()
        drawn += 1
    assert drawn


def queue_loss(model, folder: Path, case: Case, info: dict, output) -> tuple[Tensor, dict]:
    """The baselines' contrastive loss against momentum features and queues, restated."""
    letter = letter_of(case, info["kind"])
    state = load_file(folder / f"model_{letter}.safetensors")
    momentum = info["config"]["momentum"]
    slow = {}
    for name, value in model.named_parameters():
        prefix, _, rest = (
            name.replace("vision_model.backbone.", "visual_encoder.")
            .replace("text_model.", "text_encoder.")
            .partition(".")
        )
        key = f"{prefix}_m.{rest}"
        if key in state:
            slow[name] = state[key] * momentum + value.detach() * (1 - momentum)
    inputs = case.inputs()
    with torch.no_grad():
        own = torch.func.functional_call(model, slow, kwargs=inputs)
    queues = {side: state[f"{side}_queue"] for side in ("image", "text")}
    images = torch.cat([own.image_cls.t(), queues["image"]], dim=1)
    texts = torch.cat([own.text_cls.t(), queues["text"]], dim=1)
    idx = case["idx"].view(-1, 1)
    same = (idx == torch.cat([idx.t(), state["idx_queue"]], dim=1)).float()
    targets = same / same.sum(dim=1, keepdim=True)
    losses = []
    for mine, others in ((output.image_cls, texts), (output.text_cls, images)):
        logits = mine @ others / model.temp
        losses.append(-(F.log_softmax(logits, dim=1) * targets).sum(dim=1).mean())
    return sum(losses) / 2, slow


@pytest.mark.parametrize("kind", ["tokenwise", "cls_token"])
def test_baselines_match_the_original(golden, kind):
    """Features, scores, token-wise and matching losses; and, restating in the test the queues and
    momentum copies that our model does not keep, the contrastive loss and every gradient."""
    found = cases(golden, kind)
    assert found
    for case, info in found:
        assert info["alpha"] == 0 or not info["config"]["distill"]
        model, output = run(golden, case, info)
        features_of(model, output, case)
        check(case, "temp_after", model.temp)
        losses = [output.loss_itm]
        if kind == "tokenwise":
            check(case, "text_feats", output.text_features)
            check(case, "image_feats", output.image_features)
            check(case, "sim_i2t", output.image_to_text)
            check(case, "sim_t2i", output.text_to_image)
            check(case, "loss_twc", output.loss_twc)
            losses.append(output.loss_twc)
        else:
            assert output.loss_twc is None
        ita, slow = queue_loss(model, golden, case, info, output)
        check(case, "loss_ita", ita)
        for name, expected in case.starting("momentum_after/").items():
            key = from_original(name.replace("_m.", "."))
            torch.testing.assert_close(slow[key], expected, rtol=1e-5, atol=1e-6)
        (ita + sum(losses)).backward()
        check_gradients(case, model)
