"""The rules under explicit axes, as a lint: JAX types all intermediates with shardings, and refuses what is not sure.

The package runs on Auto axes, where the compiler fills in what is left open. Here the forward pass and its gradient are
traced on a described mesh whose axes are Explicit, so that two dimensions that a rule puts on one axis, or a product
whose operands do not fit, are errors. Three places are open by nature, and told here what the rules mean for them; any
other is a failure:
- the look-up of an embedding, whose rows are split as the tokens are;
- the products back to the width, `o` and `down`, whose contracted dimensions are split over `tensor`: their sums over
  it are the two all-reduces a layer of tensor parallelism (Shoeybi et al. 2019, section 3).
Parameters lie as a layer uses them: gathered over `fsdp`, which is what the sampling rules say of them.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from subjax.models.decoder import Decoder
from subjax.models.families import decoder_config
from subjax.models.network import Network, network
from subjax.parallel.axes import AXES
from subjax.parallel.rules import BATCH, SAMPLE, TRAIN, shardings
from subjax.schema import Numerics
from subjax.stages.models import declared

MESH = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Explicit,) * 3)
ROWS, LENGTH, VOCAB = 16, 30, 172
MATRIX = jax.lax.dot_general


def _network(family: str) -> Network:
    return network(decoder_config(family, "nano", vocab=VOCAB, length=LENGTH, numerics=Numerics()))


def _embedded(self: Decoder, tokens, positions):
    """`Decoder.embedded`, with where its look-ups lie."""
    rows = PartitionSpec(BATCH, None, None)
    x = self.embed[...].at[tokens].get(out_sharding=rows)
    if self.config.positions == "learned":
        x = x + self.position[...].at[positions].get(out_sharding=rows)
    return x.astype(self.config.dtype)


class Products:
    """`dot_general`, which notes the products that JAX does not know where to put, and says it."""

    def __init__(self) -> None:
        self.open: set[tuple[str, ...]] = set()

    def __call__(self, a, b, dims, **more):
        try:
            return MATRIX(a, b, dims, **more)
        except Exception as error:  # its class is private to JAX
            if "ambiguous" not in str(error) and "out_sharding" not in str(error):
                raise
        specs = [list(jax.typeof(x).sharding.spec) for x in (a, b)]
        contracted, batched = dims
        summed = {specs[0][i] for i in contracted[0]} | {specs[1][i] for i in contracted[1]}
        self.open.add(tuple(sorted(str(axis) for axis in summed if axis)))
        out = [specs[0][i] for i in batched[0]]
        for spec, gone, kept in zip(specs, contracted, batched, strict=True):
            out += [axis for i, axis in enumerate(spec) if i not in gone and i not in kept]
        return MATRIX(a, b, dims, out_sharding=PartitionSpec(*out), **more)


def _abstract(net: Network, rules) -> dict[str, jax.ShapeDtypeStruct]:
    placed = shardings(rules, MESH, declared(net))
    return {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed[n]) for n, s in net.abstract().items()}


def _batch() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    rows = NamedSharding(MESH, PartitionSpec(BATCH, None))
    shape = (ROWS, LENGTH)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows), jax.ShapeDtypeStruct(shape, bool, sharding=rows)


@pytest.fixture
def products(monkeypatch) -> Products:
    noted = Products()
    monkeypatch.setattr(jax.lax, "dot_general", noted)
    monkeypatch.setattr(Decoder, "embedded", _embedded)
    return noted


@pytest.mark.parametrize("family", ["gpt", "llama", "llama-bias"])
def test_the_forward_pass_is_typed_by_the_rules(family, products):
    net = _network(family)
    with jax.sharding.use_abstract_mesh(MESH):
        logits = jax.eval_shape(net.forward, _abstract(net, SAMPLE), *_batch())
    # Rows over replica and fsdp, the vocabulary over tensor: nothing was gathered on the way.
    assert logits.sharding.spec == PartitionSpec(BATCH, None, "tensor")
    assert logits.sharding.shard_shape(logits.shape) == (ROWS // 4, LENGTH, VOCAB // 2)
    assert products.open == {("tensor",)}


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_the_gradient_lies_where_its_parameter_does(family, products):
    net = _network(family)

    def loss(params, tokens, valid):
        return jnp.square(net.forward(params, tokens, valid)).sum()

    params = _abstract(net, SAMPLE)
    with jax.sharding.use_abstract_mesh(MESH):
        gradient = jax.eval_shape(jax.grad(loss), params, *_batch())
    for name, value in gradient.items():
        assert value.sharding.spec == params[name].sharding.spec, name


def test_parameters_as_they_are_stored_cannot_be_used_where_they_lie(products):
    """Under the training rules a matrix and the rows share `fsdp`: a layer must gather the one, or the other."""
    net = _network("llama")
    with jax.sharding.use_abstract_mesh(MESH), pytest.raises(Exception, match=r"fsdp|shard"):
        jax.eval_shape(net.forward, _abstract(net, TRAIN), *_batch())


def test_the_rules_of_training_and_sampling_differ_by_the_gather_over_fsdp_alone():
    net = _network("gpt")
    for name, (_, axes) in declared(net).items():
        stored, used = TRAIN.spec(axes, name), SAMPLE.spec(axes, name)
        dropped = [None if part in ("fsdp", ("fsdp",)) else part for part in stored]
        assert PartitionSpec(*dropped) == used, name
