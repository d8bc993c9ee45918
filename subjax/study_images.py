"""The graph of the image experiment: one ensemble a point of the sweep, with no inputs."""

from subjax import config, schema
from subjax.data import images
from subjax.errors import UsageError
from subjax.graph import Graph, Plan


def plan(loaded: config.Loaded) -> Plan:
    """One ensemble node and one cell for each point.

    Raises:
        UsageError: the data cannot be read.
    """
    graph = Graph()
    cells = []
    for point in loaded.points:
        settings = loaded.at(point)
        assert isinstance(settings, schema.Images)
        try:
            facts = images.facts(settings.data)
        except UsageError as error:
            raise UsageError(f"{loaded.path}: config.data: {error}") from None
        setting = {name: getattr(settings, name) for name in ("auxiliary", "pairing", "logits", "loss")}
        tokens, flops = images.cost(settings, facts)
        label = f"m = {settings.auxiliary}, {settings.pairing}, {settings.logits} logits, {settings.loss}"
        read = images.node_config(settings, facts.digest)
        # Settings that differ in the pairing alone share their programs.
        group = {name: value for name, value in read.items() if name not in ("pairing", "first_seed")}
        id = graph.add("ensemble", read, {}, label, group, tokens, flops)
        cells.append({**setting, "nodes": {"ensemble": id}})
    assert isinstance(loaded.settings, schema.Images)
    study = {
        "name": loaded.settings.name,
        "kind": "images",
        "config": loaded.resolved,
        "points": loaded.points,
        "cells": cells,
        "statistics": config.to_dict(loaded.settings.statistics),
        "chosen_on": [],
    }
    return Plan(graph.nodes, study)
