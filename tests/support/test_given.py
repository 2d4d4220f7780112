# SPDX-License-Identifier: Apache-2.0
"""Arguments of public functions are refused by name, and good ones pass."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ahcq_plugin.support.batches import blaming, check_batches, check_item, naming_item
from ahcq_plugin.support.files import check_work_dir, given_path, replacing
from ahcq_plugin.support.given import check_flag, check_function, check_mapping, check_model, check_usable


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (check_model, None, "`model` must be a torch.nn.Module, got NoneType None"),
        (check_model, nn.Linear, "must be a torch.nn.Module, got the class Linear"),
        (check_model, torch.jit.script(nn.Linear(2, 2)), "`model` is a ScriptModule"),
        (lambda v: check_function(v, "loss"), "mse", "`loss` must be a function, got str 'mse'"),
        (lambda v: check_flag(v, "resume"), "no", "`resume` must be True or False, got 'no'"),
        (lambda v: check_flag(v, "resume"), 1, "`resume` must be True or False, got 1"),
        (lambda v: check_mapping(v, "notes"), {5: 1}, "`notes` must be a dict with texts as keys"),
        (given_path, 5, "`path` must be a text or a Path, got int 5"),
        (given_path, b"x", "`path` must be a text or a Path, got bytes"),
        (check_batches, {"a": 1}, "`batches` must be a sequence"),
        (check_batches, "abc", "`batches` must be a sequence"),
    ],
)
def test_another_type_is_named(check, value, message):
    with pytest.raises(TypeError, match=message):
        check(value)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_paths_that_no_file_has(path):
    with pytest.raises(ValueError, match="`path` must be the path of a file or folder"):
        given_path(path)


@pytest.mark.parametrize("device", ["", "gpu", "meta", "mps", True, [1], 1.5, torch.device("meta")])
def test_devices_that_hold_no_tensor(device):
    with pytest.raises(ValueError, match="cannot be used: .*; give cpu, cuda or cuda:N"):
        check_usable(device)


def test_good_arguments_pass(tmp_path):
    check_model(nn.Identity())
    check_function(len, "f")
    check_flag(False, "f")
    check_mapping({"a": 1}, "m")
    assert given_path("a/b") == Path("a/b") and check_usable("cpu") == torch.device("cpu")
    check_work_dir(tmp_path / "new")
    assert (tmp_path / "new").is_dir()


def test_errors_on_an_item_say_which_and_our_own_pass():
    with (
        pytest.raises(ValueError, match=r"`batches\[3\]` does not go through `forward` \(ZeroDiv"),
        naming_item("batches[3]"),
    ):
        1 / 0  # noqa: B018 - what is tried
    with pytest.raises(ValueError, match=r"^`batch` holds NaN: look"), blaming("never"):
        check_item(torch.tensor([1.0, torch.nan]), "batch")


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    import os

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(FileExistsError, match="is no file that can be replaced"), replacing(path):
            pytest.fail("written")
    assert pipe.is_fifo()
