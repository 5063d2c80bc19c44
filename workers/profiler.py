"""Runs torch's profiler on one rank, started and stopped between two steps."""

import json
import logging
import os
import tempfile
from pathlib import Path

import torch

from eagleray.parallel.platform import platform_of, synchronize
from eagleray.workers.protocol.messages import TRACE_NUM_STEPS, RankControl, RankReply

logger = logging.getLogger(__name__)


class RankProfiler:
    """Carries out the controls about profiles, which the engine core sends in an order that makes sense."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._folder = Path()
        self._profile: torch.profiler.profile | None = None
        self._num_steps = 0

    def count_step(self) -> None:
        """A step was launched."""
        self._num_steps += 1

    def handle(self, message: RankControl) -> RankReply:
        """The reply. What fails is its error: a rank must not end for the sake of a trace."""
        try:
            match message.verb:
                case "start_profile":
                    self._start(Path(message.arguments["directory"]))
                    return RankReply(self._rank)
                case "stop_profile":
                    return RankReply(self._rank, str(self._stop()))
                case "drop_profile":
                    self.drop()
                    return RankReply(self._rank)
        except (OSError, RuntimeError) as error:
            return RankReply(self._rank, error=str(error))

    def drop(self) -> None:
        """End the profile, if one runs, and forget it. A process that ends with its profiler running may crash."""
        if self._profile is not None:
            try:
                self._end()
            except RuntimeError as error:  # nobody waits for this
                logger.warning("rank %d could not end a profile: %s", self._rank, error)

    def _start(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # or the steps would run first and the trace be lost
        synchronize(self._device)  # whole steps only: none that was launched before may end later
        self._folder, self._num_steps = folder, 0
        profile = torch.profiler.profile(activities=platform_of(self._device).activities)
        profile.start()
        self._profile = profile

    def _stop(self) -> Path:
        """Write a Chrome trace, which appears under its name once it is whole."""
        file = self._folder / f"rank{self._rank}.json.gz"
        unfinished = self._folder / f".rank{self._rank}-{os.getpid()}.json.gz"
        profile = self._end()
        try:
            profile.export_chrome_trace(str(unfinished))
            unfinished.rename(file)
        finally:
            unfinished.unlink(missing_ok=True)
        return file

    def _end(self) -> torch.profiler.profile:
        if self._profile is None:
            raise RuntimeError("the profiler does not run")
        profile, self._profile = self._profile, None
        synchronize(self._device)
        profile.add_metadata_json(TRACE_NUM_STEPS, json.dumps(self._num_steps))
        profile.stop()
        return profile
