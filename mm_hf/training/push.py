"""Pushes to the Hub whose failure does not stop the training run, with the reason and the command to push later."""

from __future__ import annotations

import copy
import os
import shlex
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

logger = logging.get_logger(__name__)

REASONS = {
    401: "the token is missing or invalid: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token has no write access: grant it at https://huggingface.co/settings/tokens, or set hub_model_id to "
    "a repository that you own",
    404: "the repository or branch does not exist, or the token has no access to it",
    413: "a file or folder is too large for the Hub",
    429: "too many requests: wait before the next push",
}


class PushError(OSError):
    """A push failed. The message states why, where the model is saved, and how to push it later."""


class HubToken(str):
    """A Hub token that is pickled as None.

    Trainer pickles its arguments, including `hub_token`, into `training_args.bin` and pushes this file.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()

    def __copy__(self) -> HubToken:
        return self

    def __deepcopy__(self, memo: Any) -> HubToken:
        return self

    def __repr__(self) -> str:
        return "'<HUB_TOKEN>'"


def without_directories(args: TrainingArguments) -> TrainingArguments:
    """Return a copy of training arguments in which absolute paths are reduced to their last component.

    Trainer pickles its arguments into `training_args.bin` and pushes this file.
    """
    published = copy.copy(args)
    paths = {k: v for k, v in vars(args).items() if isinstance(v, str) and os.path.isabs(v) and k != "hub_token"}
    vars(published).update({name: Path(path).name for name, path in paths.items()})
    return published


def describe_push_error(error: BaseException) -> str:
    """Return the reason of a failed push as a clause for an error message."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading ..."
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in REASONS:
        return f"{REASONS[status]} (HTTP status {status})"
    if status is not None and status >= 500:
        return f"the Hub has an internal error (HTTP status {status})"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub rejected it: {error.server_message or 'no reason given'} (HTTP status {status})"
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def upload_command(repo_id: str, directory: str, revision: str | None = None, private: bool | None = None) -> str:
    """Return the command that pushes the same files as Trainer and creates the repository if it does not exist."""
    options = ["--revision", revision] if revision else []
    options += ["--private"] if private else []
    exclude = ["--exclude", "_*", "--exclude", f"{PREFIX_CHECKPOINT_DIR}-*"]
    return shlex.join(["hf", "upload", repo_id, directory, ".", *exclude, *options])


def check_write_access(repo_id: str, token: str | None) -> None:
    """Raise an error before training if the token can read an existing repository but not write to it."""
    try:
        HfApi().auth_check(repo_id, token=token, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise
    except TypeError:  # older versions of huggingface_hub have no argument `write`
        pass


class SafePushTrainer(Trainer):
    """A Trainer whose training run continues when a push to the Hub fails. It is the base of [`MultiMixTrainer`].

    Trainer raises errors of a push, in some cases before the model is saved, and ignores those in the background. This
    class saves the model first. An explicit push that fails raises a [`PushError`]; all others log a warning.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository. With `push_to_hub=True`, Trainer calls this before training.

        Raises:
            PushError: The repository cannot be created, or the token cannot write to it.
        """
        token = self.args.hub_token if token is None else token
        try:
            super().init_hf_repo(token, private)
            if self.hub_model_id is not None:  # on rank 0
                check_write_access(self.hub_model_id, token)
        except Exception as error:
            self.hub_model_id = None
            raise PushError(
                f"The repository {self._repo_name!r} cannot be pushed to: {describe_push_error(error)}."
            ) from error

    @property
    def _repo_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and its card, then push them. They are also saved if the push fails.

        The arguments are those of `Trainer.push_to_hub`.

        Raises:
            PushError: The push failed. The message states why, where the model is saved, and how to push it later.
        """
        revision = self.args.hub_revision if revision is None else revision
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            try:
                self.init_hf_repo(token, private)
            except PushError as error:
                self.save_model(_internal_call=True)
                self.create_model_card(**kwargs)
                raise PushError(self._not_pushed(error.__cause__ or error, revision, private)) from error
        # Push in the background: an error there is one of the push, and an error here is not.
        push: Any = super().push_to_hub(commit_message, False, token, revision, private, **kwargs)
        if push is None:  # not rank 0
            return None
        if not blocking:
            push.add_done_callback(lambda _: self._warn_of_failures([push], revision, private))
            return push
        try:
            return push.result()
        except Exception as error:
            raise PushError(self._not_pushed(error, revision, private)) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._guard_token()
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            file = Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME
            torch.save(without_directories(self.args), file)

    def _guard_token(self) -> None:
        if self.args.hub_token is not None:
            self.args.hub_token = HubToken(self.args.hub_token)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model. With `push_to_hub=True`, also push it, and log a warning if the push fails."""
        try:
            super().save_model(output_dir, _internal_call)
        except PushError as error:
            logger.warning(str(error))

    def _complete_checkpoint_push(self, checkpoint_folder: str) -> None:
        """Copy files of a checkpoint that Trainer does not copy into the output directory, which is pushed."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint in the background."""
        self._guard_token()
        pushes = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        if pushes and (self.args.hub_always_push or self.push_in_progress is None or self.push_in_progress.is_done()):
            if self.push_in_progress is not None:  # with hub_always_push: the files must not change during the upload
                self.push_in_progress.wait_until_done()
            self._warn_of_failed_checkpoints()
            try:
                self._complete_checkpoint_push(checkpoint_folder)
            except Exception:  # an error in the card must not stop the training run
                logger.warning("The model card of this checkpoint could not be written.", exc_info=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_checkpoints()

    def _warn_of_failed_checkpoints(self) -> None:
        progress = getattr(self, "push_in_progress", None)  # not set before the repository exists
        if progress is not None:
            note = "Training continues, and later checkpoints are pushed as planned. "
            self._warn_of_failures(progress.jobs, self.args.hub_revision, self.args.hub_private_repo, note)

    def _warn_of_failures(
        self, jobs: list[Future[Any]], revision: str | None, private: bool | None, note: str = ""
    ) -> None:
        """Log a warning for each failed upload, and remove finished uploads from the list."""
        done = [job for job in jobs if job.done()]
        jobs[:] = [job for job in jobs if not job.done()]
        for job in done:
            error = None if job.cancelled() else job.exception()
            if error is not None:
                logger.warning(self._not_pushed(error, revision, private, note))

    def _not_pushed(self, error: BaseException, revision: str | None, private: bool | None, note: str = "") -> str:
        directory = str(self.args.output_dir)
        return (
            f"The model is saved in {directory}, but it was not pushed to {self._repo_name!r}: "
            f"{describe_push_error(error)}. {note}"
            f"To push it later: {upload_command(self._repo_name, directory, revision, private)}"
        )
