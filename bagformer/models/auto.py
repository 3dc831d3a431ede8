"""Makes transformers' Auto classes know "bagformer", without importing transformers for it.

``import bagformer`` must stay quick, and transformers' models take two seconds to import. So each
of the four modules that hold an Auto class is met when it gets imported, and what it is told about
our larger classes is only where they are.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."
_MODELS = "bagformer.models."
_CONFIGURATION = _MODELS + "configuration_bagformer"
_NAME = "BagFormerConfig"


class _Content(dict):
    """The registry of one Auto class plus one entry of ours, imported when somebody asks for it.

    Nothing of ours may be imported earlier: the Auto modules are themselves imported in the middle
    of importing others.
    """

    def __init__(self, content: dict, key: str, load: Callable[[], tuple[Any, Any]]) -> None:
        super().__init__(content)
        self._key = key
        self._load = load
        self._filled = False

    def _is_ours(self, key: Any) -> bool:
        if isinstance(key, type):
            return key.__name__ == self._key and key.__module__ == _CONFIGURATION
        return key == self._key

    def _fill(self) -> None:
        if not self._filled:
            self._filled = True
            key, value = self._load()
            super().setdefault(key, value)

    def _all(self) -> dict:
        try:
            self._fill()
        except ImportError as error:
            # somebody else's look-up must not fail because a dependency of ours is missing
            warnings.warn(f"bagformer's classes cannot be imported: {error}", stacklevel=3)
        return dict(super().items())

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(key) or self._is_ours(key)

    def __getitem__(self, key: Any) -> Any:
        if self._is_ours(key):
            self._fill()
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        if self._is_ours(key):
            self._fill()
        return super().get(key, default)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def keys(self) -> Any:
        return self._all().keys()

    def values(self) -> Any:
        return self._all().values()

    def items(self) -> Any:
        return self._all().items()


def _ours(module: str, name: str) -> Any:
    return getattr(importlib.import_module(_MODELS + module), name)


def _config() -> Any:
    return _ours("configuration_bagformer", "BagFormerConfig")


def _model() -> tuple[Any, Any]:
    return _config(), _ours("modeling_bagformer", "BagFormerForRetrieval")


def _processor() -> tuple[Any, Any]:
    return _config(), _ours("processing_bagformer", "BagFormerProcessor")


def _image_processor() -> tuple[Any, Any]:
    one = _ours("image_processing_bagformer", "BagFormerImageProcessor")
    return _config(), {"pil": one, "torchvision": one}


# Auto module -> its registry, our key in it, and what makes our entry.
_ENTRIES: dict[str, tuple[str, str, Callable[[], tuple[Any, Any]]]] = {
    _AUTO + "configuration_auto": ("CONFIG_MAPPING", "bagformer", lambda: ("bagformer", _config())),
    _AUTO + "modeling_auto": ("MODEL_MAPPING", _NAME, _model),
    _AUTO + "processing_auto": ("PROCESSOR_MAPPING", _NAME, _processor),
    _AUTO + "image_processing_auto": ("IMAGE_PROCESSOR_MAPPING", _NAME, _image_processor),
}


def _tell(module: ModuleType) -> None:
    try:
        registry, key, load = _ENTRIES[module.__name__]
        mapping = getattr(module, registry)
        if not isinstance(mapping._extra_content, _Content):
            mapping._extra_content = _Content(mapping._extra_content, key, load)
    except Exception as error:
        # transformers itself must stay importable, whatever its version
        warnings.warn(
            f"bagformer could not register with {module.__name__}: {error!r}; "
            "use the classes of bagformer directly",
            stacklevel=2,
        )


class _Watcher(MetaPathFinder):
    """Lets the usual finders find an Auto module, and adds ours once it has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _ENTRIES:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                execute = spec.loader.exec_module

                def exec_module(module: ModuleType, execute: Any = execute) -> None:
                    execute(module)
                    _tell(module)

                spec.loader.exec_module = exec_module  # type: ignore[method-assign]
                return spec
        return None


def register() -> None:
    """Register now with every Auto class that is imported, and with the others when they are."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    for name, (registry, _, _) in _ENTRIES.items():
        module = sys.modules.get(name)
        if module is not None and hasattr(module, registry):
            _tell(module)
