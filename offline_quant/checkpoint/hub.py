"""The Hugging Face Hub: the model card that lies in every checkpoint, and `bitsmoe push`."""

import glob
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from bitsmoe_kernels.errors import BitsmoeError, fault_list, one_line
from bitsmoe_kernels.format.safetensors_io import INDEX_FILE, file_fault
from offline_quant.checkpoint.directory import PAGE_FILE, REPORT_FILE
from offline_quant.model.download import NETWORK_ERRORS
from offline_quant.model.quantized import QuantizedModel
from offline_quant.model.side_files import CARD_FILE, side_files
from offline_quant.model.source import value_faults
from offline_quant.runtime.progress import track

_REPLACED = ["*.safetensors", INDEX_FILE]
"""Files of an earlier push that go where the new one has none of that name: an index left over would be believed."""


def push_files(model: QuantizedModel) -> list[str]:
    """Names of a checkpoint's files that belong on the Hub; whatever else lies in the directory stays there."""
    own = ["config.json", INDEX_FILE, CARD_FILE, REPORT_FILE, PAGE_FILE]
    beside = (path.relative_to(model.directory).as_posix() for path in side_files(model.directory))
    names = {*own, *model.tensors.files, *beside}
    return sorted(n for n in names if (model.directory / n).is_file())


def push(directory: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Check a checkpoint in full, then upload it.

    Args:
        directory: a bitsmoe checkpoint.
        repo_id: `name` or `owner/name`; made if it does not exist.
        private: the repository must be private.
        revision: branch, made if it does not exist; None: the main one.

    Returns:
        Address of the repository, at the branch.

    Raises:
        BitsmoeError: lists every fault that can be seen from here, before anything is sent; or the Hub refuses.
    """
    faults, names = [], []
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        faults.append(f"{repo_id!r} cannot be a repository's name ({one_line(e)[:300]}): use OWNER/NAME")
    if get_token() is None:
        faults.append("no token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write")
    try:
        model = QuantizedModel(directory)
        names = push_files(model)
        faults += [f for name in names if (f := file_fault(directory, name))]
        faults += value_faults(model.tensors, track)
        if CARD_FILE in names:
            ModelCard((directory / CARD_FILE).read_text(encoding="utf-8"))
    except BitsmoeError as e:
        faults += str(e).splitlines()
    except (ValueError, yaml.YAMLError) as e:
        faults.append(f"{CARD_FILE}: the metadata at its top cannot be read ({one_line(e)[:300]})")
    if faults:
        raise BitsmoeError(fault_list(f"{directory}: not pushed", faults, shown=30))
    try:
        return _upload(HfApi(), directory, names, repo_id, private, revision)
    except HfHubHTTPError as e:
        status = e.response.status_code
        advice = {401: ": the token is not valid, run `hf auth login`", 403: ": the token may not write there"}
        raise BitsmoeError(
            f"{repo_id}: the Hub refuses with status {status}{advice.get(status, '')} ({one_line(e)[:300]})"
        ) from None
    except NETWORK_ERRORS as e:
        raise BitsmoeError(
            f"{repo_id}: the Hub cannot be reached ({one_line(e)[:300]}); the same command goes on where this one ended"
        ) from None
    except (ValueError, RuntimeError) as e:  # metadata the Hub does not take; its storage's client
        raise BitsmoeError(f"{repo_id}: the upload failed ({one_line(e)[:300]})") from None


def _upload(api: HfApi, directory: Path, names: list[str], repo_id: str, private: bool, revision: str | None) -> str:
    repo = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
    if private and not api.repo_info(repo.repo_id).private:
        raise BitsmoeError(
            f"{repo.repo_id}: exists and is public, but --private was given: make it private in its settings, choose "
            "another name, or leave out --private"
        )
    if revision is not None:
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=directory,
        allow_patterns=[glob.escape(name) for name in names],
        delete_patterns=_REPLACED,
        commit_message="Upload bitsmoe checkpoint",
        revision=revision,
    )
    return f"{repo}/tree/{revision}" if revision else str(repo)
