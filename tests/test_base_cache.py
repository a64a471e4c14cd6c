"""The kept base: equal to the bit, made anew when damaged, never in the way."""

import errno
import io
import json
import os
import shutil
import sys

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_base import logits, save_model

import files
from files import hash_files
from model import base, base_cache
from model.base import load_base
from ops import kernels
from ops.nf4 import PanelLinear, base_weight


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"), "40KB")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder to keep in; files of a moment ago may be remembered, and parts are small."""
    monkeypatch.setattr(files, "YOUNG_SECONDS", 0.0)
    monkeypatch.setattr(base_cache, "PART_BYTES", 40_000)
    return tmp_path / "cache"


@pytest.fixture
def quantised(monkeypatch):
    """Counts the weights that are quantised."""
    count = []
    real = base.quantize
    monkeypatch.setattr(base, "quantize", lambda *a: count.append(1) or real(*a))
    return count


@pytest.fixture
def read(monkeypatch):
    """Names the files that are hashed."""
    names = []
    real = files._hash_all
    monkeypatch.setattr(
        files, "_hash_all", lambda paths: names.extend(p.name for p in paths) or real(paths)
    )
    return names


def load(folder, cache="", quantization="nf4", dtype=torch.float32):
    return load_base(folder, None, dtype, "cpu", quantization, cache)


def entry(cache):
    [found] = [path for path in cache.iterdir() if path.name != files.MEMORY]
    return found


def contents_of(value):
    """Everything that a parameter or a quantisation state is made of, by path."""
    if isinstance(value, bnb.functional.QuantState):
        return {
            f"{name}.{key}": leaf
            for name, inner in vars(value).items()
            for key, leaf in contents_of(inner).items()
        }
    return {"": value}


def assert_same(found, expected):
    """Two models: every parameter, every attribute and every tensor of every state, every bit."""
    parameters = dict(found.named_parameters())
    assert parameters.keys() == dict(expected.named_parameters()).keys()
    for name, other in expected.named_parameters():
        mine = parameters[name]
        assert type(mine) is type(other) and mine.dtype == other.dtype
        assert torch.equal(mine.data, other.data) and mine.requires_grad == other.requires_grad
        module, reference = (m.get_submodule(name.rpartition(".")[0]) for m in (found, expected))
        assert type(module) is type(reference)
        if isinstance(reference, PanelLinear):
            assert torch.equal(module.panels.codes, reference.panels.codes)
            assert torch.equal(module.panels.scales, reference.panels.scales)
            assert module.panels.block == reference.panels.block
        if not isinstance(other, bnb.nn.Params4bit):
            continue
        for attribute in (
            "blocksize",
            "compress_statistics",
            "quant_type",
            "quant_storage",
            "bnb_quantized",
        ):
            assert getattr(mine, attribute) == getattr(other, attribute), attribute
        state, wanted = contents_of(mine.quant_state), contents_of(other.quant_state)
        for key, value in wanted.items():
            if isinstance(value, torch.Tensor):
                assert state[key].dtype == value.dtype and torch.equal(state[key], value), key
        plain = {k: v for k, v in wanted.items() if not isinstance(v, torch.Tensor)}
        if not other.quant_state.nested:  # bitsandbytes leaves the inner type out when it saves
            assert {k: state[k] for k in plain} == plain
        assert mine.module.quant_state is mine.quant_state


# -- the same -------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf4", "nf4-nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_quantising_gives(saved, cache, quantised, quantization, dtype):
    fresh = load(saved, "", quantization, dtype)
    kept = load(saved, cache, quantization, dtype)
    assert len(quantised) == 16 and len(list(entry(cache).glob("part-*"))) > 1
    again = load(saved, cache, quantization, dtype)
    assert len(quantised) == 16  # none of them anew
    for other in (kept, again):
        assert other.fingerprint == fresh.fingerprint
        assert_same(other.model, fresh.model)
        assert torch.equal(logits(other.model), logits(fresh.model))


def test_one_entry_serves_every_compute_dtype_without_kernels(saved, cache, quantised, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: ("", "switched off"))
    load(saved, cache, dtype=torch.bfloat16)
    again = load(saved, cache, dtype=torch.float32)
    assert len(quantised) == 8
    assert_same(again.model, load(saved).model)


def test_a_machine_with_kernels_has_an_entry_in_their_order(saved, cache, monkeypatch):
    with_them = load(saved, cache)
    monkeypatch.setattr(kernels, "available", lambda: ("", "switched off"))
    without = load(saved, cache)
    assert len([path for path in cache.iterdir() if path.name != files.MEMORY]) == 2
    for name, module in without.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert type(module) is bnb.nn.Linear4bit
            first, second = map(base_weight, (module, with_them.model.get_submodule(name)))
            assert torch.equal(first, second)


def test_gradients_through_a_kept_base_are_the_same(saved, cache):
    load(saved, cache)
    gradients = []
    for model in (load(saved, cache).model, load(saved).model):
        embeddings = model.model.embed_tokens(torch.arange(12)[None]).detach().requires_grad_()
        hidden = model.model(embeddings, torch.arange(12)[None], [12])
        model.lm_head(hidden).square().sum().backward()
        gradients.append(embeddings.grad)
    assert torch.equal(*gradients)


def test_tied_embeddings_stay_tied(tmp_path, cache):
    folder = save_model(tmp_path / "tied", tie_word_embeddings=True)
    load(folder, cache)
    again = load(folder, cache).model
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(load(folder).model))


def test_another_base_or_quantisation_has_an_entry_of_its_own(tmp_path, saved, cache, quantised):
    folder = shutil.copytree(saved, tmp_path / "base")
    first = load(folder, cache)
    path = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(path)
    name = next(name for name in weights if weights[name].dim() == 2)
    weights[name][0, 0] += 1
    save_file(weights, path, {"format": "pt"})
    changed = load(folder, cache)
    assert changed.fingerprint != first.fingerprint and len(quantised) == 16
    assert_same(changed.model, load(folder).model)
    load(folder, cache, "nf4-nested")
    assert len([path for path in cache.iterdir() if path.name != files.MEMORY]) == 3
    plain = load(folder, cache, "none")  # has nothing to keep
    assert len(list(cache.iterdir())) == 4 and plain.fingerprint == changed.fingerprint


def test_a_parameter_is_no_view_into_a_file(saved, cache):
    """A file that is written over must not change the model, nor end the process."""
    load(saved, cache)
    for model in (load(saved, cache).model, load(saved, "", "none", torch.bfloat16).model):
        before = logits(model).clone()
        for path in [*saved.glob("*.safetensors"), *entry(cache).glob("part-*")]:
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.write(bytes(len(content)))
            with path.open("r+b") as file:
                file.write(content)
        maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
        assert str(saved) not in maps and str(cache) not in maps
        assert torch.equal(logits(model), before)


# -- damaged, and not to be written ---------------------------------------------------------------


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def other_manifest(folder) -> None:
    path = folder / base_cache.MANIFEST
    content = json.loads(path.read_text())
    content["parameters"].pop()
    path.write_text(json.dumps(content | {"sha256": base_cache._seal(content["parameters"])}))


def other_tensor(folder) -> None:
    """Sealed well, and of another shape than the layer's: never to reach the C++ below."""
    path = folder / base_cache.MANIFEST
    content = json.loads(path.read_text())
    row = next(row for row in content["parameters"] if len(row["tensors"]) > 1)
    tensors = load_file(folder / row["file"])
    [key] = (key for key in row["tensors"] if key.endswith((".absmax", base_cache.SCALES)))
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, folder / row["file"])
    row["tensors"][key] = base_cache._describe(tensors[key])
    path.write_text(json.dumps(content | {"sha256": base_cache._seal(content["parameters"])}))


DAMAGES = {
    "a bit of a tensor": (lambda f: flip(f / "part-00001.safetensors", -1), "its sha256"),
    "a header": (lambda f: flip(f / "part-00002.safetensors", 3), "part-00002"),
    "cut": (
        lambda f: (f / "part-00001.safetensors").write_bytes(
            (f / "part-00001.safetensors").read_bytes()[:-10]
        ),
        "part-00001",
    ),
    "a part missing": (lambda f: (f / "part-00002.safetensors").unlink(), "part-00002"),
    "no manifest": (lambda f: (f / "MANIFEST.json").unlink(), "MANIFEST"),
    "a bit of the manifest": (lambda f: flip(f / "MANIFEST.json", 300), "MANIFEST"),
    "manifest is a list": (lambda f: (f / "MANIFEST.json").write_text("[]"), "not a JSON object"),
    "a parameter left out": (other_manifest, "names other parameters"),
    "another shape": (other_tensor, "is not this layer's"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_named_and_made_anew(saved, cache, quantised, capsys, damage):
    load(saved, cache)
    folder = entry(cache)
    whole = (folder / base_cache.MANIFEST).read_bytes()
    break_it, said = DAMAGES[damage]
    break_it(folder)
    again = load(saved, cache)
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {folder}: ") and said in told and told.count("\n") == 1
    assert len(quantised) == 16
    assert_same(again.model, load(saved).model)
    assert (folder / base_cache.MANIFEST).read_bytes() == whole
    capsys.readouterr()
    assert_same(load(saved, cache).model, again.model)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("call", ["save_file", "replace", "fsync", "mkdir"])
def test_a_cache_that_cannot_be_written_is_a_warning(saved, cache, monkeypatch, capsys, call):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if call == "save_file":
            patch.setattr(base_cache, "save_file", fail)
        elif call == "mkdir":
            patch.setattr(base_cache.Path, "mkdir", fail)
        else:
            patch.setattr(os, call, fail)
        loaded = load(saved, cache)
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1 and "No space left on device" in told
    assert_same(loaded.model, load(saved).model)
    left = [path.name for path in cache.iterdir()] if cache.exists() else []
    assert set(left) <= {files.MEMORY}


def test_too_little_room_is_found_before_anything_is_written(saved, cache, monkeypatch, capsys):
    monkeypatch.setattr(base_cache, "RESERVE", 10**18)
    monkeypatch.setattr(base_cache, "save_file", None)  # calling it would be a TypeError
    load(saved, cache)
    assert "GB that are free" in capsys.readouterr().err


def test_a_kill_leaves_no_entry_and_what_it_left_is_swept(saved, cache, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(base_cache.Writer, "discard", lambda self: None)  # no time for that
        patch.setattr(base_cache.Writer, "close", die)
        with pytest.raises(Killed):
            load(saved, cache)
    [left] = [path for path in cache.iterdir() if path.name.startswith(".tmp-")]
    old = left.rename(left.with_name(left.name + "0"))  # of another process
    os.utime(old, (0, 0))
    load(saved, cache)
    assert not old.exists() and (entry(cache) / base_cache.MANIFEST).is_file()


def test_of_two_processes_that_write_at_once_one_wins(saved, cache, monkeypatch):
    rename = os.replace

    def late(source, target):
        if str(source).endswith(f"-{os.getpid()}"):
            shutil.copytree(source, target)  # the other one was quicker
        rename(source, target)

    monkeypatch.setattr(os, "replace", late)
    load(saved, cache)
    assert_same(load(saved, cache).model, load(saved).model)
    assert not list(cache.glob(".tmp-*"))


# -- the fingerprint ------------------------------------------------------------------------------


def test_files_that_stayed_as_they_were_are_not_read_again(saved, cache, read):
    paths = sorted(saved.glob("*.safetensors"))
    expected = hash_files(paths)
    assert hash_files(paths, cache) == expected and len(read) == 2 * len(paths)
    assert hash_files(paths, cache) == expected and len(read) == 2 * len(paths)
    assert hash_files(paths[::-1], cache) != expected  # the order counts
    assert hash_files(paths, cache / "other") == expected


@pytest.mark.parametrize("change", ["bytes", "same length and time", "replaced", "moved"])
def test_a_change_of_a_file_is_noticed(saved, tmp_path, cache, read, change):
    folder = shutil.copytree(saved, tmp_path / "base")
    path = folder / "config.json"
    before, status = hash_files([path], cache), path.stat()
    content = path.read_bytes()
    if change == "bytes":
        path.write_bytes(content + b"\n")
    elif change == "same length and time":
        path.write_bytes(content[:-2] + b" }")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "replaced":
        other = folder / "other.json"
        other.write_bytes(content[:-2] + b" }")
        os.replace(other, path)
    else:
        path = path.rename(tmp_path / "config.json")
    after = hash_files([path], cache)
    assert len(read) == 2 and (after == before) == (change == "moved")


def test_a_file_of_a_moment_ago_is_not_believed(saved, tmp_path, cache, read, monkeypatch):
    monkeypatch.setattr(files, "YOUNG_SECONDS", 3600.0)
    path = tmp_path / "new.json"
    path.write_text("{}")
    for _ in range(2):
        hash_files([path], cache)
    assert len(read) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"files": 3}', '{"sha256": 5}', "\xff"])
def test_what_was_remembered_may_be_damaged(saved, cache, read, content):
    paths = [saved / "config.json"]
    expected = hash_files(paths, cache)
    [place] = (cache / files.MEMORY).iterdir()
    for changed in (content, place.read_text().replace(expected, expected[::-1])):
        place.write_text(changed, encoding="latin-1")
        assert hash_files(paths, cache) == expected
    assert len(read) == 3
    assert hash_files(paths, cache) == expected and len(read) == 3


# -- the progress bar -----------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("large", "terminal"), [(True, True), (False, True), (True, False)])
def test_a_bar_is_shown_on_a_terminal_for_a_large_base(saved, cache, monkeypatch, large, terminal):
    said = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    if large:
        monkeypatch.setattr(files, "BAR_BYTES", 1000)
    load(saved, cache)
    load(saved, cache)
    for what in ("reading the weights", "loading the base", "loading the quantised base"):
        assert (f"{what}: 100%" in said.getvalue()) == (large and terminal), what
    assert ("B/s" in said.getvalue()) == (large and terminal)
