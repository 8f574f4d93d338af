"""A plan: what will happen to every tensor, known from headers alone, and ready to run."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import Diagnostic, PlanError
from ..language.carrying import Carry, as_carry
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from .costing import Cost, cost_of
from .explaining import Explanation, explain
from .options import LoadOptions, SaveOptions
from .record import PlanRecord, RuleUse
from .report import Report
from .sharing import output_aliases, scattered_keys, unread_proofs
from .showing import plan_brief, plan_html, plan_text
from .steps import Program, Step, cut, steps_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["Plan", "Runner", "renaming", "retargeted"]


@dataclass(frozen=True, repr=False)
class Plan(PlanRecord):
    """The checked conversion of a source: look at it, then save it, load it or take its state_dict.

    >>> import torch, ckptsurgery as cs
    >>> plan = cs.plan({"a.w": torch.ones(2, 1)}, ["a.w [x y] -> w [y x]"])
    >>> plan
    <Plan 1 source key -> 1 target key: 1 copy>
    >>> plan.cost.bytes_read, list(plan.state_dict()), plan.state_dict()["w"].shape
    (8, ['w'], torch.Size([1, 2]))

    It holds steps, in the order of their sources, and everything that moves nothing but is settled all the same.

    Args:
        steps: which sources make which targets.
        uses: the rules behind them; `Step.rules` counts in here.
        specs: target key -> spec, of all that steps make.
        dropped: source key -> the line that drops it.
        proofs: (left out, kept) source keys that must be equal before anything is written.
        inits: target key -> initialiser.
        ties: target key -> the target key whose tensor it shares.
        tie_proofs: pairs of made target keys that must be equal, because the target ties them.
        casts: target key -> (from, to), where the target's dtype asked for it.
        warnings: diagnostics that stop nothing, such as assumed splits.
        config: changes of the config that goes along, in order.
        source: the source's headers. target: what was to be filled. recipe: what was planned.
        options: what else planning was asked for.
        runner: carries it out; a plan that was made from headers alone has none.
    """

    runner: Runner | None = field(default=None, compare=False)

    def without(self, keys: Collection[str]) -> Plan:
        """The plan that does not make these targets."""
        steps = [part for step in self.steps for part in cut(step, self.specs.keys() - keys)]
        specs = {key: spec for key, spec in self.specs.items() if key not in keys}
        return replace(self, steps=tuple(steps), specs=specs) if keys else self

    @property
    def cost(self) -> Cost:
        """What running it takes: bytes read and written, memory, how many steps only copy.

        Tensors that are tied in the source are written once, and not compared.
        """
        if self.runner is None:
            return cost_of(self)
        held = self.checkpoint
        return cost_of(self, output_aliases(self, held), unread_proofs(self, held), scattered_keys(held))

    def explain(self, key: str) -> Explanation:
        """Explain how a key of either side is accounted for."""
        return explain(self, key)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "steps": [self._step_json(s) for s in self.steps],
            "initialised": {k: str(v) for k, v in self.inits.items()},
            "tied": dict(self.ties),
            "dropped": dict(self.dropped),
            "proofs": [list(p) for p in (*self.proofs, *self.tie_proofs)],
            "casts": {k: list(v) for k, v in self.casts.items()},
            "assumptions": list(self.assumptions),
            "warnings": [w.to_json() for w in self.warnings],
            "config": [change._asdict() for change in self.config],
            "cost": self.cost.to_json(),
        }

    def to_html(self, title: str = "plan") -> str:
        """Make a page that shows both sides as trees with a ribbon for each rule; it is one file that fetches nothing.

        >>> import torch, ckptsurgery as cs
        >>> cs.plan({"a.w": torch.ones(2, 1)}, ["a.w [x y] -> w [y x]"]).to_html()[:15]
        '<!doctype html>'
        """
        from .picturing import plan_page  # pages are rare, and their parts are large

        return plan_page(self, self.cost, title)

    def _step_json(self, step: Step) -> dict[str, Any]:
        return {
            "kind": step.kind,
            "sources": list(step.sources),
            "targets": [
                {"key": k, "shape": list(s.shape), "dtype": s.dtype} for k, s in zip(step.targets, step.program.outputs)
            ],
            "rules": [self.uses[n].text for n in step.rules],
        }

    def save(
        self,
        path: str | os.PathLike[str],
        max_shard_size: int | str | None = None,
        overwrite: bool = False,
        *,
        max_memory: int | str | None = None,
        companions: bool = False,
        check: bool = False,
        resume: bool = False,
        in_place: bool = False,
        sync: bool = True,
        provenance: bool = False,
        beside: str | Mapping[str, str] = "error",
        carry: Carry | None = None,
        carry_lost: str | None = None,
        progress: bool | None = None,
        dry_run: bool = False,
        together: bool = False,
        format: str | None = None,
        ranks: int = 1,
        template: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    ) -> Report:
        """Stream the result into a file or a folder, which appears whole or not at all.

        Args:
            path: `x.safetensors`, `x.pt` (or `.pth`, `.bin`, `.ckpt`), or a folder, by its suffix.
            max_shard_size: bytes, or "5GB", "5GiB"; for folders.
            overwrite: replace what is there; the source itself may be it.
            max_memory: hold no more at once, beside the interpreter and torch; refused before starting where the
                largest step alone would.
            companions: config and tokenizer files go along into the folder.
            check: read the output back and prove that it is what the plan makes.
            resume: keep what is written when the run is interrupted, and go on from what an interrupted run of this
                very plan left; for safetensors.
            in_place: `path` is the one safetensors file that is read, and nothing but names and shapes changes: write a
                new header over the old one, which is saved beside it and `ckptsurgery restore-header` puts back.
                Refused where more would change, where the header has no room, and where the file has other names on
                the disk.
            sync: wait until all of it is on the disk; without, a power failure may take the output or damage it, and a
                process that is killed still leaves all of it or nothing.
            provenance: write into the metadata what this was made from: the recipe, the source's headers and hashes (so
                it is read once more), the version; `cs.inverse` needs nothing else.
            beside: what becomes of trees beside the model that belong to tensors which the plan changes, such as an
                optimizer's state or an EMA copy: "error" names them, "drop" leaves them out, "keep" copies them as
                they are; or a word for each, `{"optimizer": "drop", "ema": "keep"}`, where `""` means all others.
            carry: paths of such trees that follow the plan; see `carried`. By default those that the recipe names.
            carry_lost: "error", or "drop" to reset optimizer state that cannot follow its parameter.
            progress: True or False to insist on a bar or on none.
            dry_run: refuse what would be refused, report what would be written, and write nothing.
            together: the ranks of the process group share the work; all of them make this call. The bytes are those
                that one process writes.
            format: "dcp" writes a new folder of `torch.distributed.checkpoint`; by default the path's suffix decides.
            ranks: for "dcp": how many files there are, each with its part of the rows of every tensor.
            template: for `x.gguf`: a GGUF file of such a model, whose key-value pairs (architecture, sizes, tokenizer)
                the output gets; or the pairs, such as `{"general.name": "tiny"}`.

        Raises:
            PlanError: values that must be equal differ, the plan initialises what a file cannot, memory would not do,
                two arguments do not go together, or a tree beside the model would no longer fit.
            CheckpointError: the output exists, cannot be written, or the source cannot be read; with `check`, what was
                written is not what was meant.
        """
        options = SaveOptions(
            max_shard_size, overwrite, max_memory, companions, check, resume, in_place, sync, provenance, beside,
            as_carry(carry), carry_lost, progress, dry_run, together, format, ranks,
            template if template is None or isinstance(template, Mapping) else os.fspath(template),
        )  # fmt: skip
        return self._runner.save(self, path, options)

    def state_dict(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Make the result in memory: contiguous tensors in the target's order, tied names sharing one.

        They lie on the CPU, or on `device`: what is only copied goes there from the files, with no copy on the host.
        """
        return self._runner.state_dict(self, device)

    def carried(self, carry: Carry | None = None, carry_lost: str | None = None) -> dict[str, Any]:
        """Make the trees beside the model that follow the plan, in memory: optimizers, averages.

        >>> import torch, ckptsurgery as cs
        >>> net = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> net(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> run = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        >>> plan = cs.plan(run, "weight [o i] -> kernel [i o]")
        >>> plan.carried(["optimizer"])["optimizer"]["state"][0]["exp_avg"].shape
        torch.Size([3, 2])

        State of a parameter's own shape moves as the parameter does, and new entries are zeros. Counters of parameters
        that become one must agree, and so must the hyper-parameters of their groups. Factored moments follow where
        whole matrices move. Averages undergo what the model undergoes, in their own dtype.

        Args:
            carry: dotted paths of trees beside the model; a mapping gives for each the key of each of its parameters,
                in its order, or nothing where names or order tell them. By default those that the recipe names.
            carry_lost: "error", or "drop" to reset state that cannot follow, since the plan computes or copies values.

        Returns:
            path -> tree, with torch tensors.

        Raises:
            PlanError: there is no such tree, an entry belongs to no key, groups disagree, or state cannot follow.
        """
        return self._runner.carried(self, as_carry(carry), carry_lost)

    def load_into(
        self,
        model: nn.Module,
        *,
        assign: bool | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        check_values: bool = False,
        progress: bool | None = None,
    ) -> Report:
        """Put the result into a model, by copy or by assignment; ties are restored, nothing is left on the meta device.

        A plan that was made without a target is held against this model first.

        Args:
            assign: True puts new parameters in place of the old ones, False copies into them. By default a model with
                tensors on the meta device is assigned, and any other is copied into.
            device: where all of the model comes to be, with assignment; a copy stays where the model is.
            seed: of the initialisers.
            check_values: look for NaN and Inf first.
            progress: True or False to insist on a bar or on none.

        Raises:
            PlanError: values that must be equal differ. LoadError: the model cannot take the result; after an I/O
                failure in the middle, `.written` and `.untouched` tell which keys hold what.
        """
        options = LoadOptions(assign=assign, check_values=check_values, seed=seed, progress=progress)
        return self._runner.load_into(self, model, options, device)

    def inverse(self, converted: Any) -> Plan:
        """Plan the way back from the converted checkpoint, with this plan's keys and sizes.

        Args:
            converted: what this plan made: a path, a state_dict, a model.

        Raises:
            PlanError: what was converted is not what this plan makes, or a step loses something; each is listed.
        """
        return self._runner.inverse(self, converted)

    @property
    def checkpoint(self) -> Checkpoint:
        """The source.

        Raises:
            PlanError: it was planned from headers alone.
        """
        return self._runner.checkpoint

    @property
    def _runner(self) -> Runner:
        if self.runner is None:
            raise PlanError(
                Diagnostic("no-source", "it was planned from headers alone, and has no data", help="cs.plan(source, …)")
            )
        return self.runner

    def __str__(self) -> str:
        return plan_text(self, self.cost)

    def __repr__(self) -> str:
        return plan_brief(self)

    def _repr_html_(self) -> str:
        return plan_html(self, self.cost)


class Runner(Protocol):
    """Carries plans over one checkpoint out."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The source."""

    def save(self, plan: Plan, path: str | os.PathLike[str], options: SaveOptions) -> Report:
        """As `Plan.save`."""

    def state_dict(self, plan: Plan, device: torch.device | str | None) -> dict[str, Tensor]:
        """As `Plan.state_dict`."""

    def carried(self, plan: Plan, carry: Mapping[str, Sequence[str]] | None, lost: str | None) -> dict[str, Any]:
        """As `Plan.carried`."""

    def load_into(
        self, plan: Plan, model: nn.Module, options: LoadOptions, device: torch.device | str | None
    ) -> Report:
        """As `Plan.load_into`."""

    def inverse(self, plan: Plan, converted: Any) -> Plan:
        """As `Plan.inverse`."""


def renaming(source: Mapping[str, TensorSpec], names: Mapping[str, str], text: str) -> Plan:
    """Return the plan that copies tensors to other names.

    >>> renaming({"m.w": TensorSpec([2], "F32")}, {"m.w": "w"}, "m.{k...} -> {k...}").steps[0].targets
    ('w',)

    Args:
        names: source key -> target key, for all that are copied; no two of them alike.
        text: what is said of them.
    """
    programs = {spec: Program.of((spec,), ()) for spec in set(source.values())}
    rows = zip(zip(names), zip(names.values()), map(programs.__getitem__, map(source.__getitem__, names)), repeat((0,)))
    specs = dict(zip(names.values(), map(source.__getitem__, names)))
    return Plan(tuple(steps_of(rows)), (RuleUse(text, None, is_rest=True),), specs, source=source)


def retargeted(plan: Plan, names: Mapping[str, str]) -> Plan:
    """Return the plan whose targets have other names.

    Args:
        names: target key -> its new name, for those that change.
    """

    def new(key: str) -> str:
        return names.get(key, key)

    return replace(
        plan,
        steps=tuple(step._replace(targets=tuple(map(new, step.targets))) for step in plan.steps),
        specs={new(key): spec for key, spec in plan.specs.items()},
        inits={new(key): initialiser for key, initialiser in plan.inits.items()},
        ties={new(key): new(base) for key, base in plan.ties.items()},
        tie_proofs=tuple((new(a), new(b)) for a, b in plan.tie_proofs),
        casts={new(key): cast for key, cast in plan.casts.items()},
        target=plan.target and plan.target.renamed(names),
    )
