"""Slides and other files of several images: the slide itself is opened, or the file is refused by name."""

import numpy as np
import pytest
import tifffile

from widefield.images import ImageReadError, open_image

SCN = """<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">
<collection name="c" sizeX="333000" sizeY="201000">{}</collection></scn>"""
SCN_IMAGE = """<image name="{name}"><pixels sizeX="{width}" sizeY="{height}">
<dimension sizeX="{width}" sizeY="{height}" r="0" ifd="{ifd}"/>{more}</pixels>
<view sizeX="{view[1]}" sizeY="{view[0]}" offsetX="0" offsetY="0"/></image>"""


def _write(path, images, **first):
    with tifffile.TiffWriter(path) as file:
        for pixels in images:
            tile = {"tile": (64, 64)} if pixels.shape[0] > 64 else {}
            file.write(pixels, photometric="rgb", metadata=None, **tile, **first)
            first = {}


def _write_scn(path, rgb, regions):
    macro, reduced = rgb[::12, ::12], rgb[:200:2, :332:2]
    level = f'<dimension sizeX="166" sizeY="100" r="1" ifd="{1 + regions}"/>'
    images = [{"name": "macro", "width": 28, "height": 17, "ifd": 0, "view": (201_000, 333_000), "more": ""}]
    for ifd in range(1, 1 + regions):
        more = level if regions == 1 else ""
        images.append(
            {"name": f"scan {ifd}", "width": 333, "height": 201, "ifd": ifd, "view": (50_250, 83_250), "more": more}
        )
    description = SCN.format("".join(SCN_IMAGE.format(**image) for image in images))
    _write(path, [macro, *[rgb] * regions, reduced], description=description, resolution=(100, 100))


def test_a_leica_scn_gives_its_scanned_region_not_the_macro_picture(tmp_path, rgb, chw):
    _write_scn(tmp_path / "a.scn", rgb, regions=1)
    image = open_image(tmp_path / "a.scn")
    assert image.levels == ((201, 333), (100, 166))
    assert image.spacing == pytest.approx((0.25, 0.25))
    np.testing.assert_array_equal(image.read(0, 0, 201, 333), chw)
    np.testing.assert_array_equal(open_image(tmp_path / "a.scn", 1).read(0, 0, 100, 166), chw[:, :200:2, :332:2])


@pytest.mark.parametrize("regions", [0, 2])
def test_a_leica_scn_of_any_other_number_of_regions_is_refused(tmp_path, rgb, regions):
    _write_scn(tmp_path / "a.scn", rgb, regions)
    with pytest.raises(ImageReadError, match=rf"a\.scn: .*Leica SCN file of {regions} scanned regions"):
        open_image(tmp_path / "a.scn")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"software": "ScanOutputManager", "extratags": [(700, 1, 8, b"<iScan/>", True)]}, "Ventana"),
        ({"extratags": [(700, 1, 8, b"<iScan/>", True)]}, "Ventana"),
        ({"software": "MedScan 1.0", "description": "Background Color=ffffff;OverlapsXY=64 64"}, "Trestle"),
    ],
)
def test_slides_whose_tiles_overlap_are_refused(tmp_path, rgb, options, name):
    _write(tmp_path / "a.tif", [rgb], **options)
    with pytest.raises(ImageReadError, match=rf"a\.tif: {name} files.*convert it"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("ome", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_a_file_whose_first_image_is_not_the_largest_is_refused(tmp_path, rgb, ome, step):
    other = rgb[:150, ::-1] if step == 1 and not ome else rgb
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=ome) as file:
        file.write(rgb[: 150 // step], photometric="rgb", metadata={"axes": "YXS"} if ome else None)
        file.write(other, photometric="rgb", metadata={"axes": "YXS"} if ome else None)
        file.write(rgb, photometric="rgb", metadata={"axes": "YXS"} if ome else None)
    with pytest.raises(ImageReadError, match=r"a\.tif: it holds several images .*201x333"):
        open_image(tmp_path / "a.tif")


def test_labels_and_masks_are_no_images_of_their_own(tmp_path, rgb, chw):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as file:
        file.write(rgb[:100], photometric="rgb", metadata={"axes": "YXS"})
        file.write(rgb, photometric="rgb", metadata={"axes": "YXS", "Name": "macro image"})
    with tifffile.TiffWriter(tmp_path / "mask.tif") as file:
        file.write(rgb[:100], photometric="rgb", metadata=None)
        file.write(np.ones((100, 333), bool), subfiletype=4, metadata=None)
    for name in ("a.ome.tif", "mask.tif"):
        image = open_image(tmp_path / name)
        np.testing.assert_array_equal(image.read(0, 0, 100, 333), chw[:, :100])


def test_a_tiled_label_of_an_aperio_slide_is_no_level(tmp_path, rgb):
    images = [rgb, rgb[::5, ::5], rgb[:200:2, :332:2], np.ascontiguousarray(rgb[:90].transpose(1, 0, 2))[:100]]
    _write(tmp_path / "a.svs", images, description="Aperio Image Library v1|MPP = 0.5")
    assert open_image(tmp_path / "a.svs").levels == ((201, 333), (100, 166))


def test_channels_of_an_ome_file_come_in_the_order_of_its_metadata(tmp_path):
    planes = np.random.default_rng(0).integers(0, 4000, (2, 64, 64), dtype=np.uint16)
    data = "".join(f'<TiffData IFD="{1 - channel}" FirstC="{channel}" PlaneCount="1"/>' for channel in (0, 1))
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels '
        'ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="64" SizeY="64" SizeC="2" SizeZ="1" SizeT="1">'
        f'<Channel ID="Channel:0:0"/><Channel ID="Channel:0:1"/>{data}</Pixels></Image></OME>'
    )
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=False) as file:
        file.write(planes[1], description=xml, metadata=None)
        file.write(planes[0], metadata=None)
    np.testing.assert_array_equal(open_image(tmp_path / "a.ome.tif").read(0, 0, 64, 64), planes)
