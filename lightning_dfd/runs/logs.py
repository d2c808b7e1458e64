"""Logs that go on where a checkpoint left them: TensorBoard, CSV, and runs at tracking servers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_dfd.distributed.ranks import is_first_process
from lightning_dfd.runs.loggers import read_rows, write_rows


def log_places(loggers: Sequence[Logger]) -> dict[str, int]:
    """The folders of a run's TensorBoard and CSV logs, with the rows of the latter."""
    if not is_first_process():  # which alone writes, and alone knows the folders
        return {}
    return {
        str(Path(logger.log_dir).resolve()): _rows_of(logger) if isinstance(logger, CSVLogger) else 0
        for logger in loggers
        if isinstance(logger, (TensorBoardLogger, CSVLogger))
    }


def log_runs(loggers: Sequence[Logger]) -> dict[str, str]:
    """The ids of a run at its tracking servers, by logger and project."""
    if not is_first_process():
        return {}
    found = {_server(logger): _run_id(logger) for logger in loggers if isinstance(logger, (WandbLogger, MLFlowLogger))}
    return {server: run for server, run in found.items() if run is not None}


def continue_logs(loggers: Sequence[Logger], places: Mapping[str, int], runs: Mapping[str, str]) -> None:
    """Let a resumed run's loggers go on in the folders of `log_places`, the CSV as it was at the checkpoint, and in
    the runs of `log_runs`.

    Lightning's would begin a new `version_N`, and a new run. What TensorBoard got after the checkpoint stays: it is
    logged again, the same. A logger with another folder, name or project, or with its own version or run, is left as it
    is.
    """
    for logger in loggers:
        if isinstance(logger, (WandbLogger, MLFlowLogger)):
            _continue_run(logger, runs.get(_server(logger)))
        if not isinstance(logger, (TensorBoardLogger, CSVLogger)):
            continue
        for place, rows in places.items():
            same_version = logger._version is None or Path(logger.log_dir).resolve() == Path(place)
            if Path(logger.root_dir).resolve() == Path(place).parent and same_version:
                logger._version = Path(place).name
                if isinstance(logger, CSVLogger) and is_first_process():
                    _continue_csv(logger, rows)


def _server(logger: Any) -> str:
    kind, field = ("W&B", "_project") if isinstance(logger, WandbLogger) else ("MLflow", "_experiment_name")
    return f"{kind} {getattr(logger, field, None)}"


def _run_id(logger: Any) -> str | None:
    found = logger.version if isinstance(logger, WandbLogger) else logger._run_id
    return None if found is None else str(found)


def _continue_run(logger: Any, run: str | None) -> None:
    """Before the logger asks its server for a run."""
    if run is None or _run_id(logger) is not None:
        return
    if isinstance(logger, WandbLogger):
        logger._id = logger._wandb_init["id"] = run  # with Lightning's resume="allow"
    else:
        logger._run_id = run


def _continue_csv(logger: CSVLogger, rows: int) -> None:
    """Lightning's writer deletes the file that it finds, so the rows are set aside and put back."""
    path = Path(logger.log_dir) / "metrics.csv"
    aside = path.with_name(".metrics.csv.before_resume")
    if path.is_file() and not aside.is_file():  # else a resume was killed between these lines
        path.rename(aside)
    if not aside.is_file():
        return
    found, columns = read_rows(aside)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")  # says that it will delete them
        writer = logger.experiment
    write_rows(path, found[:rows], columns)
    writer.metrics_keys = columns
    aside.unlink()


def _rows_of(logger: CSVLogger) -> int:
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return 0
    logger.save()
    return len(read_rows(path)[0])
