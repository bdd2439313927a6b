"""A model's directory: local, or downloaded from the Hugging Face Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from huggingface_hub.errors import HfHubHTTPError

from bitsmoe_kernels.errors import BitsmoeError, one_line
from bitsmoe_kernels.format.safetensors_io import INDEX_FILE
from offline_quant.model.side_files import CARD_FILE, CODE_FILES, SIDE_FILES

NETWORK_ERRORS = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""Errors of the Hub's client where it cannot be reached: the base error of its HTTP library, and OSError."""
_SNAPSHOTS, _MODELS = "snapshots", "models--"
"""The Hub's cache holds models--OWNER--NAME/snapshots/COMMIT."""


@dataclass(frozen=True)
class HubSnapshot:
    """A model's directory in the Hub's cache.

    Attributes:
        name: on the Hub, OWNER/NAME.
        commit: the commit the files are of.
    """

    name: str
    commit: str


def hub_snapshot(directory: Path) -> HubSnapshot | None:
    """The model and commit of a directory in the Hub's cache; None for any other directory."""
    here = directory.resolve()
    cache = here.parent.parent.name
    name = cache.removeprefix(_MODELS)
    if here.parent.name != _SNAPSHOTS or name == cache or not name:
        return None
    return HubSnapshot(name.replace("--", "/"), here.name)


def resolve_model(
    name: str, revision: str | None = None, option: str = "--revision", with_weights: bool = True
) -> Path:
    """Find a model: a local directory, or a Hub name, whose files are downloaded into the local cache.

    Args:
        name: of the directory, or on the Hub.
        revision: branch, tag or commit of a Hub name; None: the main branch.
        option: the command line's option of the revision, for messages.
        with_weights: download all that quantizing needs; else config.json and the index of the weights.

    Raises:
        BitsmoeError: no such directory, or the Hub does not give it.
    """
    path = Path(name)
    if path.is_dir():
        if revision is not None:
            raise BitsmoeError(f"{option} {revision}: {name} is a directory; only names on the Hub have revisions")
        snapshots = path / _SNAPSHOTS
        if snapshots.is_dir() and not (path / "config.json").exists():
            commits = ", ".join(sorted(p.name for p in snapshots.iterdir())) or "none"
            raise BitsmoeError(
                f"{name}: is a folder of the Hub's cache; give the model's name on the Hub, or one of the snapshots in "
                f"{snapshots} ({commits})"
            )
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BitsmoeError(f"{name}: is not a directory; give a model directory or a Hugging Face Hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    errors: tuple[type[Exception], ...] = (*NETWORK_ERRORS, HFValidationError, LocalEntryNotFoundError)
    wanted = ["config.json", INDEX_FILE]
    if with_weights:
        wanted += ["*.safetensors*", CARD_FILE, *SIDE_FILES, CODE_FILES]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except errors as e:
        reason = one_line(e)[:500]
        shown = name if revision is None else f"{name} at {option} {revision}"
        raise BitsmoeError(f"{shown}: no such directory, and the Hub does not give it ({reason})") from None
