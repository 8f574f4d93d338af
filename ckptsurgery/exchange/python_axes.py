"""The lines of Python that rearrange one group of tensors as a rule says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .conversion_axes import NotSayable
from .exporting import RuleSide

__all__ = ["axes_lines"]

Axes = list[list[str]]


def axes_lines(
    source: RuleSide, target: RuleSide, gathered: Sequence[str], size: Callable[[str], str], key: str
) -> Iterator[str]:
    """Yield lines over `parts`, the tensors of a group by what is gathered, that put the results into `made`.

    Args:
        gathered: the captures of the source's key that become axes, in the order of `parts`' keys.
        size: the text of a size. key: the target's key as an expression.

    Raises:
        NotSayable: sizes that nothing gives, open dimensions in the middle, unequal parts that are not joined or cut.
    """
    if source.axes is None or target.axes is None:
        raise NotSayable("tensors gathered or scattered without axes")
    left, right = ([list(d) for d in side.axes or ()] for side in (source, target))
    for axes in (left, right):
        if ["..."] in axes[:-1]:
            raise NotSayable("open dimensions that others follow")
    names = {c.name for c in source.captures}
    scattered = [n for n in dict.fromkeys(c.name for c in target.captures) if n not in names]
    kept = names - set(gathered)
    left, right = ([[_of_group(n, kept) for n in dim] for dim in axes] for axes in (left, right))
    ones = [[at for at, dim in enumerate(axes) if dim == ["1"]] for axes in (left, right)]
    left, right = ([dim for dim in axes if dim != ["1"]] for axes in (left, right))
    if any(":" in name for dim in (*left, *right) for name in dim):
        if any(ones):
            raise NotSayable("unequal parts beside a dimension of size 1")
        yield from _unequal(source, target, left, right, gathered, scattered, size, key)
        return
    choices = {c.name: c.choices for c in (*source.captures, *target.captures) if c.choices}
    counts = {**source.counts, **target.counts, **{n: len(c) for n, c in choices.items()}}
    yield from _stacked(gathered, choices)
    for at in reversed(ones[0]):
        yield f"(x,) = x.unbind({len(gathered) + at})"
    order = list(gathered)
    for dim in left:
        if len(dim) > 1:
            yield f"x = x.unflatten({len(order)}, ({', '.join(_sizes(dim, counts, size))},))"
        order += [] if dim == ["..."] else dim
    wanted = [*scattered, *(n for dim in right if dim != ["..."] for n in dim)]
    if sorted(order) != sorted(wanted):
        raise NotSayable("axes of one side alone")
    if order != wanted:
        places = [order.index(name) for name in wanted]
        rest = f", *range({len(order)}, x.dim())" if ["..."] in left else ""
        yield f"x = x.permute({', '.join(map(str, places))}{rest})"
    at = len(scattered)
    for dim in right:
        if len(dim) > 1:
            yield f"x = x.flatten({at}, {at + len(dim) - 1})"
        at += 1
    for place in ones[1]:
        yield f"x = x.unsqueeze({len(scattered) + place})"
    yield from _apart(scattered, choices, key)


def _of_group(name: str, kept: set[str]) -> str:
    """A size that depends on a capture of the group is one number there, under the name `axis of capture`."""
    axis, colon, marker = name.partition(":")
    return f"{axis} of {marker}" if colon and marker in kept else name


def _sizes(dim: Sequence[str], counts: dict[str, int], size: Callable[[str], str]) -> list[str]:
    """The sizes of the parts of a dimension; one that nothing gives follows from the others."""
    found: list[str] = []
    for name in dim:
        if name in counts:
            found.append(str(counts[name]))
            continue
        try:
            found.append(size(name))
        except NotSayable:
            found.append("-1")
    if found.count("-1") > 1:
        raise NotSayable(f"the sizes of ({' '.join(dim)}) follow from a target alone")
    return found


def _stacked(gathered: Sequence[str], choices: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """One tensor with an axis for each gathered name, in front."""
    if not gathered:
        yield "x = parts[()]"
        return
    text = f"parts[{', '.join(f'{n}_' for n in gathered)}{',' if len(gathered) == 1 else ''}]"
    for at, name in reversed(list(enumerate(gathered))):
        values = repr(choices[name]) if name in choices else f"sorted({{k[{at}] for k in parts}}, key=int)"
        text = f"torch.stack([{text} for {name}_ in {values}])"
    yield f"x = {text}"


def _apart(scattered: Sequence[str], choices: dict[str, tuple[str, ...]], key: str) -> Iterator[str]:
    """Each of the results under its key."""
    margin, value = "", "x"
    for name in scattered:
        over = f"zip({choices[name]!r}, {value}.unbind(0))" if name in choices else f"enumerate({value}.unbind(0))"
        yield f"{margin}for {name}_, {name}_part in {over}:"
        margin, value = margin + "    ", f"{name}_part"
    yield f"{margin}made[{key}] = {value}.contiguous()"


def _unequal(
    source: RuleSide,
    target: RuleSide,
    left: Axes,
    right: Axes,
    gathered: Sequence[str],
    scattered: Sequence[str],
    size: Callable[[str], str],
    key: str,
) -> Iterator[str]:
    """Parts of sizes of their own, joined one after another or cut."""
    choices = {c.name: c.choices for c in (*source.captures, *target.captures) if c.choices}
    if len(gathered) == 1 and not scattered and gathered[0] in choices:
        name = gathered[0]
        at = next((n for n, dim in enumerate(right) if len(dim) > 1 and dim[0] == name), None)
        if at is not None and [d if n != at else d[1:] for n, d in enumerate(right)] == left:
            listed = f"[parts[({name}_,)] for {name}_ in {choices[name]!r}]"
            yield f"made[{key}] = torch.cat({listed}, {at})"
            return
    if len(scattered) == 1 and not gathered and scattered[0] in choices:
        name = scattered[0]
        at = next((n for n, dim in enumerate(left) if len(dim) > 1 and dim[0] == name), None)
        if at is not None and [d if n != at else d[1:] for n, d in enumerate(left)] == right:
            marked = next(n for n in left[at] if ":" in n)
            yield f"sizes = {size(marked.partition(':')[0])}"
            yield f"unit = parts[()].shape[{at}] // sum(sizes.values())"
            yield f"cut = parts[()].split([sizes[c] * unit for c in {choices[name]!r}], {at})"
            yield f"for {name}_, {name}_part in zip({choices[name]!r}, cut):"
            yield f"    made[{key}] = {name}_part.contiguous()"
            return
    raise NotSayable("unequal parts that are not just joined or cut")
