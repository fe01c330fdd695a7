"""``integrations.servers``: PyTorch's slot for real, the servers' against stand-ins of their interfaces."""

import re
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pluggy
import pytest
import torch
from torch.nn import attention

import rf_kernels as rf
from helpers import family_case as family
from rf_kernels.integrations import servers, wan


def qkv(*shape):
    torch.manual_seed(0)
    return [torch.randn(*shape) for _ in range(3)]


def plain(q, k, v, scale=None):
    """``[B, S, H, D]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


@pytest.mark.skipif(
    not hasattr(attention, "register_flash_attention_impl"), reason="PyTorch without the slot"
)
def test_pytorchs_slot():
    """On the CPU's key: SDPA itself takes another op there, so the op is called by its name."""
    servers.register_with_torch("RF-test", dispatch_key="CPU")
    assert "RF-test" in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() != "RF-test"
    attention.activate_flash_attention_impl("RF-test")
    try:
        aten = torch.ops.aten
        q, k, v = (x.transpose(1, 2) for x in qkv(2, 7, 3, 16))
        out, lse, *_, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            q, k, v, scale=0.3
        )
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        wanted = torch.nn.functional.scaled_dot_product_attention(*leaves, scale=0.3)
        assert (max_q, max_k) == (7, 7)
        torch.testing.assert_close(out, wanted.detach())
        logits = torch.logsumexp(q @ k.transpose(-1, -2) * 0.3, -1)
        torch.testing.assert_close(lse, logits)
        grad = torch.randn_like(out)
        found = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, 7, 7, 0.0, False, seed, offset, scale=0.3
        )
        for a, b in zip(found, torch.autograd.grad(wanted, leaves, grad), strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(rf.ArgumentError, match="argument `is_causal`"):
            aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)
    finally:
        attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None


def test_vllm_omni():
    q, k, v = qkv(2, 5, 2, 16)
    found = servers.vllm_omni_attention(q, k, v, {}, False, 0.25)
    torch.testing.assert_close(found, plain(q, k, v, 0.25))
    assert servers.vllm_omni_attention.capabilities == {"supports_attention_mask": False}
    with pytest.raises(rf.ArgumentError, match="is_causal"):
        servers.vllm_omni_attention(q, k, v, {}, True, 0.25)


def modules(monkeypatch, **named):
    for name, contents in named.items():
        parts = name.split("__")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        vars(sys.modules[".".join(parts)]).update(contents)


def test_lightx2v(monkeypatch):
    registry = {}

    def register(name):
        return lambda cls: registry.setdefault(name, cls)

    modules(
        monkeypatch,
        lightx2v__common__ops__attn__template={"AttnWeightTemplate": type("AttnWeightTemplate", (), {})},
        lightx2v__utils__registry_factory={"ATTN_WEIGHT_REGISTER": register},
    )
    assert servers.register_with_lightx2v() is registry["rf_attn"]
    q, k, v = qkv(1, 6, 2, 16)
    found = registry["rf_attn"]().apply(q[0], k[0], v[0], max_seqlen_q=6, max_seqlen_kv=6)
    torch.testing.assert_close(found, plain(q, k, v)[0].flatten(1))


def test_sglang(monkeypatch):
    hooks = {}
    registry = type("HookRegistry", (), {"register": staticmethod(lambda *a: hooks.update({a[0]: a[1:]}))})
    modules(
        monkeypatch,
        sglang__multimodal_gen__runtime__plugins__hook_registry={
            "HookRegistry": registry,
            "HookType": types.SimpleNamespace(AROUND="around"),
        },
    )
    monkeypatch.delenv("RF_SGLANG", raising=False)
    servers.sglang_plugin()
    assert not hooks
    monkeypatch.setenv("RF_SGLANG", "1")
    servers.sglang_plugin()
    ((target, (hook, kind)),) = hooks.items()
    assert target.endswith("get_attn_backend_cls_str") and kind == "around"
    assert hook(lambda: "x.FlashAttentionBackend") == "rf_kernels.integrations.servers.SGLangBackend"
    assert hook(lambda: "x.SDPABackend") == "x.SDPABackend"
    q, k, v = qkv(1, 5, 2, 32)
    impl = servers.SGLangBackend.get_impl_cls()(2, 32, 0.2)
    torch.testing.assert_close(impl.forward(q, k, v, None), plain(q, k, v, 0.2))


@pytest.mark.parametrize("switch", ["", "1"])
def test_scope(monkeypatch, switch):
    """Its plug-in manager is pluggy's, and that is real here; its pipelines are stand-ins."""
    from rf_kernels.integrations import scope as plugin

    class Specification:
        @pluggy.HookspecMarker("scope")
        def register_pipelines(self, register): ...

    class RewardForcingPipeline:
        def __init__(self, config, quantization=None):
            model = family.Model(family.RewardForcing, local_attn_size=4, sink_size=1)
            self.components = types.SimpleNamespace(generator=model)

    monkeypatch.setenv("RF_SCOPE", switch)
    modules(
        monkeypatch,
        scope__core__pipelines__reward_forcing__pipeline={"RewardForcingPipeline": RewardForcingPipeline},
    )
    manager = pluggy.PluginManager("scope")
    manager.add_hookspecs(Specification)
    manager.register(plugin)
    registered = []
    for _ in range(2):  # once more when other plug-ins come
        manager.hook.register_pipelines(register=registered.append)
    assert not registered  # the pipelines are Scope's own
    model = RewardForcingPipeline({}, quantization=None).components.generator
    forwards = [block.self_attn.__dict__.get("forward") for block in model.blocks]
    assert all(isinstance(f, wan.SelfAttention) for f in forwards) == bool(switch)
    assert not switch or all(f.family is wan.FAMILIES["reward_forcing"] for f in forwards)


def test_entry_points():
    """One plug-in a package is what Scope allows. Each entry point can be loaded."""
    wanted = {"vllm_omni.sparse_attn", "sglang.multimodal_gen.plugins", "scope"}
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    found = re.findall(r'\[project\.entry-points\."?([\w.]+)"?\]\n((?:\S+ = ".+"\n)+)', text)
    assert {group for group, _ in found} == wanted
    for group, lines in found:
        ((name, value),) = re.findall(r'(\S+) = "(.+)"', lines)
        EntryPoint(name, value, group).load()
