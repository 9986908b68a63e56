"""Hidden states of all sequences between two blocks: in memory, or in a file where memory is short."""

import tempfile
from pathlib import Path

import numpy as np

from farms_jax.errors import InputError
from farms_jax.programs.files import reserve


class Activations:
    """N sequences of hidden states, (N, T, D) float32, read and written in slices along N."""

    def __init__(self, shape: tuple[int, int, int], spill: Path | None = None) -> None:
        """Make room.

        Args:
            shape: (N, T, D).
            spill: folder for a file to hold them, gone when the program ends; `None`: memory.

        Raises:
            InputError: the folder cannot be written to, or has too little space.
        """
        self.shape = shape
        self._row = 4 * shape[1] * shape[2]
        self._file = None
        if spill is None:
            self._array = np.empty(shape, np.float32)
            return
        try:
            spill.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=spill)  # noqa: SIM115 (lives as long as this object)
            reserve(self._file.fileno(), max(self._row * shape[0], 1))
        except OSError as error:
            gib = self._row * shape[0] / 2**30
            raise InputError(
                f"--spill {spill}: no room for {gib:.1f} GiB of activations ({error.strerror}); "
                "free space, name another folder, or take fewer --samples"
            ) from error

    def __len__(self) -> int:
        """Return N."""
        return self.shape[0]

    def read(self, rows: slice) -> np.ndarray:
        """Return some sequences, (rows, T, D)."""
        if self._file is None:
            return self._array[rows]
        out = np.empty((rows.stop - rows.start, *self.shape[1:]), np.float32)
        self._file.seek(rows.start * self._row)
        self._file.readinto(out.reshape(-1).view(np.uint8).data)
        return out

    def write(self, rows: slice, values: np.ndarray) -> None:
        """Put some sequences, (rows, T, D)."""
        if self._file is None:
            self._array[rows] = values
            return
        self._file.seek(rows.start * self._row)
        self._file.write(np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8).data)
