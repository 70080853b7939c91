"""Members of tar archives from anywhere: only regular files with plain relative paths ever reach the disk."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from phi3v.data.conversations import DataError, shown

MAX_UNPACKED_BYTES = 200 * 10**9
"""An archive that unpacks to more is refused (a bomb, or not the recipe's data)."""


def member_problem(member: tarfile.TarInfo) -> str | None:
    """Why a member must not be unpacked, or None."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        return "its path leaves the archive's folder"
    if member.issym() or member.islnk():
        return f"it is a link to {shown(member.linkname)}"
    if not (member.isreg() or member.isdir()):
        return "it is neither a file nor a folder"
    return None


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Unpack the wanted files of a tar (compressed or not) into a folder; yields their names in the archive's order.

    A hostile member stops everything (DataError), wanted or not: such an archive is not what it says it is.
    """
    total = 0
    seen: set[str] = set()
    try:
        with tarfile.open(archive, "r|*") as file:
            for member in file:
                if problem := member_problem(member):
                    raise DataError(
                        f"{archive}: member {shown(member.name)}: {problem}; expected files and folders inside it only"
                    )
                name = PurePosixPath(member.name).as_posix()
                if not member.isreg() or not wanted(name):
                    continue
                if name in seen:
                    raise DataError(f"{archive}: member {shown(name)}: there twice; expected each once")
                seen.add(name)
                total += member.size
                if total > MAX_UNPACKED_BYTES or member.size > shutil.disk_usage(folder).free:
                    raise DataError(
                        f"{archive}: member {shown(name)}: {total} bytes unpacked so far; expected less, and room for "
                        f"it"
                    )
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = file.extractfile(member)
                assert content is not None, "a regular member has content"
                with open(target, "xb") as out:
                    shutil.copyfileobj(content, out, 1 << 20)
                yield name
    except (tarfile.TarError, EOFError, zlib.error, UnicodeError) as error:
        raise DataError(f"{archive}: not a whole tar archive: {error}") from None
    except OSError as error:
        if error.errno is None:  # gzip and xz report damaged data as an OSError without a number
            raise DataError(f"{archive}: not a whole tar archive: {error}") from None
        raise
