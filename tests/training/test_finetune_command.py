"""`portable finetune`: what it writes, how a killed run goes on, and a sentence for what it cannot do."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import adapters, models
from portable.cli import main
from portable.models.decoder import Decoder, DecoderConfig
from portable.models.nat import NAT, NATConfig
from portable.training.log import read_log
from tests.oracles import need
from tests.training.test_resume import at_step, in_a_checkpoint_write, kill_when, losses

need("grain", "matplotlib")

CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    bos_token_id=0,
    eos_token_id=0,
)
FEW = ["--steps", "4", "--length", "32", "--batch-size", "2", "--rank", "2", "--quiet"]
STEPS = 30
LONG = [
    "--steps",
    str(STEPS),
    "--length",
    "48",
    "--batch-size",
    "4",
    "--accumulate",
    "2",
    "--rank",
    "2",
    "--dropout",
    "0.2",
]
LONG += ["--lora-plus", "4", "--log-every", "1", "--checkpoint-every", "3", "--eval-every", "10", "--eval-bytes", "300"]
LONG += ["--learning-rate", "0.01", "--remat", "dots"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small model of bytes."""
    path = tmp_path_factory.mktemp("model") / "small"
    models.save(Decoder(CONFIG, rngs=nnx.Rngs(0)), path)
    return path


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "answers.jsonl"
    pairs = [{"prompt": f"{i} + 1 = ", "response": str(i + 1)} for i in range(40)]
    path.write_text("".join(json.dumps(p) + "\n" for p in pairs))
    return path


def finetune(*arguments):
    return main(["finetune", *map(str, arguments)])


@pytest.fixture(scope="module")
def whole(folder, answers, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finetune(folder, answers, "--out", out, *LONG, "--merge") == 0
    return out


def test_a_run_leaves_an_adapter_and_the_merged_model(folder, answers, whole, capsys):
    names = sorted(p.name for p in whole.iterdir() if p.name != ".lock")
    assert names == ["adapter", "checkpoints", "config.json", "log.jsonl", "loss.png", "model"]
    log = read_log(whole / "log.jsonl")
    assert [r["step"] for r in log if "held_out_bits_per_byte" in r] == [10, 20, 30]
    assert np.mean([r["loss"] for r in log[-5:]]) < log[0]["loss"] - 0.5  # it learnt
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["r"], config["lora_alpha"]) == (True, 2, 4)
    assert config["base_model_name_or_path"] == str(folder)
    assert len(config["target_modules"]) == 14  # seven projections of two layers, and not the head
    base, merged = models.load(folder), models.load(whole / "model")
    adapters.load_peft(base, whole / "adapter")
    tokens = jnp.asarray([list(b"12 + 1 = 13")])
    want = np.asarray(merged(tokens))
    np.testing.assert_allclose(base(tokens), want, rtol=0, atol=3e-6 * np.abs(want).max())
    assert np.abs(want - models.load(folder)(tokens)).max() > 0.1
    # `portable generate` goes on as that model does, with the adapter and merged.
    said = []
    for model in ([folder, "--adapter", whole / "adapter"], [whole / "model"]):
        assert (
            main(["generate", *map(str, model), "--prompt", "7 + 1 = ", "--max-new-tokens", "6", "--ignore-eos"]) == 0
        )
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_killed_run_ends_with_the_same_losses_bit_for_bit(folder, answers, whole, tmp_path):
    out = tmp_path / "run"
    arguments = ["finetune", str(folder), str(answers), "--out", str(out), *LONG, "--merge"]
    kill_when(arguments, at_step(out, 5))
    kill_when(arguments, in_a_checkpoint_write(out, 12))
    assert 0 < len(read_log(out / "log.jsonl")) < STEPS
    assert main(arguments) == 0
    assert losses(out) == losses(whole)
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # PEFT's, of transformers
def test_peft_loads_what_was_written(folder, whole):
    torch, peft = need("torch", "peft")
    transformers = need("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, whole / "adapter").eval()
    tokens = [list(b"12 + 1 = 13")]
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    got = np.asarray(models.load(whole / "model")(jnp.asarray(tokens)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_other_adapters_texts_and_the_embedded_model(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 6)
    out = tmp_path / "default"
    few = [*FEW[:-1], "--max-minutes", "0"]
    assert finetune("default", text, "--out", out, *few, "--adapter", "lora", "--rslora", "--dtype", "float32") == 0
    said = capsys.readouterr().out
    assert "lora of rank 2 on 30 matrices: " in said
    assert "left out by default: out" in said
    assert "1 file: train on 1 (" in said
    assert "out of time after step 1 of 4; the same command continues" in said
    assert (
        finetune(folder, text, "--out", tmp_path / "s2ft", *FEW[:-3], "--quiet", "--adapter", "s2ft", "--channels", 3)
        == 0
    )
    assert not (tmp_path / "s2ft" / "adapter").exists()
    before, after = models.load(folder), models.load(tmp_path / "s2ft" / "model")
    changed = np.asarray(before.layers[0].mlp.down.kernel[...] != after.layers[0].mlp.down.kernel[...])
    assert changed.any(1).sum() == 3
    assert (before.embed.embedding[...] == after.embed.embedding[...]).all()


def test_conversations_by_the_template_in_the_models_folder(folder, tmp_path, capsys):
    need("jinja2")
    own, chats = tmp_path / "model", tmp_path / "chats.jsonl"
    shutil.copytree(folder, own)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chats.write_text((json.dumps({"messages": talk}) + "\n") * 6 + "{broken\n")
    assert finetune(own, chats, "--out", tmp_path / "run", *FEW) == 2
    assert "no chat template" in capsys.readouterr().err
    (own / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert finetune(own, chats, "--out", tmp_path / "run", *FEW) == 2
    said = capsys.readouterr().err
    assert "chats.jsonl, line 7: it is not JSON" in said
    assert not (tmp_path / "run").exists()
    assert finetune(own, chats, "--out", tmp_path / "run", *FEW[:-1], "--skip-bad-lines", "--merge") == 0
    said = capsys.readouterr().out
    assert "6 conversations: train on 6 (48 of 180 tokens are trained)" in said  # Hello</> of <user>Hi</>...
    assert "skipped 1 lines: line 7: it is not JSON" in said
    assert "3 rows of 32 tokens" not in said  # one conversation fills a row
    assert (tmp_path / "run" / "model" / "chat_template.jinja").exists()


def test_mistakes_are_one_sentence_and_exit_code_2(folder, answers, tmp_path, capsys):
    empty, long = tmp_path / "empty.jsonl", tmp_path / "long.jsonl"
    empty.write_text("\n\n")
    long.write_text(json.dumps({"prompt": "x" * 99, "response": "y"}) + "\n")
    image = tmp_path / "image"
    sizes = NATConfig(embed_dim=4, depths=(1,), num_heads=(1,), kernel_size=3, patch_size=2, num_labels=2)
    models.save(NAT(sizes, rngs=nnx.Rngs(0)), image, format=sizes.formats[0])
    capsys.readouterr()
    for data, more, words in [
        (empty, [], ["empty.jsonl holds no examples"]),
        (long, [], ["nothing to train on in rows of 32 tokens", "1 of them with a prompt that fills a row"]),
        (tmp_path / "none.jsonl", [], ["none.jsonl", "No such file"]),
        (answers, ["--rank", "0"], ["a rank must be a positive integer; got 0"]),
        (answers, ["--rank", "17", "--target-modules", "q_proj"], ["rank 17 is above that of its matrix [16, 16]"]),
        (answers, ["--rank", "99"], ["no linear layer of Decoder can have an adapter of rank 99 by default"]),
        (answers, ["--target-modules", "q_prj"], ["no module is matched by target_modules=['q_prj']", "q_proj"]),
        (answers, ["--target-modules", "(q"], ["'(q', which is no regular expression"]),
        (answers, ["--modules-to-save", "nrm"], ["modules_to_save names nrm", "norm"]),
        (answers, ["--channels", "3"], ["--adapter dora has no use for --channels"]),
        (answers, ["--adapter", "s2ft"], ["--adapter s2ft has no use for --rank"]),
        (answers, ["--epochs", "2"], ["--steps and --epochs"]),
        (answers, ["--rank-pattern", "q_proj"], ["a pattern is NAME=NUMBER", "'q_proj'"]),
        (answers, ["--lora-plus", "-1"], ["lora_plus is a positive ratio"]),
        (answers, ["--dropout", "1"], ["dropout must lie in [0, 1); got 1.0"]),
        (answers, ["--include", "*.py"], ["a file of JSON lines has no use for --include"]),
        (answers, ["--accumulate", "3"], ["accumulate must divide batch_size 2"]),
        (folder / "config.json", ["--skip-bad-lines"], ["text has no use for --skip-bad-lines"]),
    ]:
        code = finetune(folder, data, "--out", tmp_path / "run", *FEW, *more)
        said = capsys.readouterr().err
        assert code == 2, (data, more)
        assert all(word in said for word in words), said
        assert len(said.strip().splitlines()) == 1, said
        assert not (tmp_path / "run").exists()
    few = [*FEW[:-3], "--quiet"]
    for arguments, words in [
        ([folder, answers, *few, "--adapter", "esft"], ["--adapter esft trains chosen experts: give"]),
        ([folder, answers, *few, "--adapter", "esft", "--experts", "1"], ["Decoder has no layer with experts"]),
        ([tmp_path / "nothing", answers, *few], ["there is no folder"]),
        ([image, answers, *few], ["is NAT, which reads no text; give a language model"]),
    ]:
        assert finetune(*arguments, "--out", tmp_path / "run") == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
        assert len(said.strip().splitlines()) == 1, said
    assert main(["generate", "default", "--adapter", str(folder), "--prompt", "x"]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
