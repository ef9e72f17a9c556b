"""Who calls: a thread, or an asyncio task of it.  Generations of different callers are never taken for one another."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

Caller = Any
"""A thread or a task; may be referred to weakly, so that what it left goes with it."""


def caller() -> Caller:
    """The task that runs now, or the thread where none does."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.current_thread() if task is None else task
