"""The picture encoder: any timm backbone, seen as a CLS token followed by patches."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from bagformer.models.configuration_bagformer import BagFormerVisionConfig
from bagformer.models.inputs import check_pixels

# Parts of a classifier that forward_features of some architectures never reaches.
_HEADS = ("head", "head_dist", "fc", "classifier", "conv_head", "norm_head", "fc_norm", "attn_pool")


class Layout(NamedTuple):
    """What ``forward_features`` of a backbone returns.

    ``kind`` is ``tokens``, ``nchw`` or ``nhwc``; ``prefix`` counts the tokens before the patches;
    ``grid`` is (rows, columns) of the patches and ``width`` their size.
    """

    kind: str
    prefix: int
    has_cls: bool
    grid: tuple[int, int]
    width: int


def create_backbone(config: BagFormerVisionConfig) -> Any:
    """Make the timm model without weights from elsewhere and without a classifier."""
    if not timm.is_model(config.backbone):
        raise ValueError(f"vision_config.backbone: timm has no model named {config.backbone!r}")
    refusal: Exception | None = None
    # convnets take no img_size, and a few models no empty pooling; img_size is worth more
    for size, pool in ((True, True), (True, False), (False, True), (False, False)):
        options: dict[str, Any] = {"num_classes": 0}
        if size:
            options["img_size"] = config.image_size
        if pool:
            options["global_pool"] = ""
        options |= config.backbone_kwargs
        try:
            with torch.device("meta"):
                timm.create_model(config.backbone, pretrained=False, **options)
        except (TypeError, AssertionError, ValueError, RuntimeError) as error:
            refusal = refusal or error
            continue
        return timm.create_model(config.backbone, pretrained=False, **options)
    raise ValueError(
        f"vision_config: timm cannot make {config.backbone!r} with {config.backbone_kwargs}: "
        f"{refusal}"
    )


def _grid_of_tokens(model: nn.Module, n_tokens: int) -> tuple[int, tuple[int, int]]:
    """Number of prefix tokens and the patch grid of a token sequence."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and grid[0] * grid[1] <= n_tokens:
        return n_tokens - grid[0] * grid[1], (int(grid[0]), int(grid[1]))
    has_cls = getattr(model, "cls_token", None) is not None
    prefix = int(getattr(model, "num_prefix_tokens", 1 if has_cls else 0))
    side = round((n_tokens - prefix) ** 0.5)
    if side * side != n_tokens - prefix:
        raise ValueError(
            f"{type(model).__name__} gives {n_tokens} tokens and does not say how they are laid out"
        )
    return prefix, (side, side)


def find_layout(model: nn.Module, features: Tensor) -> Layout:
    """Read the layout off a real, meta or fake output of ``model.forward_features``."""
    name = type(model).__name__
    if not isinstance(features, Tensor) or features.dim() not in (3, 4):
        raise ValueError(
            f"forward_features of {name} must give [B, P, W] tokens or a feature map, "
            f"got {getattr(features, 'shape', type(features).__name__)}"
        )
    if features.dim() == 3:
        prefix, grid = _grid_of_tokens(model, features.shape[1])
        has_cls = prefix > 0 and getattr(model, "cls_token", None) is not None
        return Layout("tokens", prefix, has_cls, grid, features.shape[2])
    width = getattr(model, "num_features", None)
    last = str(getattr(model, "output_fmt", "")).upper() == "NHWC"
    if last or (features.shape[1] != width and features.shape[3] == width):
        rows, columns, width = features.shape[1:]
        return Layout("nhwc", 0, False, (rows, columns), width)
    width, rows, columns = features.shape[1:]
    return Layout("nchw", 0, False, (rows, columns), width)


def probe(config: BagFormerVisionConfig) -> tuple[Layout, list[str]]:
    """Run the backbone once on the meta device, or on the CPU where it cannot run there.

    Returns its layout and the names of the head parts that ``forward_features`` never enters.
    """
    for device in ("meta", "cpu"):
        with torch.device(device), torch.no_grad():
            model = create_backbone(config).eval()
            entered: set[str] = set()
            for name, child in model.named_children():
                child.register_forward_hook(lambda *_, n=name, seen=entered: seen.add(n))
            try:
                pixels = torch.zeros(1, 3, config.image_size, config.image_size)
                features = model.forward_features(pixels)
            except (RuntimeError, NotImplementedError, AssertionError) as error:
                if device == "cpu":
                    raise ValueError(
                        f"vision_config: {config.backbone!r} does not run on pictures of "
                        f"{config.image_size} pixels: {error}"
                    ) from error
                continue
            parts = dict(model.named_children())
            unused = [name for name in _HEADS if name in parts and name not in entered]
            return find_layout(model, features), unused
    raise AssertionError("the CPU run returns or raises")


class VisionEncoder(nn.Module):
    """Pictures ``[B, 3, H, W]`` to ``[B, 1 + rows * columns, W]``.

    Token 0 is the backbone's CLS token or, where it has none, the mean of the patches. Register and
    distillation tokens are dropped.
    """

    def __init__(self, config: BagFormerVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.layout, unused = probe(config)
        self.backbone: Any = create_backbone(config)
        for name in unused:
            # a parameter that no loss reaches breaks data-parallel training
            setattr(self.backbone, name, nn.Identity())
        self._checkpointing = False

    @property
    def width(self) -> int:
        return self.layout.width

    @property
    def gradient_checkpointing(self) -> bool:
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self._checkpointing = enable
        if hasattr(self.backbone, "set_grad_checkpointing"):
            try:
                self.backbone.set_grad_checkpointing(enable)
            except AssertionError as error:
                raise ValueError(
                    f"{self.config.backbone!r} has no gradient checkpointing"
                ) from error

    def _grid(self, pixel_values: Tensor, patches: int) -> tuple[int, int]:
        rows, columns = self.layout.grid
        if rows * columns == patches:
            return self.layout.grid
        embed = getattr(self.backbone, "patch_embed", None)
        if embed is None or not hasattr(embed, "dynamic_feat_size"):
            raise ValueError(f"expected {rows} x {columns} patches, the backbone gave {patches}")
        return embed.dynamic_feat_size(tuple(pixel_values.shape[-2:]))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Returns the tokens and the (rows, columns) of the patches among them."""
        weight = next(self.backbone.parameters())
        embed = getattr(self.backbone, "patch_embed", None)
        fixed = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", 0) else None
        check_pixels(weight, pixel_values, fixed)
        features = self.backbone.forward_features(pixel_values.to(weight.dtype))
        layout = self.layout
        if layout.kind == "tokens":
            patches = features[:, layout.prefix :]
            grid = self._grid(pixel_values, patches.shape[1])
        else:
            if layout.kind == "nchw":
                features = features.permute(0, 2, 3, 1)
            grid = (features.shape[1], features.shape[2])
            patches = features.flatten(1, 2)
        first = features[:, :1] if layout.has_cls else patches.mean(dim=1, keepdim=True)
        return torch.cat([first, patches], dim=1), grid

    def restore(self, names: set[str]) -> None:
        """Give the named tensors, and every buffer that no checkpoint holds, timm's own values.

        Models are loaded on the meta device first, where such tensors end up without content.
        """
        saved = self.backbone.state_dict().keys()
        own = dict(self.backbone.named_parameters()) | dict(self.backbone.named_buffers())
        wanted = {name for name in own if name not in saved} | {n for n in names if n in own}
        if not wanted:
            return
        with torch.device("cpu"), torch.no_grad():
            fresh_model = create_backbone(self.config)
            fresh = dict(fresh_model.named_parameters()) | dict(fresh_model.named_buffers())
            for name in wanted:
                own[name].copy_(fresh[name])
