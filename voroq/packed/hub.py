"""From what a user types to a folder: a path, or a hub id whose files are fetched (config, tokenizer, safetensors; never pickles)."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from voroq.errors import VoroqError

_WANTED = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]


def locate(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of `model`, downloaded (at `revision`) if it is a hub id. Code is fetched only with `trust_remote_code`.

    Raises VoroqError when there is no such model, it is gated, it is not at that revision, or the hub cannot be reached.
    """
    name, path = str(model), Path(model).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise VoroqError(f"{name} is a file; give the folder that holds config.json and the safetensors")
    if isinstance(model, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        raise VoroqError(f"there is no folder {name!r}; give a model folder or a hub id such as 'organisation/model'")
    wanted = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise VoroqError(f"{name} is gated on the hub; accept its terms on its page, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise VoroqError(f"{name} is neither a folder nor a model on the hub; check the name (if private, run `hf auth login`)") from error
    except HFValidationError as error:
        raise VoroqError(f"{name!r} is neither a folder nor a valid hub id ('organisation/model')") from error
    except LocalEntryNotFoundError as error:
        raise VoroqError(f"{name} is no folder, not in the local cache, and the hub cannot be reached; check path or network") from error
    except Exception as error:  # the hub client lets errors of its transports (http, xet) through; all mean "no download"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise VoroqError(f"cannot download {name}: {reason[0]}; check the name, the revision, the network and the disk") from error
