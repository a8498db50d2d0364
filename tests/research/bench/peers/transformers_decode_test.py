"""The peer without torch: made-up modules that keep what they are asked for."""

import contextlib
import gc
import sys
import types
import weakref

import pytest

from models.transformer_config import TransformerConfig
from research.bench.peers import transformers_decode as peer

CONFIG = TransformerConfig.llama3_1_8b()


class Tensor:
  """A tensor of numbers that are all the same."""

  def __init__(self, value, shape=()):
    self.value, self.shape, self.static = value, shape, False

  def fill_(self, value):
    self.value = value

  def add_(self, value):
    self.value += value

  def copy_(self, other):
    self.value = other.value

  def argmax(self, axis):
    assert axis == -1
    return Tensor(self.value + 1)

  def normal_(self):
    self.value = "random"

  def __getitem__(self, places):
    self.asked = places
    return self


class Layer:
  def __init__(self, counts):
    self.keys, self.values = Tensor("zero"), Tensor("zero")
    if counts:
      self.cumulative_length = Tensor(0)


class Model:
  """Counts its calls; what it is told of places must fit the cache."""

  def __init__(self, config, dtype, world):
    self.config, self.dtype, self.world = config, dtype, world

  def eval(self):
    return self

  def __call__(self, **given):
    return self.forward(**given)


class Newer(Model):
  def forward(self, input_ids, position_ids, cache, use_cache):
    assert use_cache and cache is self.world.cache
    for layer in cache.layers:
      assert layer.cumulative_length.value == position_ids.value
      layer.cumulative_length.add_(1)
    self.world.places.append(position_ids.value)
    return types.SimpleNamespace(logits=Tensor(input_ids.value))


class Older(Model):
  def forward(
    self, input_ids, position_ids, past_key_values, cache_position, use_cache
  ):
    assert use_cache and past_key_values is self.world.cache
    assert cache_position.value == position_ids.value
    self.world.places.append(position_ids.value)
    return types.SimpleNamespace(logits=Tensor(input_ids.value))


class Graph:
  """Runs again what was run while it was captured."""

  def replay(self):
    self.world.replays += 1
    self.world.compiled[0]()


@pytest.fixture
def install(monkeypatch):
  """Puts made-up torch and transformers in place; returns what they saw."""

  def put(kind=Newer, version="5.24.0", cuda=True):
    world = types.SimpleNamespace(
      places=[],
      compiled=[],
      replays=0,
      cache=None,
      syncs=0,
      resets=0,
    )

    def compiled(step, dynamic):
      assert world.resets == len(world.compiled) + 1 and dynamic is False
      world.compiled.append(step)
      return step

    def cache(config, max_cache_len):
      world.cache = types.SimpleNamespace(
        layers=[Layer(kind is Newer) for _ in range(2)],
        size=max_cache_len,
        early_initialization=lambda **sizes: setattr(world, "sizes", sizes),
      )
      return world.cache

    def synchronize():
      world.syncs += 1

    context = lambda *_: contextlib.nullcontext()
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    Graph.world = world
    torch = types.SimpleNamespace(
      __version__="2.11.0",
      long="long",
      bfloat16="bfloat16",
      full=lambda shape, value, dtype, device: Tensor(value, shape),
      device=context,
      no_grad=context,
      compile=compiled,
      _dynamo=types.SimpleNamespace(
        mark_static_address=lambda t: setattr(t, "static", True),
        reset=lambda: setattr(world, "resets", world.resets + 1),
      ),
      cuda=types.SimpleNamespace(
        is_available=lambda: cuda,
        synchronize=synchronize,
        Stream=lambda: stream,
        stream=context,
        current_stream=lambda: stream,
        CUDAGraph=Graph,
        graph=context,
      ),
    )
    transformers = types.SimpleNamespace(
      __version__=version,
      AutoConfig=types.SimpleNamespace(for_model=lambda **kw: kw),
      AutoModelForCausalLM=types.SimpleNamespace(
        from_config=lambda config, dtype: world.__dict__.setdefault(
          "model", kind(config, dtype, world)
        )
      ),
      StaticCache=cache,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    return world

  return put


def test_what_is_missing_is_said(install, monkeypatch):
  install()
  assert peer.missing() is None
  install(version="4.57.1")
  assert peer.missing() == "transformers is 4.57.1, not 5 or later"
  install(cuda=False)
  assert peer.missing() == "torch sees no CUDA device"
  monkeypatch.setitem(sys.modules, "torch", None)
  assert "torch" in peer.missing()


@pytest.mark.parametrize("kind", [Newer, Older])
def test_every_call_decodes_from_the_filled_context(install, kind):
  world = install(kind)
  call = peer.make(CONFIG, 3, 4, 512)
  assert call.count == 4
  assert world.model.config["hidden_size"] == 4096
  assert world.model.config["tie_word_embeddings"] is False
  assert world.model.config["rope_scaling"]["factor"] == 8.0
  assert world.model.dtype == "bfloat16"
  assert world.cache.size == 512 + 4
  sizes = world.sizes
  assert (sizes["batch_size"], sizes["num_heads"]) == (3, 8)
  assert (sizes["head_dim"], sizes["dtype"]) == (128, "bfloat16")
  for layer in world.cache.layers:
    assert layer.keys.value == layer.values.value == "random"
    assert layer.keys.asked[2] == slice(None, 512)
  for _ in range(2):
    world.places.clear()
    call.start(*call.inputs())
    assert world.places == [512, 513, 514, 515]
  assert world.replays == 8
  before = world.syncs
  call.wait(None)
  assert world.syncs == before + 1
  assert call.columns(None)["peer_version"] == "5.24.0"


def test_a_graph_holds_the_weights_that_its_replay_reads(install):
  world = install()
  call = peer.make(CONFIG, 3, 4, 512)
  model = weakref.ref(world.model)
  world.compiled.clear()
  del world.model
  gc.collect()
  assert model() is not None
  del call
  gc.collect()
  assert model() is None
