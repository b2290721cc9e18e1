"""What an engine has done and is doing, in numbers."""

from dataclasses import dataclass

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    """A look at an engine.

    Attributes:
        running: sequences that have a place in the steps.
        waiting: sequences that wait for one.
        parallel: how many places there are.
        pages_used: pages of the cache that running sequences have.
        pages_known: pages that nobody has, which still hold what was computed and may be taken over.
        pages_total: pages of the cache.
        page_tokens: tokens of a page.
        steps: how many were computed.
        busy_seconds: how long they took.
        prompt_tokens: tokens of prompts of all sequences that ended, whether computed or not.
        cached_tokens: how many of these were taken from earlier work.
        generated_tokens: tokens that were generated.
        drafted_tokens, accepted_tokens: guesses, and right ones.
        finished, cancelled, failed: sequences that ended, by how they did.
        preempted: how often a sequence gave its pages up for others.
    """

    running: int
    waiting: int
    parallel: int
    pages_used: int
    pages_known: int
    pages_total: int
    page_tokens: int
    steps: int
    busy_seconds: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    finished: int
    cancelled: int
    failed: int
    preempted: int
