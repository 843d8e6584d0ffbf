"""Examples from files: what of each is trained, held out or refused, and chat templates beside transformers'."""

import hashlib
import json

import numpy as np
import pytest

from portable.checks import ConfigError, DataError
from portable.training.chat import ChatTemplate
from portable.training.examples import read_examples, text_examples
from portable.training.text import Document, Text
from portable.training.tokens import ByteTokenizer, load_tokenizer
from tests.oracles import need

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}

    {% else %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As of models that think: what was thought is left out of all turns but the last.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four ü."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven."},
]


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def shown(example, tokenizer=None):
    """(whole text, trained text) of an example of bytes; separators as |."""
    text = bytes(b"|"[0] if t == 0 else t for t in example.tokens)
    return text.decode(), bytes(b for b, told in zip(text, example.trained) if told).decode()


def test_lines_of_all_forms(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        {"prompt": "2+2=", "response": "4", "id": 7},
        b"",
        {"prompt": "", "response": "hi"},
        {"text": "läuft"},
        {"messages": TALK[:2]},
    )
    found = read_examples(file, ByteTokenizer(), template=ChatTemplate(CHATML), hold_out=False)
    assert [shown(e) for e in found.train[:3]] == [("2+2=4|", "4|"), ("|hi|", "hi|"), ("|läuft|", "läuft|")]
    whole, said = shown(found.train[3])
    assert whole.startswith("<|im_start|>user\nWhat is two")
    assert said == "Four ü.<|im_end|>\n"
    assert [e.bytes for e in found.train] == [1, 2, 6, len(said.encode())]
    assert found.kinds == "2 answers, 1 text, 1 conversation"
    assert found.held_out == ()
    # Documents of a text, the last of them cut.
    text = Text((Document("a", b"one"), Document("b", b"two", ends=False)), (Document("a", b"x"),), "rule")
    made = text_examples(text, ByteTokenizer())
    assert [shown(e) for e in made.train] == [("|one|", "one|"), ("|two", "two")]
    assert [shown(e)[0] for e in made.held_out] == ["|x|"]
    assert "2 files: train on 2 (7 of 9 tokens are trained), held out 1" in made.summary()


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"prompt": "a", ', "it is not JSON"),
        (b'{"text": "\xff"}', "it is not UTF-8"),
        (b"[" * 100000, "it is not JSON"),
        ([1], "it must be an object.*got a list"),
        ({"prompt": "a", "answer": "b"}, "it lacks 'response'; got 'prompt', 'answer'"),
        ({"prompt": "a", "response": 3}, "its 'response' must be a string; got a number"),
        ({"instruction": "a"}, "it must have messages, prompt and response, or text; got 'instruction'"),
        ({"text": ""}, "its text is empty"),
        ({"text": "a\0b"}, "must not hold byte 0"),
        ({"messages": "hello"}, "its messages must be a list of objects; got a string"),
        ({"messages": [{"role": "user"}]}, "its message 1 must have a string as 'content'"),
        ({"messages": TALK[:1]}, "the assistant says nothing"),
    ],
    ids=range(12),
)
def test_a_line_that_cannot_be_used_is_named_and_skipped_by_request_only(line, words, tmp_path):
    file = write(tmp_path / "a.jsonl", {"text": "fine"}, b"  ", line, {"text": "too"})
    with pytest.raises(DataError, match=rf"a.jsonl, line 3: .*{words}.*--skip-bad-lines"):
        read_examples(file, ByteTokenizer(), template=ChatTemplate(CHATML))
    found = read_examples(file, ByteTokenizer(), template=ChatTemplate(CHATML), skip_bad_lines=True)
    assert len(found.train) == 2
    assert len(found.skipped) == 1
    assert "skipped 1 lines: line 3: " in found.summary()


def test_files_without_examples(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl holds no examples: give a line for each, such as \{"):
        read_examples(write(tmp_path / "a.jsonl", b"", b"  "), ByteTokenizer())
    with pytest.raises(DataError, match="holds no examples; 1 lines were skipped, the first is line 1: it is not JSON"):
        read_examples(write(tmp_path / "a.jsonl", b"{"), ByteTokenizer(), skip_bad_lines=True)
    with pytest.raises(DataError, match=r"none.jsonl cannot be read: No such file"):
        read_examples(tmp_path / "none.jsonl", ByteTokenizer())
    talk = write(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(ConfigError, match=r"the model's folder has no chat template: put its tokenizer_config.json"):
        read_examples(talk, ByteTokenizer(), skip_bad_lines=True)


def test_what_is_held_out(tmp_path):
    lines = [{"text": f"line {i % 150}"} for i in range(200)]
    found = read_examples(write(tmp_path / "a.jsonl", *lines), ByteTokenizer())
    held = [shown(e)[0].strip("|") for e in found.held_out]
    digests = [int(hashlib.sha256(json.dumps({"text": t}).encode()).hexdigest(), 16) for t in held]
    assert held
    assert all(d % 20 == 0 for d in digests)
    assert not set(held) & {shown(e)[0].strip("|") for e in found.train}  # equal lines are on one side
    assert len(found.train) + len(held) == 200
    one = read_examples(write(tmp_path / "b.jsonl", *({"text": f"row {i}"} for i in range(10))), ByteTokenizer())
    assert ([shown(e)[0] for e in one.held_out], one.rule) == (["|row 9|"], "the last twentieth of the lines")
    few = read_examples(write(tmp_path / "c.jsonl", *({"text": f"row {i}"} for i in range(9))), ByteTokenizer())
    assert (len(few.train), few.held_out) == (9, ())
    assert one.fingerprint != few.fingerprint
    again = read_examples(tmp_path / "b.jsonl", ByteTokenizer())
    assert again.fingerprint == one.fingerprint


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A folder with a small tokenizer that knows the marks of a conversation."""
    tokenizers = need("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["What is two and two? Four. And three? Seven. assistant user"] * 5, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.oracle
@pytest.mark.parametrize("source", [CHATML, MARKED, THINKING], ids=["chatml", "marked", "thinking"])
def test_conversations_are_those_of_transformers(source, bpe):
    need("torch")
    transformers = need("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bpe / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    ours, tokenizer = ChatTemplate(source, tokens), load_tokenizer(bpe / "tokenizer.json")
    for asked in (False, True):
        options = {"chat_template": source, "tokenize": False, "add_generation_prompt": asked}
        assert ours.render(TALK, add_generation_prompt=asked) == theirs.apply_chat_template(TALK, **options)
    options = {"chat_template": source, "return_dict": True}
    for text, spans in ours.turns(TALK):
        ids, starts = tokenizer.encode_chat(text)
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        if source is MARKED:
            wanted = theirs.apply_chat_template(TALK, return_assistant_tokens_mask=True, **options)
            assert ids.tolist() == wanted["input_ids"]
            trained = sum((starts >= a) & (starts < b) for a, b in spans)
            assert trained.tolist() == wanted["assistant_masks"]
    assert tokenizer.encode(b"<|im_end|>").size > 1  # still text elsewhere


def test_what_the_assistant_says_is_what_follows_the_generation_prompt():
    ((text, spans),) = ChatTemplate(CHATML).turns(TALK)
    assert [text[a:b] for a, b in spans] == ["Four ü.<|im_end|>\n", "Seven.<|im_end|>\n"]
    marked = ChatTemplate(MARKED, {"bos_token": "<s>"})
    ((text, spans),) = marked.turns(TALK)
    assert [text[a:b] for a, b in spans] == ["Four ü.<|im_end|>", "Seven.<|im_end|>"]
    assert "\ue000" not in marked.render(TALK)
    # A template that rewrites earlier turns: one text a turn, each as the model will be asked.
    first, second = ChatTemplate(THINKING).turns(TALK)
    said = "<think>\n\n</think>\n\n{}<|im_end|>\n"
    for (text, ((start, end),)), content in zip((first, second), ("Four ü.", "Seven.")):
        assert text[start:end] in (said.format(content), said.format(content).removeprefix("<think>\n"))
        assert end == len(text)
    assert "Four ü.<|im_end|>\n<|im_start|>user" in second[0]


def test_templates_of_a_folder(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    config = {"eos_token": {"content": "</s>"}, "chat_template": "{{ messages[0].content }}{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    def rendered():
        return ChatTemplate.load(tmp_path).render(TALK)

    assert rendered() == "What is two and two?</s>"
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": "many{{ eos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    assert rendered() == "many</s>"
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}{{ {'a': 'ü'} | tojson }}{{ eos_token }}")
    assert rendered() == '2024{"a": "ü"}</s>'
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match="the chat template cannot be used, line 1"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"the chat template of .* cannot be read"):
        ChatTemplate.load(tmp_path)


def test_a_template_that_refuses_names_the_line_and_cannot_leave_its_sandbox(tmp_path):
    file = write(tmp_path / "a.jsonl", {"messages": TALK})
    for source, words in [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[9].content.x }}", "does not take the conversation"),
    ]:
        with pytest.raises(DataError, match=rf"a.jsonl, line 1: .*{words}"):
            read_examples(file, ByteTokenizer(), template=ChatTemplate(source))
    # What precedes the answer changes with the answer: nothing tells where it begins.
    odd = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"what is before message 2 otherwise .* \{% generation %\} marks"):
        ChatTemplate(odd).turns(TALK)


def test_ids_of_a_conversation_in_bytes():
    ids, starts = ByteTokenizer().encode_chat("aü€b")
    assert bytes(ids).decode() == "aü€b"
    assert np.asarray(starts).tolist() == [0, 1, 1, 2, 2, 2, 3]
