"""Searcher of Ray Tune whose state is the sweep's trial records."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ray.tune import search

from carclass import storage
from carclass.cluster.telemetry import report_trial_accuracy
from carclass.training import checkpoint
from carclass.tuning import sampler, trial_records
from carclass.tuning.search_space import SearchSpace
from carclass.tuning.trial import COMPLETE, FAILURE, STORAGE_FAILURE
from carclass.tuning.trial_records import Trial, TrialRecords

log = logging.getLogger(__name__)


class RecordedSearch(search.Searcher):
    """Searcher that suggests the trials of the given numbers and records how they end.

    A trial that is already recorded is suggested again with the same settings; the others are sampled.
    """

    def __init__(
        self, space: SearchSpace, records: TrialRecords, numbers: Sequence[int], devices: dict[str, Any]
    ) -> None:
        """devices: fields `device` and `devices` of new records."""
        super().__init__(metric="val_accuracy", mode="max")
        self.space, self.records, self.devices = space, records, devices
        self.numbers, self.pending = numbers, [*numbers]
        self.number_of: dict[str, int] = {}  # by Ray Tune's id of the trial
        self.to_clean: list[Trial] = []
        self.accuracies = {
            number: trial_records.recorded_accuracies(space, trial)
            for number, trial in records.trials.items()
            if trial.is_over
        }

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the config of the next trial."""
        number = self.pending.pop(0)
        self.number_of[trial_id] = number
        if number not in self.records.trials:
            values, seed = self._sample(number), self.space.base_settings.seed
            self.records.put(Trial(number=number, values=values, seed=seed, **self.devices))
        trial = self.records.trials[number]
        return {"trial": {"number": number, "title": trial.title, "name": trial.name}, "record": asdict(trial)}

    def _sample(self, number: int) -> dict[str, Any]:
        settings = self.space.search
        observed = [
            sampler.ObservedTrial(trial.values, trial.state, self.accuracies.get(trial.number, {}))
            for trial in self.records.trials.values()
            if trial.number < number and trial.repeats is None
        ]
        return sampler.suggest_values(
            self.space.dimensions, observed, settings.sampler, settings.seed, number, settings.num_trials
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep the val accuracy of an epoch."""
        if not {FAILURE, STORAGE_FAILURE}.isdisjoint(result):
            return
        number = self.number_of[trial_id]
        self.accuracies.setdefault(number, {})[result["epoch"]] = result["val_accuracy"]
        report_trial_accuracy(self.space.search.name, self.records.trials[number].title, result["val_accuracy"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the state in which a trial ended, unless it was over already, or is to be resumed."""
        trial = self.records.trials[self.number_of[trial_id]]
        last = {} if result is None else result
        if "epoch" in last:
            self.on_trial_result(trial_id, last)
        if trial.is_over or STORAGE_FAILURE in last:
            return
        is_failed, is_complete = error or FAILURE in last, last.get(COMPLETE)
        state: trial_records.State = "failed" if is_failed else "complete" if is_complete else "pruned"
        self.records.put(replace(trial, state=state, reason=last.get(FAILURE)))
        self._log_progress(self.records.trials[trial.number])
        for earlier in self.to_clean:  # not the trial itself, whose process may still be writing
            remove_checkpoints(self.space, earlier)
        self.to_clean = [self.records.trials[trial.number]]

    def _log_progress(self, trial: Trial) -> None:
        num_over = len(self.numbers) - len(self.records.unfinished(self.numbers))
        best = {number: max(self.accuracies[number].values()) for number in self.numbers if self.accuracies.get(number)}
        accuracy = f", val accuracy {best[trial.number]:.3f}" if trial.number in best else ""
        top = max(best, key=lambda number: best[number], default=trial.number)
        log.info(
            "tune: %d of %d trials over: %s %s%s; best so far %.3f by %s",
            num_over, len(self.numbers), trial.name, trial.state, accuracy, best.get(top, 0.0),
            self.records.trials[top].name,
        )  # fmt: skip

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the records."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the state is in the records."""


def remove_checkpoints(space: SearchSpace, trial: Trial) -> None:
    """Delete the checkpoints of a complete or pruned trial; its model and metrics stay."""
    if trial.state in ("complete", "pruned"):
        run = trial_records.trial_run(space, trial)
        for stage in run.stages:
            checkpoint.prune(storage.join(run.uri, stage), [])
