"""Any network of timm."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import timm
import torch
from timm.models import load_checkpoint
from torch import Tensor, nn

from widefield.components.backbones.base_backbone import (
    StreamableBackbone,
    StreamingOptions,
    check_frozen_stages,
    parse_out_indices,
)
from widefield.components.component import InitConfig
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, suggestion


@MODELS.register_module()
class TimmBackbone(StreamableBackbone):
    """Any network of timm, by name.

    Args:
        name: A name of `timm.list_models()`, with the tag of its weights if wanted: `resnet50.a1_in1k`.
        pretrained: Fetch timm's weights.
        checkpoint_path: A file of weights of this network, or of a classifier with it, as timm saves them.
        in_channels: Channels of the image.
        out_indices: Which of the maps (N, C, H, W) in `timm.create_model(name).feature_info` are returned, from 0; negative ones
            count from the end. None returns the final features, as `forward_features` gives them.
        features_only: Return the maps that timm's option of this name does, where `out_indices` says nothing else; and load
            checkpoints of MMPretrain's `TIMMBackbone` that has it.
        global_pool: Return the final features (N, C) as the network's own head pools and normalises them.
        frozen_stages: Everything up to the map of this index does not train; -1 freezes nothing.
        norm_eval: Batch norms stay in evaluation mode; their affine weights train.
        options: More arguments of the network, such as `{drop_path_rate: 0.1}` or `{img_size: 256}`.
        streaming: See `StreamableBackbone`; for networks of convolutions.
        init_cfg: See `Component`; None keeps timm's weights.

    Raises:
        OSError: The weights cannot be fetched or read.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint_path: str = "",
        in_channels: int = 3,
        out_indices: int | Sequence[int] | None = None,
        global_pool: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        options: dict[str, Any] | None = None,
        streaming: StreamingOptions | None = None,
        init_cfg: InitConfig = None,
        features_only: bool = False,
    ) -> None:
        super().__init__(streaming, init_cfg)
        name = name.removeprefix("timm/")
        if not timm.is_model(name):
            raise WrongArgumentError(f"timm has no network named {name!r}; {suggestion(name, timm.list_models())}")
        if global_pool and (features_only or out_indices is not None):
            asking = "features_only" if out_indices is None else f"out_indices={out_indices}"
            raise WrongArgumentError(f"global_pool pools the final features, {asking} asks for maps")
        try:
            self.model: Any = timm.create_model(name, pretrained, in_chans=in_channels, num_classes=0, **options or {})
        except TypeError as error:
            raise WrongArgumentError(f"{name} does not take options={options}: {error}") from error
        if checkpoint_path:
            missing = load_checkpoint(self.model, checkpoint_path, strict=False).missing_keys  # classifiers have more
            if missing:
                raise WrongArgumentError(f"{checkpoint_path} is not of {name}: it lacks {', '.join(missing[:3])}")
        maps: list[dict[str, Any]] = getattr(self.model, "feature_info", [])
        self.name = name
        self.options = options or {}
        self.features_only = features_only
        if features_only and out_indices is None:
            out_indices = self.features_network().feature_info.out_indices
        if out_indices is not None and not (maps and hasattr(self.model, "forward_intermediates")):
            raise WrongArgumentError(f"timm gives no maps of {name} between its layers; leave out_indices away")
        check_frozen_stages(frozen_stages, -1, len(maps) - 1)
        self.out_indices = None if out_indices is None else parse_out_indices(out_indices, len(maps))
        self.global_pool = global_pool
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self._last_frozen = str(maps[frozen_stages]["module"]) if frozen_stages >= 0 else None
        self.train(self.training)  # freezes the stages

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.out_indices is not None:
            return tuple(
                self.model.forward_intermediates(
                    x, indices=list(self.out_indices), stop_early=True, output_fmt="NCHW", intermediates_only=True
                )
            )
        x = self.model.forward_features(x)
        return (self.model.forward_head(x, pre_logits=True) if self.global_pool else x,)

    def features_network(self) -> Any:
        """Return the network, without weights, that timm makes with `features_only=True`; parts of it have other names.

        Raises:
            WrongArgumentError: It has no such option.
        """
        try:
            with torch.device("meta"):
                return timm.create_model(self.name, features_only=True, **self.options)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise WrongArgumentError(f"timm gives no maps of {self.name}: {error}; leave features_only away") from error

    def frozen_parts(self) -> Iterable[nn.Module]:
        if self._last_frozen is not None:
            yield nn.ParameterList(self.model.parameters(recurse=False))  # tokens and position embeddings
            yield from _up_to(self.model, self._last_frozen)


def _up_to(module: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the parts of `module` that are defined before the one at `path`, and that one."""
    name, _, rest = path.partition(".")
    for child_name, child in module.named_children():
        if child_name == name:
            yield from _up_to(child, rest) if rest else [child]
            return
        yield child
