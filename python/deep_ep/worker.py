"""A thread that works off what it is given, in that order."""

import queue
import threading
from collections.abc import Callable


class Worker:
    """The thread begins with the first task, and ends with `close`, after the tasks that it has been given."""

    def __init__(self) -> None:
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def run(self, task: Callable[[], None]) -> None:
        """Adds a task, which raises nothing."""
        if self._thread is None:
            self._thread = threading.Thread(name="deep_ep", target=_work, args=(self._tasks,), daemon=True)
            self._thread.start()
        self._tasks.put(task)

    def join(self) -> None:
        """Waits until all tasks have ended, unless this is one of them. A signal ends the wait of the main thread."""
        if threading.current_thread() is not self._thread:
            self._tasks.join()

    def wait_for_tasks(self, seconds: float) -> None:
        """As join, or for so long."""
        with self._tasks.all_tasks_done:
            self._tasks.all_tasks_done.wait_for(lambda: not self._tasks.unfinished_tasks, seconds)

    def close(self) -> None:
        """The thread ends behind the tasks that it has."""
        if self._thread is not None:
            self._tasks.put(None)

    def wait_for_end(self, seconds: float) -> None:
        """Of the thread, after `close`, or for so long."""
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(seconds)


def _work(tasks: "queue.Queue[Callable[[], None] | None]") -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # and with it the tensors that it holds
        tasks.task_done()
    tasks.task_done()
