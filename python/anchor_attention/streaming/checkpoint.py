"""How far a stream has written, on disk: where an interrupted run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


class Checkpoint:
    """A small JSON file that names the rows that are written as a whole.

    It is replaced in one step and only after the outputs of a chunk are on disk, so that at any moment it speaks of
    whole chunks alone.

    Args:
        path: The file. It need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self, totals: Mapping[str, int] | None) -> dict[str, int]:
        """Returns the rows that are done by branch, empty at the beginning.

        Raises:
            ValueError: If the file is of a stream of another length, or no checkpoint.
        """
        if not self.path.exists():
            return {}
        try:
            state = json.loads(self.path.read_text())
            done, known = {str(k): int(v) for k, v in state["rows"].items()}, state["totals"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"checkpoint {self.path} can't be read ({error!r}): delete it to begin anew") from None
        if known != (None if totals is None else dict(totals)):
            raise ValueError(f"checkpoint {self.path} is of a stream of {known} rows, not of {totals}")
        return done

    def write(self, rows: Mapping[str, int], totals: Mapping[str, int] | None) -> None:
        """Notes the rows that are done, and waits until the note is on disk."""
        partial = self.path.with_name(self.path.name + ".partial")
        with open(partial, "w") as file:
            json.dump({"rows": dict(rows), "totals": None if totals is None else dict(totals)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def remove(self) -> None:
        """Deletes the file, if there is one."""
        self.path.unlink(missing_ok=True)
