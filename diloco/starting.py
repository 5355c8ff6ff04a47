"""What the modules of a run start from where `init_from` names something: an earlier run's, or one set of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import safetensors.torch

from diloco.checkpoint import MANIFEST, module_path, read_modules
from diloco.messages import ModuleKey, Modules, Tensors

VALUES = "values/"  # how a module's saved tensors that are values are named


class StartingValues:
    """Float32 values of a run's modules: each its own, or where there is but one set of weights all the same."""

    def __init__(self, folder: str, modules: Modules) -> None:
        """`folder`: a checkpoint, or a folder with safetensors. Raises ValueError where it cannot fill `modules`."""
        self._folder, self._modules = folder, modules
        manifest = _manifest(folder)
        self._shared: Tensors | None = None
        if manifest is None or not _several(_keys(manifest)):
            self._shared = read_values(folder)
        else:
            _check_same(folder, manifest, modules)

    def of(self, keys: Sequence[ModuleKey]) -> dict[ModuleKey, Tensors]:
        """The values of these modules by parameter name, of which only they are read."""
        if self._shared is not None:
            return dict.fromkeys(keys, self._shared)
        return {key: _values(self._folder, key) for key in keys}


def read_values(folder: str) -> Tensors:
    """Float32 values by parameter name: of a checkpoint's modules, or of all safetensors files in another folder.

    Raises ValueError where there are none, or several for one name, as in the checkpoint of a run of several paths.
    """
    manifest = _manifest(folder)
    if manifest is None:
        return _read_folder(folder)
    keys = _keys(manifest)
    if _several(keys):
        raise ValueError(f"{folder} is of a run with several paths, and no single model: give one of RUN/export/path*")
    return {name: value for key in keys for name, value in _values(folder, key).items()}


def _read_folder(folder: str) -> Tensors:
    values: Tensors = {}
    fs, plain = fsspec.core.url_to_fs(folder)
    for path in sorted(fs.glob(f"{plain}/*.safetensors")):
        with fs.open(path, "rb") as file:
            values |= {name: value.float() for name, value in safetensors.torch.load(file.read()).items()}
    if not values and fs.exists(f"{plain}/paths.json"):
        raise ValueError(
            f"init_from={folder} holds several paths: give the run itself, so that each module starts from its own "
            "values, or one path for all of them, such as its folder path0"
        )
    if not values:
        raise ValueError(f"init_from={folder} holds no run and no *.safetensors; give a run or an exported model")
    return values


def _values(folder: str, key: ModuleKey) -> Tensors:
    tensors = read_modules(folder, [key])[key].tensors
    return {name.removeprefix(VALUES): value for name, value in tensors.items() if name.startswith(VALUES)}


def _manifest(folder: str) -> Mapping[str, Any] | None:
    """That of a checkpoint, or None where it is none."""
    fs, plain = fsspec.core.url_to_fs(folder)
    if not fs.exists(f"{plain}/{MANIFEST}"):
        return None
    with fs.open(f"{plain}/{MANIFEST}", "r") as file:
        found: dict[str, Any] = json.load(file)
    return found


def _keys(manifest: Mapping[str, Any]) -> list[ModuleKey]:
    """The modules of a checkpoint."""
    found = []
    for path in sorted(path for path in manifest["files"] if path.startswith("modules/")):
        slot, _, index = path.removeprefix("modules/").removesuffix(".safetensors").rpartition(".")
        found.append(ModuleKey(f"{slot}/{index}"))
        assert module_path(found[-1]) == path
    return found


def _several(keys: Sequence[ModuleKey]) -> bool:
    """Whether a slot has several modules, and so its parameters several values."""
    return len({key.rpartition("/")[0] for key in keys}) < len(keys)


def _check_same(folder: str, manifest: Mapping[str, Any], modules: Modules) -> None:
    saved = {key: manifest["layout"][key.rpartition("/")[0]] for key in _keys(manifest)}
    own = {key: modules.slots[modules.slot_of(key)] for key in modules.shards}
    differing = sorted(set(saved) ^ set(own)) or [key for key in own if set(saved[key]) != set(own[key])]
    if differing:
        raise ValueError(
            f"init_from={folder} has several modules of a slot, and not those of this layout: {differing[0]} is not in"
            " both, or of other parameters. Use that run's layout, or start all modules from one of its paths:"
            " init_from=RUN/export/path0"
        )
