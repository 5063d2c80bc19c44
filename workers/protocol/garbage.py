"""Freezes startup objects out of the garbage collector (`gc.freeze`)."""

import gc


def freeze_startup() -> None:
    """Let the collector look at none of the objects that there are now, which live as long as the process.

    Modules, classes and tables are some hundred thousand objects. Without this every full collection goes through all
    of them, and a server that makes small objects for every token spends half of its time on that.
    """
    gc.collect()
    gc.freeze()
