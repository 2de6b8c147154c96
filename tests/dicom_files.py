"""A writer of small DICOM images."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless


def write_dicom(path: Path, pixels: np.ndarray, encoded: bytes | None = None, **tags: Any) -> Path:
    """Write pixels (H, W), (H, W, 3) or (frames, H, W), by pydicom unless they are `encoded`; `syntax` is that of the transfer."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    dataset.Modality = "MG"
    samples = pixels.shape[-1] if pixels.ndim == 3 and pixels.shape[-1] == 3 else 1
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if samples == 3 else pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PixelRepresentation = samples, int(pixels.dtype.kind == "i")
    dataset.BitsAllocated, dataset.BitsStored = pixels.itemsize * 8, pixels.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PhotometricInterpretation = "RGB" if samples == 3 else "MONOCHROME2"
    if samples == 3:
        dataset.PlanarConfiguration = 0
    if pixels.ndim == 3 and samples == 1:
        dataset.NumberOfFrames = len(pixels)
    for name, value in tags.items():
        setattr(dataset, name, value)
    syntax = dataset.file_meta.TransferSyntaxUID
    if encoded is not None or syntax == ExplicitVRLittleEndian:
        dataset.PixelData = pixels.tobytes() if encoded is None else encoded
    else:
        dataset.compress(syntax, pixels, encoding_plugin="pylibjpeg" if syntax == JPEG2000Lossless else "pydicom")
    dataset.save_as(path, enforce_file_format=True)
    return path
