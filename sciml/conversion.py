"""Where each tensor of DPOT's state dict goes in our parameters, and which component a parameter belongs to.

>>> TABLE.by_name("blocks.3.mlp.2.weight").path
'blocks/3/mlp/fc2/kernel'
>>> component_of("time_agg/gamma")
'time_agg'
"""

import re

from farms_jax.weights.conversion import LINEAR, SAME, Layout, Row, Table, transposed

# Components of a model, by the reference's names, and the first part of their parameters' paths.
_PARTS = {
    "patch_embed": ("patch_embed",),
    "pos": ("pos_embed",),
    "blocks": ("blocks",),
    "scale_feats": ("scale_mu", "scale_sigma"),
    "cls_head": ("cls_head",),
    "time_agg": ("time_agg",),
    "out": ("out_layer",),
}
COMPONENTS = tuple(_PARTS)
_COMPONENT_OF = {part: component for component, parts in _PARTS.items() for part in parts}

CONV = transposed(2, 3, 1, 0)  # (out, in, rows, cols) <-> (rows, cols, in, out)
DECONV = transposed(2, 3, 0, 1)  # (in, out, rows, cols) <-> (rows, cols, in, out)
POSITIONS = Layout(4, lambda a: a[0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[None])  # (1, C, h, w)
ROW = Layout(2, lambda a: a[0], lambda a: a[None])  # (1, C) <-> (C,)

_WEIGHTS = (
    Row("patch_embed.proj.0.weight", "patch_embed/patches/kernel", CONV),
    Row("patch_embed.proj.2.weight", "patch_embed/proj/kernel", CONV),
    Row("blocks.{}.norm1.weight", "blocks/{}/norm1/scale"),
    Row("blocks.{}.norm2.weight", "blocks/{}/norm2/scale"),
    Row("blocks.{}.mlp.0.weight", "blocks/{}/mlp/fc1/kernel", CONV),
    Row("blocks.{}.mlp.2.weight", "blocks/{}/mlp/fc2/kernel", CONV),
    Row("scale_feats_mu.weight", "scale_mu/kernel", LINEAR),
    Row("scale_feats_sigma.weight", "scale_sigma/kernel", LINEAR),
    Row("cls_head.0.weight", "cls_head/fc1/kernel", LINEAR),
    Row("cls_head.2.weight", "cls_head/fc2/kernel", LINEAR),
    Row("cls_head.4.weight", "cls_head/fc3/kernel", LINEAR),
    Row("out_layer.0.weight", "out_layer/deconv/kernel", DECONV),
    Row("out_layer.2.weight", "out_layer/conv1/kernel", CONV),
    Row("out_layer.4.weight", "out_layer/conv2/kernel", CONV),
)
TABLE = Table([
    Row("pos_embed", "pos_embed", POSITIONS),
    Row("time_agg_layer.w", "time_agg/w"),
    Row("time_agg_layer.gamma", "time_agg/gamma", ROW),
    Row("blocks.{}.filter.w1", "blocks/{}/filter/w1"),
    Row("blocks.{}.filter.b1", "blocks/{}/filter/b1"),
    Row("blocks.{}.filter.w2", "blocks/{}/filter/w2"),
    Row("blocks.{}.filter.b2", "blocks/{}/filter/b2"),
    *_WEIGHTS,
    # Every one of those has a bias.
    *(Row(row.name.replace("weight", "bias"), re.sub(r"\w+$", "bias", str(row.path)), SAME) for row in _WEIGHTS),
])


def component_of(path: str) -> str:
    """Return the component, one of COMPONENTS, that a parameter belongs to by its path."""
    return _COMPONENT_OF[path.partition("/")[0]]
