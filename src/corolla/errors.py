"""Every error that Corolla raises on purpose.

CorollaError
 x CallerError                 the caller's fault: no retry helps, no server is blamed
   . InvalidSetting            a setting outside its range
   . EmptyPrompt               nothing to go on from
   . PromptTooLong             more tokens than the context holds
   . ModelNotFound             no such alias, directory or hub id (or no network to fetch it)
   . UnsupportedModel          a family or a variant that Corolla has no mathematics for
   . Unauthorized              a peer or caller that does not prove that it knows the secret
   . CheckpointError           a model's files are missing, damaged, of the wrong shape, or pickled
   . DataError                 a file of training data is missing, damaged, or of no known format
   . PromptError               a soft prompt's files are missing or damaged, or it does not fit the model
   . TrainingError             training cannot go on: it diverged, or what it would go on from is damaged
   . Interrupted               the caller went away, or stopped the answer
   . Conflict                  what is asked for does not fit the state that the thing is in
   . AdapterError              a LoRA adapter's files are missing or damaged, it does not fit the model, or nobody has one of that name
 x CapacityError               the callee is full: come back after `retry_after` seconds
   . Busy
   . RateLimited               more requests than this key may make
   . NoRoute                   no servers with room hold every block: `missing` are the spans to wait for
 x ServerFault                 a server failed: the step is retried elsewhere
   . ProtocolError             a peer sent bytes that are no frame
 x NetworkError                a message did not arrive: retried until the deadline
   . DeadlineExceeded
 x Forgotten                   the callee no longer has what the caller named: say it again in full
   . PromptNeeded              a soft prompt
   . AdapterNeeded             a LoRA adapter
   . ActivationsGone           what a forward left for its backward
 x StorageError                this machine's disk refused a write

Each carries the HTTP `status` that the gateway answers with, and one sentence that says what to do.
"""

from __future__ import annotations

from typing import Any


class CorollaError(Exception):
    """The root of the tree."""

    status = 500


class CallerError(CorollaError):
    status = 400


class InvalidSetting(CallerError):
    """A setting outside its range; `setting` is its name."""

    status = 422

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"{setting}: {problem}")
        self.setting = setting


class EmptyPrompt(CallerError):
    status = 422

    def __init__(self) -> None:
        super().__init__("the prompt is empty: give at least one character")


class PromptTooLong(CallerError):
    """`tokens` of prompt do not fit a context of `limit`."""

    status = 413

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"the prompt has {tokens} tokens and the context holds {limit}, an answer included: shorten it")
        self.tokens = tokens
        self.limit = limit


class ModelNotFound(CallerError):
    status = 404


class UnsupportedModel(CallerError):
    pass


class CheckpointError(CallerError):
    pass


class DataError(CallerError):
    pass


class PromptError(CallerError):
    """A soft prompt that is missing, damaged, not finite, or of another model."""

    status = 422


class AdapterError(CallerError):
    """A LoRA adapter that is missing, damaged, not finite, of another model, or of a kind that is not computed."""

    status = 422


class TrainingError(CallerError):
    pass


class Unauthorized(CallerError):
    status = 401


class Interrupted(CallerError):
    status = 499

    def __init__(self) -> None:
        super().__init__("the answer was stopped by its caller")


class Conflict(CallerError):
    status = 409


class CapacityError(CorollaError):
    status = 503

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Busy(CapacityError):
    status = 429

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"all places are taken: try again in {retry_after:g} s", retry_after)


class RateLimited(CapacityError):
    status = 429

    def __init__(self, per_minute: float, retry_after: float) -> None:
        super().__init__(f"this key may make {per_minute:g} requests a minute: try again in {retry_after:.1f} s", retry_after)


class NoRoute(CapacityError):
    """No route covers the blocks of `missing`, a tuple of `types.Span`."""

    def __init__(self, missing: tuple[Any, ...], retry_after: float = 1.0, *, adapter: str = "") -> None:
        blocks = ", ".join(map(str, missing))
        with_it = f" with the adapter {adapter[:12]}" if adapter else ""
        super().__init__(
            f"no server that is ready and has room holds blocks {blocks}{with_it}: wait for one, or start one that does", retry_after
        )
        self.missing = missing


class ServerFault(CorollaError):
    status = 502


class ProtocolError(ServerFault):
    """A peer sent bytes that are no frame."""


class NetworkError(CorollaError):
    status = 503


class DeadlineExceeded(NetworkError):
    status = 504


class Forgotten(CorollaError):
    status = 503


class PromptNeeded(Forgotten):
    def __init__(self) -> None:
        super().__init__("the server does not have the soft prompt: send it, and the step again")


class AdapterNeeded(Forgotten):
    def __init__(self) -> None:
        super().__init__("the server does not have the adapter: send it, and the step again")


class ActivationsGone(Forgotten):
    def __init__(self) -> None:
        super().__init__("the server does not have the activations of the forward: send the backward with what entered it")


class StorageError(CorollaError):
    status = 507
