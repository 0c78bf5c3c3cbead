"""sample(): one verb over the engines, tokens in, tokens out."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .asked import Asked, ask, class_ids, depths
from .engines import Engine, check_job, is_url, open_engine
from .judges import _open as open_judge
from .judges import judge as judge_rollouts
from .provenance import ids_hash, json_hash, versions, weights_hash
from .rollouts import Rollouts
from .shards import Plan, job, run

__all__ = ["SHARD", "planned", "sample"]

SHARD = {"jax": 8192}
"""Rollouts per shard by engine, so that a shard takes seconds; 1024 for the others."""
KINDS = ("edit", "offers", "trust_remote_code")
"""What an engine says of itself that makes a run another one."""
OF_SERVERS = ("served", "tokenizer", "concurrency", "timeout", "retries", "retokenize")
"""What `sample` passes on to a server."""
OF_RAY = ("workers", "inner", "address")
"""What it heeds with ``engine="ray"`` only."""


def sample(
    model: Any,
    prompts: Any,
    *,
    n: int,
    max_tokens: int,
    prefill: Any = (0,),
    prefix: Any = None,
    engine: str = "auto",
    device: str | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    classes: dict[str, Any] | None = None,
    edit: Any = None,
    out: str | Path | None = None,
    dtype: str = "float32",
    batch_size: int | None = None,
    shard: str | None = None,
    progress: bool | None = None,
    judge: Any = None,
    system: str | None = None,
    shard_size: int | None = None,
    fine: bool = False,
    workers: int | None = None,
    inner: str = "auto",
    address: str | None = None,
    trust_remote_code: bool = False,
    **server: Any,
) -> Rollouts:
    """Sample answers of a language model.

    Parameters
    ----------
    model : str, Path or Engine
        A model folder, a hub id (transformers only), the URL of a server (``http://127.0.0.1:8000/v1``), or an engine
        that is open already. With ``engine="replay"`` a JSONL log, a Parquet file, a folder of shards or Rollouts.
    prompts : list of str, list of dict, or path of a CSV or JSONL file
        A record has ``prompt`` (text, or messages) or ``prompt_tokens``, and may have ``category`` (default "all"),
        ``prefix`` and ``prompt_id`` (default: its place in the list). None with ``engine="replay"``.
    n : int
        Answers per prompt and prefill.
    max_tokens : int
        Largest number of sampled tokens of an answer, the end of sequence included, forced ones not counted.
    prefill : int or sequence of int
        Numbers of tokens of the prefix to force before the model speaks.
    prefix : list of (str or ids), dict of prompt_id -> (str or ids), or Rollouts, optional
        What is forced; goes before the records' own. Text is encoded without special tokens. Of Rollouts (of another
        model): the first answer to the same prompt_id that is long enough.
    engine : {"auto", "jax", "transformers", "server", "ray", "replay"}
    device : str, optional
        "cpu", "gpu", "gpu:1"; None lets the engine choose.
    temperature : float
        0 takes the most probable token.
    top_p : float
        Sample from the smallest set of most probable tokens whose mass reaches it.
    seed : int
        With prompt_id, prefill and number it determines a rollout, whatever else is sampled beside it.
    classes : dict of name -> list of (id or str), optional
        Token classes whose probability mass is recorded before every sampled token (columns ``mass_<name>``), in the
        distribution it is drawn from, after temperature and top_p.
    edit : Edit, optional
        What changes the model while it answers (`markovsafety.Edit`): directions added to activations, heads shifted,
        logits tilted. ``logprob`` and class masses are those of the edited model.
    out : str or Path, optional
        Folder for Parquet shards. The same call goes on where it was stopped; `read_rollouts` reads the folder.
    dtype : {"float32", "bfloat16"}
        Of weights and activations.
    batch_size : int, optional
        Rollouts side by side; None lets the engine choose.
    shard : {"auto", "data", "tensor"}, optional
        How the jax engine uses several GPUs: a copy of the model on each, one copy over all of them, or, by default,
        copies over as few each as have room for one.
    progress : bool, optional
        Progress bar on stderr; None shows it on a terminal only.
    judge : str or Judge, optional
        Judges every shard before it is written (`markovsafety.judge`).
    system : str, optional
        System message put before every prompt.
    shard_size : int, optional
        Rollouts per shard.
    fine : bool
        Draw tokens of any probability at the right rate; plainly drawn, float32 blurs those below 1e-6. The same seed
        gives other answers then.
    workers : int, optional
        With ``engine="ray"``: models side by side; None: one per GPU of the cluster, or per core if it has no GPU. The
        rollouts are those of one process, and either goes on in a folder that the other began.
    inner : str
        With ``engine="ray"``: the engine in each worker. `model` may be a function that opens one, without arguments.
    address : str, optional
        With ``engine="ray"``: "local" starts Ray on this machine, "auto" joins the cluster that it is part of,
        "host:port" another; None: what RAY_ADDRESS says, else "local".
    trust_remote_code : bool
        Whether to run Python code that comes with the model, of which transformers does not have the architecture:
        anything that its authors wrote, on this machine, with your rights. Takes the transformers engine. The files and
        their hash are in the provenance, and a run goes on with the same ones only.
    **server
        Of a server: ``served``, ``tokenizer``, ``concurrency``, ``timeout``, ``retries``, ``retokenize``; what they do
        stands in `markovsafety.rollouts.engines.server.open_engine`.

    Returns
    -------
    Rollouts
        In the order prompts x prefill x n. ``logprob`` is the model's own (temperature 1, nothing cut off),
        ``logprob_processed`` that of the distribution sampled from, there only if it differs. Where prompts hold
        words that the tokenizer does not have, ``provenance["warnings"]`` says how many.

    Raises
    ------
    InputError
        Prompts, prefixes or parameters that make no sense; `out` holds another run.
    ModelError
        The model cannot be loaded, or the server cannot be asked.
    UntrustedError
        Logits became NaN, or a server left requests without an answer; ``partial`` holds the rollouts that were
        finished.

    Examples
    --------
    Eight answers to each of two prompts, and eight more after the first five tokens of an answer that complies:

    >>> model, asked = ms.organism.model_path("shallow"), ms.organism.prompts(n=2)
    >>> rolls = ms.sample(model, asked, n=8, max_tokens=16, prefill=[0, 5], judge="organism")
    >>> rolls
    Rollouts(32 of 2 prompts, prefill 0, 5: ... harm, ... refusal, ... truncated)
    >>> " ".join(ms.organism.WORDS[i] for i in rolls[rolls.prefill == 5].answer(0)[:5])
    'yes happy to help let'
    """
    _check(n, max_tokens, temperature, top_p, seed, shard_size)
    if unknown := sorted(set(server) - set(OF_SERVERS)):
        raise TypeError(f"sample() got an unexpected keyword argument {unknown[0]!r}")
    if not isinstance(trust_remote_code, bool) or (
        trust_remote_code and (engine == "replay" or not isinstance(model, str | Path))
    ):
        raise InputError(
            f"trust_remote_code is {trust_remote_code!r}",
            cause="it says whether to run code of the folder that is opened here, yes or no",
            next="give True or False with a model folder or hub id; an open engine and a log need none",
        )
    if engine == "replay":
        if edit is not None:
            raise InputError(
                "a log cannot be edited",
                cause="its answers were given already, by a model that is not here",
                next="sample from the model with edit=",
            )
        if prompts is not None:
            raise InputError(
                "a log brings its own prompts",
                cause="its answers were given already, to the prompts named in it",
                next='sample(log, None, engine="replay", ...)',
            )
        return _replayed(model, n=n, max_tokens=max_tokens, classes=classes, out=out, judge=judge)
    # Edits act where the model runs in torch, unless the engine was named or the model is on a server.
    here = isinstance(model, str | Path) and not is_url(model)
    chosen = "transformers" if edit is not None and engine == "auto" and here else engine
    opening = {"device": device, "dtype": dtype, "batch_size": batch_size, **server}
    opening |= ({} if shard is None else {"shard": shard}) | ({"trust_remote_code": True} if trust_remote_code else {})
    asked: dict[str, Any] = {"prompts": prompts, "n": n, "max_tokens": max_tokens, "prefill": prefill, "prefix": prefix}
    asked |= {"temperature": temperature, "top_p": top_p, "seed": seed, "classes": classes, "dtype": dtype}
    asked |= {"judge": judge, "system": system, "shard_size": shard_size, "fine": fine}
    if engine == "ray":
        from .engines.ray_sample import sample_spread

        opening["name"] = "transformers" if edit is not None and inner == "auto" and here else inner
        how = {"workers": workers, "address": address, "out": out, "progress": progress}
        return sample_spread(model, opening=opening, edit=edit, asked=asked, **how)
    if (workers, inner, address) != (None, "auto", None):
        raise InputError(
            "workers, inner and address are for Ray",
            cause=f"the engine is {engine!r}, which samples in this process",
            next='say engine="ray", or leave them out',
        )
    opened = _edited(_engine(model, chosen, **opening), edit)
    plan, said = planned(model, opened, **asked)
    return run(plan, opened, (lambda r: r) if said is None else (lambda r: judge_rollouts(r, said)), out, progress)


def planned(
    model: Any,
    opened: Engine,
    prompts: Any,
    *,
    n: int,
    max_tokens: int,
    prefill: Any,
    prefix: Any,
    temperature: float,
    top_p: float,
    seed: int,
    classes: dict[str, Any] | None,
    dtype: str,
    judge: Any,
    system: str | None,
    shard_size: int | None,
    fine: bool,
) -> tuple[Plan, Any]:
    """The plan of a run, checked against the model, and its judge (None without one); parameters as in `sample`."""
    levels = depths(prefill)
    template = opened.tokenizer
    asked = ask(prompts, template, prefix=prefix, prefill=levels, system=system)
    stop = tuple(sorted({*template.eos_ids, *template.end_ids}))
    sampling: dict[str, Any] = {"max_tokens": int(max_tokens), "temperature": float(temperature), "top_p": float(top_p)}
    sampling |= {"eos_ids": stop, "end_ids": stop, "classes": class_ids(classes, template)}
    sampling |= {"fine": True} if fine else {}
    said = None if judge is None else open_judge(judge, {})
    said = getattr(said, "bind", lambda _: said)(template)  # gives it the model's tokenizer, if it wants one
    size = shard_size or SHARD.get(opened.name, 1024)
    told = {**sampling, "n": int(n), "prefill": levels, "seed": int(seed)}
    told["system"] = getattr(template, "system", None) if system is None else system
    told |= {"eos_ids": list(stop), "end_ids": list(stop)}
    told["classes"] = {name: ids.tolist() for name, ids in sampling["classes"].items()}
    provenance = _provenance(model, opened, asked, told)
    parameters = _identity(provenance, opened, dtype, said, size)
    plan = Plan(asked, levels, int(n), int(seed), sampling, size, parameters, provenance)
    _check_deepest(plan, opened)
    return plan, said


def _check(n: Any, max_tokens: Any, temperature: Any, top_p: Any, seed: Any, shard_size: Any) -> None:
    for name, value in (("n", n), ("max_tokens", max_tokens), ("shard_size", 1 if shard_size is None else shard_size)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}", cause="it counts tokens or rollouts", next="give an integer >= 1")
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise InputError(
            f"seed is {seed!r}", cause="a seed is a whole number of 63 bits", next="give an integer in [0, 2**63)"
        )
    numbers = isinstance(temperature, int | float | np.number) and isinstance(top_p, int | float | np.number)
    if not numbers or not 0 <= temperature < float("inf"):
        raise InputError(
            f"temperature is {temperature!r}",
            cause="the logits are divided by it",
            next="give a finite number >= 0; 0 is greedy",
        )
    if not 0 < top_p <= 1:
        raise InputError(
            f"top_p is {top_p!r}",
            cause="it is the probability mass of the tokens to sample from",
            next="give a number in (0, 1]",
        )


def _engine(model: Any, name: str, **options: Any) -> Engine:
    if isinstance(model, str | Path):
        if (given := [option for option in options if option in OF_SERVERS]) and name != "server" and not is_url(model):
            raise InputError(
                f"{', '.join(given)}: only a server takes this",
                cause=f"{model} is not the URL of one",
                next="leave it out, or give the server's URL",
            )
        return open_engine(name, model, **options)
    if not (callable(getattr(model, "run", None)) and hasattr(model, "tokenizer")):
        raise InputError(
            f"model is {type(model).__name__}",
            cause="it is neither a path nor something with run(job) and a tokenizer",
            next='give a model folder, a hub id or an open engine; a log needs engine="replay"',
        )
    if name not in ("auto", model.name):
        raise InputError(
            f"the open engine is {model.name!r}, not {name!r}",
            cause="a model that is loaded already stays in its engine",
            next='leave engine="auto"',
        )
    return model


def _edited(opened: Any, edit: Any) -> Engine:
    """The engine under an edit; itself without one."""
    if edit is None:
        return opened
    if not callable(getattr(edit, "bind", None)):
        raise InputError(
            f"edit is {type(edit).__name__}",
            cause="an edit is data that an engine can bind to its model",
            next="give a markovsafety.Edit, such as direction.edit(), or read one with interventions.read_edit",
        )
    if not callable(getattr(opened, "edited", None)):
        raise InputError(
            f"the engine {opened.name!r} cannot edit activations",
            cause="it does not give access to them",
            next='use engine="transformers"',
        )
    return opened.edited(edit)


def _check_deepest(plan: Plan, opened: Engine) -> None:
    """Refuse a job that fits nowhere before anything is sampled: every prompt with its longest prefill."""
    deepest = plan.prefill.index(max(plan.prefill))
    rows = (np.arange(len(plan.asked.tokens)) * len(plan.prefill) + deepest) * plan.n
    try:
        checked = job(plan, rows)
        check_job(checked, opened.vocab_size, opened.context)
        getattr(opened, "check", lambda _: None)(checked)  # what this engine alone cannot do
    except InputError as error:  # rollout i of this job is prompt i
        fact = error.fact.replace("rollout ", "prompt ")
        raise InputError(fact, cause=error.cause, next=error.next) from error


def _provenance(model: Any, opened: Engine, asked: Asked, sampling: dict[str, Any]) -> dict[str, Any]:
    described = opened.describe() if hasattr(opened, "describe") else {}
    elsewhere = {"engine", "model", "weights", "versions", "template_hash", "tokenizer_hash", "warnings"}
    warnings = [*asked.warnings, *described.get("warnings", ())]
    told = {key: value for key, value in described.items() if key not in elsewhere}
    away = "url" in described  # on a server, whose weights nobody sees: only the tokenizer is here
    path = isinstance(model, str | Path) and not away
    name = str(model) if path else str(described.get("model") or opened.name)
    home = opened.tokenizer.folder if away else name
    folder = Path(home) if Path(home).is_dir() else None
    raw = sampling["temperature"] == 1.0 and sampling["top_p"] == 1.0
    return {
        "model": {
            "name": name,
            "path": None if folder is None else str(folder.resolve()),
            "weights": described.get("weights") or (None if folder is None or away else weights_hash(folder)),
        },
        "template": opened.tokenizer.hashes(),
        "engine": {"name": opened.name, **told},
        "sampling": sampling,
        "prompts": {
            "count": len(asked.tokens),
            "sha256": json_hash([ids_hash(asked.tokens), asked.prompt_id.tolist(), asked.category.tolist()]),
            "prefix_sha256": ids_hash([ids[: max(sampling["prefill"])] for ids in asked.prefix]),
        },
        "logprob": opened.logprob_words(raw)  # type: ignore[attr-defined]
        if away
        else {
            "logprob": "raw: the model's own distribution, temperature 1, nothing cut off, nats",
            "logprob_processed": "not kept: sampled from the raw distribution"
            if raw
            else "processed: the distribution sampled from, after temperature and top-p, nats",
        },
        **({"warnings": warnings} if warnings else {}),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _identity(provenance: dict[str, Any], opened: Engine, dtype: str, said: Any, size: int) -> dict[str, Any]:
    """What must be the same for a run to be continued; not the time, the device or the versions."""
    model = provenance["model"]
    weights = model["weights"]["sha256"] if model["weights"] else model["name"]
    described = said.describe() if said is not None and hasattr(said, "describe") else {}
    return {
        "weights": weights,
        **{f"{name}_sha256": value for name, value in provenance["template"].items()},
        "engine": opened.name,
        "dtype": provenance["engine"].get("dtype", dtype),
        **provenance["sampling"],
        **{f"prompts_{name}": value for name, value in provenance["prompts"].items()},
        "judge": None if said is None else {"name": said.name, **described},
        **{part: provenance["engine"][part] for part in KINDS if part in provenance["engine"]},
        "shard_size": size,
    }


def _replayed(model: Any, *, n: int, max_tokens: int, classes: dict[str, Any] | None, out: Any, judge: Any) -> Rollouts:
    """A log, cut to n answers per prompt and prefill and to max_tokens sampled tokens."""
    from .engines.replay import cut
    from .parquet import read_rollouts, write_rollouts

    if classes is not None:
        raise InputError(
            "a log has no class masses",
            cause="it holds the sampled tokens only, not the probabilities of the others",
            next="score it: replay(log, scorer=model, classes=...)",
        )
    rolls = cut(model if isinstance(model, Rollouts) else read_rollouts(model), n=n, max_tokens=max_tokens)
    rolls = rolls if judge is None else judge_rollouts(rolls, judge)
    if out is not None:
        write_rollouts(rolls, Path(out) / "part-00000.parquet")
    return rolls
