"""timm's ConvNeXt (Liu et al. 2022) with experts in its blocks."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from cmoe.backbones.base import Backbone, Features
from cmoe.backbones.experts import ExpertLayers, select
from cmoe.backbones.pretrained import create
from cmoe.config.types import Fraction, PositiveInt
from cmoe.errors import UserError
from cmoe.moe import MoELayer, RouteContext, passed_on


class ConvNet(Backbone):
    """ConvNeXt from timm; the pointwise feed-forward networks of its blocks become layers of experts.

    Experts of kind `conv` work on whole feature maps, all others on each pixel by itself.

    Options:
        model: timm's name; with `pretrained` the sizes below must stay unset.
        pretrained: load timm's weights (downloaded once, or found in the usual cache).
        depths: blocks in each of the four stages.
        dims: channels of each of the four stages.
        patch: stride of the stem in pixels.
        drop_path: stochastic depth while training.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    unit: ClassVar[int] = 2

    def __init__(
        self,
        model: str = "convnext_atto",
        pretrained: bool = False,
        depths: list[PositiveInt] | None = None,
        dims: list[PositiveInt] | None = None,
        patch: PositiveInt | None = None,
        drop_path: Fraction = 0.0,
        *,
        input_shape: tuple[int, ...],
        vocabulary: int | None = None,
        experts: ExpertLayers | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"in_chans": input_shape[0], "drop_path_rate": drop_path}
        if not pretrained:
            options |= {"depths": tuple(depths or (1, 1, 2, 1)), "dims": tuple(dims or (24, 32, 48, 64))}
            options |= {"patch_size": patch or 2}
            if len(options["depths"]) != 4 or len(options["dims"]) != 4:
                raise UserError("model.depths, model.dims: expected four numbers each, one a stage")
            side, got = min(input_shape[1:]), options["patch_size"]
            if side < _least(got):
                most = max((p for p in range(1, side) if _least(p) <= side), default=1)
                raise UserError(
                    f"model.patch: expected {f'at most {most}' if most < got else most} for images of {input_shape[1]}x"
                    f"{input_shape[2]} pixels, a patch of {got} takes {_least(got)} a side, got {got}"
                )
        elif depths or dims or patch:
            raise UserError("model.pretrained: expected depths, dims and patch unset, they belong to the weights")
        self.net = create(model, "model.model", pretrained, **options)
        if not hasattr(self.net, "stages") or not hasattr(self.net, "norm_pre"):
            raise UserError(f"model.model: expected a ConvNeXt of timm, got '{model}'")
        self.width = int(self.net.num_features)
        blocks = [(s, b) for s, stage in enumerate(self.net.stages) for b in range(len(stage.blocks))]
        for i in select(experts, len(blocks)):
            assert experts is not None
            block = self.net.stages[blocks[i][0]].blocks[blocks[i][1]]
            dim = block.conv_dw.out_channels
            mlp = _Pointwise(block.mlp) if block.use_conv_mlp else block.mlp
            hidden = block.mlp.fc1.weight.shape[0]
            block.mlp = experts.layer(dim, hidden, instead_of=lambda mlp=mlp: mlp)

    def forward(self, x: Tensor, context: RouteContext) -> Features:
        routings: dict = {}
        h = self.net.stem(x)
        for s, stage in enumerate(self.net.stages):
            h = stage.downsample(h)
            for b, block in enumerate(stage.blocks):
                if isinstance(block.mlp, MoELayer):
                    name = f"net.stages.{s}.blocks.{b}.mlp"
                    h = self._expert_block(h, block, context, name, routings)
                    context = passed_on(context, routings[name])
                else:
                    h = block(h)
        return Features(self.net.forward_head(self.net.norm_pre(h), pre_logits=True), routings)

    @staticmethod
    def _expert_block(x: Tensor, block: Any, context: RouteContext, name: str, routings: dict) -> Tensor:
        """timm's block forward, with the routing context handed to its experts."""
        h = block.conv_dw(x)
        # experts work on channels-last tokens; the norm of timm's models with convolutions as networks does not
        h = block.norm(h).permute(0, 2, 3, 1) if block.use_conv_mlp else block.norm(h.permute(0, 2, 3, 1))
        y, routings[name] = block.mlp(h, context)
        y = y.permute(0, 3, 1, 2)
        if block.gamma is not None:
            y = y * block.gamma.reshape(1, -1, 1, 1)
        return block.drop_path(y) + block.shortcut(x)


def _least(patch: int) -> int:
    """The side of the smallest image: three stages halve what the stem leaves, and all four behind a patch of 2."""
    return patch * (16 if patch == 2 else 8)


class _Pointwise(nn.Module):
    """A network of 1 × 1 convolutions on vectors (..., D)."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.reshape(-1, x.shape[-1], 1, 1)).view(*x.shape[:-1], -1)
