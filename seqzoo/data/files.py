"""Files of public data sets, which a user puts in place: what is missing or damaged, said exactly.

Nothing is downloaded. A message names the file, what was expected of it, what to get and where to
put it; `data.official=false` lets files of other sizes pass, a part of a data set for instance.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence

from seqzoo.errors import DataError

_BLOCK = 2**20


@dataclasses.dataclass(frozen=True)
class Origin:
    """A public data set.

    Attributes:
      title: its name.
      archive: the file or files that it is published as, with a checksum where there is one.
      place: what data.path has to be.
    """

    title: str
    archive: str
    place: str

    def folder(self, path: str, inside: str = "") -> pathlib.Path:
        """Returns data.path, or a folder inside it, if it is a folder."""
        folder = pathlib.Path(path).expanduser() / inside
        if folder.is_dir():
            return folder
        kind = "is a file, not a folder" if folder.exists() else "is not there"
        which = f"data.path={path}: its folder {inside}" if inside else f"data.path={path}"
        raise DataError(f"{which} {kind}; it was looked for at {folder.absolute()}. {self.get}")

    def find(self, folder: pathlib.Path, *names: str) -> pathlib.Path:
        """Returns the first of the files `names` in a folder that is there, path or not."""
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise DataError(
            f"data.path={folder}: there is no {' or '.join(names)} in it; it was looked for at "
            f"{(folder / names[0]).absolute()}. {self.get}"
        )

    def file(self, path: str) -> pathlib.Path:
        """Returns data.path if it is a file."""
        file = pathlib.Path(path).expanduser()
        if not file.is_file():
            raise DataError(
                f"data.path={path}: there is no such file; it was looked for at "
                f"{file.absolute()}. {self.get}"
            )
        return file

    def check_size(self, file: pathlib.Path, size: int) -> None:
        """Refuses a file that has not the published number of bytes."""
        found = file.stat().st_size
        if found != size:
            raise self.damaged(file, f"has {found:,} bytes where {size:,} are published", True)

    def check_md5(self, file: pathlib.Path, md5: str) -> None:
        """Refuses a file whose content is not the published one."""
        digest = hashlib.md5(usedforsecurity=False)
        with file.open("rb") as content:
            while block := content.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != md5:
            what = f"has the md5 sum {digest.hexdigest()} where {md5} is published"
            raise self.damaged(file, what, True)

    def check_count(self, what: str, found: int, published: int) -> None:
        """Refuses a number of rows that is not the published one."""
        if found != published:
            raise DataError(
                f"{what}: {found:,} found where {published:,} are published; a part of "
                f"{self.title} is missing or there is too much of it. {self.get}. To use it as it "
                "is: data.official=false"
            )

    def check_some(self, folder: pathlib.Path, what: str, found: int) -> None:
        """Refuses a folder without what is looked for."""
        if not found:
            raise DataError(f"{folder} has no {what}. {self.get}")

    def damaged(self, file: pathlib.Path, what: str, official: bool = False) -> DataError:
        """What to raise for a file of which `what` is true."""
        way_out = ". To use it as it is: data.official=false" if official else ""
        return DataError(
            f"{file} {what}; it is damaged, cut off or another file. {self.get}{way_out}"
        )

    @property
    def get(self) -> str:
        return f"Get {self.title}: {self.archive}; data.path must be {self.place}"


def stamp(path: pathlib.Path) -> tuple[int, int]:
    """What tells that a file is no longer the same: its size and the time of its last change."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: pathlib.Path, before: tuple[int, int]) -> None:
    """Raises DataError if a file is no longer what it was when the run began."""
    try:
        now = stamp(path)
    except OSError:
        now = None
    if now != before:
        raise DataError(
            f"{path} changed since the run began. Put the file back and run the same command "
            "again, or start a new run"
        )


def digest_of(parts: Iterable) -> str:
    """Returns a hash of arrays and bytes, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def settings_of(dataset, *without: str) -> dict:
    """Returns the settings of a data set that its fingerprint is made of: not where it lies."""
    left_out: Sequence[str] = ("path", "official", *without)
    return {
        field.name: getattr(dataset, field.name)
        for field in dataclasses.fields(dataset)
        if field.name not in left_out
    }
