"""`eagleray batch`: answers a file of requests in OpenAI's batch format; a killed job resumes where it stopped."""

import argparse
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.frontend.generation_config import chosen_defaults
from eagleray.cluster.runtime.resolve import folder_of
from eagleray.deploy.batch.input import Survey, read_lines, survey
from eagleray.deploy.batch.journal import Done, Identity, Journal, read_identity, sidecar
from eagleray.deploy.batch.progress import BatchProgress
from eagleray.deploy.batch.run import BatchRun, Replica
from eagleray.deploy.batch.storage import Places
from eagleray.deploy.cli.arguments import engine_config
from eagleray.deploy.cli.ending import run_async
from eagleray.deploy.cli.engine import starting
from eagleray.models.loading.model_dir import public_name

WINDOWS = 2  # rows in flight for each that an engine runs, so that it always has some to choose from

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """What every replica is started with."""

    config: EngineConfig
    name: str  # of the model, to rows
    defaults: dict[str, float]  # of sampling


def run(arguments: argparse.Namespace) -> int:
    """0 once every row has its result, be that an error or not.

    Raises `ValueError` for what cannot be run, and `EngineStartError` or `EngineDeadError`, after which the same
    command resumes the job.
    """
    places = Places.of(arguments.input, arguments.output, arguments.work_dir)
    config = engine_config(arguments)
    defaults = chosen_defaults(folder_of(config), arguments.generation_config)
    engine = EngineOptions(config, arguments.served_model_name or public_name(config.model), defaults)
    err = Console(stderr=True)
    with err.status(f"reading {places.input}"):
        file = places.fetch()
        known = survey(file)
    identity = Identity(known.size, known.sha256, _exact(config))
    if _is_finished(places, identity):
        logger.info("%s is there already, whole", places.output)
        return 0
    with Journal(places.partial, identity) as journal:
        done = journal.recover(known)
        left = known.num_rows - done.num_rows
        if places.output_exists() and left:
            raise ValueError(f"the output {places.output} exists; name another, or remove it")
        progress = BatchProgress(err, known.num_rows, done.num_rows, done.num_failed)
        try:
            if left:
                run_async(partial(_run_rows, file, known, done, journal, progress, engine, arguments.replicas, err))
        except BaseException:
            if progress.num_done:
                logger.info(
                    "%d of %d results are kept; run the same command to resume", progress.num_done, known.num_rows
                )
            raise
        journal.finish(places.publish)
    places.clean()
    err.print(f"{progress.line()} · {places.output}", style="dim", highlight=False, soft_wrap=True)
    return 0


def _exact(config: EngineConfig) -> str:
    """A name for the model that no other model has."""
    return config.model if config.revision is None else f"{config.model}@{config.revision}"


def _is_finished(places: Places, identity: Identity) -> bool:
    """Whether an earlier run was killed when all but cleaning up was done; then this does it."""
    if places.partial.exists() or read_identity(places.partial) != identity or not places.output_exists():
        return False
    sidecar(places.partial).unlink()
    places.clean()
    return True


async def _run_rows(
    file: Path,
    known: Survey,
    done: Done,
    journal: Journal,
    progress: BatchProgress,
    engine: EngineOptions,
    num_replicas: int | None,
    err: Console,
) -> None:
    window = WINDOWS * engine.config.max_num_seqs
    lines = (line for line in read_lines(file, known) if not done.lines[line.number])
    async with _replicas(engine, num_replicas, known.num_rows - done.num_rows, window, err) as replicas:
        with progress:
            progress.begin()
            await BatchRun(lines, journal, progress).run(replicas, window)


@asynccontextmanager
async def _replicas(
    engine: EngineOptions, wanted: int | None, num_rows: int, window: int, err: Console
) -> AsyncIterator[Sequence[Replica]]:
    """One engine in this process, or several in actors."""
    if wanted == 1:
        with starting(engine.config, err):
            from eagleray.deploy.batch.engine import EngineReplica  # takes seconds, under the line that says so

        replica = EngineReplica(engine.config, engine.name, engine.defaults)
        try:
            yield [replica]
        finally:
            replica.close()
        return
    from eagleray.deploy.batch.actors import choose_num_replicas, running_replicas

    count = choose_num_replicas(wanted, engine.config, num_rows)
    async with running_replicas(engine.config, engine.name, engine.defaults, count, window) as replicas:
        yield replicas
