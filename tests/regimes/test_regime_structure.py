"""Which parameters each regime picks, family by family, against lists written out by hand."""

from __future__ import annotations

import pytest
import torch
from regime_families import FAMILIES, Plain, build
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
)

from petune_kernels.regimes import counts, tune
from petune_kernels.regimes.structure import read


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
