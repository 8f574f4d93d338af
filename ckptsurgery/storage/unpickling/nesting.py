"""Which of the tensors in a training checkpoint are the model's, decided by how they are nested.

The rules, for a tree of mappings, lists and tensors:

1. A *branch* is a mapping or list with tensors in it. An optimizer is recognised by its shape (`state` beside
   `param_groups`) or by its name (`optim…`) and is never the model; neither is a mapping of scalars and integers
   alone (a scheduler, a random state, the scores of a callback) or a bare list while something else has weights in it.
   Settings and statistics beside a model (arrays in `config`, vectors in `norm_stats`) are left with the rest.
2. A mapping with tensors directly in it is a *state_dict*. Where one branch alone has any, that is the model, however
   deep: `{"checkpoint": {"model": {…}, "epoch": 3}}` gives `checkpoint.model`. Tensors that lie loose beside a
   state_dict with dotted keys (a mean, a loss) stay with the rest, and so do mappings of nothing but scalars and
   integers in one (`train_state` beside `layers.0.weight`).
3. A Lightning file (`pytorch-lightning_version`) names its model: `state_dict`.
4. Several side by side are parts of one model where a node that is called after a model (`model`, `params`, `module`)
   holds them all, the innermost such, and no two of them have the same keys: its tree is flattened with dots. Elsewhere
   (student and teacher, EMA, encoder and decoder at the top) it is for the caller to say, and the error lists them.
5. `subtree="a.b"` takes that node, and `subtree=""` the whole file, flattened with dots; nothing is left to judgement.
   Where no node has that path, keys that begin with it are cut out, and the others left out.
6. A pickled `nn.Module` counts as its state_dict: `_parameters`, `_buffers` and `_modules` of the inert record are
   walked. A TorchScript module is walked by its attributes. A file that is one bare tensor gives the key `tensor`.

Everything else is `extras`, under the dotted path of the largest part that is none of the model's: `epoch`,
`optimizer` (a tree with tensors as leaves), `checkpoint.args`; the state_dict's own `_metadata`; its keys whose values
are no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ...errors import CheckpointError, Diagnostic, Remedy
from ...wording import counted
from .frames import Frame, levels_of
from .inert import Opaque, Ordered
from .nodes import DEPTH, MODEL_NAMES, children, is_lost, is_state, is_tensor, name_of, settle, without_settings
from .powers import powerful, refuse_code
from .unreadable import told_apart

__all__ = ["Located", "find_model", "flatten", "locate", "settle"]

_NODES = 1_000_000
_FREE = 1 << 25  # bytes of paths that any file may have
_A_PATH = 160  # bytes of a path beside its text
_GRANT, _TIMES = 200, 4  # bytes of paths for each part of a node, and for each character of its name
_SHOWN = 12  # candidates that an error lists
_INTEGER = ("U", "I", "B")  # BOOL, U8, I64: first letters; BF16 is set apart below


@dataclass(frozen=True, slots=True)
class Located:
    """The model in a tree.

    Args:
        leaves: its tensors by key.
        extras: all else that the tree holds, by dotted path.
        frame: the way from the root to the model.
    """

    leaves: dict[str, Any]
    extras: dict[str, Any]
    frame: Frame = ()


def locate(tree: Any, subtree: str | None, source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's tensors by key, and all else that the tree holds by dotted path.

    >>> from .inert import Storage, Tensor
    >>> w = Tensor(Storage("0", "F32", 2), 0, (2,), (1,), "F32")
    >>> locate({"model": {"a.weight": w}, "epoch": 3}, None, "x.pt")
    ({'a.weight': <tensor F32 [2]>}, {'epoch': 3})

    Raises:
        CheckpointError: as `find_model` does.
    """
    found = find_model(tree, subtree, source)
    return found.leaves, found.extras


def find_model(tree: Any, subtree: str | None, source: str) -> Located:
    """Find the model in a tree, and what lies beside it.

    Args:
        tree: the file's value, as the unpickler leaves it.
        subtree: dotted path of the node to take, `""` for all; None decides by the rules above.
        source: the file's name in errors.

    Raises:
        CheckpointError: no tensors; several candidates; a `subtree` that is not there; a tensor that only running the
            file's code would give.
    """
    if is_tensor(tree):
        return Located(*told_apart({"tensor": tree}, {}, source))
    if subtree is None:
        chosen = _decide(tree, source)
    else:
        chosen, tree = _descend(tree, subtree, source)
    node = _at(tree, chosen)
    leaves, extras = flatten(node, source, judged=subtree is None)
    if not leaves and subtree is None:
        leaves, extras = flatten(node, source)  # an optimizer alone
    if not leaves:
        _no_tensors(tree, source)
    leaves, extras = told_apart(leaves, extras, source)
    refuse_code(extras, source)
    metadata = node.attributes.get("_metadata") if isinstance(node, Ordered) else None
    if isinstance(metadata, Mapping):
        extras["_metadata"] = metadata
    return Located(leaves, _rest(tree, chosen, source) | extras, levels_of(tree, chosen))


def flatten(node: Any, source: str, judged: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """All tensors below `node` by dotted key, and what is none.

    Args:
        judged: leave an optimizer that lies among them with the rest, and counters beside dotted keys.
    """
    leaves: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    surveys: dict[int, _NodeSurvey] = {}
    flat = judged and _survey(node, surveys).dotted and surveys[id(node)].strong
    # Parts that are shared may have exponentially many paths, and the names above many small parts may be long.
    budget, seen = _FREE, set[int]()
    waiting: list[tuple[str, str, Any, tuple[int, ...]]] = [("", "", node, ())]
    while waiting:
        before, name, value, above = waiting.pop()
        budget -= _A_PATH + len(before) + len(name)
        if id(value) in above or len(above) > DEPTH or budget < 0:
            raise _endless(f"{before[:200]}.{name[:200]}", source)
        prefix = f"{before}.{name}" if before else name
        parts = None if is_state(prefix) else children(value)
        if is_tensor(value):
            if prefix in leaves:
                raise _error("duplicate-key", f"{source!r} holds two tensors that flatten to {prefix!r}", source)
            leaves[prefix] = value
        elif parts is None or (prefix and _stays_behind(_survey(value, surveys), flat)):
            if prefix:
                rest[prefix] = value
        elif prefix and judged and _is_optimizer(name, value):
            rest[prefix] = value
        else:
            inner = (*above, id(value))
            below = [(prefix, name_of(k), v, inner) for k, v in children(value) or ()]
            if id(value) not in seen:
                seen.add(id(value))
                budget += sum(_GRANT + _TIMES * len(name) for _, name, _, _ in below)
            if budget < 0:
                raise _endless(prefix, source)
            below.reverse()
            waiting += below
    return leaves, rest


def _stays_behind(survey: _NodeSurvey, flat: bool) -> bool:
    """Whether a part below a state_dict has no tensors, or beside dotted keys (`flat`) only scalars and integers."""
    return not survey.tensors or (flat and not survey.strong)


def _endless(path: str, source: str) -> CheckpointError:
    return _error("nested-too-deep", f"{source!r} nests without end at {path[:400]!r}", source)


@dataclass(slots=True)
class _NodeSurvey:
    """What lies in a node: all tensors below, and the state_dicts that could be the model."""

    tensors: int = 0
    direct: int = 0
    weights: int = 0  # direct tensors of floats with a dimension, under names
    dotted: bool = False
    parts: dict[str, _NodeSurvey] = field(default_factory=dict)

    @property
    def strong(self) -> bool:
        return self.weights > 0 or any(part.strong for part in self.parts.values())


def _survey(node: Any, memo: dict[int, _NodeSurvey] | None = None, depth: int = 0) -> _NodeSurvey:
    memo = {} if memo is None else memo
    known = memo.get(id(node))
    if known is not None:
        return known
    found = memo[id(node)] = _NodeSurvey()
    parts = children(node)
    if parts is None or depth > DEPTH:
        return found
    for key, value in parts:
        if is_tensor(value):
            found.direct += 1
            found.weights += type(node) not in (list, tuple) and _is_weight(value)
            found.dotted |= type(key) is str and "." in key
        elif children(value) is not None:
            part = _survey(value, memo, depth + 1)
            if part.tensors:
                found.parts[name_of(key)] = part
    # counted with repeats, cut off: a graph of shared lists has exponentially many paths
    found.tensors = min(found.direct + sum(p.tensors for p in found.parts.values()), _NODES)
    if not found.tensors:
        found = memo[id(node)] = _NOTHING
    return found


_NOTHING = _NodeSurvey()


def _is_weight(leaf: Any) -> bool:
    if is_lost(leaf):
        return True  # its shape may be unknown; the state_dict that it is in is to be found all the same
    return bool(leaf.shape) and (leaf.dtype == "BF16" or not leaf.dtype.startswith(_INTEGER))


def _is_optimizer(key: str, node: Any) -> bool:
    return "optim" in key.lower() or (isinstance(node, dict) and "state" in node and "param_groups" in node)


Path = tuple[str, ...]


def _decide(tree: Any, source: str) -> Path:
    """The path of the one node that is the model."""
    if isinstance(tree, dict) and "pytorch-lightning_version" in tree and children(tree.get("state_dict")) is not None:
        return ("state_dict",)
    memo: dict[int, _NodeSurvey] = {}
    survey = _survey(tree, memo)
    if not survey.tensors:
        _no_tensors(tree, source)
    budget = [100_000]
    candidates = without_settings(list(_candidates(tree, (), memo, survey.strong, budget)))
    found = [path for path, _ in candidates]
    if len(found) == 1:
        return found[0]
    if not found:
        return ()
    above = _common(found)
    named = next((above[:i] for i in range(len(above), 0, -1) if above[i - 1] in MODEL_NAMES), None)
    if named is not None and () not in found and not _copies([node for _, node in candidates]):
        return named
    return _ambiguous(tree, found, above, source)


def _candidates(
    node: Any, path: Path, memo: dict[int, _NodeSurvey], strong: bool, budget: list[int]
) -> Iterator[tuple[Path, Any]]:
    """The state_dicts below `node` with their paths, the outermost each."""
    survey = memo.get(id(node))
    budget[0] -= 1
    if survey is None or budget[0] < 0 or len(path) > DEPTH:
        return
    inside: list[tuple[Path, Any]] = []
    for key, value in children(node) or ():
        name = name_of(key)
        part = survey.parts.get(name)
        if part is None or _is_optimizer(name, value) or is_state(name) or (strong and not part.strong):
            continue
        inside += _candidates(value, (*path, name), memo, strong, budget)
    own = survey.weights if strong else survey.direct
    if type(node) is Opaque and node.state is not None and survey.tensors:
        yield path, node  # a pickled module is one model, whatever its layers hold
    elif not own:
        yield from inside
    elif not inside:
        yield path, node
    elif survey.dotted or not any(_has_dots(part, memo) for _, part in inside):
        yield path, node
        yield from inside
    else:
        yield from inside


def _has_dots(node: Any, memo: dict[int, _NodeSurvey]) -> bool:
    found = memo.get(id(node))
    return found is not None and (found.dotted or type(node) is Opaque)


def _at(node: Any, path: Path) -> Any:
    """The node at `path`; where two keys have one name, as 1 and "1", the one that has parts."""
    for name in path:
        named = [v for k, v in children(node) or () if name_of(k) == name]
        node = next((v for v in named if children(v) is not None), named[0] if named else None)
    return node


def _common(paths: list[Path]) -> Path:
    first, last = min(paths), max(paths)
    length = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[:length]


def _copies(nodes: list[Any]) -> bool:
    """Whether two of the state_dicts have the same keys."""
    seen: set[frozenset[str]] = set()
    dotted: dict[int, bool] = {}
    for node in nodes[:1000]:
        if id(node) in dotted:
            if dotted[id(node)]:
                return True
            continue
        keys = frozenset(name_of(k) for k, v in children(node) or () if is_tensor(v))
        # layers of one kind all hold weight and bias: only whole models have dotted keys
        dotted[id(node)] = any("." in key for key in keys)
        if dotted[id(node)]:
            if keys in seen:
                return True
            seen.add(keys)
    return False


def _ambiguous(tree: Any, found: list[Path], above: Path, source: str) -> NoReturn:
    shown = found if len(found) <= _SHOWN else sorted({p[: len(above) + 1] for p in found})
    lines = []
    for path in shown[:_SHOWN]:
        count = _survey(_at(tree, path)).tensors
        name = ".".join(path)
        lines.append(f'subtree="{name}"  {counted(count, "tensor")}' + ("" if path else " (the whole file, flattened)"))
    if len(shown) > _SHOWN:
        lines.append(f"… and {len(shown) - _SHOWN} more")
    whole = ".".join(above)
    if above not in shown:
        count = _survey(_at(tree, above)).tensors
        lines.append(f'subtree="{whole}"  {counted(count, "tensor")} (all of them, flattened with dots)')
    names = ", ".join(repr(".".join(p)) for p in shown[:_SHOWN] if p)
    raise CheckpointError(
        Diagnostic("ambiguous-subtree", f"{source!r} holds tensors in several places: {names}", source, tuple(lines),
                   remedies=(Remedy("subtree", ".".join(next(p for p in shown if p)), "chooses one"),))
    )  # fmt: skip


def _descend(tree: Any, subtree: str, source: str) -> tuple[Path, Any]:
    """The path of the node that `subtree` names, in `tree` or in what is cut out of it; keys may contain dots."""
    if not subtree:
        return (), tree
    for cut_keys in (False, True):
        path = _resolve(tree, subtree, cut_keys, DEPTH)
        if path is not None and not cut_keys:
            if is_tensor(_at(tree, path)):
                raise _error("missing-subtree", f"subtree {subtree!r} of {source!r} is one tensor", source)
            return path, tree
        if path is not None:
            return (), _cut(_at(tree, path[:-1]), path[-1] + ".")
    try:
        inner = _at(tree, _decide(tree, source))
    except CheckpointError:
        inner = None
    cut = _cut(inner, subtree + ".")
    if cut:
        return (), cut
    names = [name_of(k) for k, v in children(tree) or () if children(v) is not None][:_SHOWN]
    help = "there are: " + ", ".join(names) if names else "there are no subtrees; leave `subtree` out"
    raise _error("missing-subtree", f"{source!r} has no subtree {subtree!r}", source, help)


def _resolve(node: Any, subtree: str, cut_keys: bool, depth: int) -> Path | None:
    """The path that spells `subtree`; with `cut_keys` its last part may be the beginning of keys."""
    if depth <= 0:
        return None
    for key, value in children(node) or ():
        name = name_of(key)
        if name == subtree or (cut_keys and name.startswith(subtree + ".")):
            return (subtree,)
        if subtree.startswith(name + "."):
            rest = _resolve(value, subtree[len(name) + 1 :], cut_keys, depth - 1)
            if rest is not None:
                return (name, *rest)
    return None


def _cut(node: Any, start: str) -> Ordered:
    """The entries below a prefix of the keys, with the `_metadata` that belongs to them."""
    cut = Ordered()
    cut.update((k[len(start) :], v) for k, v in children(node) or () if type(k) is str and k.startswith(start))
    metadata = node.attributes.get("_metadata") if isinstance(node, Ordered) else None
    if isinstance(metadata, Mapping):
        below = {k: v for k, v in metadata.items() if type(k) is str and (k + ".").startswith(start)}
        cut.attributes["_metadata"] = {k[len(start) :]: v for k, v in below.items()}
    return cut


def _rest(tree: Any, chosen: Path, source: str) -> dict[str, Any]:
    """Dotted path -> value of everything beside the way to the chosen node."""
    rest: dict[str, Any] = {}
    node, budget = tree, _FREE
    for i, name in enumerate(chosen):
        following = _at(node, (name,))
        before = "".join(f"{part}." for part in chosen[:i])
        for key, value in children(node) or ():
            if value is not following or name_of(key) != name:
                path = before + name_of(key)
                rest[path] = value
                budget += _GRANT - _A_PATH - len(before)
                if budget < 0:
                    raise _endless(path, source)
        node = following
    return rest


def _no_tensors(tree: Any, source: str) -> NoReturn:
    function = powerful(tree, 6)
    if function is not None:
        raise _error("unsafe-pickle", f"{source!r} is a pickle that would run {function}; it was not run", source)
    held = children(tree)
    if held is None:
        what = f"it is a {tree!r}" if type(tree) is Opaque else f"it is a {type(tree).__name__}"
    else:
        shown = list(held)[:_SHOWN]
        what = "it holds " + (", ".join(repr(v) if _is_noted(v) else name_of(k) for k, v in shown) or "nothing")
    refuse_code({name_of(k): v for k, v in children(tree) or ()}, source)
    help = "name another file; tensors and numpy arrays in dictionaries and lists are read"
    raise _error("no-tensors", f"{source!r} holds no tensors: {what}", source, help)


def _is_noted(value: Any) -> bool:
    return type(value) is Opaque and value.note is not None


def _error(code: str, headline: str, source: str, help: str | None = None) -> CheckpointError:
    help = help or f"save the tensors as plain ones, in a dictionary, where {source!r} was written"
    return CheckpointError(Diagnostic(code, headline, place=source, help=help))
