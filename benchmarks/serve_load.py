"""`gem-st serve` under load, against a chat server and an embedding server side by side.

    base=$(python examples/models.py smollm2-135m-instruct)
    python benchmarks/serve_load.py --checkpoint runs/demo/frozen --base $base

Clients ask one thing after the other: with a chance of 0.7 for an embedding of 64 tokens, else for an answer of 64
tokens. Each setting is a run of mixed load, then one of embeddings alone and one of chats alone by as many clients;
of `gem` the embedding of a conversation is timed last, cold and after its chat. Vectors are compared with those of
`encode`, answers with those of the other settings. Servers are processes of `--python`, where only
`gem-st[serve,lora]` should be installed: what is installed beside it, Sentence Transformers imports. Exits with 1 if a
request fails or a vector differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from openai import AsyncOpenAI

from gem_st.training.measures import describe_versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serve_load.jsonl"
NUM_TEXTS, NUM_QUESTIONS, NUM_TOKENS = 200, 40, 64
SHARE_OF_EMBEDDINGS = 0.7
LOADS = {"mixed": SHARE_OF_EMBEDDINGS, "embeddings alone": 1.0, "chats alone": 0.0}
"""Shares of embeddings."""
SETTINGS = ("gem", "gem --continuous-batching", "two", "two --continuous-batching", "two, MiniLM")


class Server(NamedTuple):
    """A process that listens."""

    process: subprocess.Popen
    port: int

    def memory(self) -> int:
        """MiB that the process and its children have in memory."""
        parent = psutil.Process(self.process.pid)
        return sum(child.memory_info().rss for child in [parent, *parent.children(recursive=True)]) >> 20


class Phase:
    """What clients saw in one run of a load."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"embedding": [], "chat": []}
        self.num_written = 0
        self.errors: list[str] = []
        self.answers: dict[str, set[str]] = {}
        self.deviation = 0.0
        self.memory: list[list[int]] = []
        self.length = 0.0

    def summary(self) -> dict[str, Any]:
        """Latencies in milliseconds, counts a second, memory in MiB."""
        found: dict[str, Any] = {"errors": len(self.errors), "deviation": self.deviation}
        for kind, seconds in self.seconds.items():
            if seconds:
                p50, p95 = np.percentile(seconds, [50, 95]) * 1000
                found[kind] = {"p50": round(p50), "p95": round(p95), "per_second": len(seconds) / self.length}
        found["requests_per_second"] = sum(map(len, self.seconds.values())) / self.length
        found["tokens_per_second"] = self.num_written / self.length
        fifth = max(1, len(self.memory) // 5)
        totals = [sum(each) for each in self.memory]
        found["memory"] = {
            "first_fifth": statistics.median(totals[:fifth]),
            "last_fifth": statistics.median(totals[-fifth:]),
            "most": max(totals),
            "each": self.memory[-1],
        }
        return found


def make_load(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Texts of 64 tokens, and questions that take long to answer; the same each time."""
    draw = random.Random(0)
    words = [word[1:] for word in sorted(tokenizer.get_vocab()) if word[0] == "Ġ" and word[1:].isalpha()]
    words = [word for word in words if word.islower() and len(word) > 3]
    texts = []
    for _ in range(NUM_TEXTS):
        ids = tokenizer(" ".join(draw.choices(words, k=NUM_TOKENS)))["input_ids"][:NUM_TOKENS]
        texts.append(tokenizer.decode(ids))
    pairs = [draw.sample(words, 2) for _ in range(NUM_QUESTIONS)]
    return texts, [f"Write a long story in which {first} and {second} matter." for first, second in pairs]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def running(command: list[str], port: int) -> Iterator[Server]:
    """A server that is ready."""
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env.pop("OMP_NUM_THREADS", None)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:
                    if process.poll() is not None:
                        log.seek(0)
                        raise RuntimeError(log.read().decode()) from None
                    time.sleep(0.2)
            yield Server(process, port)
        finally:
            process.terminate()
            process.wait(30)


def commands_of(setting: str, args: argparse.Namespace, ports: list[int]) -> list[list[str]]:
    """The servers of a setting: for chats, and for embeddings if that is another."""
    is_batched = "--continuous-batching" in setting
    if setting.startswith("gem"):
        options = ["--dtype", args.dtype, "--cache-gib", str(args.cache_gib), "--name", "model"]
        command = [args.python, "-m", "gem_st.cli", "serve", args.checkpoint, "--port", str(ports[0]), *options]
        return [[*command, *(["--continuous-batching"] if is_batched else [])]]
    options = ["--dtype", args.dtype, "--device", "cpu"]
    if is_batched:
        options += ["--continuous-batching", "--cb-num-blocks", str(args.num_blocks)]
    chat = [str(Path(args.python).parent / "transformers"), "serve", args.base, "--port", str(ports[0]), *options]
    model = args.minilm if "MiniLM" in setting else args.checkpoint
    return [chat, [args.python, str(ROOT / "benchmarks/st_server.py"), model, str(ports[1]), args.dtype]]


class Clients:
    """Clients of the servers of one setting."""

    def __init__(self, setting: str, servers: list[Server], args: argparse.Namespace, load: Any) -> None:
        self.servers = servers
        self.args = args
        self.texts, self.questions = load
        self.expected = None if "MiniLM" in setting else np.load(args.vectors)
        urls = [f"http://127.0.0.1:{server.port}/v1" for server in (servers[0], servers[-1])]
        self.chat, self.embed = (AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=300) for url in urls)
        self.model = "model" if setting.startswith("gem") else args.base

    async def run(self, share: float, seconds: float) -> Phase:
        """Load for some time; what was begun is finished."""
        phase, start = Phase(), time.monotonic()
        end = start + seconds
        watching = asyncio.ensure_future(self._watch(phase))
        await asyncio.gather(*(self._go_on(phase, share, end, seed) for seed in range(self.args.clients)))
        phase.length = time.monotonic() - start
        watching.cancel()
        return phase

    async def close(self) -> None:
        """Close connections."""
        await self.chat.close()
        await self.embed.close()

    async def _watch(self, phase: Phase) -> None:
        while True:
            phase.memory.append([server.memory() for server in self.servers])
            await asyncio.sleep(1)

    async def _go_on(self, phase: Phase, share: float, end: float, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            kind = "embedding" if draw.random() < share else "chat"
            start = time.monotonic()
            try:
                await (self._embed if kind == "embedding" else self._ask)(phase, draw)
            except Exception as error:
                phase.errors.append(f"{kind}: {error!r}")
            else:
                phase.seconds[kind].append(time.monotonic() - start)

    async def _embed(self, phase: Phase, draw: random.Random) -> None:
        index = draw.randrange(len(self.texts))
        done = await self.embed.embeddings.create(model=self.model, input=self.texts[index], encoding_format="float")
        if self.expected is not None:
            difference = np.abs(np.array(done.data[0].embedding) - self.expected[index]).max()
            phase.deviation = max(phase.deviation, float(difference))

    async def _ask(self, phase: Phase, draw: random.Random) -> None:
        question = draw.choice(self.questions)
        messages: Any = [{"role": "user", "content": question}]
        done = await self.chat.chat.completions.create(
            model=self.model, messages=messages, max_tokens=NUM_TOKENS, temperature=0
        )
        phase.num_written += done.usage.completion_tokens
        phase.answers.setdefault(question, set()).add(done.choices[0].message.content)


def time_conversations(clients: Clients, rounds: int = 3) -> dict[str, float]:
    """Seconds for the embedding of a conversation of about 1,000 tokens: never read before, and after its chat."""

    async def embed(messages: list[dict[str, str]]) -> float:
        start = time.monotonic()
        body = {"model": clients.model, "messages": messages}
        await clients.embed.post("/embeddings", body=body, cast_to=object)
        return time.monotonic() - start

    async def run() -> dict[str, float]:
        found: dict[str, list[float]] = {"cold": [], "after its chat": []}
        for index in range(rounds):
            texts = [" ".join(clients.texts[15 * part :][:15]) for part in (2 * index, 2 * index + 1)]
            cold, chatted = ([{"role": "user", "content": text}] for text in texts)
            found["cold"].append(await embed(cold))
            await clients.chat.chat.completions.create(model=clients.model, messages=chatted, max_tokens=2)
            found["after its chat"].append(await embed(chatted))
        await clients.close()
        return {name: statistics.median(seconds) for name, seconds in found.items()}

    return asyncio.run(run())


def measure(setting: str, args: argparse.Namespace, load: Any) -> tuple[dict[str, Any], dict[str, set[str]]]:
    """All runs of one setting, and the answers."""
    with ExitStack() as stack:
        ports = [free_port(), free_port()]
        commands = commands_of(setting, args, ports)
        servers = [stack.enter_context(running(command, port)) for command, port in zip(commands, ports, strict=False)]
        clients = Clients(setting, servers, args, load)

        async def run_all() -> dict[str, Phase]:
            await clients.run(SHARE_OF_EMBEDDINGS, args.seconds / 10)  # what is only needed once, is loaded
            found = {}
            for name in args.loads:
                seconds = args.seconds if name == "mixed" else args.seconds / 5
                found[name] = await clients.run(LOADS[name], seconds)
            await clients.close()
            return found

        phases = asyncio.run(run_all())
        conversation = time_conversations(Clients(setting, servers, args, load)) if setting == "gem" else None
    errors = [error for phase in phases.values() for error in phase.errors]
    print("\n".join(errors[:5]), end="\n" if errors else "")
    answers: dict[str, set[str]] = {}
    for phase in phases.values():
        for question, texts in phase.answers.items():
            answers.setdefault(question, set()).update(texts)
    found = {name: phase.summary() for name, phase in phases.items()}
    return {"setting": setting, "conversation": conversation, **found}, answers


def write_vectors(args: argparse.Namespace, texts: list[str]) -> None:
    """What `encode` gives, from a process of its own."""
    code = (
        "import json, sys, numpy as np\nfrom sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({args.checkpoint!r}, device='cpu', trust_remote_code=True, "
        f"model_kwargs={{'dtype': {args.dtype!r}}})\n"
        f"np.save({args.vectors!r}, model.encode(json.load(sys.stdin)))"
    )
    subprocess.run([args.python, "-c", code], input=json.dumps(texts), text=True, check=True, cwd=ROOT)


def count_equal(answers: dict[str, set[str]], others: dict[str, set[str]]) -> str:
    """Questions that both answered with one and the same text, of those that both were asked."""
    common = answers.keys() & others.keys()
    return f"{sum(answers[question] == others[question] for question in common)} of {len(common)}"


def print_table(results: list[dict[str, Any]]) -> None:
    print("\n| setting | load | requests/s | tokens/s | embedding p50, p95 ms | chat p50, p95 ms | MiB first, last |")
    print("|---|---|---|---|---|---|---|")
    for result in results:
        for load in [name for name in LOADS if name in result]:
            phase, cells = result[load], []
            for kind in ("embedding", "chat"):
                cells.append("{p50}, {p95}".format(**phase[kind]) if kind in phase else "")
            memory = "{first_fifth:.0f}, {last_fifth:.0f}".format(**phase["memory"])
            rates = f"{phase['requests_per_second']:.2f} | {phase['tokens_per_second']:.1f}"
            print(f"| {result['setting']} | {load} | {rates} | {cells[0]} | {cells[1]} | {memory} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a GEM checkpoint")
    parser.add_argument("--base", required=True, help="folder of its base, for the chat server")
    parser.add_argument("--minilm", help="folder of all-MiniLM-L6-v2, for the last setting")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the servers")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS[:4]), choices=SETTINGS)
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=LOADS)
    parser.add_argument("--seconds", type=float, default=300, help="of mixed load")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache-gib", type=float, default=0.25)
    parser.add_argument("--num-blocks", type=int, default=24, help="of 256 tokens, for continuous batching of stock")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    args.checkpoint, args.base = str(Path(args.checkpoint).resolve()), str(Path(args.base).resolve())
    load = make_load(AutoTokenizer.from_pretrained(args.base))
    results, answers = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        args.vectors = f"{scratch}/vectors.npy"
        write_vectors(args, load[0])
        for setting in args.settings:
            result, answers[setting] = measure(setting, args, load)
            first = next(iter(answers))
            result["answers_equal_to_first"] = count_equal(answers[setting], answers[first])
            results.append(result)
            print(json.dumps(result), flush=True)
    given = {name: value for name, value in vars(args).items() if name not in ("vectors", "python")}
    given |= {name: Path(given[name]).name for name in ("checkpoint", "base", "minilm") if given[name]}
    given["threads_of_a_server"] = os.cpu_count()
    with RESULTS.open("a") as file:
        file.write(json.dumps({"args": given, "versions": describe_versions(), "results": results}) + "\n")
    print_table(results)
    phases = [result[load] for result in results for load in args.loads]
    return int(any(phase["errors"] or phase["deviation"] > 1e-4 for phase in phases))


if __name__ == "__main__":
    sys.exit(main())
