"""How well each optimiser pretrains: perplexity on held-out tokens, memory, speed; one row each.

    python bench/pretrain_quality.py prepare --books FOLDER --tokenizer FOLDER --out tokens.bin
    python bench/pretrain_quality.py speed --data tokens.bin --batches 64,128,256
    python bench/pretrain_quality.py table --data tokens.bin --results runs.jsonl --cards 2 \\
        --limit-s 480
    python bench/pretrain_quality.py show --results runs.jsonl

`prepare` tokenises books on a CPU and packs as many tokens as fit into --max-mib (uint16, LZMA; the
held-out ones first). `speed` measures one row at several batch sizes, with and without CUDA graphs.

`table` is the protocol, the same for every row: learning rates sqrt(10) apart around the row's
guess with --tune-tokens each, and one beyond the best while the best is at an edge, up to
--max-tries; then a run with --tokens for each of --horizons, as long as each is better than the one
before. Its rate is where a parabola through the best three has its least loss (at most half a step
from the best), times (tune tokens / tokens) ** horizon. Longer runs are said to want smaller rates,
AdamW's by a power of 0.32 (Bjorck et al., arXiv 2409.19913); searches of a few hundred steps are so
short that here it is the other way round: 0, -0.215, -0.43 and -0.645 are once, twice, four and
eight times the rate. At the end more seeds of --seeded rows at the best horizon. Rates warm up over
a tenth and end at a tenth (cosine); seeds fix weights, order and noise.

One process a card runs one job after another, or more with --jobs: a row that is bound by its host
leaves most of a card idle; speeds in the table are of runs that were alone. Each finished run is a
line of --results at once, and what is there already is never run again: a later call goes on, with
more rows, seeds or tokens. No run starts that would, by the speed so far, end after --limit-s.
`show` prints the table. --tiny runs every row on random tokens in a small shape, on a CPU too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import lzma
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MARK = "@@"
GUESS_TOKENS_PER_S, GUESS_SETUP_S, MARGIN_S = 1.2e6, 2.0, 6.0
SHARED = ("shape", "rank", "batch", "length", "tune_tokens", "data")
FIRST_PLACES = (0, -1, 1)
PIECE = 20_000
EXTRA = ("q-galore", "adafactor", "low-rank")
"""Rows that wait until the others have their seeds."""


class Job(NamedTuple):
    """One run of the table. `place`: half decades from the row's guess, None for a long run, which
    has a `horizon` instead.
    """

    row: str
    place: int | None
    rate: float
    seed: int
    tokens: int
    horizon: float | None = None


# ---------------------------------------------------------------- what there is to do


class Table:
    """Which runs are wanted, from those that are done; a pure function of the results."""

    def __init__(self, options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
        self.options, self.results = options, results
        self.running: set[Job] = set()
        self.failed_now: set[Job] = set()

    def ready(self) -> Iterator[Job]:
        """Runs that could start now, the most wanted first."""
        for job in self._all():
            if job not in self.running and job not in self.failed_now and self.line(job) is None:
                yield job

    def _all(self) -> Iterator[Job]:
        rows = self.options.rows
        for row in rows:
            if row not in EXTRA:
                yield from self._searches(row)
                yield from self._first_long(row)
        for seed in range(1, self.options.seeds):
            for row in rows:
                if row in self.options.seeded:
                    yield from self._long(row, seed=seed, horizon=self.best_horizon(row))
        for row in rows:
            if row in EXTRA:
                yield from self._searches(row)
                yield from self._first_long(row)

    def _searches(self, row: str) -> Iterator[Job]:
        from pretrain_rows import ROWS

        for place in self._places(row):
            rate = ROWS[row][0] * 10 ** (place / 2)
            yield Job(row, place, _round(rate), 0, int(self.options.tune_tokens))

    def _places(self, row: str) -> list[int]:
        """Places to try, as far as is known by now."""
        places = list(FIRST_PLACES)
        while len(places) < self.options.max_tries:
            found = self._tried(row)
            if any(place not in found for place in places):
                break
            best = min(places, key=lambda place: found[place])
            if not math.isfinite(found[best]) or best not in (min(places), max(places)):
                break
            places.append(best + (1 if best == max(places) else -1))
        return places

    def _tried(self, row: str) -> dict[int, float]:
        """Place -> log perplexity of the row's searches; inf for what diverged or failed."""
        found: dict[int, float] = {}
        for line in self.results:
            if line["row"] == row and line["place"] is not None and self._is_ours(line):
                perplexity = line.get("perplexity")
                found[line["place"]] = math.log(perplexity) if perplexity else math.inf
        for job in self.failed_now:
            if job.row == row and job.place is not None:
                found.setdefault(job.place, math.inf)
        return found

    def _first_long(self, row: str) -> Iterator[Job]:
        """Of each horizon in turn, as long as the one before was better than those before it."""
        best = math.inf
        for horizon in self.options.horizons:
            for job in self._long(row, seed=0, horizon=horizon):
                yield job
                line = self.line(job)
                found = math.inf if line is None else line.get("perplexity") or math.inf
                if found >= best or line is None:
                    return
                best = found

    def _long(self, row: str, *, seed: int, horizon: float | None) -> Iterator[Job]:
        rate = None if horizon is None else self.best_rate(row, horizon)
        if rate is not None:
            yield Job(row, None, rate, seed, int(self.options.tokens), horizon)

    def best_horizon(self, row: str) -> float | None:
        """That of the row's better first run; None until all of these are done."""
        found = {}
        for job in self._first_long(row):
            line = self.line(job)
            if line is None:
                return None
            found[job.horizon] = line.get("perplexity") or math.inf
        return min(found, key=lambda horizon: found[horizon], default=None)

    def best_rate(self, row: str, horizon: float) -> float | None:
        """The rate of a long run; None before the search has ended, or where nothing worked."""
        from pretrain_rows import ROWS

        found, places = self._tried(row), self._places(row)
        if any(place not in found for place in places):
            return None
        best = min(places, key=lambda place: found[place])
        if not math.isfinite(found[best]):
            return None
        at = float(best)
        low, high = found.get(best - 1, math.inf), found.get(best + 1, math.inf)
        if math.isfinite(low) and math.isfinite(high):
            bend = low - 2 * found[best] + high
            at += max(-0.5, min(0.5, (low - high) / (2 * bend))) if bend > 0 else 0.0
        longer = self.options.tokens / self.options.tune_tokens
        return _round(ROWS[row][0] * 10 ** (at / 2) * longer**-horizon)

    def line(self, job: Job) -> dict[str, Any] | None:
        """What a finished run measured."""
        for line in self.results:
            same = all(
                line[key] == getattr(job, key) for key in ("row", "place", "seed", "horizon")
            )
            if same and line["asked_tokens"] == job.tokens and self._is_ours(line):
                return line
        return None

    def _is_ours(self, line: dict[str, Any]) -> bool:
        if line.get("failed"):
            return False
        own = shared(self.options)
        skipped = () if line["place"] is not None else ("tune_tokens",)
        return all(line[key] == own[key] for key in SHARED if key not in skipped)

    def seconds(self, job: Job) -> float:
        """What a run would take, from the row's runs, else from all, else guessed."""
        known = [line for line in self.results if not line.get("failed") and "seconds" in line]
        known = [line for line in known if line["batch"] == self.options.batch] or known
        own = [line for line in known if line["row"] == job.row] or known
        # A run that shares its card with others is as slow as all of them together.
        sharing = -(-self.options.jobs // self.options.cards)
        if not own:
            return GUESS_SETUP_S + sharing * job.tokens / GUESS_TOKENS_PER_S
        each = max(
            (line["wall_s"] - line["setup_s"]) / line["tokens"] / line.get("sharing", 1)
            for line in own[-2:]
        )
        return max(line["setup_s"] for line in own[-2:]) + sharing * each * job.tokens

    def left_s(self) -> float:
        """Card seconds of all runs that are wanted, those not known yet guessed."""
        known = list(self.ready())
        total = sum(self.seconds(job) for job in known)
        for row in self.options.rows:
            each = self.seconds(Job(row, None, 0.0, 0, int(self.options.tokens)))
            if self.best_rate(row, 0.0) is None:
                total += each * len(self.options.horizons)
            if row in self.options.seeded and self.best_horizon(row) is None:
                total += each * (self.options.seeds - 1)
        return total


def _round(rate: float) -> float:
    return float(f"{rate:.3g}")


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """What all lines of one table have in common."""
    return {
        "shape": options.shape,
        "rank": options.rank,
        "batch": options.batch,
        "length": options.length,
        "tune_tokens": int(options.tune_tokens),
        "data": options.data_name,
    }


# ---------------------------------------------------------------- running it


class Card:
    """A process that runs jobs on one card, started again if it dies."""

    def __init__(self, options: argparse.Namespace, number: int) -> None:
        self.options, self.number = options, number
        self.process: subprocess.Popen[str] | None = None

    def ask(self, job: Job) -> dict[str, Any]:
        """Run a job to its end; its line, with `failed` where it failed."""
        if self.process is None or self.process.poll() is not None:
            self.process = self._started()
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job._asdict()) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line[len(MARK) :])
                return found
            print(line, end="", file=sys.stderr)
        return {"failed": f"the process ended with {self.process.wait()}"}

    def end(self) -> None:
        """End the process."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()

    def _started(self) -> subprocess.Popen[str]:
        words = {key: value for key, value in vars(self.options).items() if key != "handler"}
        return subprocess.Popen(
            [sys.executable, __file__, "worker", json.dumps(words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": self._device()},
        )

    def _device(self) -> str:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = seen.split(",") if seen else [str(n) for n in range(self.options.cards)]
        return cards[self.number % len(cards)]


def table(options: argparse.Namespace) -> None:
    """Run what is missing, on all cards, until all is done or the time is up."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options.tokens_file, options.data_name = _unpacked(options, Path(folder))
        path = Path(options.results)
        wanted = Table(options, _read(path))
        lock, changed = threading.Lock(), threading.Condition()

        def left_s() -> float:
            return options.limit_s - (time.monotonic() - began)

        def next_job() -> Job | None:
            """A run that ends in time; waits while another card may make one possible."""
            while True:
                with lock:
                    fits = [j for j in wanted.ready() if wanted.seconds(j) + MARGIN_S < left_s()]
                    if fits:
                        wanted.running.add(fits[0])
                        return fits[0]
                    if not wanted.running:
                        return None
                with changed:
                    changed.wait(0.5)

        def work(number: int) -> None:
            card = Card(options, number)
            while (job := next_job()) is not None:
                found = card.ask(job)
                line = {
                    **job._asdict(),
                    **shared(options),
                    "card": number % options.cards,
                    "sharing": -(-options.jobs // options.cards),
                    "asked_tokens": job.tokens,
                    **found,
                }
                with lock:
                    wanted.running.discard(job)
                    wanted.results.append(line)
                    if line.get("failed"):
                        wanted.failed_now.add(job)
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    told = _told(line)
                    needs = wanted.left_s() / options.jobs
                print(f"{told}  [{left_s():.0f} s left, needs {needs:.0f}]", flush=True)
                with changed:
                    changed.notify_all()
            card.end()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(options.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"left to do: {wanted.left_s():.0f} card seconds", flush=True)
    show(options)


def _told(line: dict[str, Any]) -> str:
    """A finished run in a few words."""
    kind = "long" if line["place"] is None else "search"
    words = f"{line['row']:22} {kind:6} rate {line['rate']:<8g} seed {line['seed']}"
    if line.get("failed"):
        return f"{words} FAILED {line['failed']}"
    return (
        f"{words} perplexity {line['perplexity'] or math.nan:8.2f} {line['tokens_per_s']:9,d} tok/s"
        f" {line['wall_s']:6.1f} s{'' if line['graphs'] else ' eager'}"
    )


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def worker(words: dict[str, Any]) -> None:
    """Run jobs, a JSON line each from standard input, and answer each with a line."""
    from pretrain_rows import Data, Run, Setting, release, train_once

    flat = np.load(words["tokens_file"], mmap_mode="r")
    header = flat[:4].astype(np.int64)
    num_held, vocabulary = int(header[0]) * 2**15 + int(header[1]), int(header[2])
    names = {field.name for field in dataclasses.fields(Setting)}
    setting = Setting(**{key: value for key, value in words.items() if key in names})
    data = Data.of(flat[4:], num_held=num_held, length=setting.length, vocabulary=vocabulary)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        run = Run(row=job.row, rate=job.rate, seed=job.seed, tokens=job.tokens)
        found: dict[str, Any]
        try:
            found = {"tokens": job.tokens, **train_once(run, setting, data)}
        except Exception as error:  # the table goes on without this run
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
        release()
        print(MARK + json.dumps(found), flush=True)


def speed(options: argparse.Namespace) -> None:
    """Tokens/s of one row at several batch sizes, with and without graphs."""
    from pretrain_rows import Data, Run, Setting, release, train_once

    with tempfile.TemporaryDirectory() as folder:
        file, _ = _unpacked(options, Path(folder))
        flat = np.load(file)
    header = flat[:4].astype(np.int64)
    num_held, vocabulary = int(header[0]) * 2**15 + int(header[1]), int(header[2])
    data = Data.of(flat[4:], num_held=num_held, length=options.length, vocabulary=vocabulary)
    for row in options.rows:
        for batch in map(int, options.batches.split(",")):
            for graphs in (True, False):
                setting = Setting(
                    shape=options.shape,
                    rank=options.rank,
                    batch=batch,
                    length=options.length,
                    graphs=graphs,
                    eval_rows=batch,
                )
                steps = options.steps
                run = Run(row=row, rate=1e-3, seed=0, tokens=steps * batch * options.length)
                told = {"row": row, "batch": batch, **train_once(run, setting, data)}
                print(json.dumps(told), flush=True)
                release()


# ---------------------------------------------------------------- data and the table as text


def prepare(options: argparse.Namespace) -> None:
    """Tokenise, validation first, and write as much of training as fits."""
    from tokenizers import Tokenizer

    folder = Path(options.tokenizer)
    tokenizer = Tokenizer.from_file(str(folder if folder.is_file() else folder / "tokenizer.json"))
    books = Path(options.books)
    held = _tokens(tokenizer, [books / "classics_val.txt.xz"], limit=options.eval_tokens)
    parts = sorted(books.glob("classics_train_*.txt.xz"))
    skipped = int(options.skip_tokens)
    train = _tokens(tokenizer, parts, limit=skipped + int(options.max_mib * 2**20))[skipped:]
    pack(options, held, train, vocabulary=tokenizer.get_vocab_size())


def pack(
    options: argparse.Namespace, held: np.ndarray, train: np.ndarray, *, vocabulary: int
) -> None:
    """Write the file: a JSON line, then LZMA of uint16 ids; about one byte a token."""
    limit = options.max_mib * 2**20
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1}]
    size = min(len(train), int(limit))
    while True:  # its share varies little: two or three tries
        flat = np.concatenate([held, train[:size]])
        packed = lzma.compress(flat.tobytes(), format=lzma.FORMAT_XZ, filters=filters)
        if len(packed) <= limit:
            break
        size = int(size * limit / len(packed) * 0.995)
    header = {"num_eval": len(held), "num_train": size, "vocabulary": vocabulary}
    Path(options.out).write_bytes(json.dumps(header).encode() + b"\n" + packed)
    print(json.dumps({**header, "mib": round(len(packed) / 2**20, 1)}), flush=True)


def _tokens(tokenizer: Any, files: list[Path], *, limit: int) -> np.ndarray:
    """Tokens of documents, each ended by the tokenizer's </s> (id 2)."""
    found: list[np.ndarray] = []
    count = 0
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") as stream:
            documents = stream.read().split("<|endofdoc|>\n")
        for document in documents:
            pieces = [document[i : i + PIECE] for i in range(0, len(document), PIECE)]
            for made in tokenizer.encode_batch(pieces, add_special_tokens=False):
                found.append(np.asarray(made.ids, dtype=np.uint16))
                count += len(made.ids)
            found.append(np.asarray([2], dtype=np.uint16))
            if count >= limit:
                return np.concatenate(found)[:limit]
    return np.concatenate(found)[:limit]


def _unpacked(options: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """A file that numpy maps (4 numbers, held-out, training tokens), and what names the data."""
    if options.data is None:
        assert options.tiny, "--data is needed"
        told = {"num_eval": 512, "num_train": 8192, "vocabulary": 512}
        flat = np.random.default_rng(0).geometric(0.1, 8704).clip(max=511).astype(np.uint16)
    else:
        first, *others = [_read_packed(Path(name)) for name in options.data.split(",")]
        assert not any(header["num_eval"] for header, _ in others), "held out in the first alone"
        told = dict(first[0])
        told["num_train"] += sum(header["num_train"] for header, _ in others)
        flat = np.concatenate([first[1], *(ids for _, ids in others)])
    high, low = divmod(told["num_eval"], 2**15)
    header = np.asarray([high, low, told["vocabulary"], 0], dtype=np.uint16)
    file = folder / "tokens.npy"
    np.save(file, np.concatenate([header, flat]))
    return str(file), f"{told['num_eval']}+{told['num_train']}"


def _read_packed(path: Path) -> tuple[dict[str, int], np.ndarray]:
    """What `pack` wrote: its header, and ids."""
    text, _, packed = path.read_bytes().partition(b"\n")
    return json.loads(text), np.frombuffer(lzma.decompress(packed), dtype=np.uint16)


def show(options: argparse.Namespace) -> None:
    """Print the table of the long runs: a line a row, batch, tokens and rate, over its seeds."""
    groups: dict[tuple[str, int, int, float], list[dict[str, Any]]] = {}
    known = _read(Path(options.results))
    for line in known:
        if line["place"] is None and not line.get("failed"):
            key = (line["row"], line["batch"], line["asked_tokens"], line["rate"])
            groups.setdefault(key, []).append(line)
    print(
        "| row | batch | tokens | rate | rank | perplexity | optimiser MiB | peak GiB | tokens/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (row, batch, tokens, rate), lines in groups.items():
        found = [line["perplexity"] for line in lines if line["perplexity"]]
        text = "diverged"
        if found:
            text = f"{statistics.mean(found):.2f}"
            if len(found) > 1:
                text += f" ({', '.join(f'{value:.2f}' for value in found)})"
        one = lines[-1]
        print(
            f"| {row} | {batch} | {tokens / 1e6:.0f} M | {rate:g} | {one['row_rank'] or '-'} | "
            f"{text} | {one['optimizer_mib']:.0f} | {one['reserved_gib'] or '-'} | "
            f"{_speed(known, one)} |"
        )


def _speed(known: list[dict[str, Any]], one: dict[str, Any]) -> str:
    """Tokens/s of a row's last run that had its card to itself, a long one if there is any."""
    alone = [
        line
        for line in known
        if line["row"] == one["row"]
        and line["batch"] == one["batch"]
        and not line.get("failed")
        and line.get("sharing", 1) == 1
    ]
    longest = max((line["tokens"] for line in alone), default=None)
    found = [line["tokens_per_s"] for line in alone if line["tokens"] == longest]
    return f"{found[-1]:,.0f}" if found else "-"


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker(json.loads(sys.argv[2]))
        return
    from pretrain_rows import ROWS

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prepare")
    make.add_argument("--books", required=True)
    make.add_argument("--tokenizer", required=True)
    make.add_argument("--out", required=True)
    make.add_argument("--max-mib", type=float, default=36)
    make.add_argument("--eval-tokens", type=int, default=500_000)
    make.add_argument("--skip-tokens", type=float, default=0, help="a further file begins there")
    make.set_defaults(handler=prepare)
    look = commands.add_parser("show")
    look.add_argument("--results", required=True)
    look.set_defaults(handler=show)
    for name, handler in (("table", table), ("speed", speed)):
        part = commands.add_parser(name)
        part.set_defaults(handler=handler)
        part.add_argument("--data", help="what prepare wrote; several files with commas")
        part.add_argument("--tiny", action="store_true", help="a small shape, on random tokens")
        part.add_argument("--shape", default="llama-60m")
        part.add_argument("--rank", type=int, default=128)
        part.add_argument("--batch", type=int, default=128)
        part.add_argument("--length", type=int, default=256)
        part.add_argument("--rows", help=f"names with commas (default: all of {', '.join(ROWS)})")
        if name == "speed":
            part.add_argument("--batches", default="64,128,256")
            part.add_argument("--steps", type=int, default=40)
            continue
        part.add_argument("--results", required=True, help="JSON lines, read and appended to")
        part.add_argument("--cards", type=int, default=1)
        part.add_argument("--jobs", type=int, help="runs at once (default: one a card)")
        part.add_argument("--limit-s", type=float, default=math.inf)
        part.add_argument("--tokens", type=float, default=200e6, help="of a long run")
        part.add_argument("--tune-tokens", type=float, default=8e6, help="of a rate that is tried")
        part.add_argument("--horizons", default="0,-0.215,-0.43,-0.645", help="powers, with commas")
        part.add_argument("--max-tries", type=int, default=5)
        part.add_argument("--seeds", type=int, default=3)
        part.add_argument("--seeded", default="galore-svd,galore-randomised,adamw")
        part.add_argument("--eval-rows", type=int, default=0, help="held-out rows (0: all)")
        part.add_argument("--no-graphs", dest="graphs", action="store_false")
    options = parser.parse_args()
    if options.command in ("table", "speed"):
        if options.tiny:
            words = {"shape": "tiny", "rank": 8, "batch": 4, "length": 32, "data": None}
            vars(options).update(words)
            vars(options).update({"tokens": 1024, "tune_tokens": 384, "batches": "2,4", "steps": 4})
        names = options.rows.split(",") if options.rows else list(ROWS)
        if options.command == "speed" and not options.rows:
            names = ["adamw"]
        unknown = set(names) - set(ROWS)
        if unknown:
            parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
        options.rows = names
        if options.command == "table":
            options.jobs = options.jobs or options.cards
            options.seeded = options.seeded.split(",")
            options.horizons = [float(power) for power in options.horizons.split(",")]
    options.handler(options)


if __name__ == "__main__":
    main()
