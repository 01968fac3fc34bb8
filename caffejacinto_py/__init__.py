"""Train, test and convert Caffe networks (prototxt, solver, caffemodel) on PyTorch."""

__version__ = "0.1.0"


def __getattr__(name: str):  # type: ignore[no-untyped-def]
    """`caffejacinto_py.check`, loaded when it is used."""
    if name == "check":
        import importlib

        return importlib.import_module("caffejacinto_py.checking").check
    raise AttributeError(f"module 'caffejacinto_py' has no attribute '{name}'")
