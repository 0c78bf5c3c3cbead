"""What the arguments of a command stand for: models, prompts, rollouts, phrases, states; and files written whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = [
    "beside",
    "classes_of",
    "form_of",
    "labels_of",
    "laws_of",
    "lines_of",
    "model_of",
    "named",
    "numbers_of",
    "organism_count",
    "phrases_of",
    "prices_of",
    "prompts_of",
    "rollouts_of",
    "spread_of",
    "state_map",
    "write_csv",
    "write_text",
]


def model_of(name: str) -> str:
    """``organism:shallow`` names a shipped model; everything else is a folder or a hub id."""
    if name.startswith("organism:"):
        from .organism import model_path

        return str(model_path(name.split(":", 1)[1]))
    return name


def organism_count(source: str) -> int | None:
    """N of ``organism[:N]`` (48 by default); None for the path of a file."""
    if source.split(":")[0] != "organism":
        return None
    count = source.partition(":")[2] or "48"
    if not count.isdigit() or not int(count):
        raise InputError(
            f"{source!r} names no prompts.",
            cause="what follows 'organism:' must be a number of prompts",
            next="Write organism or organism:N, or give a CSV or JSONL file.",
        )
    return int(count)


def prompts_of(source: str, seed: int) -> Any:
    """The organism's own prompts where they are named, else the path as it is."""
    count = organism_count(source)
    if count is None:
        return source
    from .organism import prompts

    return prompts(n=count, seed=seed)


def rollouts_of(path: str, warnings: list[str], skip_corrupt: bool = False) -> Any:
    """Rollouts from disk; what their provenance warns of (an unfinished run, unknown words) is passed on."""
    from .rollouts import read_rollouts

    rolls = read_rollouts(path, skip_corrupt=skip_corrupt)
    told = [rolls.provenance.get("note"), *(rolls.provenance.get("warnings") or [])]
    warnings += [f"{path}: {text}" for text in told if text]
    return rolls


def labels_of(path: str, warnings: list[str]) -> Any:
    """True outcomes: rollouts that a better judge has judged, or a CSV file with the columns outcome and, where the
    lines are not those of all rollouts in order, row (from 0)."""
    import csv

    if Path(path).suffix.lower() != ".csv":
        return rollouts_of(path, warnings)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            lines, names = list(table), table.fieldnames or []
        if "outcome" not in names:
            raise ValueError(f"its columns are {', '.join(names) or 'none'}")
        if "row" not in names:
            return [line["outcome"] for line in lines]
        return {int(line["row"]): line["outcome"] for line in lines}
    except (OSError, UnicodeDecodeError, ValueError, TypeError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read as labels.",
            cause=str(error),
            next="Give a CSV file with the column outcome (harm, refusal, benign, truncated or nothing) and maybe row.",
        ) from None


def write_text(path: str, text: str) -> str:
    """Write a text file, whole or not at all; its folder is made."""
    from .files import atomic

    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def write_csv(path: str, rows: Any) -> str:
    import csv
    import io

    from .files import inert

    text = io.StringIO(newline="")
    csv.writer(text).writerows(map(inert, row) for row in rows)
    return write_text(path, text.getvalue())


def named(items: list[str]) -> dict[str, str]:
    """NAME=PATH, or a path that is named after its file; two of one name are refused, never merged."""
    out: dict[str, str] = {}
    for item in items:
        plain = Path(item).exists() or "=" not in item
        name, path = (Path(item).stem, item) if plain else item.split("=", 1)
        if name in out:
            raise InputError(
                f"Two sets of rollouts are called {name!r}: {out[name]} and {path}.",
                cause="A set without a name of its own is called after its file.",
                next="Name them: NAME=PATH.",
            )
        out[name] = path
    return out


def beside(models: dict[str, str], items: list[str], what: str, option: str) -> dict[str, str]:
    """Files that belong to models, by the model's name; for one model and one file names do not matter."""
    files = named(items)
    if len(models) == len(files) == 1:
        return dict(zip(models, files.values()))
    if strangers := sorted(files.keys() - models.keys()):
        raise InputError(
            f"{what} of {', '.join(strangers)}, but there is no model of that name.",
            cause=f"The models are called {', '.join(models)}.",
            next=f"Name both alike: report NAME=PATH {option} NAME=PATH.",
        )
    return files


def classes_of(given: list[str] | None) -> dict[str, list[Any]] | None:
    """Token classes from NAME=word,word or NAME=@FILE; numbers are token ids."""
    if not given:
        return None
    out: dict[str, list[Any]] = {}
    for item in given:
        name, equals, members = item.partition("=")
        if not (name and equals and members):
            raise InputError(
                f"{item!r} names no token class.",
                cause="A class is written NAME=word,word or NAME=@FILE.",
                next="For instance: --classes harm=poison,17 refusal=@refusals.txt",
            )
        words = lines_of(Path(members[1:])) if members.startswith("@") else members.split(",")
        out[name] = [int(w) if w.isdigit() else w for w in words]
    return out


def state_map(text: str) -> Any:
    """A state map from its name: ``kgram:3`` or ``position``."""
    from .chains import KGram, Position

    kind, _, k = text.partition(":")
    if kind == "kgram" and k.isdigit() and int(k) > 0:
        return KGram(int(k))
    if text == "position":
        return Position()
    raise InputError(
        f"There is no state map {text!r}.",
        cause="states are made from the last K tokens, or from the position",
        next="Use kgram:K with K >= 1, or position.",
    )


def lines_of(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a list of phrases.",
            cause=str(error),
            next="Give a UTF-8 text file with one phrase per line, or the phrases themselves.",
        ) from None


def phrases_of(given: list[str] | None) -> list[str] | None:
    """Phrases as given, or the lines of a file; what looks like a file and is none is refused."""
    if given is None:
        return None
    out: list[str] = []
    for item in given:
        path = Path(item)
        looks_like_a_file = path.suffix in (".txt", ".csv", ".lst", ".tsv") or "/" in item or item.startswith("@")
        out += lines_of(Path(item.removeprefix("@"))) if path.is_file() or looks_like_a_file else [item]
    return out


# --- what is swept ---

FORMS = {
    "profile": ("Profile", ("a0", "r0", "a1", "r1"), ()),
    "checkpoint": ("Checkpoint", ("a", "r"), ("success",)),
    "hazards": ("Hazards", ("harm", "refusal"), ("tail",)),
    "leaky": ("LeakyRefusal", ("a", "r", "leak", "end"), ("stop",)),
}
LONGEST = 10**7  # numbers in one range


def numbers_of(words: list[str] | None, option: str, whole: bool = True) -> Any:
    """Numbers and half-open ranges START:STOP[:STEP]; None stays None."""
    if words is None:
        return None
    out: list[Any] = []
    for word in words:
        try:
            if ":" in word:
                out += _range(word)
            else:
                out.append(int(word) if whole else float(word))
        except ValueError:
            raise InputError(
                f"{option} {word}: no number.",
                cause="Numbers are written out, or as a range START:STOP or START:STOP:STEP, without its end, that is "
                f"neither empty nor longer than {LONGEST:,}.",
                next=f"For instance {option} 0 5 20, or {option} 0:33." if whole else f"For instance {option} 0 0.3.",
            ) from None
    return out


def _range(word: str) -> range:
    parts = range(*(int(part) for part in word.split(":")))
    if not 2 <= word.count(":") + 1 <= 3 or not 0 < len(parts) <= LONGEST:
        raise ValueError(word)
    return parts


def pairs_of(words: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE, each name once."""
    out: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value or name in out:
            raise InputError(
                f"{option} {word}: " + ("given twice." if name in out else "no value."),
                cause="Values are written NAME=VALUE, each once.",
                next=f"Write e.g. {option} {name or 'x'}=0.1.",
            )
        out[name] = value
    return out


def prices_of(words: list[str]) -> dict[str, float]:
    """Prices by axis: depth=1 width=3."""
    return {name: numbers_of([x], f"--cost {name}", whole=False)[0] for name, x in pairs_of(words, "--cost").items()}


def form_of(kind: str, words: list[str]) -> Any:
    """A closed form from its name and NAME=VALUE."""
    from . import depth

    name, needed, maybe = FORMS[kind]
    given, option = pairs_of(words, f"--{kind}"), f"--{kind}"
    if missing := [x for x in needed if x not in given]:
        raise InputError(
            f"{option} without {', '.join(missing)}.",
            cause=f"It has {', '.join((*needed, *maybe))}.",
            next=f"Add {' '.join(f'{x}=P' for x in missing)}.",
        )
    if strangers := [x for x in given if x not in (*needed, *maybe)]:
        raise InputError(
            f"{option} has no {', '.join(strangers)}.",
            cause=f"It has {', '.join((*needed, *maybe))}.",
            next="Leave it out, or correct its name.",
        )
    values: dict[str, Any] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for x, text in given.items():
        many = numbers_of(text.replace(",", " ").split() if kind == "hazards" else text.split(":"), option, whole=False)
        if kind == "hazards":
            values[x] = many[0] if x == "tail" else many
        elif len(many) == 3 and kind in ("profile", "leaky"):
            values[x], intervals[x] = many[0], (many[1], many[2])
        elif len(many) == 1:
            values[x] = many[0]
        else:
            raise InputError(
                f"{option} {x}={text}: {len(many)} numbers.",
                cause="A rate is one number, or of a profile and a leaky refusal also VALUE:LOWER:UPPER.",
                next=f"Write {x}=0.1, or {x}=0.1:0.05:0.2.",
            )
    if intervals:
        values["intervals"] = intervals
    return getattr(depth, name)(**values)


def laws_of(words: list[str] | None) -> Any:
    """Laws of the number of forced tokens: none, fixed:5, fixed:0:33, geometric:.1, 0=.5,5=.5; None stays None."""
    if words is None:
        return None
    from .depth import AttackLaw

    laws: list[Any] = []
    for word in words:
        kind, _, rest = word.partition(":")
        if word == "none":
            laws.append(AttackLaw([1.0], name="none"))
        elif kind == "fixed" and rest:
            laws += [AttackLaw.fixed(k) for k in numbers_of([rest], "--attack fixed")]
        elif kind == "geometric" and rest:
            laws.append(AttackLaw.geometric(numbers_of([rest], "--attack geometric", whole=False)[0]))
        elif "=" in word:
            pairs = pairs_of(word.split(","), "--attack")
            law = {
                numbers_of([k], "--attack")[0]: numbers_of([w], "--attack", whole=False)[0] for k, w in pairs.items()
            }
            laws.append(law)
        else:
            raise InputError(
                f"--attack {word}: no law.",
                cause="An attack is a law of the number of forced tokens.",
                next="Write none, fixed:5, fixed:0:33, geometric:0.1, or weights 0=0.5,5=0.5.",
            )
    return laws


def spread_of(options: Any, workers_alone: bool = False) -> Callable[..., list[Any]] | None:
    """What spreads work over the workers of a Ray cluster; None where it was not asked for.

    `workers_alone`: whether the command heeds --workers without Ray, too.
    """
    if options.engine == "ray":
        from .rollouts import spread

        return functools.partial(spread, workers=options.workers, address=options.address)
    if options.address or (options.workers and not workers_alone):
        raise InputError(
            f"{'--address' if options.address else '--workers'} without --engine ray.",
            cause="Without Ray everything is done in this process.",
            next="Add --engine ray, or leave it out.",
        )
    return None
