"""Random plans of any shape that a StepPlan allows."""

from hypothesis import strategies as st

from codesign.engine.step import StepPlan


@st.composite
def plans(draw: st.DrawFn, max_sequences: int = 6) -> StepPlan:
    count = draw(st.integers(1, max_sequences))
    lens = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    num_tokens = sum(lens)
    rows = draw(st.sets(st.integers(0, num_tokens - 1)))
    tokens = st.lists(st.integers(0, 99), min_size=num_tokens, max_size=num_tokens)
    is_paged = draw(st.booleans())
    blocks = st.lists(st.lists(st.integers(0, 99), max_size=3).map(tuple), min_size=count, max_size=count)
    return StepPlan(
        commits=tuple(draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=4))),
        truncates=tuple(draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2))),
        frees=tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
        slots=tuple(draw(st.permutations(range(max_sequences)))[:count]),
        query_lens=tuple(lens),
        token_ids=tuple(draw(tokens)),
        positions=tuple(draw(tokens)),
        is_prompt=tuple(draw(flags)),
        is_prompt_end=tuple(draw(flags)),
        logits_rows=tuple(sorted(rows)),
        blocks=tuple(draw(blocks)) if is_paged else (),
        num_cached=tuple(draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))) if is_paged else (),
    )
