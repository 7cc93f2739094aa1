from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from gradbench.data import images
from gradbench.data.images import ImageFiles, decode, digests, image_tree, listed
from gradbench.errors import DataError

SIZE = 8
LEFT, RIGHT = (200, 40, 90), (20, 220, 140)
JPEG_ERROR = 3  # levels of 255 by which JPEG misses a flat colour
RESAMPLED = 6  # levels of 255 between two ways of making a smooth image smaller


def flat(level: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def halves(width: int = 24, height: int = 16) -> Image.Image:
    """Return an image whose left third is one colour and whose rest is another."""
    image = Image.new("RGB", (width, height), RIGHT)
    image.paste(LEFT, (0, 0, width // 3, height))
    return image


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def ramp() -> NDArray[np.float64]:
    return np.add.outer(np.linspace(0, 0.5, 16), np.linspace(0, 0.5, 16))


def image_set(paths: list[Path], **targets: Tensor) -> ImageFiles:
    return ImageFiles([path.name for path in paths], paths, targets, size=SIZE)


def png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds one row of nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


class TestTake:
    def test_nothing_is_opened_before_the_first_take(self, tmp_path: Path) -> None:
        examples = image_set([tmp_path / "absent.png"])
        assert len(examples.subset(np.array([0]))) == 1
        with pytest.raises(DataError, match=r"absent\.png \(missing\)"):
            examples.take(np.array([0]))

    @pytest.mark.parametrize("memory", [images.MEMORY, 0], ids=["kept", "decoded at each take"])
    def test_examples_come_in_the_order_of_the_indices(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
    ) -> None:
        monkeypatch.setattr(images, "MEMORY", memory)
        paths = [save(tmp_path / f"{i}.png", flat(i)) for i in range(37)]
        examples = image_set(paths, label=torch.arange(37), mask=torch.eye(37))
        taken = examples.take(np.array([5, 36, 0, 5]))
        assert taken["image"].shape == (4, 3, SIZE, SIZE)
        assert taken["image"].dtype == torch.uint8
        assert taken["image"].amax((1, 2, 3)).tolist() == [5, 36, 0, 5]
        assert taken["label"].tolist() == [5, 36, 0, 5]
        assert_close(taken["mask"], torch.eye(37)[[5, 36, 0, 5]])

    def test_a_set_that_fits_is_read_once(self, tmp_path: Path) -> None:
        paths = [save(tmp_path / f"{i}.png", flat(i)) for i in range(3)]
        examples = image_set(paths)
        first = examples.take(np.array([2]))["image"]
        for path in paths:
            path.unlink()
        first.zero_()
        assert examples.take(np.array([2, 1]))["image"].amax((1, 2, 3)).tolist() == [2, 1]

    def test_of_a_larger_set_only_what_is_taken_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(images, "MEMORY", 3 * SIZE**2 * 2 - 1)
        examples = image_set([save(tmp_path / "0.png", flat(7)), tmp_path / "absent.png"])
        assert int(examples.take(np.array([0]))["image"].max()) == 7

    def test_the_limit_counts_every_image(self, tmp_path: Path) -> None:
        assert 3 * 64**2 * 100_000 < images.MEMORY < 3 * 224**2 * 100_000


class TestDecode:
    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [(mode, ".png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
        + [(mode, ".tif") for mode in ("1", "L", "P", "RGB", "RGBA", "I", "I;16", "F")],
    )
    def test_every_kind_of_pixel_is_read(self, tmp_path: Path, mode: str, suffix: str) -> None:
        path = tmp_path / f"image{suffix}"
        black_and_white = Image.new("L", (16, 8), 0)
        black_and_white.paste(255, (8, 0, 16, 8))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(black_and_white).astype(np.uint16) * 16)
        else:
            image = black_and_white.convert(mode)
        assert image.mode == mode
        [found] = decode([save(path, image)], SIZE)
        assert found.shape == (3, SIZE, SIZE)
        assert found[:, :, 0].max() == 0
        assert found[:, :, -1].min() == 255

    def test_other_colours_are_read(self, tmp_path: Path) -> None:
        cmyk = save(tmp_path / "cmyk.jpg", Image.new("CMYK", (9, 9), (255, 0, 0, 0)))
        palette = Image.new("P", (9, 9), 1)
        palette.putpalette([0, 0, 0, *RIGHT])
        clear = save(tmp_path / "palette.png", palette, transparency=bytes([255, 128]))
        found = decode([cmyk, clear], SIZE)
        assert abs(found[0, :, 4, 4].astype(int) - [0, 255, 255]).max() <= JPEG_ERROR
        assert found[1, :, 4, 4].tolist() == list(RIGHT)

    def test_films_of_any_depth_look_alike(self, tmp_path: Path) -> None:
        paths = []
        for bits in (10, 12, 16):
            pixels = np.round(ramp() * (2**bits - 1)).astype(np.uint16)
            paths.append(save(tmp_path / f"{bits}.png", Image.fromarray(pixels)))
        paths.append(save(tmp_path / "offset.tif", Image.fromarray(ramp().astype(np.float32) - 3)))
        paths.append(save(tmp_path / "eight.png", Image.fromarray((ramp() * 255).astype(np.uint8))))
        found = decode(paths, SIZE).astype(int)
        assert abs(found - found[0]).max() <= 1
        assert found[0].max() > 220

    def test_a_film_without_content_is_black(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.png", Image.fromarray(np.full((9, 9), 700, np.uint16)))
        assert decode([path], SIZE).max() == 0

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_images_are_turned_upright(self, tmp_path: Path, orientation: int) -> None:
        stored = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
        upright = {
            1: stored,
            2: stored[:, ::-1],
            3: stored[::-1, ::-1],
            4: stored[::-1],
            5: stored.T,
            6: np.rot90(stored, -1),
            7: stored[::-1, ::-1].T,
            8: np.rot90(stored, 1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = save(tmp_path / "turned.png", Image.fromarray(stored), exif=exif)
        plain = save(tmp_path / "plain.png", Image.fromarray(np.ascontiguousarray(upright)))
        found = decode([turned, plain], SIZE)
        np.testing.assert_array_equal(found[0], found[1])

    @pytest.mark.parametrize("turned", [False, True], ids=["wide", "high"])
    def test_the_centre_of_the_longer_side_is_kept(self, tmp_path: Path, turned: bool) -> None:
        image = Image.new("RGB", (3 * SIZE, SIZE), LEFT)
        image.paste(RIGHT, (SIZE, 0, 2 * SIZE, SIZE))
        image = image.transpose(Image.Transpose.ROTATE_90) if turned else image
        [found] = decode([save(tmp_path / "x.png", image)], SIZE)
        assert (found == np.array(RIGHT)[:, None, None]).all()

    def test_small_images_are_scaled_up(self, tmp_path: Path) -> None:
        [found] = decode([save(tmp_path / "x.png", flat(77, (2, 1)))], SIZE)
        assert (found == 77).all()

    def test_fine_patterns_are_averaged(self, tmp_path: Path) -> None:
        board = (np.indices((16 * SIZE, 16 * SIZE)).sum(0) % 2 * 255).astype(np.uint8)
        [found] = decode([save(tmp_path / "x.png", Image.fromarray(board))], SIZE)
        assert abs(found.astype(int) - 128).max() <= RESAMPLED

    @pytest.mark.parametrize("size", [SIZE, 200])
    def test_a_large_jpeg_is_what_the_same_png_is(self, tmp_path: Path, size: int) -> None:
        waves = np.sin(np.arange(640) / 2.5) * np.sin(np.arange(480) / 2.5)[:, None]
        image = Image.fromarray((128 + 120 * waves).astype(np.uint8))
        paths = [save(tmp_path / "x.jpg", image, quality=95), save(tmp_path / "x.png", image)]
        found = decode(paths, size).astype(int)
        assert abs(found[0] - found[1]).max() <= RESAMPLED

    def test_damaged_metadata_is_no_damage(self, tmp_path: Path) -> None:
        damaged = save(tmp_path / "x.jpg", flat(90), exif=b"Exif\0\0II*\0nonsense")
        assert abs(decode([damaged], SIZE).astype(int) - 90).max() <= JPEG_ERROR


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


class TestUnreadable:
    @pytest.mark.parametrize(
        ("name", "spoil", "reason"),
        [
            ("x.png", truncate, "truncated"),
            ("x.jpg", truncate, "truncated"),
            ("x.png", Path.unlink, "missing"),
            ("x.png", lambda path: path.write_bytes(b""), "no image"),
            ("x.png", lambda path: path.write_text("<html>not found</html>"), "no image"),
            ("x.png", lambda path: path.write_bytes(png(20_000, 20_000)), "more than 89 megap"),
            ("x.png", lambda path: path.write_bytes(png(10_000, 10_000)), "more than 89 megap"),
            ("x.tif", lambda path: path.write_bytes(path.read_bytes()[:40]), ""),
            ("a\0b.png", lambda path: None, "damaged: embedded null byte"),
        ],
    )
    def test_the_reason_is_said(
        self, tmp_path: Path, name: str, spoil: Callable[[Path], object], reason: str
    ) -> None:
        path = tmp_path / name
        if "\0" not in name:
            noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            save(path, Image.fromarray(noise))
        spoil(path)
        with pytest.raises(DataError) as caught:
            decode([path], SIZE)
        assert f"{path} ({reason}" in str(caught.value)

    def test_values_that_are_no_numbers_are_refused(self, tmp_path: Path) -> None:
        pixels = np.full((9, 9), np.nan, np.float32)
        path = save(tmp_path / "x.tif", Image.fromarray(pixels))
        with pytest.raises(DataError, match="no numbers"):
            decode([path], SIZE)

    def test_all_are_named_at_once(self, tmp_path: Path) -> None:
        paths = [save(tmp_path / f"{i}.png", flat(i)) for i in range(9)]
        for i in (1, 4, 8):
            paths[i].write_bytes(b"nothing")
        with pytest.raises(DataError) as caught:
            image_set(paths).take(np.array([0]))
        text = str(caught.value)
        assert "3 of 9 files" in text
        assert [i for i in range(9) if f"{i}.png" in text] == [1, 4, 8]
        assert "\n" not in text

    def test_beyond_a_limit_they_are_counted(self, tmp_path: Path) -> None:
        paths = [tmp_path / f"{i}.png" for i in range(images.NAMED + 37)]
        with pytest.raises(DataError, match=r"57 of 57 files .* … and 37 more;"):
            decode(paths, SIZE)

    def test_a_set_can_be_taken_from_once_its_files_are_mended(self, tmp_path: Path) -> None:
        examples = image_set([tmp_path / "x.png"])
        with pytest.raises(DataError):
            examples.take(np.array([0]))
        save(tmp_path / "x.png", flat(3))
        assert int(examples.take(np.array([0]))["image"].max()) == 3

    def test_lack_of_memory_is_not_the_file_s_fault(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(path: Path, size: int) -> None:
            raise MemoryError

        monkeypatch.setattr(images, "_decode", fail)
        with pytest.raises(MemoryError):
            decode([tmp_path / "x.png"], SIZE)


class TestDigests:
    def test_they_are_of_the_bytes(self, tmp_path: Path) -> None:
        paths = [save(tmp_path / f"{i}.png", flat(i)) for i in range(5)]
        expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        assert digests(paths) == expected

    def test_files_that_are_no_images_are_named(self, tmp_path: Path) -> None:
        paths = [save(tmp_path / "good.png", flat(1)), tmp_path / "absent.png"]
        for name, content in (("text.jpg", b"text"), ("bomb.png", png(9999, 9999))):
            paths.append(tmp_path / name)
            paths[-1].write_bytes(content)
        with pytest.raises(DataError) as caught:
            digests(paths)
        for part in ("3 of 4", "absent.png (missing)", "text.jpg (no image)", "bomb.png (more"):
            assert part in str(caught.value)


class TestTree:
    def test_classes_and_paths_are_sorted(self, tmp_path: Path) -> None:
        names = ["b/2.png", "b/10.PNG", "a/deep/er/1.jpg", "a/0.jpeg", "c/x.tiff"]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        classes, paths, labels = image_tree(tmp_path)
        assert classes == ("a", "b", "c")
        assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
            *("a/0.jpeg", "a/deep/er/1.jpg", "b/10.PNG", "b/2.png", "c/x.tiff")
        ]
        assert labels.tolist() == [0, 0, 1, 1, 2]

    def test_the_layout_of_tiny_imagenet_is_read(self, tmp_path: Path) -> None:
        for name in ("n01443537", "n01629819"):
            (tmp_path / name / "images").mkdir(parents=True)
            (tmp_path / name / f"{name}_boxes.txt").touch()
            for i in range(2):
                (tmp_path / name / "images" / f"{name}_{i}.JPEG").touch()
        classes, paths, labels = image_tree(tmp_path)
        assert classes == ("n01443537", "n01629819")
        assert [path.name for path in paths[:2]] == ["n01443537_0.JPEG", "n01443537_1.JPEG"]
        assert labels.tolist() == [0, 0, 1, 1]

    def test_hidden_and_other_files_are_left_aside(self, tmp_path: Path) -> None:
        names = ["a/1.png", "b/1.png", "a/.1.png", ".c/1.png", "a/.x/1.png", "a/Thumbs.db", "n.txt"]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        classes, paths, _ = image_tree(tmp_path)
        assert classes == ("a", "b")
        assert len(paths) == 2

    def test_links_are_followed_to_folders_and_images_not_touched(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/1.png").touch()
        for name in ("a", "b"):
            (tmp_path / "tree" / name).mkdir(parents=True)
            (tmp_path / "tree" / name / "0.png").symlink_to(tmp_path / "nowhere.png")
        (tmp_path / "tree/a/loop").symlink_to(tmp_path / "tree/a")
        (tmp_path / "tree/b/more").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "tree/c").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "tree/c/2.png").symlink_to(tmp_path / "tree/a")  # what it is, is not asked
        _, paths, labels = image_tree(tmp_path / "tree")
        found = [path.relative_to(tmp_path / "tree").as_posix() for path in paths]
        assert found == [
            *("a/0.png", "b/0.png", "b/more/1.png", "b/more/2.png", "c/1.png", "c/2.png")
        ]
        assert labels.tolist() == [0, 1, 1, 1, 2, 2]

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            ([], "an empty folder"),
            ([".hidden"], "an empty folder"),
            (["1.png", "2.png"], "none, and 2 images outside of any"),
            (["a/1.png"], "found one, 'a'"),
            (["a/1.png", "b/", "c/notes.txt"], "found none in b, c"),
            (["train/a/1.png", "Val/a/1.png"], "Val, train, which look like splits"),
        ],
    )
    def test_other_folders_are_refused(
        self, tmp_path: Path, names: list[str], expected: str
    ) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("/") else path.touch()
        with pytest.raises(DataError, match=expected):
            image_tree(tmp_path)

    def test_a_folder_that_is_none_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such folder"):
            image_tree(tmp_path / "absent")
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match="Not a directory"):
            image_tree(tmp_path / "file")

    def test_names_that_are_no_text_are_refused(self, tmp_path: Path) -> None:
        for name in (b"a", b"b"):
            (tmp_path / name.decode()).mkdir()
        try:
            (tmp_path / "a" / b"\xff.png".decode(errors="surrogateescape")).touch()
        except OSError:
            pytest.skip("the file system accepts text alone")
        with pytest.raises(DataError, match="UTF-8"):
            image_tree(tmp_path)


def test_a_list_ends_with_a_count() -> None:
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c", "d"], 2, "; ") == "a; b … and 2 more"
