"""Npz files: mapped or read, damaged, hostile; images written one batch after the other."""

import io
import zipfile

import numpy as np
import pytest

from taming.eval.npz import NpzFile, write_images, write_npz

ARRAYS = {
    "mu": np.arange(5.0),
    "arr_0": np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "empty": np.zeros((0, 4)),
    "count": np.array(7),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    with NpzFile(tmp_path / "x.npz") as file:
        assert file.names == list(ARRAYS)
        for name, values in ARRAYS.items():
            for found in (file.array(name), file.mapped(name)):
                assert found.dtype == values.dtype
                np.testing.assert_array_equal(found, values)
        assert isinstance(file.mapped("arr_0"), np.memmap) == (save is np.savez)
        assert file.array("mu").flags.writeable


def test_a_name_that_is_not_there_is_named(tmp_path):
    write_npz(tmp_path / "x.npz", {"mu": np.zeros(2)})
    with NpzFile(tmp_path / "x.npz") as file, pytest.raises(ValueError, match="no array sigma; it has mu"):
        file.array("sigma")


def member(header, data=b""):
    """An array with any header."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


HOSTILE = {
    "objects": member({"descr": "|O", "fortran_order": False, "shape": (1,)}, b"cos\nsystem\n"),
    "more than there is": member({"descr": "<f8", "fortran_order": False, "shape": (10**12,)}, b"12345678"),
    "less than there is": member({"descr": "<f8", "fortran_order": False, "shape": (1,)}, b"1" * 16),
    "a negative side": member({"descr": "<f8", "fortran_order": False, "shape": (-1, -1)}, b"12345678"),
    "no array": b"hello",
    "nothing": b"",
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_arrays_end_in_one_line(tmp_path, what, compression):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
        archive.writestr("mu.npy", HOSTILE[what])
    with (
        NpzFile(tmp_path / "x.npz") as file,
        pytest.raises(ValueError, match=r"x\.npz: the array mu is damaged"),
    ):
        file.mapped("mu")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no zip at all" * 9])
def test_other_files_are_named(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match="is not an .npz file"):
        NpzFile(tmp_path / "x.npz")


def test_any_flipped_byte_gives_values_or_one_line(tmp_path):
    write_npz(tmp_path / "x.npz", ARRAYS)
    whole, rng = (tmp_path / "x.npz").read_bytes(), np.random.default_rng(0)
    for place in rng.integers(len(whole), size=300):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "y.npz").write_bytes(damaged)
        try:
            with NpzFile(tmp_path / "y.npz") as file:
                for name in file.names:
                    file.array(name)
        except ValueError as error:
            assert "y.npz" in str(error) and "\n" not in str(error)


def test_images_are_written_as_numpy_reads_them(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(7, 4, 5, 3), dtype=np.uint8)
    parts = (images[i : i + 3] for i in range(0, 7, 3))
    write_images(tmp_path / "x.npz", parts, images.shape, {"more": np.arange(3)})
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["more"], np.arange(3))


@pytest.mark.parametrize("shape", [(8, 4, 5, 3), (7, 5, 4, 3)])
def test_images_of_another_shape_are_not_written(tmp_path, shape):
    with pytest.raises(ValueError, match=r"images (of|were given)"):
        write_images(tmp_path / "x.npz", iter([np.zeros((7, 4, 5, 3), np.uint8)]), shape)
