"""ConvNeXts that stream."""

from widefield.models.convnext.convnext import StreamingConvNeXt

StreamingConvnext = StreamingConvNext = StreamingConvNeXt  # lightstream's spellings, of 0.0.x and 1.x

__all__ = ["StreamingConvNeXt", "StreamingConvNext", "StreamingConvnext"]
