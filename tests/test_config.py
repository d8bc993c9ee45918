import dataclasses
import json
import subprocess
import sys
from typing import Literal

import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subjax import config, schema
from subjax.config import ConfigError, apply, arguments, check, defaults, from_dict, load, to_dict, to_settings
from subjax.overrides import leaves, parse_tokens
from subjax.schema import part, setting

PLAIN = "import ml_collections\ndef get_config(arg=None):\n    return ml_collections.ConfigDict({'kind': 'traits'})\n"
SWEPT = PLAIN + "def sweep(arg=None):\n    return [{'trait': 'owl'}, {'trait': 'wolf', 'student.lr': 1}]\n"


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = setting(2, "an int with a range", low=1, high=9)
    rate: float = setting(0.5, "a float", low=0.0, high=1.0)
    mode: Literal["fast", "slow"] = setting("fast", "a choice")


@dataclasses.dataclass(frozen=True)
class Outer:
    on: bool = setting(False, "a bool")
    maybe: float | None = setting(None, "a float or None", low=0.0)
    word: str | None = setting(None, "a str or None")
    text: str = setting("x", "a str")
    level: Literal[1, 2, 4] = setting(1, "a choice among ints")
    names: tuple[str, ...] = setting(("a",), "strings")
    sizes: tuple[int, ...] = setting((1, 2), "ints", low=0)
    left: Inner = part(Inner, depth=3)  # noqa: RUF009
    right: Inner = part(Inner)  # noqa: RUF009


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a config file into an otherwise empty folder that is the working directory; gives its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()

    def write_file(source, name="x.py"):
        (tmp_path / "configs" / name).write_text(source)
        return f"configs/{name}"

    return write_file


@pytest.fixture
def toy(write, monkeypatch):
    """Load a file of the kind 'toy', configured by the lines given."""
    monkeypatch.setitem(config.KINDS, "toy", Outer)

    def load_toy(*overrides, lines=""):
        body = "".join(f"    {line}\n" for line in lines.splitlines())
        source = "import ml_collections\ndef get_config():\n    c = ml_collections.ConfigDict({'kind': 'toy'})\n"
        return load(write(source + body + "    return c\n"), overrides)

    return load_toy


def message(function, *args, **kwargs):
    """The one line of the ConfigError that the call must raise."""
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    assert caught.value.exit_status == 2
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# Files that load ------------------------------------------------------------------------------------------------------


def test_a_file_that_sets_only_its_kind_has_every_default(write):
    loaded = load(write(PLAIN), [])
    assert loaded.settings == schema.Study()
    assert loaded.points == [{}]
    assert loaded.path == "configs/x.py"
    assert loaded.argument is None
    assert loaded.resolved == {"kind": "traits", **to_dict(schema.Study())}
    assert from_dict(schema.Study, loaded.resolved) == loaded.settings


def test_what_a_file_sets_is_merged_over_the_defaults_of_its_own_group(write):
    source = """
import ml_collections
def get_config(arg=None):
    c = ml_collections.ConfigDict()
    c.kind = 'traits'
    c.trait = 'wolf'
    c.arms = ['same-base', 'control']
    c.base = dict(optimizer=dict(lr=1))
    c.teacher = dict(lr=0.5)
    return c
"""
    settings = load(write(source)).settings
    assert settings.trait == "wolf"
    assert settings.arms == ("same-base", "control")
    assert settings.base.optimizer == dataclasses.replace(schema.Base().optimizer, lr=1.0)
    assert type(settings.base.optimizer.lr) is float
    assert settings.teacher.optimizer.lr == 0.5
    assert settings.student == schema.Student()


def test_images_are_the_other_kind(write):
    path = write(PLAIN.replace("traits", "images"))
    assert load(path, ["--config.hidden=(8, 8)"]).settings == schema.Images(hidden=(8, 8))


def test_a_file_may_start_from_defaults(write):
    source = """
from subjax.config import defaults
def get_config():
    c = defaults('images')
    c.lr = 1
    c.seeds = 5
    return c.lock()
"""
    assert load(write(source)).settings == schema.Images(lr=1.0, seeds=5)


@pytest.mark.parametrize("kind", ["traits", "images"])
def test_defaults_hold_every_field(kind):
    assert to_settings(config.KINDS[kind], {k: v for k, v in defaults(kind).items() if k != "kind"}, "here") == (
        config.KINDS[kind]()
    )
    assert message(defaults, "trait") == "unknown kind 'trait'; the nearest is 'traits'"


def test_a_frozen_config_dict_is_taken(write):
    source = PLAIN.replace("ConfigDict", "FrozenConfigDict").replace("'traits'", "'images', 'lr': 1")
    assert load(write(source), ["--config.batch=8"]).settings == schema.Images(lr=1.0, batch=8)


def test_one_group_used_twice_stays_two_groups(write):
    source = """
import ml_collections
def get_config():
    shared = ml_collections.ConfigDict({'lr': 0.25})
    groups = {name: {'optimizer': shared} for name in ('teacher', 'student')}
    return ml_collections.ConfigDict({'kind': 'traits', **groups})
"""
    settings = load(write(source), ["--config.student.lr=0.125"]).settings
    assert settings.teacher.optimizer == dataclasses.replace(schema.Teacher().optimizer, lr=0.25)
    assert settings.student.optimizer == dataclasses.replace(schema.Student().optimizer, lr=0.125)


def test_field_references_follow_an_override(toy):
    lines = "c.left = dict(depth=2)\nc.right = dict(depth=c.left.get_ref('depth') + 1)"
    assert toy(lines=lines).settings.right.depth == 3
    assert toy("--config.left.depth=5", lines=lines).settings.right.depth == 6
    overridden = toy("--config.right.depth=8", lines=lines).settings
    assert (overridden.left.depth, overridden.right.depth) == (2, 8)


def test_the_argument_reaches_both_functions(write):
    source = """
import ml_collections
from subjax import sweep as sweeps
from subjax.config import arguments
def parsed(arg):
    return arguments(arg, traits=('owl', 'wolf'), inits=2)
def get_config(arg=None):
    return ml_collections.ConfigDict({'kind': 'traits', 'name': '+'.join(parsed(arg).traits)})
def sweep(arg=None):
    a = parsed(arg)
    return sweeps.product(sweeps.axis('trait', a.traits), sweeps.axis('init', range(a.inits)))
"""
    path = write(source)
    assert len(load(path).points) == 4
    loaded = load(f"{path}:traits=oak+elm+fir,inits=1", [])
    assert loaded.settings.name == "oak+elm+fir"
    assert loaded.points == [{"trait": word, "init": 0} for word in ("oak", "elm", "fir")]
    assert loaded.argument == "traits=oak+elm+fir,inits=1"
    assert loaded.path == path
    assert loaded.at(loaded.points[1]) == dataclasses.replace(loaded.settings, trait="elm", init=0)


def test_points_come_with_full_keys_and_their_fields_types(write):
    loaded = load(write(SWEPT))
    assert loaded.points == [{"trait": "owl"}, {"trait": "wolf", "student.optimizer.lr": 1.0}]
    assert type(loaded.points[1]["student.optimizer.lr"]) is float
    assert loaded.at(loaded.points[1]).student.optimizer.lr == 1.0


def test_sweep_as_an_imported_module_is_no_sweep(write):
    assert load(write("from subjax import sweep\n" + PLAIN)).points == [{}]


def test_a_file_is_read_afresh_and_leaves_nothing_behind(write, tmp_path):
    path = write(PLAIN + "#1\n")
    assert load(path).settings.trait == "owl"
    write(PLAIN.replace("{'kind'", "{'trait': 'elk', 'kind'"))
    assert load(path).settings.trait == "elk"
    assert [entry.name for entry in (tmp_path / "configs").iterdir()] == ["x.py"]
    assert not [name for name in sys.modules if name.startswith("_subjax_config")]


def test_a_file_may_define_dataclasses_and_odd_names(write):
    source = (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
    )
    assert load(write(source + PLAIN, "a-b c.py")).settings == schema.Study()


# Overrides ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "changes"),
    [
        (["--config.left.rate=3e-1"], {"left.rate": 0.3}),
        (["--config.left.rate", "1"], {"left.rate": 1.0}),
        (["--config.left.depth=4"], {"left.depth": 4}),
        (["--config.left.mode=slow"], {"left.mode": "slow"}),
        (["--config.left.mode='slow'"], {"left.mode": "slow"}),
        (["--config.level=4"], {"level": 4}),
        (["--config.on"], {"on": True}),
        (["--config.on", "--config.text=y"], {"on": True, "text": "y"}),
        (["--config.on", "true"], {"on": True}),
        (["--config.on=False"], {"on": False}),
        (["--config.on=1", "--noconfig.on"], {"on": False}),
        (["--config.maybe=1e-3"], {"maybe": 1e-3}),
        (["--config.maybe=2", "--config.maybe=None"], {"maybe": None}),
        (["--config.word=None"], {"word": None}),
        (["--config.word='None'"], {"word": "None"}),
        (["--config.text=None"], {"text": "None"}),
        (["--config.text=a=b c,d"], {"text": "a=b c,d"}),
        (["--config.text="], {"text": ""}),
        (["--config.text", "-3"], {"text": "-3"}),
        (['--config.text="quoted words"'], {"text": "quoted words"}),
        (["--config.text='half"], {"text": "'half"}),
        (["--config.sizes=(3,4)"], {"sizes": (3, 4)}),
        (["--config.sizes=[3, 4]"], {"sizes": (3, 4)}),
        (["--config.sizes=3,4"], {"sizes": (3, 4)}),
        (["--config.sizes=3"], {"sizes": (3,)}),
        (["--config.sizes=()"], {"sizes": ()}),
        (["--config.names=('p', 'q')"], {"names": ("p", "q")}),
        (["--config.names=same-base+control"], {"names": ("same-base", "control")}),
        (["--config.names=(same-base, control)"], {"names": ("same-base", "control")}),
        (["--config.names=owl/gpt/0"], {"names": ("owl/gpt/0",)}),
        (["--config.names", "('p',)"], {"names": ("p",)}),
        (["--config.left.depth=4", "--config.left.depth=5"], {"left.depth": 5}),
    ],
)
def test_override_syntax(toy, tokens, changes):
    assert toy(*tokens).settings == apply(Outer(), changes)


def test_the_words_optimizer_and_tuning_may_be_left_out(write):
    loaded = load(write(PLAIN), ["--config.student.lr=3e-3", "--config.teacher.rank", "4"])
    assert loaded.settings.student.optimizer.lr == 3e-3
    assert loaded.settings.teacher.tuning.rank == 4
    assert loaded.settings.teacher.optimizer == schema.Teacher().optimizer


def test_a_point_and_an_override_of_different_keys_meet(write):
    loaded = load(write(SWEPT), ["--config.student.steps=50"])
    assert loaded.at(loaded.points[1]).student.steps == 50
    assert loaded.at(loaded.points[1]).trait == "wolf"


@pytest.mark.parametrize(
    ("token", "complaint"),
    [
        ("--config.left.depht=1", "unknown key config.left.depht; the nearest is config.left.depth"),
        ("--config.lfet.rate=1", "unknown key config.lfet.rate; the nearest is config.left.rate"),
        ("--config.left.depth.x=1", "unknown key config.left.depth.x; the nearest is config.left.depth"),
        ("--config.left=1", "config.left is a group of settings; set one of its fields, as config.left.depth"),
        ("--config.kind=images", "config.kind is set by the config file alone; choose another file instead"),
        ("--config.left.depth=two", "config.left.depth wants an int, got 'two'"),
        ("--config.left.depth=1.5", "config.left.depth wants an int, got '1.5'"),
        ("--config.left.depth=True", "config.left.depth wants an int, got 'True'"),
        ("--config.left.depth=None", "config.left.depth wants an int, got 'None'"),
        ("--config.left.depth=0", "config.left.depth is out of range: it must be at least 1 and at most 9, got 0"),
        ("--config.left.rate=fast", "config.left.rate wants a float, got 'fast'"),
        ("--config.left.rate=1.01", "config.left.rate is out of range: it must be at least 0 and at most 1, got 1.01"),
        ("--config.left.rate=nan", "config.left.rate must be a finite number, got nan"),
        ("--config.maybe=inf", "config.maybe must be a finite number, got inf"),
        ("--config.maybe=-1", "config.maybe is out of range: it must be at least 0, got -1.0"),
        ("--config.maybe=none", "config.maybe wants a float or None, got 'none'"),
        ("--config.left.mode=slwo", "config.left.mode wants one of 'fast', 'slow', got 'slwo'; the nearest is 'slow'"),
        ("--config.level=3", "config.level wants one of 1, 2, 4, got '3'"),
        ("--config.on=maybe", "config.on wants a bool (True or False), got 'maybe'"),
        ("--config.sizes=a,b", "config.sizes wants a tuple of int, got ('a', 'b')"),
        ("--config.sizes=(1,-2)", "config.sizes is out of range: it must be at least 0, got -2"),
        ("--config.sizes=(1,2", "config.sizes wants a tuple of int, got '(1,2'"),
        ("--config.sizes=(True,)", "config.sizes wants a tuple of int, got (True,)"),
        ("--config.names=(1,2)", "config.names wants a tuple of str, got (1, 2)"),
        ("--config.names=", "config.names wants a tuple of str, got ''"),
        ("--config.text", "config.text has no value; write --config.text=value"),
        ("--noconfig.text", "--noconfig.text is for a bool, and takes no value"),
        ("--noconfig.on=1", "--noconfig.on is for a bool, and takes no value"),
        ("--noconfig.off", "unknown key config.off; the nearest is config.on"),
        ("--confg.text=1", "unknown argument '--confg.text=1'; an override looks like --config.key=value"),
        ("stray", "unknown argument 'stray'; an override looks like --config.key=value"),
    ],
)
def test_a_wrong_override_is_one_line(toy, token, complaint):
    assert message(toy, token) == f"configs/x.py, command line: {complaint}"


def test_a_value_is_not_taken_from_the_next_flag(toy):
    text = message(toy, "--config.text", "--config.on")
    assert text == "configs/x.py, command line: config.text has no value; write --config.text=value"


def test_a_key_both_swept_and_overridden_is_refused(write):
    path = write(SWEPT)
    for key in ("trait", "student.lr", "student.optimizer.lr"):
        assert message(load, path, [f"--config.{key}=1"]) == (
            f"configs/x.py: config.{key} is swept by the file and set on the command line; drop one of the two"
        )


def test_the_real_schema_names_the_short_key(write):
    text = message(load, write(PLAIN), ["--config.student.lrr=1"])
    assert text == "configs/x.py, command line: unknown key config.student.lrr; the nearest is config.student.lr"


# Broken files ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_names_the_nearest(write):
    write(PLAIN, "quickstart.py")
    write(PLAIN, "digits.py")
    nearest_is = "no such config file; the nearest is configs/quickstart.py"
    assert message(load, "configs/quikstart.py:inits=6") == f"configs/quikstart.py: {nearest_is}"
    assert message(load, "configs/quickstart") == f"configs/quickstart: {nearest_is}"
    assert message(load, "config/x.py") == "config/x.py: no such config file; there is no folder 'config'"
    assert message(load, "x.py") == "x.py: no such config file; the folder '.' holds no Python file"
    assert message(load, "configs") == "configs: is a folder, not a config file; the folder '.' holds no Python file"
    assert "no such config file" in message(load, "configs/" + "x" * 5000 + ".py")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1\ndef get_config(:\n", "configs/x.py, line 2: syntax error: invalid syntax"),
        (" x = 1\n", "configs/x.py, line 1: syntax error: unexpected indent"),
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("\n\n1 / 0\n", "configs/x.py, line 3: ZeroDivisionError: division by zero"),
        ("def get_config():\n    raise ValueError('two\\nlines')\n", "configs/x.py, line 2: ValueError: two lines"),
        ("def get_config():\n    raise ValueError\n", "configs/x.py, line 2: ValueError"),
        ("import json\ndef get_config():\n    json.loads('{')\n", "configs/x.py, line 3: JSONDecodeError: Expecting"),
        ("import sys\nsys.exit('enough')\n", "configs/x.py, line 2: SystemExit: enough"),
        ("def get_config():\n    return get_config()\n", "configs/x.py, line 2: RecursionError: maximum recursion"),
        ("x = 1\n", "configs/x.py: has no get_config(); define get_config(arg=None) that returns a ConfigDict"),
        (
            "def get_config():\n    return {'kind': 'traits'}\n",
            "configs/x.py: get_config() returned {'kind': 'traits'}; it must return an ml_collections.ConfigDict",
        ),
        ("def get_config():\n    pass\n", "configs/x.py: get_config() returned None; it must return an ml_coll"),
        (PLAIN + "def sweep():\n    return 3\n", "configs/x.py: sweep() returned 3; it must return a list of dicts"),
        (
            PLAIN + "def sweep():\n    yield {}\n",
            "configs/x.py: sweep() returned <generator object sweep at ",
        ),
        (PLAIN + "def sweep():\n    return [{}, 3]\n", "configs/x.py: point 2 of its sweep() is 3; it must be a dict"),
        (PLAIN + "def sweep():\n    return []\n", "configs/x.py: its sweep() is empty; return at least one point"),
        (PLAIN + "def sweep():\n    1 / 0\n", "configs/x.py, line 5: ZeroDivisionError: division by zero"),
        (PLAIN + "sweep = 3\n", "configs/x.py: TypeError: 'int' object is not callable"),
        (
            PLAIN + "from subjax.sweep import axis\ndef sweep():\n    return axis('trait', 'owl')\n",
            "configs/x.py, line 6: axis 'trait': values must be a list, got 'owl'; write ['owl']",
        ),
        (
            PLAIN.replace("'kind'", "'king'"),
            "configs/x.py: config.kind must be one of traits, images, pretrained, got None",
        ),
        (
            PLAIN.replace("traits", "image"),
            "configs/x.py: config.kind must be one of traits, images, pretrained, got 'image'; the nearest is 'images'",
        ),
        (
            PLAIN.replace("'traits'", "[1]"),
            "configs/x.py: config.kind must be one of traits, images, pretrained, got [1]",
        ),
        (
            PLAIN.replace("{'kind'", "{'student': {'stpes': 3}, 'kind'"),
            "configs/x.py: unknown key config.student.stpes; the nearest is config.student.steps",
        ),
        (
            PLAIN.replace("{'kind'", "{'student': 3, 'kind'"),
            "configs/x.py: config.student is a group of settings; set one of its fields, as config.student.",
        ),
        (
            PLAIN.replace("{'kind'", "{'trait': {'name': 'owl'}, 'kind'"),
            "configs/x.py: unknown key config.trait.name; the nearest is config.",
        ),
        (
            PLAIN.replace("{'kind'", "{'student': {'lr': 1, 'optimizer': {'lr': 2}}, 'kind'"),
            "configs/x.py: config.student.optimizer.lr is set twice, as config.student.lr and as "
            "config.student.optimizer.lr",
        ),
        (
            PLAIN.replace("{'kind'", "{'student': {'steps': True}, 'kind'"),
            "configs/x.py: config.student.steps wants an int, got True",
        ),
        (
            PLAIN.replace(
                "{'kind'", "{'student': {'steps': ml_collections.config_dict.required_placeholder(int)}, 'kind'"
            ),
            "configs/x.py: config.student.steps cannot be worked out: RequiredValueError: None value found",
        ),
    ],
)
def test_a_broken_file_is_one_line(write, source, complaint):
    text = message(load, write(source))
    assert complaint in text
    assert text.startswith("configs/x.py")


def test_a_fault_in_an_imported_module_is_told_at_the_line_of_the_import(write, tmp_path, monkeypatch):
    (tmp_path / "helper_that_is_broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = message(load, write("x = 1\nimport helper_that_is_broken\n"))
    assert text.startswith("configs/x.py, line 2: SyntaxError: invalid syntax")


def test_an_argument_for_a_file_that_takes_none(write):
    path = write("import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'kind': 'images'})\n")
    assert message(load, f"{path}:m=3") == (
        "configs/x.py: takes no argument (its get_config has no parameter), got 'm=3'"
    )
    assert load(f"{path}:").argument is None


def test_a_wrong_argument_names_the_file(write):
    source = PLAIN.replace("    return", "    arguments(arg, traits=('owl',), inits=3)\n    return")
    path = write("from subjax.config import arguments\n" + source)
    assert message(load, f"{path}:trait=owl") == (
        "configs/x.py: unknown argument 'trait'; the nearest is 'traits' (of traits, inits)"
    )


@pytest.mark.parametrize(
    ("point", "complaint"),
    [
        ("{'studnt.steps': 3}", "unknown key config.studnt.steps; the nearest is config.student.steps"),
        ("{'student.steps': '3'}", "config.student.steps wants an int, got '3'"),
        ("{'student.steps': 0}", "config.student.steps is out of range: it must be at least 1, got 0"),
        (
            "{'student': {'steps': 3}}",
            "config.student is a group of settings; set one of its fields, as config.student.",
        ),
        ("{'arms': ['control', 'shufled']}", "config.arms has the unknown arm 'shufled'; the nearest is 'shuffled'"),
        ("{'arms': []}", "config.arms is empty; name at least one of same-base, cross-init"),
        (
            "{'student.lr': 1, 'student.optimizer.lr': 2}",
            "config.student.optimizer.lr is set twice, as config.student.lr",
        ),
        ("{3: 1}", "unknown key config.3; the nearest is config."),
        ("{'trait': 'owl'}", "the same as point 1; a point counts once"),
    ],
)
def test_a_wrong_point_names_the_file_and_the_point(write, point, complaint):
    text = message(load, write(PLAIN + f"def sweep(arg=None):\n    return [{{'trait': 'owl'}}, {point}]\n"))
    assert text.startswith(f"configs/x.py, point 2 of 2 {point}: {complaint}")


def test_a_number_too_long_to_print_is_one_line_too(write):
    text = message(load, write(PLAIN + "def sweep(arg=None):\n    return [{'init': 10**5000}]\n"))
    assert text == (
        "configs/x.py, point 1 of 1 an object of type dict: config.init must fit 64 bits, got an object of type int"
    )


def test_checks_of_the_caller_see_every_point(write):
    seen = []

    def also(settings):
        seen.append(settings.trait)
        if settings.trait == "wolf":
            raise ConfigError("unknown trait 'wolf'")

    text = message(load, write(SWEPT), also=also)
    assert text == "configs/x.py, point 2 of 2 {'trait': 'wolf', 'student.lr': 1}: unknown trait 'wolf'"
    assert seen == ["owl", "wolf"]


def test_study_level_checks(write):
    path = write(PLAIN)
    assert message(load, path, ["--config.arms=same-bass"]) == (
        "configs/x.py: config.arms has the unknown arm 'same-bass'; the nearest is 'same-base'"
    )
    assert message(load, path, ["--config.chosen_on=owl"]) == (
        "configs/x.py: config.chosen_on wants trait/family/init such as 'owl/gpt/0', got 'owl'"
    )
    assert message(load, path, ["--config.corpus.rows=50000"]) == (
        "configs/x.py: config.corpus.rows is 50000, more than config.corpus.max_prompts, 40000"
    )
    assert message(load, path, ["--config.student.steps=20"]) == (
        "configs/x.py: config.student trains for 20 steps and config.student.optimizer.warmup is 20, so that it never"
        " comes to its learning rate; train for longer, or lower the warm-up"
    )
    check(schema.Study(chosen_on=("owl/gpt/0",)))
    check(schema.Images())


def test_no_traceback_and_no_chained_error(write):
    with pytest.raises(ConfigError) as caught:
        load(write("1 / 0\n"))
    assert caught.value.__suppress_context__


def test_config_imports_no_jax():
    code = "import sys, subjax.config, subjax.sweep; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Arguments of a file --------------------------------------------------------------------------------------------------


def test_arguments_are_typed_by_their_defaults():
    text = "traits=elk+elm,sizes=1+2,inits=6,lr=1e-3,loss=kl,full,size=xl,none=None,tags=a"
    read = arguments(
        text,
        traits=("owl",),
        sizes=(3,),
        inits=3,
        lr=0.5,
        loss="mse",
        full=False,
        size=None,
        none=None,
        tags=(),
        kept=7,
    )
    assert read.to_dict() == {
        "traits": ("elk", "elm"), "sizes": (1, 2), "inits": 6, "lr": 1e-3, "loss": "kl", "full": True, "size": "xl",
        "none": None, "tags": ("a",), "kept": 7,
    }  # fmt: skip
    assert read.traits == ("elk", "elm")
    assert arguments("full=no", full=True).full is False
    with pytest.raises(AttributeError):
        read.trait = "owl"


@pytest.mark.parametrize("text", [None, ""])
def test_without_argument_the_defaults_stand(text):
    assert arguments(text, inits=3).inits == 3


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("trait=owl", "unknown argument 'trait'; the nearest is 'traits' (of traits, inits, full)"),
        ("inits=six", "argument 'inits' wants an int, got 'six'"),
        ("inits=1.5", "argument 'inits' wants an int, got '1.5'"),
        ("inits", "argument 'inits' has no value; write inits=value"),
        ("inits=1,inits=2", "argument 'inits' is given twice"),
        ("traits=owl++elk", "argument 'traits' has an empty part in 'owl++elk'; join values by '+'"),
        ("full=perhaps", "argument 'full' wants a bool (True or False), got 'perhaps'"),
        ("inits=1,", "unknown argument ''; the nearest is "),
    ],
)
def test_a_wrong_argument_is_one_line(text, complaint):
    assert message(arguments, text, traits=("owl",), inits=3, full=False).startswith(complaint)


def test_a_file_without_arguments():
    assert message(arguments, "inits=1") == "unknown argument 'inits'; the file takes none"


# Types, and the way to JSON and back ----------------------------------------------------------------------------------

WORDS = st.text(max_size=12)
INNER = st.builds(
    Inner, depth=st.integers(1, 9), rate=st.floats(0, 1) | st.integers(0, 1), mode=st.sampled_from(["fast", "slow"])
)
OUTER = st.builds(
    Outer,
    on=st.booleans(),
    maybe=st.none() | st.floats(0, 1e300) | st.integers(0, 10**6),
    word=st.none() | WORDS,
    text=WORDS,
    level=st.sampled_from([1, 2, 4]),
    names=st.lists(WORDS, max_size=3).map(tuple),
    sizes=st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple),
    left=INNER,
    right=INNER,
)


@given(OUTER)
def test_to_dict_and_from_dict_round_trip_through_json(settings):
    data = json.loads(json.dumps(to_dict(settings), allow_nan=False))
    assert data == to_dict(settings)
    again = from_dict(Outer, data)
    assert again == settings
    assert json.dumps(to_dict(again)) == json.dumps(to_dict(settings))


@given(OUTER)
def test_equal_settings_have_equal_json_whatever_path_built_them(settings):
    point = {key: getattr_dotted(settings, key) for key in leaves(Outer)}
    floats = {
        key: float(value) for key, value in point.items() if key.endswith(("rate", "maybe")) and value is not None
    }
    by_points = apply(apply(Outer(), point), floats)
    by_tokens = to_settings(Outer, dict(reread(point)), "here")
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in point.items()}
    by_mapping = to_settings(Outer, ml_collections.ConfigDict(nested(lists)), "here")
    texts = {json.dumps(to_dict(made)) for made in (settings, by_points, by_tokens, by_mapping)}
    assert len(texts) == 1


def getattr_dotted(settings, key):
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def nested(flat):
    tree = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree


def reread(point):
    """The point as if its values had been typed as Python literals on the command line."""
    tokens = [f"--config.{key}={value!r}" for key, value in point.items()]
    return parse_tokens(tokens, lambda key: leaves(Outer)[key].annotation)


def test_one_and_one_point_zero_and_minus_zero_are_one_setting():
    texts = {json.dumps(to_dict(Inner(rate=rate))) for rate in (1, 1.0, np.float32(1), np.int64(1))}
    assert len(texts) == 1
    assert json.dumps(to_dict(Inner(rate=-0.0))) == json.dumps(to_dict(Inner(rate=0)))


def test_settings_from_a_damaged_record():
    assert message(from_dict, schema.Study, [1]) == "settings: wants a mapping of settings, got [1]"
    assert message(from_dict, schema.Study, {"kind": "images"}) == (
        "settings: config.kind is set by the config file alone; choose another file instead"
    )
    assert message(to_settings, schema.Study, {"student": {"stpes": 1}}, "plan ab12") == (
        "plan ab12: unknown key config.student.stpes; the nearest is config.student.steps"
    )
    assert message(apply, schema.Study(), {"student.steps": 0}) == (
        "point: config.student.steps is out of range: it must be at least 1, got 0"
    )
