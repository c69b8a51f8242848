"""The model hub: repositories `owner/name`, downloaded into the hub's cache and uploaded."""

import re
from pathlib import Path
from types import ModuleType

from taming.checkpoint.save import CONFIG_NAME, WEIGHTS_NAME
from taming.config import one_line

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
_INSTALL = 'pip install "taming[hub]"'


def is_hub_name(name: str | Path) -> bool:
    """Tell whether a name has the form of a repository, and is not a path: its first folder is not here."""
    return _NAME.fullmatch(str(name)) is not None and not Path(Path(name).parts[0]).exists()


def fetch(
    name: str, *, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Download weights and config of a repository, if they are not here yet, and return their folder.

    Raises FileNotFoundError where the hub does not give them, or its client is not installed.
    """
    try:
        client = _client()
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name}; if it is one of the model hub, install its client: {_INSTALL}"
        ) from error
    options = {"revision": revision, "token": token, "cache_dir": cache_dir}
    given = {key: value for key, value in options.items() if value is not None}
    files = [WEIGHTS_NAME, CONFIG_NAME]
    try:
        return Path(client.snapshot_download(name, allow_patterns=files, **given))
    except Exception as error:  # no such repository, no right to it, no network: of three libraries
        raise FileNotFoundError(
            f"there is no folder {name}, and the model hub gave none: {one_line(error)}"
        ) from error


def push(folder: str | Path, name: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload an exported folder to a repository, made if it is new; returns its address.

    Raises ValueError where the hub does not take it, or its client is not installed.
    """
    try:
        api = _client().HfApi(**({} if token is None else {"token": token}))
    except ModuleNotFoundError as error:
        raise ValueError(f"push_to_hub needs the model hub's client: {_INSTALL}") from error
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # no network, no token, no right to it: of three libraries
        raise ValueError(
            f"the model hub did not take {name}: {one_line(error)}; save_pretrained writes it to a folder"
        ) from error
    return str(address)


def _client() -> ModuleType:
    import huggingface_hub

    return huggingface_hub
