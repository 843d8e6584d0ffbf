"""Examples to fine-tune on: texts, prompts with responses, conversations, each with the tokens that are trained."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from portable.checks import ConfigError, DataError
from portable.training.chat import ChatTemplate
from portable.training.text import Text, in_twentieth
from portable.training.tokens import Tokenizer

LINES = (".jsonl", ".ndjson")


class Example(NamedTuple):
    """One document.

    Attributes:
      tokens: [n] int32.
      trained: [n] bool, which tokens are learned; the first never is, as nothing precedes it.
      bytes: size of the text that is learned.
    """

    tokens: np.ndarray
    trained: np.ndarray
    bytes: int


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples to train on and examples never trained on.

    Attributes:
      train, held_out: the examples of each part, in a fixed order.
      kinds: how many lines of each kind there were, for people.
      rule: how the parts were told apart.
      skipped: lines left out, each with the reason.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    kinds: str
    rule: str
    skipped: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 over tokens and what of them is trained."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(f"{len(part)}\n".encode())
            for example in part:
                digest.update(f"{len(example.tokens)}\n".encode())
                digest.update(example.tokens.tobytes() + example.trained.tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """A line or two for people: sizes, the split rule, what was left out."""
        line = f"{self.kinds}: train on {_size(self.train)}"
        line += f", held out {_size(self.held_out)} ({self.rule})" if self.held_out else ", nothing held out"
        if self.skipped:
            line += f"\nskipped {len(self.skipped)} lines: " + "; ".join(self.skipped[:3])
            line += "; ..." if len(self.skipped) > 3 else ""
        return line


def text_examples(text: Text, tokenizer: Tokenizer) -> Examples:
    """Returns each document of a text as an example, all of whose tokens are trained.

    A separator stands before a document and, where it ends, behind it.
    """

    def part(documents) -> tuple[Example, ...]:
        return tuple(_whole(d.data, tokenizer, d.ends) for d in documents if d.data)

    names = len({d.name for d in (*text.train, *text.held_out)})
    kinds = f"{names:,} file{'s' * (names != 1)}"
    skipped = tuple(f"{name} ({reason})" for name, reason in text.skipped)
    return Examples(part(text.train), part(text.held_out), kinds, text.rule, skipped)


def read_examples(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    template: ChatTemplate | None = None,
    skip_bad_lines: bool = False,
    hold_out: bool = True,
) -> Examples:
    """Reads a file with a JSON object a line, and holds a part out.

    A line has `messages` (a list of {"role", "content"}, written by the chat template; what the assistant says is
    trained), or `prompt` and `response` (the response and the separator behind it are trained), or `text` (all is).
    A prompt begins a row as `portable generate` begins with it: nothing stands before it, and a separator stands for an
    empty one. Lines whose sha256 is a multiple of 20 are held out, so that equal lines are on one side; where that is
    not between a fiftieth and a quarter of them, the last twentieth, and of fewer than ten none.

    Args:
      path: the file.
      tokenizer: of the model.
      template: of the model's conversations.
      skip_bad_lines: leaves out lines that cannot be used, and names them in `Examples.skipped`.
      hold_out: False trains on everything.

    Raises:
      DataError: a line cannot be used (its number is named), or there is none.
      ConfigError: there are conversations and no template.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a file of JSON lines.") from error
    found: list[tuple[str, list[Example]]] = []
    kinds: Counter[str] = Counter()
    skipped = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            kind, examples = _read(line, tokenizer, template)
        except DataError as error:
            if not skip_bad_lines:
                raise DataError(
                    f"{path}, line {number}: {error} Mend it, or leave it out by --skip-bad-lines."
                ) from error
            skipped.append(f"line {number}: {str(error).rstrip('.')}")
            continue
        kinds[kind] += 1
        found.append((line.strip().decode(), examples))
    if not found:
        more = f"; {len(skipped)} lines were skipped, the first is {skipped[0]}" if skipped else ""
        raise DataError(f"{path} holds no examples{more}: give a line for each, {_FORMS}.")
    held, rule = _held_out([line for line, _ in found]) if hold_out else (set(), "")
    train, rest = (
        tuple(e for i, (_, examples) in enumerate(found) if (i in held) == side for e in examples)
        for side in (False, True)
    )
    counts = ", ".join(f"{n:,} {kind}{'s' * (n != 1)}" for kind, n in kinds.most_common())
    return Examples(train, rest, counts, rule, tuple(skipped))


_FORMS = 'such as {"prompt": "...", "response": "..."}, {"messages": [...]} or {"text": "..."}'


def _held_out(lines: Sequence[str]) -> tuple[set[int], str]:
    held = {i for i, line in enumerate(lines) if in_twentieth(line)}
    if len(lines) / 50 <= len(held) <= len(lines) / 4:
        return held, "sha256 of the line is a multiple of 20"
    if len(lines) < 10:
        return set(), ""
    return set(range(len(lines) - max(1, len(lines) // 20), len(lines))), "the last twentieth of the lines"


def _read(line: bytes, tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[str, list[Example]]:
    """Returns the kind of a line, and its examples; DataError where it cannot be used."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8 ({error.reason} at byte {error.start}).") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise DataError(f"it must be an object, {_FORMS}; got {_kind(record)}.")
    if "messages" in record:
        return "conversation", _conversation(record["messages"], tokenizer, template)
    if "prompt" in record or "response" in record:
        prompt, response = (_string(record, key) for key in ("prompt", "response"))
        if not response:
            raise DataError("its response is empty.")
        return "answer", [_answer(prompt, response, tokenizer)]
    if "text" in record:
        if not (data := _string(record, "text")):
            raise DataError("its text is empty.")
        return "text", [_whole(data, tokenizer, True)]
    got = ", ".join(map(repr, list(record)[:6])) or "nothing"
    raise DataError(f"it must have messages, prompt and response, or text; got {got}.")


def _string(record: dict, key: str) -> bytes:
    if key not in record:
        raise DataError(f"it lacks {key!r}; got {', '.join(map(repr, list(record)[:6]))}.")
    if not isinstance(record[key], str):
        raise DataError(f"its {key!r} must be a string; got {_kind(record[key])}.")
    return record[key].encode("utf-8", "replace")


def _kind(value: Any) -> str:
    named = {list: "a list", dict: "an object", str: "a string", bool: "a truth value", type(None): "null"}
    return named.get(type(value), "a number")


def _example(parts: Sequence[tuple[np.ndarray, bool]], size: int) -> Example:
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts])
    trained = np.concatenate([np.full(len(ids), told) for ids, told in parts])
    trained[0] = False
    return Example(tokens, trained, size)


def _whole(data: bytes, tokenizer: Tokenizer, ends: bool) -> Example:
    separator = np.asarray([tokenizer.separator])
    parts = [(separator, False), (tokenizer.encode(data), True)]
    return _example([*parts, (separator, True)] if ends else parts, len(data))


def _answer(prompt: bytes, response: bytes, tokenizer: Tokenizer) -> Example:
    separator = np.asarray([tokenizer.separator])
    before = tokenizer.encode(prompt) if prompt else separator
    return _example([(before, False), (tokenizer.encode(response), True), (separator, True)], len(response))


def _conversation(messages: Any, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[Example]:
    if template is None:
        raise ConfigError(
            "there are conversations (`messages`), but the model's folder has no chat template: put its "
            "tokenizer_config.json or chat_template.jinja there, or give lines with prompt and response."
        )
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"its messages must be a list of objects; got {_kind(messages)}.")
    for number, message in enumerate(messages, 1):
        if wrong := [key for key in ("role", "content") if not isinstance(message.get(key), str)]:
            raise DataError(f"its message {number} must have a string as {wrong[0]!r}.")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("the assistant says nothing in its messages.")
    made = []
    for text, spans in template.turns(messages):
        ids, starts = tokenizer.encode_chat(text)
        trained = np.zeros(len(ids), bool)
        for first, end in spans:
            trained |= (starts >= first) & (starts < end)
        size = sum(len(text[first:end].encode("utf-8", "replace")) for first, end in spans)
        if len(ids):
            trained[0] = False
            made.append(Example(np.asarray(ids, np.int32), trained, size))
    return made


def _size(part: Sequence[Example]) -> str:
    trained = sum(int(e.trained.sum()) for e in part)
    return f"{len(part):,} ({trained:,} of {sum(len(e.tokens) for e in part):,} tokens are trained)"
