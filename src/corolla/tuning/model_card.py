"""A model card, filled in from a run: what the Hugging Face hub shows of a model's directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from corolla.tuning.run_record import RunRecord

CARD = "README.md"


def model_card(
    record: RunRecord, *, final: dict[str, Any] | None, name: str, base: str, recipe: str, licence: str | None, chat: bool, lora: bool
) -> str:
    """The card of a finished run as Markdown, with the hub's metadata in front.

    `final` is the evaluation of the model as it is saved, `recipe` the whole of it as YAML, `chat` whether the directory has a chat
    template, `lora` whether it is an adapter.
    """
    head: dict[str, Any] = {} if Path(base).exists() else {"base_model": base}  # the hub knows no directories
    head |= {"library_name": "peft" if lora else "transformers", "pipeline_tag": "text-generation"}
    head |= {"tags": ["corolla", "lora" if lora else "sft"]}
    if licence:
        head["license"] = licence
    base = _short(base)
    front = yaml.safe_dump(head, sort_keys=False)
    kind = "A LoRA adapter for" if lora else "Fine-tuned from"
    sections = [
        f"---\n{front}---",
        f"# {name}",
        f"{kind} `{base}` with Corolla's `corolla finetune`, recipe `{record.settings['recipe']['name']}`.",
        "## Figures",
        _figures(record, final),
        "## Use",
        _use(name, chat, lora),
        "## Data",
        _data(record),
        "## Recipe",
        "The whole of it; save it as a file and name it with `--recipe` to train the same again.",
        f"```yaml\n{recipe.strip()}\n```",
        f"Steps: {record.steps['done']}. Time: {record.seconds:.0f} s. Computed in {record.model['dtype']} on {record.model['device']}.",
        "## Licence",
        f"{licence}." if licence else f"Not stated. That of `{base}` and those of the data apply.",
    ]
    return "\n\n".join(sections) + "\n"


def _figures(record: RunRecord, best: dict[str, Any] | None) -> str:
    if record.base is None or best is None:
        return "Nothing was held out, so nothing was measured."
    rows = [("before", record.base), (f"after step {best['step']}, which is this model", best)]
    lines = ["| held-out tokens that are trained on | loss (nats) | perplexity |", "|---|---|---|"]
    lines += [f"| {said} | {entry['loss']:.3f} | {entry['perplexity']:.2f} |" for said, entry in rows]
    return "\n".join(lines) + f"\n\nOver {best['tokens']:,} tokens of dialogues that were not trained on."


def _use(name: str, chat: bool, lora: bool) -> str:
    if not chat or lora:
        return f"```sh\ncorolla chat {'BASE --adapter ' if lora else ''}{name}\n```"
    return (
        f"```sh\ncorolla chat {name}\n```\n\n"
        "```python\nfrom transformers import pipeline\n\n"
        f'chat = pipeline("text-generation", "{name}")\n'
        'print(chat([{"role": "user", "content": "Hello!"}], max_new_tokens=64)[0]["generated_text"][-1]["content"])\n```'
    )


def _data(record: RunRecord) -> str:
    lines = ["| phase | source | SHA-256 |", "|---|---|---|"]
    for phase in record.data["phases"]:
        for source in phase["sources"]:
            label = f" ({source['label']})" if source["label"] else ""
            lines.append(f"| {phase['name']} | `{_short(source['source'])}`{label} | {source['sha256'] or 'of the hub'} |")
    said = [
        f"{phase['name']}: {part['sequences']:,} sequences of {part['tokens']:,} tokens, {part['trained_tokens']:,} of them trained on."
        for phase in record.data["phases"]
        for part in [phase["training"]]
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(said)


def _short(place: str) -> str:
    """Without the directories that it lies in, which concern nobody else."""
    return Path(place).resolve().name if Path(place).exists() else place
