"""Our losses in transformers' models, tiny and at random: its numbers, key by key and parameter by
parameter."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detloss_triton.integrations.transformers import apply_to, register, unregister

transformers = pytest.importorskip("transformers")

CLASSES = 5
# With queries for denoising.
DENOISING = {"rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2", "d_fine": "DFine", "deimv2": "Deimv2"}
ONE_STAGE = {
    "detr": "Detr",
    "conditional_detr": "ConditionalDetr",
    "deformable_detr": "DeformableDetr",
    "dab_detr": "DabDetr",
}
# With groups of queries.
GROUPED = {"lw_detr": "LwDetr", "rf_detr": "RfDetr"}
KINDS = {
    name: kind
    for name, kind in {**DENOISING, **ONE_STAGE, **GROUPED}.items()
    if hasattr(transformers, f"{kind}Config")
}
ONLY_FLOAT32 = "dab-detr"
LOCAL = ("d_fine", "deimv2")
over_models = pytest.mark.parametrize("name", KINDS)


def config_of(name: str, **more: Any) -> Any:
    kind = getattr(transformers, f"{KINDS[name]}Config")
    common = {
        "num_labels": CLASSES,
        "num_queries": 20,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "dropout": 0.0,
        **more,
    }
    if name in GROUPED:
        return kind(**grouped(name), **common)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    if name in ONE_STAGE:
        levels = ["stage2", "stage3", "stage4"] if name == "deformable_detr" else ["stage4"]
        backbone = transformers.ResNetConfig(**sizes, layer_type="basic", out_features=levels)
        plain = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
        return kind(**{"auxiliary_loss": True, **plain, "backbone_config": backbone, **common})
    backbone = transformers.RTDetrResNetConfig(
        **sizes, layer_type="basic", out_features=["stage2", "stage3", "stage4"]
    )
    widths = {"encoder_in_channels": [16] * 3, "decoder_in_channels": [32] * 3}
    return kind(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        feat_strides=[8, 16, 32],
        decoder_n_points=2,
        num_denoising=10,
        **widths,
        **common,
    )


def grouped(name: str) -> dict[str, Any]:
    """What only these are given; their transformer's sizes have other names."""
    heads = {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2}
    common = {"group_detr": 3, "decoder_n_points": 2, "projector_out_channels": 32, **heads}
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 96,
        "patch_size": 16,
        "out_features": ["stage1", "stage2"],
        "num_windows": 4,
    }
    if name == "lw_detr":
        backbone = transformers.LwDetrViTConfig(
            **sizes, pretrain_image_size=96, window_block_indices=[0]
        )
        return {"backbone_config": backbone, "projector_scale_factors": [1.0], **common}
    backbone = transformers.RfDetrDinov2Config(
        **{**sizes, "patch_size": 12}, window_block_indexes=[0]
    )
    return {"backbone_config": backbone, **common}


def model_of(name: str, **more: Any) -> Any:
    """In training, with parameters far enough from where they begin that no two layers agree."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(transformers, f"{KINDS[name]}ForObjectDetection")(config_of(name, **more))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return made.train()


def batch(*counts: int, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for n in counts:
        centres = 0.3 + 0.4 * torch.rand(n, 2, generator=generator)
        boxes = torch.cat([centres, 0.1 + 0.3 * torch.rand(n, 2, generator=generator)], 1)
        classes = torch.randint(0, CLASSES, (n,), generator=generator)
        labels.append({"class_labels": classes, "boxes": boxes})
    images = torch.randn(len(counts), 3, 96, 96, generator=generator)
    return {"pixel_values": images, "labels": labels}


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, dict):
        return {key: cast(entry, dtype) for key, entry in x.items()}
    return [cast(entry, dtype) for entry in x] if isinstance(x, (list, tuple)) else x


def step(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """(output, gradients by parameter), with the same denoising queries each time."""
    torch.manual_seed(3)
    out = model(**inputs)
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out, gradients


def assert_parity(ours: Any, theirs: Any, inputs: dict[str, Any]) -> None:
    """The models are in float64, in which rounding does not part them; the losses in float32, as
    some of theirs know nothing else."""
    steps = []
    for model in (copy.deepcopy(ours), copy.deepcopy(theirs)):
        loss = model.loss_function
        model.loss_function = lambda *args, loss=loss, **named: loss(
            *cast(args, torch.float32), **cast(named, torch.float32)
        )
        dtype = torch.float32 if model.config.model_type == ONLY_FLOAT32 else torch.float64
        steps.append(step(model.to(dtype), cast(inputs, dtype)))
    (ours, gradients), (theirs, expected) = steps
    names = {key for key in theirs.loss_dict if not key.startswith("cardinality")}
    assert set(ours.loss_dict) == names
    for key in names:
        torch.testing.assert_close(
            ours.loss_dict[key], theirs.loss_dict[key], rtol=1e-5, atol=1e-6, msg=key
        )
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=1e-5 * largest, msg=key)


@over_models
@pytest.mark.parametrize("counts", [(2, 3), (0, 4)], ids=str)
def test_losses_and_gradients_are_those_of_transformers(name: str, counts: tuple[int, ...]) -> None:
    theirs = model_of(name)
    ours = apply_to(copy.deepcopy(theirs), compatible=True)
    assert_parity(ours, theirs, batch(*counts))
    found, _ = step(ours, batch(*counts))
    assert [set(x) for x in found.auxiliary_outputs][-1] == {"logits", "pred_boxes"}
    # D-FINE's differ by default, the others' do not.
    plain = apply_to(copy.deepcopy(theirs))
    other, _ = step(plain, batch(*counts))
    assert torch.equal(other.loss, found.loss) == (name not in LOCAL)


@over_models
def test_in_evaluation(name: str) -> None:
    """Without denoising queries, and of one group, as there are no others."""
    theirs = model_of(name).eval()
    ours = apply_to(copy.deepcopy(theirs), compatible=True)
    theirs.config.group_detr = 1
    assert_parity(ours, theirs, batch(1, 3))
    assert ours(batch(1, 3)["pixel_values"]).loss is None


@over_models
def test_settings_are_the_configurations(name: str) -> None:
    """Weights, costs and constants, other than the defaults."""
    rates = (
        {"bbox_loss_coefficient": 3, "giou_loss_coefficient": 7, "class_cost": 3}
        | {"bbox_cost": 1, "giou_cost": 4}
        | ({"eos_coefficient": 0.3} if name == "detr" else {"focal_alpha": 0.4})
        if name not in DENOISING
        else {"weight_loss_vfl": 2.0, "weight_loss_bbox": 3.0, "weight_loss_giou": 0.5}
        | {"focal_loss_alpha": 0.6, "focal_loss_gamma": 1.5, "matcher_alpha": 0.4}
        | {"matcher_gamma": 1.5, "matcher_class_cost": 3.0, "matcher_giou_cost": 4.0}
    )
    if name in LOCAL:
        rates |= {"weight_loss_fgl": 0.4, "weight_loss_ddf": 2.5, "max_num_bins": 16}
        rates |= {"reg_scale": 3.0, "up": 0.7}
    if name == "deimv2":
        rates |= {"weight_loss_mal": 0.7, "mal_alpha": 0.6}
    if name not in DENOISING:
        rates["auxiliary_loss"] = False  # the others' would then be of denoising queries
    theirs = model_of(name, **rates)
    ours = apply_to(copy.deepcopy(theirs), compatible=True)
    assert_parity(ours, theirs, batch(2, 3))


@pytest.mark.parametrize("name", [name for name in LOCAL if name in KINDS])
def test_boxes_beyond_the_image(name: str) -> None:
    """Of the last layer, some of which are wider than an image, or of negative size."""
    model = model_of(name)
    theirs, ours = model.loss_function, apply_to(copy.deepcopy(model), True).loss_function
    losses = []

    def both(logits: Tensor, labels: Any, device: Any, boxes: Tensor, *more: Any, **named: Any):
        wide = torch.cat([boxes[..., :2], 3 * boxes[..., 2:] - 0.5], -1)
        assert (wide[..., 2:] < 0).any() and (wide > 1).any()
        for loss in (theirs, ours):
            losses.append(loss(logits, labels, device, wide, *more, **named)[1])
        return theirs(logits, labels, device, boxes, *more, **named)

    model.loss_function = both
    step(model, batch(2, 3))
    for key, expected in losses[0].items():
        torch.testing.assert_close(losses[1][key], expected, rtol=2e-5, atol=1e-6, msg=key)


def test_dfine_by_default_pairs_each_layer_with_its_own() -> None:
    """As its paper: every layer of the decoder has all losses, and that before it has its own."""
    out, gradients = step(apply_to(model_of("d_fine")), batch(2, 3))
    kinds = {key.removeprefix("loss_").split("_", 1)[-1] for key in out.loss_dict if "vfl" in key}
    layers = {"aux_0", "aux_1", "pre", "enc_0", "dn_0", "dn_1", "dn_2", "dn_pre", "vfl"}
    assert kinds == layers
    taught = {key for key in out.loss_dict if "ddf" in key}
    assert taught == {f"loss_ddf_{x}" for x in ("aux_0", "aux_1", "dn_0", "dn_1", "dn_2")}
    assert {"loss_fgl", "loss_fgl_aux_1", "loss_fgl_dn_2"} <= set(out.loss_dict)
    last = [key for key in gradients if "bbox_embed.2" in key or "class_embed.2" in key]
    assert last and all(gradients[key].any() for key in last)


@over_models
def test_a_model_may_be_copied_and_saved(name: str, tmp_path: Path) -> None:
    plain = model_of(name)
    model = apply_to(copy.deepcopy(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    expected, _ = step(model, batch(2, 3))
    others = [copy.deepcopy(model)]
    if name in GROUPED:  # transformers' own models of these cannot be pickled
        others[0].loss_function = pickle.loads(pickle.dumps(model.loss_function))
    else:
        others.append(pickle.loads(pickle.dumps(model)))
    for other in others:
        assert torch.equal(step(other, batch(2, 3))[0].loss, expected.loss)
    model.save_pretrained(tmp_path)
    assert torch.equal(step(model, batch(2, 3))[0].loss, expected.loss)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert torch.equal(step(apply_to(loaded), batch(2, 3))[0].loss, expected.loss)


@pytest.fixture
def registered() -> Iterator[None]:
    register(compatible=True)
    register(compatible=True)  # once more changes nothing
    yield
    unregister()


@over_models
def test_losses_of_all_models_may_be_ours(name: str, registered: None) -> None:
    """Of a model that was made before as well as of one that is made now."""
    found, gradients = step(model_of(name), batch(2, 3))
    unregister()
    applied, expected = step(apply_to(model_of(name), compatible=True), batch(2, 3))
    theirs, _ = step(model_of(name), batch(2, 3))
    assert set(found.loss_dict) == set(applied.loss_dict)
    assert torch.equal(found.loss, applied.loss)
    assert all(torch.equal(gradients[key], expected[key]) for key in expected)
    assert any("cardinality" in key for key in theirs.loss_dict) == (name not in DENOISING)


def test_a_registered_loss_is_not_that_of_other_models(registered: None) -> None:
    """YOLOS finds its loss where DETR does."""
    config = transformers.YolosConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=[32, 32],
        num_detection_tokens=5,
        num_labels=CLASSES,
    )
    model = transformers.YolosForObjectDetection(config)
    labels = batch(2)["labels"]
    assert "cardinality_error" in model(torch.zeros(1, 3, 32, 32), labels=labels).loss_dict


@pytest.mark.parametrize("name", ["rt_detr", "d_fine"])
def test_a_training_goes_as_with_transformers(name: str) -> None:
    curves = []
    for ours in (False, True):
        model = model_of(name)
        model = apply_to(model, compatible=True) if ours else model
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        losses = []
        for i in range(20):
            optimizer.zero_grad()
            out, _ = step(model, batch(2, 3, seed=i % 4))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(out.loss.detach())
        curves.append(torch.stack(losses))
    theirs, found = curves
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=0)
    assert theirs[-4:].mean() < theirs[:4].mean()


def test_a_trainer_trains(tmp_path: Path) -> None:
    """It logs and saves, and goes as with transformers' losses."""
    pytest.importorskip("accelerate")
    examples = [batch(2, seed=i) for i in range(8)]

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        images = torch.cat([x["pixel_values"] for x in chosen])
        return {"pixel_values": images, "labels": [label for x in chosen for label in x["labels"]]}

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_steps=4,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
    )
    curves = []
    for model in (model_of("rt_detr"), apply_to(model_of("rt_detr"))):
        trainer = transformers.Trainer(model, arguments, collate, examples)
        trainer.train()
        curves.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
    assert len(curves[0]) == 4 and curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert list(tmp_path.glob("checkpoint-4/*.safetensors"))


def test_other_models_are_refused() -> None:
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=transformers.ResNetConfig(), backbone=None
    )
    of_masks = type("DetrForSegmentation", (nn.Module,), {"config": config})
    for model in (nn.Linear(2, 2), of_masks()):
        with pytest.raises(TypeError, match="model must be transformers' ForObjectDetection of"):
            apply_to(model)
