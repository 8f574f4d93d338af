"""Recipes of mergekit, read from their YAML: linear, slerp, task_arithmetic, ties, dare and passthrough.

The models are mounted under `m0/`, `m1/`, …, in the order of the summary. Per-layer weights become lists by index, and
filters tables by the module below the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import Diagnostic, RecipeError
from ..language.recipe import Recipe

__all__ = ["recipe_from_mergekit"]

_METHODS = ("linear", "slerp", "nuslerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "passthrough")
_EXTRA = "pip install ckptsurgery[merge]"


def recipe_from_mergekit(text: str, layers: str = "model.layers.{i}.") -> Recipe:
    """Return the recipe for a mergekit configuration; its summary names the mount of each model.

    >>> text = "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}], parameters: {t: 0.3}}"
    >>> recipe = recipe_from_mergekit(text)
    >>> print(recipe.summary)
    slerp of m0/ = a, m1/ = b
    >>> print(recipe.rules[0])
    m0/{k...}, m1/{k...} -> {k...} | slerp(0.3, integers=first)

    Args:
        text: the YAML.
        layers: the prefix of a layer's keys, with `{i}` for its number.

    Raises:
        RecipeError: it is not such a configuration, or asks for what has no rule; each is named.
    """
    data = _parsed(text)
    method = str(data.get("merge_method"))
    if method not in _METHODS:
        raise _refused(f"merge_method {method!r} has no recipe", "known: " + ", ".join(_METHODS))
    unknown = sorted(data.keys() & {"modules", "chat_template", "tokenizer_source", "tokenizer", "parallel"})
    if unknown:
        raise _refused(f"{', '.join(unknown)} cannot be imported", "leave it out, and see to the tokenizer by hand")
    return _Configuration(data, method, layers).recipe()


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError:
        raise _refused("reading YAML needs PyYAML", _EXTRA) from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _refused(f"not valid YAML: {error}", None) from None
    if not isinstance(data, Mapping) or not ("models" in data or "slices" in data):
        raise _refused("the YAML is not a merge configuration", "it names models or slices, and a merge_method")
    return data


def _refused(text: str, help: str | None) -> RecipeError:
    return RecipeError(Diagnostic("unknown-mapping", text, help=help))


@dataclass
class _Configuration:
    """One configuration, on its way to a recipe."""

    data: Mapping[str, Any]
    method: str
    layers: str
    models: list[str] = field(default_factory=list)
    dims: dict[str, Any] = field(default_factory=dict)

    def recipe(self) -> Recipe:
        slices = self.data.get("slices")
        if slices is not None and self.method == "passthrough":
            rules = self.stacked(slices)
        elif slices is not None:
            if len(slices) != 1:
                raise _refused("several slices are imported for passthrough only", "write one recipe a slice")
            rules = self.merged(slices[0].get("sources", ()), slices[0])
        else:
            rules = self.merged(self.data.get("models", ()), {})
        mounts = ", ".join(f"m{n}/ = {model}" for n, model in enumerate(self.models))
        rest = "drop" if slices is not None and self.method == "passthrough" else "error"
        return Recipe(rules, dims=self.dims, rest=rest, summary=f"{self.method} of {mounts}")

    def mount(self, model: Any) -> str:
        """The prefix of a model."""
        path = model.get("path") if isinstance(model, Mapping) and "path" in model else model
        name = str(path.get("path") if isinstance(path, Mapping) else path)
        if name not in self.models:
            self.models.append(name)
        return f"m{self.models.index(name)}/"

    def merged(self, sources: Sequence[Mapping[str, Any]], part: Mapping[str, Any]) -> list[str]:
        """The rules of a method that computes."""
        ranges: set[tuple[int, int]] = {tuple(s["layer_range"]) for s in sources if "layer_range" in s}
        if len(ranges) > 1:
            raise _refused("the sources of a slice have different layers", "write rules with shifted indices")
        base = self.data.get("base_model")
        inputs = [s for s in sources if base is None or str(s.get("model")) != str(base)]
        pair = self.method in ("slerp", "nuslerp")
        prefixes = [self.mount(base)] if base is not None else []
        prefixes += [self.mount(s["model"]) for s in inputs]
        if pair and len(prefixes) != 2:
            raise _refused(f"{self.method} takes a base model and one other", None)
        within = next(iter(ranges), None)
        values = _Values(self, part, inputs, within[1] - within[0] if within else None)
        op = self.op(values)
        if not values.by_layer and not values.by_module and not within:
            return [self.rule(prefixes, "{k...}", f"{op}")]
        inside = "{b}.{r...}" if values.by_module else "{r...}"
        # mergekit 0.1.5 gives all tensors outside of the layers the first value, those behind them too
        first_values = self.op(values.outside(0.0))
        outside = [f"? {self.rule(prefixes, key, first_values)}" for key in ("{a}.{z}.{k}", "{a}.{z}")]
        first, stop = within or (0, 0)
        if first and values.by_layer:
            raise _refused("values along layers that do not begin at 0 cannot be imported", "write a table by layer")
        source = self.layers.replace("{i}", f"{{i:{first}..{stop - 1}}}") if within else self.layers
        target = self.layers.replace("{i}", f"{{i-{first}}}") if first else self.layers
        return [self.rule(prefixes, source + inside, op, target + inside), *outside]

    def rule(self, prefixes: Sequence[str], key: str, op: str, target: str | None = None) -> str:
        made = f"{key if target is None else target} | {op}{self.cast()}"
        if self.method == "linear":
            choices = ",".join(prefix[:-1] for prefix in prefixes)
            return f"{{m:{choices}}}/{key} -> {made}"
        return ", ".join(f"{prefix}{key}" for prefix in prefixes) + f" -> {made}"

    def cast(self) -> str:
        """The op that gives the result its dtype, where one is named."""
        dtype = self.data.get("out_dtype") or self.data.get("dtype")
        return f" | cast({dtype}, floats=true)" if dtype else ""

    def op(self, values: _Values) -> str:
        """The call of the op, with its arguments."""
        shared = self.data.get("parameters") or {}
        scale = shared.get("lambda", 1.0)
        integers = "integers=first"
        match self.method:
            case "linear":
                return f"sum_over(m, {values.weights(normalise=shared.get('normalize', True))}, {integers})"
            case "slerp":
                return f"slerp({values.one('t')}, {integers})"
            case "nuslerp":
                return f"nuslerp({values.share()}, {integers})"
            case "task_arithmetic":
                return f"task_arithmetic({scale}, {values.weights(shared.get('normalize', False))}, {integers})"
            case "ties":
                normalise = str(bool(shared.get("normalize", True))).lower()
                weights = values.weights()
                return f"ties({values.one('density', 1.0)}, {scale}, {weights}, normalise={normalise}, {integers})"
            case "dare_linear" | "dare_ties":
                elect = str(self.method == "dare_ties").lower()
                return f"dare({values.one('density', 1.0)}, {scale}, {values.weights()}, elect={elect}, {integers})"
        return "same"

    def stacked(self, slices: Sequence[Mapping[str, Any]]) -> list[str]:
        """The rules of passthrough: runs of layers, one after another; what is outside of them from the ends."""
        rules: list[str] = []
        seen: list[tuple[str, int, int]] = []
        at = 0
        for part in slices:
            (source,) = part["sources"] if len(part.get("sources", ())) == 1 else (None,)
            if source is None or "layer_range" not in source or source.get("parameters"):
                raise _refused("a slice of passthrough has one source with a layer_range, and no parameters", None)
            prefix, (first, stop) = self.mount(source["model"]), source["layer_range"]
            again = any(p == prefix and a < stop and first < b for p, a, b in seen)
            shift = at - first
            target = self.layers.replace("{i}", f"{{i{shift:+d}}}" if shift else "{i}")
            layer = self.layers.replace("{i}", f"{{i:{first}..{stop - 1}}}")
            rules.append(f"{'+ ' * again}{prefix}{layer}{{r...}} -> {target}{{r...}}{self.cast()}")
            seen.append((prefix, first, stop))
            at += stop - first
        head, tail = seen[0][0], seen[-1][0]
        rules.append(f"? {tail}{{a}}.{{z}} -> {{a}}.{{z}}{self.cast()}")
        if head == tail:
            return [*rules, f"? {tail}{{a}}.{{z}}.{{k}} -> {{a}}.{{z}}.{{k}}{self.cast()}"]
        ends = self.layers.partition("layers")[0]
        rules.append(f"? {head}{ends}embed_tokens.{{k}} -> {ends}embed_tokens.{{k}}{self.cast()}")
        return [*rules, f"? {tail}{ends}norm.{{k}} -> {ends}norm.{{k}}{self.cast()}"]


@dataclass
class _Values:
    """The settings of one slice: numbers, lists along the layers, and both by module."""

    configuration: _Configuration
    part: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    count: int | None
    t: float | None = None  # the place along the layers, of tensors outside of them

    def outside(self, t: float) -> _Values:
        """The settings for tensors outside of the layers."""
        return _Values(self.configuration, self.part, self.inputs, self.count, t)

    @property
    def by_layer(self) -> bool:
        """Whether a setting differs from layer to layer."""
        return any(_gradients(setting) for setting in self.settings())

    @property
    def by_module(self) -> bool:
        """Whether a setting differs from module to module."""
        return any(_filters(setting) for setting in self.settings())

    def settings(self) -> list[Any]:
        tables = [self.configuration.data, self.part, *self.inputs]
        names = ("t", "weight", "density")
        return [t["parameters"][n] for t in tables for n in names if n in (t.get("parameters") or {})]

    def setting(self, name: str, source: Mapping[str, Any] | None = None, default: Any = None) -> Any:
        for table in (source or {}, self.part, self.configuration.data):
            if name in (table.get("parameters") or {}):
                return table["parameters"][name]
        if default is None:
            raise _refused(f"{self.configuration.method} needs {name}", None)
        return default

    def one(self, name: str, default: Any = None) -> str:
        """A setting that all sources share, as an argument."""
        found = [self.setting(name, source, default) for source in self.inputs] or [self.setting(name, None, default)]
        if any(value != found[0] for value in found):
            raise _refused(f"{name} differs from model to model", "one number for all of them")
        setting = found[0]
        if self.t is not None or not (_gradients(setting) or _filters(setting)):
            return repr(self.value(setting, self.t or 0.0))
        self.configuration.dims[name] = self.table(setting)
        marks = (":b" if _filters(setting) else "") + (":i" if self.by_layer else "")
        return f"{name}{marks}"

    def table(self, setting: Any) -> Any:
        """The values of a setting by module and layer."""
        if not _filters(setting):
            return self.along(setting)
        rows: dict[str, Any] = {}
        for entry in setting:  # the first that fits counts, and one without a filter fits all
            rows.setdefault(str(entry.get("filter") or "*"), entry["value"])
            if "*" in rows:
                break
        return {name: self.along(value) if self.by_layer else value for name, value in rows.items()}

    def along(self, value: Any) -> Any:
        """One value a layer."""
        if self.count is None:
            raise _refused("values along the layers need their number", "write slices with a layer_range")
        steps = max(1, self.count - 1)
        return [self.value(value, n / steps) for n in range(self.count)]

    def value(self, setting: Any, t: float) -> float:
        """A number, or the point of a list along the layers, straight between its entries."""
        if _filters(setting):
            plain = [entry["value"] for entry in setting if entry.get("filter") in (None, "*")]
            if not plain:
                raise _refused("a setting has filters only", "an entry without a filter says what all others are")
            setting = plain[0]
        if not isinstance(setting, list):
            return float(setting)
        place = t * (len(setting) - 1)
        low = min(int(place), len(setting) - 1)
        high = min(low + 1, len(setting) - 1)
        return float(setting[low] + (place - low) * (setting[high] - setting[low]))

    def weights(self, normalise: bool = False) -> str:
        """The weights of the sources, as an argument."""
        found = [self.setting("weight", source) for source in self.inputs]
        if any(map(_filters, found)):
            raise _refused("weights by module cannot be imported", "write a rule for each module")
        if any(map(_gradients, found)) and self.t is None:
            rows = [list(row) for row in zip(*(self.along(value) for value in found))]
            self.configuration.dims["w"] = [_normed(row) if normalise else row for row in rows]
            return "w=w:i"
        row = [self.value(value, self.t or 0.0) for value in found]
        return f"w={_normed(row) if normalise else row}"

    def share(self) -> str:
        """The share of the second of two sources."""
        return repr(_normed([self.value(self.setting("weight", source), 0.0) for source in self.inputs])[1])


def _normed(row: Sequence[float]) -> list[float]:
    total = sum(row)
    if not total:
        raise _refused("the weights add up to 0", None)
    return [weight / total for weight in row]


def _filters(setting: Any) -> bool:
    return isinstance(setting, list) and bool(setting) and isinstance(setting[0], Mapping)


def _gradients(setting: Any) -> bool:
    if _filters(setting):
        return any(isinstance(entry.get("value"), list) for entry in setting)
    return isinstance(setting, list)
