"""Speculation: which drafts run in a step, and what a request's state is once some of a draft has come true."""

from array import array

from eagleray.cluster.core.prompt_lookup import PromptLookup
from eagleray.cluster.core.request import Request
from eagleray.cluster.core.step_plan import StepPlan


class Speculation:
    """Drafts of up to `most` tokens, 0 for none, by prompt lookup.

    Ranks run a draft with the request's last token and draw a token at every place, by the noise of that place, as they
    would without it. The draft's tokens count as far as they are what was drawn, and so does the token drawn after
    them: a draft changes no token.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.num_draft_tokens = 0  # that were verified
        self.num_accepted_tokens = 0

    def new_lookup(self) -> PromptLookup | None:
        """What a new request's drafts come from."""
        return PromptLookup() if self._most else None

    def draft(self, request: Request, lookup: PromptLookup, budget: int, plan: StepPlan) -> "array[int]":
        """What may follow a request all of whose tokens are known; at most `budget` tokens, and often none."""
        known = len(request.token_ids)
        if request.was_drafted:
            assert request.row is not None
            plan.num_tokens[request.row] = known
            request.was_drafted = False
        most = min(self._most, request.max_computed_tokens - known, plan.num_draftable, budget)
        return lookup.draft(request.token_ids, max(0, most))

    @staticmethod
    def run(request: Request, draft: "array[int]", plan: StepPlan) -> None:
        """A draft, which is not empty, runs behind the request's last token, which is in the plan."""
        assert request.row is not None
        request.num_drafted = len(draft)
        request.num_computed_tokens += len(draft)
        plan.budget -= len(draft)
        plan.num_draftable -= len(draft)
        plan.uneven[request.row] = 1 + len(draft)
        plan.drafts[request.row] = draft.tobytes()

    def settle(self, request: Request, row: int, start: int, num_drawn: int, num_running: int) -> None:
        """A draft ran in this row from position `start`, and all but the last of `num_drawn` tokens came true.

        To be called before they are committed, so that nothing is published that was computed from a wrong token.
        """
        if request.row != row or not request.num_drafted:
            return  # it was preempted meanwhile, and begins anew
        self.num_draft_tokens += request.num_drafted
        self.num_accepted_tokens += num_drawn - 1
        if request.lookup is not None:
            worth = min(num_running, 2)  # a request that waits for its tokens misses a step of the others
            request.lookup.judge(request.num_drafted, num_drawn - 1, len(request.token_ids) + num_drawn, worth)
        request.num_computed_tokens = start + num_drawn
        request.num_drafted = 0
        request.was_drafted = True
