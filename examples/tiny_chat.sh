#!/bin/sh
# From a file of dialogues to a chat, on two processor cores: a tokenizer, a small BLOOM, pretraining on the
# dialogues' text, tuning on their answers, an evaluation, and a conversation.
#
#     examples/tiny_chat.sh DATA [DIR]
#
# DATA is a file of dialogues in any format of docs/data.md (PersonaChat's for example), a directory of them, or a dataset of the
# hub; DIR is where the models go (tiny-chat). COROLLA names another `corolla` command. What is there already is not made again.
set -eu

data=${1:?"give a file of dialogues: examples/tiny_chat.sh DATA [DIR]"}
directory=${2:-tiny-chat}
corolla=${COROLLA:-corolla}

[ -f "$directory/base/config.json" ] || "$corolla" init --family bloom --hidden 256 --layers 4 --tokenizer-from "$data" --output "$directory/base"
if [ ! -f "$directory/chat/config.json" ]; then
    resume=""
    [ ! -f "$directory/chat/finetuning.json" ] || resume=--resume
    "$corolla" finetune "$directory/base" --data "$data" --recipe tiny-chat --output "$directory/chat" $resume ${TINY_CHAT_ARGS:-}
fi
# What it makes of the dialogues that it was not trained on: of all their tokens.
"$corolla" evaluate "$directory/chat" --data "$data" --held-out 0.03 --loss all
if [ -t 0 ]; then
    exec "$corolla" chat "$directory/chat"
fi
echo "hello , how are you ?" | "$corolla" chat "$directory/chat"
