"""Compile proto/caffe.proto into the descriptor that the package ships. Needs grpcio-tools; run by `make proto`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "caffejacinto_py" / "schema" / "caffe.desc"


def compile_proto() -> bytes:
    """The serialized FileDescriptorProto of caffe.proto, without comments and source places."""
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.desc"
        code = protoc.main(["protoc", f"-I{HERE}", f"--descriptor_set_out={out}", "caffe.proto"])
        if code:
            raise SystemExit(code)
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    (only,) = files
    return only.SerializeToString(deterministic=True)


if __name__ == "__main__":
    TARGET.write_bytes(compile_proto())
    print(f"{TARGET}: {TARGET.stat().st_size} bytes", file=sys.stderr)
