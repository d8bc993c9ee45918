"""Base of a pretrained study: a checkpoint, checked and recorded; its weights stay where they lie."""

import json
from collections.abc import Mapping
from typing import Any

from subjax.cards import digest_json
from subjax.data.chat import chat_of
from subjax.data.tokenizer import require_fits
from subjax.errors import SubjaxError
from subjax.files import sha256_file
from subjax.models import weights
from subjax.models.hf_config import decoder_config_of, family_of
from subjax.models.network import network
from subjax.models.source import content_digest
from subjax.schema_pretrained import Numerics
from subjax.stages.speakers import CHECKPOINT, opened
from subjax.stages.task import Made, Task


def make(task: Task) -> Made:
    """Check a checkpoint and its tokenizer; the payload is `checkpoint.json`, which names every file with its sha256.

    Raises:
        UsageError: a tensor is missing or does not fit, the vocabulary is larger than the embedding, or the template
            cannot be used. SubjaxError: the checkpoint is not the one that was planned.
    """
    where = task.hints["source"]
    source = opened(where)
    planned = task.config["checkpoint"]
    if content_digest(source)[: len(planned)] != planned:
        raise SubjaxError(f"checkpoint {where} has changed since it was planned; plan again")
    net = network(decoder_config_of(source.config, numerics=Numerics(), where=where))
    weights.check(source, net)
    chat = chat_of(where, planned, **task.config["chat"])
    require_fits(chat.tokenizer, net.config.vocab, where)
    record = {
        "source": where,
        "revision": source.revision,
        "family": family_of(source.config, where),
        "parameters": net.parameters,
        "stored_dtype": weights.stored_dtype(source),
        "config": dict(source.config),
        "files": {name: sha256_file(path) for name, path in source.files.items()},
        "tokenizer": chat.tokenizer.digest(),
        "template": chat.facts().sentences(),
    }
    (task.build.folder / CHECKPOINT).write_text(json.dumps(record, indent=1, sort_keys=True))
    return Made(
        digest=digest(record),
        metrics={"parameters": net.parameters, "vocabulary": chat.tokenizer.size},
        tokens=0,
        extra={"source": where, "revision": source.revision, "template": record["template"]},
    )


def digest(record: Mapping[str, Any]) -> str:
    """The digest of a checkpoint's record. Where the checkpoint lies is left out: a copy elsewhere is the same base."""
    return digest_json({name: value for name, value in record.items() if name != "source"})
