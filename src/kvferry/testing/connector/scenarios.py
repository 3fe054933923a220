"""The scenarios of a check: what a request can meet in its life, each in engines of its own.

A scenario returns a note for the report; what goes wrong it, the probes and the engine's end tell the session.
"""

from __future__ import annotations

from collections.abc import Callable

from kvferry.testing.connector.faults import Fault
from kvferry.testing.connector.trial import NotOffered, Trial

Scenario = Callable[[Trial], str]


def cold(trial: Trial) -> str:
    """Prompts that nobody has seen."""
    with trial.engine() as engine:
        for seed, num_tokens in enumerate((2 * trial.chunk + trial.block + 5, trial.chunk + 1, trial.block)):
            engine.ask(trial.prompt(num_tokens, seed))
    return f"{trial.num_hit_tokens} tokens found that an earlier run kept" if trial.num_hit_tokens else ""


def pool_hit(trial: Trial) -> str:
    """A prompt that the engine's own pool still has, alone and as the beginning of a longer one."""
    prompt = trial.prompt(3 * trial.chunk + 5)
    with trial.engine() as engine:
        engine.ask(prompt[: trial.chunk + trial.block + 3])
        found = engine.ask(prompt[: trial.chunk + trial.block + 3]).metrics.num_pool_tokens
        found += engine.ask(prompt).metrics.num_pool_tokens
    return f"{found} tokens from the pool"


def external_hit(trial: Trial) -> str:
    """A prompt that has left the pool, and one of which the pool has the beginning."""
    prompt = trial.prompt(3 * trial.chunk + trial.block + 5)
    with trial.engine() as engine:
        engine.ask(prompt)
        engine.ask_again(prompt, num_tokens=8)
        engine.ask_again(prompt[: trial.chunk + 3])
        engine.ask(prompt)
    return _hits(trial)


def chunked_prefill(trial: Trial) -> str:
    """Prompts that are computed over several passes, which end within blocks."""
    prompt = trial.prompt(3 * trial.chunk + trial.block + 5)
    with trial.engine(max_num_tokens=trial.chunk // 2 + trial.block // 2 + 1) as engine:
        engine.ask(prompt[: 2 * trial.chunk + 5])
        engine.ask_again(prompt[: 2 * trial.chunk + 5])
        engine.ask_again(prompt)
        engine.ask_again(prompt)
    return _hits(trial)


def asynchronous(trial: Trial) -> str:
    """Loads beside the passes, while another request runs and others load."""
    prompts = [trial.prompt(trial.chunk + trial.block + 5, seed) for seed in range(2)]
    with trial.engine() as engine:
        for prompt in prompts:
            engine.ask(prompt)
        engine.evict()
        running = engine.submit(trial.prompt(trial.block, seed=2), num_tokens=16)
        handles = [engine.submit(prompt) for prompt in prompts]
        for handle in (*handles, running):
            engine.result(handle)
    if not trial.session.saw_async:
        raise NotOffered("no match was asynchronous")
    return _hits(trial)


def two_ranks(trial: Trial) -> str:
    """Two processes, each with its share of the heads."""
    prompt = trial.prompt(2 * trial.chunk + trial.block + 5)
    trial.reference("llama").tokens(prompt, 6)
    with trial.engine(num_ranks=2) as engine:
        engine.ask(prompt)
        engine.ask_again(prompt, num_tokens=6)
    return _hits(trial)


def abort(trial: Trial) -> str:
    """Requests that are given up while they wait, are computed, generate and load."""
    prompt, other = trial.prompt(2 * trial.chunk + 5), trial.prompt(trial.chunk + 3, seed=1)
    with trial.engine(max_num_tokens=trial.chunk) as engine:
        handles = [engine.submit(prompt, num_tokens=64), engine.submit(other, num_tokens=64)]
        engine.wait_for(lambda: len(handles[0].output.token_ids) > 1)
        for handle in (*handles, engine.submit(prompt)):
            handle.abort()
        engine.ask(prompt)
        engine.evict()
        trial.session.saw_async = False
        loading = engine.submit(prompt)
        engine.wait_for(lambda: trial.session.saw_async or loading.output.finished)
        loading.abort()
        engine.ask(other)
        engine.ask_again(prompt)
    return "also while loading" if trial.session.saw_async else ""


def salt(trial: Trial) -> str:
    """One prompt under several salts: each finds its own alone."""
    prompt = trial.prompt(2 * trial.chunk + 5)
    with trial.engine() as engine:
        engine.ask(prompt)
        for name in ("a", "b"):
            engine.evict()
            engine.ask(prompt, salt=f"{name}-{trial.nonce}")
        engine.ask_again(prompt, salt=f"a-{trial.nonce}")
    return _hits(trial)


def prefix(trial: Trial) -> str:
    """Equal blocks after different prefixes, and the same block again and again: their KV differs."""
    size = trial.chunk
    first, second, shared = (trial.prompt(size, seed) for seed in range(3))
    tail = trial.prompt(5, seed=3)
    with trial.engine() as engine:
        for prompt in (first + shared, second, shared * 3):
            engine.ask(prompt + tail)
        for prompt in (second + shared, shared * 3, first + shared):
            engine.evict()
            engine.ask(prompt + tail)
    return _hits(trial)


def restart(trial: Trial) -> str:
    """The next engine, after the first has ended."""
    prompt = trial.prompt(2 * trial.chunk + 5)
    with trial.engine() as engine:
        engine.ask(prompt)
    with trial.engine() as engine:
        engine.ask(prompt)
    if trial.num_hit_tokens:
        return _hits(trial)
    if trial.options.expect_restart_hit:
        trial.session.found(Fault.NO_RESTART_HIT, f"the next engine found nothing of {len(prompt)} tokens")
    return "no hit after the restart, which is allowed"


def decode_blocks(trial: Trial) -> str:
    """A conversation: what was generated is part of the next prompt."""
    prompt = trial.prompt(trial.chunk - 9)
    with trial.engine() as engine:
        said = engine.ask(prompt, num_tokens=9 + trial.block + 3).token_ids
        longer = [*prompt, *said, *trial.prompt(trial.block, seed=1)]
        engine.evict()
        found = engine.ask(longer).metrics.num_connector_tokens
    kept = max(0, found - len(prompt) // trial.block * trial.block)
    return f"{kept} generated tokens found" if kept else "what was generated was not kept, which is allowed"


def interleaved(trial: Trial) -> str:
    """Many requests at once, of many lengths, some with a common beginning, twice."""
    size, block = trial.chunk, trial.block
    lengths = (1, block, block + 1, size - 1, size, size + 1, 2 * size, 2 * size + block + 3)
    prompts = [trial.prompt(length, seed=index % 3) for index, length in enumerate(lengths)]
    with trial.engine(max_num_tokens=size + block + 1) as engine:
        for order in (1, -1):
            handles = [engine.submit(prompt, num_tokens=3 + index) for index, prompt in enumerate(prompts[::order])]
            for handle in handles:
                engine.result(handle)
            engine.evict()
    return _hits(trial)


def block_multiple(trial: Trial) -> str:
    """Prompts of exactly one block, one chunk and two: the last token is computed all the same."""
    with trial.engine() as engine:
        for seed, num_tokens in enumerate((trial.block, trial.chunk, 2 * trial.chunk)):
            prompt = trial.prompt(num_tokens, seed)
            engine.ask(prompt)
            engine.evict()
            engine.ask(prompt)
    return _hits(trial)


def short(trial: Trial) -> str:
    """Prompts shorter than a block."""
    with trial.engine() as engine:
        for seed, num_tokens in enumerate((1, 2, trial.block - 1)):
            for _ in range(2):
                engine.ask(trial.prompt(num_tokens, seed))
    return ""


def layer_groups(trial: Trial) -> str:
    """A model with sliding windows in some layers: block ids and pools of several groups."""
    prompt = trial.prompt(2 * trial.chunk + trial.block + 5)
    with trial.engine(family="gemma3") as engine:
        engine.ask(prompt)
        engine.evict()
        engine.ask(prompt, num_tokens=8)
        engine.ask(prompt[: trial.chunk + 3])
        engine.ask(prompt)
    return _hits(trial)


def _hits(trial: Trial) -> str:
    return f"{trial.num_hit_tokens} tokens from the connector"


SCENARIOS: dict[str, Scenario] = {
    function.__name__.replace("_", "-"): function
    for function in (
        cold,
        pool_hit,
        external_hit,
        chunked_prefill,
        decode_blocks,
        block_multiple,
        short,
        salt,
        prefix,
        interleaved,
        asynchronous,
        abort,
        restart,
        layer_groups,
        two_ranks,
    )
}
"""By name, in the order in which they run."""
