"""A sweeper that lets Optuna (an extra) choose each job's values from what came of those before.

It is not hydra-optuna-sweeper, whose releases need an Optuna of years ago.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from omegaconf import DictConfig, OmegaConf


@dataclass
class OptunaSweeperConf:
    """What `hydra.sweeper.KEY=VALUE` can change."""

    _target_: str = "hydra_plugins.unclip_sweeps.search.OptunaSweeper"
    trials: int = 20
    batch: int = 1
    seed: int = 0
    params: dict[str, Any] = field(default_factory=dict)


class OptunaSweeper(Sweeper):
    """Searches by Optuna's TPE.

    What may vary is said in Hydra's own grammar: `optimizer.lr=tag(log,interval(1e-5,1e-2))`,
    `network.layers=range(2,9)`, `schedule=cosine,linear`. The study is kept as study.log in the
    sweep's folder; the same hydra.sweep.dir goes on with it until there are `trials`.

    Args:
        trials: jobs in all.
        batch: jobs that are chosen at once, such as those that run in parallel.
        seed: of the search.
        params: what varies, beside what the command line says.
    """

    def __init__(self, trials: int, batch: int, seed: int, params: dict[str, Any]):
        if trials < 1 or batch < 1:
            raise ValueError(f"hydra.sweeper: trials {trials}, batch {batch}: at least 1 each")
        self.trials, self.batch, self.seed, self.params = trials, batch, seed, params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Builds the launcher."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs jobs until there are enough.

        Raises:
            ValueError: Optuna is missing, or nothing varies.
            ChildProcessError: all jobs failed.
        """
        words = [f"{key}={value}" for key, value in self.params.items()] + arguments
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = {word.get_key_element(): word for word in parser.parse_overrides(words)}
        varying = {key: suggester(o) for key, o in overrides.items() if o.is_sweep_override()}
        if not varying:
            raise ValueError(
                "nothing varies: say for example optimizer.lr=tag(log,interval(1e-5,1e-2))"
            )
        fixed = [
            f"{key}={override.get_value_element_as_str()}"
            for key, override in overrides.items()
            if key not in varying
        ]
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        study = _study(folder, self._direction(fixed), self.seed)
        while len(study.trials) < self.trials:
            self._batch(study, varying, fixed)
        best = study.best_trial
        print(f"best: job {best.number}, {best.value:.6g}, {best.params}", flush=True)

    def _direction(self, fixed: Sequence[str]) -> str:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(fixed))
        return OmegaConf.select(config, "direction")

    def _batch(
        self, study: Any, varying: dict[str, Callable[[Any], Any]], fixed: Sequence[str]
    ) -> None:
        from optuna.trial import TrialState

        first = len(study.trials)
        trials = [study.ask() for _ in range(min(self.batch, self.trials - first))]
        jobs = [
            [*fixed, *(f"{key}={suggest(trial)}" for key, suggest in varying.items())]
            for trial in trials
        ]
        self.validate_batch_is_legal(jobs)
        returns = self.launcher.launch(jobs, initial_job_idx=first)
        for trial, returned in zip(trials, returns, strict=True):
            measured = returned.status == JobStatus.COMPLETED and returned._return_value is not None
            if measured:
                study.tell(trial, returned._return_value)
            else:
                study.tell(trial, state=TrialState.FAIL)
        if all(trial.state == TrialState.FAIL for trial in study.trials):
            raise ChildProcessError("every job of the search failed so far: see what it said above")


def _study(folder: Path, direction: str, seed: int) -> Any:
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install -e '.[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=folder.name,
        direction=direction,
        sampler=optuna.samplers.TPESampler(seed=seed),
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        load_if_exists=True,
    )


def suggester(override: Override) -> Callable[[Any], Any]:
    """What asks an Optuna trial for a value of this override.

    Raises:
        ValueError: for a sweep that is no choice, range or interval.
    """
    key, sweep = override.get_key_element(), override.value()
    if isinstance(sweep, IntervalSweep):
        log = "log" in sweep.tags
        if isinstance(sweep.start, int) and isinstance(sweep.end, int):
            return lambda trial: trial.suggest_int(key, sweep.start, sweep.end, log=log)
        return lambda trial: trial.suggest_float(key, sweep.start, sweep.end, log=log)
    if isinstance(sweep, ChoiceSweep | RangeSweep):
        choices = list(override.sweep_iterator(transformer=Transformer.encode))
        return lambda trial: trial.suggest_categorical(key, choices)
    raise ValueError(f"{key}: it can be a choice, a range or an interval")


ConfigStore.instance().store(
    group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="unclip"
)
