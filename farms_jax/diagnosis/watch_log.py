"""What a watch leaves on disk: alerts, which are only ever added to, and a diagnosis of each checkpoint."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

from farms_jax._names import natural_key
from farms_jax.diagnosis.diagnosis import Diagnosis
from farms_jax.diagnosis.watch import Alert, Seen
from farms_jax.errors import InputError

_ENDING = ".json"


class WatchLog:
    """The folder of a watch; what cannot be written there costs a warning, and alerts are tried again."""

    def __init__(self, run: Path, folder: Path) -> None:
        """Open the folder, which may have the log of an earlier watch of the run."""
        self._run, self._folder = run, folder
        self._file = folder / "alerts.jsonl"
        self._waiting: list[str] = []
        try:
            self._told = set(self._file.read_text(encoding="utf-8", errors="replace").splitlines())
        except OSError:  # there is none yet
            self._told = set()

    def earlier(self) -> list[tuple[Path, Diagnosis]]:
        """Return the checkpoints that were diagnosed by an earlier watch and are gone since, oldest first."""
        found = []
        for path in self._folder.glob(f"*{_ENDING}"):
            checkpoint = self._run / path.name.removesuffix(_ENDING).replace("%2F", "/").replace("%25", "%")
            try:
                if not checkpoint.exists():
                    found.append((path.stat().st_mtime_ns, natural_key(path.name), checkpoint, path))
            except OSError:
                continue
        kept = []
        for _, _, checkpoint, path in sorted(found):
            try:
                kept.append((checkpoint, Diagnosis.read_json(path)))
            except (OSError, InputError):  # of another version, or something else
                continue
        return kept

    def add(self, seen: Seen) -> list[Alert]:
        """Write what was found in a checkpoint, and return its alerts that the log had not yet: no other is written."""
        news = [alert for alert in seen.alerts if _line(alert) not in self._told]
        self._waiting += map(_line, news)
        self._told.update(self._waiting)
        _tried(self._file, self._append)
        if seen.diagnosis is not None:
            _tried(self._folder / self._name(seen.checkpoint), seen.diagnosis.write_json)
        return news

    def _append(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():  # what was cut off stays a line of its own
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write("".join(f"{line}\n" for line in self._waiting).encode())
        self._waiting = []

    def _name(self, checkpoint: Path) -> str:
        """Return the name of a checkpoint's file: its path in the run, with no two alike."""
        parts = checkpoint.relative_to(self._run).parts or (self._run.resolve().name,)  # the run may be a checkpoint
        return "/".join(parts).replace("%", "%25").replace("/", "%2F") + _ENDING


def _line(alert: Alert) -> str:
    # Whatever folder the watch is started in.
    place = str(Path(alert.checkpoint).resolve())
    message = alert.message.replace(alert.checkpoint, place)
    return json.dumps(alert._replace(checkpoint=place, message=message)._asdict())


def _tried(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        warnings.warn(
            f"{path}: cannot be written ({error.strerror or error}); free space, or take another folder", stacklevel=2
        )
