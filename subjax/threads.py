"""Works under way at once in threads of this process: where one fills a single core, another fills the rest."""

from collections.abc import Callable, Sequence
from concurrent import futures
from typing import TypeVar

from jax.sharding import Mesh

from subjax.cpu import visible_cores
from subjax.parallel.mesh import lone_cpu

T = TypeVar("T")


def most_at_once(mesh: Mesh) -> int:
    """How many works a mesh gains by: as many as there are cores where it is one CPU device; elsewhere one."""
    return visible_cores() if lone_cpu(mesh) else 1


def side_by_side(works: Sequence[Callable[[], T]], at_once: int, over: Callable[[], None]) -> list[T]:
    """What the works give, `at_once` of them under way at a time. The first failure stops all, and is raised.

    Threads have none of JAX's settings that were made in a `with` of the caller's.

    Args:
        over: called when all are done, or one has failed or Ctrl-C was pressed: it tells the others that they need not
            go on, and they are waited for.
    """
    with futures.ThreadPoolExecutor(at_once, "side by side") as pool:
        found = [pool.submit(work) for work in works]
        try:
            for done in futures.as_completed(found):
                done.result()
        finally:
            over()
            pool.shutdown(wait=False, cancel_futures=True)
    return [done.result() for done in found]
