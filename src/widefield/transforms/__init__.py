"""Random changes of `pyvips` images that read nothing before the tensor, with the names and arguments of albumentationsxl.

    import widefield.transforms as A

    transforms = A.Compose([A.CropOrPad(4096, 4096), A.Flip(p=0.5), A.ToDtype("float", scale=True), A.ToTensor()])
    image = transforms(image=pyvips.Image.new_from_file("slide.tif", level=5)[0:3])["image"]

A transform takes data by name and returns a dict with the same names. `image` is a pyvips image of 1 to many channels with
pixels of any integer or float type; `mask` (one) and `masks` (a list) are pyvips images of its size that move with it and keep
their values. Until `ToTensor`, every transform only extends a libvips pipeline: of a crop from a slide just the tiles under the
crop are ever decoded. Full intensity is the largest value of an integer type, and 1 for floats.

Composition: `Compose`, `OneOf`, `SomeOf`, `OneOrOther`, `Sequential`, `NoOp`.
Cutting and padding: `CropOrPad`, `CenterCrop`, `RandomCrop`, `Crop`, `PadIfNeeded`.
Moving: `Flip`, `HorizontalFlip`, `VerticalFlip`, `Transpose`, `RandomRotate90`, `Rotate`, `Affine`, `ElasticTransform`.
Resizing: `Resize`, `RandomScale`, `SmallestMaxSize`, `LongestMaxSize`.
Colour: `RandomBrightnessContrast`, `RandomGamma`, `HueSaturationValue`, `HEDShift`.
Filters and noise: `Blur`, `MedianBlur`, `GaussianBlur`, `Sharpen`, `GaussNoise`, `CoarseDropout`, `ChannelDropout`.
Values: `ToDtype`, `Normalize`, `ToTensor`.

Random numbers: each transform seeds a generator of its own from torch's default one at each call. So `torch.manual_seed` (and
Lightning's `seed_everything`) makes a run repeat, and the workers of a `DataLoader` draw differently, as torch seeds each of
them differently at each epoch. Python's `random` and NumPy's global state are neither used nor changed.

Worker processes: transforms pickle, so workers can be spawned. Forked workers, which are the default on Linux, hang for good if
they are forked after libvips has started its threads, as `CropOrPad` of other than 8 bits, `PadIfNeeded` with a value, the warps,
filters of neighbourhoods, `HEDShift`, `CoarseDropout`, and saving a file or `numpy` on an image do. So give the `DataLoader`
`multiprocessing_context="spawn"` if the main process uses these itself before it starts workers.

A transform of your own is a function of one pyvips image in `Lambda`, or any object that is called with data by name and returns
them as a dict:

    class Invert:
        def __call__(self, **data):
            return {**data, "image": data["image"].invert()}

Networks of this library that were given `mean` and `std` normalise by themselves: leave out `Normalize` for them. Integer
tensors, and float tensors from 0 to 1, are both right for them.
"""

from widefield.transforms.colour import HEDShift, HueSaturationValue, RandomBrightnessContrast, RandomGamma
from widefield.transforms.compose import Compose, Lambda, NoOp, OneOf, OneOrOther, Sequential, SomeOf
from widefield.transforms.crops import CenterCrop, Crop, CropOrPad, PadIfNeeded, RandomCrop
from widefield.transforms.filters import (
    Blur,
    ChannelDropout,
    CoarseDropout,
    GaussianBlur,
    GaussNoise,
    MedianBlur,
    Sharpen,
)
from widefield.transforms.flips import Flip, HorizontalFlip, RandomRotate90, Transpose, VerticalFlip
from widefield.transforms.resizing import LongestMaxSize, RandomScale, Resize, SmallestMaxSize
from widefield.transforms.tensors import Normalize, ToDtype, ToTensor
from widefield.transforms.warps import Affine, ElasticTransform, Rotate

__all__ = [
    "Affine",
    "Blur",
    "CenterCrop",
    "ChannelDropout",
    "CoarseDropout",
    "Compose",
    "Crop",
    "CropOrPad",
    "ElasticTransform",
    "Flip",
    "GaussNoise",
    "GaussianBlur",
    "HEDShift",
    "HorizontalFlip",
    "HueSaturationValue",
    "Lambda",
    "LongestMaxSize",
    "MedianBlur",
    "NoOp",
    "Normalize",
    "OneOf",
    "OneOrOther",
    "PadIfNeeded",
    "RandomBrightnessContrast",
    "RandomCrop",
    "RandomGamma",
    "RandomRotate90",
    "RandomScale",
    "Resize",
    "Rotate",
    "Sequential",
    "Sharpen",
    "SmallestMaxSize",
    "SomeOf",
    "ToDtype",
    "ToTensor",
    "Transpose",
    "VerticalFlip",
]
