"""Caches in files: a prompt that was paid for once serves other processes.

A safetensors file. Its tensors are the used part of every packed arena and whatever a cache holds
dense; its header says, as json, how they go together (:func:`_Writer.node`), which version of this
file it is, whose model's cache, and the SHA-256 of all of it. Nothing of it is executed: classes
are taken from ``transformers.cache_utils`` by name.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from squat_fx.api import compiled_of
from squat_fx.calibration import Fingerprint
from squat_fx.codecs import codec_spec
from squat_fx.joined import JoinedKV
from squat_fx.lenses import Join
from squat_fx.state import QuantizedKV

FORMAT, VERSION = "squat_fx cache", 1
FINGERPRINT = "fingerprint"
TAKEN = "a cache of transformers, or nested tuples, lists and dicts of tensors and plain values"


def save_cache(path: str | Path, cache: Any, model: nn.Module | None = None) -> None:
    """Write a cache to a safetensors file: packed tokens as they are, without spare capacity.

    Args:
        path: of the file.
        cache: a Hugging Face cache, or nested tuples, lists and dicts of tensors.
        model: whose cache it is; its fingerprint is kept, so that :func:`load_cache` can refuse
            another model.

    Raises:
        TypeError: ``cache`` holds something else; the message says what.
    """
    from safetensors.torch import save_file

    writer = _Writer()
    about: dict[str, Any] = {"version": VERSION, "cache": writer.node(cache), "model": None}
    if model is not None:
        fingerprint = Fingerprint.of(model)
        about["model"] = {"name": type(model).__name__, "structure": fingerprint.structure}
        writer.tensors[FINGERPRINT] = fingerprint.sample
    tensors = {name: t.detach().cpu().contiguous() for name, t in writer.tensors.items()}
    text = json.dumps(about)
    metadata = {"format": FORMAT, "about": text, "sha256": _checksum(text, tensors)}
    save_file(tensors, str(path), metadata=metadata)


def load_cache(
    path: str | Path, model: nn.Module | None = None, *, device: torch.device | str | None = None
) -> Any:
    """Read what :func:`save_cache` wrote, as it was.

    Args:
        path: of the file.
        model: the model that will read the cache. The file must have been saved with it, and if it
            was compiled with another codec, that is an error too.
        device: where to; by default where ``model`` is, and without one the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no cache file, a damaged one, or one of another version, model or codec.
    """
    about, tensors = _read(path)
    if model is not None:
        _check_model(path, about, tensors, model)
    reader = _Reader(tensors, _placement(model, device))
    try:
        cache = reader.value(about["cache"])
    except (KeyError, TypeError, AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"{path} holds a cache that cannot be rebuilt here: {error}") from error
    compiled = None if model is None else compiled_of(model)
    if compiled is not None:
        wanted = codec_spec(compiled.config.resolved_codec)
        for handle in reader.handles:
            is_exact = handle.format.layout == "dense"  # what a layer may be beside any codec
            if handle.format.codec != wanted and not is_exact:
                raise ValueError(
                    f"{path} was stored with codec {handle.format.codec!r}, but this "
                    f"{type(model).__name__} is compiled with {wanted!r}; compile it with the "
                    "file's codec, or make the cache again"
                )
            compiled.report.track(handle)
    return cache


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of an undamaged file of this version."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no cache file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no cache file; squat_fx.save_cache() writes one")
    text = metadata.get("about", "")
    if metadata.get("sha256") != _checksum(text, tensors):
        raise ValueError(f"{path} is damaged: its checksum differs; make the cache again")
    about = json.loads(text)
    if about["version"] != VERSION:
        raise ValueError(
            f"{path} has version {about['version']}, this squat_fx reads version {VERSION}; "
            "make the cache again"
        )
    return about, tensors


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header and of the tensors on the CPU: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.nbytes:
            digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()


def _check_model(
    path: str | Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> None:
    if about["model"] is None:
        raise ValueError(
            f"{path} was saved without its model, so it cannot be checked against this "
            f"{type(model).__name__}; load it without a model, or save it with "
            "save_cache(path, cache, model)"
        )
    saved = Fingerprint(about["model"]["structure"], tensors[FINGERPRINT])
    if difference := saved.difference(Fingerprint.of(model)):
        raise ValueError(
            f"{path} holds a cache of another model, a {about['model']['name']}, than this "
            f"{type(model).__name__}: {difference}; make the cache again"
        )


def _placement(
    model: nn.Module | None, device: torch.device | str | None
) -> Callable[[str], torch.device]:
    """Where a tensor goes that was on a device of that name when it was saved."""
    if device is not None or model is None:
        fixed = torch.device(device or "cpu")
        return lambda _: fixed
    devices = list(dict.fromkeys(str(p.device) for p in model.parameters())) or ["cpu"]
    return lambda saved: torch.device(saved if saved in devices else devices[0])


class _Writer:
    """Turns a cache into json and tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[int, dict[str, Any]] = {}

    def node(self, x: Any) -> Any:
        """``x`` as json: plain values as they are, all else as ``{kind: ...}``."""
        if x is None or isinstance(x, (bool, int, float, str)):
            return x
        if isinstance(x, JoinedKV):
            join = {name: getattr(x.join, name) for name in ("lenses", "sizes", "token_dim")}
            return {"joined": join | {"parts": [self.node(part) for part in x.parts]}}
        if isinstance(x, Tensor):
            if id(x) not in self._known:
                self._known[id(x)] = self._tensor(x)
            return self._known[id(x)]
        if type(x) in (list, tuple):
            return {type(x).__name__: [self.node(item) for item in x]}
        if isinstance(x, dict) and all(isinstance(key, (str, int)) for key in x):
            return {"dict": [[key, self.node(item)] for key, item in x.items()]}
        if isinstance(x, torch.dtype):
            return {"dtype": str(x).removeprefix("torch.")}
        if isinstance(x, torch.device):
            return {"device": str(x)}
        if _class_of_transformers(type(x).__name__) is type(x):
            return {"object": type(x).__name__, "attributes": self.node(vars(x))}
        if isinstance(x, type) and _class_of_transformers(x.__name__) is x:
            return {"class": x.__name__}
        raise TypeError(f"cannot save a {type(x).__name__}; save_cache takes {TAKEN}")

    def _tensor(self, x: Tensor) -> dict[str, Any]:
        name = str(len(self._known))
        found = {"name": name, "device": str(x.device)}
        if not isinstance(x, QuantizedKV):
            self.tensors[name] = x
            return {"tensor": found}
        arenas, state = x.to_state()
        self.tensors |= {f"{name}.{arena}": tensor for arena, tensor in arenas.items()}
        return {"packed": found | {"state": state}}


class _Reader:
    """Undoes :class:`_Writer`."""

    def __init__(
        self, tensors: Mapping[str, Tensor], placement: Callable[[str], torch.device]
    ) -> None:
        self.handles: list[QuantizedKV] = []
        self._tensors = tensors
        self._placement = placement
        self._known: dict[str, Tensor] = {}

    def value(self, node: Any) -> Any:
        """What ``node`` stands for."""
        if not isinstance(node, dict):
            return node
        kind, content = next(iter(node.items()))
        if kind in ("tensor", "packed"):
            name = content["name"]
            if name not in self._known:
                self._known[name] = self._tensor(kind, content)
            return self._known[name]
        if kind == "joined":
            join = Join(*(_as_tuples(content[n]) for n in ("lenses", "sizes", "token_dim")))
            return JoinedKV([self.value(part) for part in content["parts"]], join)
        if kind in ("list", "tuple"):
            items = [self.value(item) for item in content]
            return items if kind == "list" else tuple(items)
        if kind == "dict":
            return {key: self.value(item) for key, item in content}
        if kind == "dtype":
            return getattr(torch, content)
        if kind == "device":
            return self._placement(content)
        found = _class_of_transformers(content)
        if found is None:
            raise ValueError(f"transformers has no cache class {content!r}")
        if kind == "class":
            return found
        made = object.__new__(found)
        vars(made).update(self.value(node["attributes"]))
        return made

    def _tensor(self, kind: str, content: Mapping[str, Any]) -> Tensor:
        name, device = content["name"], self._placement(content["device"])
        if kind == "tensor":
            return self._tensors[name].to(device)
        arenas = {
            full.removeprefix(f"{name}."): tensor.to(device)
            for full, tensor in self._tensors.items()
            if full.startswith(f"{name}.")
        }
        handle = QuantizedKV.from_state(arenas, content["state"])
        self.handles.append(handle)
        return handle


def _as_tuples(x: Any) -> Any:
    """What json made lists of."""
    return tuple(map(_as_tuples, x)) if isinstance(x, (list, tuple)) else x


def _class_of_transformers(name: str) -> type | None:
    """The cache, or the layer of caches, that transformers calls ``name``."""
    try:
        from transformers import cache_utils
    except ImportError:
        return None
    found = getattr(cache_utils, name, None)
    is_one = isinstance(found, type) and found.__module__ == cache_utils.__name__
    return found if is_one else None
