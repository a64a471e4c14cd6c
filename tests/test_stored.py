"""Tensors read from a safetensors file by hand, as the library does; none of a damaged one."""

import json

import pytest
import torch
from safetensors.torch import save_file

from stored import DTYPES, LARGE_PAGES, NotStored, new_tensor, opened


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"{dtype}": torch.randint(-100, 100, (3, 5), generator=generator).to(dtype)
        for dtype in DTYPES.values()
    }
    return made | {
        "none": torch.zeros(0, 7),
        "scalar": torch.tensor(3.0),
        "large": torch.randn(1000, 1200, generator=generator),  # over `LARGE_PAGES`
    }


@pytest.fixture
def path(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors", {"format": "pt"})
    return tmp_path / "a.safetensors"


def test_every_tensor_is_the_one_that_was_written(path):
    with opened(path) as file:
        assert file.places.keys() == tensors().keys()
        for name, tensor in tensors().items():
            read = file.read(name)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
        with pytest.raises(NotStored, match="other is missing"):
            file.read("other")
    with pytest.raises(ValueError):  # closed
        file.read("large")


def test_large_memory_is_like_any_other():
    for rows in (1, LARGE_PAGES // 4 // 1024, 3000):
        tensor = new_tensor((rows, 1024), torch.float32)
        tensor.fill_(2)
        assert tensor.is_contiguous() and tensor.sum() == 2 * rows * 1024


def with_header(path, change) -> None:
    """Give the file another header of the same length."""
    content = path.read_bytes()
    count = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + count])
    change(header)
    said = json.dumps(header, separators=(",", ":")).encode().ljust(count)
    assert len(said) <= count
    path.write_bytes(content[:8] + said + content[8 + count :])


def set_in(name, key, value):
    return lambda header: header[name].update({key: value})


DAMAGES = {
    "an offset behind the end": set_in("scalar", "data_offsets", [10**8, 10**8 + 4]),
    "a negative offset": set_in("scalar", "data_offsets", [-4, 0]),
    "more than the shape": set_in("scalar", "data_offsets", [0, 8]),
    "a shape of text": set_in("scalar", "shape", ["a"]),
    "a negative shape": set_in("large", "shape", [-1, -1200000]),
    "a dtype of another kind": set_in("scalar", "dtype", []),
    "no offsets": lambda header: header["scalar"].pop("data_offsets"),
    "a list": lambda header: header.update(scalar=[]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_header_that_lies_is_refused(path, damage):
    with_header(path, DAMAGES[damage])
    with pytest.raises(NotStored, match="header"), opened(path):
        pass


def test_numbers_that_torch_has_not_are_named(path):
    with_header(path, set_in("scalar", "dtype", "F1"))
    with pytest.raises(NotStored, match="type F1, which are not read"), opened(path):
        pass


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 30, b"\2" + b"\0" * 7 + b"[]"])
def test_what_is_no_file_of_tensors_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(NotStored, match="header"), opened(path):
        pass


def test_a_file_that_is_cut_while_it_is_read_is_refused(path):
    with opened(path) as file:
        place = max(file.places, key=lambda name: file.places[name].start)
        with path.open("r+b") as other:
            other.truncate(file.places[place].start + 2)
        with pytest.raises(NotStored, match="is cut off"):
            file.read(place)
