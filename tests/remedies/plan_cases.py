"""Plans that fail, with what is right once the remedy is applied: recipes, targets, opening and saving."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pasting import Arguments, Case, plan

import ckptsurgery as cs

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(6.0, 12.0).reshape(2, 3)
QKV = torch.arange(24.0).reshape(12, 2)


def same(**tensors: torch.Tensor) -> Callable[[Any], bool]:
    """Whether exactly these tensors were made; a name's `__` stands for a dot."""
    wanted = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return lambda made: made.keys() == wanted.keys() and all(torch.equal(made[k], wanted[k]) for k in wanted)


def given(source: dict[str, Any], recipe: Any = None, **more: Any) -> Callable[[], Arguments]:
    return lambda: {"source": source, "recipe": recipe or {}, **more}


def target(**specs: tuple[int, ...]) -> dict[str, cs.TensorSpec]:
    return {name.replace("__", "."): cs.TensorSpec(shape, "F32") for name, shape in specs.items()}


def inits(*names: str) -> Callable[[Any], bool]:
    return lambda made: set(names) <= made.keys()


def recipes() -> Iterator[Case]:
    rule = {"rules": ["a.w -> x"]}
    keys = {f"h.{i}.mlp.w": A + i for i in range(2)}
    made = same(**{f"l__{i}__w": A + i for i in range(2)})
    for wrong in ("h.{i}.mpl.w", "model.h.{i}.mlp.w", "{i}.mlp.w"):
        misspelt = given(keys, {"rules": [f"{wrong} -> l.{{i}}.w"]})
        # where a rule may match nothing, its keys are left over, and dropped
        yield Case("unused-rule", plan, misspelt, (made, lambda made: made == {}), note=wrong)
    yield Case(
        "unused-rule", plan, given({"a": A}, {"rules": ["a -> b", "q.{i} -> r.{i}"]}), same(b=A), note="optional"
    )
    yield Case("unused-drop", plan, given({"a": A, "mask": B}, {"rules": ["a -> b"], "drop": ["msak"]}), same(b=A))
    yield Case("unused-same", plan, given({"a": A}, {"rules": ["a -> b"], "same": {"q": "a"}}), same(b=A))
    tied = {"rules": ["e.weight -> emb"], "tie": {"head": "enb"}}
    yield Case("unused-tie", plan, given({"e.weight": A}, tied), (same(emb=A, head=A), same(emb=A)))
    wanted = target(b=(2, 3), head__weight=(5,))
    started = {"rules": ["a -> b"], "init": {"haed.weight": "zeros"}}
    yield Case(
        "unused-init", plan, given({"a": A}, started, target=wanted), (inits("head.weight", "b"), inits("head.weight"))
    )
    yield Case(
        "unexpected-keys",
        plan,
        given({"a.w": A, "b.0.m": B, "b.1.m": B}, rule),
        (same(x=A), same(**{"x": A, "b.0.m": B, "b.1.m": B})),
    )
    many = {f"o.{name}.{i}.s": B for name in "abcdefghij" for i in range(2)}
    yield Case("unexpected-keys", plan, given({"a.w": A, **many}, rule), (same(x=A), same(x=A, **many)), note="many")
    near = {"a.0.w": A, "a.1.w": B, "a.2.w": A}
    yield Case(
        "unexpected-keys",
        plan,
        given(near, {"rules": ["a.1.w -> x"]}),
        (same(x=B), same(**{"x": B, "a.0.w": A, "a.2.w": A})),
        note="beside one that is used",
    )
    yield Case("made-twice", plan, given({"a": A, "b": B}, {"rules": ["a -> b"], "rest": "keep"}), same(b=A))
    yield Case("unused-choice", plan, given({"q.w": A}, {"rules": ["{p:q,k}.w -> {p}"]}), same(q=A))
    table = {"rules": ["w [(p r:p) d] -> {p:q,k} [r:p d]"], "dims": {"r": {"q": 8, "kk": 4}}}
    yield Case("unknown-choice", plan, given({"w": QKV}, table), same(q=QKV[:8], k=QKV[8:]))
    run = {"rules": ["w [(p r:p) d] -> {p:q,k} [r:p d]"]}
    given_now = given({"w": QKV}, run, dims={"r": {"q": 8, "kk": 4}})
    yield Case("unknown-choice", plan, given_now, same(q=QKV[:8], k=QKV[8:]), note="of this run")
    sliced = {"rules": ["w -> v | slice_rows(0, n)"], "dims": {"n": "config.rows"}}
    yield Case("bad-op", plan, given({"w": QKV}, sliced), same(v=QKV[:5]), {"config": {"rows": 5}, "n": 5}, "a size")
    yield Case("bad-op", plan, given({"a": A}, {"rules": ["a -> b | cats(bf16)"]}), same(b=A.bfloat16()))
    yield Case("bad-op", plan, given({"a": A}, {"rules": ["a -> b | cast(bf16, satrate=true)"]}), same(b=A.bfloat16()))
    yield Case("bad-rest", plan, given({"a": A}, {"rest": "kepe"}), same(a=A))
    yield from sizes()


def sizes() -> Iterator[Case]:
    three = {"q": 8, "k": 2, "v": 2}
    split = {"rules": ["w [(p r:p) d] -> {p:q,k,v} [r:p d]"]}
    right = same(q=QKV[:8], k=QKV[8:10], v=QKV[10:])
    yield Case("unsolved-axis", plan, given({"w": QKV}, split), right, {"r": three, **three}, "ragged")
    yield Case("one-size", plan, given({"w": QKV}, split, dims={"r": 4}), right, three)
    turned = {"rules": ["w [(a b) d] -> w [(b a) d]"]}
    yield Case(
        "unsolved-axis", plan, given({"w": QKV}, turned), same(w=QKV.view(3, 4, 2).transpose(0, 1).reshape(12, 2)),
        {"a": 3},
    )  # fmt: skip
    flat = {"rules": ["b.{(s k)} -> s.{s}.{k}"]}
    blocks = {f"b.{i}": A + i for i in range(4)}
    staged = same(s__0__0=A, s__0__1=A + 1, s__1__0=A + 2, s__1__1=A + 3)
    yield Case("unsolved-axis", plan, given(blocks, flat), staged, {"k": 2}, "flat")
    yield Case("wrong-extent", plan, given(blocks, {**flat, "dims": {"k": [1, 2]}}), staged, {"k": 2})
    shifted = same(c__4=A, c__5=A + 1, c__6=A + 2, c__7=A + 3)
    yield Case("unknown-dim", plan, given(blocks, {"rules": ["b.{i} -> c.{i+n}"]}), shifted, {"n": 4})
    whole = same(c__0=A, c__1=A + 1, c__2=A + 2, c__3=A + 3)
    yield Case("unknown-dim", plan, given(blocks, {"rules": ["b.{i:0..n} -> c.{i}"]}), whole, {"n": 3}, "range")
    lacking = {"rules": ["b.{i} -> c.{i+n}"], "dims": {"n": "config.depth"}}
    yield Case("unknown-dim", plan, given(blocks, lacking), shifted, {"n": 4}, "config")
    yield Case(
        "unused-dim", plan, given({"w": QKV}, turned, dims={"aa": 3, "b": 4}),
        same(w=QKV.view(3, 4, 2).transpose(0, 1).reshape(12, 2)),
    )  # fmt: skip


def targets() -> Iterator[Case]:
    one = target(b=(2, 3))
    yield Case(
        "unexpected-targets",
        plan,
        given({"a": A, "c": B}, {"rules": ["a -> b"], "rest": "keep"}, target=one),
        same(b=A),
    )
    two = target(b=(2, 3), h__0=(4,), h__1=(4,))
    yield Case("missing-keys", plan, given({"a": A}, {"rules": ["a -> b"]}, target=two), inits("h.0", "h.1", "b"))
    needs = given({"a": A}, {"rules": ["a -> b"], "init": {"h": "zeros"}})
    yield Case("init-needs-target", plan, needs, inits("h"), {"target": target(b=(2, 3), h=(4,))})
    both = {"rules": ["a -> b"], "rest": "keep", "init": {"d": "zeros"}}
    yield Case("init-and-made", plan, given({"a": A, "d": B}, both, target=target(b=(2, 3), d=(2, 3))), inits("d"))
    misspelt = {"rules": ["a -> b"], "init": {"h": "zeross"}}
    yield Case("bad-init", plan, given({"a": A}, misspelt, target=target(b=(2, 3), h=(4,))), inits("h"))
    ties = {"rules": ["a -> x"], "rest": "keep", "tie": {"y": "x"}}
    yield Case("tied-and-made", plan, given({"a": A, "y": B}, ties), same(x=A, y=A))
    deep = {f"l.{i}": A + i for i in range(3)}
    shallow = given(deep, {"rules": ["l.{i} -> m.{i}"]}, target=target(m__0=(2, 3), m__1=(2, 3)))
    yield Case("unexpected-targets", plan, shallow, same(m__0=A, m__1=A + 1), note="by a rule")
    half = {"b": cs.TensorSpec((2, 3), "BF16")}
    yield Case(
        "dtype-mismatch", plan, given({"a": A / 3}, {"rules": ["a -> b"]}, target=half),
        (same(b=(A / 3).bfloat16()), same(b=A / 3)),
    )  # fmt: skip
    shared = cs.open(torch.nn.ModuleDict({"a": (layer := torch.nn.Linear(3, 2, bias=False)), "b": layer}))
    differing = given({"a.weight": A, "b.weight": B}, {"rest": "keep"}, target=shared)
    yield Case("tied-values-differ", plan, differing, same(a__weight=A, b__weight=A))
    yield Case("bad-argument", plan, given({"a": A}, {"rest": "keep"}, dtype="bf17"), same(a=A.bfloat16()))


def place(stack: Path, **files: Any) -> Path:
    """A folder with these files."""
    folder = Path(tempfile.mkdtemp(dir=stack))
    for name, tensors in files.items():
        path = folder / name.replace("__", ".")
        torch.save(tensors, path) if path.suffix == ".pt" else cs.save(tensors, path)
    return folder


def opened(source: Any, key: str | None = None, **options: Any) -> dict[str, torch.Tensor]:
    with cs.open(source, **options) as checkpoint:
        return {k: t.load() for k, t in checkpoint.items()} if key is None else {key: checkpoint[key].load()}


def files(stack: Path) -> Iterator[Case]:
    two = {"one__pt": {"a": A}, "two__pt": {"a": B}}
    folder = lambda: {"source": str(place(stack, **two))}  # noqa: E731
    all_of = lambda made: torch.equal(made["two/a"], B) and len(made) == 2  # noqa: E731
    yield Case("ambiguous-folder", opened, folder, (lambda made: torch.equal(made["a"], A), all_of))
    equal = {f"m-{i}-of-2__safetensors": {"a": tensor} for i, tensor in ((1, A), (2, B))}
    both = lambda made: torch.equal(made["m-2-of-2/a"], B) and len(made) == 2  # noqa: E731
    yield Case("duplicate-key", opened, lambda: {"source": str(place(stack, **equal))}, both)
    trees = {"source": {"student": {"a": A}, "teacher": {"a": B}}}
    yield Case("ambiguous-subtree", opened, lambda: trees, lambda made: made.keys() == {"a"})

    def parts() -> Arguments:
        folder = place(stack, m__safetensors={"enc.a": A, "dec.b": B})
        return {"source": str(folder / "m.safetensors"), "subtree": "ecn"}

    yield Case("missing-subtree", opened, parts, same(a=A))
    yield Case("missing-key", opened, lambda: {"source": {"fc.weight": A}, "key": "fc.wieght"}, same(fc__weight=A))
    rooted = lambda: {"source": str(pipeline(stack)), "component": "vea"}  # noqa: E731
    yield Case("missing-component", opened, rooted, same(a=A))
    stored = lambda: {"source": str(place(stack, model__safetensors={"a": A}) / "modle.safetensors")}  # noqa: E731
    yield Case("missing-file", opened, stored, same(a=A))
    yield Case("unknown-dtype", lambda dtype: cs.TensorSpec((2,), dtype).dtype, lambda: {"dtype": "bfloat17"},
               lambda made: made == "BF16")  # fmt: skip


def pipeline(stack: Path) -> Path:
    """A root of two models."""
    root = place(stack, left__safetensors={"a": B})
    (root / "model_index.json").write_text('{"vae": ["a", "V"], "encoder": ["b", "E"]}')
    for name, tensor in (("vae", A), ("encoder", B)):
        (root / name).mkdir(exist_ok=True)
        cs.save({"a": tensor}, root / name / "model.safetensors", overwrite=True)
    return root


def written(path: str) -> dict[str, torch.Tensor]:
    cs.save({"a": A}, path if "://" in path else Path(tempfile.mkdtemp(), path))
    return {"a": A}


def saved(path: Path | str, **options: Any) -> dict[str, torch.Tensor]:
    source = place(Path(path).parent, model__safetensors={"a": A, "b": B})
    (source / "config.json").write_text("{}")
    cs.plan(source, cs.Recipe(rest="keep")).save(path, **options)
    with cs.open(path) as checkpoint:
        return {k: t.load() for k, t in checkpoint.items()}


def outputs(stack: Path) -> Iterator[Case]:
    right = same(a=A, b=B)

    def at(name: str, **more: Any) -> Callable[[], Arguments]:
        return lambda: {"path": str(place(stack, model__safetensors={"x": A}) / name), **more}

    yield Case("output-exists", saved, at("model.safetensors"), right)
    yield Case("output-exists", saved, at(""), right, note="a folder")
    yield Case("unsupported-output", saved, at("new.h5"), right)
    far = lambda: {"path": "https://example.org/new.safetensors"}  # noqa: E731
    yield Case("unsupported-output", written, far, same(a=A), note="address")
    yield Case("companions-need-a-folder", saved, at("new.safetensors", companions=True), right)
    yield Case("shards-need-a-folder", saved, at("new.safetensors", max_shard_size="24"), right)
    yield Case("not-resumable", saved, at("new.pt", resume=True), right)
    yield Case("bad-argument", saved, at("new.safetensors", resume=True, sync=False), right, note="sync")
    yield Case(
        "too-much-memory",
        stacked,
        at("new.safetensors", max_memory=8),
        lambda made: torch.equal(made["w"], torch.stack([A, B]).double()),
    )


def stacked(path: str, **options: Any) -> dict[str, torch.Tensor]:
    cs.plan({"l.0": A, "l.1": B}, "l.{i} [...] -> w [i ...] | cast(f64)").save(path, **options)
    return opened(path)


def texts(stack: Path) -> Iterator[Case]:
    """Names and texts that are nearly right."""
    shipped = cs.list_recipes()[0]
    same_summary = lambda made: made.summary == cs.load_recipe(shipped).summary  # noqa: E731
    yield Case(
        "unknown-recipe",
        lambda recipe: cs.load_recipe(recipe),
        lambda: {"recipe": f"{shipped[:-2]}{shipped[-1]}"},
        same_summary,
    )
    start, end = _route(shipped)
    yield Case(
        "no-route",
        lambda route: cs.route(*route),
        lambda: {"route": [start, f"{end}x"]},
        lambda made: bool(made.rules or made.scopes),
    )

    def read(recipe: str) -> cs.Recipe:
        (stack / "read.toml").write_text(recipe)
        return cs.load_recipe(stack / "read.toml")

    text = 'schema = 1\nrulse = ["a -> b"]\n'
    yield Case("unknown-key", read, lambda: {"recipe": text}, lambda made: made == cs.Recipe(["a -> b"]))
    scoped = lambda scope: cs.Scope(cs.Recipe(rest=None), scope, scope)  # noqa: E731
    yield Case("bad-scope", scoped, lambda: {"scope": "enc"}, lambda made: made.source == "enc.")


def _route(shipped: str) -> tuple[str, str]:
    family, _, stem = shipped.partition("/")
    start, _, end = stem.partition("_to_")
    return f"{family}/{start}", f"{family}/{end}"
