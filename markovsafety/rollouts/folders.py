"""Folders of shards: what the manifest promises is compared with what is there, shard by shard.

A shard that is missing while a run goes on, or after it was stopped, makes the run unfinished. A shard that is damaged,
or missing from a run whose manifest says that it was finished, is an error that names it, or is left out on request.
Shards of different tokenizers, chat templates or runs are never put together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from .parquet import read_parquet
from .rollouts import Rollouts

__all__ = ["MANIFEST", "damaged", "one_run", "read_folder", "read_manifest"]

MANIFEST = "manifest.json"
MOST = 10**5
"""Shards of a folder at most: their names have five digits, and are read in the order of their names."""
SAME = ("template", "sampling", "prompts")
"""What the provenances of all shards of a run have in common; their weights as well."""


def read_folder(folder: Path, skip_corrupt: bool = False) -> Rollouts:
    """The rollouts of a folder of shards; see `read_rollouts`."""
    manifest = read_manifest(folder)
    shards = sorted(folder.glob("part-*.parquet"))
    if not shards and manifest is None:
        raise InputError(
            f"{folder} holds no rollouts",
            cause="there is no part-*.parquet and no manifest in it",
            next="give the folder that sample(..., out=folder) wrote",
        )
    expected = {} if manifest is None else manifest["expected"]
    parts: dict[str, Rollouts] = {}
    bad: dict[str, str] = {}
    for shard in shards:
        try:
            parts[shard.name] = _shard(shard, None if manifest is None else expected)
        except InputError as error:
            bad[shard.name] = f"{error.fact}: {error.cause}"
    missing = sorted({*expected} - {shard.name for shard in shards})
    if manifest and manifest.get("finished"):
        bad |= dict.fromkeys(missing, "it is gone, though the manifest says that the run was finished")
        missing = []
    one_run(folder, parts, manifest)
    rolls = Rollouts.concat(list(parts.values()))
    if bad and not (skip_corrupt and parts):
        raise damaged(folder, bad, rolls, skip_corrupt)
    return rolls.replace(provenance=_told(rolls, list(parts.values()), manifest, missing, bad))


def _shard(path: Path, expected: dict[str, int | None] | None) -> Rollouts:
    part = read_parquet(path)
    if expected is None:
        return part
    if path.name not in expected:
        raise InputError(
            f"{path} is a shard too many", cause=f"the manifest has {len(expected)}", next="move it to another folder"
        )
    size = expected[path.name]
    if size is not None and len(part) != size:
        raise InputError(f"{path} is damaged", cause=f"it has {len(part)} rollouts instead of {size}", next="delete it")
    return part


def damaged(folder: Path, bad: dict[str, str], rolls: Rollouts, skipping: bool) -> InputError:
    names = sorted(bad)
    others = f"{', '.join(names[1:4])}{' ...' if names[4:] else ''}"
    more = f", and {len(names) - 1} more: {others}" if others else ""
    leave = "" if skipping else "; or leave it out: skip_corrupt=True, on the command line --skip-corrupt"
    return InputError(
        f"{folder / names[0]} cannot be used{more}",
        cause=bad[names[0]],
        next=f"delete it and sample again with the same words: it alone is sampled anew{leave}",
        partial=rolls if len(rolls) else None,
    )


def one_run(folder: Path, parts: dict[str, Rollouts], manifest: dict[str, Any] | None) -> None:
    """Refuse shards of different tokenizers and templates; beside a manifest, of different runs."""
    known = [(MANIFEST, manifest["provenance"])] if manifest else []
    told = [*known, *((name, part.provenance) for name, part in parts.items())]
    keys = (*SAME, "weights") if manifest else ("template",)
    first: dict[str, tuple[str, Any]] = {}
    for name, provenance in told:
        here = {**provenance, "weights": _weights(provenance)}
        for key in keys:
            value = here.get(key)
            if value is None:
                continue
            where, there = first.setdefault(key, (name, value))
            if there != value:
                what = "of another tokenizer or chat template" if key == "template" else f"of another run ({key})"
                raise InputError(
                    f"{folder / name} is {what} than {where}",
                    cause=_differs(there, value),
                    next="move the shards of each run to a folder of their own; their rollouts cannot be put together",
                )


def _weights(provenance: dict[str, Any]) -> Any:
    try:
        return provenance["model"]["weights"]["sha256"]
    except (KeyError, TypeError):  # logs of other programs, and models that are known by name only
        return None


def _differs(there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(k for k in sorted({*there, *here}) if there.get(k) != here.get(k))
        return f"{key} {str(there.get(key))[:40]} there, {str(here.get(key))[:40]} here"
    return f"{str(there)[:80]} there, {str(here)[:80]} here"


def _told(
    rolls: Rollouts, parts: list[Rollouts], manifest: dict[str, Any] | None, missing: list[str], bad: dict[str, str]
) -> dict[str, Any]:
    """Provenance of the whole: what the shards have in common, and what is not there."""
    if manifest is None:
        provenance, notes = dict(rolls.provenance), []
    else:
        provenances = [part.provenance for part in parts] or [manifest["provenance"]]
        # A continued run differs from part to part in its time, and perhaps in its versions, but in nothing else.
        runs = [{key: p.get(key) for key in ("created", "versions")} for p in provenances]
        runs = [r for i, r in enumerate(runs) if r not in runs[:i]]
        provenance, notes = {**provenances[0], "complete": True} | ({"runs": runs} if len(runs) > 1 else {}), []
        if missing:
            notes.append(
                f"unfinished run: {len(rolls)} of {manifest['total']} rollouts, {len(missing)} of {manifest['shards']} "
                f"shards missing, {missing[0]} the first; the same call of sample with this folder as out finishes it"
            )
    if bad:
        provenance["skipped"] = [{"file": name, "why": why} for name, why in sorted(bad.items())]
        notes.append(f"left out on request: {', '.join(f'{name} ({why})' for name, why in sorted(bad.items()))}")
    if notes:
        provenance |= {"complete": False, "note": "; ".join(notes)}
    return provenance


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest with "expected", the rollouts of every shard by name (None where it does not say)."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        total, shards = int(manifest["total"]), int(manifest["shards"])
        size = int(manifest["shard_size"]) if "shard_size" in manifest else None
        if not 0 <= shards <= MOST:
            raise ValueError(f"{shards} shards")
        if size is not None and (size < 1 or shards != -(-total // size)):
            raise ValueError(f"{shards} shards of {size} rollouts do not make {total}")
        expected = {
            f"part-{i:05d}.parquet": None if size is None else min(size, total - i * size) for i in range(shards)
        }
        told = {"total": total, "shards": shards, "expected": expected, "provenance": dict(manifest["provenance"])}
        return {**manifest, **told}
    except (ValueError, KeyError, TypeError, OSError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is damaged", cause=str(error), next="delete it to read the bare shards") from error
