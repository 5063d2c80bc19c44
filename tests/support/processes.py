"""Processes that tests start, by their command lines."""

import psutil


def command_line(process: psutil.Process) -> str:
    """Empty for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def children_named(*names: str) -> list[psutil.Process]:
    """Processes below this one with any of `names` in their command lines."""
    everyone = psutil.Process().children(recursive=True)
    return [process for process in everyone if any(name in command_line(process) for name in names)]
