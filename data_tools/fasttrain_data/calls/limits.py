"""How fast calls may start: requests and tokens per minute, pauses the server asks for. No clock of its own."""

from __future__ import annotations

from collections import deque

# A minute and a bit: calls reach the server a little later than they start, not all by the same delay.
_WINDOW_S = 60.5
# How much of the steady pace may be caught up after a hold-up. The window below still bounds every minute.
_CATCH_UP_S = 2.0


class Limiter:
    """Paces starts evenly, and never lets more than `rpm` calls or `tpm` tokens into any minute.

    None means unlimited. All times are seconds of one monotonic clock, given by the caller.
    """

    def __init__(self, rpm: float | None = None, tpm: int | None = None) -> None:
        self.rpm, self.tpm = rpm, tpm
        self._interval_s = _WINDOW_S / rpm if rpm else 0.0
        self._next_s: float | None = None
        self.paused_until_s = float("-inf")
        self._starts: deque[tuple[float, int]] = deque()
        self._tokens = 0

    def wait_s(self, now_s: float, tokens: int = 0) -> float:
        """Seconds until a call of about `tokens` tokens may start; 0 means now."""
        self._forget(now_s)
        wait = max(0.0, self.paused_until_s - now_s)
        if self.rpm:
            if self._next_s is not None:
                wait = max(wait, self._next_s - now_s)
            if len(self._starts) >= max(1, int(self.rpm)):
                wait = max(wait, self._starts[0][0] + _WINDOW_S - now_s)
        if self.tpm:
            wait = max(wait, self._token_wait_s(now_s, tokens))
        return wait

    def start(self, now_s: float, tokens: int = 0) -> None:
        """Count a call that starts now."""
        if self.rpm:
            earliest = now_s - _CATCH_UP_S
            self._next_s = (
                max(self._next_s if self._next_s is not None else now_s, earliest) + self._interval_s
            )
        if self.rpm or self.tpm:
            self._starts.append((now_s, tokens))
            self._tokens += tokens

    def pause(self, until_s: float) -> None:
        """Let nothing start before `until_s`."""
        self.paused_until_s = max(self.paused_until_s, until_s)

    def _token_wait_s(self, now_s: float, tokens: int) -> float:
        """A call larger than the whole budget may start in an empty window, or it never could."""
        assert self.tpm is not None
        over, until_s = self._tokens + tokens - self.tpm, now_s
        for start_s, spent in self._starts:
            if over <= 0:
                break
            over, until_s = over - spent, start_s + _WINDOW_S
        return until_s - now_s

    def _forget(self, now_s: float) -> None:
        while self._starts and self._starts[0][0] <= now_s - _WINDOW_S:
            self._tokens -= self._starts.popleft()[1]
