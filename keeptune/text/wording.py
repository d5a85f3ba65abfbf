"""The wordings of keeptune's own, as chat templates that transformers renders too; nothing arrives."""

from __future__ import annotations

VERSION = 1

_BELOW = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request."

# Source: github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT; later turns repeat its blocks.
ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% elif messages[0]['input'] %}"
    f"{{{{ '{_BELOW}, paired with an input that provides further context. {_WRITE}' }}}}"
    f"{{% else %}}{{{{ '{_BELOW}. {_WRITE}' }}}}{{% endif %}}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\n### Instruction:\\n' + message['content'] }}"
    "{% if message['input'] %}{{ '\\n\\n### Input:\\n' + message['input'] }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\n### Response:' + message['content'] + eos_token }}"
    "{% elif message['role'] != 'system' or not loop.first %}"
    "{{ raise_exception('the alpaca wording has no place for the role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:' }}{% endif %}"
)

PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if add_generation_prompt or not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)

# Source: github.com/openai/openai-python, release-v0.28.0, chatml.md.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What an encoder reads: no end tokens inside, no newline at the end.
PLAIN_ENCODER = (
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)
