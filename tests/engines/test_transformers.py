"""Models and adapters by url in the real transformers and PEFT; run in an environment that has them.

Tiny models, made from a configuration. Equality is that of every parameter and of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers

import rdmaload
from rdmaload.errors import LayoutMismatchError, NotSupportedError
from rdmaload.integrations import metadata
from rdmaload.integrations.modules import materialize
from rdmaload.integrations.transformers import from_pretrained, load_adapter, load_tokenizer
from tests.engines.make_models import tokenizer
from tests.support.servers import RedisServer

pytestmark = pytest.mark.engines

SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
INPUT = torch.tensor([[1, 5, 7, 100, 500]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RDMALOAD_CACHE_DIR", str(tmp_path / "cache"))
    yield
    metadata.release()


def _llama(tied: bool = False, **more: Any) -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied, **more)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _saved(model: Any, directory: Path, url: str) -> str:
    model.save_pretrained(directory, max_shard_size="20KB")
    rdmaload.save(directory, url)
    return url


def _same(one: Any, other: Any) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    with torch.no_grad():
        assert torch.equal(one(INPUT).logits, other(INPUT).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_by_its_url(server: RedisServer, tmp_path: Path, tied: bool) -> None:
    original = _llama(tied)
    original.generation_config.max_new_tokens = 17
    url = _saved(original, tmp_path / "m", server.url("llama"))
    loaded = from_pretrained(transformers.AutoModelForCausalLM, url)
    _same(loaded, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m"))
    _same(loaded, original)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert loaded.generation_config.max_new_tokens == 17
    assert not loaded.training
    own_class = from_pretrained(transformers.LlamaForCausalLM, url, connections=2)
    _same(own_class, original)


def test_tensors_are_not_copied(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = _saved(_llama(), tmp_path / "m", server.url("llama"))
    places = {}
    original = rdmaload.Model.load

    def load(self: rdmaload.Model, **arguments: Any) -> Any:
        state = original(self, **arguments)
        places.update({name: tensor.data_ptr() for name, tensor in state.items()})
        return state

    monkeypatch.setattr(rdmaload.Model, "load", load)
    loaded = from_pretrained(transformers.AutoModelForCausalLM, url)
    assert {name: tensor.data_ptr() for name, tensor in loaded.state_dict().items()} == places


def test_another_dtype_and_a_mixture_of_experts(server: RedisServer, tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    original = transformers.MixtralForCausalLM(config).eval()
    url = _saved(original, tmp_path / "moe", server.url("moe"))  # its experts are fused in memory, not in the files
    loaded = from_pretrained(transformers.AutoModelForCausalLM, url, dtype=torch.bfloat16)
    _same(loaded, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.bfloat16))


def test_parameters_that_are_not_stored(server: RedisServer, tmp_path: Path) -> None:
    original = _llama()
    url = _saved(original, tmp_path / "m", server.url("llama"))
    with pytest.raises(LayoutMismatchError, match=r"1 parameters of LlamaForSequenceClassification are not stored"):
        from_pretrained(transformers.AutoModelForSequenceClassification, url)
    loaded = from_pretrained(transformers.AutoModelForSequenceClassification, url, strict=False)
    assert torch.equal(loaded.model.embed_tokens.weight, original.model.embed_tokens.weight)
    with pytest.raises(NotSupportedError, match="AutoModelForImageClassification has no model for LlamaConfig"):
        from_pretrained(transformers.AutoModelForImageClassification, url)
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 64})
    with pytest.raises((LayoutMismatchError, RuntimeError)):
        from_pretrained(transformers.AutoModelForCausalLM, url, config=config)


def test_a_save_between_configuration_and_weights(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = _llama()
    url = _saved(original, tmp_path / "m", server.url("llama"))
    config_of = transformers.AutoConfig.from_pretrained

    def replaced(*arguments: Any, **keywords: Any) -> Any:
        torch.manual_seed(9)
        config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 64})
        _saved(transformers.LlamaForCausalLM(config), tmp_path / "new", url)
        return config_of(*arguments, **keywords)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", replaced)
    _same(from_pretrained(transformers.AutoModelForCausalLM, url), original)


def test_tokenizer(server: RedisServer, tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "m")
    url = _saved(_llama(), tmp_path / "m", server.url("llama"))
    assert load_tokenizer(url)("hello world").input_ids == tokenizer()("hello world").input_ids


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_on_the_meta_device(server: RedisServer, tmp_path: Path, tied: bool) -> None:
    original = _llama(tied)
    url = _saved(original, tmp_path / "m", server.url("llama"))
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.LlamaForCausalLM(original.config)
    assert materialize(model, url) is model
    _same(model.eval(), original)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    with torch.device("meta"):  # which takes the rotary buffers, too
        model = transformers.LlamaForCausalLM(original.config)
    with pytest.raises(LayoutMismatchError, match="include_buffers=False"):
        materialize(model, url)


class Net(torch.nn.Module):
    """One of plain torch: a tie without a method that makes it, buffers that are saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.arange(4.0))
        self.register_buffer("computed", torch.arange(5), persistent=False)


def test_plain_torch_on_the_meta_device(server: RedisServer) -> None:
    original = Net()
    original.scale.add_(3)
    original.norm(torch.randn(8, 4))  # its statistics are buffers, too
    rdmaload.save(original, server.url("net"))
    with accelerate.init_empty_weights(include_buffers=False):
        module = Net()
    assert module.head.weight is not module.embed.weight  # what accelerate does
    materialize(module, server.url("net"))
    assert module.head.weight is module.embed.weight
    for name, tensor in original.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    assert torch.equal(module.computed, torch.arange(5))


def test_load_into_a_model_that_has_its_memory(server: RedisServer, tmp_path: Path) -> None:
    original = _llama(tied=True)
    url = _saved(original, tmp_path / "m", server.url("llama"))
    model = transformers.LlamaForCausalLM(original.config).to(torch.bfloat16).eval()
    rdmaload.load_into(model, url)
    _same(model, original)


def test_adapters(server: RedisServer, tmp_path: Path) -> None:
    original = _llama()
    base_url = _saved(original, tmp_path / "m", server.url("llama"))
    for number in range(2):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(_llama(), config).eval()
        adapted.save_pretrained(tmp_path / f"lora{number}")
        rdmaload.save(tmp_path / f"lora{number}", server.url(f"lora{number}"))
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    expected = peft.PeftModel.from_pretrained(own, tmp_path / "lora0", adapter_name="zero").eval()
    expected.load_adapter(tmp_path / "lora1", "one")
    base = from_pretrained(transformers.AutoModelForCausalLM, base_url)
    model = load_adapter(base, server.url("lora0"), adapter_name="zero").eval()
    assert load_adapter(model, server.url("lora1"), adapter_name="one") is model
    with torch.no_grad():
        for name in ("zero", "one"):
            model.set_adapter(name)
            expected.set_adapter(name)
            assert torch.equal(model(INPUT).logits, expected(INPUT).logits)
            assert not torch.equal(model(INPUT).logits, original(INPUT).logits)
        with model.disable_adapter():
            assert torch.equal(model(INPUT).logits, original(INPUT).logits)
