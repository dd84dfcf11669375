"""What can go wrong in a reply, by name, and who decides when it does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Literal

Fault = str
# (content hash of the request, how often that request has come before) -> a name from FAULTS, or None
Faults = Callable[[str, int], Fault | None]

# No reply: the HTTP status, or the connection, fails.
TRANSPORT: dict[Fault, str] = {
    "rate_limit": "429 with RetryInfo",
    "rate_limit_header": "429 with Retry-After only",
    "daily_quota": "429 for a quota per day",
    "server_error": "500",
    "unavailable": "503",
    "timeout": "no answer for `timeout_s`, then the connection is closed",
    "disconnect": "the connection is closed at once",
    "bad_request": "400 INVALID_ARGUMENT",
    "bad_image": "400: unable to process input image",
    "bad_key": "400: API key not valid",
    "forbidden": "403",
    "not_found": "404",
    "html": "502 with an HTML page for a body",
    "not_json_body": "200 with a body that is not JSON",
}
# A reply, paid for, that is of no use or needs care.
CONTENT: dict[Fault, str] = {
    "blocked_prompt": "no candidate, promptFeedback.blockReason SAFETY",
    "blocked_answer": "finishReason SAFETY without content",
    "recitation": "finishReason RECITATION",
    "max_tokens": "finishReason MAX_TOKENS, text cut",
    "max_tokens_thinking": "finishReason MAX_TOKENS, all of it spent on thoughts, no text",
    "empty": "finishReason STOP without text",
    "cut_json": "finishReason STOP, JSON cut in the middle",
    "prose": "text that is no JSON",
    "fenced": "JSON in a Markdown fence; usable",
    "missing_answer": "one answer is not graded",
    "extra_answer": "one more answer than asked",
    "missing_score": "one score is left out",
    "out_of_range": "a score of 7",
    "float_score": "a score of 2.5",
    "string_score": 'a score of "3"',
    "constant": "the same scores for all; usable",
    "thoughts": "a thought in front of the reply, marked as one; usable",
    "reversed": "answers listed last to first, numbered; usable",
}
FAULTS: dict[Fault, str] = TRANSPORT | CONTENT
Kind = Literal["transport", "content"]


def fault_free(key: str, attempt: int) -> Fault | None:
    return None


class FaultMix:
    """Each fault for its share of the requests, chosen by the request's content, so that reruns meet the same.

    first_attempts: a transport fault strikes that many times before the request goes through; None: always.
    """

    def __init__(self, shares: Mapping[Fault, float], seed: int = 0, first_attempts: int | None = 1) -> None:
        unknown = set(shares) - set(FAULTS)
        if unknown or sum(shares.values()) > 1:
            raise ValueError(f"shares: wanted names from FAULTS with a sum of at most 1, got {dict(shares)}")
        self.shares, self.seed, self.first_attempts = dict(shares), seed, first_attempts

    def __call__(self, key: str, attempt: int) -> Fault | None:
        digest = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()
        at = int.from_bytes(digest[:8]) / 2**64
        for fault, share in self.shares.items():
            if at < share:
                passed = self.first_attempts is not None and attempt >= self.first_attempts
                return None if fault in TRANSPORT and passed else fault
            at -= share
        return None
