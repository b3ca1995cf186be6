"""A trainer whose checkpoints are complete and verified, and are restored exactly."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from ..distributed import check_processes
from ..evaluation.files import exclusive_directory, remove_link, remove_links, write_text
from ..methods import ERM, Mixing
from .checkpoints import (
    LAST_FILE,
    explain_write_errors,
    find_checkpoint_error_on_any_rank,
    find_missing_files_on_any_rank,
    find_weights_error,
    last_complete_checkpoint,
    list_checkpoints,
)
from .checksums import CHECKSUM_FILE, write_checksums
from .push import SafePushTrainer
from .run_settings import find_changes, training_settings
from .weights import ADAPTER_FILES, is_plain_checkpoint, load_weights, raise_if_missing

logger = logging.get_logger(__name__)

# Suffixes of the files that a saved model or checkpoint consists of.
WRITTEN_SUFFIXES = (".bin", ".jinja", ".json", ".md", ".model", ".png", ".pt", ".pth", ".safetensors", ".txt")


class ResumableTrainer(SafePushTrainer):
    """A Trainer whose checkpoints are complete and verified, and are restored exactly.

    It is the base of [`MultiMixTrainer`]. A checkpoint is written completely before older ones are deleted, and has
    checksums. It is verified before it is read, together with the settings that it was trained with.
    """

    mixing: Mixing
    _own_checkpoints: frozenset[Path] = frozenset()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        *,
        allow_changed_settings: bool = False,
    ) -> Any:
        """Train from a verified checkpoint, in an output directory that no other training run writes to now.

        Arguments and errors are those of [`MultiMixTrainer.train`].
        """
        check_processes(self.accelerator)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._complete_checkpoint(resume_from_checkpoint)
            self._check_settings(resume_from_checkpoint, allow_changed_settings)
        elif self.args.should_save and trial is None:
            self._warn_of_earlier_run()
        with self._reserved_output_dir(trial):
            try:
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            finally:
                self._own_checkpoints = frozenset(list_checkpoints(str(self.args.output_dir)))

    def _complete_checkpoint(self, wanted: str | bool) -> str:
        output_dir = str(self.args.output_dir)
        # The first words of both errors are those of `Trainer`.
        if wanted is True:
            found = last_complete_checkpoint(output_dir, **self._checkpoint_format)
            if found is None:
                raise ValueError(
                    f"No valid checkpoint found in output directory ({output_dir}): start without "
                    "resume_from_checkpoint."
                )
            wanted = str(found)
        error = find_checkpoint_error_on_any_rank(str(wanted), **self._checkpoint_format)
        if error is not None:
            raise ValueError(
                f"Can't find a valid checkpoint at {wanted}: {error}. resume_from_checkpoint=True selects the newest "
                f"complete one in {output_dir}."
            )
        missing = find_missing_files_on_any_rank(str(wanted), **self._checkpoint_format)
        if missing and self.is_world_process_zero():
            logger.warning(
                f"The checkpoint {wanted} has no {', '.join(missing)}: what they contain starts anew, and the resumed "
                "training is not exact."
            )
        return str(wanted)

    def _check_settings(self, checkpoint: str, allow_changes: bool) -> None:
        """Raise a ValueError if the settings differ from those of a checkpoint."""
        changes = find_changes(checkpoint, self.mixing, training_settings(self))
        # Plain training resumes with other settings, as that of `Trainer` does, but not as another method.
        allow_changes = allow_changes or (type(self.mixing) is ERM and not find_changes(checkpoint, self.mixing, {}))
        if changes and not allow_changes:
            raise ValueError(
                f"The checkpoint {checkpoint} was trained with other settings: {'; '.join(changes)}. Use the same "
                "settings, or resume with allow_changed_settings=True, which is not exact."
            )
        if changes and self.is_world_process_zero():
            logger.warning(f"Resuming from {checkpoint} with other settings: {'; '.join(changes)}.")

    def _warn_of_earlier_run(self) -> None:
        """Log a warning if the directory has checkpoints that this trainer has neither written nor found before."""
        earlier = [path for path in list_checkpoints(str(self.args.output_dir)) if path not in self._own_checkpoints]
        if earlier:
            logger.warning(
                f"{self.args.output_dir} contains {earlier[0].name} of an earlier training run, and "
                "resume_from_checkpoint=True may select it later: choose another output_dir, or remove the checkpoint."
            )

    @contextlib.contextmanager
    def _reserved_output_dir(self, trial: Any) -> Iterator[None]:
        """Raise a ValueError if another training run writes to the same output directory."""
        if not self.args.should_save or trial is not None or self.hp_search_backend is not None:
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive_directory(str(self.args.output_dir)))
            except BlockingIOError as error:
                raise ValueError(
                    f"Another training run writes to output_dir={self.args.output_dir!r} now: wait for it, or choose "
                    "another output_dir."
                ) from error
            yield

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, unless a finished run was resumed, in which `Trainer` would train one more step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # ---- Saving and restoring ----

    @property
    def _checkpoint_format(self) -> dict[str, Any]:
        """Arguments of `find_checkpoint_error` for the checkpoints of this training."""
        return {
            "rank": self.args.process_index,
            "world_size": self.args.world_size,
            "sharded": self.is_fsdp_enabled or self.is_deepspeed_enabled,
            "own_files_only": self.args.local_process_index > 0,
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with explain_write_errors(directory, **{**self._checkpoint_format, "own_files_only": False}):
            if self.args.should_save:
                for path in (directory, *directory.rglob("*")):
                    remove_link(path)  # what it refers to is kept
                for name in (LAST_FILE, CHECKSUM_FILE):  # a checkpoint of an earlier training becomes incomplete
                    (directory / name).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.args.should_save and not (directory / CHECKSUM_FILE).exists():
                write_checksums(directory)

    def save_state(self) -> None:
        """Save the state, without directories of this machine if it is pushed."""
        super().save_state()
        if self.is_world_process_zero():
            self._hide_directories(Path(str(self.args.output_dir)))

    def _hide_directories(self, directory: Path) -> None:
        """Reduce the path of the best checkpoint in a state that is pushed to its last component."""
        path = directory / LAST_FILE
        state = json.loads(path.read_text(encoding="utf-8")) if self.args.push_to_hub else {}
        best = state.get("best_model_checkpoint")
        if best is not None and Path(best).is_absolute():
            state["best_model_checkpoint"] = Path(best).name
            write_text(path, json.dumps(state, indent=2, sort_keys=True) + "\n")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:  # Trainer follows links
            remove_links(str(output_dir or self.args.output_dir), WRITTEN_SUFFIXES)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        assert model is not None
        if not self._checkpoint_format["sharded"] and is_plain_checkpoint(model, resume_from_checkpoint):
            load_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best, model = self.state.best_model_checkpoint, self.model
        if best is not None and not Path(best).exists():  # the state of another directory, or a pushed one
            best = str(Path(str(self.args.output_dir)) / Path(best).name)
            self.state.best_model_checkpoint = best
        if best is None or model is None or not Path(best).is_dir() or self._checkpoint_format["sharded"]:
            return super()._load_best_model()
        error = find_weights_error(best)
        if error is not None:
            raise ValueError(
                f"The best model in {best} cannot be loaded: {error}. The model has the weights of the last step."
            )
        if is_plain_checkpoint(model, best):
            load_weights(model, best)
        elif not any((Path(best) / name).is_file() for name in ADAPTER_FILES):
            super()._load_from_checkpoint(best)  # which reads the directories of adapters that are not named "default"
        else:
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model: Any = self.model
        ignorable = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        raise_if_missing(None, set(load_result.missing_keys) - ignorable)
        super()._issue_warnings_after_load(load_result)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.should_save:  # the last files before the push
            self._hide_directories(Path(checkpoint_folder))
            write_checksums(checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)
