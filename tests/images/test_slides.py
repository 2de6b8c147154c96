"""Slides and other files of several images: the slide itself is opened, or the file is refused by name."""

import numpy as np
import openslide
import pytest
import tifffile
from skimage import data

from tests import slide_files
from tests.microscopy_files import write_oif
from widefield.images import ImageReadError, images_below, open_image

SCN = """<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="c" sizeX="666000"
sizeY="402000"><barcode>x</barcode>{}</collection></scn>"""
SCN_IMAGE = """<image name="{name}" uuid="{name}"><creationDate>2010</creationDate><device model="SCN400" version="1"/>
<pixels sizeX="{width}" sizeY="{height}">{levels}</pixels>
<view sizeX="{view[1]}" sizeY="{view[0]}" offsetX="{offset}" offsetY="{offset}"/><scanSettings><objectiveSettings>
<objective>{objective}</objective></objectiveSettings><illuminationSettings><numericalAperture>0.4</numericalAperture>
<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"""
PHILIPS = """<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Attribute
Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array><DataObject
ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004" PMSVR="IString">WSI</Attribute>
<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030"
PMSVR="IDoubleArray">&quot;0.000227&quot; &quot;0.000227&quot;</Attribute>
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" Group="0x1001" Element="0x8B01"
PMSVR="IDataObjectArray"><Array><DataObject
ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030"
PMSVR="IDoubleArray">&quot;0.000227&quot; &quot;0.000227&quot;</Attribute></DataObject></Array></Attribute>
</DataObject></Array></Attribute></DataObject>"""


def _write(path, images, **first):
    with tifffile.TiffWriter(path) as file:
        for pixels in images:
            tile = {"tile": (64, 64)} if pixels.shape[0] > 64 else {}
            file.write(pixels, photometric="rgb", metadata=None, **tile, **first)
            first = {}


def _write_scn(path, rgb):
    """A Leica SCN file: the macro picture, then the scan of 201x333 pixels and a level of it."""

    def image(ifds, sizes, **options):
        dimensions = zip(ifds, sizes, strict=True)
        levels = "".join(
            f'<dimension sizeX="{width}" sizeY="{height}" r="{k}" ifd="{ifd}"/>'
            for k, (ifd, (height, width)) in enumerate(dimensions)
        )
        return SCN_IMAGE.format(levels=levels, height=sizes[0][0], width=sizes[0][1], **options)

    macro, reduced = rgb[::12, ::12], np.ascontiguousarray(rgb[::4, ::4][:50, :83])
    images = image([0], [macro.shape[:2]], name="macro", view=(402_000, 666_000), offset=0, objective=0.6)
    images += image([1, 2], [(201, 333), (50, 83)], name="scan", view=(201_000, 333_000), offset=2000, objective=20)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for pixels in (np.ascontiguousarray(macro), rgb, reduced):
            description = SCN.format(images) if len(pixels) < 20 else None
            options = {"photometric": "ycbcr", "subsampling": (1, 1), "compression": "jpeg", "metadata": None}
            file.write(pixels, tile=(64, 64), description=description, **options)


def _write_scn_of_two_areas(path, rgb):
    """A Leica SCN file of two areas of 101x133 pixels each, at 2,000 and 200,000 nanometres from the corner, with a level each."""
    parts, images = [rgb[:12, :20]], ""
    sizes = [(101, 133), (50, 66)]

    def image(ifds, sizes, **options):
        dimensions = enumerate(zip(ifds, sizes, strict=True))
        levels = "".join(f'<dimension sizeX="{w}" sizeY="{h}" r="{k}" ifd="{ifd}"/>' for k, (ifd, (h, w)) in dimensions)
        return SCN_IMAGE.format(levels=levels, height=sizes[0][0], width=sizes[0][1], **options)

    images += image([0], [(12, 20)], name="macro", view=(402_000, 666_000), offset=0, objective=0.6)
    for k, offset in enumerate((2_000, 200_000)):
        area = rgb[100 * k : 100 * k + 101, 200 * k : 200 * k + 133]
        parts += [area, area[:100:2, :132:2]]
        view = (101_000, 133_000)
        images += image([1 + 2 * k, 2 + 2 * k], sizes, name=f"a{k}", view=view, offset=offset, objective=20)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for k, pixels in enumerate(parts):
            options = {"photometric": "ycbcr", "subsampling": (1, 1), "compression": "jpeg", "metadata": None}
            description = None if k else SCN.format(images)
            file.write(np.ascontiguousarray(pixels), tile=(64, 64), description=description, **options)


@pytest.mark.parametrize("level", [0, 1])
def test_each_region_of_a_slide_is_an_image_and_the_whole_the_first(tmp_path, rgb, level):
    _write_scn_of_two_areas(tmp_path / "a.scn", rgb)
    with openslide.OpenSlide(str(tmp_path / "a.scn")) as slide:
        assert open_image(tmp_path / "a.scn").shape[1:] == slide.dimensions[::-1]
        for k in range(2):
            y, x, height, width = (
                int(slide.properties[f"openslide.region[{k}].{n}"]) for n in ("y", "x", "height", "width")
            )
            image = open_image(tmp_path / "a.scn", level, series=f"region {k}")
            assert image.levels == ((height, width), (height // 2, width // 2)) and image.levels[0] == (101, 133)
            pixels = np.asarray(slide.read_region((x, y), level, image.shape[:0:-1]).convert("RGB")).transpose(2, 0, 1)
            np.testing.assert_array_equal(image.read(0, 0, *image.shape[1:]), pixels)
            assert open_image(tmp_path / "a.scn", series=1 + k).spacing == image.at_level(0).spacing
    with pytest.raises(ValueError, match=r"its images are 0: a\.scn .*, 1: region 0 101x133, 2: region 1 101x133"):
        open_image(tmp_path / "a.scn", series="region 2")


@pytest.mark.parametrize("level", [0, 1])
def test_a_leica_scn_gives_the_slide_as_openslide_lays_it_out_not_the_macro_picture(tmp_path, rgb, level):
    _write_scn(tmp_path / "a.scn", rgb)
    image = open_image(tmp_path / "a.scn", level)
    with openslide.OpenSlide(str(tmp_path / "a.scn")) as slide:
        width, height = slide.level_dimensions[level]
        expected = np.array(slide.read_region((0, 0), level, (width, height)))
    assert image.shape == (3, height, width)
    expected[expected[..., 3] == 0] = 255
    whole = image.read(0, 0, height, width)
    np.testing.assert_array_equal(whole.transpose(1, 2, 0), expected[..., :3])
    for y, x in ((1, 3), (17, 40), (height // 2, width // 2), (height - 9, width - 8)):
        np.testing.assert_array_equal(image.read(y, x, 9, 8), whole[:, y : y + 9, x : x + 8])
    assert image.associated_images["macro"]().shape == (17, 28, 3)


def test_the_scan_of_a_leica_scn_lies_where_it_says(tmp_path, rgb):
    _write_scn(tmp_path / "a.scn", rgb)
    with tifffile.TiffFile(tmp_path / "a.scn") as file:
        scan = file.pages[1].asarray()
    image = open_image(tmp_path / "a.scn")
    np.testing.assert_array_equal(image.read(2, 2, 201, 333).transpose(1, 2, 0), scan)


def test_an_aperio_slide_of_jpeg_2000_is_read_as_openslide_does(tmp_path, rgb):
    description = "Aperio Image Library v11\r\n333x201 (64x64) J2K/KDU Q=30|AppMag = 40|MPP = 0.25"
    options = {"photometric": "rgb", "compression": 33005, "tile": (64, 64), "metadata": None}
    tifffile.imwrite(tmp_path / "a.svs", rgb, description=description, **options)
    image = open_image(tmp_path / "a.svs")
    with openslide.OpenSlide(str(tmp_path / "a.svs")) as slide:
        expected = np.array(slide.read_region((0, 0), 0, (333, 201)))[..., :3]
    assert image.spacing == (0.25, 0.25)
    np.testing.assert_array_equal(image.read(0, 0, 201, 333).transpose(1, 2, 0), expected)


def test_an_aperio_slide_of_jpeg_is_the_same_through_openslide(tmp_path, rgb):
    description = "Aperio Image Library v11\r\n333x201 (64x64) JPEG/RGB Q=30|AppMag = 40|MPP = 0.25"
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        for pixels in (rgb, rgb[::4, ::4]):
            options = {"photometric": "ycbcr", "subsampling": (2, 2), "compression": "jpeg", "metadata": None}
            file.write(np.ascontiguousarray(pixels), tile=(64, 64), description=description, **options)
    image = open_image(tmp_path / "a.svs")
    with openslide.OpenSlide(str(tmp_path / "a.svs")) as slide:
        expected = np.array(slide.read_region((0, 0), 0, (333, 201)))[..., :3]
    np.testing.assert_array_equal(image.read(0, 0, 201, 333).transpose(1, 2, 0), expected)


def test_a_philips_slide_has_its_spacing(tmp_path, rgb):
    options = {"photometric": "ycbcr", "subsampling": (1, 1), "compression": "jpeg", "metadata": None}
    tifffile.imwrite(
        tmp_path / "a.tiff", rgb, tile=(64, 64), software="Philips DP v1.0", description=PHILIPS, **options
    )
    image = open_image(tmp_path / "a.tiff")
    assert image.spacing == pytest.approx((0.227, 0.227))
    with tifffile.TiffFile(tmp_path / "a.tiff") as file:
        expected = file.pages[0].asarray()
    np.testing.assert_array_equal(image.read(0, 0, 201, 333).transpose(1, 2, 0), expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"software": "ScanOutputManager", "extratags": [(700, 1, 8, b"<iScan/>", True)]}, "OpenSlide"),
        ({"extratags": [(700, 1, 8, b"<iScan/>", True)]}, "OpenSlide"),
        ({"description": SCN.format("")}, "OpenSlide"),
        ({"description": SCN.format("").replace("scn/2010/10/01", "scn/2030/10/01")}, "Leica SCN"),
    ],
)
def test_slides_that_openslide_does_not_know_are_refused(tmp_path, rgb, options, name):
    _write(tmp_path / "a.tif", [rgb], **options)
    with pytest.raises(ImageReadError, match=rf"a\.tif: .*{name}"):
        open_image(tmp_path / "a.tif")


def test_a_damaged_slide_is_an_error_where_the_damage_lies_and_only_there(tmp_path, rgb):
    _write_scn(tmp_path / "a.scn", rgb)
    with tifffile.TiffFile(tmp_path / "a.scn") as file:
        offset = file.pages[1].dataoffsets[0]
    with (tmp_path / "a.scn").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 50)
    image = open_image(tmp_path / "a.scn")
    expected = image.read(130, 130, 60, 60)
    with pytest.raises(ImageReadError, match=r"a\.scn: truncated or corrupt data in the region y=0, x=0"):
        image.read(0, 0, 60, 60)
    np.testing.assert_array_equal(image.read(130, 130, 60, 60), expected)


@pytest.mark.parametrize("ome", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_a_file_whose_first_image_is_not_the_largest_is_refused(tmp_path, rgb, ome, step):
    other = rgb[:150, ::-1] if step == 1 and not ome else rgb
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=ome) as file:
        file.write(rgb[: 150 // step], photometric="rgb", metadata={"axes": "YXS"} if ome else None)
        file.write(other, photometric="rgb", metadata={"axes": "YXS"} if ome else None)
        file.write(rgb, photometric="rgb", metadata={"axes": "YXS"} if ome else None)
    with pytest.raises(ImageReadError, match=r"a\.tif: it holds several images.*201x333"):
        open_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif", series=2).read(0, 0, 201, 333), rgb.transpose(2, 0, 1))


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


TISSUE = data.immunohistochemistry()[:256, :384]


def _equal_to_openslide(path, vendor):
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.properties["openslide.vendor"] == vendor
        for level, (width, height) in enumerate(slide.level_dimensions):
            image = open_image(path, level)
            assert image.shape == (3, height, width) and len(image.levels) == slide.level_count
            picture = slide.read_region((0, 0), level, (width, height))
            expected = np.asarray(picture)[..., :3].copy()
            colour = bytes.fromhex(slide.properties.get("openslide.background-color", "ffffff"))
            expected[np.asarray(picture)[..., 3] == 0] = list(colour)
            np.testing.assert_array_equal(image.read(0, 0, height, width).transpose(1, 2, 0), expected)
    return open_image(path)


@pytest.mark.parametrize(("write", "name"), [(slide_files.write_ndpi, "a.ndpi"), (slide_files.write_vms, "a.vms")])
def test_a_hamamatsu_slide_gives_the_pixels_of_its_jpeg_files(tmp_path, write, name):
    expected = write(tmp_path / name, TISSUE)
    image = _equal_to_openslide(tmp_path / name, "hamamatsu")
    np.testing.assert_array_equal(image.read(0, 0, 256, 384).transpose(1, 2, 0), expected)
    assert image.spacing == (0.5, 0.5) and image.levels[:2] == ((256, 384), (128, 192))
    macro = image.associated_images.get("macro")
    assert (macro().shape == (32, 48, 3)) if macro else name == "a.vms"


def test_a_ventana_slide_is_put_together_of_tiles_that_overlap(tmp_path):
    tiles = np.ascontiguousarray(TISSUE[:192, :192].reshape(3, 64, 3, 64, 3).transpose(0, 2, 1, 3, 4))
    slide_files.write_bif(tmp_path / "a.bif", tiles, 8)
    image = _equal_to_openslide(tmp_path / "a.bif", "ventana")
    assert (image.shape, image.spacing) == ((3, 176, 176), (0.465, 0.465))
    for row in range(3):
        for column in range(3):
            part = image.read(56 * row + 8, 56 * column + 8, 48, 48)
            np.testing.assert_array_equal(part.transpose(1, 2, 0), tiles[row, column, 8:56, 8:56])
    assert image.associated_images["macro"]().shape == (48, 48, 3)


def test_a_trestle_slide_is_read_level_by_level(tmp_path):
    slide_files.write_trestle(tmp_path / "a.tif", [TISSUE, TISSUE[::2, ::2]])
    image = _equal_to_openslide(tmp_path / "a.tif", "trestle")
    np.testing.assert_array_equal(image.read(0, 0, 256, 384).transpose(1, 2, 0), TISSUE)
    np.testing.assert_array_equal(image.at_level(1).read(3, 4, 50, 60).transpose(1, 2, 0), TISSUE[6:106:2, 8:128:2])


def test_a_mirax_slide_gives_its_images_and_its_colour_where_none_was_taken(tmp_path):
    slide_files.write_mirax(tmp_path / "a.mrxs", TISSUE, missing=(1, 2))
    image = _equal_to_openslide(tmp_path / "a.mrxs", "mirax")
    expected = TISSUE.copy()
    expected[64:128, 128:192] = (0xE0, 0xF0, 0xFF)
    np.testing.assert_array_equal(image.read(0, 0, 256, 384).transpose(1, 2, 0), expected)
    assert (image.spacing, image.levels) == ((0.25, 0.25), ((256, 384), (128, 192)))
    (tmp_path / "a" / "Data0000.dat").unlink()
    with pytest.raises(ImageReadError, match=r"a\.mrxs: "):
        open_image(tmp_path / "a.mrxs").read(0, 0, 9, 9)


def test_what_belongs_to_a_slide_is_no_image_of_its_own(tmp_path):
    slide_files.write_vms(tmp_path / "a.vms", TISSUE)
    slide_files.write_mirax(tmp_path / "b.mrxs", TISSUE)
    planes = {"s_C001.tif": TISSUE[..., 0], "s_C002.tif": TISSUE[..., 1]}
    write_oif(tmp_path / "c.oif", planes)
    (tmp_path / "other.jpg").write_bytes(slide_files.jpeg(TISSUE))
    assert [path.name for path in images_below(tmp_path)] == ["a.vms", "b.mrxs", "c.oif", "other.jpg"]
