"""How far a stream has written, on disk: where an interrupted run continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Progressed:
    """What a checkpoint says.

    Args:
        rows: Rows that are written, by branch.
        cache: Hash of the cache.
        weights: Hash of the weights that ``decode`` reaches.
        queries: Hash of these rows of the queries, by branch.
        outputs: Hash of these rows of the output arrays, by name.
    """

    rows: dict[str, int] = field(default_factory=dict)
    cache: str = ""
    weights: str = ""
    queries: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


class Checkpoint:
    """A small JSON file that names the rows that are written as a whole, and what they are made from.

    It is replaced in one step and only after the outputs of a chunk are on disk, so that at any moment it describes
    whole chunks only.

    Args:
        path: The file. It need not exist, but its folder must.

    Raises:
        ValueError: If the folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise ValueError(f"checkpoint must be a file in a folder that exists, got {str(self.path)!r}")

    def read(self, totals: Mapping[str, int] | None) -> dict[str, int]:
        """Returns the rows that are done by branch, empty at the beginning.

        Raises:
            ValueError: If the file belongs to a stream of another length, is damaged, or is no checkpoint.
        """
        return self.read_all(totals).rows

    def read_all(self, totals: Mapping[str, int] | None) -> Progressed:
        """Returns all that the file says. Errors as for :meth:`read`."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return Progressed()
        try:
            content = json.loads(text)
            rows, known = {str(k): int(v) for k, v in content["rows"].items()}, content["totals"]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"checkpoint {self.path} can't be read ({error!r}): delete it to start over") from None
        if known != (None if totals is None else dict(totals)):
            raise ValueError(f"checkpoint {self.path} belongs to a stream of {known} rows, not of {totals}")
        for name, n in rows.items():
            if n < 0 or (totals is not None and n > totals.get(name, -1)):
                raise ValueError(
                    f"checkpoint {self.path} says {rows} of {totals} rows are done: delete it to start over"
                )
        checksum = content.pop("checksum", None)
        if checksum is None or checksum != _checksum(content) or text != _text(content):
            raise ValueError(
                f"checkpoint {self.path} is damaged, or of an older version: it lacks its right checksum; delete it to "
                "start over"
            )
        return Progressed(**{key: content[key] for key in asdict(Progressed())})

    def write(self, progressed: Progressed, totals: Mapping[str, int] | None) -> None:
        """Notes what is done, and waits until the note is on disk."""
        content = {**asdict(progressed), "totals": None if totals is None else dict(totals)}
        partial = self.path.with_name(self.path.name + ".partial")
        with open(partial, "wb") as file:
            file.write(_text(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def remove(self) -> None:
        """Deletes the file, if there is one."""
        self.path.unlink(missing_ok=True)

    def check(self, name: str, expected: object, found: object) -> None:
        """Checks that a part of the run has not changed.

        Raises:
            ValueError: If it is not.
        """
        if expected != found:
            raise ValueError(
                f"checkpoint {self.path} belongs to a run with other {name}: continue with what that run had, or "
                "delete the file to start over"
            )


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps({**content, "checksum": _checksum(content)}).encode()
