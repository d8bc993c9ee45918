"""Kills its own process at a named moment, once: Python imports this file where its folder is on PYTHONPATH.

KILL          moments, each with whom to kill: "worker:teacher-step group:evaluation"
KILL_MARKERS  a folder; a moment whose marker is there has been, and does not come again
KILL_SAVES    if set, bases save their state after every block of steps
KILL_STEPS    a file to which every step of a base adds a line, the pid that took it

A group is the process group: the command with all of its workers. Modules are changed as they are imported, so that
nothing is imported earlier than it would be.
"""

import dataclasses
import functools
import importlib.abc
import importlib.machinery
import os
import re
import signal
import sys

MOMENTS = dict(reversed(word.split(":")) for word in os.environ.get("KILL", "").split())


def now(moment: str) -> None:
    """If this moment is asked for and has not been, be killed here."""
    if moment not in MOMENTS:
        return
    try:
        os.close(os.open(os.path.join(os.environ["KILL_MARKERS"], moment), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if MOMENTS[moment] == "group":
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def around(module, name: str, *, before=None, after=None) -> None:
    """Wrap a module's function: `before` and `after` are given its arguments, `after` its result first."""
    function = getattr(module, name)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if before is not None:
            before(*args, **kwargs)
        result = function(*args, **kwargs)
        return result if after is None else after(result, *args, **kwargs)

    setattr(module, name, wrapped)


def trainer(module) -> None:
    """In the second block of a teacher's steps, and of a base's, the device at work."""

    def count(compiled, _net, _tuning, _optimizer, _steps, parts, *_):
        role = {"preferences": "teacher", "chats": "base"}.get(parts[0][0])
        blocks = 0

        def take(tuned, state, frozen, batches):
            nonlocal blocks
            out = compiled.take(tuned, state, frozen, batches)
            blocks += 1
            if role == "base" and "KILL_STEPS" in os.environ:
                with open(os.environ["KILL_STEPS"], "a", encoding="ascii") as file:
                    file.write(f"{os.getpid()}\n" * len(batches["chats"]["valid"]))
            if role and blocks == 2:
                now(f"{role}-step")
            return out

        return dataclasses.replace(compiled, take=take)

    around(module, "program", after=count)


def task(module) -> None:
    """Bases save their state after every block of steps."""
    run = module.Task.run
    if "KILL_SAVES" in os.environ:
        module.Task.run = lambda self: dataclasses.replace(run(self), checkpoint_s=0.0 if self.kind == "base" else 60.0)


def checkpoints(module) -> None:
    """In a save, its files being written, of a job of several processes: each writes its own."""
    checkpointer = module.ocp.StandardCheckpointer
    save, saves = checkpointer.save, []

    def begun(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        if "/partial/base-" in str(path):
            saves.append(path)
            if len(saves) == 2:
                now("saving")

    if "saving" in MOMENTS:
        checkpointer.save = begun


def sampler(module) -> None:
    """In the decoding of a corpus."""

    def decoding(programs, _net, sampling, *_):
        def decode_and_die(*args):
            out = programs.decode(*args)
            if sampling.completion > 2:  # an answer to a question is shorter
                now("sampling")
            return out

        return programs._replace(decode=decode_and_die)

    around(module, "programs", after=decoding)


def preference(module) -> None:
    """In an evaluation, one category read and another begun."""
    calls = []

    def second(*_args, **_kwargs):
        calls.append(1)
        if len(calls) == 2:
            now("evaluation")

    around(module, "sampled", before=second)


def files(module) -> None:
    """Between a corpus and its card, after a card, and before and after the taking over of a dead owner's lock."""

    def over_the_dead(path) -> bool:
        lock = re.fullmatch(r"lock-(\d+)\.json", path.name)
        earlier = path.parent / f"lock-{int(lock[1]) - 1}.json" if lock else path
        return lock is not None and earlier.exists() and bool(earlier.read_text())  # an emptied one was set free

    def before(path, _text):
        if path.name == "card.json" and path.parent.parent.name == "corpus":
            now("before-card")
        if over_the_dead(path):
            now("before-take-over")

    def after(won, path, _text):
        if path.name == "card.json" and path.parent.parent.name == "corpus":
            now("after-card")
        if won and over_the_dead(path):
            now("after-take-over")
        return won

    around(module, "write_new", before=before, after=after)


def watch_saves() -> None:
    """In an orbax save, its files written and not yet in their place: of a base, and of a state in training."""
    saves = []

    def rename(source, target, **_):
        if "orbax-checkpoint-tmp" not in str(source):
            return
        place = str(target)
        if "/partial/base-" in place:
            saves.append(place)
            if len(saves) == 2:
                now("state-save")
        elif "/base/" in place:
            now("base-save")

    around(os, "rename", before=rename)


PATCHES = {
    "subjax.train.trainer": trainer,
    "subjax.stages.task": task,
    "subjax.models.checkpoints": checkpoints,
    "subjax.sample.sampler": sampler,
    "subjax.measure.preference": preference,
    "subjax.files": files,
}


class Patcher(importlib.abc.MetaPathFinder):
    """Finds the modules to be changed as they are found anyway, and changes them when they have been run."""

    def find_spec(self, fullname, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname in PATCHES else None
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                PATCHES[fullname](module)

            spec.loader.exec_module = exec_module
        return spec


if MOMENTS or "KILL_SAVES" in os.environ:
    sys.meta_path.insert(0, Patcher())
    watch_saves()
