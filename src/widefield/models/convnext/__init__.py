"""ConvNeXts that stream."""

from widefield.models.convnext.convnext import StreamingConvNeXt

StreamingConvnext = StreamingConvNeXt  # lightstream's spelling

__all__ = ["StreamingConvNeXt", "StreamingConvnext"]
