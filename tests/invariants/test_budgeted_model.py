"""KV budgets against a model that keeps a set of tokens per request, and whole engines under them."""

from __future__ import annotations

from engine_cases import Case, cases, run_case
from engine_log import check_log
from hypothesis import given, settings
from hypothesis import strategies as st

from servesim.engine.scheduler import Scheduler
from servesim.engine.versions import RULES
from servesim.kv.budgeted import BudgetedKVCache, BudgetedSequence, HeavyHitterKVCache, SinkKVCache

NUM_BLOCKS = 400


class TokenSet:
    """The tokens of one request that are kept, by place, and how its blocks follow from them."""

    def __init__(self, prompt: int, budget: int, sinks: int | None, size: int) -> None:
        self.prompt, self.budget, self.sinks, self.size = prompt, budget, sinks, size
        self.tokens: set[int] = set()
        self.num_slots = 0
        self.packed = False

    def compute(self, more: int) -> None:
        """``more`` tokens are computed; before that, what is over the budget is dropped."""
        done = self.num_slots
        if self.sinks is not None:
            window = self.budget - self.sinks
            self.tokens = {t for t in self.tokens if t < self.sinks or t > done - window}
        elif done >= self.prompt:
            self.packed = True
            self.tokens = set(sorted(self.tokens)[-self.budget :])
        self.num_slots += more
        self.tokens |= set(range(done, self.num_slots))
        if self.packed:
            self.tokens = set(sorted(self.tokens)[-self.budget :])

    def num_blocks(self) -> int:
        if self.packed:
            return -(-len(self.tokens) // self.size)
        return len({token // self.size for token in self.tokens})

    def num_stale(self) -> int:
        """Slots of dropped tokens in blocks that are held for others, under sliding-sink."""
        held = {token // self.size for token in self.tokens}
        return sum(token // self.size in held for token in set(range(self.num_slots)) - self.tokens)


@st.composite
def _policies(draw: st.DrawFn) -> tuple[BudgetedKVCache, int | None]:
    size, budget = draw(st.integers(1, 5)), draw(st.integers(2, 30))
    if draw(st.booleans()):
        return HeavyHitterKVCache(NUM_BLOCKS, size, budget), None
    sinks = draw(st.integers(0, budget - 1))
    return SinkKVCache(NUM_BLOCKS, size, budget, sinks, 12), sinks


@settings(max_examples=300, deadline=None)
@given(
    _policies(),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), max_size=80),
)
def test_blocks_hold_the_tokens_that_are_kept(
    policy: tuple[BudgetedKVCache, int | None], prompts: list[int], steps: list[tuple[int, int]]
) -> None:
    kv, sinks = policy
    live: list[tuple[BudgetedSequence, TokenSet]] = [
        (kv.new_sequence((), prompt, None), TokenSet(prompt, kv.budget, sinks, kv.block_size))
        for prompt in prompts
    ]
    for which, more in steps:
        sequence, model = live[which % len(live)]
        decodes = model.num_slots >= model.prompt
        count = 1 if decodes else min(more, model.prompt - model.num_slots)
        if model.num_slots:
            kv.release(sequence, model.num_slots)
        free = kv.num_free_blocks
        needed = kv.num_blocks_needed(sequence, model.num_slots + count, None)
        kv.allocate(sequence, model.num_slots + count, None)
        assert free - kv.num_free_blocks == needed
        model.compute(count)
        assert len(sequence.blocks) == model.num_blocks()
        assert len(sequence.blocks) <= kv.most_blocks(max(model.num_slots, model.prompt))
        spans = kv.spans(sequence)
        assert sum(slots for first, slots in spans if first >= 0) == len(sequence.blocks) * kv.block_size
        assert kv.kept(sequence) == len(model.tokens)
        assert len(model.tokens) <= max(kv.budget + count - 1, model.prompt if sinks is None else 0)
        held = [block for each, _ in live for block in each.blocks]
        assert len(set(held)) == len(held), "no block belongs to two requests"
        assert 0 not in held
        usage = kv.account.usage(0, 0, *kv.levels())
        assert min(usage) >= 0
        assert usage.tokens == sum(len(each.tokens) for _, each in live)
        assert usage.internal == (sum(each.num_stale() for _, each in live) if sinks is not None else 0)
        assert sum(usage) - usage.logical == (NUM_BLOCKS - 1) * kv.block_size
    for sequence, _ in live:
        kv.free(sequence)
    assert kv.num_free_blocks == NUM_BLOCKS - 1, "no leak"
    assert kv.account.usage(0, 0, *kv.levels())[:5] == (0, 0, 0, 0, 0)


@settings(max_examples=150, deadline=None, report_multiple_bugs=False)
@given(cases(paged=True, caching=False), st.integers(2, 40), st.booleans(), st.integers(0, 5))
def test_engines_serve_everybody_within_the_budget(case: Case, budget: int, sink: bool, sinks: int) -> None:
    kv: BudgetedKVCache
    if sink:
        chunk = case.limits.max_num_batched_tokens * case.pipeline_depth
        kv = SinkKVCache(case.num_blocks, case.block_size, budget, min(sinks, budget - 1), chunk)
    else:
        kv = HeavyHitterKVCache(case.num_blocks, case.block_size, budget)
    scheduler = Scheduler(case.limits, RULES[case.version], kv, case.law.windows)
    check_log(case, run_case(case, scheduler))
    assert kv.num_free_blocks == case.num_blocks - 1, "no leak"
