"""Data loaders, data sets and pipelines of MMPretrain as ours."""

from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any

from widefield.cli.mmpretrain.entries import Entries, Notes, bare, listed, plain
from widefield.config.config import Path
from widefield.registry import TRANSFORMS

Description = dict[str, Any]
_NOTHING_TO_DO = ("PackInputs", "Collect", "ImageToTensor", "ToTensor", "ToPIL", "ToNumpy", "NumpyToPIL", "PILToNumpy")
_MASKS = ("BEiTMaskGenerator", "RandomMaskGenerator")
_FOLDERS = ("CustomDataset", "ImageNet", "ImageNet21k")
_MULTI_LABEL = ("MultiLabelDataset",)
_WRAPPERS = ("RepeatDataset", "ConcatDataset", "ClassBalancedDataset", "KFoldDataset")


def data(old: Mapping[str, Any], notes: Notes) -> Description:
    """Return the section `data`: the data sets of the three loaders, and the batch size of the first."""
    made: Description = {"type": "Datasets"}
    for phase in ("train", "val", "test"):
        key = f"{phase}_dataloader"
        if not old.get(key) or (phase == "test" and old[key] == old.get("val_dataloader")):
            continue
        loader = Entries(old[key], (key,), notes)
        described = loader.take("dataset")
        if described:
            made[phase] = _dataset(described, (key, "dataset"), phase, notes)
        batch, workers = loader.take("batch_size", 1), loader.take("num_workers", 0)
        drops = loader.take("drop_last", False)
        made.setdefault("batch_size", batch)
        made.setdefault("num_workers", workers)
        if phase == "train" and drops:
            made["drop_last"] = True
        sampler = Entries(loader.take("sampler") or {}, (key, "sampler"), notes)
        if sampler.type not in ("", "DefaultSampler", "SequentialSampler"):
            sampler.missing("each image comes once in an epoch")
        elif phase == "train" and sampler.take("shuffle", True) is False:
            sampler.note("training images are shuffled", "shuffle")
        loader.finish("persistent_workers", "pin_memory", "collate_fn", "prefetch_factor")
    return made if len(made) > 1 else {}


def prototype(old: Description, notes: Notes) -> Description:
    """Return the collection of a retriever, which theirs describes as a data loader."""
    path = ("model", "prototype")
    loader = Entries(old, path, notes)
    made: Description = {"dataset": _dataset(loader.take("dataset") or {}, (*path, "dataset"), "val", notes)}
    return made | loader.present(batch_size="batch_size", num_workers="num_workers")


def reads_rgb(old: Mapping[str, Any]) -> bool:
    """Return True if the images of their pipeline are in the order of RGB: those of CIFAR are, files are read as BGR."""
    loader = old.get("train_dataloader") or old.get("val_dataloader") or old.get("test_dataloader") or {}
    pipeline = (loader.get("dataset") or {}).get("pipeline") or ()
    names = [bare(one.get("type")) for one in pipeline]
    return bool(names) and names[0] not in ("LoadImageFromFile", "ApplyToList")


def _dataset(old: Mapping[str, Any], path: Path, phase: str, notes: Notes) -> Description:
    entries = Entries(old, path, notes)
    if entries.type in _WRAPPERS:
        entries.missing("what it wraps is taken once")
        inner = listed(entries.take("dataset") or entries.take("datasets"))
        return _dataset(inner[0], (*path, "dataset"), phase, notes)
    masks: Description = {}
    transforms = pipeline(entries.take("pipeline"), (*path, "pipeline"), notes, masks)
    root = str(entries.take("data_root", "") or "")
    if entries.type in ("CIFAR10", "CIFAR100"):
        training = entries.take("split", "train") == "train" and not entries.take("test_mode", False)
        made: Description = {"type": entries.type, "root": root, "train": training}
        harmless: tuple[str, ...] = ("download", "metainfo", "data_prefix")
    else:
        made = _files(entries, FilePath(root), phase)
        harmless = ("test_mode", "lazy_init", "serialize_data", "multi_label")
    made["transforms"] = transforms
    if masks:
        made["mask_generator"] = masks
    entries.finish(*harmless)
    return {key: value for key, value in made.items() if value or key == "train"}


def _files(entries: Entries, root: FilePath, phase: str) -> Description:
    """Return a data set of files in folders, or of those that a text file names."""
    if entries.type not in (*_FOLDERS, *_MULTI_LABEL):
        entries.missing("an ImageFolder stands in its place: arrange the images, or name a data set")
    prefix = entries.take("data_prefix", "")
    prefix = prefix.get("img_path", "") if isinstance(prefix, Mapping) else prefix
    split = entries.take("split", "")
    names = entries.take("classes") or (entries.take("metainfo") or {}).get("classes")
    ann_file = str(entries.take("ann_file", "") or "")
    folder = root / (prefix or (split if entries.type in _FOLDERS else ""))
    if not ann_file and split and (root / "meta" / f"{split}.txt").is_file():
        ann_file = f"meta/{split}.txt"
    with_label = entries.take("with_label", True)
    listed_there = bool(ann_file) and (entries.type != "ImageNet" or (root / ann_file).is_file() or not root.is_dir())
    if not listed_there or (entries.type == "ImageNet" and phase == "train"):
        return {"type": "ImageFolder", "root": folder.as_posix(), **({} if with_label else {"with_label": False})}
    made: Description = {"type": "AnnotationFile", "root": folder.as_posix(), "ann_file": (root / ann_file).as_posix()}
    if entries.type in _MULTI_LABEL:
        made["multi_label"] = True
    if isinstance(names, list):
        made["class_names"] = names
    elif names:
        entries.note("class names in a file are not read; write them as class_names", "classes")
    return made


def pipeline(steps: Any, path: Path, notes: Notes, masks: Description | None = None) -> list[Description]:
    """Return the transforms that steps of a pipeline are; of a mask generator the description goes to `masks`."""
    made = []
    for k, step in enumerate(steps or ()):
        entries = Entries(step, (*path, str(k)), notes)
        name = entries.type
        if name in _NOTHING_TO_DO:
            continue
        if name in _MASKS and masks is not None:
            masks |= {**step, "type": name}
        elif name in _STEPS:
            made += _STEPS[name](entries)
            entries.finish(*_HARMLESS)
        elif name.startswith("torchvision/"):
            made.append({**step, "type": name.partition("/")[2]})
        elif name in TRANSFORMS:
            made.append({**step, "type": name})
        else:
            entries.missing("it was left out")
    return made


_HARMLESS = ("backend", "clip_border", "pad_val", "io_backend", "file_client_args", "backend_args", "imdecode_backend")


def _load(entries: Entries) -> list[Description]:
    colour = entries.take("color_type", "color")
    if entries.take("to_float32", False):
        entries.note("images keep their type until they are normalised", "to_float32")
    return {"grayscale": [{"type": "Grayscale"}], "unchanged": []}.get(colour, [{"type": "RGB"}])


def _resampled(entries: Entries) -> Description:
    """Return how pixels are computed: Pillow averages the pixels of a large image where OpenCV takes single ones."""
    backend, interpolation = entries.take("backend", "cv2"), entries.take("interpolation", "bilinear")
    if interpolation not in ("nearest", "bilinear", "bicubic"):
        entries.note(f"{interpolation} is bicubic here", "interpolation")
        backend, interpolation = "pillow", "bicubic"
    made = {} if interpolation == "bilinear" else {"interpolation": interpolation}
    return made if backend == "pillow" else {**made, "antialias": False}


def _height_and_width(scale: Any) -> Any:
    """Return the size that torchvision takes: theirs is (width, height)."""
    return [scale[1], scale[0]] if isinstance(scale, (list, tuple)) and len(set(scale)) > 1 else _side(scale)


def _side(scale: Any) -> Any:
    return scale[0] if isinstance(scale, (list, tuple)) else scale


def _resized_crop(entries: Entries) -> list[Description]:
    made = {"type": "RandomResizedCrop", "size": _height_and_width(entries.take("scale"))}
    made |= entries.present(crop_ratio_range="scale", aspect_ratio_range="ratio")
    if entries.type == "EfficientNetRandomCrop":
        entries.take("crop_padding")
        entries.take("min_covered")
        entries.note("its crops are drawn as those of RandomResizedCrop; min_covered is not here")
        interpolation = entries.take("interpolation", "bicubic")
        return [{**made, "interpolation": interpolation, **_resampled(entries)}]
    entries.take("max_attempts")
    return [{**made, **_resampled(entries)}]


def _flip(entries: Entries) -> list[Description]:
    directions, chance = listed(entries.take("direction", "horizontal")), entries.take("prob", 0.5)
    if len(directions) > 1 or directions[0] not in ("horizontal", "vertical") or isinstance(chance, list):
        entries.note("one flip of several is drawn there; here each is drawn for itself")
    chances = chance if isinstance(chance, list) else [chance / len(directions)] * len(directions)
    names = {"horizontal": ["RandomHorizontalFlip"], "vertical": ["RandomVerticalFlip"]}
    return [
        {"type": name, "p": share}
        for direction, share in zip(directions, chances, strict=True)
        for name in names.get(direction, ["RandomHorizontalFlip", "RandomVerticalFlip"])
    ]


def _resize_edge(entries: Entries) -> list[Description]:
    size, edge = entries.take("scale"), entries.take("edge", "short")
    if edge not in ("short", "long"):
        entries.note(f"the {edge} is not resized by itself here; the shorter side becomes {size}", "edge")
    made = {"size": size} if edge != "long" else {"size": None, "max_size": size}
    return [{"type": "Resize", **made, **_resampled(entries)}]


def _resize(entries: Entries) -> list[Description]:
    scale = entries.take("scale")
    if entries.take("keep_ratio", False):
        entries.note("the shorter side becomes the smaller of both numbers", "keep_ratio")
        return [{"type": "Resize", "size": min(listed(scale)), **_resampled(entries)}]
    size = [scale, scale] if isinstance(scale, int) else [scale[1], scale[0]]
    return [{"type": "Resize", "size": size, **_resampled(entries)}]


def _center_crop(entries: Entries) -> list[Description]:
    size = _height_and_width(entries.take("crop_size"))
    entries.take("auto_pad")  # torchvision pads what is too small
    padding = entries.take("crop_padding", 32)
    if entries.type == "CenterCrop" and not entries.take("efficientnet_style", False):
        return [{"type": "CenterCrop", "size": size}]
    resampled = {"interpolation": "bicubic", **_resampled(entries)}
    return [{"type": "Resize", "size": _side(size) + padding, **resampled}, {"type": "CenterCrop", "size": size}]


def _random_crop(entries: Entries) -> list[Description]:
    given = entries.present("padding", "pad_if_needed", "padding_mode", pad_val="fill")
    return [{"type": "RandomCrop", "size": _height_and_width(entries.take("crop_size")), **given}]


def _jitter(entries: Entries) -> list[Description]:
    return [{"type": "ColorJitter", **entries.present("brightness", "contrast", "saturation", "hue")}]


def _filling(entries: Entries) -> tuple[list[int], str]:
    """Return red, green and blue of what comes from outside, and how pixels are computed."""
    hparams = entries.take("hparams") or {}
    fill = hparams.get("pad_val", 128)
    fill = [fill] * 3 if isinstance(fill, (int, float)) else fill[::-1]
    return [round(one) for one in fill], hparams.get("interpolation", "nearest")


def _auto_augment(entries: Entries) -> list[Description]:
    policies = entries.take("policies")
    fill, interpolation = _filling(entries)
    if not (isinstance(policies, str) and policies.lower() in ("imagenet", "cifar10", "svhn")):
        entries.note("policies of one's own are not here; those of ImageNet are taken", "policies")
        policies = "imagenet"
    if interpolation == "bicubic":  # torchvision turns and shears no tensors so
        entries.note("bicubic is bilinear here", "hparams")
        interpolation = "bilinear"
    return [{"type": "AutoAugment", "policy": policies.upper(), "interpolation": interpolation, "fill": fill}]


def _rand_augment(entries: Entries) -> list[Description]:
    if entries.take("policies") != "timm_increasing":
        entries.note("policies of one's own are not here; those of timm are taken", "policies")
    fill, interpolation = _filling(entries)
    deviation, total = entries.take("magnitude_std", 0.0), entries.take("total_level", 10)
    if isinstance(deviation, str):
        entries.note(f"a standard deviation of {deviation} is 0.5 here", "magnitude_std")
        deviation = 0.5
    scale = 10 / (total or 10)
    magnitude = entries.take("magnitude_level") * scale
    if magnitude > 10:
        entries.note(f"{magnitude:g} of 10 is 10 here", "magnitude_level")
    return [
        {
            "type": "TimmRandAugment",
            "magnitude": min(plain([round(magnitude, 6)])[0], 10),
            "magnitude_std": deviation * scale,
            "num_ops": entries.take("num_policies"),
            "fill": fill,
            "interpolation": interpolation,
        }
    ]


def _erasing(entries: Entries) -> list[Description]:
    chance = entries.take("erase_prob", 0.5)
    scale = [entries.take("min_area_ratio", 0.02), entries.take("max_area_ratio", 0.4)]
    aspect = entries.take("aspect_range", [0.3, 10 / 3])
    ratio = [aspect, 1 / aspect] if isinstance(aspect, float) else aspect
    colour, deviation = entries.take("fill_color", [128, 128, 128]), entries.take("fill_std")
    colour = [colour] * 3 if isinstance(colour, (int, float)) else list(colour)[::-1]
    if entries.take("mode", "const") == "const":
        deviation = [0] * len(colour)
    elif deviation is None:
        entries.note("noise of any value is normally distributed noise here", "fill_std")
        deviation = [64] * len(colour)
    noise = {"mean": plain(colour), "std": plain(listed(deviation)[::-1])}
    return [{"type": "RandomNoiseErasing", "p": chance, "scale": scale, "ratio": ratio, **noise}]


def _normalize(entries: Entries) -> list[Description]:
    entries.take("mean")
    entries.take("std")
    entries.take("to_rgb")
    entries.note("images are normalised by model.data_preprocessor; its mean and std count")
    return []


def _grayscale(entries: Entries) -> list[Description]:
    entries.take("keep_channels")
    entries.take("channel_weights")
    entries.take("color_format")
    return [{"type": "RandomGrayscale", "p": entries.take("prob", 0.1)}]


def _blur(entries: Entries) -> list[Description]:
    radius = entries.take("radius")
    sigmas = entries.take("magnitude_range") or [radius, radius]
    entries.take("magnitude_std")
    width = 2 * round(4 * max(sigmas)) + 1  # beyond four standard deviations nothing is left
    blur = {"type": "GaussianBlur", "kernel_size": width, "sigma": sigmas}
    return [{"type": "RandomApply", "transforms": [blur], "p": entries.take("prob", 0.5)}]


def _solarize(entries: Entries) -> list[Description]:
    return [{"type": "RandomSolarize", "threshold": entries.take("thr"), "p": entries.take("prob", 0.5)}]


def _apply(entries: Entries) -> list[Description]:
    inner = pipeline(listed(entries.take("transforms")), (*entries.path, "transforms"), entries.notes)
    return [{"type": "RandomApply", "transforms": inner, "p": entries.take("prob", 0.5)}]


def _views(entries: Entries) -> list[Description]:
    kinds, counts = entries.take("transforms"), entries.take("num_views", 2)
    if kinds and isinstance(kinds[0], dict):
        kinds = [kinds]
    made = [pipeline(one, (*entries.path, "transforms", str(k)), entries.notes) for k, one in enumerate(kinds)]
    if len(made) == 1:
        return [{"type": "MultiView", "transforms": made[0], "num_views": listed(counts)[0]}]
    counts = [counts] * len(made) if isinstance(counts, int) else counts
    return [{"type": "MultiView", "transforms": made, "num_views": counts}]


def _two_pictures(entries: Entries) -> list[Description]:
    names = ("size", "second_size", "scale", "ratio", "interpolation", "second_interpolation")
    made = {"type": entries.type, **entries.present(*names)}
    for name in ("interpolation", "second_interpolation"):
        if made.get(name, "bicubic") not in ("bilinear", "bicubic"):
            entries.note(f"{made[name]} is bicubic here", name)
            made[name] = "bicubic"
    return [made]


_STEPS: dict[str, Callable[[Entries], list[Description]]] = {
    "LoadImageFromFile": _load,
    "RandomResizedCrop": _resized_crop,
    "EfficientNetRandomCrop": _resized_crop,
    "RandomFlip": _flip,
    "ResizeEdge": _resize_edge,
    "Resize": _resize,
    "CenterCrop": _center_crop,
    "EfficientNetCenterCrop": _center_crop,
    "RandomCrop": _random_crop,
    "ColorJitter": _jitter,
    "AutoAugment": _auto_augment,
    "RandAugment": _rand_augment,
    "RandomErasing": _erasing,
    "Normalize": _normalize,
    "RandomGrayscale": _grayscale,
    "GaussianBlur": _blur,
    "Solarize": _solarize,
    "RandomApply": _apply,
    "MultiView": _views,
    "RandomResizedCropAndInterpolationWithTwoPic": _two_pictures,
}
