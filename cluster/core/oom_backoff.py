"""Limits the size of steps after one that ran out of memory."""


class OomBackoff:
    """How many tokens and requests a step may have.

    A failure halves what failed, and the limits double again each time that some requests have ended. With every
    failure twice as many have to end, so that a lasting shortage costs less and less.
    """

    def __init__(self, max_tokens: int, max_requests: int) -> None:
        self._most = (max_tokens, max_requests)
        self.max_tokens, self.max_requests = self._most
        self._patience = 1  # requests that must end before the limits double
        self._num_awaited = 0  # of those

    def tighten(self, num_tokens: int, num_requests: int) -> None:
        """A step failed. If each of its requests ran one token, fewer requests must do; else fewer tokens, too."""
        if num_tokens > num_requests:
            self.max_tokens = min(self.max_tokens, num_tokens // 2)
        self.max_requests = min(self.max_requests, max(1, num_requests // 2))
        self._patience *= 2
        self._num_awaited = self._patience

    def note_end(self) -> None:
        """A request has ended."""
        if self._num_awaited == 0:
            return
        self._num_awaited -= 1
        if self._num_awaited == 0:
            self._relax()

    def _relax(self) -> None:
        most_tokens, most_requests = self._most
        self.max_tokens = min(most_tokens, 2 * self.max_tokens)
        self.max_requests = min(most_requests, 2 * self.max_requests)
        if (self.max_tokens, self.max_requests) == self._most:
            self._patience = 1
        else:
            self._num_awaited = self._patience
