"""Arrays that stand beside weights and are none by their names: data and results, gradients, importances, statistics.

>>> shapes = {("fc", "weight"): (32, 16), ("fc", "weight_fisher"): (32, 16), ("x_train",): (500, 16)}
>>> {path[-1]: beside_weights(path, shapes) for path in shapes}
{'weight': None, 'weight_fisher': 'importance of a weight', 'x_train': 'data or results, no weight'}
"""

import re
from collections.abc import Mapping

DATA, GRADIENT = "data or results, no weight", "gradient of a weight"
IMPORTANCE, STATISTICS = "importance of a weight", "running statistics"

_SPLIT = r"(train(ing)?|val(id(ation)?)?|test|eval(uation)?)"
_OF_DATA = r"([xyXY]|data|inputs?|outputs?|images?|labels?|targets?|features?|preds?|predictions?|logits|loss(es)?)"
_NAMED_BY_SPLIT = re.compile(rf"{_OF_DATA}_?{_SPLIT}|{_SPLIT}_?{_OF_DATA}")
# A weight may be called so too: they count only as whole names, or of a list, beside others.
_DATA = re.compile(
    r"inputs|data(set)?|images|labels|targets|samples|preds|predictions|logits|loss(es)?|(last_)?hidden_states?|"
    r"activations|attentions"
)
# Of one weight, whose shape they have.
_FOLLOWERS = {
    re.compile(r"(.*_)?grad(ient)?s?|grad_.*"): GRADIENT,
    re.compile(r"(.*_)?(fisher|importance|hessian)(_diag(onal)?)?|(fisher|importance)_.*|.*_omega"): IMPORTANCE,
}
_OF_STATISTICS = re.compile(r"(.*_)?(stats|statistics)")  # also the arrays in what is called so
_STATISTIC = re.compile(
    r"(running|moving|batch|inputs?|outputs?|data|features?|obs|observations?|states?|actions?|rewards?|returns?|images?|"
    r"pixels?|targets?|labels?)_(mean|std|var|variance|cov)|(.*_)?covariance"
)
_MOMENTS = frozenset({"mean", "std", "var"})

_Path = tuple[str, ...]
_Shapes = Mapping[_Path, tuple[int, ...]]


def beside_weights(path: _Path, shapes: _Shapes) -> str | None:
    """Return what an array is that is no weight by its name; `None` where its name says nothing.

    Args:
        path: the parts of its name.
        shapes: shapes of all arrays of the checkpoint.
    """
    shape, leaf = shapes[path], path[-1]
    if _NAMED_BY_SPLIT.fullmatch(leaf) or (_is_data(path) and any(map(_is_matrix, shapes, shapes.values()))):
        return DATA
    is_moment = leaf in _MOMENTS and sum(size > 1 for size in shape) < 2
    if is_moment or _STATISTIC.fullmatch(leaf) or any(map(_OF_STATISTICS.fullmatch, path)):
        return STATISTICS
    reason = next((reason for pattern, reason in _FOLLOWERS.items() if pattern.fullmatch(leaf)), None)
    if reason is None or len(shape) < 2:
        return None
    beside = (own for other, own in shapes.items() if other[: len(path) - 1] == path[:-1] and other != path)
    return reason if shape in beside else None


def _is_data(path: _Path) -> bool:
    """Tell whether an array, or the list at the root that it is in, is called as data are."""
    return _DATA.fullmatch(path[0]) is not None and all(part.isdecimal() for part in path[1:])


def _is_matrix(path: _Path, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and not _is_data(path) and not _NAMED_BY_SPLIT.fullmatch(path[-1])
