import errno
from pathlib import Path

import pytest
import torch

from duquant.models.tensor_files import hash_tensors, save_tensors


def test_hash_depends_on_names_dtypes_shapes_and_bytes() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3), "c": torch.ones(4)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3), "b": torch.full((4,), 2.0)},
    ]
    assert len({hash_tensors(base), *(hash_tensors(other) for other in others)}) == 5
    assert hash_tensors(base) == hash_tensors(dict(reversed(base.items())))


def test_hash_takes_empty_and_strided_tensors() -> None:
    t = torch.arange(6.0).view(2, 3)
    assert hash_tensors({"a": t.T}) == hash_tensors({"a": t.T.contiguous()})
    assert hash_tensors({"a": torch.empty(0)}) != hash_tensors({})


def test_equal_tensors_in_any_order_give_equal_files(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(4.0), "a": torch.ones(2, 3).T}
    save_tensors(tmp_path / "one", tensors)
    save_tensors(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_directory_that_is_gone_is_an_os_error_with_its_number_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone") as caught:
        save_tensors(tmp_path / "gone" / "file", {"a": torch.ones(2)})
    assert caught.value.errno == errno.ENOENT
    assert not list(tmp_path.iterdir())
