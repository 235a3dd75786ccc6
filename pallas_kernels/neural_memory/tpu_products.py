"""Matrix products whose gradients are such products again, in as many passes as they need."""

import functools

import jax
import jax.numpy as jnp

_CONTRACTED = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}


def product(form: str, a, b, exact: str = "", *, narrow: bool):
    """a b ("nn"), a b^T ("nt") or a^T b ("tn"); gradients are products of these forms, too.

    Args:
        form: which.
        a, b: float32 matrices.
        exact: "a", "b" or "ab": those came as bfloat16.
        narrow: whether operands go to the matrix unit as the sum of two bfloat16 numbers (one if
            exact): 16 bits of them, in two or three passes instead of six.
    """
    return _product(form, exact if narrow else None, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(form, exact, a, b):
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(_CONTRACTED[form], ((), ())),
        preferred_element_type=jnp.float32,
    )
    if exact is None:
        return dot(a, b, precision=jax.lax.Precision.HIGHEST)
    (a, *rest_a), (b, *rest_b) = _halves(a, "a" in exact), _halves(b, "b" in exact)
    return sum((dot(x, b) for x in rest_a), sum((dot(a, x) for x in rest_b), dot(a, b)))


def _halves(x, exact: bool):
    """A float32 matrix as a sum of bfloat16 ones."""
    if exact:
        return (x.astype(jnp.bfloat16),)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _product_forward(form, exact, a, b):
    return _product(form, exact, a, b), (a, b)


def _product_backward(form, exact, kept, dz):
    a, b = kept
    known = lambda which, place: None if exact is None else place if which in exact else ""
    if form == "nn":
        return _product("nt", known("b", "b"), dz, b), _product("tn", known("a", "a"), a, dz)
    if form == "nt":
        return _product("nn", known("b", "b"), dz, b), _product("tn", known("a", "b"), dz, a)
    return _product("nt", known("b", "a"), b, dz), _product("nn", known("a", "a"), a, dz)


_product.defvjp(_product_forward, _product_backward)
