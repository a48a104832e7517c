"""A declared template in Jinja's language, as tokenizers carry it, with `{% generation %}` around what is trained on.

What it renders is spelled by the tokenizer as `chat.templates.encode` spells it, and TRL's `assistant_only_loss` finds in it what
`data.render` trains on.
"""

from __future__ import annotations

import json

from corolla.chat.templates import Template
from corolla.data.rendering import closing_length


def jinja_of(template: Template) -> str:
    """The Jinja source of a declared template; `ValueError` for the model's own, which has its source already.

    The mark that ends an answer and begins the next question belongs to the answer; after the last answer the end token stands for it.
    """
    if template.own:
        raise ValueError("the model's own template is in Jinja's language already")
    closing = template.question_prefix[: closing_length(template)]
    question = template.question_prefix[len(closing) :]
    asked = template.answer_prefix.rstrip()
    answer = template.answer_prefix[len(asked) :]
    system = f"{{{{- {_text(template.system_prefix)} + messages[0]['content'] + {_text(template.system_suffix)} -}}}}"
    default = template.system_prefix + template.system + template.system_suffix if template.system else ""
    opening = "".join(
        (template.question_prefix + turn.content + template.question_suffix)
        if turn.role == "user"
        else (template.answer_prefix + turn.content + template.answer_suffix)
        for turn in template.opening
    )
    lines = (
        "{%- if messages[0]['role'] == 'system' -%}",
        system,
        "{%- set turns = messages[1:] -%}",
        "{%- else -%}",
        f"{{{{- {_text(default)} -}}}}",
        "{%- set turns = messages -%}",
        "{%- endif -%}",
        f"{{{{- {_text(opening)} -}}}}",
        "{%- for turn in turns -%}",
        "{%- if turn['role'] == 'user' -%}",
        f"{{%- if loop.first or loop.previtem['role'] != 'assistant' -%}}{{{{- {_text(closing)} -}}}}{{%- endif -%}}",
        f"{{{{- {_text(question)} + turn['content'] + {_text(template.question_suffix)} -}}}}",
        "{%- else -%}",
        f"{{{{- {_text(asked)} -}}}}",
        "{%- generation -%}",
        f"{{{{- {_text(answer)} + turn['content'] | trim + {_text(template.answer_suffix)} -}}}}",
        f"{{{{- eos_token if loop.last else {_text(closing)} -}}}}",
        "{%- endgeneration -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {_text(asked)} -}}}}{{%- endif -%}}",
    )
    return "\n".join(lines)


def _text(text: str) -> str:
    return json.dumps(text)
