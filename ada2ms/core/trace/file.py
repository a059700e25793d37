"""Files that grow by chunks, each readable as soon as it is written.

    "ada2ms-trace 1" and a newline     the version
    chunk*                             header: b"atrc", number (uint32), length (uint64), crc32 of these (uint32)
                                       payload: `length` bytes in the layout of safetensors
                                       sha256 of number and payload: 32 bytes

A process that is killed leaves the chunks that it has written, and at most the beginning of one more, which readers
leave out. Whatever else is not as it was written is damage, and an error. Integers are little-endian.
"""

import hashlib
import json
import struct
import weakref
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
VERSION: Final = 1
_MAGIC: Final = b"ada2ms-trace "
_HEADER: Final = struct.Struct("<4sIQ")
_TYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "|u1", "BOOL": "|b1", "C64": "<c8"}
_TYPES_OF: Final = {np.dtype(code): name for name, code in _TYPES.items()}


_OPEN: "weakref.WeakSet[Appender]" = weakref.WeakSet()  # of this process; one that is forgotten is none


class TraceError(ValueError):
    """A file that is no trace, or a damaged one; or a trace that is not what is asked for."""


class Appender:
    """Writes a file chunk by chunk; each reaches the operating system before `append` returns.

    Raises:
        FileExistsError: there is another kind of file in the place, or a trace that is being written in this process.
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"There is no folder {str(path.parent)!r} (make it first)")
        if any(each.path == path.absolute() for each in _OPEN):
            raise FileExistsError(
                f"{str(path)!r} is being written by another recorder (close it, or choose another path)"
            )
        if path.exists() and not _is_trace(path):
            raise FileExistsError(f"There is a file {str(path)!r} that is no trace (choose another path, or remove it)")
        self._file: IO[bytes] = path.open("wb", buffering=0)
        self._file.write(_MAGIC + b"%d\n" % VERSION)
        self._number = 0
        self.path: Path = path.absolute()
        _OPEN.add(self)

    def append(self, content: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
        """Adds a chunk: any JSON, and tensors by name."""
        payload = _encode(content, tensors)
        head = _HEADER.pack(b"atrc", self._number, len(payload))
        whole = head + struct.pack("<I", zlib.crc32(head)) + payload + _digest(self._number, payload)
        view = memoryview(whole)
        while view:
            view = view[self._file.write(view) :]
        self._number += 1

    def close(self) -> None:
        self._file.close()
        _OPEN.discard(self)


def read(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Array]] | int]:
    """The chunks of a file; and at its end, if a flush was cut off, the number of bytes of it.

    Raises:
        FileNotFoundError: there is none.
        TraceError: it is not a trace, of a version that is not known, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}")
    with path.open("rb") as file:
        first = file.readline(32)
        if not first.startswith(_MAGIC) or not first.endswith(b"\n"):
            raise TraceError(f"Cannot read {str(path)!r}: it is no trace of ada2ms")
        version = first[len(_MAGIC) :].strip().decode(errors="replace")
        if version != str(VERSION):
            raise TraceError(f"Cannot read {str(path)!r}: its version is {version!r} (readable: {VERSION})")
        size, number = path.stat().st_size, 0
        while (begin := file.tell()) < size:
            head = file.read(_HEADER.size + 4)
            if len(head) < _HEADER.size + 4:
                yield size - begin
                return
            magic, found, length = _HEADER.unpack(head[:-4])
            whole = zlib.crc32(head[:-4]).to_bytes(4, "little") == head[-4:]
            if not whole or magic != b"atrc" or found != number:
                raise TraceError(f"Cannot read {str(path)!r}: damaged at byte {begin}, where chunk {number} begins")
            if file.tell() + length + 32 > size:
                yield size - begin
                return
            payload = file.read(length)
            if file.read(32) != _digest(number, payload):
                raise TraceError(f"Cannot read {str(path)!r}: damaged, the checksum of chunk {number} does not match")
            yield _decode(payload)
            number += 1


def _is_trace(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) in (_MAGIC, b"")


def _digest(number: int, payload: bytes) -> bytes:
    return hashlib.sha256(number.to_bytes(4, "little") + payload).digest()


def _encode(content: Mapping[str, Any], tensors: Mapping[str, Array]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"content": json.dumps(content)}}
    data, end = [], 0
    for name, array in tensors.items():
        array = np.ascontiguousarray(array).reshape(array.shape)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        entries[name] = {
            "dtype": _TYPES_OF[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        data.append(array.tobytes())
        end += array.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + b"".join(data)


def _decode(payload: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    begin = 8 + int.from_bytes(payload[:8], "little")
    entries = json.loads(payload[8:begin])
    content: dict[str, Any] = json.loads(entries.pop("__metadata__")["content"])
    tensors = {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        array = np.frombuffer(payload[begin + first : begin + last], _TYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return content, tensors
