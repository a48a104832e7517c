"""A model's directory without weights: a small byte-level tokenizer trained on a few sentences, and the files around it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
END = 2
CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
_CORPUS = [
    "What is the capital of France? The capital of France is Paris. And of Italy? The capital of Italy is Rome.",
    "<human>: hello there\n<bot>: hello, how are you?\n<human>: fine, and you?\n<bot>: fine, thank you!",
    "Human: hello###Assistant: hello###User: hello\nAssistant: hello",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """SentencePiece's way: a space is part of the word after it, unknown characters are spelled in bytes."""
    vocabulary = SPECIAL_TOKENS + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] + [chr(letter) for letter in range(33, 127)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return tokenizer


def make_directory(directory: Path, tokenizer: Tokenizer, *, model_type: str = "bloom", template: str | None = None) -> Path:
    """Write the files that `TextTokenizer` reads into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": end}))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": END}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory
