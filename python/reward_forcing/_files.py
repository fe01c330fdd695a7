"""What a checkpoint file claims, checked before a reader believes it.

Readers build objects of many times the size of a file's description (a safetensors header; a pickle and the
directory of its zip archive), so a description may take ``_SMALL`` bytes or the ``_SHARE``-th part of the
file, whichever is more: memory then stays below twice the file. Those of the published models take less than
a ten-thousandth.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from pathlib import Path

_SMALL = 1 << 18
_SHARE = 128

#: Levels of tuples in tuples. A tensor has two; hashing a hundred thousand overflows the C stack, and with it
#: the process.
_DEPTH = 32

_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE")


def check_description(claimed: int, file_bytes: int) -> None:
    """Raise ``ValueError`` unless a description of so many bytes belongs to a file of so many."""
    limit = max(_SMALL, file_bytes // _SHARE)
    if claimed > limit:
        raise ValueError(
            f"its description of tensors claims {claimed} bytes; expected at most {limit} in a file of"
            f" {file_bytes}"
        )


def check_header(path: Path) -> None:
    """The length of a safetensors header, which stands in the first eight bytes."""
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    check_description(claimed, path.stat().st_size)


def _directory_bytes(path: Path) -> int:
    """Size of a zip archive's directory, from the end record (zip64 where the archive has one)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 42))  # locator of the zip64 record (20 bytes), end record (22 bytes)
        tail = file.read().rjust(42, b"\0")
        if tail[20:24] != b"PK\5\6":
            raise ValueError(
                "not the zip archive that torch.save writes (since 1.6: read and save an older file there)"
            )
        if tail[:4] == b"PK\6\7":
            file.seek(struct.unpack("<Q", tail[8:16])[0])
            record = file.read(56)
            if len(record) < 56 or record[:4] != b"PK\6\6":
                raise ValueError("a zip archive without the end record that it points to")
            return struct.unpack("<Q", record[40:48])[0]
    return struct.unpack("<L", tail[32:36])[0]


def _tuple_depth(pickled: bytes) -> int:
    """Levels of tuples in tuples that a pickle builds, at most; nothing is built."""
    stack: list = []
    memo: dict = {}
    deepest = 0
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name == "MARK":
            stack.append(None)
        elif name.endswith("BINGET") or name == "GET":
            stack.append(memo[int(argument)])
        elif name.endswith("BINPUT") or name == "PUT":
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        else:
            taken = []
            wanted = [item.name for item in opcode.stack_before]
            if "mark" in wanted:
                while (top := stack.pop()) is not None:
                    taken.append(top)
                wanted = wanted[: wanted.index("mark")]
            taken += [stack.pop() for _ in wanted]
            depth = max(taken, default=0) + (name in _TUPLES)
            deepest = max(deepest, depth)
            stack += [depth] * len(opcode.stack_after)
    return deepest


def _places(file, records: list[zipfile.ZipInfo], end: int) -> dict[int, int]:
    """Size of the contents of each record by where they begin.

    Records lie one behind the other, as their own headers and the directory agree. Only the headers say where
    contents begin, and a reader that maps them checks nothing: a damaged length would shift a tensor.
    """
    places = {}
    records = sorted(records, key=lambda record: record.header_offset)
    for record, after in zip(records, [*(r.header_offset for r in records[1:]), end], strict=True):
        file.seek(record.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError(f"record {record.filename} is not where the directory says")
        begin = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        places[begin], behind = record.file_size, begin + record.file_size
        gaps = (0,)
        if record.flag_bits & 8:  # sizes and checksum follow the contents
            file.seek(behind)
            gaps = (16, 24) if file.read(4) == b"PK\7\10" else ()
        if after - behind not in gaps:
            raise ValueError(f"record {record.filename} does not end where the next begins")
    return places


def check_archive(path: Path) -> dict[int, int]:
    """The zip archive of ``torch.save``: nothing compressed (a few bytes could become gigabytes), every
    record in its place, pickles undamaged and shallow.

    Returns:
        size of every record's contents by their offset in the file, ascending.
    Raises:
        ValueError, zipfile.BadZipFile: what is wrong with it.
    """
    size = path.stat().st_size
    check_description(_directory_bytes(path), size)
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        places = _places(file, records, archive.start_dir)
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError(f"record {record.filename} is compressed, which torch.save never does")
            if record.filename.endswith(".pkl"):
                check_description(record.file_size, size)
                depth = _tuple_depth(archive.read(record))  # the read compares the checksum
                if depth > _DEPTH:
                    raise ValueError(
                        f"record {record.filename} nests tuples {depth} levels deep, at most {_DEPTH}"
                        " expected"
                    )
    return places


def storages_are_records(storages: list[tuple[int, int]], places: dict[int, int]) -> bool:
    """Whether storages (address, bytes) of a mapped file are whole records of it, wherever the map begins."""
    if not storages:
        return True
    first = min(storages)
    bases = (first[0] - offset for offset, size in places.items() if size == first[1])
    return any(all(places.get(address - base) == size for address, size in storages) for base in bases)
