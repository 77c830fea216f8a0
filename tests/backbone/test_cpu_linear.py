"""Frozen linear maps multiplied by oneDNN: the same numbers, the same gradients, and only where it can serve."""

import pytest
import torch
from torch import nn

import fastedit
from fastedit import _native
from fastedit.backbone import cpu_linear as products
from fastedit.backbone.cpu_linear import OneDnnLinear, choose_linear, torch_products, use_onednn
from fastedit.requests import Query
from fastedit.testing import assert_close
from tests.backbone.padded import prefix, tail

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("shape", [(8, 33), (2, 7, 33), (200, 33), (3, 33), (0, 33)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_torch(shape, bias):
    make = torch.Generator().manual_seed(0)
    linear = nn.Linear(33, 65, bias=bias).requires_grad_(False)
    fast = nn.Sequential(nn.Linear(33, 65, bias=bias)).requires_grad_(False)
    fast[0].load_state_dict(linear.state_dict())
    assert use_onednn(fast) == 1
    x = torch.randn(shape, generator=make).requires_grad_()
    up = torch.randn(*shape[:-1], 65, generator=make)
    y = fast(x)
    (grad,) = torch.autograd.grad(y, x, up)
    wide = linear.weight.double()
    goal = x.detach().double() @ wide.T + (linear.bias.double() if bias else 0.0)
    assert_close(y, goal, length=33)
    assert_close(grad, up.double() @ wide, length=65)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 64])
def test_autocast_has_its_dtype_whatever_the_rows(rows):
    fast = nn.Sequential(nn.Linear(33, 65)).requires_grad_(False)
    use_onednn(fast)
    x = torch.randn(rows, 33)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), nn.functional.linear(x, fast[0].weight, fast[0].bias))
        assert fast(x).dtype == torch.bfloat16


@needs_onednn
def test_it_is_onednn_that_multiplies(monkeypatch):
    called = []
    real = products.onednn_product
    monkeypatch.setattr(products, "onednn_product", lambda *a: called.append(len(a)) or real(*a))
    layer = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False)
    use_onednn(layer)
    layer(torch.zeros(8, 16))
    assert called == [3]
    # few rows, other dtypes and weights that learn are torch's
    layer(torch.zeros(7, 16))
    layer.double()(torch.zeros(8, 16, dtype=torch.float64))
    layer.float().requires_grad_()(torch.zeros(8, 16)).sum().backward()
    assert called == [3]
    assert layer[0].weight.grad is not None


def test_subclasses_keep_their_own_forward():
    class Other(nn.Linear):
        pass

    layers = nn.Sequential(Other(4, 4), nn.Linear(4, 4), nn.Embedding(3, 4))
    assert use_onednn(layers) == 1
    assert type(layers[0]) is Other
    assert isinstance(layers[1], OneDnnLinear)


def test_the_stock_model_is_back_inside_the_block():
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    use_onednn(layers)
    inside = []
    try:
        with torch_products(layers):
            inside.append(type(layers[0]))
            raise KeyError
    except KeyError:
        pass
    assert inside == [nn.Linear]
    assert type(layers[0]) is OneDnnLinear


def test_choice(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for vendor, chosen in (("amd", "onednn"), ("other", "onednn"), ("intel", "torch"), ("", "torch")):
        monkeypatch.setattr(_native, "processor_vendor", lambda vendor=vendor: vendor)
        assert choose_linear("auto", torch.float32, cpu) == chosen
        assert choose_linear("torch", torch.float32, cpu) == "torch"
        assert choose_linear("onednn", torch.float32, cpu) == "onednn"
        assert choose_linear("auto", torch.bfloat16, cpu) == "torch"
        assert choose_linear("auto", torch.float32, torch.device("cuda")) == "torch"
    monkeypatch.setattr(_native, "processor_vendor", lambda: "amd")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert choose_linear("auto", torch.float32, cpu) == "torch"


@needs_onednn
@pytest.mark.parametrize(("outward", "inward"), [(50, 7), (7, 50), (20, 20)])
@pytest.mark.parametrize("bias", [False, True])
def test_large_weights_are_multiplied_in_parts(monkeypatch, outward, inward, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 9, inward, generator=generator), torch.randn(outward, inward, generator=generator)
    added = torch.randn(outward, generator=generator) if bias else None
    shapes = []
    real = torch.ops.mkldnn._linear_pointwise

    def multiply(a, w, *rest):
        shapes.append(tuple(w.shape))
        return real(a, w, *rest)

    monkeypatch.setattr(products, "_LARGEST", 100)
    monkeypatch.setattr(products, "_multiply", multiply)
    x.requires_grad_()
    found = products.onednn_product(x, weight, added)
    expected = torch.nn.functional.linear(x, weight, added)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0], atol=1e-4, rtol=1e-4)
    assert max(a * b for a, b in shapes) <= 100
    assert len(shapes) > 2


@needs_onednn
def test_models_answer_alike_whoever_multiplies():
    models = [fastedit.load("random:qwen2vl-tiny", linear=linear, device="cpu") for linear in ("torch", "onednn")]
    assert [model.linear for model in models] == ["torch", "onednn"]
    assert models[0].fingerprint == models[1].fingerprint
    queries = [Query("what colour is the bus?", answer="red")] * 9
    logits = []
    for model in models:
        encoded = model.encode(queries, answers=True)
        logits.append(model.head(tail(model, prefix(model, encoded, 1, "attention"))))
    assert type(models[1].adapter.head) is OneDnnLinear
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[0].abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"linear": "mkl"}, r"load: linear must be one of auto, torch, onednn \(got linear='mkl'"),
        ({"linear": "onednn", "dtype": "bfloat16"}, r"linear='onednn' needs float32 on a CPU .*dtype=bfloat16"),
    ],
)
def test_what_cannot_serve_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fastedit.load("random:qwen2vl-tiny", **settings)
