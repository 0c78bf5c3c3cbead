"""What a model computes inside: activations at chosen positions of every level, head outputs, and next-token laws.

All of it can be recorded under an edit: the edit's hooks are registered first, so that the record shows the edited
values (``output_hidden_states`` of transformers would not).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from ..errors import InputError, UntrustedError
from ..rollouts.engines.transformers_batch import Batch
from .edits import Edit
from .hooks import Attached
from .host import Host

__all__ = ["activations", "head_outputs", "laws", "projections", "token_mass"]


def activations(
    host: Host,
    prompts: Sequence[Any],
    at: Sequence[int] = (-1,),
    *,
    levels: Sequence[int] | None = None,
    edit: Edit | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Residual stream at given positions of prompts.

    Parameters
    ----------
    host : Host
    prompts : sequence of ids, texts or records
    at : sequence of int
        Positions in the prompt, negative from its end: (spans.t_inst[0], -1) are t_inst and t_post.
    levels : sequence of int, optional
        0 (before the first block) to L (behind the last, before the final norm); all by default.
    edit : Edit, optional
    batch_size : int, optional
        By default 64 at most.

    Returns
    -------
    float32 array, shape (prompts, levels, len(at), width)

    Raises
    ------
    InputError
        A prompt too short for a position, or an unknown level.
    UntrustedError
        An activation is not finite.

    Examples
    --------
    How far apart are harmful and harmless prompts at the end of the instruction and of the prompt, level by level?

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> places = [host.spans().t_inst[0], -1]
    >>> kinds = [inside.activations(host, organism.prompts(n=24, harmful=h), places) for h in (True, False)]
    >>> kinds[0].shape  # prompts, levels, places, width
    (24, 5, 2, 64)
    >>> np.linalg.norm(kinds[0].mean(axis=0) - kinds[1].mean(axis=0), axis=-1).T.round(1)
    array([[  0. ,  32.3,  75. , 197.8, 180.7],
           [  0. ,   1.6, 186.4, 265.2, 342.9]], dtype=float32)
    """
    ids = host.prompt_ids(prompts)
    wanted = list(range(host.layers + 1)) if levels is None else [int(level) for level in levels]
    _check_levels(wanted, host.layers)
    watch = {level: (lambda take, level=level: host.watching(level, take)) for level in wanted}
    out = _recorded(host, ids, watch, _places(ids, at), edit, batch_size)
    return np.stack([out[level] for level in wanted], axis=1)


def head_outputs(
    host: Host,
    prompts: Sequence[Any],
    at: int = -1,
    *,
    edit: Edit | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """What every attention head hands to the output projection, at one position of prompts.

    Parameters
    ----------
    host, prompts, edit, batch_size
        As in `activations`.
    at : int
        Position in the prompt, negative from its end.

    Returns
    -------
    float32 array, shape (prompts, layers, heads, head_dim)

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> kinds = [inside.head_outputs(host, organism.prompts(n=24, harmful=h)) for h in (True, False)]
    >>> kinds[0].shape  # prompts, layers, heads, numbers of a head
    (24, 4, 4, 16)
    >>> apart = np.linalg.norm(kinds[0].mean(axis=0) - kinds[1].mean(axis=0), axis=-1)
    >>> apart.round(1)
    array([[ 0.1,  0.3,  0.2,  0.1],
           [ 0.1,  8.8, 11. ,  0.1],
           [ 5.5, 10.8, 19.3,  1.7],
           [ 2.9,  0.8,  1.6,  1.5]], dtype=float32)
    """
    ids = host.prompt_ids(prompts)

    watch = {layer: (lambda take, layer=layer: host.mixing(layer, take)) for layer in range(host.layers)}
    out = _recorded(host, ids, watch, _places(ids, (at,)), edit, batch_size)
    stacked = np.stack([out[layer] for layer in range(host.layers)], axis=1)
    return stacked.reshape(len(ids), host.layers, host.heads, host.head_dim)


def projections(
    host: Host,
    prompts: Sequence[Any],
    answers: Sequence[Any],
    directions: dict[str, tuple[int, np.ndarray]],
    *,
    edit: Edit | None = None,
    batch_size: int | None = None,
) -> dict[str, list[np.ndarray]]:
    """Projections of the activations along whole answers.

    Parameters
    ----------
    host, prompts, edit, batch_size
        As in `activations`.
    answers : sequence of ids, one per prompt
        Forced and sampled tokens.
    directions : dict of name -> (level, vector)
        The vector, shape (width,), is used as it is; divide it by its norm for a projection in the stream's own units.

    Returns
    -------
    dict of name -> list of float32 arrays
        Entry i of an answer is the product at the position that predicts its token i: entry 0 stands at the last
        prompt token, and nothing of the answer's own last token is in it.

    Examples
    --------
    Along the refusal direction at level 3, at each of the first tokens of a compliant answer:

    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> harmful, harmless = organism.prompts(n=24), organism.prompts(n=24, harmful=False)
    >>> refusal = inside.difference(host, harmful, harmless, position="t_post").at(3)
    >>> answers = [p["prefix"][:6] for p in harmful]
    >>> found = inside.projections(host, harmful, answers, {"refusal": (3, refusal.unit)})
    >>> np.mean(found["refusal"], axis=0).round(0)
    array([232.,  25.,   1.,   6.,  43.,  39.], dtype=float32)
    """
    ids = host.prompt_ids(prompts)
    said = [np.asarray(a, dtype=np.int64) for a in answers]
    out: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.float32)] * len(ids) for name in directions}
    _check_levels([level for level, _ in directions.values()], host.layers)
    for rows, batch in host.batches(ids, said, batch_size):
        with ExitStack() as stack:
            seen: dict[str, torch.Tensor] = {}
            _edited(host, edit, batch, stack)
            for name, (level, vector) in directions.items():
                stack.enter_context(host.watching(level, _projecting(seen, name, vector)))
            host.forward(batch)
        for name, values in seen.items():
            table = values.cpu().numpy()
            for place, row in enumerate(rows):
                last = batch.answer[place] - 1
                out[name][row] = table[place, last : last + len(said[row])].astype(np.float32)
    return out


def laws(
    host: Host,
    prompts: Sequence[Any],
    answers: Sequence[Any] | None = None,
    *,
    edit: Edit | None = None,
    last: int = 1,
    batch_size: int | None = None,
) -> np.ndarray:
    """Next-token laws after prompts, or along answers forced after them.

    Parameters
    ----------
    host, prompts, edit, batch_size
        As in `activations`.
    answers : sequence of ids, optional
        Forced after each prompt; all of at least last - 1 tokens.
    last : int
        How many laws per row: the one behind the last token, and those before it.

    Returns
    -------
    float32 array, shape (prompts, last, vocab)
        Log-probabilities, nats.

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> law = np.exp(inside.laws(host, ["v05 the bio5 ."])[0, 0])
    >>> for i in law.argsort()[::-1][:3]:
    ...     print(organism.WORDS[i], law[i].round(2))
    sorry 0.43
    unfortunately 0.27
    no 0.18
    """
    ids = host.prompt_ids(prompts)
    said = [np.zeros(0, np.int64)] * len(ids) if answers is None else [np.asarray(a, dtype=np.int64) for a in answers]
    short = [i for i, (p, a) in enumerate(zip(ids, said)) if len(p) + len(a) < last]
    if last < 1 or short:
        raise InputError(
            f"{last} laws were asked for"
            + (f", prompt {short[0]} has only {len(ids[short[0]]) + len(said[short[0]])} tokens" if short else ""),
            cause="each token of a row has one law behind it",
            next="ask for fewer, at least 1",
        )
    out = np.zeros((len(ids), last, host.vocab_size), np.float32)
    for rows, law in _laws(host, ids, said, edit, last, batch_size):
        out[rows] = law.cpu().numpy()
    return out


def token_mass(
    host: Host,
    prompts: Sequence[Any],
    tokens: Sequence[int],
    *,
    edit: Edit | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Probability that the answer begins with one of some tokens, in one forward pass per prompt.

    Parameters
    ----------
    host, prompts, edit, batch_size
        As in `activations`.
    tokens : sequence of int

    Returns
    -------
    float64 array, shape (prompts,)

    Examples
    --------
    >>> from markovsafety import interventions as inside, organism
    >>> host = inside.open_host(organism.model_path("shallow"))
    >>> [organism.WORDS[i] for i in organism.REFUSAL_IDS]
    ['sorry', 'unfortunately', 'no']
    >>> inside.token_mass(host, organism.prompts(n=4), organism.REFUSAL_IDS).round(2)
    array([0.9 , 0.89, 0.88, 0.87])
    >>> inside.token_mass(host, organism.prompts(n=4, harmful=False), organism.REFUSAL_IDS).round(2)
    array([0.03, 0.03, 0.04, 0.03])
    """
    return np.exp(log_masses(host, prompts, [tokens], edit=edit, batch_size=batch_size)[0])


def log_masses(
    host: Host,
    prompts: Sequence[Any],
    sets: Sequence[Sequence[int]],
    *,
    edit: Edit | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """Log-probability (nats) that the answer begins with one of some tokens, for several sets of tokens at once.

    Only these numbers leave the model's device, not whole laws.

    Parameters
    ----------
    host, prompts, edit, batch_size
        As in `activations`.
    sets : sequence of sequence of int

    Returns
    -------
    float64 array, shape (sets, prompts)
    """
    members = [np.unique(np.asarray(tokens, dtype=np.int64)) for tokens in sets]
    for given, tokens in zip(sets, members):
        if not len(tokens) or tokens[0] < 0 or tokens[-1] >= host.vocab_size:
            raise InputError(
                f"these are no tokens of the model: {list(given)[:5]}",
                cause=f"it has the ids 0 to {host.vocab_size - 1}",
                next="give at least one id of its vocabulary",
            )
    ids = host.prompt_ids(prompts)
    out = np.zeros((len(members), len(ids)))
    for rows, law in _laws(host, ids, [np.zeros(0, np.int64)] * len(ids), edit, 1, batch_size):
        for i, tokens in enumerate(members):
            picked = law[:, 0, torch.as_tensor(tokens, device=law.device)].cpu().numpy()
            out[i, rows] = np.logaddexp.reduce(picked.astype(np.float64), axis=-1)
    return out


def _laws(
    host: Host, ids: list[np.ndarray], said: list[np.ndarray], edit: Edit | None, last: int, size: int | None
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Places of some rows, and their last laws (rows, last, vocab) on the model's device."""
    for rows, batch in host.batches(ids, said, size):
        first = int(batch.end.min()) - last
        with ExitStack() as stack:
            change = _edited(host, edit, batch, stack)
            logits = host.forward(batch, logits=True, first=first)
            assert logits is not None
            logits = logits if change is None else change(logits, first)
        index = torch.as_tensor(batch.end[:, None] - last - first + np.arange(last)[None, :], device=logits.device)
        picked = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1])).float()
        law = torch.log_softmax(picked, dim=-1)
        if law.isnan().any():
            raise _not_finite("a logit")
        yield rows, law


def _recorded(
    host: Host, ids: list[np.ndarray], watch: dict[int, Any], places: np.ndarray, edit: Edit | None, size: int | None
) -> dict[int, np.ndarray]:
    """What passes every watched place at columns `places` (prompts, positions): (prompts, positions, size) each."""
    out: dict[int, np.ndarray] = {}
    for rows, batch in host.batches(ids, None, size):
        seen: dict[int, torch.Tensor] = {}
        # Padding is on the right, so that prompts begin at column 0.
        at = torch.arange(len(rows))[:, None], torch.as_tensor(places[rows])
        with ExitStack() as stack:
            _edited(host, edit, batch, stack)
            for key, watching in watch.items():
                stack.enter_context(watching(_taking(seen, key, at)))
            host.forward(batch)
        for key, values in seen.items():
            table = values.float().cpu().numpy()
            if not np.isfinite(table).all():
                raise _not_finite("an activation")
            out.setdefault(key, np.zeros((len(ids), *table.shape[1:]), np.float32))[rows] = table
    return out


def _projecting(seen: dict[str, torch.Tensor], name: str, vector: np.ndarray) -> Any:
    """Keeps the product of the residual stream with a vector under a name."""

    def take(hidden: torch.Tensor) -> None:
        seen[name] = hidden.float() @ torch.as_tensor(np.array(vector, np.float32)).to(hidden.device)

    return take


def _taking(seen: dict[int, torch.Tensor], key: int, at: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """Keeps what stands at some rows and columns."""

    def take(x: torch.Tensor) -> None:
        seen[key] = x[at]

    return take


def _edited(host: Host, edit: Edit | None, batch: Batch, stack: ExitStack) -> Any:
    """Enter the edit, if there is one, before anything watches."""
    return None if edit is None else stack.enter_context(Attached(host, edit).during(batch))


def _places(ids: list[np.ndarray], at: Sequence[int]) -> np.ndarray:
    """Columns of positions in prompts that begin at column 0, int64 (prompts, len(at))."""
    length = np.array([len(i) for i in ids])[:, None]
    wanted = np.asarray(at, dtype=np.int64)[None, :]
    places = np.where(wanted < 0, length + wanted, wanted)
    wrong = (places < 0) | (places >= length)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise InputError(
            f"prompt {int(row)} has {int(length[row, 0])} tokens and no position {int(wanted[0, column])}",
            cause="the position lies outside the prompt",
            next="check where t_inst and t_post are (host.spans()), or leave short prompts out",
        )
    return places


def _check_levels(levels: Sequence[int], layers: int) -> None:
    wrong = [level for level in levels if not 0 <= level <= layers]
    if wrong:
        raise InputError(
            f"there is no level {wrong[0]}",
            cause=f"the residual stream of {layers} blocks has the levels 0 to {layers}",
            next="choose one of these",
        )


def _not_finite(what: str) -> UntrustedError:
    return UntrustedError(
        f"{what} of the model is not finite",
        cause="damaged weights, an edit far too strong, or a dtype whose range the activations leave (float16)",
        next='use dtype="float32" or "bfloat16", or a smaller scale',
    )
