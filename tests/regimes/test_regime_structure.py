"""Which parameters each regime picks, family by family, against lists written out by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
)

from petune_kernels.regimes import counts, tune
from petune_kernels.regimes.structure import read

SHAPE: dict[str, Any] = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    vocab_size=50,
    max_position_embeddings=40,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    cls_token_id=1,
    sep_token_id=2,
)


@dataclass(frozen=True)
class Stack:
    """A stack of two blocks: its path and, relative to a block, the modules of each kind."""

    path: str
    attention: str
    ffn: str
    attention_norms: str
    ffn_norms: str
    other: str = ""  # in the block and in none of the above

    def modules(self, fields: tuple[str, ...]) -> list[str]:
        return [f"{self.path}.{i}.{m}" for i in (0, 1) for f in fields for m in getattr(self, f).split()]


@dataclass(frozen=True)
class Family:
    stacks: tuple[Stack, ...]
    head: str
    config: dict[str, Any] = field(default_factory=dict)
    embedding_norms: str = ""
    pooler: str = ""


def _bert(path: str, attention: str = "attention.self.query attention.self.key attention.self.value") -> Stack:
    return Stack(
        f"{path}.encoder.layer",
        f"{attention} attention.output.dense",
        "intermediate.dense output.dense",
        "attention.output.LayerNorm",
        "output.LayerNorm",
    )


def _llama(q_norms: str = "", attention_norms: str = "input_layernorm", ffn_norms: str = "") -> Stack:
    return Stack(
        "model.layers",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
        "mlp.gate_proj mlp.up_proj mlp.down_proj",
        f"{attention_norms} {q_norms}",
        ffn_norms or "post_attention_layernorm",
    )


def _bart(path: str, cross: bool = False) -> Stack:
    heads = ["self_attn", "encoder_attn"] if cross else ["self_attn"]
    return Stack(
        path,
        " ".join(f"{h}.{p}" for h in heads for p in ("q_proj", "k_proj", "v_proj", "out_proj")),
        "fc1 fc2",
        " ".join(f"{h}_layer_norm" for h in heads),
        "final_layer_norm",
    )


def _t5(path: str, cross: bool) -> Stack:
    attention = " ".join(f"layer.0.SelfAttention.{p}" for p in "qkvo")
    if not cross:
        ffn = "layer.1.DenseReluDense.wi layer.1.DenseReluDense.wo"
        return Stack(path, attention, ffn, "layer.0.layer_norm", "layer.1.layer_norm", _T5_BIAS)
    attention += " " + " ".join(f"layer.1.EncDecAttention.{p}" for p in "qkvo")
    ffn = "layer.2.DenseReluDense.wi layer.2.DenseReluDense.wo"
    return Stack(path, attention, ffn, "layer.0.layer_norm layer.1.layer_norm", "layer.2.layer_norm", _T5_BIAS)


_T5_BIAS = "layer.0.SelfAttention.relative_attention_bias"
_HEAD = "classifier.dense classifier.out_proj"
_KV = dict(num_key_value_heads=1, head_dim=8)
_GEMMA2 = _llama(
    attention_norms="input_layernorm post_attention_layernorm",
    ffn_norms="pre_feedforward_layernorm post_feedforward_layernorm",
)

FAMILIES = {
    "bert": Family(
        (_bert("bert"),), "classifier", embedding_norms="bert.embeddings.LayerNorm", pooler="bert.pooler.dense"
    ),
    "roberta": Family((_bert("roberta"),), _HEAD, embedding_norms="roberta.embeddings.LayerNorm"),
    "electra": Family(
        (_bert("electra"),), _HEAD, dict(embedding_size=8), embedding_norms="electra.embeddings.LayerNorm"
    ),
    "deberta-v2": Family(
        (_bert("deberta", "attention.self.query_proj attention.self.key_proj attention.self.value_proj"),),
        "pooler.dense classifier",
        # The convolution and the norm of the relative embeddings stand outside the blocks.
        dict(relative_attention=True, norm_rel_ebd="layer_norm", conv_kernel_size=3, position_buckets=4),
        embedding_norms="deberta.embeddings.LayerNorm",
    ),
    "distilbert": Family(
        (
            Stack(
                "distilbert.transformer.layer",
                "attention.q_lin attention.k_lin attention.v_lin attention.out_lin",
                "ffn.lin1 ffn.lin2",
                "sa_layer_norm",
                "output_layer_norm",
            ),
        ),
        "pre_classifier classifier",
        dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32),
        embedding_norms="distilbert.embeddings.LayerNorm",
    ),
    "albert": Family(
        (
            Stack(
                "albert.encoder.albert_layer_groups.0.albert_layers",
                "attention.query attention.key attention.value attention.dense",
                "ffn ffn_output",
                "attention.LayerNorm",
                "full_layer_layer_norm",
            ),
        ),
        "classifier",
        dict(embedding_size=8, inner_group_num=2),
        embedding_norms="albert.embeddings.LayerNorm",
        pooler="albert.pooler",
    ),
    "mpnet": Family(
        (
            Stack(
                "mpnet.encoder.layer",
                "attention.attn.q attention.attn.k attention.attn.v attention.attn.o",
                "intermediate.dense output.dense",
                "attention.LayerNorm",
                "output.LayerNorm",
            ),
        ),
        _HEAD,
        embedding_norms="mpnet.embeddings.LayerNorm",
    ),
    "modernbert": Family(
        # Block 0 has an Identity for its attn_norm.
        (Stack("model.layers", "attn.Wqkv attn.Wo", "mlp.Wi mlp.Wo", "attn_norm", "mlp_norm"),),
        "head.dense head.norm classifier",
        embedding_norms="model.embeddings.norm",
    ),
    "esm": Family(
        (
            Stack(
                "esm.encoder.layer",
                "attention.self.query attention.self.key attention.self.value attention.output.dense",
                "intermediate.dense output.dense",
                "attention.LayerNorm",
                "LayerNorm",
            ),
        ),
        _HEAD,
        dict(pad_token_id=1, mask_token_id=3, emb_layer_norm_before=True),
        embedding_norms="esm.embeddings.layer_norm",
    ),
    "vit": Family(
        (
            Stack(
                "vit.layers",
                "attention.q_proj attention.k_proj attention.v_proj attention.o_proj",
                "mlp.fc1 mlp.fc2",
                "layernorm_before",
                "layernorm_after",
            ),
        ),
        "classifier",
        dict(image_size=8, patch_size=4),
    ),
    "t5": Family(
        (_t5("transformer.encoder.block", False), _t5("transformer.decoder.block", True)),
        "classification_head.dense classification_head.out_proj",
        dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
    ),
    "bart": Family(
        (_bart("model.encoder.layers"), _bart("model.decoder.layers", cross=True)),
        "classification_head.dense classification_head.out_proj",
        dict(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        ),
        embedding_norms="model.encoder.layernorm_embedding model.decoder.layernorm_embedding",
    ),
    "gpt2": Family(
        (Stack("transformer.h", "attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", "ln_1", "ln_2"),),
        "score",
        dict(n_embd=16, n_layer=2, n_head=2),
    ),
    # OPT registers the decoder's final norm before its blocks; it is no norm of the embeddings.
    "opt": Family((_bart("model.decoder.layers"),), "score", dict(ffn_dim=32, word_embed_proj_dim=16)),
    "llama": Family((_llama(),), "score", dict(num_key_value_heads=1)),
    "mistral": Family((_llama(),), "score", dict(num_key_value_heads=1)),
    "qwen2": Family((_llama(),), "score", dict(num_key_value_heads=1)),  # with biases on q, k, v
    "qwen3": Family((_llama("self_attn.q_norm self_attn.k_norm"),), "score", _KV),
    "gemma": Family((_llama(),), "score", _KV),
    "gemma2": Family((_GEMMA2,), "score", _KV),
    "gemma3_text": Family(
        (
            _llama(
                "self_attn.q_norm self_attn.k_norm",
                "input_layernorm post_attention_layernorm",
                "pre_feedforward_layernorm post_feedforward_layernorm",
            ),
        ),
        "score",
        _KV,
    ),
    "glm4": Family(  # registers post_attention_layernorm, the FFN's, between the attention's two
        (
            Stack(
                "model.layers",
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
                "mlp.gate_up_proj mlp.down_proj",
                "input_layernorm post_self_attn_layernorm",
                "post_attention_layernorm post_mlp_layernorm",
            ),
        ),
        "score",
        _KV,
    ),
    "phi": Family(  # one norm before attention and FFN side by side; narrower norms of q and k
        (
            Stack(
                "model.layers",
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense",
                "mlp.fc1 mlp.fc2",
                "input_layernorm self_attn.q_layernorm self_attn.k_layernorm",
                "",
            ),
        ),
        "score",
        dict(qk_layernorm=True),
    ),
}


def build(name: str, device: str = "meta") -> nn.Module:
    config = AutoConfig.for_model(name, **{**SHAPE, **FAMILIES[name].config})
    auto = AutoModelForImageClassification if name == "vit" else AutoModelForSequenceClassification
    with torch.device(device):
        return auto.from_config(config)


def names_of(model: nn.Module, modules: list[str]) -> set[str]:
    """The parameters that these modules own; every module of the list must be of use in some block."""
    names = {n for n, _ in model.named_parameters()}
    found = {m: {n for n in names if n.rpartition(".")[0] == m} for m in modules}
    for module in modules:
        if not found[module]:
            twin = module.replace(".0.", ".1.") if ".0." in module else module.replace(".1.", ".0.")
            assert found.get(twin), f"the table names {module}, which holds no parameter"
    return set().union(*found.values())


def trained(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    family, model = FAMILIES[name], build(name)
    everything = {n for n, _ in model.named_parameters()}
    head = names_of(model, family.head.split())

    def expect(*fields: str) -> set[str]:
        return names_of(model, [m for stack in family.stacks for m in stack.modules(fields)])

    blocks = {n for n in everything if n.startswith(tuple(s.path + "." for s in family.stacks))}
    assert blocks == expect("attention", "ffn", "attention_norms", "ffn_norms") | {
        n for n in blocks if any(o and o in n for s in family.stacks for o in s.other.split())
    }
    wanted = {
        "full": everything,
        "ffn": expect("ffn"),
        "attention": expect("attention"),
        "layernorm": expect("attention_norms", "ffn_norms"),
        "layernorm-attention": expect("attention_norms"),
        "layernorm-ffn": expect("ffn_norms"),
        "bitfit": {n for n in blocks if n.endswith(".bias")},
        "frozen": set(),
    }
    before = dict(model.named_parameters())
    for regime, names in wanted.items():
        if not names and regime != "frozen":
            with pytest.raises(ValueError, match="matches nothing"):
                tune(model, regime)
            continue
        report = tune(model, regime)
        assert trained(model) == names | head, regime
        assert set(report.names) == names
        assert set(report.head_names) == head
        assert report.trainable == sum(before[n].numel() for n in names | head)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(after[n] is p for n, p in before.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_family_blocks_in_order(name: str) -> None:
    stacks = FAMILIES[name].stacks
    assert read(build(name)).blocks == tuple(f"{s.path}.{i}" for s in stacks for i in (0, 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_family_embedding_norms_and_pooler(name: str) -> None:
    family, model = FAMILIES[name], build(name)
    anatomy = read(model)
    assert set(anatomy.embedding_norms) == names_of(model, family.embedding_norms.split())
    assert set(anatomy.pooler) == names_of(model, family.pooler.split())


def test_counts_agree_with_tune() -> None:
    for name in FAMILIES:
        model = build(name)
        for row in counts(model):
            if row.count and row.regime not in ("frozen", "random"):
                assert row.count == tune(model, row.regime).count, (name, row.regime)


def test_cross_attention_of_gpt2() -> None:
    """ln_cross_attn is the cross-attention's, though ln_2 is registered before it."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, add_cross_attention=True)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    report = tune(model, "layernorm-attention")
    assert {n.split(".")[3] for n in report.names} == {"ln_1", "ln_cross_attn"}
    assert {n.split(".")[3] for n in tune(model, "layernorm-ffn").names} == {"ln_2"}


class SelfAttention(nn.Module):
    """Known by its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)


class Mixer(SelfAttention):
    """Known by its heads alone."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 2


class Rotary(nn.Module):
    """Has heads and no parameters: no attention."""

    head_dim: int

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 4


class ScaledLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.gamma = nn.Parameter(torch.ones(8))


CHILDREN = {"norm": lambda: nn.LayerNorm(8), "attn": SelfAttention, "mixer": Mixer, "rope": Rotary, "mlp": ScaledLinear}


def model_of_blocks(*blocks: str) -> nn.Module:
    """One block for each list of children; what a child is stands in its name, and dots put it into ModuleLists."""
    model = nn.Module()
    model.layers = nn.ModuleList()
    for children in blocks:
        model.layers.append(block := nn.Module())
        for name in children.split():
            kind = next(kind for kind in CHILDREN if kind in name)
            child, (first, *rest) = CHILDREN[kind](), name.split(".")
            if not rest:
                block.add_module(name, child)
            elif rest == ["0"]:
                block.add_module(first, nn.ModuleList([child]))
            else:
                block.get_submodule(first).append(child)
    return model


@pytest.mark.parametrize(
    ("children", "attention", "ffn"),
    [
        ("norm attn mlp", "norm", ""),
        ("mixer mlp norm_1 norm_2", "norm_1", "norm_2"),
        ("attn mlp norm_1 norm_2 norm_3", "norm_1", "norm_2 norm_3"),
        ("rope attn mlp norm_1 norm_2 norm_3", "norm_1", "norm_2 norm_3"),
        ("attn mlp in_norm out_norm norm_3 norm_4 norm_5", "in_norm out_norm", "norm_3 norm_4 norm_5"),
        ("op_norm ffn_norm post_op_norm post_ffn_norm attn mlp", "op_norm post_op_norm", "ffn_norm post_ffn_norm"),
        ("mixer attn mlp norm_1 norm_2", "norm_1", "norm_2"),
        ("norm_1 attn_1 norm_2 cross_attn norm_cross mlp", "norm_1 norm_cross", "norm_2"),
        ("attn attn_norm global_attn_norm last_norm mlp", "attn_norm global_attn_norm", "last_norm"),
        ("attn.0 attn.1 mlp in_norm.0 in_norm.1 norm_2.0 norm_2.1", "in_norm.0 in_norm.1", "norm_2.0 norm_2.1"),
    ],
)
def test_deal_of_a_blocks_own_norms(children: str, attention: str, ffn: str) -> None:
    members = read(model_of_blocks(children)).members
    for part, wanted in (("attention", attention), ("ffn", ffn)):
        norms = [m.name for m in members if m.part == part and m.kind == "norm" and not m.is_bias]
        assert " ".join(n.removeprefix("layers.0.").removesuffix(".weight") for n in norms) == wanted


def test_a_scale_is_neither_linear_nor_norm() -> None:
    model = model_of_blocks("norm_1 attn norm_2 mlp")
    assert tune(model, "ffn").names == ("layers.0.mlp.weight", "layers.0.mlp.bias")
    assert "layers.0.mlp.gamma" in tune(model, "full", layers=[0]).names


def test_tied_head_is_not_head() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert tune(model, "layernorm").head_names == ()
    with pytest.raises(ValueError, match="nothing would train"):
        tune(model, "frozen")


@pytest.mark.parametrize(
    ("cls", "head"),
    [(T5ForConditionalGeneration, ()), (T5ForQuestionAnswering, ("qa_outputs.weight", "qa_outputs.bias"))],
)
def test_t5_has_no_base_model_of_its_own(cls: type, head: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = cls(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50))
    assert model.base_model is model
    assert tune(model, "layernorm").head_names == head


class Plain(nn.Module):
    """Neither from transformers nor built like it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.before = nn.Linear(16, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, nn.LayerNorm(16), False)
        self.final_norm = nn.LayerNorm(16)
        self.labels = nn.Embedding(3, 16)
        self.pooler = nn.Linear(16, 16)
        self.out = nn.Linear(16, 3)


def test_plain_torch() -> None:
    model = Plain()
    assert tune(model, "attention", train_pooler=True).head_names == ("out.weight", "out.bias")
    assert {n.split(".")[0] for n in trained(model)} == {"encoder", "out", "pooler"}
    assert tune(model, "attention").pooler == "frozen"
    inside = {n.split(".", 3)[3] for n in trained(model) if n.startswith("encoder.layers.1.")}
    assert inside == {f"self_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")}
    assert {n.split(".")[3] for n in tune(model, "ffn").names} == {"linear1", "linear2"}
    assert {n.split(".")[3] for n in tune(model, "layernorm-attention").names} == {"norm1"}
    assert {n.split(".")[3] for n in tune(model, "layernorm-ffn").names} == {"norm2"}
    assert "encoder.layers.0.self_attn.in_proj_bias" in tune(model, "bitfit").names


def test_plain_wrapper_around_transformers(small_bert) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_bert().bert
            self.out = nn.Linear(16, 3)

    model = Wrapper()
    report = tune(model, "layernorm", train_pooler=True, embedding_norm=True)
    assert report.head_names == ("out.weight", "out.bias") and report.pooler == "trained"
    assert trained(model) == set(report.names) | {f"{m}.{p}" for m in ("out", "body.pooler.dense") for p in _WB}
    assert report.names[:2] == ("body.embeddings.LayerNorm.weight", "body.embeddings.LayerNorm.bias")


_WB = ("weight", "bias")


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: nn.Sequential(m), lambda m: nn.ModuleDict({"module": m})])
def test_wrapped_model_has_the_same_head(small_bert, wrap) -> None:
    report = tune(wrap(small_bert()), "bitfit")
    assert [n.split(".", 1)[1] for n in report.head_names] == ["classifier.weight", "classifier.bias"]
    assert report.count == 2 * (4 * 16 + 32 + 16 + 2 * 16)


def test_wrapped_blocks(small_bert) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = small_bert()
    plain = tune(model, "layernorm-ffn").count
    model.bert.encoder.layer[1] = checkpoint_wrapper(model.bert.encoder.layer[1])
    assert tune(model, "layernorm-ffn").count == plain == 64


def test_repeated_block_counts_once() -> None:
    model = Plain()
    model.encoder.layers.append(model.encoder.layers[0])
    report = tune(model, "layernorm")
    assert report.per_layer == (64, 64) and report.count == 128


def test_blocks_with_another_mixer() -> None:
    """A block without attention: its FFN and norms are known from its siblings, its mixer is neither."""
    model = model_of_blocks("norm_1 attn norm_2 mlp", "norm_1 ssm_mlp norm_2 mlp ssm_norm")
    assert tune(model, "ffn", layers=[1]).names == ("layers.1.mlp.weight", "layers.1.mlp.bias")
    assert tune(model, "layernorm-ffn", layers=[1]).names == ("layers.1.norm_2.weight", "layers.1.norm_2.bias")
    assert "layers.1.ssm_norm.weight" in tune(model, "layernorm", layers=[1]).names
    with pytest.raises(ValueError, match="matches nothing.*other linear"):
        tune(model, "attention", layers=[1])
    assert {m.part for m in read(model).members if ".ssm" in m.name} == {"other"}
