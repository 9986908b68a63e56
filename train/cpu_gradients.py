"""Convolution and batch norm with gradients written out for XLA's CPU backend; elsewhere JAX's own are used.

Why not `lax.conv_general_dilated` and a mean alone: in a loop over batches JAX's gradient of a convolution makes a
training step on CPU more than twenty times slower, and its reductions to channels are not vectorised; see
`conv2d_gradients`, `_channel_sums` and `compiler_options` for what each costs. `benchmarks.train_step` measures a step.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

EPSILON = 1e-5  # torch.nn.BatchNorm2d's eps


def plain_conv2d(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Return the convolution of x (N, H, W, I) with a kernel (k, k, I, O), k 1 or 3, at stride 1 or 2.

    Zeros around x as with torch's `padding=(k - 1) // 2` make it (N, ceil(H / stride), ceil(W / stride), O).
    """
    pad = (kernel.shape[0] - 1) // 2
    return _convolve(x, kernel, [(pad, pad)] * 2, window_strides=(stride, stride))


# The same with a gradient that is fast on CPU, see `conv2d_gradients`; elsewhere the gradient is JAX's own.
conv2d = jax.custom_vjp(plain_conv2d, nondiff_argnums=(2,))


def _convolve(x, kernel, padding, window_strides=(1, 1), **dilations):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, window_strides, padding, dimension_numbers=numbers, **dilations)


def _conv2d_backward(stride, saved, dy):
    def plain(x, kernel, dy):
        return jax.vjp(partial(plain_conv2d, stride=stride), x, kernel)[1](dy)

    return lax.platform_dependent(*saved, dy, cpu=partial(conv2d_gradients, stride=stride), default=plain)


def conv2d_gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array, *, stride: int) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of `conv2d` for x and kernel, given that of its output, dy.

    They are convolutions in the one layout that XLA's CPU backend has fast code for. It rewrites other layouts at the
    top level of a program only: in the body of a loop, such as a scan over batches, JAX's own gradient makes a training
    step more than twenty times slower.
    """
    if kernel.shape[0] == 1:
        dx = _convolve(dy, kernel.transpose(0, 1, 3, 2), [(0, 0)] * 2)
        edges = [(0, (n - 1) % stride, stride - 1) for n in x.shape[1:3]]
        dx = lax.pad(dx, jnp.zeros((), dx.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        return dx, jnp.einsum("nhwi,nhwo->io", x[:, ::stride, ::stride], dy)[None, None]
    if stride == 1:
        dx = _convolve(dy, jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2), [(1, 1)] * 2)
    else:
        dx = _strided_input_gradient(kernel, dy)[:, : x.shape[1], : x.shape[2]]
    # Channels take the place of the batch, and the images that of the channels. With stride 2 the windows reach
    # the padding behind the image only if its size is odd.
    padding = [(1, 1 - (n - 1) % stride) for n in x.shape[1:3]]
    dk = _convolve(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), padding, rhs_dilation=(stride, stride))
    return dx, dk.transpose(1, 2, 0, 3)


def _strided_input_gradient(kernel, dy):
    """Return dx (N, 2H, 2W, I) of a 3 x 3 kernel with stride 2 for dy (N, H, W, O).

    Of each pair of rows in dx, row r gets kernel row 1 + r - 2a from row a of dy's next two: one convolution with
    four times the channels, one group for each pixel of a 2 x 2 square. Dilating dy with zeros instead, as XLA
    does, costs more than twice the work.
    """
    n, h, w, outputs = dy.shape
    inputs = kernel.shape[2]
    taps = jnp.pad(kernel, [(1, 0), (1, 0), (0, 0), (0, 0)]).reshape(2, 2, 2, 2, inputs, outputs)
    taps = jnp.flip(taps, (0, 2)).transpose(0, 2, 5, 1, 3, 4).reshape(2, 2, outputs, 4 * inputs)
    squares = _convolve(dy, taps, [(0, 1)] * 2).reshape(n, h, w, 2, 2, inputs)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, inputs)


conv2d.defvjp(lambda x, kernel, stride: (conv2d(x, kernel, stride), (x, kernel)), _conv2d_backward)


@jax.custom_vjp
def batch_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return x (N, H, W, C), normalised with its own statistics, its mean (C,) and its biased variance (C,).

    The normalised x keeps its dtype; the statistics are float32, or float64 where x is, and are given no gradient. The
    gradient of the rest is written out for speed on CPU, see `_channel_sums`.
    """
    return _batch_norm_forward(x, scale, bias)[0]


def _batch_norm_forward(x, scale, bias):
    count = x.size // x.shape[-1]
    mean = _channel_sums(lambda x: x, x) / count
    var = _channel_sums(lambda x: jnp.square(x - mean), x) / count
    factor = scale * lax.rsqrt(var + EPSILON)
    y = (x * factor + (bias - mean * factor)).astype(x.dtype)
    return (y, mean, var), (x, scale, mean, var)


def _batch_norm_backward(saved, gradients):
    x, scale, mean, var = saved
    dy = gradients[0]
    count = x.size // x.shape[-1]
    inverse = lax.rsqrt(var + EPSILON)
    d_bias, d_centred = _channel_sums(lambda dy, x: (dy, dy * (x - mean)), dy, x)
    d_scale = d_centred * inverse
    centred = x - mean
    dx = (scale * inverse) * (dy - d_bias / count - centred * (inverse * d_scale / count))
    return dx.astype(x.dtype), d_scale, d_bias


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _channel_sums(term, *arrays):
    # XLA's reduction of (N, H, W, C) to (C,) on CPU is not vectorised: for 32 MiB 45 ms, against 2 ms for the loop.
    return lax.platform_dependent(*arrays, cpu=partial(sums_by_rows, term), default=partial(sums_at_once, term))


def sums_at_once(term, *arrays):
    """Return term(*arrays), one array or several, summed over N, H, W: (N, H, W, C) -> (C,), float32 or wider."""
    return jax.tree.map(lambda t: t.sum((0, 1, 2)), term(*map(_widened, arrays)))


def sums_by_rows(term, *arrays):
    """Return what `sums_at_once` returns, computed image row after image row."""
    rows = [a.reshape(-1, *a.shape[2:]) for a in arrays]

    def terms(row):
        return term(*map(_widened, row))

    def add(total, row):
        return jax.tree.map(jnp.add, total, terms(row)), None

    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(terms, [r[0] for r in rows]))
    total, _ = lax.scan(add, start, rows)
    return jax.tree.map(lambda t: t.sum(0), total)


def _widened(array):
    # Sums over many images need float32; float64, in which tests compare gradients, stays.
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


@functools.cache
def compiler_options() -> dict[str, str]:
    """Return the options to give `jax.jit` for a program that trains these networks: none but on CPU.

    The YNNPACK convolutions that jaxlib 0.10.2 takes by default need up to twice the time of its Eigen ones, in the
    gradient two to three times; an empty list of library fusions brings those back. Only the options of the
    outermost `jit` count. A version that does not know the option is left as it is.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
