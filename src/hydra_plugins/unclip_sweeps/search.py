"""A sweeper in which Optuna (an extra) chooses the values of each job from the earlier results.

Its keys are those of hydra-optuna-sweeper, which itself still needs optuna < 3.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

Suggester = Callable[[Any], Any]  # asks an Optuna trial for a value


@dataclass(kw_only=True)
class OptunaSweeper(Sweeper):
    """Search with an Optuna sampler.

    The search space is written in Hydra's own grammar: `optimizer.lr=tag(log,interval(1e-5,1e-2))`,
    `network.layers=range(2,9)`, `schedule=cosine,linear`. The study is stored in the sweep's
    folder; with the same hydra.sweep.dir, a search continues until it has `n_trials` jobs.

    Args:
        sampler: configuration of an Optuna sampler.
        direction: "minimize" or "maximize"; None for the `direction` of the jobs.
        storage: URL of the study's database; None for study.log in the sweep's folder.
        study_name: name of the study; None for the name of the sweep's folder.
        n_trials: total number of jobs.
        n_jobs: number of jobs that are chosen at once, such as those that run in parallel.
        params: search space; the command line overrides it.
    """

    sampler: Mapping[str, Any]
    direction: str | None
    storage: str | None
    study_name: str | None
    n_trials: int
    n_jobs: int
    params: Mapping[str, Any]

    def __post_init__(self):
        if self.n_trials < 1 or self.n_jobs < 1:
            counts = f"n_trials is {self.n_trials} and n_jobs is {self.n_jobs}"
            raise ValueError(f"hydra.sweeper: {counts}; both must be at least 1")

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Build the launcher."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run jobs until there are `n_trials`."""
        words = [f"{key}={value}" for key, value in self.params.items()] + arguments
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = {word.get_key_element(): word for word in parser.parse_overrides(words)}
        space = {key: suggester(o) for key, o in overrides.items() if o.is_sweep_override()}
        if not space:
            example = "optimizer.lr=tag(log,interval(1e-5,1e-2))"
            raise ValueError(f"the search space is empty: add, for example, {example}")
        others = {key: o for key, o in overrides.items() if key not in space}
        fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in others.items()]
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        study = self._study(folder, fixed)
        while len(study.trials) < self.n_trials:
            self._run_batch(study, space, fixed)
        best = study.best_trial
        print(f"best: job {best.number}, {best.value:.6g}, {best.params}", flush=True)

    def _study(self, folder: Path, fixed: list[str]) -> Any:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is missing: pip install -e '.[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        job = self.hydra_context.config_loader.load_sweep_config(self.config, fixed)
        journal = JournalFileBackend(str(folder / "study.log"))
        return optuna.create_study(
            study_name=self.study_name or folder.name,
            direction=self.direction or OmegaConf.select(job, "direction"),
            sampler=instantiate(self.sampler),
            storage=self.storage or optuna.storages.JournalStorage(journal),
            load_if_exists=True,
        )

    def _run_batch(self, study: Any, space: Mapping[str, Suggester], fixed: Sequence[str]) -> None:
        from optuna.trial import TrialState

        first = len(study.trials)
        trials = [study.ask() for _ in range(min(self.n_jobs, self.n_trials - first))]
        jobs = [
            [*fixed, *(f"{key}={suggest(trial)}" for key, suggest in space.items())]
            for trial in trials
        ]
        self.validate_batch_is_legal(jobs)
        returns = self.launcher.launch(jobs, initial_job_idx=first)
        for trial, returned in zip(trials, returns, strict=True):
            done = returned.status == JobStatus.COMPLETED and returned._return_value is not None
            result = {"values": returned._return_value} if done else {"state": TrialState.FAIL}
            study.tell(trial, **result)
        if all(trial.state == TrialState.FAIL for trial in study.trials):
            raise ChildProcessError("all jobs of the search have failed: see their output above")


def suggester(override: Override) -> Suggester:
    """Return a function that asks an Optuna trial for the value of an override."""
    key, sweep = override.get_key_element(), override.value()
    if isinstance(sweep, IntervalSweep):
        log = "log" in sweep.tags
        if isinstance(sweep.start, int) and isinstance(sweep.end, int):
            return lambda trial: trial.suggest_int(key, sweep.start, sweep.end, log=log)
        return lambda trial: trial.suggest_float(key, sweep.start, sweep.end, log=log)
    if isinstance(sweep, ChoiceSweep | RangeSweep):
        choices = list(override.sweep_iterator(transformer=Transformer.encode))
        return lambda trial: trial.suggest_categorical(key, choices)
    raise ValueError(f"{key}: use a choice, a range or an interval")


DEFAULTS = {
    "_target_": f"{__name__}.OptunaSweeper",
    "_recursive_": False,  # the sampler is built later, with a better error if Optuna is missing
    "sampler": {"_target_": "optuna.samplers.TPESampler", "seed": 0},
    **dict.fromkeys(["direction", "storage", "study_name"]),
    **{"n_trials": 20, "n_jobs": 1, "params": {}},
}
ConfigStore.instance().store("optuna", DEFAULTS, group="hydra/sweeper", provider="unclip")
