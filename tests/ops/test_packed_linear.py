"""packed_linear: the same numbers packed and unpacked, and packed parameters that stay ordinary parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from petune_kernels import matmul
from petune_kernels.ops.packed_linear import is_packed, pack, packed_linear, unpack


def three(K=8, dtype=torch.float32, bias=True):
    return nn.ModuleList([nn.Linear(K, N, bias=bias) for N in (8, 4, 5)]).to(dtype).requires_grad_(False)


def run(layers, x, **kwargs):
    return packed_linear(x, [m.weight for m in layers], [m.bias for m in layers], **kwargs)


def matmuls(f):
    """The number of matmuls that f runs, read from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_"))


@pytest.mark.parametrize("kind", ["same", "mixed", "replicas", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_against_float64(packed, dtype, kind):
    layers = three(dtype=dtype, bias=kind != "none")
    biases = [m.bias for m in layers]
    if kind == "mixed":  # float32, and one without
        biases = [biases[0].float(), None, biases[2].float()]
    elif kind == "replicas":
        biases = [torch.randn(2, c.shape[0]).to(dtype) for c in biases]
    for c in biases:
        c is None or c.requires_grad_(True)
    if packed:
        assert pack(layers)
    x = torch.randn(3, 4, 8).to(dtype).requires_grad_(True)
    y = packed_linear(x, [m.weight for m in layers], biases)
    dy = [torch.randn_like(t) for t in y]
    torch.autograd.backward(list(y), dy)
    x64, dx = x.detach().double(), 0
    close = {"rtol": 2e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for layer, c, out, d in zip(layers, biases, y, dy, strict=True):
        want = x64 @ layer.weight.double().T
        if c is not None:
            rows = c.detach().double().reshape(-1, c.shape[-1])
            want = want + rows.repeat_interleave(12 // rows.shape[0], 0).reshape(want.shape)
            sums = d.double().reshape(rows.shape[0], -1, c.shape[-1]).sum(1).reshape(c.shape)
            torch.testing.assert_close(c.grad.double(), sums, **close)
        torch.testing.assert_close(out.double(), want, **close)
        dx = dx + d.double() @ layer.weight.double()
    torch.testing.assert_close(x.grad.double(), dx, **close)


def test_one_matmul_each_way_when_packed():
    layers, x = three(), torch.randn(6, 8, requires_grad=True)
    counts = {}
    for packed in (False, True):
        if packed:
            pack(layers)
        forward = matmuls(lambda: run(layers, x))
        y = sum(t.sum() for t in run(layers, x))
        counts[packed] = forward, matmuls(y.backward)
    assert counts[True] == (1, 1)
    assert counts[False][0] == 3 and counts[False][1] >= 3


def test_pack_keeps_the_parameters():
    layers = three()
    before, values = dict(layers.named_parameters()), copy.deepcopy(layers.state_dict())
    assert pack(layers) and is_packed(layers)
    assert not pack(layers), "already packed"
    after = dict(layers.named_parameters())
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    torch.testing.assert_close(layers.state_dict(), values, rtol=0, atol=0)
    assert not any(p.requires_grad for p in after.values())
    unpack(layers)
    assert not is_packed(layers)
    assert len({p.untyped_storage().data_ptr() for p in after.values()}) == len(after)
    torch.testing.assert_close(layers.state_dict(), values, rtol=0, atol=0)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda m: m.to(torch.float64),
        lambda m: m.bfloat16(),
        copy.deepcopy,
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True) and m,
        lambda m: m.to_empty(device="cpu").apply(lambda c: c.reset_parameters() if isinstance(c, nn.Linear) else None),
    ],
    ids=["double", "bfloat16", "deepcopy", "assigning load", "to_empty"],
)
def test_broken_adjacency_is_seen(break_it):
    layers = three()
    pack(layers)
    layers = break_it(layers)
    assert not is_packed(layers)
    x = torch.randn(6, 8).to(layers[0].weight.dtype)
    for packed in (False, True):
        assert is_packed(layers) == packed
        for out, layer in zip(run(layers, x), layers, strict=True):
            torch.testing.assert_close(out, layer(x))
        pack(layers)


def test_in_place_load_and_pickle_stay_packed():
    layers = three()
    pack(layers)
    layers.load_state_dict({k: torch.ones_like(v) for k, v in layers.state_dict().items()})
    assert is_packed(layers)
    again = pickle.loads(pickle.dumps(layers))
    x = torch.randn(6, 8)
    for out, layer in zip(run(again, x), layers, strict=True):
        torch.testing.assert_close(out, layer(x))


def test_order_and_gaps_are_seen():
    layers = three()
    pack(layers)
    w = [m.weight for m in layers]
    assert matmul.behind_one_another(w) is not None
    assert matmul.behind_one_another([w[1], w[0]]) is None
    assert matmul.behind_one_another([w[0], w[2]]) is None
    x = torch.randn(6, 8)
    for out, layer in zip(packed_linear(x, [w[2], w[0]]), (layers[2], layers[0]), strict=True):
        torch.testing.assert_close(out, nn.functional.linear(x, layer.weight))


def test_a_trained_weight_gets_its_gradient():
    layers, x = three(), torch.randn(6, 8)
    pack(layers)
    layers[1].weight.requires_grad_(True)
    run(layers, x)[1].sum().backward()
    torch.testing.assert_close(layers[1].weight.grad, x.sum(0).expand(4, -1))
    assert layers[0].weight.grad is None
    torch.optim.SGD(layers.parameters(), lr=1.0).step()
    assert is_packed(layers)
    torch.testing.assert_close(run(layers, x)[1], layers[1](x))


def test_fullgraph_compile_follows_the_weights():
    """Compiled while packed, then the memory moves: nothing stale."""
    layers, x = three(), torch.randn(6, 8, requires_grad=True)
    pack(layers)
    f = torch.compile(lambda x: run(layers, x), fullgraph=True, backend="aot_eager")
    for change in (lambda: None, lambda: unpack(layers), lambda: layers[0].weight.data.mul_(2.0)):
        change()
        for out, layer in zip(f(x), layers, strict=True):
            torch.testing.assert_close(out, layer(x))
    sum(t.sum() for t in f(x)).backward()
    torch.testing.assert_close(x.grad, sum(m.weight.sum(0) for m in layers).expand(6, -1))


def test_opcheck_and_gradcheck():
    layers, x = three(), torch.randn(6, 8)
    pack(layers)
    tests = ("test_schema", "test_faketensor")
    w, bias = [m.weight for m in layers], [m.bias for m in layers]
    torch.library.opcheck(torch.ops.petune.packed_linear.default, (x, w, bias), test_utils=tests)
    torch.library.opcheck(torch.ops.petune.packed_linear_backward.default, (torch.ones(6, 17), w), test_utils=tests)
    double = three(dtype=torch.float64).requires_grad_(True)
    flat = [x.double().requires_grad_(True), *double.parameters()]
    assert torch.autograd.gradcheck(lambda x, *t: packed_linear(x, t[0::2], t[1::2]), flat)


def test_bert_saves_and_loads(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.BertModel(config).eval()
    plain = copy.deepcopy(model.state_dict())
    for layer in model.encoder.layer:
        attention = layer.attention.self
        assert pack([attention.query, attention.key, attention.value])
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert saved.keys() == plain.keys()
    torch.testing.assert_close(saved, dict(plain), rtol=0, atol=0)
    assert (
        sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
        < 1.1 * sum(t.nbytes for t in plain.values()) + 8192
    )
    assert is_packed([attention.query, attention.key, attention.value]), "saving must not move them"
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), dict(plain), rtol=0, atol=0)
    safetensors.torch.save_file(dict(model.state_dict()), tmp_path / "direct.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.testing.assert_close(torch.load(tmp_path / "model.pt"), dict(plain), rtol=0, atol=0)


def test_bad_input():
    a, b = nn.Linear(8, 4), nn.Linear(8, 4)
    for modules, kind, message in (
        ([], ValueError, "modules is empty"),
        ([a, nn.ReLU()], TypeError, r"modules\[1\] is a ReLU"),
        ([a, a], ValueError, r"modules\[1\] has the same weight"),
        ([a, nn.Linear(9, 4)], ValueError, r"modules\[1\].weight is \(4, 9\)"),
        ([a, nn.Linear(8, 4).half()], ValueError, "K, dtype and device must agree"),
        ([a, nn.Linear(8, 4, device="meta")], TypeError, "no floating"),
        ([a, nn.LayerNorm(4)], TypeError, "no floating"),
    ):
        with pytest.raises(kind, match=message):
            pack(modules)
    x = torch.zeros(3, 8)
    for args, kind, message in (
        ((x, []), ValueError, "packed_linear: w is empty"),
        ((x, [a.weight], [None, None]), ValueError, "bias has 2 entries for 1"),
        ((x.bfloat16(), [a.weight.bfloat16(), b.weight.bfloat16()], [a.bias, b.bias.bfloat16()]), TypeError, "several"),
    ):
        with pytest.raises(kind, match=message):
            packed_linear(*args)
