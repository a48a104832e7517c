"""`corolla prepare` against the tokenizer alone on all cores, its memory on a large input, and how full greedy packing is.

python benchmarks/data.py                                     # dialogues made here; --data takes real ones
python benchmarks/data.py --data dolly.jsonl --memory 1GB
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from corolla.chat.templates import TEMPLATES, Turn
from corolla.cli.sizes import parse_size
from corolla.data.problems import Problems
from corolla.data.readers.read import read
from corolla.models.catalog import resolve

PAIRS = 3  # the one and the other in turn; the median counts
BATCH = 1000
WORDS = "the of a in is to and that it was for on are as with his they at be this have from or had by"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file of dialogues, as Dolly; made here by default")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--speed", default="100MB", help="the input of the comparison: the dialogues over and over")
    parser.add_argument("--memory", help="also measure the memory on an input of this size, as 1GB")
    arguments = parser.parse_args()
    tokenizer = resolve(arguments.model, weights=False)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        dialogues = Path(arguments.data) if arguments.data else made(directory / "made.jsonl")
        print(f"{os.cpu_count()} cores, {arguments.model}'s tokenizer, 2,048 tokens, greedy, {dialogues.name}", flush=True)
        figures = prepared(dialogues, directory / "utilization", tokenizer)
        print(f"utilization  {figures['parts']['train']['utilization']:.1%}")
        source = repeated(dialogues, directory / "speed.jsonl", parse_size("speed", arguments.speed))
        compare(source, directory, tokenizer)
        if arguments.memory:
            source = repeated(dialogues, directory / "memory.jsonl", parse_size("memory", arguments.memory))
            start = time.perf_counter()
            peak = peak_memory(source, directory / "memory", tokenizer)
            print(f"memory       {peak / 1e6:.0f} MB for all processes on {source.stat().st_size / 1e6:.0f} MB, shuffled on disk")
            print(f"             {time.perf_counter() - start:.0f} s")


def compare(source: Path, directory: Path, tokenizer: Path) -> None:
    """The command and the tokenizer alone, one after the other, and the medians' ratio. Both are processes, from start to end."""
    ours, alone = [], []
    for pair in range(PAIRS):
        start = time.perf_counter()
        tokens = prepared(source, directory / f"speed{pair}", tokenizer)["parts"]["train"]["rendered_tokens"]
        ours.append(tokens / (time.perf_counter() - start))
        alone.append(tokenizer_alone(source, tokenizer))
        print(f"             {ours[-1]:,.0f} tokens/s, the tokenizer alone {alone[-1]:,.0f}", flush=True)
    rate, best = sorted(ours)[PAIRS // 2], sorted(alone)[PAIRS // 2]
    print(f"speed        {rate:,.0f} tokens/s, the tokenizer alone {best:,.0f}: {rate / best:.2f}")


def tokenizer_alone(source: Path, tokenizer: Path) -> float:
    """Tokens/s of the library's own batches over all cores; the texts, the same as the command's, lie ready in memory."""
    texts = ["".join(map(spoken, example.turns)) for example in read(source, Problems())]
    code = (
        "import json, sys, time\n"
        "from tokenizers import Tokenizer\n"
        "texts = json.load(sys.stdin)\n"
        "tokenizer = Tokenizer.from_file(sys.argv[1])\n"
        "start = time.perf_counter()\n"
        f"parts = (texts[begin:begin + {BATCH}] for begin in range(0, len(texts), {BATCH}))\n"
        "tokens = sum(len(found.ids) for part in parts for found in tokenizer.encode_batch(part))\n"
        "print(tokens / (time.perf_counter() - start))\n"
    )
    command = [sys.executable, "-c", code, str(tokenizer / "tokenizer.json")]
    return float(subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True).stdout)


def spoken(turn: Turn) -> str:
    """As the command's template has it."""
    template = TEMPLATES["bloomchat"]
    if turn.role == "user":
        return f"{template.question_prefix}{turn.content}{template.question_suffix}"
    return f"{template.answer_prefix}{turn.content}{template.answer_suffix}"


def prepared(source: Path, output: Path, tokenizer: Path) -> dict:
    """Run the command and return its metrics."""
    subprocess.run(command(source, output, tokenizer), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((output / "metrics.json").read_text())


def command(source: Path, output: Path, tokenizer: Path) -> list[str]:
    start = "from corolla.cli.main import app; app()"
    return [sys.executable, "-c", start, "prepare", str(source), "--output", str(output), "--tokenizer", str(tokenizer)]


def peak_memory(source: Path, output: Path, tokenizer: Path) -> int:
    """The most memory that the command and its workers had at once, in bytes, what they share counted once; looked at 4 times a second."""
    peak, ended = 0, threading.Event()
    process = psutil.Popen(command(source, output, tokenizer), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def look() -> None:
        nonlocal peak
        while not ended.wait(0.25):
            peak = max(peak, sum(map(memory, [process, *children(process)])))

    watcher = threading.Thread(target=look)
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(f"the command ended with {code}")
    return peak


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def repeated(source: Path, path: Path, nbytes: int) -> Path:
    """The lines of `source` over and over, to at least `nbytes`; each question gets a number, so that none is the same."""
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    written, number = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < nbytes:
            for record in records:
                number += 1
                field = "instruction" if "instruction" in record else "prompt"
                written += file.write(json.dumps({**record, field: f"{number}. {record[field]}"}, ensure_ascii=False) + "\n")
                if written >= nbytes:
                    break
    return path


def made(path: Path) -> Path:
    """Dialogues of Dolly's lengths, of words that a seed draws."""
    draw = random.Random(0)
    words = WORDS.split()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(2000):
            lengths = int(draw.lognormvariate(2.3, 0.6)) + 2, int(draw.lognormvariate(3.6, 1.0)) + 2
            said = [" ".join(draw.choices(words, k=length)) for length in lengths]
            file.write(json.dumps({"instruction": said[0], "response": said[1]}) + "\n")
    return path


if __name__ == "__main__":
    main()
