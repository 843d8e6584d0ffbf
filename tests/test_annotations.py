"""The shapes in annotations are true: a child process checks them on every call of every op's cases and of a model."""

from tests.oracles import child

CHECKED = """
from jaxtyping import TypeCheckError, install_import_hook

hooked = ["portable.ops", "portable.nn", "portable.models.language_model", "portable.models.mamba2.model"]
with install_import_hook([*hooked, "portable.models.decoder.model"], "beartype.beartype"):
    import jax, jax.numpy as jnp
    from flax import nnx
    import portable
    from portable import selection
    from portable.models.decoder import Decoder, DecoderConfig
    from portable.models.mamba2 import Mamba2Config, Mamba2LM
    from portable.parity import programs

for op in selection.ops():
    for case, make in programs.cases(op).items():
        program = programs.op(op, case)
        jax.eval_shape(program.fn, *program.args)

config = Mamba2Config(vocab_size=11, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=4)
model = Mamba2LM(config, rngs=nnx.Rngs(0))
tokens = jnp.zeros([2, 5], jnp.int32)
model(tokens)
_, state = model.prefill(tokens, jnp.array([5, 3]), model.init_state(2))
model.step(tokens[:, 0], state)

sizes = dict(vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
latent = dict(kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, dense_layers=(0,))
conv = dict(layer_types=("conv", "sliding_attention"), sliding_window=3)
for options in ({**latent, **experts}, conv):

    def read(tokens):
        model = Decoder(DecoderConfig(**sizes, **options), rngs=nnx.Rngs(0))
        model(tokens, segment_ids=tokens, return_aux=True)
        _, state = model.prefill(tokens, jnp.array([5, 3]), model.init_state(2, 6))
        return model.step(tokens[:, 0], state)

    jax.eval_shape(read, tokens)

x, mask = jnp.ones([2, 5, 8]), jnp.ones([2, 5], bool)
moe = portable.nn.MoE(8, 4, num_experts=3, copies=1, top_k=2, renormalize=True, shared=4, rngs=nnx.Rngs(0))

def routed(x):
    y, routing = moe(x, mask=mask, return_routing=True)
    limited = portable.ops.limit_capacity(routing, 3, overflow="next")
    losses = [portable.ops.load_balance_loss(limited, mask=mask), portable.ops.z_loss(routing)]
    return y, *losses, portable.ops.chunk_union(limited, 2), portable.ops.expert_load(limited)

jax.eval_shape(routed, x)

try:
    portable.ops.ssd_step(*[jnp.ones(2)] * 6)
except TypeCheckError:
    print("a wrong shape is seen")
"""


def test_annotations_hold():
    assert "a wrong shape is seen" in child(CHECKED)
