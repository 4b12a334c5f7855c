"""Times a new token after an encoded context, beside transformers' `generate`.

    python bench/decode.py [--shape Llama-3-8B] [--dtype bfloat16] [--rows 800,4096]
                           [--sequences 1,8] [--tokens 16] [--repeats 3] [--out DIR]

Both have the same cache and the same random weights, and take turns. What a call does before its
second token (copying the cache, for example) does not count: the time of a call for one token is
subtracted from that of a call for many. Several sequences are decoded side by side. transformers
copies the cache for each; ours share one cache ("shared") or have a copy each too ("copies"). All
times are for a token of every sequence. Writes DIR/decode-SHAPE-DTYPE.csv after each case.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import torch  # noqa: E402
from encode import whole_numbers  # noqa: E402
from measure import ON_GPU, describe  # noqa: E402
from random_models import SHAPES, as_transformers, random_llama  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

import homer_triton as ht  # noqa: E402
from homer_triton.loading import DTYPES  # noqa: E402
from homer_triton.model.llama import Llama  # noqa: E402

Decode = Callable[[int], object]


@dataclass(frozen=True)
class Line:
    """One system after a cache of so many tokens (rows): the median, least and most milliseconds of
    a token of every sequence.
    """

    shape: str
    dtype: str
    system: str
    rows: int
    sequences: int
    median_ms: float
    low_ms: float
    high_ms: float
    device: str
    versions: str
    commit: str
    command: str


def context_of(model: Llama, shape: str, rows: int) -> ht.EncodedContext:
    """An encoded context of so many tokens, with random keys and values."""
    affix = SHAPES[shape].affix
    ids = torch.arange(3 * affix) % model.config.vocab_size
    config = ht.HomerConfig.paper()
    short = ht.encode(model, ids[affix:-affix], ids[:affix], ids[-affix:], config)
    layers, heads, _, dim = short.keys.shape
    keys, values = torch.randn(
        2, layers, heads, rows, dim, dtype=short.keys.dtype, device=short.keys.device
    )
    positions = torch.arange(rows, device=short.positions.device)
    return replace(
        short,
        keys=keys,
        values=values,
        positions=positions,
        source_indices=positions,
        next_position=rows,
    )


def ours(
    model: Llama, context: ht.EncodedContext, sequences: int, copies: bool, tokens: int
) -> None:
    # Encodings that are different objects do not share their cache.
    contexts = [replace(context) if copies else context for _ in range(sequences)]
    ht.generate_batch(model, contexts, max_new_tokens=tokens)


def theirs(peer: LlamaForCausalLM, context: ht.EncodedContext, sequences: int, tokens: int) -> None:
    first = context.logits.argmax().expand(sequences, 1)
    peer.generate(**context.to_transformers(first), max_new_tokens=tokens, do_sample=False)


def token_ms(decode: Decode, tokens: int) -> float:
    """Milliseconds of each token after the first."""
    seconds = []
    for count in (1, 1 + tokens):
        measure.synchronize()
        start = time.perf_counter()
        decode(count)
        measure.synchronize()
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / tokens * 1e3


def in_turn(systems: dict[str, Decode], tokens: int, repeats: int) -> dict[str, list[float]]:
    """The sorted times of every system, after a first call that sets it up."""
    for decode in systems.values():
        decode(2)
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, decode in systems.items():
            times[name].append(token_ms(decode, tokens))
    return {name: sorted(of) for name, of in times.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3-8B" if ON_GPU else "50M")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if ON_GPU else "float32")
    parser.add_argument("--ops", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument(
        "--rows", type=whole_numbers, default="800,4096", help="tokens in the cache"
    )
    parser.add_argument(
        "--sequences", type=whole_numbers, default="1,8", help="decoded side by side"
    )
    parser.add_argument("--tokens", type=int, default=16, help="new tokens that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    return parser.parse_args()


def main() -> int:
    args = parse()
    model = random_llama(args.shape, args.dtype, args.ops)
    peer = as_transformers(model)
    about, lines, failed = measure.about(), [], 0
    path = args.out / f"decode-{args.shape}-{args.dtype}.csv"
    for rows, sequences in ((r, s) for r in args.rows for s in args.sequences):
        try:
            context = context_of(model, args.shape, rows)
            systems: dict[str, Decode] = {
                "shared": partial(ours, model, context, sequences, False),
                "copies": partial(ours, model, context, sequences, True),
                "transformers": partial(theirs, peer, context, sequences),
            }
            if sequences == 1:  # the same as shared
                del systems["copies"]
            timed = in_turn(systems, args.tokens, args.repeats)
        except Exception as error:  # the other cases still run
            failed += 1
            print(f"{rows} rows, {sequences} sequences failed: {describe(error)}", flush=True)
            continue
        for name, times in timed.items():
            figures = (median(times), times[0], times[-1])
            lines.append(Line(args.shape, args.dtype, name, rows, sequences, *figures, *about))
            print(
                f"{rows:6} rows {sequences:3} sequences  {name:13} {figures[0]:8.2f} ms a token",
                flush=True,
            )
        measure.write_csv(path, lines)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
