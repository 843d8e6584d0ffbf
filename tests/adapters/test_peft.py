"""Against PEFT: logits, gradients, merged weights, and folders that either wrote and the other reads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from portable import adapters, models, nn, ops
from portable.adapters import AdapterParam
from portable.checkpoint import Rule, WeightMap, transposed
from portable.checks import CheckpointError, ConfigError
from tests.adapters.torch_net import TARGETS, TOKENS, Net, pair, randomise, relative
from tests.oracles import need

torch, peft = need("torch", "peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of models that it does not know
BAR = 1e-6
METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
METHODS["dora, patterns"] = {"use_dora": True, "rank_pattern": {"layers.1": 2}, "alpha_pattern": {"emb": 3}}


def _quick(names, *quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.full) for name in names]


def peft_model(theirs, folder=None, **options):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options}
    model = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    randomise(model)
    if folder is not None:
        model.save_pretrained(folder)
    return model.eval()


def by_path(tree):
    return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(tree)}


@pytest.mark.oracle
@pytest.mark.parametrize("method", _quick(METHODS, "dora, patterns", "rslora"))
def test_every_kind_of_layer_equals_peft(method, tmp_path):
    theirs, ours = pair()
    theirs = peft_model(theirs, tmp_path / "theirs", **METHODS[method])
    assert sorted(adapters.load_peft(ours, tmp_path / "theirs")) == sorted(TARGETS)
    want = theirs(torch.from_numpy(TOKENS))
    out = torch.randn(want.shape)
    (want * out).sum().backward()

    def loss(model):
        got = model(jnp.asarray(TOKENS))
        return jnp.sum(got * out.numpy()), got

    run = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam), has_aux=True))
    (_, got), slopes = run(ours)
    assert relative(got, want.detach()) < BAR
    found = by_path(slopes)
    compared = 0
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        key = {"A": "a", "e": "ab"["_B" in part], "B": "b", "m": "magnitude"}[part[0]]
        slot = "embedding" if module == "emb" else "kernel"
        slope = parameter.grad.numpy()
        if module == "conv":
            slope = slope.reshape(-1) if key == "magnitude" else slope.reshape(len(slope), *slope.shape[1:])
            slope = {"a": lambda s: s.transpose(2, 3, 1, 0).reshape(-1, len(s)), "b": lambda s: s[:, :, 0, 0].T}.get(
                key, lambda s: s
            )(slope)
        elif key != "magnitude":
            slope = slope.T
        # With rsLoRA's larger scale PEFT is itself 9e-7 from its own result in float64.
        bar = (1 if method != "rslora" else 2) * BAR
        assert relative(found[f"{module}.adapters.{slot}.default.{key}"], slope) < bar, name
        compared += 1
    assert compared == len(found)

    merged = adapters.merge(ours)
    theirs_merged = theirs.merge_and_unload()
    assert relative(merged.layers[0].kernel[...].T, theirs_merged.layers[0].weight.detach()) < BAR
    assert relative(merged.conv.kernel[...].transpose(3, 2, 0, 1), theirs_merged.conv.weight.detach()) < BAR
    assert relative(merged.emb.embedding[...], theirs_merged.emb.weight.detach()) < BAR
    assert type(merged.conv) is nnx.Conv

    adapters.save_peft(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(pair()[0], tmp_path / "ours").eval()
    assert relative(again(torch.from_numpy(TOKENS)).detach(), want.detach()) < BAR
    written, read = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert written.keys() == read.keys()
    for key, array in read.items():
        np.testing.assert_array_equal(written[key], array, err_msg=key)


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution"])
def test_one_layer_and_its_slopes(kind, method, tmp_path):
    torch.manual_seed(0)
    options = METHODS[method]
    x = torch.randint(0, 30, (4, 5)) if kind == "embedding" else torch.randn(4, 7, 24)
    if kind == "linear":
        base, layer = torch.nn.Linear(24, 20), nnx.Linear(24, 20, rngs=nnx.Rngs(0))
        layer.kernel.set_value(jnp.asarray(base.weight.detach().numpy().T))
        layer.bias.set_value(jnp.asarray(base.bias.detach().numpy()))
    elif kind == "embedding":
        base, layer = torch.nn.Embedding(30, 24), nnx.Embed(30, 24, rngs=nnx.Rngs(0))
        layer.embedding.set_value(jnp.asarray(base.weight.detach().numpy()))
    else:
        base, layer = torch.nn.Conv1d(24, 20, 3, padding=1), nnx.Conv(24, 20, (3,), rngs=nnx.Rngs(0))
        layer.kernel.set_value(jnp.asarray(base.weight.detach().numpy().transpose(2, 1, 0)))
        layer.bias.set_value(jnp.asarray(base.bias.detach().numpy()))
    theirs = peft.get_peft_model(
        torch.nn.Sequential(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0"], **options})
    )
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = nnx.List([layer])
    adapters.load_peft(ours, tmp_path)
    want = theirs(x.transpose(1, 2)).transpose(1, 2) if kind == "convolution" else theirs(x)
    out = torch.randn(want.shape)
    (want * out).sum().backward()
    trained, rest = nnx.state(ours, AdapterParam, ...)
    got, pull = jax.vjp(lambda t: nnx.merge(nnx.graphdef(ours), t, rest)[0](jnp.asarray(x.numpy())), trained)
    assert relative(got, want.detach()) < BAR
    found = {path[-1]: v.get_value() for path, v in nnx.to_flat_state(pull(jnp.asarray(out.numpy()))[0])}
    slopes = {n.split(".lora_")[1]: p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad}
    for name, slope in slopes.items():
        key = "magnitude" if "magnitude" in name else "ab"["B" in name]
        if kind == "convolution" and key != "b":
            slope = slope.transpose(2, 1, 0).reshape(-1, len(slope)) if key == "a" else slope
        slope = slope.reshape(-1) if key == "magnitude" else slope[..., 0].T if slope.ndim == 3 else slope.T
        if kind == "convolution" and key == "a":
            slope = slope.T
        assert relative(found[key], slope) < BAR, name


@pytest.mark.oracle
@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_pefts(dora):
    base = torch.nn.Linear(12, 10)
    model = peft.get_peft_model(
        torch.nn.Sequential(base),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=dora, lora_dropout=0.4),
    )
    randomise(model)
    layer, key, x = model.base_model.model[0], jax.random.key(3), torch.randn(5, 12, requires_grad=True)
    bits = jax.random.bits(key, (5, 12), jnp.uint32) >= jnp.uint32(round(0.4 * 2**32))
    mask = torch.from_numpy(np.asarray(bits) / 0.6).float()
    assert 0.3 < (mask == 0).float().mean() < 0.5

    class Mask(torch.nn.Module):
        def forward(self, x):
            return x * mask

    layer.lora_dropout["default"] = Mask()
    want = model.train()(x)
    want.square().sum().backward()
    A, B = (getattr(layer, f"lora_{part}")["default"].weight for part in "AB")
    arrays = [jnp.asarray(z.detach().numpy()) for z in (x, A.T, B.T)]
    w, bias = (jnp.asarray(z.detach().numpy()) for z in (base.weight.T, base.bias))
    slopes = [x.grad, A.grad.T, B.grad.T]
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight
        arrays, slopes = [*arrays, jnp.asarray(magnitude.detach().numpy())], [*slopes, magnitude.grad]

    def ours(x, *rest):
        op = ops.dora_linear if dora else ops.lora_linear
        return op(x, w, *rest, bias=bias, scale=2.0, dropout=0.4, key=key)

    got, pull = jax.vjp(jax.jit(ours), *arrays)
    assert relative(got, want.detach()) < BAR
    for mine, theirs in zip(pull(2 * got), slopes, strict=True):
        assert relative(mine, theirs) < 2.5 * BAR


def transformers_model(kind, folder, **options):
    transformers = need("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    return model


MAMBA2 = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "state_size": 4}
MAMBA2 |= {"n_groups": 2, "expand": 2, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 0}
LLAMA = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 24, "num_key_value_heads": 1}
DEEPSEEK = {**LLAMA, "num_key_value_heads": 2, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 8}
DEEPSEEK |= {"qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
DEEPSEEK |= {"topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 2, "pad_token_id": None}
CASES = {
    "Llama": (LLAMA, ["q_proj", "v_proj", "down_proj", "embed_tokens"], {"modules_to_save": ["lm_head"]}),
    "Mamba2": (MAMBA2, ["in_proj"], {}),
    "DeepseekV3": (DEEPSEEK, ["kv_a_proj_with_mqa", "kv_b_proj"], {}),
}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", _quick(CASES, "Llama", "Mamba2"))
def test_fused_projections_and_stacked_layers_of_the_librarys_models(kind, tmp_path):
    sizes, targets, options = CASES[kind]
    theirs = transformers_model(kind, tmp_path / "model", **sizes)
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, use_dora=True, **options)
    theirs = peft.get_peft_model(theirs, settings).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    tokens = np.arange(14).reshape(2, 7)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens)).logits.numpy()
    ours = models.load(tmp_path / "model")
    plain = ours(jnp.asarray(tokens))
    adapters.load_peft(ours, tmp_path / "theirs")
    run = nnx.jit(lambda model, tokens: model(tokens))
    assert relative(run(ours, tokens), want) < 5 * BAR  # two models, each with errors of its own
    assert relative(plain, want) > 1e-2

    adapters.save_peft(ours, tmp_path / "ours")
    written, read = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert written.keys() == read.keys()
    for key, array in read.items():
        np.testing.assert_array_equal(written[key], array, err_msg=key)
    theirs.save_pretrained(tmp_path / "with frozen embeddings")  # PEFT adds them where they are adapted
    adapters.load_peft(models.load(tmp_path / "model"), tmp_path / "with frozen embeddings")
    stacked = nn.stack(models.load(tmp_path / "model"))
    adapters.load_peft(stacked, tmp_path / "ours")
    assert any(isinstance(layer, nn.Stack) for layer in stacked.layers)
    assert relative(run(stacked, tokens), want) < 5 * BAR


@pytest.mark.oracle
def test_blocks_of_a_fused_projection_with_factors_of_their_own(tmp_path):
    theirs = transformers_model("Mamba2", tmp_path / "model", **MAMBA2)
    ours = models.load(tmp_path / "model")
    config = adapters.DoRAConfig(rank=2, alpha=3, rslora=True, target_modules=["in_x", "in_dt"], init="random")
    adapters.apply(ours, config)
    adapters.save_peft(ours, tmp_path / "ours")
    tokens = np.arange(14).reshape(2, 7)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert relative(nnx.jit(lambda m, x: m(x))(ours, tokens), want) < 5 * BAR
    again = models.load(tmp_path / "model")
    adapters.load_peft(again, tmp_path / "ours")
    assert relative(nnx.jit(lambda m, x: m(x))(again, tokens), want) < 5 * BAR


class TorchExperts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(8, 3, bias=False)
        shapes = {"w1": (8, 6), "w2": (6, 8), "w3": (8, 6)}
        make = lambda: {name: torch.nn.Linear(*s, bias=False) for name, s in shapes.items()}  # noqa: E731
        self.experts = torch.nn.ModuleList([torch.nn.ModuleDict(make()) for _ in range(3)])

    def forward(self, x):
        weights, indices = self.gate(x).softmax(-1).topk(2, -1)
        y = 0
        for e, expert in enumerate(self.experts):
            own = (weights * (indices == e)).sum(-1, keepdim=True)
            y = y + own * expert["w2"](torch.nn.functional.silu(expert["w1"](x)) * expert["w3"](x))
        return y


@pytest.mark.oracle
@pytest.mark.parametrize("dora", [False, True])
def test_experts(dora, tmp_path):
    torch.manual_seed(0)
    theirs = TorchExperts()
    base = {k: v.clone() for k, v in theirs.state_dict().items()}
    ours = nn.MoE(8, 6, num_experts=3, top_k=2, rngs=nnx.Rngs(0))
    names = {"w1": "gate", "w2": "down", "w3": "up"}
    rules = [Rule(f"experts.{{e}}.{there}.weight", here, transposed) for there, here in names.items()]
    weight_map = WeightMap((Rule("gate.weight", "router.kernel", transposed), *rules))
    ours.router.kernel.set_value(jnp.asarray(base["gate.weight"].numpy().T))
    for there, here in names.items():
        stacked = np.stack([base[f"experts.{e}.{there}.weight"].numpy().T for e in range(3)])
        getattr(ours, here).set_value(jnp.asarray(stacked))
    x = torch.randn(5, 8)
    assert relative(ours(jnp.asarray(x.numpy())), theirs(x).detach()) < BAR
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["w1", "w2", "w3"], use_dora=dora)
    theirs = peft.get_peft_model(theirs, settings).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    adapters.load_peft(ours, tmp_path / "theirs", weight_map=weight_map)
    want = theirs(x)
    want.square().sum().backward()

    def loss(model):
        got = model(jnp.asarray(x.numpy()))
        return jnp.sum(got * got), got

    run = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam), has_aux=True))
    (_, got), slopes = run(ours)
    assert relative(got, want.detach()) < BAR
    found = by_path(slopes)
    for there, here in names.items():
        layers = [theirs.base_model.model.experts[e][there] for e in range(3)]
        for part, key in (("A", "a"), ("B", "b")):
            grads = np.stack([getattr(layer, f"lora_{part}")["default"].weight.grad.numpy().T for layer in layers])
            assert relative(found[f"adapters.{here}.default.{key}"], grads) < 5 * BAR
        if dora:
            grads = np.stack([layer.lora_magnitude_vector["default"].weight.grad.numpy() for layer in layers])
            assert relative(found[f"adapters.{here}.default.magnitude"], grads) < 5 * BAR
    adapters.save_peft(ours, tmp_path / "ours", weight_map=weight_map)
    fresh = TorchExperts()
    fresh.load_state_dict(base)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    assert relative(again(x).detach(), want.detach()) < BAR


@pytest.fixture
def folder(tmp_path):
    theirs, _ = pair()
    peft_model(theirs, tmp_path, use_dora=True)
    return tmp_path


def spoil(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_adapter_of_another_model_is_refused_with_everything_that_differs(folder):
    prefix = "base_model.model.layers."

    def change(tensors):
        tensors[f"{prefix}0.lora_A.weight"] = np.zeros((4, 11), np.float32)
        tensors[f"{prefix}1.lora_B.weight"] = np.zeros((9, 4), np.float32)
        tensors[f"{prefix}7.lora_A.weight"] = np.zeros((4, 9), np.float32)
        del tensors["base_model.model.emb.lora_magnitude_vector"]

    spoil(folder, change)
    model = Net()
    with pytest.raises(CheckpointError) as caught:
        adapters.load_peft(model, folder)
    message = str(caught.value)
    assert "is for another model than this one" in message
    assert r"layers.0 (lora_A): expected [4, 12], got [4, 11]" in message
    assert r"layers.1 (lora_B): expected [12, 4], got [9, 4]" in message
    assert "unknown     layers.7" in message
    assert "incomplete  emb: lacks lora_magnitude_vector" in message
    assert not adapters.adapter_names(model)
    assert type(model.layers[0]) is nnx.Linear


def test_nan_in_a_file_is_refused(folder):
    spoil(folder, lambda tensors: tensors["base_model.model.conv.lora_A.weight"].fill(np.nan))
    with pytest.raises(CheckpointError, match=r"NaN or infinity in base_model\.model\.conv\.lora_A"):
        adapters.load_peft(Net(), folder)


@pytest.mark.parametrize(
    "option, value",
    [
        ("use_qalora", True),
        ("bias", "all"),
        ("layer_replication", [[0, 1]]),
        ("velora_config", {"a": 1}),
        ("target_parameters", ["experts.up"]),
    ],
)
def test_options_that_are_not_supported_are_named(folder, option, value):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    with pytest.raises(ConfigError, match=f"not supported: {option}="):
        adapters.load_peft(Net(), folder)


def test_files_that_are_missing_or_cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        adapters.load_peft(Net(), folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        adapters.load_peft(Net(), folder)


def test_two_adapters_with_one_name(folder):
    model = Net()
    adapters.load_peft(model, folder)
    with pytest.raises(ValueError, match="has an adapter called 'default' already"):
        adapters.load_peft(model, folder)
    adapters.load_peft(model, folder, name="second")
    assert adapters.adapter_names(model) == ["default", "second"]
