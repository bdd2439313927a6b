"""Hidden states of a reference model in a file, so that one pass of it serves several evaluations.

They leave the model's last layer. Logits of a whole text would take a hundred times their size.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.model.fingerprint import fingerprint

_STATES = "hidden_states"


class StatesFile(NamedTuple):
    """A file for the hidden states of one model on one text.

    Attributes:
        path: of the file; it may not exist yet.
        model: directory of the model.
        windows: token ids, int64 [n, L].
    """

    path: Path
    model: Path
    windows: Tensor

    def _origin(self) -> dict[str, str]:
        """What the states depend on."""
        text = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
        return {"model": fingerprint(self.model), "text": f"{tuple(self.windows.shape)} {text}"}

    def read(self) -> Tensor | None:
        """Hidden states, float32 [n, L, ...]; None where there is no such file, and one can be written.

        Raises:
            BitsmoeError: it holds something else, is of another model or text, or cannot be written.
        """
        if not self.path.exists():
            with self._writing() as part:
                part.touch()
            return None
        try:
            with safe_open(str(self.path), framework="pt") as file:
                origin, states = file.metadata() or {}, file.get_tensor(_STATES)
        except (OSError, SafetensorError) as e:
            raise BitsmoeError(
                f"--reference-states {self.path}: holds no hidden states of a reference ({e}); name another file"
            ) from None
        now = self._origin()
        if changed := [name for name in now if origin.get(name) != now[name]]:
            raise BitsmoeError(
                f"--reference-states {self.path}: was written for another {' and another '.join(changed)} than those "
                "of this call; name another file, or remove it"
            )
        return states

    def write(self, states: Tensor) -> None:
        """Keep hidden states; the file is there whole or not at all.

        Raises:
            BitsmoeError: it cannot be written.
        """
        with self._writing() as part:
            save_file({_STATES: states.contiguous()}, part, metadata=self._origin())
            os.replace(part, self.path)

    @contextmanager
    def _writing(self) -> Iterator[Path]:
        """A file beside it that does not stay."""
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield part
            finally:
                part.unlink(missing_ok=True)
        except (OSError, SafetensorError) as e:
            raise BitsmoeError(f"--reference-states {self.path}: cannot be written ({e}); name another file") from None
