"""SGLang without its kernels, which need a GPU: its wheel, unpacked beside the environment and put on the path.

One module is stood in for, torchvision: SGLang imports it for images, and its builds for other PyTorch releases than
the environment's do not load. Everything else that the tests touch is SGLang's own code.
"""

import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from unittest import mock

import pytest

RELEASE = "sglang==0.5.23"


class _StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def _unpacked() -> Path | None:
    folder = Path(os.environ.get("AITER_TEST_SGLANG", Path(sys.prefix) / RELEASE))
    if not (folder / "sglang").is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", RELEASE, "-d", folder]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
            wheel.unlink()
    return folder


def pytest_collection_modifyitems(items):
    folder = _unpacked()
    if folder is None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"{RELEASE} cannot be downloaded"))


sys.dont_write_bytecode = True
if (_folder := _unpacked()) is not None:
    import transformers.utils
    from transformers import AutoImageProcessor, AutoProcessor  # noqa: F401 - before torchvision seems to be there

    transformers.utils.is_torchvision_available()
    sys.path.append(str(_folder))
    sys.meta_path.append(_Torchvision())
