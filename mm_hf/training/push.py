"""Pushes to the Hub that cost no training: why one failed, where the model is, and how to push it later."""

from __future__ import annotations

import shlex
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

logger = logging.get_logger(__name__)

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
    try:
        HfApi().auth_check(repo_id, token=token, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise
    except TypeError:  # older versions of huggingface_hub cannot ask
        pass


class SafePushTrainer(Trainer):
    """A Trainer whose pushes to the Hub cost no training; [`MultiMixTrainer`] is one.

    Trainer raises where a push fails, in places before the model is saved, and is silent where that happens in the
    background. Here the model is saved first, an explicit push raises a [`PushError`], and all others are warned of.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository as Trainer does; with `push_to_hub=True` that is before anything is trained.

        Raises:
            PushError: It cannot be pushed to.
        """
        token = self.args.hub_token if token is None else token
        try:
            super().init_hf_repo(token, private)
            if self.hub_model_id is not None:  # the first process
                check_write_access(self.hub_model_id, token)
        except Exception as error:
            self.hub_model_id = None
            raise PushError(f"The repository {self._repo_name!r} cannot be pushed to: {reason(error)}.") from error

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
        """Save the model and its card, and push them, as Trainer does; it saves them also if they cannot be pushed.

        Raises:
            PushError: The push failed. The message says why, where the model is, and how to push it later.
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
        # In the background, so that what fails there is a push, and what fails here is none.
        push: Any = super().push_to_hub(commit_message, False, token, revision, private, **kwargs)
        if push is None:  # not the first process
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

    def _guard_token(self) -> None:
        if self.args.hub_token is not None:
            self.args.hub_token = HubToken(self.args.hub_token)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; with `push_to_hub=True` push it, too, and go on with a warning if that fails."""
        try:
            super().save_model(output_dir, _internal_call)
        except PushError as error:
            logger.warning(str(error))

    def _complete_checkpoint_push(self, checkpoint_folder: str) -> None:
        """Put into the output directory what is pushed with a checkpoint's model and Trainer does not copy there."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint in the background."""
        self._guard_token()
        pushes = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        if pushes and (self.args.hub_always_push or self.push_in_progress is None or self.push_in_progress.is_done()):
            if self.push_in_progress is not None:  # with hub_always_push: its files must not change while they are sent
                self.push_in_progress.wait_until_done()
            self._warn_of_failed_checkpoints()
            try:
                self._complete_checkpoint_push(checkpoint_folder)
            except Exception:  # a card is not worth a training
                logger.warning("The model card of this checkpoint could not be written.", exc_info=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_checkpoints()

    def _warn_of_failed_checkpoints(self) -> None:
        progress = getattr(self, "push_in_progress", None)  # there is none before a repository is
        if progress is not None:
            aside = "Training goes on, and later checkpoints are pushed as planned. "
            self._warn_of_failures(progress.jobs, self.args.hub_revision, self.args.hub_private_repo, aside)

    def _warn_of_failures(
        self, jobs: list[Future[Any]], revision: str | None, private: bool | None, aside: str = ""
    ) -> None:
        """Warn of those uploads that have failed; those that are done are taken off the list."""
        done = [job for job in jobs if job.done()]
        jobs[:] = [job for job in jobs if not job.done()]
        for job in done:
            error = None if job.cancelled() else job.exception()
            if error is not None:
                logger.warning(self._not_pushed(error, revision, private, aside))

    def _not_pushed(self, error: BaseException, revision: str | None, private: bool | None, aside: str = "") -> str:
        directory = str(self.args.output_dir)
        return (
            f"The model is saved in {directory}, but it was not pushed to {self._repo_name!r}: {reason(error)}. {aside}"
            f"To push it later: {upload_command(self._repo_name, directory, revision, private)}"
        )
