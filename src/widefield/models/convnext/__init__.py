"""ConvNeXts that stream."""

from widefield.models.convnext.convnext import StreamingConvNeXt, StreamingConvNext, StreamingConvnext

__all__ = ["StreamingConvNeXt", "StreamingConvNext", "StreamingConvnext"]
