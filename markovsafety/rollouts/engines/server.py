"""Engine server: any OpenAI-compatible completions endpoint (vLLM, SGLang, ``transformers serve``) as an engine.

For models that one machine does not hold, and for fleets that are there already. The chat template is rendered here,
so that a prompt is the same ids in every engine, and a prefill is ids behind them. One request is one rollout: a prompt
that is asked n times is in the server's prefix cache after the first, and a rollout that failed costs nothing but
itself.

What a server cannot do is refused, not imitated: edits need the model itself, and class masses a server that gives
the log-probabilities of chosen tokens. Its draws are its own: each
request has a seed, made from the rollout's key, but no server promises the same answer for the same seed, since the
batch that an answer was computed in changes its last digits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, MarkovsafetyError, ModelError, UntrustedError
from ..provenance import versions
from ..template import Template
from . import Job, Output, Progress, check_job
from .server_answers import Answer, read_answer
from .server_client import Connection, ServerError, Session
from .server_model import chosen, limits, template_of
from .server_offers import MOST_CHOSEN, STYLES, Offers, Request, offers, text_for

__all__ = ["ServerEngine", "open_engine"]

DRIFT = 0.05
"""Share of answers whose text gives another number of tokens than were sampled, above which none is believed."""
LOST = 4
RETOKENIZED = (
    "made from the server's text by the local tokenizer: not always the ids that were sampled; special tokens within "
    "an answer are lost, and the end of sequence is put where the server says that it stopped; a shard of which more "
    f"than {DRIFT:.0%} have another number of tokens is refused"
)
WORDS = {
    "raw": "of the model's own distribution, temperature 1, nothing cut off, nats, as the server gives it",
    "temperature": "after temperature, before top-p, nats, as the server gives it",
    "processed": "of the distribution sampled from, after temperature and top-p, nats, as the server gives it",
}


@dataclass(frozen=True)
class ServerEngine:
    """A server that is known well enough to sample from it; see `open_engine`.

    Parameters
    ----------
    connection : Connection
    served : str
        Name of the model at the server.
    tokenizer : Template
    offers : Offers
    vocab_size, context : int
        Of the model; as large as needed where neither server nor tokenizer says.
    concurrency : int
        Requests under way at a time.
    owner : str or None
        What the server says it is.
    """

    connection: Connection
    served: str
    tokenizer: Template
    offers: Offers
    vocab_size: int
    context: int
    concurrency: int
    owner: str | None = None
    name: str = "server"

    def describe(self) -> dict[str, Any]:
        """JSON-able provenance; the address without anything secret."""
        return {
            "engine": self.name,
            "model": self.served,
            "url": self.connection.url,
            "owner": self.owner,
            "offers": self.offers.told(),
            "tokens": RETOKENIZED if self.offers.output == "text" else "ids of the server",
            **({"warnings": [f"token ids are {RETOKENIZED}"]} if self.offers.output == "text" else {}),
            "reproducible": "no: the server gets a seed for each rollout, but does not promise the same answer for it",
            "dtype": "the server's",
            **{f"{name}_hash": value for name, value in self.tokenizer.hashes().items()},
            "versions": versions(),
        }

    def logprob_words(self, raw: bool) -> dict[str, str]:
        """What the two columns of log-probabilities hold, for provenance; `raw` as in `Job`."""
        kind = self.offers.logprob
        if kind == "none":
            return {"logprob": "not given by the server", "logprob_processed": "not given by the server"}
        if raw:
            return {"logprob": WORDS["raw"], "logprob_processed": "not kept: sampled from the raw distribution"}
        if kind == "unknown":
            return dict.fromkeys(("logprob", "logprob_processed"), "not kept: not known of which distribution")
        absent = f"not given by the server, which gives that {WORDS[kind].split(',')[0]}"
        return {
            "logprob": WORDS["raw"] if kind == "raw" else absent,
            "logprob_processed": absent if kind == "raw" else f"where it is that: {WORDS[kind]}",
        }

    def check(self, job: Job) -> None:
        """Refuse what this server cannot do, before anything is asked.

        Raises
        ------
        InputError
            Class masses that it does not give, or draws of full precision.
        """
        self._check_classes(job)
        if job.fine:
            raise InputError(
                "a server draws its tokens itself, fine=True asks it for other ones",
                cause="fine is how this package's own engines draw",
                next="leave out fine, or sample with the jax or transformers engine",
            )
        if self.offers.prompt == "text":
            for ids in {tuple(job.prompts[p]) + tuple(f) for p, f in zip(job.prompt_of, job.forced)}:
                text_for(np.array(ids, np.int32), self.tokenizer)

    def _check_classes(self, job: Job) -> None:
        """A mass is a sum of probabilities in the distribution that the token is drawn from."""
        chosen = _chosen(job)
        if not chosen:
            return
        if not self.offers.chosen:
            raise InputError(
                f"this server gives no class masses ({', '.join(job.classes)})",
                cause="a mass is a sum over certain tokens before each sampled one, and it gives the most probable "
                "ones only (vLLM from July 2026 gives those that one chooses: logprob_token_ids)",
                next="leave out classes, and score the rollouts later where the model is (engines.replay.score); or "
                "sample with the jax or transformers engine",
            )
        if not (job.raw or self._fits(job)):
            raise InputError(
                "this server gives class masses of another distribution than is sampled from",
                cause=f"its log-probabilities are {WORDS.get(self.offers.logprob, 'of an unknown one')}; it is to "
                f"sample at temperature {job.temperature:g}, top-p {job.top_p:g}",
                next="take temperature=1 and top_p=1, or start the server with --logprobs-mode processed_logprobs",
            )
        if len(chosen) > MOST_CHOSEN:
            raise InputError(
                f"the classes hold {len(chosen)} tokens",
                cause=f"a server gives the log-probabilities of {MOST_CHOSEN} at most",
                next="leave the rarer words out, or sample with the jax or transformers engine",
            )

    def _fits(self, job: Job) -> bool:
        """Whether log-probabilities are those of the distribution sampled from, if that is not the model's own."""
        return self.offers.logprob == "processed" or (self.offers.logprob == "temperature" and job.top_p == 1)

    def run(self, job: Job, progress: Progress | None = None) -> Output:
        """Sample every rollout of the job.

        Raises
        ------
        InputError
            The job does not fit the model, or asks for what a server cannot do.
        ModelError
            No request succeeded, or one was answered with something else than was asked for.
        UntrustedError
            Some rollouts got no answer, after all retries: the others are in ``partial``, but they may be the shorter
            ones. Or too many answers changed on their way through text.
        """
        check_job(job, self.vocab_size, self.context)
        self.check(job)
        answers: list[Answer | None] = [None] * len(job)
        failed: dict[int, MarkovsafetyError] = {}
        spelled: dict[bytes, str] = {}
        with self.connection.open() as session, _pool(self.concurrency) as pool:
            waiting = {pool.submit(self._ask, session, self._request(job, i, spelled)): i for i in range(len(job))}
            for row, answer in _answered(waiting, self.concurrency):
                if isinstance(answer, Answer):
                    answers[row] = answer
                    if progress:
                        progress(1, len(answer.tokens))
                else:
                    failed[row] = answer
        output = self._output(job, answers)
        if failed:
            raise _unanswered(failed, len(job), output)
        if output.info["drifted"] > DRIFT * len(job):
            raise UntrustedError(
                f"{output.info['drifted']} of {len(job)} answers have another number of tokens here than at the server",
                cause="the text of an answer does not tell which tokens were sampled",
                next="use a server that returns token ids (vLLM, SGLang)",
                partial=output,
            )
        return output

    def _request(self, job: Job, row: int, spelled: dict[bytes, str]) -> Request:
        ids = np.concatenate([job.prompts[job.prompt_of[row]], job.forced[row]]).astype(np.int32)
        text = ""
        if self.offers.prompt == "text":
            text = spelled.get(ids.tobytes()) or spelled.setdefault(ids.tobytes(), text_for(ids, self.tokenizer))
        seed = int(job.keys[row]) % 2**53  # exact in any JSON number
        told = (job.max_tokens, float(job.temperature), float(job.top_p), seed, tuple(int(i) for i in job.eos_ids))
        return Request(self.served, ids, *told, text, _chosen(job))

    def _ask(self, session: Session, request: Request) -> Answer:
        def read(reply: dict[str, Any]) -> Answer:
            return read_answer(reply, request, self.offers, self.tokenizer, self.vocab_size)

        return session.complete(STYLES[self.offers.style](request), read)

    def _output(self, job: Job, answers: list[Answer | None]) -> Output:
        """Answers in the order of the job, empty where there is none; each log-probability in its column."""
        raw, fits = job.raw or self.offers.logprob == "raw", self._fits(job)
        tokens, logprob, processed = [], [], []
        for answer, forced in zip(answers, job.forced):
            if answer is None:
                empty = np.zeros(0, np.float32)
                tokens, logprob, processed = [*tokens, empty.astype(np.int32)], [*logprob, empty], [*processed, empty]
                continue
            nothing = np.full(len(forced), np.nan, np.float32)
            given, blank = answer.logprob, np.full_like(answer.logprob, np.nan)
            tokens.append(np.concatenate([forced, answer.tokens]).astype(np.int32))
            logprob.append(np.concatenate([nothing, given if raw else blank]))
            sure = np.zeros_like(given) if job.temperature == 0 else given if fits else blank
            processed.append(np.concatenate([nothing, sure]))
        done = [answer for answer in answers if answer is not None]
        info = {"sampled_tokens": sum(len(a.tokens) for a in done), "drifted": sum(a.drift for a in done)}
        keeps = job.processed and not job.raw and (fits or job.temperature == 0)
        mass = {name: _masses(job, ids, answers) for name, ids in job.classes.items()}
        return Output(tokens, logprob, processed if keeps else None, mass, info)


def _chosen(job: Job) -> tuple[int, ...]:
    """Ids whose probabilities the server is to give: those of all classes; at temperature 0 every mass is known."""
    ids = {int(i) for members in job.classes.values() for i in members}
    return tuple(sorted(ids)) if job.temperature > 0 else ()


def _masses(job: Job, members: np.ndarray, answers: list[Answer | None]) -> list[np.ndarray]:
    """Probability of a class before each sampled token, NaN where forced."""
    places = np.searchsorted(_chosen(job), members)
    found = []
    for answer, forced in zip(answers, job.forced):
        if answer is None:
            found.append(np.zeros(0, np.float32))
            continue
        sure = np.isin(answer.tokens, members).astype(np.float32)
        mass = sure if job.temperature == 0 else np.minimum(answer.chosen[:, places].sum(axis=1), 1.0)
        found.append(np.concatenate([np.full(len(forced), np.nan, np.float32), mass]).astype(np.float32))
    return found


@contextmanager
def _pool(size: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are not waited for when something goes wrong, such as Ctrl-C."""
    pool = ThreadPoolExecutor(size, thread_name_prefix="markovsafety-server")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _answered(waiting: dict[Future[Answer], int], concurrency: int) -> Iterator[tuple[int, Answer | MarkovsafetyError]]:
    """Rollouts as they are done. No more are asked for once the server is seen to be lost: after `LOST` failures in a
    row, or as many as there are requests at a time, or one that all others would share; those under way still count."""
    row, lost = 0, max(LOST, concurrency)
    for future in as_completed(waiting):
        if future.cancelled():
            continue
        error = future.exception()
        if error is None:
            row = 0
            yield waiting[future], future.result()
            continue
        if not isinstance(error, MarkovsafetyError):
            raise error
        row += 1
        if row >= lost or not isinstance(error, ServerError) or error.final:
            for other in waiting:
                other.cancel()
        yield waiting[future], error


def _unanswered(failed: dict[int, MarkovsafetyError], asked: int, output: Output) -> MarkovsafetyError:
    """The error of a run in which requests failed: a fault in what was agreed on, else the commonest one."""
    done = sum(len(tokens) > 0 for tokens in output.tokens)
    wrong = [error for error in failed.values() if not isinstance(error, ServerError)]
    fact, count = Counter(error.fact for error in wrong or failed.values()).most_common(1)[0]
    worst = next(error for error in failed.values() if error.fact == fact)
    if wrong or not done:
        worst.partial = output
        return worst
    return UntrustedError(
        f"{asked - done} of {asked} rollouts got no answer: {fact}" + (f" ({count} times)" if count > 1 else ""),
        cause=f"{worst.cause}; the {done} that did may be the shorter ones, so they are no fair sample",
        next=f"{worst.next}; with out=<folder> the same call goes on with the shards that are missing",
        partial=output,
    )


def open_engine(
    model: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int | None = None,
    served: str | None = None,
    tokenizer: str | Path | None = None,
    concurrency: int = 16,
    timeout: float = 120.0,
    retries: int = 5,
    retokenize: bool = False,
) -> ServerEngine:
    """Get to know a server.

    Parameters
    ----------
    model : str
        Its base address, such as ``http://127.0.0.1:8000/v1``. An API key is taken from the environment
        (``MARKOVSAFETY_API_KEY``, else ``OPENAI_API_KEY``) and written nowhere.
    dtype, device, batch_size
        The server's own affair: to be left alone.
    served : str, optional
        Name of the model at the server; by default the only one that it lists.
    tokenizer : str or Path, optional
        Folder or hub id of the model's tokenizer and chat template; by default where the server says that it loaded the
        model from, or the served name.
    concurrency : int
        Requests under way at a time.
    timeout : float
        Seconds for one answer.
    retries : int
        Further tries of a request that failed for a reason that may pass; see `server_client`.
    retokenize : bool
        Whether to accept a server that gives text and no token ids. Its answers are then encoded anew.

    Raises
    ------
    InputError
        Options that make no sense, or several models and none named.
    ModelError
        The server cannot be reached, refuses, gives no token ids, or its model has another tokenizer.
    """
    _check_options(dtype, device, batch_size, concurrency, timeout, retries)
    connection = Connection(str(model), float(timeout), int(retries))
    with connection.open() as session:
        card = chosen(session, served)
        template = template_of(tokenizer, card, connection.url)
        found = offers(session, card["id"], template)
    if found.output == "text" and not retokenize:
        raise ModelError(
            f"the server at {connection.url} gives no token ids",
            cause="text encoded anew is not always what was sampled: words are cut into other tokens, special tokens "
            "are lost, and so are the log-probabilities",
            next="use vLLM or SGLang, or accept that with retokenize=True (--retokenize)",
        )
    vocab_size, context = limits(template, card)
    owner = card.get("owned_by")
    owner = owner if isinstance(owner, str) else None
    return ServerEngine(connection, card["id"], template, found, vocab_size, context, concurrency, owner)


def _check_options(dtype: Any, device: Any, batch_size: Any, concurrency: Any, timeout: Any, retries: Any) -> None:
    theirs = {"dtype": dtype != "float32" and dtype, "device": device, "batch_size": batch_size}
    if given := {name: value for name, value in theirs.items() if value}:
        raise InputError(
            f"a server is told {', '.join(f'{name}={value!r}' for name, value in given.items())}",
            cause="the server that runs the model has chosen its devices, types and batches",
            next="start the server so, and leave this out; concurrency says how many requests are under way",
        )
    for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise InputError(
                f"{name} is {value!r}", cause="it counts requests", next=f"give an integer >= {least}, such as 16 or 5"
            )
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < float("inf"):
        raise InputError(
            f"timeout is {timeout!r}", cause="it is the seconds that an answer may take", next="give a number > 0"
        )
