"""Models on the Hugging Face Hub, as local folders: one commit of each in a process.

Everything else sees a folder, in the Hub client's own cache. Retries are left to the client: it
waits as a 429 asks, repeats a request five times with growing pauses, and resumes a download that
breaks off.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import InputError

# Every repository that can be used has one of these.
_DESCRIPTIONS = ("config.json", "adapter_config.json", "reward_model.json")
_HOW = "HF_TOKEN, or `hf auth login`"  # to give a token
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# Branch or tag to commit, by cache and revision: a stage must not see a branch move.
_COMMITS: dict[tuple[str, str, str | None], str] = {}


def is_hub_id(name: str) -> bool:
    """Return whether a name can be that of a model on the Hub, and is not a folder here."""
    valid = _NAME.fullmatch(name) and "--" not in name and ".." not in name
    return bool(valid) and not os.path.exists(name)


def hub_commit(name: str, revision: str | None = None) -> str:
    """Return the commit of a branch or tag; the same for the rest of the process.

    Args:
        name: Hub id of a model or adapter.
        revision: Branch, tag or commit; None for the main branch.

    Raises:
        InputError: Why it cannot be read, and what to do.
    """
    from huggingface_hub import constants, hf_hub_download, is_offline_mode
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    key = f"{constants.ENDPOINT} {constants.HF_HUB_CACHE}", name, revision
    if key in _COMMITS:
        return _COMMITS[key]
    with hub_errors(name, revision):
        for file in _DESCRIPTIONS:
            try:
                found = Path(hf_hub_download(name, file, revision=revision))
            except LocalEntryNotFoundError:  # offline, this does not tell whether it exists
                if not is_offline_mode() or file == _DESCRIPTIONS[-1]:
                    raise
            except EntryNotFoundError:
                continue
            else:
                return _COMMITS.setdefault(key, found.parent.name)  # …/snapshots/COMMIT/FILE
    raise InputError(
        f"{name} on the Hub holds no model: it has none of {', '.join(_DESCRIPTIONS)}; "
        "give a repository (and `revision`) with a model for transformers, or an adapter of peft"
    )


def hub_folder(name: str, revision: str | None, files: Sequence[str], *, quiet: bool) -> Path:
    """Return the local folder of a model on the Hub, with these files of one commit downloaded.

    Args:
        name: Hub id.
        revision: Branch, tag or commit; None for the main branch.
        files: Names or patterns of files; those that do not exist are skipped.
        quiet: Whether to show no progress.

    Raises:
        InputError: Why it cannot be read, and what to do.
    """
    from huggingface_hub import snapshot_download

    commit = hub_commit(name, revision)
    bar = silent_bar() if quiet else None
    with hub_errors(name, revision):
        found = snapshot_download(name, revision=commit, allow_patterns=list(files), tqdm_class=bar)
    return Path(found)


def silent_bar() -> type[Any]:
    """Return a progress bar that shows nothing, for the Hub's client."""
    from tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})

    return Silent


@contextmanager
def hub_errors(name: str, revision: str | None = None, kind: str = "model") -> Iterator[None]:
    """Turn the Hub client's errors into one line that names the repository and what to do.

    Args:
        name: Hub id.
        revision: The revision asked for.
        kind: "model" or "dataset".

    Raises:
        InputError: For every error of the client; caused by a ConnectionError if it may pass.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of the client, its HTTP library and the disk
        text, passing = _explain(error, name, revision, kind)
        raise InputError(text) from (ConnectionError(_line(error)) if passing else None)


def _explain(error: Exception, name: str, revision: str | None, kind: str) -> tuple[str, bool]:
    """Return what is wrong and what to do, and whether it may pass by itself."""
    from huggingface_hub import constants, errors, is_offline_mode

    where = f"{name} on the Hub" + (f" (revision {revision!r})" if revision else "")
    causes = list(_causes(error))
    answer = next((one for one in causes if isinstance(one, errors.HfHubHTTPError)), None)
    if isinstance(error, errors.HFValidationError):
        return f"{name} is neither a folder here nor the name of a {kind} on the Hub", False
    if answer is not None and (said := _explain_answer(answer, name, where, revision, kind)):
        return said, False
    if answer is not None and answer.response.status_code == 429:
        return (
            f"{where}: the Hub lets nobody at this address read more for now (429, after the "
            "client's retries); wait some minutes, or give a token, which raises the limit "
            f"({_HOW})"
        ), True
    if is_offline_mode():
        option = "" if kind == "model" else f"--repo-type {kind} "
        return (
            f"{name} is no folder here, and {where} is not in the cache "
            f"({constants.HF_HUB_CACHE}), or not all of it; HF_HUB_OFFLINE forbids to download it: "
            f"unset that, or run `hf download {option}{name}` where there is a network"
        ), False
    if answer is None and isinstance(error, OSError) and error.errno is not None:
        return f"{where} cannot be stored in {constants.HF_HUB_CACHE}: {_line(error)}", False
    return (
        f"{where} cannot be read, and it is not in the cache: {_line(causes[-1])}; try again "
        "later, or give a local folder"
    ), True


def _explain_answer(
    answer: Any, name: str, where: str, revision: str | None, kind: str
) -> str | None:
    """Return what an answer of the Hub means that will stay the same; None for others."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{name}"
    status = answer.response.status_code
    if isinstance(answer, errors.GatedRepoError) and status == 401:
        return (
            f"{name} on the Hub is gated: accept its license at {page}, then give a token of that "
            f"account ({_HOW})"
        )
    if isinstance(answer, errors.GatedRepoError):
        return (
            f"{name} on the Hub is gated, and this token's account has no access: ask for it at "
            f"{page}, or give another token ({_HOW})"
        )
    if isinstance(answer, errors.RevisionNotFoundError):
        return (
            f"{name} on the Hub has no revision {revision!r}; give a branch, tag or commit of "
            f"{page}/tree/main"
        )
    if isinstance(answer, errors.RepositoryNotFoundError):
        return (
            f"{name} is neither a folder here nor a {kind} on the Hub; check the name, and if it "
            f"is private give a token that may read it ({_HOW})"
        )
    if status in (401, 403):
        return f"{where}: the Hub refuses the token: {_line(answer)}; renew it ({_HOW})"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, the latest first."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line), type(error).__name__)[:300]
