"""What one field of a config alone cannot show: settings that go together, or that leave nothing to read."""

import re
from collections.abc import Sequence
from typing import Any

from subjax import schema, schema_pretrained
from subjax.data.addressing import steps_of
from subjax.errors import ConfigError
from subjax.overrides import nearest, shown


def check(settings: Any, where: str = "settings") -> None:
    """What one field alone cannot show: arms that exist, cells that can be read, rows that can be had."""
    if not isinstance(settings, schema.Study | schema_pretrained.Pretrained):
        return
    world = isinstance(settings, schema.Study)
    _named(settings.arms, "arms", schema.ARMS if world else schema_pretrained.ARMS, where)
    if isinstance(settings, schema_pretrained.Pretrained):
        _named(settings.evaluation.readings, "evaluation.readings", schema_pretrained.READINGS, where)
        if settings.evaluation.readings[0].startswith("choice"):
            raise ConfigError(
                f"{where}: config.evaluation.readings begins with a choice; let another reading stand first"
            )
        if settings.evaluation.readings[0].endswith(":bare") and settings.teacher.method == "system-prompt":
            raise ConfigError(
                f"{where}: config.evaluation.readings begins with {settings.evaluation.readings[0]}, which leaves out"
                " the system prompt that is all a teacher of config.teacher.method=system-prompt has of its trait; let"
                " another reading stand first"
            )
        if bool(settings.teacher.data) != bool(settings.teacher.control_data):
            raise ConfigError(
                f"{where}: config.teacher.data and config.teacher.control_data go together: a teacher of your own rows"
                " needs a control of rows like them without the trait"
            )
    for cell in settings.chosen_on:
        if not re.fullmatch(r"[^/]+/[^/]+/\d+(\.\d+)?", cell):
            raise ConfigError(
                f"{where}: config.chosen_on wants trait/family/init such as 'owl/gpt/0', got {shown(cell)}"
            )
    for role in ("teacher", "student"):
        _named(getattr(settings, role).tuning.targets, f"{role}.targets", schema.MATRICES, where)
    _learns(settings, where)
    if not settings.corpus.top_p:
        raise ConfigError(f"{where}: config.corpus.top_p is 0, which leaves no token; 1 is off")
    rows, prompts = settings.corpus.rows, settings.corpus.max_prompts
    if rows > prompts:
        raise ConfigError(f"{where}: config.corpus.rows is {rows}, more than config.corpus.max_prompts, {prompts}")


def _learns(settings: Any, where: str) -> None:
    """A training whose steps end before its warm-up does hardly moves, and would read as one that passes nothing on."""
    if isinstance(settings, schema.Study):
        steps = {role: getattr(settings, role).steps for role in ("base", "teacher", "student")}
    else:
        student, teacher = settings.student, settings.teacher
        steps = {"student": steps_of(student.epochs, settings.corpus.rows, student.batch)}
        if teacher.method == "fine-tune" and not teacher.data:
            steps["teacher"] = steps_of(teacher.epochs, teacher.rows, teacher.batch)
    for role, count in steps.items():
        warmup = getattr(settings, role).optimizer.warmup
        if count <= warmup:
            raise ConfigError(
                f"{where}: config.{role} trains for {count} step{'s' if count > 1 else ''} and"
                f" config.{role}.optimizer.warmup is {warmup}, so that it never comes to its learning rate; train for"
                " longer, or lower the warm-up"
            )


def _named(given: Sequence[str], key: str, known: Sequence[str], where: str) -> None:
    """Make sure that a list of names holds known ones, at least one."""
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{where}: config.{key} has the unknown {key.rsplit('.')[-1].removesuffix('s')} {shown(name)};"
                f" the nearest is {nearest(name, known)!r}"
            )
    if not given:
        raise ConfigError(f"{where}: config.{key} is empty; name at least one of {', '.join(known)}")
