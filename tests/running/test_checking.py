"""`check` reads the output back before it takes its place, and proves each rule in the way that fits it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.planning.layout import Layout, run_piece
from ckptsurgery.planning.steps import Move, Program
from ckptsurgery.running.conserving import fingerprint_of
from ckptsurgery.storage.output.staging import MARK, Writer

W = torch.arange(24.0).reshape(6, 4)
RECIPES = [
    cs.Recipe(rest="keep"),
    cs.Recipe(["h.{i}.w [(p a) b] -> l.{i}.{p:q,k,v}.w [a b]"], rest="keep"),
    cs.Recipe(["h.{i}.w [a b] -> all [i b a]"], rest="keep"),
    cs.Recipe(["h.{i}.w -> h.{i}.w | cast(bf16)"], rest="keep"),
    cs.Recipe(["s -> s"], rest="keep", tie={"t": "s"}),
]
OUTS = ["out.safetensors", "out.pt", "out"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    cs.save({"h.0.w": W, "h.1.w": W + 1, "tied": W, "s": torch.tensor(3), "e": torch.zeros(0, 2)}, path)
    return path


@pytest.fixture
def broken() -> Iterator[Callable[[Callable[[Writer], None]], None]]:
    """Lets something happen to an output that is durable and has not been read back."""
    finish = Writer.finish
    with pytest.MonkeyPatch.context() as patch:

        def by(accident: Callable[[Writer], None]) -> None:
            def finished(self: Writer) -> None:
                finish(self)
                accident(self)

            patch.setattr(Writer, "finish", finished)

        yield by


def flip(writer: Writer, key: str) -> None:
    place = writer.places[key]
    descriptor = os.open(place.file, os.O_RDWR)
    (byte,) = os.pread(descriptor, 1, place.offset + place.nbytes - 1)
    os.pwrite(descriptor, bytes([byte ^ 1]), place.offset + place.nbytes - 1)
    os.close(descriptor)


def swap(writer: Writer, key: str, nbytes: int) -> None:
    """Exchange the first two runs of bytes of a tensor."""
    file, at, _ = writer.places[key]
    descriptor = os.open(file, os.O_RDWR)
    first, second = os.pread(descriptor, nbytes, at), os.pread(descriptor, nbytes, at + nbytes)
    os.pwrite(descriptor, second + first, at)
    os.close(descriptor)


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("shards", [None, 50])
def test_what_was_written_passes_the_check(source: Path, recipe: cs.Recipe, out: str, shards: int | None) -> None:
    if shards and "." in out:
        return
    plan = cs.plan(source, recipe)
    for overwrite in (False, True):
        report = plan.save(source.with_name(out), shards, overwrite=overwrite, check=True)
        assert any("read back" in note for note in report.notes)
        assert sum(proof.nbytes for proof in report.proofs) == report.bytes_written
        assert sum(proof.tensors for proof in report.proofs) == len(report.loaded)
    assert not list(source.parent.rglob(f"*{MARK}*"))


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
@pytest.mark.parametrize("out", OUTS)
def test_any_changed_bit_is_found_its_key_named_and_nothing_is_replaced(
    source: Path, recipe: cs.Recipe, out: str, broken: Callable[[Callable[[Writer], None]], None]
) -> None:
    plan, path = cs.plan(source, recipe), source.with_name(out)
    cs.save({"old": W}, path)
    before = {file: file.read_bytes() for file in source.parent.rglob("*") if file.is_file()}
    keys: list[str] = []
    broken(lambda writer: keys.extend(key for key, place in writer.places.items() if place.nbytes))
    plan.save(source.with_name("other" + out), check=True)
    for key in keys:
        broken(lambda writer, key=key: flip(writer, key))  # type: ignore[misc]
        with pytest.raises(cs.CheckpointError) as told:
            plan.save(path, overwrite=True, check=True)
        assert all(d.help and "nothing was put in place" in d.help for d in told.value.diagnostics)
        assert told.value.diagnostics[0].code == "check-values-differ"
        assert set(told.value.diagnostics[0].notes) == {key}
        assert all(file.read_bytes() == data for file, data in before.items())
        assert not list(source.parent.rglob(f"*{MARK}*"))


def test_rows_that_changed_places_are_found_though_no_element_is_lost(
    source: Path, broken: Callable[[Callable[[Writer], None]], None]
) -> None:
    plan = cs.plan(source, RECIPES[2])
    broken(lambda writer: swap(writer, "all", 24))
    with pytest.raises(cs.CheckpointError) as told:
        plan.save(source.with_name("x"), check=True)
    assert [(d.code, d.notes) for d in told.value.diagnostics] == [("check-values-differ", ("all",))]
    assert not source.with_name("x").exists()


def test_a_rearrangement_that_doubles_one_element_and_loses_another_is_found_by_the_fingerprint(source: Path) -> None:
    """The writer and who looks place by place believe it alike; the elements tell."""
    whole = cs.plan(source, cs.Recipe(["s -> s"], rest="drop"))
    plan = cs.plan(source, cs.Recipe(["h.0.w [a b] -> x [b a]"], rest="drop"))
    (step,) = plan.steps
    wrong = Layout(((6, 4),), ((4, 6),), (run_piece(0, 0, 23), run_piece(0, 0, 1, 0, 23)))
    program = Program(step.program.inputs, (Move(wrong, ("F32",)),), step.program.outputs)
    assert wrong.invertible and not whole.warnings
    with pytest.raises(cs.CheckpointError, match="check-elements-differ"):
        replace(plan, steps=(step._replace(program=program),)).save(source.with_name("x.safetensors"), check=True)
    assert not source.with_name("x.safetensors").exists()


def test_what_does_not_pass_is_not_gone_on_from(
    source: Path, broken: Callable[[Callable[[Writer], None]], None]
) -> None:
    plan = cs.plan(source, RECIPES[1])
    broken(lambda writer: flip(writer, "l.0.k.w"))
    for out in ("x.safetensors", "x"):
        with pytest.raises(cs.CheckpointError, match="check-values-differ"):
            plan.save(source.with_name(out), check=True, resume=True)
        assert [path.name for path in source.parent.iterdir()] == [source.name]
    broken(lambda writer: None)
    report = plan.save(source.with_name("x"), check=True, resume=True)
    assert not any("resumed" in note for note in report.notes)


def test_each_rule_says_how_it_was_proved(source: Path) -> None:
    rules = [
        "h.0.w [(p a) b] -> l.{p:q,k}.w [a b]",
        "h.1.w -> m.w | cast(f64)",
        "tied -> t, u",
        "{k:s,e} -> {k}",
    ]
    cs.save(
        {"h.0.w": W, "h.1.w": W + 1, "tied": W + 2, "s": torch.tensor(3), "e": torch.zeros(0, 2)},
        source,
        overwrite=True,
    )
    report = cs.plan(source, rules).save(source.with_name("x.safetensors"), check=True)
    told = {proof.rule: (proof.how, proof.tensors, proof.elements, proof.proof) for proof in report.proofs}
    assert told == {
        rules[0]: ("moved", 2, 24, "equal at every place, each element of the sources once"),
        rules[1]: ("computed", 1, 24, "made again, equal bytes"),
        rules[2]: ("copied", 2, 48, "equal bytes"),
        rules[3]: ("copied", 2, 1, "equal bytes"),
    }
    assert [proof.fingerprint is not None for proof in report.proofs].count(True) == 1
    assert json.loads(json.dumps(report.to_json()))["proofs"][0]["rule"] in told
    assert all(proof.rule in str(report) for proof in report.proofs)


def test_elements_that_a_rule_leaves_out_or_repeats_are_compared_place_by_place(source: Path) -> None:
    recipe = cs.Recipe(["h.{i}.w [a b] -> x.{i} [b a], y.{i} [b a]"], rest="drop")
    (proof,) = cs.plan(source, recipe).save(source.with_name("x.safetensors"), check=True).proofs
    assert (proof.how, proof.elements, proof.proof, proof.fingerprint) == ("moved", 96, "equal at every place", None)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.complex128]
)
def test_elements_of_any_width_are_proved(dtype: torch.dtype, tmp_path: Path) -> None:
    source = {"w": torch.randint(0, 2, (5, 700)).to(dtype)}
    plan = cs.plan(source, "w [a (b c)] -> v [c b a]", dims={"c": 7})
    (proof,) = plan.save(tmp_path / "x.pt", check=True).proofs
    assert proof.fingerprint is not None and proof.elements == 3500


def test_values_that_differ_in_no_comparison_of_numbers_are_told_apart(
    source: Path, broken: Callable[[Callable[[Writer], None]], None]
) -> None:
    plan = cs.plan({"w": torch.tensor([[float("nan"), 0.0], [-0.0, 1.0]])}, "w [a b] -> v [b a]")
    plan.save(source.with_name("x.safetensors"), check=True)
    broken(lambda writer: swap(writer, "v", 4))
    with pytest.raises(cs.CheckpointError, match="check-values-differ"):
        plan.save(source.with_name("y.safetensors"), check=True)


def test_large_boxes_are_compared_part_by_part(tmp_path: Path) -> None:
    state = {f"e.{i}.w": torch.randn(1300, 1100) for i in range(3)}
    cs.save(state, tmp_path / "x.safetensors")
    plan = cs.plan(tmp_path / "x.safetensors", "e.{e}.w [f d] -> all [d (e f)]")
    (proof,) = plan.save(tmp_path / "y.safetensors", check=True).proofs
    assert proof.elements == 3 * 1300 * 1100 and proof.fingerprint


def test_missing_keys_other_shapes_and_lost_ties_are_all_named(source: Path) -> None:
    from ckptsurgery.planning.sharing import output_aliases
    from ckptsurgery.running.checking import check_output

    plan, out = cs.plan(source, cs.Recipe(rest="keep")), source.with_name("out.safetensors")
    cs.save({"h.0.w": W, "h.1.w": W.bfloat16(), "tied": W.clone(), "e": torch.zeros(0, 2), "more": W + 2}, out)
    with pytest.raises(cs.CheckpointError) as error:
        check_output(plan, plan.checkpoint, cs.open(out), output_aliases(plan, plan.checkpoint))
    codes = [d.code.removeprefix("check-") for d in error.value.diagnostics]
    assert codes == ["keys-missing", "keys-unexpected", "specs-differ", "ties-lost"]


def test_replacing_the_source_itself_can_be_checked(source: Path) -> None:
    before = cs.open(source).state_dict()
    cs.plan(source, cs.Recipe(rest="{k...} -> m.{k...}")).save(source, overwrite=True, check=True)
    assert all(torch.equal(t, before[k.removeprefix("m.")]) for k, t in cs.open(source).state_dict().items())


def test_a_source_that_changes_during_the_check_is_what_is_told(
    source: Path, broken: Callable[[Callable[[Writer], None]], None]
) -> None:
    def change(_: Writer) -> None:
        data = bytearray(source.read_bytes())
        data[-100:] = bytes(100)
        with source.open("r+b") as file:
            file.write(data)
        os.utime(source, ns=(1, 1))  # a clock may be too coarse to show a change within a millisecond

    broken(change)
    with pytest.raises(cs.CheckpointError, match="file-changed"):
        cs.plan(source, RECIPES[0]).save(source.with_name("x.safetensors"), check=True)


def test_memory_does_not_grow_with_what_is_checked(tmp_path: Path) -> None:
    """In a process of its own, which is asked for the most that it ever held."""
    program = (
        "import sys, resource, numpy, torch, ckptsurgery as cs\n"
        "from ckptsurgery.running.checking import check_output\n"
        "source, *rest = sys.argv[1:]\n"
        "plans = [(cs.plan(source, rule), cs.open(out)) for rule, out in zip(rest[::2], rest[1::2])]\n"
        "torch.ones(9).to(torch.bfloat16)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for plan, out in plans: check_output(plan, plan.checkpoint, out, {})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    source, rest = tmp_path / "x.safetensors", []
    cs.save({f"e.{i}.w": torch.randn(4000, 500) for i in range(8)}, source)
    for number, rule in enumerate(("e.{e}.w [f d] -> all [d e f]", "e.{e}.w -> m.{e}.w | cast(bf16)")):
        rest += [rule, str(tmp_path / f"{number}.safetensors")]
        cs.plan(source, rule).save(rest[-1])
    grown = int(subprocess.check_output([sys.executable, "-c", program, str(source), *rest], text=True))
    assert grown < 40_000  # KiB, of 62,500 in the source


@given(st.lists(st.integers(0, 7), max_size=40), st.randoms(use_true_random=False), st.sampled_from([1, 2, 4, 8, 16]))
def test_a_fingerprint_tells_lists_of_elements_apart_and_not_their_orders(
    values: list[int], random: object, width: int
) -> None:
    def told(numbers: list[int]) -> int:
        return fingerprint_of(b"".join(n.to_bytes(width, "little") for n in numbers), width)

    other = list(values)
    random.shuffle(other)  # type: ignore[attr-defined]
    assert told(values) == told(other)
    if values:
        other[0] = (other[0] + 1) % 8
        assert (told(values) == told(other)) is (Counter(values) == Counter(other))
    assert told([*values, 0]) != told(values)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npz"])
def test_what_must_be_equal_and_is_not_is_not_written(suffix: str, tmp_path: Path) -> None:
    plan = cs.plan({"a": torch.ones(2), "b": torch.zeros(2)}, cs.Recipe(["a -> a"], same={"b": "a"}))
    with pytest.raises(cs.PlanError, match="tied-values-differ"):
        plan.save(tmp_path / f"x.{suffix}")
    assert not list(tmp_path.iterdir())


def test_names_that_the_target_ties_and_rules_make_apart_are_told_what_to_leave_out(tmp_path: Path) -> None:
    tied = torch.ones(2)
    target = tmp_path / "tied.safetensors"
    cs.save({"x": tied, "y": tied}, target)
    plan = cs.plan({"a": torch.ones(2), "b": torch.zeros(2)}, ["a -> x", "b -> y"], target=target)
    with pytest.raises(cs.PlanError) as caught:
        plan.save(tmp_path / "out.safetensors")
    (problem,) = caught.value.diagnostics
    assert problem.code == "tied-values-differ"
    assert problem.help == "say which one is meant: leave out the rule for the other"
    cs.plan({"a": torch.ones(2)}, ["a -> x"], target=target).save(tmp_path / "out.safetensors")
    assert cs.open(tmp_path / "out.safetensors").ties[0].names == ("x", "y")
