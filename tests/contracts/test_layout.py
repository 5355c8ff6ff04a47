"""What every Layout keeps, and the functions that split parameters into slots."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.layout import Layout, Whole, check_partition, fragments, split
from diloco.messages import ModuleKey, Shape
from diloco.placing import place

NAMES = st.text("abw.12_", min_size=1, max_size=10)
PARAMETERS = st.dictionaries(NAMES, st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=30)
LLAMA = {
    "model.embed_tokens.weight": (100, 8),
    **{f"model.layers.{i}.{part}.weight": (8, 8) for i in range(7) for part in ("attn", "mlp")},
    "model.norm.weight": (8,),
    "lm_head.weight": (100, 8),
}

# Each layout with settings under which it can hold any parameters.
ROWS: dict[str, Layout] = {"whole": Whole(), "whole_by_pattern": Whole(patterns=[r"^[^w]*$", "w"])}


def takes_all(layout: Layout, parameters: dict[str, Shape]) -> bool:
    """Patterns must each take something; other layouts always can."""
    if isinstance(layout, Whole) and layout.patterns:
        return all(any(re.search(pattern, name) for name in parameters) for pattern in layout.patterns)
    return True


@pytest.mark.parametrize("layout", ROWS.values(), ids=ROWS)
@given(parameters=PARAMETERS, shards=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_build_gives_a_partition_that_the_shards_hold(
    layout: Layout, parameters: dict[str, Shape], shards: int
) -> None:
    if not takes_all(layout, parameters):
        with pytest.raises(ValueError, match="takes no parameter"):
            layout.build(parameters, shards)
        return
    modules = layout.build(parameters, shards)
    named = [name for names in modules.slots.values() for name in names]
    assert sorted(named) == sorted(parameters)  # each exactly once
    assert all(modules.slots.values())
    for path in modules.paths:
        assert set(path) == set(modules.slots)
        for slot, key in path.items():
            assert modules.slot_of(key) == slot
    assert set(modules.shards) == {key for path in modules.paths for key in path.values()}
    assert all(0 <= shard < shards for shard in modules.shards.values())
    assert layout.build(parameters, shards) == modules


@given(parameters=PARAMETERS, shards=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_whole_uses_as_many_shards_as_it_can_and_balances_them(parameters: dict[str, Shape], shards: int) -> None:
    modules = Whole().build(parameters, shards)
    sizes = {name: math.prod(shape) for name, shape in parameters.items()}
    loads = [0] * shards
    for slot, key in modules.paths[0].items():
        loads[modules.shards[key]] += sum(sizes[name] for name in modules.slots[slot])
    assert max(loads) - min(loads) <= max(sizes.values())
    order = {name: i for i, name in enumerate(parameters)}
    for names in modules.slots.values():
        assert sorted(names, key=order.__getitem__) == list(names)  # the model's order within a slot
    if min(sizes.values()) > 0:
        assert len(modules.slots) == min(shards, len(parameters))


def test_a_slot_is_made_for_each_pattern() -> None:
    modules = Whole(patterns=[r"layers\.[0-3]\.", r"layers\.[4-6]\.", "embed|norm|head"]).build(LLAMA, 2)
    assert [len(names) for names in modules.slots.values()] == [8, 6, 3]


def test_no_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layout\.patterns.*\[a"):
        Whole(patterns=["[a"])


@given(parameters=PARAMETERS, patterns=st.dictionaries(st.sampled_from("xyz"), NAMES.map(re.escape), min_size=1))
@settings(max_examples=150, deadline=None)
def test_split_gives_a_partition_or_names_the_parameter(parameters: dict[str, Shape], patterns: dict[str, str]) -> None:
    takers = {name: [s for s, pattern in patterns.items() if re.search(pattern, name)] for name in parameters}
    problems = [name for name, slots in takers.items() if len(slots) != 1]
    idle = [slot for slot in patterns if all(slot not in slots for slots in takers.values())]
    if not problems and not idle:
        found = split(parameters, patterns)
        assert {name: slot for slot, names in found.items() for name in names} == {
            name: slots[0] for name, slots in takers.items()
        }
        return
    with pytest.raises(ValueError, match=r"slot") as caught:
        split(parameters, patterns)
    assert any(name in str(caught.value) for name in [*problems, *idle])


def test_a_parameter_left_out_is_named() -> None:
    with pytest.raises(ValueError, match=r"no slot takes model\.norm\.weight, lm_head\.weight;"):
        split(LLAMA, {"embedding": "embed", "blocks": "layers"})


def test_a_parameter_taken_twice_is_named() -> None:
    with pytest.raises(ValueError, match=r"more than one slot takes lm_head\.weight;"):
        split(LLAMA, {"all": ".", "head": "head"})


def test_a_pattern_that_takes_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="slot typo takes no parameter"):
        split(LLAMA, {"all": ".", "typo": "haed"})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="which the model has not"):
        check_partition({"a": ["p", "q"]}, {"p": (1,)})


def test_fragments_strided() -> None:
    """Seven blocks by three make three fragments: 0 3 6, 1 4, 2 5, and what is in no block."""
    found = fragments(LLAMA, layers_per_fragment=3, strided=True)
    assert {
        slot: sorted({n.split(".")[2] for n in names})
        for slot, names in found.items()
        if not slot.startswith("outside")
    } == {
        "blocks.0": ["0", "3", "6"],
        "blocks.1": ["1", "4"],
        "blocks.2": ["2", "5"],
    }
    assert found["outside.0"] == ["model.embed_tokens.weight"]  # each matrix for itself
    assert found["outside.1"] == ["lm_head.weight", "model.norm.weight"]


def test_fragments_sequential() -> None:
    found = fragments(LLAMA, layers_per_fragment=3, strided=False)
    assert {
        slot: sorted({n.split(".")[2] for n in names})
        for slot, names in found.items()
        if not slot.startswith("outside")
    } == {
        "blocks.0": ["0", "1", "2"],
        "blocks.1": ["3", "4", "5"],
        "blocks.2": ["6"],
    }


@given(blocks=st.integers(1, 40), per=st.integers(1, 45), strided=st.booleans(), outside=st.booleans())
@settings(max_examples=100, deadline=None)
def test_fragments_are_a_partition_of_nearly_equal_parts(blocks: int, per: int, strided: bool, outside: bool) -> None:
    parameters: dict[str, Shape] = {f"h.{i}.{part}": (2,) for i in range(blocks) for part in "ab"}
    if outside:
        parameters["wte"] = (3,)
    found = fragments(parameters, layers_per_fragment=per, strided=strided)
    assert sorted(name for names in found.values() for name in names) == sorted(parameters)
    counts = [len(names) // 2 for slot, names in found.items() if not slot.startswith("outside")]
    assert len(counts) == math.ceil(blocks / per)
    assert max(counts) <= per
    if strided:
        assert max(counts) - min(counts) <= 1


def test_blocks_are_in_order_of_number_and_not_of_letters() -> None:
    parameters: dict[str, Shape] = {f"h.{i}.w": (1,) for i in range(12)}
    assert fragments(parameters, layers_per_fragment=4, strided=False)["blocks.2"] == [
        "h.8.w",
        "h.9.w",
        "h.10.w",
        "h.11.w",
    ]


def test_a_model_without_blocks_has_no_fragments() -> None:
    with pytest.raises(ValueError, match="no numbered blocks"):
        fragments({"weight": (2, 2)})
    with pytest.raises(ValueError, match="layers_per_fragment=0"):
        fragments(LLAMA, layers_per_fragment=0)


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=40), shards=st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_place_is_balanced(sizes: list[int], shards: int) -> None:
    named = {ModuleKey(f"m{i}/0"): size for i, size in enumerate(sizes)}
    placed = place(named, shards)
    assert list(placed) == list(named)
    loads = [sum(named[key] for key, holder in placed.items() if holder == shard) for shard in range(shards)]
    assert max(loads) - min(loads) <= max(sizes)


def test_place_does_not_depend_on_the_order_of_the_modules() -> None:
    sizes = {ModuleKey(f"m{i}/0"): size for i, size in enumerate([5, 5, 3, 3, 3, 9])}
    assert place(sizes, 3) == place(dict(reversed(sizes.items())), 3)
