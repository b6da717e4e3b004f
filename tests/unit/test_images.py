"""Files and arrays → pixels: every mode and format, EXIF orientation, 16 bits, and bytes that no camera wrote."""

import io
import logging
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from intra.data.decode import opened, part_that_suffices
from intra.data.images import (
    IMAGE_SUFFIXES,
    ImageInfo,
    UnreadableError,
    auto_channels,
    auto_image_size,
    convert_channels,
    prepare,
    read_image,
    read_info,
    read_mask,
    read_set,
    to_unit,
)
from intra.errors import InTraError

FILES = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
LOSSLESS_8 = ["PNG", "TIFF", "BMP", "PPM", "TGA", "WEBP"]
SIDES = st.integers(1, 24)


def _noise(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return rng.random(shape, dtype=np.float32)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def _saved(path: Path, array: np.ndarray, **options: object) -> Path:
    PIL.Image.fromarray(array).save(path, **options)
    return path


def _png_16(array: np.ndarray, color_type: int) -> bytes:
    """A 16-bit PNG of any colour type by the standard; Pillow writes only grey ones."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = array.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def _grey_tiff(num_pages: int) -> bytes:
    """Of 1×1 px each, which share one pixel."""
    tags = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 4, 277: 1, 278: 1, 279: 1}
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in tags)
    size = len(page) + 4
    return struct.pack("<2sHI", b"II", 42, 8) + b"".join(
        page + struct.pack("<I", 8 + size * number if number < num_pages else 0) for number in range(1, num_pages + 1))


class TestModes:
    @FILES
    @given(format=st.sampled_from(LOSSLESS_8), height=SIDES, width=SIDES, seed=st.integers(0, 99), grey=st.booleans())
    def test_8_bit_pixels_survive_every_lossless_format(self, tmp_path, format, height, width, seed, grey):
        pixels = _noise(height, width, 1 if grey else 3, seed=seed)
        options = {"lossless": True} if format == "WEBP" else {}
        path = _saved(tmp_path / "file", pixels.squeeze(2) if grey else pixels, format=format, **options)
        found = read_image(path)
        if grey and format == "WEBP":  # the format has no grey
            pixels = np.repeat(pixels, 3, axis=2)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, pixels)
        assert read_info(path) == ImageInfo(path, (height, width), pixels.shape[2], 8)

    @FILES
    @given(format=st.sampled_from(["PNG", "TIFF", "PPM", "JPEG2000"]), height=SIDES, width=SIDES,
           seed=st.integers(0, 99))  # fmt: skip
    def test_16_bit_grey_keeps_all_bits(self, tmp_path, format, height, width, seed):
        pixels = _noise(height, width, dtype=np.uint16, seed=seed)
        path = _saved(tmp_path / "file", pixels, format=format)
        found = read_image(path)
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found[:, :, 0], pixels)
        assert read_info(path) == ImageInfo(path, (height, width), 1, 16)

    def test_big_endian_16_bit_tiff(self, tmp_path):
        pixels = _noise(5, 4, dtype=np.uint16)
        image = PIL.Image.frombytes("I;16B", (4, 5), pixels.astype(">u2").tobytes())
        image.save(tmp_path / "a.tif")
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[:, :, 0], pixels)

    def test_float_tiff(self, tmp_path):
        pixels = _noise(5, 4, dtype=np.float32)
        path = _saved(tmp_path / "a.tif", pixels)
        np.testing.assert_array_equal(read_image(path)[:, :, 0], pixels)
        assert read_info(path) == ImageInfo(path, (5, 4), 1, 32)

    @pytest.mark.parametrize("low, high", [(-0.1, 1), (0, 1.1), (0, np.nan), (0, np.inf)])
    def test_float_tiff_outside_0_1_is_refused(self, tmp_path, low, high):
        path = _saved(tmp_path / "a.tif", np.array([[low, high]], dtype=np.float32))
        with pytest.raises(UnreadableError, match=r"a\.tif.*\[0, 1\]"):
            read_image(path)

    @pytest.mark.parametrize("value", ["[]", "None", "7"])
    def test_anything_else_is_refused_by_its_type(self, value):
        """In a process of its own: here the annotations would refuse it."""
        code = f"import intra.data.images as i\ntry: i.read_image({value})\nexcept i.InTraError as error: print(error)"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert found.startswith(f"an image is a path, a PIL image or an array, not {type(eval(value)).__name__};")

    @pytest.mark.parametrize("values, fits", [([0, 65535], True), ([0, 65536], False), ([-1, 5], False)])
    def test_integer_grey_is_16_bit_if_it_fits(self, tmp_path, values, fits):
        path = _saved(tmp_path / "a.tif", np.array([values], dtype=np.int32))
        if fits:
            assert read_image(path).dtype == np.uint16
            assert read_image(path).ravel().tolist() == values
        else:
            with pytest.raises(UnreadableError, match="0 to 65535"):
                read_image(path)

    @pytest.mark.parametrize("mode, channels", [
        ("1", 1), ("L", 1), ("LA", 1), ("La", 1), ("P", 3), ("PA", 3), ("RGB", 3), ("RGBA", 3), ("RGBX", 3),
        ("RGBa", 3), ("CMYK", 3), ("YCbCr", 3), ("LAB", 3), ("HSV", 3), ("I", 1), ("I;16", 1), ("I;16B", 1), ("F", 1),
    ])  # fmt: skip
    def test_each_mode_has_its_number_of_channels(self, mode, channels):
        assert read_image(PIL.Image.new(mode, (5, 4))).shape == (4, 5, channels)

    def test_black_and_white_is_0_and_255(self):
        image = PIL.Image.fromarray(np.array([[True, False]]))
        assert image.mode == "1"
        assert read_image(image).ravel().tolist() == [255, 0]

    def test_alpha_is_dropped_not_blended(self):
        pixels = _noise(4, 5, 4)
        np.testing.assert_array_equal(read_image(PIL.Image.fromarray(pixels)), pixels[:, :, :3])

    def test_palette_is_looked_up(self):
        image = PIL.Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putdata([1, 0])
        assert read_image(image).tolist() == [[[40, 50, 60], [10, 20, 30]]]

    def test_16_bit_colour_is_reduced_to_8_as_documented(self, tmp_path):
        pixels = _noise(3, 4, 3, dtype=np.uint16)
        (tmp_path / "a.png").write_bytes(_png_16(pixels, color_type=2))
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), (pixels >> 8).astype(np.uint8))
        assert read_info(tmp_path / "a.png").bit_depth == 8

    def test_16_bit_grey_with_alpha_is_8_bit_colour_as_documented(self, tmp_path):
        pixels = _noise(3, 4, 2, dtype=np.uint16)
        (tmp_path / "a.png").write_bytes(_png_16(pixels, color_type=4))
        np.testing.assert_array_equal(read_image(tmp_path / "a.png")[:, :, 2], pixels[:, :, 0] >> 8)


class TestPages:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
    def test_grey_tiff_pages_are_channels(self, tmp_path, dtype):
        pixels = _noise(6, 5, 4, dtype=dtype)
        first, *others = (PIL.Image.fromarray(pixels[:, :, c]) for c in range(4))
        first.save(tmp_path / "a.tif", save_all=True, append_images=others)
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), pixels)
        assert read_info(tmp_path / "a.tif").channels == 4

    @pytest.mark.parametrize("second", [np.zeros((6, 4), np.uint8), np.zeros((5, 6), np.uint16)])
    def test_unlike_pages_leave_the_first(self, tmp_path, second):
        pixels = _noise(5, 6)
        PIL.Image.fromarray(pixels).save(tmp_path / "a.tif", save_all=True,
                                         append_images=[PIL.Image.fromarray(second)])
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[:, :, 0], pixels)
        assert read_info(tmp_path / "a.tif").channels == 1

    @pytest.mark.parametrize("format", ["TIFF", "GIF", "PNG", "WEBP"])
    def test_of_a_colour_film_the_first_picture_is_taken(self, tmp_path, format):
        red, blue = (PIL.Image.new("RGB", (4, 5), color) for color in ("red", "blue"))
        red.save(tmp_path / "file", format, save_all=True, append_images=[blue])
        pixels = read_image(tmp_path / "file")
        assert pixels.shape == (5, 4, 3)
        assert pixels[..., 0].min() > 250
        assert pixels[..., 2].max() < 5

    def test_countless_pages_are_refused_and_not_counted(self, tmp_path):
        (tmp_path / "a.tif").write_bytes(_grey_tiff(num_pages=100_000))  # Pillow would count for minutes
        for read in (read_image, read_info):
            with pytest.raises(UnreadableError, match="more than 1000 pages"):
                read(tmp_path / "a.tif")
        (tmp_path / "a.tif").write_bytes(_grey_tiff(num_pages=1000))
        assert read_info(tmp_path / "a.tif").channels == 1000

    def test_too_many_pixels_over_all_pages(self, tmp_path, monkeypatch):
        pages = [PIL.Image.new("L", (20, 10)) for _ in range(8)]
        pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 500)
        with pytest.raises(UnreadableError, match=r"too many pixels.*8 pages"):
            read_image(tmp_path / "a.tif")


# The stored picture of each orientation, as index maths: what a viewer must do to see the upright one.
UPRIGHT = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a.swapaxes(0, 1)[::-1],
}  # fmt: skip


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format, dtype", [
        ("PNG", np.uint8), ("PNG", np.uint16), ("TIFF", np.uint8), ("TIFF", np.uint16), ("TIFF", np.float32),
        ("WEBP", np.uint8),
    ])  # fmt: skip
    def test_lossless(self, tmp_path, orientation, format, dtype):
        pixels = _noise(3, 5, 3, dtype=dtype) if dtype == np.uint8 else _noise(3, 5, dtype=dtype)
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        path = _saved(tmp_path / "file", pixels, format=format, exif=exif,
                      **({"lossless": True} if format == "WEBP" else {}))
        upright = UPRIGHT[orientation](pixels.reshape(3, 5, -1))
        np.testing.assert_array_equal(read_image(path), upright)
        assert read_info(path).size == upright.shape[:2]

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_jpeg(self, tmp_path, orientation):
        pixels = np.zeros((16, 32), np.uint8)
        pixels[:8, :16] = 255  # the stored picture is white at its upper left
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        path = _saved(tmp_path / "a.jpg", pixels, exif=exif, quality=95)
        upright = UPRIGHT[orientation](pixels)
        np.testing.assert_array_equal(read_image(path)[:, :, 0] > 127, upright > 127)
        assert read_info(path).size == upright.shape

    @pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "F", "1", "P", "CMYK"])
    def test_strips_make_the_whole_picture(self, tmp_path, monkeypatch, mode):
        """Pixels are taken strip by strip; here each has one row."""
        picture = PIL.Image.fromarray(_noise(9, 7, 3))
        if mode == "I;16":
            picture = PIL.Image.fromarray(_noise(9, 7, dtype=np.uint16))
        elif mode == "F":
            picture = PIL.Image.fromarray(_noise(9, 7, dtype=np.float32))
        else:
            picture = picture.convert(mode)
        given = picture.copy()
        whole = read_image(picture)
        monkeypatch.setattr("intra.data.decode._STRIP_BYTES", 1)
        np.testing.assert_array_equal(read_image(picture), whole)
        assert picture == given  # nobody's picture is changed
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        path = tmp_path / "a.tif"
        picture.save(path, exif=exif)
        np.testing.assert_array_equal(read_image(path), UPRIGHT[6](whole))

    def test_a_picture_without_pixels(self):
        for size in ((0, 4), (4, 0)):
            with pytest.raises(UnreadableError, match="it has no pixel"):
                read_image(PIL.Image.new("RGB", size))

    def test_pages_are_turned_too(self, tmp_path):
        pixels = _noise(3, 5, 2)
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        first, second = (PIL.Image.fromarray(pixels[:, :, c]) for c in range(2))
        first.save(tmp_path / "a.tif", save_all=True, append_images=[second], exif=exif)
        assert read_image(tmp_path / "a.tif").shape[:2] == read_info(tmp_path / "a.tif").size
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[:, :, :1], UPRIGHT[6](pixels[:, :, :1]))


class TestArrays:
    @given(hnp.arrays(st.sampled_from([np.uint8, np.uint16, np.bool_]),
                      hnp.array_shapes(min_dims=2, max_dims=3, max_side=6)))
    def test_whole_numbers_keep_their_values(self, array):
        found = read_image(array)
        assert found.shape == (*array.shape, 1)[:3]
        scale = 255 if array.dtype == np.bool_ else 1
        np.testing.assert_array_equal(found.reshape(array.shape), array.astype(found.dtype) * scale)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
    def test_floats_become_float32(self, dtype):
        array = _noise(4, 5, dtype=np.float32).astype(dtype)
        assert read_image(array).dtype == np.float32
        np.testing.assert_array_equal(read_image(array)[:, :, 0], array.astype(np.float32))

    def test_foreign_byte_order(self):
        array = _noise(4, 5, dtype=np.uint16)
        np.testing.assert_array_equal(read_image(array.astype(">u2"))[:, :, 0], array)

    @pytest.mark.parametrize("array, words", [
        (np.zeros((0, 4)), "at least one pixel"), (np.zeros(4), "shape"), (np.zeros((1, 2, 3, 4)), "one image"),
        (np.zeros((2, 2), np.int64), "int64"), (np.zeros((2, 2), complex), "complex"),
        (np.full((2, 2), np.nan), r"\[0, 1\]"), (np.full((2, 2), np.inf), r"\[0, 1\]"),
        (np.full((2, 2), 255.0), "divide"),
        (np.array([[-0.1, 0.5]]), r"\[0, 1\]"), (np.array([["a"]]), "expected an array of uint8"),
    ])  # fmt: skip
    def test_unfit_arrays_are_refused(self, array, words):
        with pytest.raises(InTraError, match=words):
            read_image(array)

    def test_a_pil_image_that_cannot_be_decoded(self, tmp_path):
        path = _saved(tmp_path / "a.png", _noise(64, 64))
        image = PIL.Image.open(io.BytesIO(path.read_bytes()[:500]))
        with pytest.raises(UnreadableError, match=r"the PIL image.*truncated"):
            read_image(image)


class TestDamage:
    @pytest.fixture(scope="class")
    @classmethod
    def originals(cls) -> dict[str, bytes]:
        files = {}
        for format, array in (
            ("PNG", _noise(24, 17, 3)), ("JPEG", _noise(24, 17, 3)), ("TIFF", _noise(24, 17, 3)),
            ("BMP", _noise(24, 17)), ("WEBP", _noise(24, 17, 3)), ("GIF", _noise(24, 17)),
            ("PNG 16", _noise(24, 17, dtype=np.uint16)), ("JPEG2000", _noise(24, 17)), ("PPM", _noise(24, 17, 3)),
            ("TGA", _noise(24, 17, 3)), ("QOI", _noise(24, 17, 3)),
        ):  # fmt: skip
            content = io.BytesIO()
            PIL.Image.fromarray(array).save(content, format.split()[0])
            files[format] = content.getvalue()
        pages, content = [PIL.Image.fromarray(_noise(24, 17)) for _ in range(3)], io.BytesIO()
        pages[0].save(content, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw")
        files["TIFF pages"] = content.getvalue()
        return files

    @settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_bytes_give_pixels_or_our_error(self, tmp_path, originals, data):
        content = bytearray(originals[data.draw(st.sampled_from(sorted(originals)))])
        # most of what a decoder trusts stands at the beginning
        places = st.one_of(st.integers(0, min(99, len(content) - 1)), st.integers(0, len(content) - 1))
        for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
            content[place] = value
        kept = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
        path = tmp_path / "file.png"
        path.write_bytes(bytes(content[:kept]))
        for read in (read_image, read_info):
            try:
                found = read(path)
            except InTraError as error:
                assert str(path) in str(error)
            else:
                assert isinstance(found, ImageInfo) or found.ndim == 3

    @pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF"])
    def test_half_a_file_is_refused(self, tmp_path, originals, format):
        (tmp_path / "half").write_bytes(originals[format][: len(originals[format]) // 2])
        with pytest.raises(UnreadableError, match=r"half: it is (damaged|no image)"):
            read_image(tmp_path / "half")

    @pytest.mark.parametrize("error", [
        OSError("broken"), SyntaxError("x"), ValueError("x"), struct.error("x"), EOFError(), zlib.error("x"),
        MemoryError(), IndexError("x"), KeyError("x"), TypeError("x"), OverflowError(), RecursionError(),
        PIL.Image.DecompressionBombError("x"),
    ])  # fmt: skip
    def test_whatever_pillow_raises_is_our_error(self, tmp_path, monkeypatch, error):
        path = _saved(tmp_path / "a.png", _noise(4, 4))

        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(PIL.Image.Image, "crop", fail)
        with pytest.raises(UnreadableError, match=r"a\.png") as caught:
            read_image(path)
        assert caught.value.reason
        assert caught.value.__cause__ is error

    @pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
    def test_too_little_memory_is_told_from_damage(self, tmp_path, monkeypatch, error):
        def fail(*_: object) -> None:
            raise error

        path = _saved(tmp_path / "a.png", _noise(4, 4))
        monkeypatch.setattr(PIL.Image.Image, "crop", fail)
        with pytest.raises(UnreadableError, match="does not fit into memory") as raised:
            read_image(path)
        assert isinstance(raised.value.__cause__, MemoryError)

    def test_what_is_no_image_file(self, tmp_path):
        (tmp_path / "empty.png").touch()
        (tmp_path / "text.png").write_text("no image")
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
        for name, words in (("empty.png", "empty"), ("text.png", "no image"), ("folder.png", "folder"),
                            ("missing.png", "no such file"), ("link.png", "no such file"), ("x" * 300, "too long"),
                            ("a\0b", "no such file")):  # fmt: skip
            for read in (read_image, read_info, read_mask):
                with pytest.raises(UnreadableError, match=words):
                    read(tmp_path / name)

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(UnreadableError, match="device"):
            read_image(tmp_path / "pipe.png")

    def test_postscript_is_never_run(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
        with pytest.raises(UnreadableError, match="no image"):
            read_image(tmp_path / "a.png")
        assert not IMAGE_SUFFIXES & {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".h5", ".npy", ".txt"}
        assert {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".pgm", ".jp2"} <= IMAGE_SUFFIXES

    def test_too_many_pixels(self, tmp_path, monkeypatch):
        path = _saved(tmp_path / "a.png", _noise(40, 40))
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(UnreadableError, match=r"a\.png: it has too many pixels"):
            read_image(path)

    def test_pillow_warnings_go_to_the_log(self, tmp_path, monkeypatch, caplog):
        path = _saved(tmp_path / "a.png", _noise(40, 40))
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns from here, and refuses from twice this
        before = warnings.filters[:], warnings.showwarning
        with warnings.catch_warnings(record=True) as shown, caplog.at_level(logging.INFO, "intra"):
            warnings.simplefilter("error")
            assert read_image(path).shape == (40, 40, 1)
        assert not shown
        assert "1600 pixels" in caplog.text
        assert (warnings.filters[:], warnings.showwarning) == before


    def test_threads_leave_the_warning_filters_as_they_were(self, tmp_path, monkeypatch):
        paths = [_saved(tmp_path / f"{i}.png", _noise(40, 40)) for i in range(16)]
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
        before = warnings.filters[:], warnings.showwarning
        with warnings.catch_warnings(record=True) as shown:
            inside = warnings.filters[:], warnings.showwarning
            read_set(paths, size=(8, 8), channels=1)
            with opened(paths[0]), opened(paths[1]):  # two at once for certain
                pass
            assert (warnings.filters[:], warnings.showwarning) == inside
        assert not shown
        assert (warnings.filters[:], warnings.showwarning) == before


class TestConvertChannels:
    @given(hnp.arrays(st.sampled_from([np.uint8, np.uint16]), (3, 4, 1)))
    def test_grey_to_rgb_and_back_is_the_identity(self, grey):
        rgb = convert_channels(grey, 3)
        assert rgb.shape == (3, 4, 3)
        back = convert_channels(rgb, 1)
        assert back.dtype == grey.dtype
        np.testing.assert_array_equal(back, grey)

    def test_luminance_is_pillows(self):
        pixels = _noise(40, 40, 3)
        expected = np.asarray(PIL.Image.fromarray(pixels).convert("L")).astype(int)
        assert np.abs(convert_channels(pixels, 1)[:, :, 0].astype(int) - expected).max() <= 1

    def test_luminance_of_the_primaries(self):
        primaries = np.eye(3, dtype=np.uint8)[None] * 255
        assert convert_channels(primaries, 1).ravel().tolist() == [76, 150, 29]  # 255 x 0.299, 0.587, 0.114

    def test_floats_stay_in_range(self):
        grey = convert_channels(np.ones((2, 2, 3), np.float32), 1)
        assert grey.dtype == np.float32
        assert grey.max() <= 1

    @pytest.mark.parametrize("found, wanted", [(2, 3), (4, 1), (3, 4), (1, 2)])
    def test_no_other_change(self, found, wanted):
        with pytest.raises(InTraError, match=f"{wanted} channels.*found {found}"):
            convert_channels(np.zeros((2, 2, found), np.uint8), wanted)


class TestPrepare:
    def test_the_right_size_passes_through(self):
        pixels = _noise(16, 24, 3)
        found = prepare(pixels, size=(16, 24), channels=3)
        assert found.dtype == torch.uint8
        assert found.is_contiguous()
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), pixels)

    def test_the_result_is_a_copy(self):
        pixels = np.zeros((4, 4, 1), np.uint8)
        pixels.flags.writeable = False
        prepare(pixels, size=(4, 4), channels=1).fill_(9)
        assert pixels.max() == 0

    @pytest.mark.parametrize("channels", [1, 3, 5])
    @pytest.mark.parametrize("size", [(16, 24), (96, 80), (33, 7)])
    def test_8_bits_are_within_1_of_the_exact_resize(self, channels, size):
        pixels = _noise(64, 48, channels)
        found = prepare(pixels, size=size, channels=channels)
        exact = prepare(pixels.astype(np.float32) / 255, size=size, channels=channels)
        assert found.dtype == torch.uint8
        assert found.shape == (channels, *size)
        assert (found.float() - exact * 255).abs().max() <= 1.01

    def test_reduced_as_pillow_reduces(self):
        pixels = _noise(64, 48, 3)
        expected = np.asarray(PIL.Image.fromarray(pixels).resize((24, 16), PIL.Image.Resampling.BILINEAR)).astype(int)
        found = prepare(pixels, size=(16, 24), channels=3).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - expected).max() <= 1

    def test_antialiased(self):
        stripes = np.zeros((64, 64, 1), np.uint8)
        stripes[:, ::2] = 255  # finer than the reduced image can show: it must become grey, not stripes
        found = prepare(stripes, size=(16, 16), channels=1)[:, 2:-2, 2:-2]
        assert found.min() > 110
        assert found.max() < 145

    @pytest.mark.parametrize("value, expected", [
        (np.uint16(65535), 1.0), (np.uint16(13107), 0.2), (np.float32(0.3), 0.3),
    ])  # fmt: skip
    def test_other_depths_become_floats(self, value, expected):
        for side in (8, 4, 16):
            found = prepare(np.full((8, 8, 1), value), size=(side, side), channels=3)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, torch.full((3, side, side), expected))

    @given(hnp.arrays(np.float32, (6, 5, 1), elements=st.floats(0, 1, width=32)))
    def test_floats_stay_in_range(self, pixels):
        found = prepare(pixels, size=(4, 9), channels=1)
        assert found.min() >= 0
        assert found.max() <= 1

    def test_a_white_image_stays_within_range(self):
        ones = np.ones((7, 7, 1), np.float32)  # torch's weights from 7 to 3 px add up to 1.0000002
        assert prepare(ones, size=(3, 3), channels=1).max() <= 1

    def test_views_with_negative_steps(self):
        pixels = _noise(8, 8, 3)
        flipped = prepare(pixels[:, ::-1, ::-1], size=(8, 8), channels=3)
        np.testing.assert_array_equal(flipped.permute(1, 2, 0).numpy(), pixels[:, ::-1, ::-1])

    def test_to_unit(self):
        assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
        floats = torch.rand(2, 3, dtype=torch.float32)
        assert torch.equal(to_unit(floats), floats)


class TestReadSet:
    def test_in_order_and_the_same_as_one_by_one(self, tmp_path):
        paths = [_saved(tmp_path / f"{i}.png", _noise(20 + i, 30, 3, seed=i)) for i in range(7)]
        steps = []
        images = read_set(paths, size=(16, 16), channels=3, on_progress=lambda *progress: steps.append(progress))
        assert images.dtype == torch.uint8
        for path, image in zip(paths, images, strict=True):
            assert torch.equal(image, prepare(read_image(path), size=(16, 16), channels=3))
        assert steps == [(done, 7) for done in range(1, 8)]

    @pytest.mark.parametrize("deep", [0, 1, 2])
    def test_one_16_bit_file_makes_the_set_float(self, tmp_path, deep):
        values = [np.uint8(51)] * 3
        values[deep] = np.uint16(13107)
        paths = [_saved(tmp_path / f"{i}.png", np.full((8, 8), value)) for i, value in enumerate(values)]
        images = read_set(paths, size=(8, 8), channels=1)
        torch.testing.assert_close(images, torch.full((3, 1, 8, 8), 0.2))

    def test_all_unreadable_files_are_named_at_once(self, tmp_path):
        paths = [_saved(tmp_path / f"{i}.png", _noise(8, 8)) for i in range(9)]
        for path in paths[1:8]:
            path.write_text("no image")
        with pytest.raises(InTraError, match=r"7 of 9 images.*1\.png \(it is no image.*5\.png.*and 2 more.*check-data"):
            read_set(paths, size=(8, 8), channels=1)

    def test_unfit_channels_are_named_with_their_file(self, tmp_path):
        pages = [PIL.Image.fromarray(_noise(8, 8)) for _ in range(4)]
        pages[0].save(tmp_path / "four.tif", save_all=True, append_images=pages[1:])
        with pytest.raises(InTraError, match=r"four\.tif.*expected an image of 3 channels.*found 4"):
            read_set([tmp_path / "four.tif"], size=(8, 8), channels=3)

    def test_no_paths(self):
        with pytest.raises(InTraError, match="at least one image"):
            read_set([], size=(8, 8), channels=1)


class TestReadSetQuickly:
    """Large JPEGs, decoded at a part of their sides."""

    SIZE = (32, 48)

    @staticmethod
    def _photo(height: int, width: int) -> PIL.Image.Image:
        """Smooth, with the noise of a camera."""
        row, col = np.mgrid[:height, :width] / 100
        waves = np.stack([np.sin(3 * row + col), np.cos(2 * col), np.sin(row * col)], axis=2)
        noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
        return PIL.Image.fromarray((128 + 80 * waves + noise).clip(0, 255).astype(np.uint8))

    def _both(self, path: Path, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(read_set([path], size=self.SIZE, channels=3, quickly=quickly, **settings)[0].int()
                     for quickly in (False, True))

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"exif": "turned"}])
    @pytest.mark.parametrize("share", [2, 4, 8])
    def test_the_pixels_are_the_same_but_for_rounding(self, tmp_path, share, options):
        photo = self._photo(96 * share, 144 * share)
        if "exif" in options:
            exif = PIL.Image.Exif()
            exif[0x0112] = 6
            photo, options = photo.transpose(PIL.Image.Transpose.ROTATE_90), {"exif": exif}
        photo.save(tmp_path / "large.jpg", quality=92, **options)
        whole, quick = self._both(tmp_path / "large.jpg")
        away = (whole - quick).float()
        assert 0 < away.abs().max() <= 4
        assert away.std() < 0.8
        assert away.mean().abs() < 0.1

    def test_black_on_white(self, tmp_path):
        """Edges whose ringing the white cuts off, finer than a wanted pixel."""
        pixels = np.full((384, 576, 3), 255, dtype=np.uint8)
        pixels[:, ::40], pixels[::56], pixels[100:220, 130:300] = 0, 0, 0
        PIL.Image.fromarray(pixels).save(tmp_path / "large.jpg", quality=92)
        away = torch.sub(*self._both(tmp_path / "large.jpg")).float()
        assert 0 < away.abs().max() <= 16
        assert away.std() < 4

    def test_the_largest_part_that_divides_both_sides(self, tmp_path):
        """Wide enough for an eighth; 1028 can be divided by four alone."""
        self._photo(1028, 1536).save(tmp_path / "large.jpg")
        with opened(tmp_path / "large.jpg") as file:
            assert part_that_suffices(file, (96, 144)) == 4
        assert read_image(tmp_path / "large.jpg", least=(96, 144)).shape == (257, 384, 3)

    def test_several_pictures_in_one_file(self, tmp_path):
        self._photo(192, 288).save(tmp_path / "large.mpo", save_all=True, append_images=[self._photo(96, 96)])
        whole, quick = self._both(tmp_path / "large.mpo")
        assert 0 < (whole - quick).abs().max() <= 4

    def test_a_lossless_jpeg_is_decoded_whole(self, tmp_path):
        """libjpeg cannot decode a part of it; by hand, as Pillow writes none: every pixel as the one before."""
        height, width = 192, 288
        head = b"\xff\xd8\xff\xc3" + struct.pack(">HBHHB3B", 11, 8, height, width, 1, 1, 0x11, 0)
        table = b"\xff\xc4" + struct.pack(">HB16BB", 20, 0, 1, *[0] * 15, 0)
        scan = b"\xff\xda" + struct.pack(">HB2B3B", 8, 1, 1, 0, 1, 0, 0) + bytes(height * width // 8)
        (tmp_path / "large.jpg").write_bytes(head + table + scan + b"\xff\xd9")
        whole, quick = self._both(tmp_path / "large.jpg")
        assert torch.equal(whole, torch.full_like(whole, 128))
        assert torch.equal(whole, quick)

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_grey_and_cmyk(self, tmp_path, mode):
        self._photo(192, 288).convert(mode).save(tmp_path / "large.jpg", quality=92)
        whole, quick = self._both(tmp_path / "large.jpg")
        assert 0 < (whole - quick).abs().max() <= 4

    @pytest.mark.parametrize(("suffix", "height", "width"), [
        ("png", 192, 288), ("jpg", 190, 288), ("jpg", 192, 286), ("jpg", 193, 288), ("jpg", 192, 289)])
    def test_others_are_decoded_whole(self, tmp_path, suffix, height, width):
        """No JPEG; less than six times the wanted sides; odd sides, whose half would not lie as they do."""
        self._photo(height, width).save(tmp_path / f"other.{suffix}")
        whole, quick = self._both(tmp_path / f"other.{suffix}")
        assert torch.equal(whole, quick)

    def test_with_a_box_they_are_decoded_whole(self, tmp_path):
        self._photo(384, 576).save(tmp_path / "large.jpg")
        whole, quick = self._both(tmp_path / "large.jpg", box=(0.1, 0.1, 0.9, 0.9))
        assert torch.equal(whole, quick)

    def test_a_truncated_one_is_named(self, tmp_path):
        self._photo(384, 576).save(tmp_path / "large.jpg")
        content = (tmp_path / "large.jpg").read_bytes()
        (tmp_path / "large.jpg").write_bytes(content[: len(content) // 2])
        with pytest.raises(InTraError, match=r"large\.jpg \(it is damaged or truncated"):
            read_set([tmp_path / "large.jpg"], size=self.SIZE, channels=3, quickly=True)


class TestAuto:
    @pytest.mark.parametrize("sizes, expected", [
        ([(1024, 1024)], (256, 256)), ([(64, 64)], (256, 256)), ([(480, 640)], (224, 288)), ([(640, 480)], (288, 224)),
        ([(100, 100), (100, 100), (100, 900)], (256, 256)),  # the median is not moved by one odd image
        ([(100, 10_000)], (112, 2560)),  # a window of 7 patches must fit
    ])  # fmt: skip
    def test_image_size(self, sizes, expected):
        assert auto_image_size(sizes, patch_size=16, window_size=7) == expected

    @given(st.lists(st.tuples(st.integers(1, 9999), st.integers(1, 9999)), min_size=1, max_size=5),
           st.integers(1, 32), st.one_of(st.none(), st.integers(1, 9)))
    def test_image_size_fits_the_grid(self, sizes, patch_size, window_size):
        height, width = auto_image_size(sizes, patch_size=patch_size, window_size=window_size)
        assert height % patch_size == width % patch_size == 0
        assert min(height, width) >= patch_size * (window_size or 3)

    @pytest.mark.parametrize("channels, expected", [([1, 1], 1), ([3, 3], 3), ([1, 3, 1], 3), ([5, 5], 5)])
    def test_channels(self, channels, expected):
        assert auto_channels([ImageInfo(Path("a"), (8, 8), c, 8) for c in channels]) == expected

    def test_odd_channels_are_named(self):
        infos = [ImageInfo(Path(f"{i}.tif"), (8, 8), c, 8) for i, c in enumerate([3, 3, 4, 3])]
        with pytest.raises(InTraError, match=r"most have 3, but 2\.tif has 4"):
            auto_channels(infos)

    def test_nothing(self):
        with pytest.raises(InTraError):
            auto_channels([])
        with pytest.raises(InTraError):
            auto_image_size([], patch_size=16, window_size=7)


def test_mask_is_true_where_any_channel_is_not_zero(tmp_path):
    mask = np.zeros((2, 3, 3), np.uint8)
    mask[0, 1] = 255, 255, 255
    mask[1, 2] = 0, 0, 1
    path = _saved(tmp_path / "a.png", mask)
    assert read_mask(path).tolist() == [[False, True, False], [False, False, True]]
