"""The commands about models: compare a checkpoint with transformers, list what can be read, give a student back.

With `subjax.cli` the only place that prints for a person. Imports stand inside the commands, as there.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from subjax.cli_arguments import Arguments
from subjax.errors import SubjaxError

if TYPE_CHECKING:
    from subjax.graph import Plan
    from subjax.models.catalogue import Checkpoint
    from subjax.store import Store


def command_check(arguments: Arguments) -> int:
    """Compare a checkpoint here and in transformers; SubjaxError, with all that is out of bounds, where they differ."""
    from subjax import check
    from subjax.measure.compare import Bounds

    model = arguments.operands[0]
    bounds = Bounds() if arguments.bound is None else Bounds(mean_kl=arguments.bound)
    texts = {"texts": check.read_prompts(arguments.prompts)} if arguments.prompts else {}

    def tell(doing: str) -> None:
        if not arguments.quiet:
            print(f"subjax: {doing}", file=sys.stderr, flush=True)

    checked = check.check(model, tokens=arguments.tokens, tell=tell, **texts)
    print(check.describe(checked, bounds))
    if found := checked.failures(bounds):
        raise SubjaxError(f"check: {model} is not here what it is in transformers: {'; '.join(found)}")
    return 0


def command_families(arguments: Arguments) -> int:
    """List the families with the sizes known by name, and those that are trained here."""
    from subjax.models import catalogue, families
    from subjax.models.hf_config import FAMILIES

    print("Any checkpoint of these families is read, by its folder, its .gguf file or its hub id.")
    for kind, family in FAMILIES.items():
        print(f"\n{family.title} (model_type {kind})")
        print("\n".join(_table([found for found in catalogue.CHECKPOINTS if found.family == kind])))
    print("\ninside Python packages, without a hub")
    for source, what in catalogue.PACKAGES.items():
        print(f"  {source:<34}{what}")
    print("\ntrained here from nothing (config.kind 'traits')")
    print(f"  {', '.join(families.FAMILIES)}, in sizes {', '.join(families.SIZES)}")
    return 0


def _table(checkpoints: Iterable["Checkpoint"]) -> list[str]:
    """A line a size: name, parameters, hub ids, and what to know of them."""
    lines = []
    for found in checkpoints:
        notes = []
        if found.inits:
            notes.append(f"{{init}}: 1 to {found.inits}")
        if found.chat is None:
            notes.append("no chat template")
        if found.gated is not False:
            notes.append("gated" if found.gated else "has been gated")
        ids = ", ".join(id for id in (found.base, found.chat) if id)
        lines.append(f"  {found.name:<20}{found.parameters:>6}  {ids}" + (f"  ({', '.join(notes)})" if notes else ""))
    return lines


def command_export(arguments: Arguments, store: "Store", plans: Iterable["Plan"]) -> int:
    """Write a node's model as a folder for other tools, and print what was written."""
    from subjax.export import export

    kind, node = store.find(arguments.operands[0])
    form, dtype = arguments.form, arguments.dtype
    print(export(store, kind, node, arguments.to, form=form, dtype=dtype, hints=_hints(plans)))
    return 0


def _hints(plans: Iterable["Plan"]) -> Mapping[str, Any]:
    """Where the plans of a workdir say that checkpoints lie, by base; of two places the newer plan's."""
    sources: dict[str, str] = {}
    for plan in plans:
        for node in plan.nodes.values():
            sources |= node.hints.get("sources", {})
    return {"sources": sources}
