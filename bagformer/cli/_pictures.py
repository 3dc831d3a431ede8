"""Pictures that the user names: files, folders, or a tsv in MUGE's format."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bagformer.cli._common import CommandError
from bagformer.data.images import ImageError, Transparency, decode_image
from bagformer.data.muge import MugeError, MugeImages

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def _natural(path: Path) -> list[Any]:
    """Sort key under which 10.png comes after 9.png."""
    name, digits = str(path), ""
    key: list[Any] = []
    for character in name + "\0":
        if character.isascii() and character.isdigit():
            digits += character
            continue
        if digits:
            key.append((0, int(digits), digits))
            digits = ""
        key.append((1, character))
    return key


class Gallery:
    """Pictures in a fixed order; broken ones raise CommandError, or are left out and counted.

    ``keys`` are the ids of a tsv or the file names, ``skipped`` the counts of what was left out and
    ``left_out`` the names.
    The keys of broken pictures leave ``keys`` when :meth:`pictures` has been read through.
    ``transparency`` says how they become RGB; set it to what the model's protocol asks for.
    """

    transparency: Transparency = "white"

    def __init__(self, paths: Sequence[Path], skip_errors: bool = False) -> None:
        self._skip = skip_errors
        self.skipped: Counter[str] = Counter()
        self.left_out: list[str] = []
        self._table: MugeImages | None = None
        self.files: dict[Any, Path] = {}
        if len(paths) == 1 and paths[0].suffix == ".tsv":
            mode = "skip" if skip_errors else "raise"
            self._table = MugeImages(paths[0], on_error=mode)
            self.skipped.update(self._table.skipped)
            self.keys: list[Any] = list(self._table)
        else:
            self._find(paths)
            self.keys = list(self.files)
        if not self.keys:
            shown = " ".join(map(str, paths))
            raise CommandError(
                f"--images: no pictures in {shown} ({', '.join(SUFFIXES)}, or a .tsv)"
            )

    def _find(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path.is_dir():
                found = (
                    Path(folder) / name for folder, _, names in os.walk(path) for name in names
                )
                inside = sorted((f for f in found if f.suffix.lower() in SUFFIXES), key=_natural)
                # names inside one folder are short; of several, they could be the same
                base = path if len(paths) == 1 else None
                self.files.update({str(f.relative_to(base) if base else f): f for f in inside})
            elif path.is_file():
                self.files[str(path)] = path
            elif self._skip:
                self.skipped["missing file"] += 1
                self.left_out.append(f"{path} (missing file)")
            else:
                raise CommandError(f"--images: there is no {path}")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, key: Any) -> Image.Image:
        """RGB picture. Raises CommandError naming the file."""
        try:
            if self._table is not None:
                return self._table.picture(key, self.transparency)
            data = self.files[key].read_bytes()
            return decode_image(data, transparency=self.transparency)
        except MugeError as error:
            raise BrokenPictureError(error.reason, str(error)) from error
        except ImageError as error:
            raise BrokenPictureError(error.reason, f"{self.files[key]}: {error}") from error
        except OSError as error:
            raise BrokenPictureError(
                "unreadable", f"{self.files[key]}: {error.strerror}"
            ) from error

    def pictures(self) -> Iterator[Image.Image]:
        good = []
        for key in self.keys:
            try:
                picture = self[key]
            except BrokenPictureError as error:
                if not self._skip:
                    raise
                self.skipped[error.reason] += 1
                self.left_out.append(f"{key} ({error.reason})")
                continue
            good.append(key)
            yield picture
        self.keys = good
        if not good:
            raise CommandError(f"--images: none of them could be read: {dict(self.skipped)}")


class BrokenPictureError(CommandError):
    """A picture that cannot be read; ``reason`` is a short word for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{message} (--skip-errors leaves broken pictures out)")
        self.reason = reason
