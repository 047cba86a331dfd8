"""Chat templates in the styles that models have, written for these tests: what each one uses of Jinja is what matters."""

from __future__ import annotations

MARKED = """
{%- for message in messages %}
<|im_start|>{{ message['role'] }}
    {% if message['name'] is defined %}
[{{ message['name'] }}]
    {% endif %}
{{ message['content'] }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML: a mark before and after every message, and blocks on lines of their own, of which nothing may be left."""

BRACKETED = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + content | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2 and Mistral: the system text inside the first turn, roles that must alternate."""

DATED_WITH_TOOLS = """
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|header|>system<|end_header|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have these functions:\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|end_header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one tool call at a time") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|header|>assistant<|end_header|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}" }}{{- "<|eot|>" }}
    {%- else %}
        {{- "<|header|>ipython<|end_header|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|end_header|>\\n\\n' }}{%- endif %}
"""
"""Llama 3.1: a date, tools as JSON, tool calls and their results."""

THINKING = """
{%- macro text_of(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}{%- for part in content %}{%- if part.type == 'text' %}{{- part.text }}{%- else %}{{- '[' ~ part.type ~ ']' }}{%- endif %}
    {%- endfor %}{%- endif %}
{%- endmacro %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if ns.last < 0 and message.role == 'user' %}{%- set ns.last = (messages | length - 1) - loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = text_of(message.content) %}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content if message.reasoning_content is defined else '' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last and thought %}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
        {{- content + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message.role in ('user', 'system') %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>' ~ '\\n' }}
    {%- else %}{%- continue %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
"""Qwen 3: thoughts of earlier turns are cut out; a macro, a namespace, loop controls, content in parts, an extra variable."""

TURNS = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""Gemma: the answer's role has a name of its own."""

CHANNELS = """
{%- macro typed(schema) -%}
    {%- if schema.type == 'array' -%}{{ typed(schema['items']) }}[]
    {%- elif schema.enum is defined -%}{{ schema.enum | map('tojson') | join(' | ') }}
    {%- else -%}{{ schema.type | default('any') }}{%- endif -%}
{%- endmacro -%}
<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>
{%- if tools -%}
<|start|>developer<|message|>namespace functions {
{%- for tool in tools %}
type {{ tool.function.name }} = (_: {
    {%- for name, schema in tool.function.parameters.properties.items() %}
{{ name }}{{ '' if name in tool.function.parameters.required | default([]) else '?' }}: {{ typed(schema) }},
    {%- endfor %}
}) => any;
{%- endfor %}
}<|end|>
{%- endif -%}
{%- for message in messages -%}
    {%- if message.thinking is defined -%}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{%- endif -%}
    <|start|>{{ message.role }}<|message|>{{ message.content | default('') }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
"""gpt-oss: channels, tools as types by a macro that calls itself, reasoning under its other name."""

STYLES = {
    "marked": MARKED, "bracketed": BRACKETED, "dated": DATED_WITH_TOOLS, "thinking": THINKING, "turns": TURNS, "channels": CHANNELS,
}  # fmt: skip
