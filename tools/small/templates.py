"""The chat templates of the families, which give the text that the published ones give for
conversations of system, user and assistant without tools."""

_CHATML = (
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _with_default_system(text: str) -> str:
    return (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
        + text
        + "<|im_end|>\\n' }}{% endif %}{% for message in messages %}"
        + _CHATML
    )


PHI4 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
SMOLLM2 = _with_default_system(
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)
QWEN25 = _with_default_system(
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
)
# Whether an answer has thoughts depends on where it stands: behind the last question it has, empty
# ones too. The thoughts of a past answer are cut away.
QWEN3 = (
    "{% set last = namespace(question=messages | length - 1) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% if loop.last and loop.index0 > last.question %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}{{ message['content'].split('</think>')[-1].lstrip('\\n') }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
_LLAMA3_OPEN = "'<|start_header_id|>' + {} + '<|end_header_id|>\\n\\n'"
# With `date_string` given; the published template puts today's in its place where it knows one.
LLAMA3 = (
    "{{ bos_token + " + _LLAMA3_OPEN.format("'system'") + " }}"
    "{{ 'Cutting Knowledge Date: December 2023\\nToday Date: '"
    " + (date_string if date_string is defined else '26 Jul 2024') + '\\n\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
    "{% for message in messages %}"
    "{{ "
    + _LLAMA3_OPEN.format("message['role']")
    + " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ "
    + _LLAMA3_OPEN.format("'assistant'")
    + " }}{% endif %}"
)
