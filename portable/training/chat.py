"""Chat templates of tokenizers: conversations as text, and which of it the assistant said."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from portable.checks import ConfigError, DataError

# Around what a template marks as the assistant's; characters for private use, which no text has.
_BEGIN, _END = "\ue000", "\ue001"
# What a template that asks for today's date is told: the same command must see the same text tomorrow.
_DATE = (2024, 7, 26)


class ChatTemplate:
    """A template in Jinja's language, rendered in its sandbox (`pip install 'portable-jax[hf]'`).

    Attributes:
      source: of the template. tokens: special tokens by name, such as {"bos_token": "<s>"}.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        """Args:
        source, tokens: as above.

        Raises:
          ConfigError: the template is not in Jinja's language, or jinja2 is not installed.
        """
        try:
            import jinja2
        except ImportError as error:
            raise ConfigError(
                "a chat template needs the package `jinja2`, not installed here: pip install 'portable-jax[hf]', or "
                "give lines with prompt and response."
            ) from error
        self.source, self.tokens = source, dict(tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"the chat template cannot be used, line {getattr(error, 'lineno', '?')}: {error}."
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTemplate | None":
        """Returns the template of a model's folder, chat_template.jinja or that of tokenizer_config.json; None without.

        Raises:
          ConfigError: a file cannot be read, or its template cannot be used.
        """
        folder, given = Path(folder), {}
        file = folder / "tokenizer_config.json"
        try:
            if file.is_file():
                given = json.loads(file.read_text("utf-8"))
            source = given.get("chat_template")
            if (own := folder / "chat_template.jinja").is_file():
                source = own.read_text("utf-8")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"the chat template of {folder} cannot be read: {error}.") from error
        if isinstance(source, list):  # several, by name
            source = next((t["template"] for t in source if t.get("name") == "default"), None)
        if not isinstance(source, str):
            return None
        tokens = {k: v["content"] if isinstance(v, Mapping) else v for k, v in given.items() if k.endswith("_token")}
        return cls(source, {k: v for k, v in tokens.items() if isinstance(v, str)})

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Returns a conversation as text; with a generation prompt, up to where the assistant speaks next.

        Raises:
          DataError: the template refuses the conversation.
        """
        return self._render(messages, add_generation_prompt).replace(_BEGIN, "").replace(_END, "")

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        import jinja2

        options: dict[str, Any] = {**self.tokens, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(messages=list(messages), tools=None, documents=None, **options)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise DataError(f"the chat template does not take the conversation ({error}).") from error

    def turns(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[int, int]]]]:
        """Returns (text, [(first, end) of what the assistant said, in characters]) of a conversation.

        One text, where the template marks the assistant's words ({% generation %}), or where what it writes for the
        first turns is the beginning of what it writes for all. Else one text for each of the assistant's turns, since
        such a template writes earlier turns otherwise (without their thoughts) than the last one.

        Raises:
          DataError: the template refuses the conversation, or nobody could say where the assistant's words begin.
        """
        whole, each = self._render(messages), []
        if _BEGIN in whole:
            return [_unmarked(whole)]
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self.render(messages[:i], add_generation_prompt=True) if i else ""
            answered = self.render(messages[: i + 1])
            start = _common(asked, answered)
            if start < _common(self.render(messages[:i]) if i else "", asked):
                raise DataError(
                    f"the chat template writes what is before message {i + 1} otherwise once that is there, so nothing "
                    "tells the assistant's words apart; give the template {% generation %} marks."
                )
            each.append((answered, [(start, len(answered))]))
        if all(whole.startswith(text) for text, _ in each):
            return [(whole, [span for _, (span,) in each])]
        return each


def _environment() -> Any:
    import datetime

    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %}, around the assistant's words."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller):
            return _BEGIN + caller() + _END

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, indent=None, separators=None, sort_keys=False, **_):
        return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.date(*_DATE).strftime(form)
    return made


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    parts, spans, at = [], [], 0
    for i, part in enumerate(text.split(_BEGIN)):
        said, _, rest = part.partition(_END) if i else ("", "", part)
        if i:
            spans.append((at, at + len(said)))
        parts += [said, rest]
        at += len(said) + len(rest)
    return "".join(parts), spans


def _common(one: str, other: str) -> int:
    """Returns for how many characters two texts are alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
