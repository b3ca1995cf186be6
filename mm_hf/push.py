"""Pushes to the Hub that cost no training: why one failed, where the model is, and how to push it later."""

from __future__ import annotations

import shlex
from concurrent.futures import Future
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

REASONS = {
    401: "the Hub does not accept the token, or there is none: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: give it write access at https://huggingface.co/settings/tokens, or set "
    "hub_model_id to a repository of your own",
    404: "there is no such repository or branch, or the token may not see it",
    413: "the Hub takes no files or folders of this size",
    429: "the Hub was asked too often: wait a while",
}


class PushError(OSError):
    """Nothing was pushed. The message says why, where the saved model is, and how to push it."""


class HubToken(str):
    """A token for the Hub that is pickled as None.

    Trainer pickles its arguments, `hub_token` among them, into `training_args.bin`, and pushes that file.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()

    def __copy__(self) -> HubToken:
        return self

    def __deepcopy__(self, memo: Any) -> HubToken:
        return self

    def __repr__(self) -> str:
        return "'<HUB_TOKEN>'"


def reason(error: BaseException) -> str:
    """Why a push failed, as a part of a sentence."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading ..."
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in REASONS:
        return f"{REASONS[status]} (HTTP status {status})"
    if status is not None and status >= 500:
        return f"the Hub has a problem of its own (HTTP status {status})"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub refuses it, {error.server_message or 'without saying why'} (HTTP status {status})"
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def upload_command(repo_id: str, directory: str, revision: str | None = None, private: bool | None = None) -> str:
    """The command that pushes what Trainer would have pushed. It creates the repository if there is none."""
    options = ["--revision", revision] if revision else []
    options += ["--private"] if private else []
    exclude = ["--exclude", "_*", "--exclude", f"{PREFIX_CHECKPOINT_DIR}-*"]
    return shlex.join(["hf", "upload", repo_id, directory, ".", *exclude, *options])


def check_write_access(repo_id: str, token: str | None) -> None:
    """Find out now, and not after the training, that the token may read a repository that exists but not write to it."""
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(repo_id, token=token, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise
    except TypeError:  # older versions of huggingface_hub cannot ask
        pass


def failures(jobs: list[Future[Any]]) -> list[BaseException]:
    """What went wrong in those uploads that are done; they are taken off the list."""
    done = [job for job in jobs if job.done()]
    jobs[:] = [job for job in jobs if not job.done()]
    errors = (None if job.cancelled() else job.exception() for job in done)
    return [error for error in errors if error is not None]
